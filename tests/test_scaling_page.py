"""Every Python block of docs/scaling.md runs as it is printed, and each way gives the numbers of one process.

The reader's objects are the small decoder that comes with the package, with pairs of a task that it knows. One worker
stands in for four, and Dask in this process for a Slurm cluster; `test_sweep_executors.py` has
executors of all kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_readme import ROOT, SHIPPED, blocks, shorten_training
from test_sweep_folders import same
from transformers import AutoModelForCausalLM, AutoTokenizer

import subspace_lab.das
from subspace_lab import DAS, Backbone, DifferenceOfMeans, FullVector, RandomSubspace, Site, load_task
from subspace_lab.das import Fits, local_workers

PAGE = "docs/scaling.md"
PYTHON = [(line, text) for language, line, text in blocks(PAGE) if language == "python"]
SHARED = '"/shared/agreement"'


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: sums over several threads are rounded elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slurm() -> ModuleType:
    """dask_jobqueue's name, as far as the page uses it, for a cluster in this process."""
    from distributed import LocalCluster

    class SLURMCluster(LocalCluster):
        def __init__(self, cores: int, processes: int, memory: str, walltime: str) -> None:
            assert (cores, processes, memory, walltime) == (4, 1, "32GB", "04:00:00")
            super().__init__(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)

        def scale(self, n: int = 0, *, jobs: int = 0) -> None:  # type: ignore[override]
            assert jobs == 16 or n == 0
            if not jobs:  # when it ends
                super().scale(0)

    module: Any = ModuleType("dask_jobqueue")
    module.SLURMCluster = SLURMCluster
    return module


def test_each_way_to_search_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'subspace-lab[cluster]'")
    shorten_training(monkeypatch)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", slurm())
    monkeypatch.setattr(subspace_lab.das, "local_workers", lambda workers: local_workers(workers // 4, threads=1))
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    space: dict[str, Any] = {
        "__name__": "__main__",
        "backbone": Backbone(AutoModelForCausalLM.from_pretrained(SHIPPED)),
        "pairs": load_task("price_tagging").pairs(tokenizer, train=40, dev=20, test=20),
        "sites": [Site("block_output", layer, "last") for layer in range(3)],
        "methods": [DAS(1), DifferenceOfMeans(), RandomSubspace(1), FullVector()],
    }
    found: list[Fits] = []
    for number, (line, text) in enumerate(PYTHON):
        folder = tmp_path / str(number)  # each block anew, although some continue in one folder
        folder.mkdir()
        monkeypatch.chdir(folder)
        here = text.replace(SHARED, '"shared"')
        exec(compile("\n" * (line - 1) + here, ROOT / PAGE, "exec"), space)
        found.append(space["fits"])
        name = next(name for name in ("runs/agreement", "runs/screened", "shared") if f'"{name}"' in here)
        assert same(Fits.load(folder / name), found[-1]), text
    alone, processes, cluster, screened = found
    assert len(alone.places) == 3 and same(processes, alone) and same(cluster, alone)
    cells = {(fit.place, fit.method.label, fit.seed) for fit in alone}
    left_out = {(one.place, one.method, one.seed) for one in screened.screened}
    assert {(fit.place, fit.method.label, fit.seed) for fit in screened} | left_out == cells
    assert sum(SHARED in text for _, text in PYTHON) == 1
