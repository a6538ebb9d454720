"""Checks of arguments: a wrong type is refused with one clear sentence before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from subspace_lab.core.arguments import whole_number
from subspace_lab.core.sites import Site


def expect_edits(value: Any) -> None:
    """TypeError for anything but a mapping from sites to edits."""
    if not isinstance(value, Mapping):
        raise TypeError(f"Edits must be a mapping {{site: intervention}}, found {type(value).__name__}.")
    for site in value:
        expect_site(site)


def expect_site(value: Any) -> None:
    """TypeError for anything but a Site, and for a Site whose layer is not a whole number."""
    if not isinstance(value, Site):
        raise TypeError(
            f"A Site is needed, found {value!r}: write Site('block_output', 3, 'last') or "
            "Site.parse('block_output[3]@last')."
        )
    if value.layer is not None:
        expect_integer("layer", value.layer, None, str(value))


def expect_sites(value: Any) -> list[Site]:
    """Several sites as a list.

    Raises:
        TypeError: a single site, text, or a list with anything else than sites.
    """
    if isinstance(value, Site):
        raise TypeError(f"Several sites are expected, found one: write [{value}].")
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(f"Several sites are expected, found {value!r}: write a list of Site.")
    sites = list(value)
    for site in sites:
        expect_site(site)
    return sites


def expect_integer(name: str, value: Any, least: int | None = 1, where: str = "") -> int:
    """A whole number, also one of numpy's.

    Raises:
        TypeError: text, a fraction, True.
        ValueError: less than `least`.
    """
    prefix = f"{where}: " if where else ""
    number = whole_number(value, f"{prefix}{name}")
    if least is not None and number < least:
        raise ValueError(f"{prefix}{name}={number}: at least {least} is needed.")
    return number


def expect_number(name: str, value: Any) -> None:
    """TypeError for anything but a real number, such as text or True."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: a number is needed, found {type(value).__name__}.")
