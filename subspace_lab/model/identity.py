"""The identity of a model for results: its name, its class, and a digest of its weights."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from subspace_lab.model.offloading import named_weights

SAMPLED = 64  # numbers of each tensor that go into the digest
LIBRARIES = ("subspace-lab", "torch", "transformers", "nnsight")


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Class, name, size and dtype of a model, with a digest that is different for other weights.

    The digest uses a sample of each parameter's numbers. Training changes it, and so does rounding to another dtype.
    """
    digest, dtypes, count = hashlib.sha256(), dict[str, int](), 0
    for name, parameter in named_weights(model):
        count += parameter.numel()
        kind = str(parameter.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + parameter.numel()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].float().cpu().contiguous()
            digest.update(sample.numpy().tobytes())
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or ""
    return {
        "class": type(model).__name__,
        # For a local folder only its name, because its location is private.
        "name": (Path(name).name if Path(name).is_dir() else name) or None,
        "parameters": count,
        "dtype": max(dtypes, key=lambda kind: dtypes[kind], default=None),
        "weights": digest.hexdigest()[:16],
    }


def versions() -> dict[str, str | None]:
    """The versions of the libraries that a result depends on."""
    return {name.replace("-", "_"): _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # not installed, run from a checkout
        return None
