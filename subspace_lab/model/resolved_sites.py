"""Where a site's positions stand in one batch, and how its states are read and written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.core.positions import locate
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.families import HookPoint


@dataclass(frozen=True)
class ResolvedSite:
    """A site in one batch: the hook_point and, for each row, where its positions stand.

    index is (batch, positions), None where the stream has no position axis or all of it is meant; valid tells
    its real entries, None where all of them are. `growing`: it may meet several rows for each of the batch's.
    """

    site: Site
    hook_point: HookPoint
    index: Tensor | None
    valid: Tensor | None
    growing: bool = False

    def read(self, value: Tensor) -> Tensor:
        """The states at the site, (batch, positions, width); 0 where a row has no such position."""
        if self.hook_point.columns is not None:
            value = value[..., torch.tensor(self.hook_point.columns, device=value.device)]
        if self._without_positions(value) or self.index is None:
            return value
        index, valid = self._here(value)
        rows = torch.arange(len(value), device=value.device)[:, None]
        states = value[rows, index]
        return states if valid is None else states.masked_fill(~valid[..., None], 0)

    def put(self, value: Tensor, states: Tensor) -> Tensor:
        """The whole value with `states` at the site; the rest as it was."""
        columns = self.hook_point.columns
        cols = None if columns is None else torch.tensor(columns, device=value.device)
        if self._without_positions(value) or self.index is None:
            return states if cols is None else value.index_copy(-1, cols, states)
        index, valid = self._here(value)
        if valid is None:
            rows = torch.arange(len(value), device=value.device)[:, None].expand_as(index)
        else:
            rows, slots = valid.nonzero(as_tuple=True)
            index, states = index[rows, slots], states[rows, slots]
        if cols is None:
            return value.index_put((rows, index), states)
        return value.index_put((rows[..., None], index[..., None], cols), states)

    def _without_positions(self, value: Tensor) -> bool:
        flat, shape = value.ndim < 3, tuple(value.shape)
        if self.site.layer is not None and value.ndim != 3:
            # Llama 4's experts see all rows' tokens as one list, Gemma 3n's blocks several streams at once.
            raise ValueError(f"{self.site}: the stream there, {shape}, is not (rows, positions, width).")
        if flat and self.site.positions != "all":
            raise ValueError(f"{self.site}: the stream there, {shape}, has no position axis.")
        return flat

    def _here(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """index and valid for this value: on its device, and repeated for beams."""
        assert self.index is not None
        index, valid = self.index.to(value.device), self.valid
        valid = None if valid is None else valid.to(value.device)
        repeats, left = divmod(len(value), len(index))
        if left or (repeats > 1 and not self.growing):
            raise ValueError(f"{self.site}: a batch of {len(index)} rows met a stream of {len(value)} rows.")
        if repeats > 1:  # beams and returned sequences stand beside each other, row by row
            index = index.repeat_interleave(repeats, 0)
            valid = None if valid is None else valid.repeat_interleave(repeats, 0)
        return index, valid


def resolve(backbone: Backbone, batch: Batch, site: Site, *, growing: bool = False) -> ResolvedSite:
    """Where a site is in this batch; `growing`: the stream will hold more tokens than the batch has."""
    hook_point = backbone.hook_point(site)
    real = batch.real_tokens(hook_point.stack)
    if real is None and growing and hook_point.stack == "decoder":
        # A decoder's generation starts from its start token.
        real = torch.ones(len(batch), 1, dtype=torch.bool, device=backbone.device)
    if real is None:
        if site.positions != "all":
            raise ValueError(
                f"{site}: positions need tokens; this batch has {sorted(batch.inputs)} and no position axis."
            )
        return ResolvedSite(site, hook_point, None, None)
    lengths = batch.prompt_lengths if hook_point.stack != "decoder" else None
    index, valid = batch.after_cache(*locate(site.positions, real, lengths, batch.columns), hook_point.stack)
    if site.positions == "all" and lengths is None and not growing and bool(real.all()):
        return ResolvedSite(site, hook_point, None, None)
    return ResolvedSite(site, hook_point, index, None if bool(valid.all()) else valid, growing)


def check_disjoint(resolved: Sequence[ResolvedSite]) -> None:
    """Refuse two edits of one value: same stream, a shared position and a shared column (ValueError)."""
    for i, one in enumerate(resolved):
        for other in resolved[:i]:
            if (one.hook_point.path, one.hook_point.side) != (other.hook_point.path, other.hook_point.side):
                continue
            columns = [set(p.hook_point.columns) if p.hook_point.columns else None for p in (one, other)]
            if columns[0] and columns[1] and not columns[0] & columns[1]:
                continue
            shared = _shared_row(one, other)
            if shared is not None:
                raise ValueError(
                    f"{other.site} and {one.site} edit the same positions of one stream (row {shared} of the "
                    "batch); two edits of a component must have disjoint positions (or heads)."
                )


def _shared_row(one: ResolvedSite, other: ResolvedSite) -> int | None:
    if one.index is None or other.index is None:
        return 0
    same = one.index[:, :, None] == other.index[:, None]
    same = same if one.valid is None else same & one.valid[:, :, None]
    same = same if other.valid is None else same & other.valid[:, None]
    rows = same.flatten(1).any(1).nonzero()
    return int(rows[0]) if len(rows) else None
