"""A site in one batch: its positions in each row, and how states are read and written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspace_lab.core.positions import expect_some, locate
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.families import HookPoint


@dataclass(frozen=True)
class ResolvedSite:
    """A site in one batch.

    Attributes:
        site: the site.
        hook_point: the stream of values that is read and written.
        count: the number of rows of the batch.
        index: (batch, positions) columns of the stream; None if the stream has no positions, or if they are not known
            before a run.
        valid: (batch, positions) False where there is nothing to read or write; None if there is no such entry.
        present: (batch, positions) False where a row has no such position; None if every row has all of them. A
            position that a row has may still not be valid, if it is in a cache or is not run.
        whole: the site is all positions of all rows, and there is no padding, so the stream is used as it is.
        repeated: the stream may contain several rows, one after the other, for each row of the batch (beams).
    """

    site: Site
    hook_point: HookPoint
    count: int
    index: Tensor | None = None
    valid: Tensor | None = None
    present: Tensor | None = None
    whole: bool = False
    repeated: bool = False

    @property
    def positions(self) -> int | None:
        """The number of positions that a source must have in each row; None if only a run can find it."""
        by_path = self.site.layer is None and self.site.positions == "all"
        return None if self.index is None or by_path else self.index.shape[1]

    def rows(self, rows: Tensor) -> ResolvedSite:
        """The site in some rows of the batch."""
        if self.index is None:
            return replace(self, count=len(rows))
        index = self.index[rows.to(self.index.device)]
        valid, present = (
            None if t is None else _none_if_all_true(t[rows.to(t.device)]) for t in (self.valid, self.present)
        )
        return replace(self, count=len(rows), index=index, valid=valid, present=present)

    def among(self, rows: Tensor, count: int) -> ResolvedSite:
        """The site in a larger batch of `count` rows that contains these `rows`; the other rows have no position."""
        if self.index is None:
            return replace(self, count=count)
        rows = rows.to(self.index.device)
        every = torch.ones_like(self.index, dtype=torch.bool)
        own = (self.index, *(every if t is None else t for t in (self.valid, self.present)))
        index, valid, present = (t.new_zeros((count, t.shape[1])).index_copy(0, rows, t) for t in own)
        return replace(self, count=count, index=index, valid=valid, present=present, whole=False)

    def read(self, value: Tensor, missing: float = 0.0) -> Tensor:
        """The states at the site, (batch, positions, width); `missing` where a row has no such position."""
        if self.hook_point.columns is not None:
            value = value[..., torch.tensor(self.hook_point.columns, device=value.device)]
        if self._taken_whole(value):
            return value
        index, valid = self._on(value)
        rows = torch.arange(len(value), device=value.device)[:, None]
        states = value[rows, index]
        if valid is None:
            return states
        if not states.is_floating_point():
            missing = 0
        return states.masked_fill(~valid[..., None], missing)

    def put(self, value: Tensor, states: Tensor) -> Tensor:
        """The whole value with `states` at the site; the rest is unchanged."""
        columns = self.hook_point.columns
        cols = None if columns is None else torch.tensor(columns, device=value.device)
        if self._taken_whole(value):
            return states if cols is None else value.index_copy(-1, cols, states)
        index, valid = self._on(value)
        if valid is None:
            rows = torch.arange(len(value), device=value.device)[:, None].expand_as(index)
        else:
            rows, slots = valid.nonzero(as_tuple=True)
            index, states = index[rows, slots], states[rows, slots]
        if cols is None:
            return value.index_put((rows, index), states)
        return value.index_put((rows[..., None], index[..., None], cols), states)

    def _taken_whole(self, value: Tensor) -> bool:
        """Whether the site is all of a value: because of its positions, or because the value has no positions."""
        flat, shape = value.ndim < 3, tuple(value.shape)
        if self.site.layer is not None and value.ndim != 3:
            # The experts of Llama 4 get the tokens of all rows as one list; blocks of Gemma 3n have several streams.
            raise ValueError(f"{self.site}: the stream there, {shape}, is not (rows, positions, width).")
        if flat and self.site.positions != "all":
            raise ValueError(f"{self.site}: the stream there, {shape}, has no position axis.")
        return flat or self.whole or self.index is None

    def _on(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """index and valid for this value: on its device, and repeated for each beam."""
        assert self.index is not None
        index, valid = self.index.to(value.device), self.valid
        valid = None if valid is None else valid.to(value.device)
        repeats, left = divmod(len(value), len(index))
        if left or (repeats > 1 and not self.repeated):
            raise ValueError(f"{self.site}: a batch of {len(index)} rows met a stream of {len(value)} rows.")
        if repeats > 1:  # the beams of a row follow each other
            index = index.repeat_interleave(repeats, 0)
            valid = None if valid is None else valid.repeat_interleave(repeats, 0)
        return index, valid


def resolve(backbone: Backbone, batch: Batch, site: Site) -> ResolvedSite:
    """The positions of a site in each row of a batch.

    Raises:
        ValueError: a component that the model does not have; positions in a stream without tokens. KeyError: a named
        position that the batch does not have. (`cls` exists for images if the model has such a token.) IndexError: a
        layer or a position that does not exist.
    """
    hook_point = backbone.hook_point(site)
    real = batch.real_tokens(hook_point.stack)
    if real is None:
        if site.positions != "all" and hook_point.stack != "decoder":
            return _of_patches(backbone, batch, site, hook_point)
        if site.positions != "all":
            raise ValueError(
                f"{site}: positions need tokens; this batch has {sorted(batch.inputs)} and none of the decoder."
            )
        return ResolvedSite(site, hook_point, len(batch))
    return _among(real, batch, site, hook_point)


def _of_patches(backbone: Backbone, batch: Batch, site: Site, hook_point: HookPoint) -> ResolvedSite:
    """Positions of a stream without text tokens, such as those of image patches, or the steps of a plain module.

    All rows have the same number; a run of one row finds it.
    """
    length = backbone.stream_length(hook_point, model_inputs(backbone.model, batch.rows(slice(0, 1))))
    columns = {"cls": torch.zeros(len(batch), dtype=torch.long)} if backbone.has_class_token() else {}
    real = torch.ones(len(batch), length, dtype=torch.bool)
    index, present = locate(site.positions, real, None, columns)
    expect_some(site.positions, present, real.sum(1))
    return ResolvedSite(site, hook_point, len(batch), index)


def resolve_prompt(backbone: Backbone, batch: Batch, site: Site) -> ResolvedSite:
    """The positions of a site in a prompt after which tokens are generated, possibly for several beams.

    Raises:
        ValueError, IndexError: as in `resolve`.
    """
    hook_point = backbone.hook_point(site)
    if hook_point.stack == "decoder" and batch.real_tokens("decoder") is None:
        start = torch.ones(len(batch), 1, dtype=torch.bool, device=backbone.device)  # only its start token
        found = _among(start, batch, site, hook_point)
    else:
        found = resolve(backbone, batch, site)
    return replace(found, whole=False, repeated=True)


def _among(real: Tensor, batch: Batch, site: Site, hook_point: HookPoint) -> ResolvedSite:
    lengths = batch.prompt_lengths if hook_point.stack != "decoder" else None
    index, present = locate(site.positions, real, lengths, batch.columns)
    if len(batch):
        expect_some(site.positions, present, real.sum(1) if lengths is None else lengths)
    index, valid = batch.after_cache(index, present, hook_point.stack)
    whole = site.positions == "all" and lengths is None and bool(real.all())
    return ResolvedSite(
        site, hook_point, len(batch), index, _none_if_all_true(valid), _none_if_all_true(present), whole
    )


def _none_if_all_true(mask: Tensor) -> Tensor | None:
    """The mask; None if it is True everywhere."""
    return None if bool(mask.all()) else mask


def check_disjoint(resolved: Sequence[ResolvedSite]) -> None:
    """ValueError for two edits of the same values: the same stream, a shared position and a shared column."""
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
    """The first row in which two sites of one stream have a position in common; None if there is none."""
    if one.index is None or other.index is None:
        return 0
    same = one.index[:, :, None] == other.index[:, None]
    same = same if one.valid is None else same & one.valid[:, :, None]
    same = same if other.valid is None else same & other.valid[:, None]
    rows = same.flatten(1).any(1).nonzero()
    return int(rows[0]) if len(rows) else None
