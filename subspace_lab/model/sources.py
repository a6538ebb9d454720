"""Matches the states of sources with the positions of their bases, also if their numbers of positions differ.

States at several positions of several rows are one tensor. A row with fewer positions than others is filled up at the
end with NaN (as `collect` does). So a source shows how many positions each of its rows has, and a mean or a product
that includes missing entries is visibly NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from subspace_lab.core.positions import match
from subspace_lab.core.values import Source
from subspace_lab.model.resolved_sites import ResolvedSite

Unmatched = Literal["refuse", "keep_base"]
"""What happens at positions that only a base or only its source has."""
MISSING = float("nan")


def expect_unmatched(value: str) -> None:
    """ValueError unless it is one of the two possible texts."""
    if value not in get_args(Unmatched):
        raise ValueError(f"unmatched={value!r}: possible are {' and '.join(map(repr, get_args(Unmatched)))}.")


def missing_entries(states: Tensor) -> Tensor | None:
    """(…,) True where a whole state is NaN; None if there is no such state."""
    if not states.is_floating_point() or not bool(states[..., 0].isnan().any()):
        return None
    found = states.isnan().all(-1)
    return found if bool(found.any()) else None


def expect_numbers(resolved: ResolvedSite, states: Tensor) -> None:
    """ValueError if a whole state is NaN although the row has this position: it would look like a missing one."""
    missing = missing_entries(states)
    if missing is None:
        return
    wrong = missing if resolved.valid is None or missing.ndim < 2 else missing & resolved.valid.to(missing.device)
    rows = wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
    if bool(rows.any()):
        raise ValueError(
            f"{resolved.site}: the model's states are NaN in {int(rows.sum())} of {len(states)} rows, row "
            f"{int(rows.nonzero()[0])} the first: its weights hold NaN, or its numbers grow beyond their dtype."
        )


def all_rows(parts: list[Tensor]) -> Tensor:
    """States of several sets of rows as one tensor, filled up to the largest number of positions."""
    longest = max((p.shape[1] for p in parts if p.ndim == 3), default=0)
    padded = [
        torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1]), value=MISSING)
        if p.ndim == 3 and p.shape[1] < longest
        else p
        for p in parts
    ]
    return torch.cat(padded)


def fitted(resolved: ResolvedSite, source: Source, unmatched: Unmatched = "refuse", who: str = "") -> Source:
    """A source arranged in the positions of its base, with NaN where the base's state must stay unchanged.

    Args:
        resolved: the site in the rows of the base.
        source: states as `collect` returns them; {variable: states} if several variables share the site.
        unmatched: for positions that only one side has: "refuse" or "keep_base".
        who: the name of the source, for messages.

    Raises:
        ValueError: a wrong number of rows, a wrong width, or rows whose number of positions is not that of their bases;
            the message names the first of them.
    """
    if source is None:
        return None
    if isinstance(source, Mapping):
        return {
            name: fitted(resolved, states, unmatched, f" for {name!r}")  # type: ignore[misc]
            for name, states in source.items()
        }
    _check_shape(resolved, source)
    index = resolved.index
    by_run = resolved.positions is None
    if index is None or source.ndim != 3 or (by_run and source.shape[1] != index.shape[1]):
        return source
    missing = missing_entries(source)
    if missing is None and resolved.present is None and source.shape[1] == index.shape[1]:
        return source
    device = source.device
    slots = index.shape[1]
    base = torch.full((len(index),), slots, device=device)
    base = base if resolved.present is None else resolved.present.to(device).sum(1)
    found = torch.full((len(source),), source.shape[1], device=device)
    found = found if missing is None else (~missing).sum(1)
    if missing is not None and bool((missing[:, :-1] & ~missing[:, 1:]).any()):
        raise ValueError(
            f"{resolved.site}: the source{who} has states that are NaN before others that are not; only entries "
            "after a row's last position may be NaN."
        )
    if unmatched == "refuse":
        _check_counts(resolved, base, found, who)
    at = match(resolved.site.positions, base, found, slots)
    slot = torch.arange(slots, device=device)
    if source.shape[1] == slots and bool(((at == slot) | (slot >= base[:, None])).all()):
        return source  # it is already arranged in this way
    taken = source.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, source.shape[-1]))
    return taken.masked_fill((at < 0)[..., None], MISSING)


def filled(source: Source, states: Tensor) -> Source:
    """A source in which missing entries are replaced by the base's own states, so that nothing changes there."""
    if isinstance(source, Mapping):
        return {name: filled(one, states) for name, one in source.items()}  # type: ignore[misc]
    if source is None or source.shape[:-1] != states.shape[:-1]:
        return source
    return torch.where(source.isnan().all(-1, keepdim=True), states, source)


def has_missing(source: Source) -> bool:
    """Whether some entry of a source is missing."""
    each = source.values() if isinstance(source, Mapping) else [source]
    return any(states is not None and missing_entries(states) is not None for states in each)


def _check_counts(resolved: ResolvedSite, base: Tensor, source: Tensor, who: str) -> None:
    wrong = (base != source).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{resolved.site}: row {row} of the base has {_positions(int(base[row]))} and its source{who} has "
            f"{int(source[row])}; an interchange needs the same number in both (states that are all NaN are not "
            "counted). With unmatched='keep_base' positions that only one of them has stay the base's."
        )


def _positions(count: int) -> str:
    return f"{count} position{'' if count == 1 else 's'}"


def _check_shape(resolved: ResolvedSite, states: Tensor) -> None:
    width, positions = resolved.hook_point.width, resolved.positions
    if len(states) != resolved.count:
        raise ValueError(
            f"{resolved.site}: {len(states)} source states for {resolved.count} base rows; each row of the "
            "base needs its own source."
        )
    if width is not None and states.shape[-1] != width:
        raise ValueError(f"{resolved.site} has width {width}; its source has {states.shape[-1]}.")
    if positions is not None and states.ndim != 3:
        raise ValueError(
            f"{resolved.site}: a source of shape {tuple(states.shape)}; needed is (batch, positions, width), and "
            f"the base has {positions} positions in each row."
        )
