"""States of blocks without attention: state-space layers, convolutions, linear attention.

The keys of earlier tokens serve every edit, whatever token it begins at. But a state summarises the tokens before one
point. So a state is stored for each point ("start") at which edits of the data set begin. It is computed by a pass over
the tokens before this start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from subspace_lab.engine.caches import empty_cache, put_states, record_states, states_in
from subspace_lab.engine.prefix import BlockStates
from subspace_lab.engine.readouts import BEHIND_BLOCKS
from subspace_lab.engine.schedule import Schedule
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.cache_argument import forward_name
from subspace_lab.model.families import attends


class RecurrentStates:
    """The states of a model's blocks without attention; empty for a model without such blocks.

    Args:
        backbone: the model.
        blocks: numbers of the blocks without attention.
        schedule: the schedule of the data set.
        starts: for every set of edits to be served, (rows,) the first token that runs.
    """

    def __init__(
        self, backbone: Backbone, blocks: Sequence[int], schedule: Schedule, starts: Iterable[Tensor]
    ) -> None:
        self._backbone, self._schedule = backbone, schedule
        self._argument = forward_name(backbone.model)
        self.blocks = tuple(blocks)
        self.starts: list[Tensor] = []
        for start in starts if blocks else ():
            if self.number(start) is None:
                self.starts.append(start)

    def number(self, start: Tensor) -> int | None:
        """The number of a start; None if states are stored, but not for this start."""
        if not self.blocks:
            return 0
        return next((i for i, known in enumerate(self.starts) if torch.equal(known, start)), None)

    def empty_cache(self) -> Any:
        """An empty cache of the model, with layers for these states."""
        return empty_cache(self._backbone.model, self.blocks)

    def compute(self, rows: Tensor) -> list[BlockStates]:
        """For each start the states after the tokens of some rows before it."""
        return [self.after(rows, start) for start in self.starts]

    def after(self, rows: Tensor, start: Tensor) -> BlockStates:
        """The states after the tokens of some rows before a start: {(block, kind, number): (rows, …)}."""
        if not int(start.max()):
            return {}
        device, filled = self._backbone.device, self.empty_cache()
        record_states(filled, self.blocks)
        inputs: dict[str, Any] = {k: t.to(device) for k, t in self._schedule.before_start(rows, start).items()}
        head = self._backbone.head()
        assert head is not None and self._argument is not None
        with torch.no_grad():
            stop = Hook(head, "input", BEHIND_BLOCKS, lambda hidden: None)
            self._backbone.run({**inputs, self._argument: filled, "use_cache": True}, [stop], stop=True)
        # A row without tokens before its start saw only padding: its state must be the state before any token.
        none = (start[rows] == 0).to(device)
        found = states_in(filled, self.blocks)
        return {key: t.masked_fill(none.view(-1, *[1] * (t.ndim - 1)), 0) for key, t in found.items()}

    def put_into(self, filled: Any, stored: Sequence[BlockStates], number: int, at: Tensor) -> Any:
        """A cache of earlier keys and values, extended by the states of rows `at` for this start."""
        if not self.blocks:
            return filled
        device = self._backbone.device
        states = {
            key: t.index_select(0, at.to(t.device)).to(device, non_blocking=True)
            for key, t in (stored[number] if stored else {}).items()
        }
        return put_states(filled, self._backbone.model, states, self.blocks)


def without_attention(backbone: Backbone, chain: Sequence[str]) -> list[int]:
    """The numbers of the blocks of a chain that have no attention."""
    modules = backbone.anatomy.modules
    return [i for i, path in enumerate(chain) if not attends(modules[path])]
