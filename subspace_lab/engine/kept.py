"""The parts of the frozen past: which blocks run, which tokens, and the states, keys and values that are kept.

Everything about tokens is on the host, where it costs no waiting for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.engine.plain import Readout
from subspace_lab.model.batches import Batch
from subspace_lab.model.families import Anatomy
from subspace_lab.model.resolved_sites import ResolvedSite

States = dict[tuple[int, str, int], Tensor]
"""{(block, kind, number): (rows, …)} of blocks that keep a state instead of keys."""
FAR = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Chain:
    """Modules that run one after the other.

    Attributes:
        blocks: their paths.
        boundary: {site: how many of them lie wholly before it}.
    """

    blocks: list[str]
    boundary: dict[Site, int]

    @classmethod
    def of(cls, anatomy: Anatomy, resolved: Mapping[Site, ResolvedSite]) -> Chain:
        """The first chain of a model of which every site is inside some module; an empty one where none is."""
        sequences = {path: m for path, m in anatomy.modules.items() if isinstance(m, nn.Sequential)}
        below = [[f"{path}.{name}" if path else name for name in m._modules] for path, m in sequences.items()]
        for blocks in [*anatomy.stacks.values(), *below]:
            found = {site: cls._before(spot, blocks) for site, spot in resolved.items()}
            boundary = {site: count for site, count in found.items() if count is not None}
            if len(boundary) == len(resolved):
                return cls(blocks, boundary)
        return cls([], {})

    @staticmethod
    def _before(spot: ResolvedSite, blocks: list[str]) -> int | None:
        for i, block in enumerate(blocks):
            if spot.hook_point.path == block:
                return i + (spot.hook_point.side == "output")
            if spot.hook_point.path.startswith(f"{block}."):
                return i
        return None


@dataclass(frozen=True)
class Tokens:
    """The rows of a data set without their padding: token j of a row in column j.

    Attributes:
        ids, position_ids: (rows, longest).
        column: where a token stands in the padded batch.
        number: the inverse of `column`: which token stands in a column.
        lengths: (rows,).
    """

    ids: Tensor
    position_ids: Tensor
    column: Tensor
    number: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """`batch` as the model is given it, with position_ids unless they count the columns."""
        real = batch.real_tokens()
        assert real is not None
        real = real.cpu()
        column = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        given = batch.inputs.get("position_ids")
        positions = column if given is None else given.cpu().expand_as(column).gather(1, column)
        ids = batch.inputs["input_ids"].cpu().gather(1, column)
        return cls(ids, positions, column, real.long().cumsum(1) - 1, real.sum(1))

    def columns(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """The columns of so many tokens of some rows, from each row's first one on."""
        number = first[rows][:, None] + torch.arange(length)
        # Behind a row's end its last token stands in, never padding.
        return self.column[rows].gather(1, torch.minimum(number, self.lengths[rows][:, None] - 1).clamp_min(0))


@dataclass(frozen=True)
class Aligned:
    """All rows from some token on, their first ones in one column.

    Attributes:
        first, length: (rows,) the first token that runs, and how many run.
        ids, position_ids, real: (rows, longest); tokens behind a row's end are not real.
        reads: (rows, reads) at which of these tokens logits are read.
        offset: (rows,) how many tokens earlier the kept states begin.
        even: whether all rows begin at one token and have equally many.
    """

    first: Tensor
    length: Tensor
    ids: Tensor
    position_ids: Tensor
    real: Tensor
    reads: Tensor
    offset: Tensor
    even: bool

    def rows(self, rows: Tensor, *, look_back: bool) -> Suffix:
        """Some rows; `look_back`: with the tokens before them in the mask."""
        length = self.ids.shape[1] if self.even else int(self.length[rows].max())
        first = self.first[rows]
        before = int(first.max()) if look_back else 0
        ids, positions = (t.index_select(0, rows)[:, :length] for t in (self.ids, self.position_ids))
        mask = None
        if not self.even:
            seen = torch.arange(before) >= (before - first)[:, None]
            mask = torch.cat([seen, self.real.index_select(0, rows)[:, :length]], 1)
            mask = None if bool(mask.all()) else mask
        offset = self.offset.index_select(0, rows)
        return Suffix(ids, positions, mask, self.reads.index_select(0, rows), first, before, offset)


@dataclass(frozen=True)
class Suffix:
    """Some rows from their first edited token on: what the model is given, and where their past is.

    `mask` covers the earlier tokens too, pushed right so that they end where the row begins; None where
    everything is real.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    reads: Tensor
    first: Tensor
    before: int
    offset: Tensor

    def inputs(self) -> dict[str, Tensor]:
        given = {"input_ids": self.ids, "position_ids": self.position_ids}
        return given if self.mask is None else {**given, "attention_mask": self.mask.long()}

    def states(self, kept: Tensor, at: Tensor) -> Tensor:
        """The states at these tokens, of rows `at` of what is kept."""
        number = self.offset[:, None] + torch.arange(self.ids.shape[1])
        return picked(kept, at, number.clamp_max(kept.shape[1] - 1), 0)


class Schedule:
    """Which tokens must run when some of the sites are edited, and which may come from the past.

    Attributes:
        stop: (rows,) the first token behind everything that is read.
        starts: {site: (rows,) the first token that it edits, or that is read}.
        lowest, before: kept are states from the earliest start on, and keys and values before the latest.
    """

    def __init__(self, batch: Batch, resolved: Mapping[Site, ResolvedSite], readout: Readout) -> None:
        assert readout.index is not None
        self.tokens, self._resolved = Tokens.of(batch), resolved
        self.reads = self.tokens.number.gather(1, readout.index.cpu())
        valid = torch.ones_like(self.reads, dtype=torch.bool) if readout.valid is None else readout.valid.cpu()
        self.stop = self.reads.masked_fill(~valid, -1).amax(1) + 1
        self.first_read = self.reads.masked_fill(~valid, FAR).amin(1)
        self.starts: dict[Site, Tensor] = {}
        for site in resolved:
            number, real = self._numbers(site)
            starts = number.masked_fill(~real, FAR).amin(1) if number.shape[1] else self.first_read
            self.starts[site] = torch.minimum(starts, self.first_read).clamp_max(self.stop.max() - 1)
        starts = torch.stack(list(self.starts.values()))
        self.lowest, self.before = starts.amin(0), int(starts.max())

    def first(self, sites: Iterable[Site]) -> Tensor:
        """(rows,) the first token that runs; without any edit the first read, or the first without keys."""
        starts = [self.starts[site] for site in sites] or [self.first_read.clamp_max(self.before)]
        return torch.stack(starts).amin(0)

    def aligned(self, first: Tensor) -> Aligned:
        tokens = self.tokens
        length = (self.stop - first).clamp_min(1)
        number = first[:, None] + torch.arange(int(length.max()))
        real = number < tokens.lengths[:, None]
        number = torch.minimum(number, tokens.lengths[:, None] - 1).clamp_min(0)
        ids, positions = tokens.ids.gather(1, number), tokens.position_ids.gather(1, number)
        reads = torch.minimum((self.reads - first[:, None]).clamp_min(0), length[:, None] - 1)
        even = bool(((first == first[0]) & (length == length[0])).all() & real.all())
        return Aligned(first, length, ids, positions, real, reads, first - self.lowest, even)

    def moved(self, site: Site, aligned: Aligned) -> ResolvedSite:
        """A site's place in aligned rows."""
        number, real = self._numbers(site)
        index = number - aligned.first[:, None]
        # An edit behind the last logit that is read has no effect on it, and no column here.
        real = real & (index < aligned.length[:, None])
        index = torch.minimum(index.clamp_min(0), aligned.length[:, None] - 1)
        return replace(self._resolved[site], index=index, valid=None if bool(real.all()) else real)

    def kept_states(self, rows: Tensor) -> Tensor:
        """The columns of the tokens whose states are kept."""
        return self.tokens.columns(rows, self.lowest, int((self.stop - self.lowest).max()))

    def kept_keys(self, rows: Tensor) -> Tensor:
        """The columns of the tokens whose keys and values are kept."""
        return self.tokens.columns(rows, torch.zeros_like(self.lowest), self.before)

    def _numbers(self, site: Site) -> tuple[Tensor, Tensor]:
        """Which tokens of each row a site stands at, and whether it does."""
        spot = self._resolved[site]
        assert spot.index is not None
        real = torch.ones_like(spot.index, dtype=torch.bool) if spot.valid is None else spot.valid
        return self.tokens.number.gather(1, spot.index.cpu()), real.cpu()


@dataclass(frozen=True)
class Group:
    """Keys and values of one shape: (several, rows, tokens, heads, head width), and whose each is."""

    labels: list[tuple[int, str]]
    kept: Tensor


@dataclass(frozen=True)
class Past:
    """What a pass over some rows kept: states by boundary, keys and values by block, recurrent states by start."""

    states: dict[int, Tensor]  # (rows, tokens from the first edited one on, width)
    groups: list[Group]
    recurrent: list[States] = field(default_factory=list)

    @classmethod
    def of(cls, states: dict[int, Tensor], pairs: Mapping[tuple[int, str], Tensor], column: Tensor) -> Past:
        """From a cache's tensors {(block, side): (rows, heads, columns, head width)}, in the order of blocks."""
        shapes: dict[Any, list[tuple[int, str]]] = {}
        for label, t in pairs.items():
            shapes.setdefault((t.shape, t.dtype, t.device), []).append(label)
        groups = []
        for labels in shapes.values():
            index = column.to(pairs[labels[0]].device)[:, :, None, None]
            found = [pairs[label].transpose(1, 2).take_along_dim(index, 1) for label in labels]
            groups.append(Group(labels, torch.stack(found)))
        return cls(states, groups)

    def tensors(self) -> list[Tensor]:
        recurrent = (t for states in self.recurrent for t in states.values())
        return [*self.states.values(), *(group.kept for group in self.groups), *recurrent]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def room_for(self, rows: int, device: torch.device, pinned: bool) -> Past:
        """An empty one for more rows."""

        def room(like: Tensor, axis: int) -> Tensor:
            shape = (*like.shape[:axis], rows, *like.shape[axis + 1 :])
            return torch.empty(shape, dtype=like.dtype, device=device, pin_memory=pinned)

        states = {boundary: room(t, 0) for boundary, t in self.states.items()}
        groups = [Group(g.labels, room(g.kept, 1)) for g in self.groups]
        return Past(states, groups, [{name: room(t, 0) for name, t in found.items()} for found in self.recurrent])

    def put(self, start: int, part: Past) -> None:
        """Write what a pass over some rows kept to where these rows are."""
        for boundary, t in part.states.items():
            self.states[boundary][start : start + len(t)].copy_(t)
        for into, group in zip(self.groups, part.groups, strict=True):
            into.kept[:, start : start + group.kept.shape[1]].copy_(group.kept)
        for room, found in zip(self.recurrent, part.recurrent, strict=True):
            for name, t in found.items():
                room[name][start : start + len(t)].copy_(t)


def picked(kept: Tensor, at: Tensor, number: Tensor, axis: int) -> Tensor:
    """Of rows `at` the tokens `number`, (rows, tokens); rows stand at an axis and tokens at the next.

    One look-up of whole tokens: several times faster than indices for each axis.
    """
    index = (at[:, None] * kept.shape[axis + 1] + number).flatten().to(kept.device)
    return kept.flatten(axis, axis + 1).index_select(axis, index).unflatten(axis, number.shape)


def take(states: Tensor, index: Tensor) -> Tensor:
    """(rows, columns, width) → (rows, index, width)."""
    return states.take_along_dim(index.to(states.device)[..., None], 1)


def cached(
    groups: list[Group], at: Tensor, suffix: Suffix, boundary: int, depth: int, device: torch.device
) -> Any:
    """A cache of the earlier tokens of rows `at`, as if the model had just read them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if not suffix.before:
        return cache
    found = dict(chain.from_iterable(_taken(group, at, suffix, boundary, device) for group in groups))
    nothing = torch.zeros(1, device=device).expand(len(at), 1, suffix.before, 1)
    skipped = _filled(nothing, nothing)  # never run, or without keys; asked for its length alone
    cache.layers = [
        _filled(found[i, "keys"], found[i, "values"]) if (i, "keys") in found else skipped for i in range(depth)
    ]
    return cache


def _taken(
    group: Group, at: Tensor, suffix: Suffix, boundary: int, device: torch.device
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """All blocks' keys or values of some rows, taken out at once."""
    start = next((i for i, (block, _) in enumerate(group.labels) if block >= boundary), len(group.labels))
    # Rows that begin earlier than others have less behind them: theirs is pushed right.
    number = (torch.arange(suffix.before) - (suffix.before - suffix.first)[:, None]).clamp_min(0)
    kept = picked(group.kept[start:], at, number, 1).to(device, non_blocking=True)
    return zip(group.labels[start:], kept.transpose(2, 3).unbind(0), strict=True)


def _filled(keys: Tensor, values: Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device  # type: ignore[attr-defined]
    layer.is_initialized = True
    return layer
