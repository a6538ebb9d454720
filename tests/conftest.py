"""Surroundings of every test: offline, seeded, with the shapes of public signatures checked.

What must happen before the package, or a plotting or hub library, is imported happens at import of this file.
"""

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import beartype
import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Imports and thousands of collected tests make objects that all stay: looking for garbage among them takes a third of
# the collection's time. `pytest_collection_finish` switches it on again.
gc.disable()

ROOT = Path(__file__).resolve().parents[1]
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
SEED = 20230305
# Constant, since the order of a sum and so its last digits depends on it; one, since two threads that wait for
# each other on a busy machine make small operations a hundred times slower.
THREADS = 1

# The hook takes the checker by name, hence a module for it. Numbers count as what they are used for: an int
# where a float is asked for and numpy's scalars for Python's are no errors.
_overrides: Any = beartype.BeartypeHintOverrides
_checker: Any = ModuleType("subspace_lab_shape_checker")
_checker.check = beartype.beartype(
    conf=beartype.BeartypeConf(
        hint_overrides=_overrides({int: int | np.integer, float: float | int | np.floating | np.integer})
    )
)
sys.modules[_checker.__name__] = _checker
_early = sorted(name for name in sys.modules if name.split(".")[0] == "subspace_lab")
if _early:
    raise RuntimeError(f"{_early} were imported before the shape checks were installed: their shapes go unchecked")
install_import_hook("subspace_lab", f"{_checker.__name__}.check")

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if IN_CI else "local")


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of small pretrained models and data sets, which is no part of the repository."""
    folder = Path(os.environ.get("SUBSPACE_LAB_ASSETS", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        reason = f"no assets at {folder}: set SUBSPACE_LAB_ASSETS to the folder with models/ and data/"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def steady_state() -> Iterator[None]:
    """The same random numbers, threads, dtype and gradient mode at the start of each test."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
