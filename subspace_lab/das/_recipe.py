"""The recipe of a sweep: equal recipes give equal numbers."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import torch

from subspace_lab.das._places import Places
from subspace_lab.das._tensors import tensors_in
from subspace_lab.das.fits import place_of
from subspace_lab.das.methods.method import Method
from subspace_lab.das.pairs import Pairs

STEPS = (0, 1)  # if pairs are drawn at each step: the steps whose pairs go into the recipe


def recipe_of(places: Places, model: dict[str, Any], versions: dict[str, Any]) -> dict[str, Any]:
    """Everything that the results of a sweep depend on, as JSON.

    The model is described by its weights, not by its name: the results do not depend on the model's folder.
    """
    return {
        "task": places.pairs.task,
        "variables": places.pairs.variables,
        "model": {name: value for name, value in model.items() if name != "name"},
        "data": data_of(places.pairs),
        "sites": [place_of(one) for one in places.assignments],
        "methods": [{**method.as_dict(), **hidden(method)} for method in places.methods],
        "seeds": places.seeds,
        "training": {k: v for k, v in vars(places.config).items() if k != "seed"},
        "loss": identity_of(places.loss),
        "metrics": [identity_of(metric) for metric in places.metrics],
        "unmatched": places.unmatched,
        "screen": None if places.screen is None else asdict(places.screen),
        "versions": versions,
    }


def data_of(pairs: Pairs) -> list[str]:
    """Fingerprints of the pairs. If training pairs are drawn at each step, those of the first steps are used."""
    stream = pairs.train
    if not callable(stream):
        return [pairs.fingerprint()]
    return [replace(pairs, train=stream(step)).fingerprint() for step in STEPS]


def hidden(method: Method) -> dict[str, str]:
    """Digests of the settings that are not in `Method.as_dict`, such as the basis from which a search starts."""
    found = {}
    for one in fields(method):
        value = getattr(method, one.name)
        if one.compare or value is None:
            continue
        tensors = list(tensors_in(value))
        digest = hashlib.sha256(b"" if tensors else repr(value).encode())
        for tensor in tensors:
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[one.name] = digest.hexdigest()[:16]
    return found


def identity_of(function: Callable[..., Any]) -> str:
    """Text that identifies a loss or a metric: its name and settings, or its code."""
    if isinstance(function, functools.partial):
        return f"{identity_of(function.func)}(…, {function.args}, {sorted(function.keywords.items())})"
    if not inspect.isroutine(function):
        return repr(function) if is_dataclass(function) else type(function).__qualname__
    name = f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if "<lambda>" not in name or code is None:
        return name
    constants = [one for one in code.co_consts if not inspect.iscode(one)]
    digest = hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()
    return f"{name} {digest[:16]}"
