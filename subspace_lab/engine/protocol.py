"""The interface of an engine: a data set under a model, with the logits that training and evaluation need."""

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
    """Rows of a data set with their own edits; several parts can run side by side.

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
    """A data set under a model. It gives some of the model's logits, with edits.

    `PlainEngine` computes everything in each call. `FrozenPast` computes once what no edit changes. Both give the same
    numbers.
    """

    def __len__(self) -> int:
        """The number of rows of the data set."""
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
        """(rows, reads, answers) logits, or the model's own output if the readout has no positions.

        Args:
            rows: (rows,) indices of the data set, in any order and number.
            edits: {site: intervention}.
            sources: {site: (rows, positions, width) states} of the sources of these rows.
            unmatched: what happens at positions that only a row or only its source has, as in `forward`.
            vocabulary: read the logits of the whole vocabulary instead of the answers' logits.

        Raises:
            TypeError: rows that are not whole numbers; an edit that cannot be called.
            ValueError: overlapping sites; a source that is missing, not needed, or of a wrong shape; a wrong width.
        """
        ...

    def side_by_side(self, parts: Sequence[Part], unmatched: Unmatched = "refuse") -> Tensor:
        """The logits of several parts, concatenated: the same as `logits` of each part, in one run if possible.

        Parts whose edits begin at the same tokens, in different blocks, can share a run. It starts at the lowest of
        these blocks. The edits of a part never see the rows of another part.
        """
        ...

    def cohorts(self, sets: Sequence[tuple[Site, ...]], rows: int) -> list[list[int]]:
        """Which of several sets of edited sites should run side by side, as lists of their numbers.

        Args:
            rows: the number of rows of each set in one step.
        """
        ...

    def describe(self) -> str:
        """One line: what is computed once, and what in each call."""
        ...
