"""The argument by which a model takes its key-value cache.

transformers gives it a new name, `cache`, in the place of `past_key_values` (and of `cache_params` in state-space
models). The old names raise a FutureWarning for a while and are then refused, while models with code of their own
may know the old ones alone. Callers of this package may use any of the names; what is passed on is the name that
the model's forward, or the installed `generate`, wants.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values", "cache_params")


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among the inputs, under whichever name; None where there is none.

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
    """The inputs with their cache under a name; as they are where the name is None or no cache is given."""
    found = given_cache(inputs)
    if name is None or found is None:
        return dict(inputs)
    return {**without_cache(inputs), name: found}


def forward_name(model: nn.Module) -> str | None:
    """The name that the model's forward has for its cache; None where no forward has one.

    A wrapper that passes any keyword on (peft's, say) has the name of the model inside it.
    """
    for module in model.modules():
        name = _parameter(type(module), "forward")  # type: ignore[arg-type]
        if name is not None:
            return name
    return None


def generate_name(model: nn.Module) -> str:
    """The name that the installed `generate` has for the cache of this model."""
    from transformers import GenerationMixin

    # `generate` itself takes any keyword; this is what it hands the cache to.
    general = _parameter(GenerationMixin, "prepare_inputs_for_generation")
    if general == "cache":
        return general
    own = _parameter(type(model), "prepare_inputs_for_generation")  # type: ignore[arg-type]
    return own or general or "past_key_values"


@cache
def _parameter(kind: type, method: str) -> str | None:
    """The name that a class's method has for the cache."""
    try:
        known = inspect.signature(getattr(kind, method, None)).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no such method, or one that is not written in Python
        return None
    return next((name for name in NAMES if name in known), None)
