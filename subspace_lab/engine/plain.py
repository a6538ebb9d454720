"""The plain engine: runs every batch from the first layer to the last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.fingerprint import Fingerprint, tensors_of
from subspace_lab.engine.protocol import Part
from subspace_lab.engine.readouts import LogitReader, Readout, expect_rows
from subspace_lab.model.arguments import expect_edits
from subspace_lab.model.backbone import Backbone, expect_backbone
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.cache_argument import given_cache
from subspace_lab.model.edits import Edits, Sources, edit_hooks
from subspace_lab.model.resolved_sites import ResolvedSite, resolve
from subspace_lab.model.sources import Unmatched


class PlainEngine:
    """A data set under a model; every call runs its rows through the whole model.

    Args:
        backbone: the model.
        batch: the data set.
        readout: the logits to read.

    Raises:
        TypeError: a model instead of a backbone.
        ValueError: a key-value cache among the inputs.
    """

    def __init__(self, backbone: Backbone, batch: Batch, readout: Readout) -> None:
        expect_backbone(backbone)
        if given_cache(batch.inputs) is not None:
            raise ValueError("A cache among the inputs would be written by each run; give the whole rows instead.")
        self.backbone, self.batch, self.readout = backbone, batch, readout
        self.reader = LogitReader(backbone)
        self._resolved: dict[Site, ResolvedSite] = {}
        self._fingerprint: Fingerprint | None = None

    def __len__(self) -> int:
        return len(self.batch)

    def describe(self) -> str:
        """One line about what is computed."""
        return "plain run: every layer and position, every step"

    def logits(
        self,
        rows: Tensor,
        edits: Edits,
        sources: Sources | None = None,
        unmatched: Unmatched = "refuse",
        *,
        vocabulary: bool = False,
    ) -> Tensor:
        """As `Engine.logits`."""
        expect_rows(rows)
        expect_edits(edits)
        part = self.batch.rows(rows)
        hooks = edit_hooks(edits, self._resolved_in(edits, rows), sources, unmatched)
        readout = self.readout.over_vocabulary() if vocabulary else self.readout
        return self.reader.run(model_inputs(self.backbone.model, part), hooks, readout.rows(rows))

    def side_by_side(self, parts: Sequence[Part], unmatched: Unmatched = "refuse") -> Tensor:
        """As `Engine.side_by_side`, one part after the other."""
        return torch.cat([self.logits(part.rows, part.edits, part.sources, unmatched) for part in parts])

    def cohorts(self, sets: Sequence[tuple[Site, ...]], rows: int) -> list[list[int]]:
        """As `Engine.cohorts`: each set alone."""
        return [[i] for i in range(len(sets))]

    def _resolved_in(self, sites: Iterable[Site], rows: Tensor) -> dict[Site, ResolvedSite]:
        """The resolved sites of some rows.

        Sites are resolved for the whole data set, so that rows have as many positions as the sources, which were
        collected for the whole data set. This is done once, as long as the data set does not change.
        """
        if self._fingerprint is None or self._fingerprint.changed():
            batch = self.batch  # not self, which would create a reference cycle
            self._fingerprint, self._resolved = Fingerprint(None, lambda: tensors_of(batch)), {}
        with torch.inference_mode(False):  # later steps use these tensors, and may need gradients
            for site in sites:
                if site not in self._resolved:
                    self._resolved[site] = resolve(self.backbone, self.batch, site)
            return {site: self._resolved[site].rows(rows) for site in sites}
