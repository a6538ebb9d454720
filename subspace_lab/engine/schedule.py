"""Which tokens of each row run when some sites are edited, and which come from what was computed once.

Token j of a row is its j-th real token, wherever padding stands. Rows are re-aligned so that their first edited
tokens are in one column: a batch of ragged rows, whichever side its padding is on, runs only the tokens after its
edits. The distance between two tokens of a row stays the same, which is all that positions (passed explicitly) and
sliding windows depend on.

All this is computed on the host, where it does not wait for a device.
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
    """The rows of a data set without their padding: token j of a row in column j.

    Attributes:
        ids, position_ids: (rows, longest).
        column: (rows, longest) the column of the padded batch in which a token is.
        number: (rows, columns) the inverse: which token is in a column.
        lengths: (rows,).
    """

    ids: Tensor
    position_ids: Tensor
    column: Tensor
    number: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """From a batch as it goes into the model; without position_ids, positions are the columns."""
        real = batch.real_tokens()
        assert real is not None
        real = real.cpu()
        column = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        given = batch.inputs.get("position_ids")
        positions = column if given is None else given.cpu().expand_as(column).gather(1, column)
        ids = batch.inputs["input_ids"].cpu().gather(1, column)
        return cls(ids, positions, column, real.long().cumsum(1) - 1, real.sum(1))

    def columns(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """(rows, length) the columns of so many tokens of some rows, from each row's first one on."""
        number = first[rows][:, None] + torch.arange(length)
        # After a row's end its last token is repeated; padding is never taken.
        return self.column[rows].gather(1, torch.minimum(number, self.lengths[rows][:, None] - 1).clamp_min(0))


@dataclass(frozen=True)
class Aligned:
    """All rows of a data set from some token on, their first ones in one column.

    Attributes:
        first, length: (rows,) the first token that runs, and how many run.
        ids, position_ids, real: (rows, longest); tokens after a row's end are not real.
        reads: (rows, reads) at which of these tokens logits are read.
        offset: (rows,) how many tokens earlier the stored states begin.
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
    """Some rows from their first edited token on: what the model is given, and which tokens come before.

    Attributes:
        ids, position_ids: (rows, tokens).
        mask: (rows, before + tokens) covers the earlier tokens too, which end where the row begins; None where
            all are real.
        reads: (rows, reads).
        first: (rows,) the number of the first token that runs.
        before: how many earlier tokens the model sees at the most.
        offset: (rows,) how many tokens earlier the stored states begin.
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
        """(rows, before + tokens) the numbers of the earlier tokens, and behind them columns for those that run.

        Rows with fewer earlier tokens have theirs on the right. The keys and values of the tokens that run will be
        written over what the columns behind name, which is the row's first token.
        """
        numbers = (torch.arange(self.before) - (self.before - self.first)[:, None]).clamp_min(0)
        return torch.nn.functional.pad(numbers, (0, self.ids.shape[1]))

    def stored(self, count: int) -> Tensor:
        """(rows, tokens) at which of `count` stored tokens the states of these tokens are."""
        return (self.offset[:, None] + torch.arange(self.ids.shape[1])).clamp_max(count - 1)


class Schedule:
    """Which tokens must run when some of the sites are edited, and which are computed once.

    Attributes:
        tokens: the rows without padding.
        stop: (rows,) the first token after everything that is read.
        starts: {site: (rows,) the first token that it edits, or that is read}.
        lowest: (rows,) the earliest start: states are stored from there on.
        before: the latest start: keys and values are stored of the tokens before it.
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
        """(rows,) the first token that runs; without any edit the first that is read or has no stored keys."""
        starts = [self.starts[site] for site in sites] or [self.first_read.clamp_max(self.before)]
        return torch.stack(starts).amin(0)

    def aligned(self, first: Tensor) -> Aligned:
        """All rows from their first token that runs to the last that is read."""
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
        """A site in aligned rows."""
        number, real = self._numbers(site)
        index = number - aligned.first[:, None]
        # An edit after the last logit that is read has no effect on it, and no column here.
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
        """Inputs of the model: the tokens of some rows before a start, pushed right so that all end together."""
        first = start[rows]
        longest = max(1, int(first.max()))
        number = torch.arange(longest) - (longest - first)[:, None]
        inside = number.clamp_min(0)
        ids, positions = (t[rows].gather(1, inside) for t in (self.tokens.ids, self.tokens.position_ids))
        return {"input_ids": ids, "position_ids": positions, "attention_mask": (number >= 0).long()}

    def _numbers(self, site: Site) -> tuple[Tensor, Tensor]:
        """(rows, positions) which tokens of each row a site is, and whether the row has them."""
        place = self._resolved[site]
        assert place.index is not None
        real = torch.ones_like(place.index, dtype=torch.bool) if place.valid is None else place.valid
        return self.tokens.number.gather(1, place.index.cpu()), real.cpu()
