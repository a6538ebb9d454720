"""Which tokens of each row must run when some sites are edited, and which are stored.

Token j of a row is its j-th real token, wherever the padding is. Rows are re-aligned so that their first edited tokens
are in one column. So a batch of rows of different lengths, with padding on either side, runs only the tokens from its
edits on. The distance between two tokens of a row does not change, and nothing else matters for positions (which are
passed explicitly) and for sliding windows.

Everything here is computed on the CPU, so that it never waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch
from subspace_lab.model.resolved_sites import ResolvedSite

FAR = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Tokens:
    """The rows of a data set without their padding: token j of a row is in column j.

    Attributes:
        ids, position_ids: (rows, longest).
        column: (rows, longest) the column of the padded batch that contains a token.
        number: (rows, columns) the inverse: the number of the token in a column.
        lengths: (rows,).
    """

    ids: Tensor
    position_ids: Tensor
    column: Tensor
    number: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """From a batch of model inputs; without position_ids, the positions are the columns."""
        real = batch.real_tokens()
        assert real is not None
        real = real.cpu()
        column = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        given = batch.inputs.get("position_ids")
        positions = column if given is None else given.cpu().expand_as(column).gather(1, column)
        ids = batch.inputs["input_ids"].cpu().gather(1, column)
        return cls(ids, positions, column, real.long().cumsum(1) - 1, real.sum(1))

    def columns(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """(rows, length) the columns of `length` tokens of some rows, beginning at each row's first one."""
        number = first[rows][:, None] + torch.arange(length)
        # After a row's end its last token is repeated, so padding is never used.
        return self.column[rows].gather(1, torch.minimum(number, self.lengths[rows][:, None] - 1).clamp_min(0))


@dataclass(frozen=True)
class Aligned:
    """All rows of a data set from a given token on, with these first tokens in one column.

    Attributes:
        first, length: (rows,) the first token that runs, and how many run.
        ids, position_ids, real: (rows, longest); tokens after a row's end are not real.
        reads: (rows, reads) the indices of the tokens at which logits are read.
        offset: (rows,) the number of stored tokens before the first token that runs.
        even: whether all rows begin at the same token and have the same number of tokens.
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
        """Some rows; with `look_back` the mask also covers the tokens before them."""
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
    """Some rows from their first edited token on: the model's inputs, and the tokens before.

    Attributes:
        ids, position_ids: (rows, tokens).
        mask: (rows, before + tokens), for the earlier tokens too, which end where the row begins; None if all tokens
            are real.
        reads: (rows, reads).
        first: (rows,) the number of the first token that runs.
        before: how many earlier tokens the model sees, at most.
        offset: (rows,) the number of stored tokens before the first token that runs.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    reads: Tensor
    first: Tensor
    before: int
    offset: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward, without its cache."""
        inputs = {"input_ids": self.ids, "position_ids": self.position_ids}
        return inputs if self.mask is None else {**inputs, "attention_mask": self.mask.long()}

    def earlier(self) -> Tensor:
        """(rows, before + tokens) the numbers of the earlier tokens, then columns for the tokens that run.

        In rows with fewer earlier tokens they are aligned to the right. The columns at the end name the row's first
        token; the keys and values of the tokens that run will overwrite what is taken from there.
        """
        numbers = (torch.arange(self.before) - (self.before - self.first)[:, None]).clamp_min(0)
        return torch.nn.functional.pad(numbers, (0, self.ids.shape[1]))

    def stored(self, count: int) -> Tensor:
        """(rows, tokens) the indices of these tokens among `count` stored tokens."""
        return (self.offset[:, None] + torch.arange(self.ids.shape[1])).clamp_max(count - 1)


class Schedule:
    """Which tokens must run when some of the sites are edited, and which are computed once.

    Attributes:
        tokens: the rows without padding.
        stop: (rows,) the token after the last one that is read.
        starts: {site: (rows,) the first token that the site edits or that is read}.
        lowest: (rows,) the earliest start of all sites; states are stored from there on.
        before: the latest start; keys and values are stored for the tokens before it.
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
        """(rows,) the first token that runs. Without edits: the first that is read or has no stored keys."""
        starts = [self.starts[site] for site in sites] or [self.first_read.clamp_max(self.before)]
        return torch.stack(starts).amin(0)

    def aligned(self, first: Tensor) -> Aligned:
        """All rows, from the first token that runs to the last that is read."""
        tokens = self.tokens
        length = (self.stop - first).clamp_min(1)
        number = first[:, None] + torch.arange(int(length.max()))
        real = number < tokens.lengths[:, None]
        number = torch.minimum(number, tokens.lengths[:, None] - 1).clamp_min(0)
        ids, positions = tokens.ids.gather(1, number), tokens.position_ids.gather(1, number)
        reads = torch.minimum((self.reads - first[:, None]).clamp_min(0), length[:, None] - 1)
        even = bool(((first == first[0]) & (length == length[0])).all() & real.all())
        return Aligned(first, length, ids, positions, real, reads, first - self.lowest, even)

    def resolved_in(self, site: Site, aligned: Aligned) -> ResolvedSite:
        """The resolved site in aligned rows."""
        number, real = self._numbers(site)
        index = number - aligned.first[:, None]
        # An edit after the last read token has no effect on the logits, and no column here.
        real = real & (index < aligned.length[:, None])
        index = torch.minimum(index.clamp_min(0), aligned.length[:, None] - 1)
        return replace(self._resolved[site], index=index, valid=None if bool(real.all()) else real, whole=False)

    def state_columns(self, rows: Tensor) -> Tensor:
        """The columns of the tokens whose states are stored."""
        return self.tokens.columns(rows, self.lowest, int((self.stop - self.lowest).max()))

    def key_columns(self, rows: Tensor) -> Tensor:
        """The columns of the tokens whose keys and values are stored."""
        return self.tokens.columns(rows, torch.zeros_like(self.lowest), self.before)

    def before_start(self, rows: Tensor, start: Tensor) -> dict[str, Tensor]:
        """Model inputs: the tokens of some rows before a start, padded on the left so that all end together."""
        first = start[rows]
        longest = max(1, int(first.max()))
        number = torch.arange(longest) - (longest - first)[:, None]
        inside = number.clamp_min(0)
        ids, positions = (t[rows].gather(1, inside) for t in (self.tokens.ids, self.tokens.position_ids))
        return {"input_ids": ids, "position_ids": positions, "attention_mask": (number >= 0).long()}

    def _numbers(self, site: Site) -> tuple[Tensor, Tensor]:
        """(rows, positions) the tokens of each row that a site selects, and whether the row has them."""
        place = self._resolved[site]
        assert place.index is not None
        real = torch.ones_like(place.index, dtype=torch.bool) if place.valid is None else place.valid
        return self.tokens.number.gather(1, place.index.cpu()), real.cpu()
