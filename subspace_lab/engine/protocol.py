"""What training and evaluation need of a data set under a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.model.edits import Edits, Sources
from subspace_lab.model.sources import Unmatched


@dataclass(frozen=True)
class Part:
    """Rows of a data set with edits of their own: one of several that run side by side.

    Attributes:
        rows: (rows,) indices of the data set, in any order and number.
        edits: {site: intervention}.
        sources: {site: (rows, positions, width) states} of the sources of these rows.
    """

    rows: Tensor
    edits: Edits
    sources: Sources | None = None


@runtime_checkable
class Engine(Protocol):
    """A data set under a model, of which some logits are wanted, with edits in force.

    `PlainEngine` computes everything at each call, `FrozenPast` computes once what no edit changes. They
    give the same numbers.
    """

    def __len__(self) -> int:
        """How many rows the data set has."""
        ...

    def logits(
        self,
        rows: Tensor,
        edits: Edits,
        sources: Sources | None = None,
        unmatched: Unmatched = "refuse",
        *,
        vocabulary: bool = False,
    ) -> Tensor:
        """(rows, reads, answers) logits, or the model's own output where the readout has no positions.

        Args:
            rows: (rows,) indices of the data set, in any order and number.
            edits: {site: intervention}.
            sources: {site: (rows, positions, width) states} of the sources of these rows.
            unmatched: what becomes of positions that a row or its source lacks, as in `forward`.
            vocabulary: read the logits of the whole vocabulary in the place of the answers'.

        Raises:
            TypeError: rows that are not whole numbers; an edit that cannot be called.
            ValueError: overlapping sites, a missing, superfluous or misshapen source, a wrong width.
        """
        ...

    def side_by_side(self, parts: Sequence[Part], unmatched: Unmatched = "refuse") -> Tensor:
        """The logits of several parts, one behind the other: what `logits` gives of each, in one run if possible.

        Parts whose edits begin at the same tokens, in different blocks, can share a run, which starts at the lowest of
        these blocks. No part's edits see the rows of another.
        """
        ...

    def cohorts(self, sets: Sequence[tuple[Site, ...]], rows: int) -> list[list[int]]:
        """Which of several sets of edited sites had best run side by side, as lists of their numbers.

        Args:
            rows: of each in a step.
        """
        ...

    def describe(self) -> str:
        """One line: what is computed once and what at each call."""
        ...
