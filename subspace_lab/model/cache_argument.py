"""The name of the argument for a model's key-value cache.

transformers is replacing the name `past_key_values` (and `cache_params` in state-space models) by a new name,
`cache`. The old names raise a FutureWarning for a while and are refused later; custom models may only know the old
names. Callers of this package may use any of these names. The cache is passed on under the name that the model's
forward, or the installed `generate`, expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values", "cache_params")


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among the inputs, under any of its names; None if there is none.

    Raises:
        ValueError: caches under several names.
    """
    found = [name for name in NAMES if inputs.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"A cache is given as {found}: these are names of one argument; use {found[0]!r} alone.")
    return inputs[found[0]] if found else None


def without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without the cache."""
    return {name: value for name, value in inputs.items() if name not in NAMES}


def named_for(name: str | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with their cache under this name; unchanged if the name is None or there is no cache."""
    found = given_cache(inputs)
    if name is None or found is None:
        return dict(inputs)
    return {**without_cache(inputs), name: found}


def forward_name(model: nn.Module) -> str | None:
    """The name of the cache in the model's forward; None if its forward takes no cache.

    For a wrapper that passes on any keyword (such as peft's) it is the name in the model inside.
    """
    for module in model.modules():
        name = _parameter(type(module), "forward")  # type: ignore[arg-type]
        if name is not None:
            return name
    return None


def generate_name(model: nn.Module) -> str:
    """The name that the installed `generate` uses for the cache of this model."""
    from transformers import GenerationMixin

    # `generate` itself accepts any keyword and passes the cache to this method.
    general = _parameter(GenerationMixin, "prepare_inputs_for_generation")
    if general == "cache":
        return general
    own = _parameter(type(model), "prepare_inputs_for_generation")  # type: ignore[arg-type]
    return own or general or "past_key_values"


@cache
def _parameter(kind: type, method: str) -> str | None:
    """The name of the cache among the parameters of a class's method; None if it has none."""
    try:
        known = inspect.signature(getattr(kind, method, None)).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no such method, or it is not written in Python
        return None
    return next((name for name in NAMES if name in known), None)
