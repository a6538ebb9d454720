"""The interface of a strategy: a way to start runs in the middle of a model.

A strategy stores something for each row once, and starts every later run from it. There are two: `engine/by_tokens.py`
and `engine/by_layers.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.chains import Chain
from subspace_lab.engine.prefix import Prefix
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.resolved_sites import ResolvedSite


@dataclass(frozen=True)
class Refusal:
    """Why a strategy cannot be used.

    Attributes:
        reason: in words, for `describe()`.
        expected: whether this model or these sites allow nothing better, so that no notice is needed.
        notice: the reason without numbers that differ between data sets; by default the reason itself.
    """

    reason: str
    expected: bool = False
    notice: str = ""


@dataclass(frozen=True)
class FrozenData:
    """A data set under a frozen model, and the sites that will be edited.

    Attributes:
        backbone: the model.
        batch: the data set as the model receives it, with position_ids.
        readout: the logits to read.
        sites: {site: its resolved form in the data set}.
        together: sets of sites that will be edited together.
        chain: the blocks that contain the sites.
    """

    backbone: Backbone
    batch: Batch
    readout: Readout
    sites: Mapping[Site, ResolvedSite]
    together: Sequence[tuple[Site, ...]]
    chain: Chain

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        batch: Batch,
        readout: Readout,
        sites: Mapping[Site, ResolvedSite],
        together: Sequence[tuple[Site, ...]],
    ) -> FrozenData:
        """From the batch as the user gave it."""
        inputs = model_inputs(backbone.model, batch)
        whole = replace(batch, inputs=inputs) if isinstance(inputs, Mapping) else batch
        return cls(backbone, whole, readout, sites, together, Chain.of(backbone.anatomy, sites))

    def inputs(self, rows: Tensor) -> Any:
        """The model's inputs for some rows, by name or by position."""
        part = self.batch.rows(rows)
        return part.inputs if part.positional is None else [part.positional]


@dataclass(frozen=True)
class Resumption:
    """A run that starts in the middle of the model.

    Attributes:
        inputs: the model's inputs.
        boundary: how many blocks are skipped.
        states: the output of the last skipped block; None if none is skipped.
        resolved: {site: its resolved form in this run}.
        readout: the logits to read in this run.
    """

    inputs: Any
    boundary: int
    states: Tensor | None
    resolved: dict[Site, ResolvedSite]
    readout: Readout


class Strategy(ABC):
    """A way of computing once what no edit changes.

    Attributes:
        name: what is stored, in words.
        recomputable: whether it may also be computed again for each batch instead of being stored.
        writes: whether the model may write into what is stored while a gradient still needs it.
    """

    name: ClassVar[str]
    recomputable: bool = True
    writes: bool = False

    @abstractmethod
    def __init__(self, data: FrozenData) -> None: ...

    @staticmethod
    @abstractmethod
    def refusal(data: FrozenData) -> Refusal | None:
        """Why this strategy cannot be used for the data set, as far as known without a run; None if it can."""

    @abstractmethod
    def serves(self, sites: Sequence[Site]) -> bool:
        """Whether a run with edits at these sites, all together, can start in the middle."""

    @abstractmethod
    def compute(self, rows: Tensor) -> Prefix:
        """Run some rows once, without edits, and store what resuming needs."""

    @abstractmethod
    def resume(
        self, rows: Tensor, sites: Sequence[Site], readout: Readout, prefix: Prefix, at: Tensor
    ) -> Resumption:
        """A run of some rows with edits at sites.

        Args:
            rows: (rows,) indices of the data set.
            readout: the readout of the data set.
            prefix: the stored prefix of the whole data set, or of these rows.
            at: (rows,) the indices of the rows in the prefix.
        """

    @abstractmethod
    def resolved(self, rows: Tensor, sites: Sequence[Site]) -> dict[Site, ResolvedSite]:
        """{site: its resolved form in a run of some rows}."""

    @abstractmethod
    def tokens_of(self, sites: Sequence[Site]) -> object:
        """A value that is equal for sets of sites that run the same tokens, and can therefore run side by side."""

    @abstractmethod
    def length_of(self, sites: Sequence[Site]) -> float:
        """How many tokens of a row run, on average."""

    @abstractmethod
    def trial(self) -> tuple[list[Tensor], list[Site]]:
        """Rows and sites for the numerical check at which this strategy is most likely to be wrong."""
