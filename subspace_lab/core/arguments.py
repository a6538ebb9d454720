"""Checks of argument types: one clear sentence instead of an error from deep inside."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any


def whole_number(value: Any, name: str) -> int:
    """`value` as an int; numpy's integers are accepted. TypeError for a float, a bool or text."""
    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}={value!r}: a whole number is needed, found {type(value).__name__}.")


def instance(value: Any, kind: type | tuple[type, ...], name: str, hint: str = "") -> None:
    """TypeError unless `value` has the type; `hint` says how to get such a value."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(
            f"{name} is of type {type(value).__name__}; needed is {wanted}{f': {hint}' if hint else ''}."
        )


def finite(value: Any, name: str) -> None:
    """ValueError for a tensor of whole numbers, or with NaN or infinite numbers."""
    if value.is_meta:
        return
    if not value.is_floating_point():
        raise ValueError(
            f"{name} holds {str(value.dtype).removeprefix('torch.')} numbers; needed are floating ones."
        )
    wrong = int((~value.isfinite()).sum())
    if wrong:
        raise ValueError(f"{name}: {wrong} of {value.numel()} numbers are NaN or infinite.")


def no_zero_vector(value: Any, axis: int, name: str) -> None:
    """ValueError if a vector along an axis is all zero, so that it spans nothing."""
    if not value.is_meta and value.ndim == 2 and not bool((value != 0).any(axis).all()):
        raise ValueError(f"{name} has a vector that is all zero, which spans nothing.")


def by_site(value: Any, name: str, kind: type, site: type) -> None:
    """TypeError unless `value` is a mapping {site: kind}."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is of type {type(value).__name__}; needed is a mapping {{site: …}}.")
    for where, what in value.items():
        instance(where, site, f"{name} has a key {where!r} that", "Site.parse('block_output[3]@last') makes one")
        instance(what, kind, f"{name}[{where}]")
