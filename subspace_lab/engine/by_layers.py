"""For models that attend in both directions, and for chains of modules: skip the blocks below the first edited one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.prefix import Prefix
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.strategies import FrozenData, Refusal, Resumption, Strategy
from subspace_lab.model.resolved_sites import ResolvedSite


class ByLayers(Strategy):
    """Stores the states of all tokens at the input of the first edited block."""

    name: ClassVar[str] = "layers"

    def __init__(self, data: FrozenData) -> None:
        self._data = data

    @staticmethod
    def refusal(data: FrozenData) -> Refusal | None:
        """None: any model with a chain of blocks can be tried."""
        return None

    def serves(self, sites: Sequence[Site]) -> bool:
        """True: the states of all tokens serve every set of sites."""
        return True

    def compute(self, rows: Tensor) -> Prefix:
        """Run some rows once without edits, and store the states at each boundary."""
        found: dict[int, Tensor] = {}
        hooks = self._data.chain.reading(found, lambda value: value.clone())
        if hooks:
            with torch.no_grad():
                self._data.backbone.run(self._data.inputs(rows), hooks, stop=True)
        return Prefix(found)

    def resume(
        self, rows: Tensor, sites: Sequence[Site], readout: Readout, prefix: Prefix, at: Tensor
    ) -> Resumption:
        """A run of some rows with edits at sites, from the first edited block on."""
        data = self._data
        boundary = data.chain.before(sites)
        stored: Any = prefix.states.get(boundary)
        states = None if stored is None else stored[at.to(stored.device)]
        if states is not None:
            states = states.to(data.backbone.device, non_blocking=True)
        return Resumption(data.inputs(rows), boundary, states, self.resolved(rows, sites), readout.rows(rows))

    def resolved(self, rows: Tensor, sites: Sequence[Site]) -> dict[Site, ResolvedSite]:
        """The same as in the data set."""
        return {site: self._data.sites[site].rows(rows) for site in sites}

    def tokens_of(self, sites: Sequence[Site]) -> object:
        """All tokens run, whatever the sites are."""
        return "all"

    def length_of(self, sites: Sequence[Site]) -> float:
        """All real tokens; 1 if rows are not sequences."""
        real = self._data.batch.real_tokens()
        return 1.0 if real is None else float(real.sum(1).double().mean())

    def trial(self) -> tuple[list[Tensor], list[Site]]:
        """Nothing beyond what is tried for every strategy."""
        return [], []
