"""Paths: the part of an exchange's effect that reaches the answer through one receiver.

Source: Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching" (arXiv 2304.05969). For path patching
in which the other heads are held, see Wang et al. 2022 (arXiv 2211.00593).

An exchange at the sender changes everything that is computed after it. Two runs of the base isolate the effect through
one receiver:

1. The first run has the exchange at the sender, and the sites in `hold` keep their states in the base. Only the
   receiver's states are recorded.
2. The second run puts these states at the receiver and changes nothing else. Its answer is the result.

So the receiver gets everything that comes from the sender on paths without a held site: directly through the residual
stream, and through all attentions and MLPs in between. If all of them are held, only the direct path is left. In the
second run nothing is held: everything after the receiver responds to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits, edit_hooks
from subspace_lab.model.families import HookPoint
from subspace_lab.model.intervene import states_at
from subspace_lab.model.resolved_sites import resolve
from subspace_lab.model.sources import MISSING, Unmatched


@dataclass(frozen=True)
class Path:
    """The path from an exchange to the answer through a receiver.

    Attributes:
        receiver: the site through which the effect reaches the answer.
        hold: sites that keep their states in the base while the receiver's states are computed. Only those between
            sender and receiver matter. If a sender is also held, the exchange at it is still made; the receiver itself
            is never held.
    """

    receiver: Site
    hold: tuple[Site, ...] = ()

    def check(self, backbone: Backbone, senders: Iterable[Site]) -> None:
        """ValueError for a sender without a path to the receiver, or a site that the model does not have."""
        end = backbone.hook_point(self.receiver)
        for site in self.hold:
            backbone.hook_point(site)
        for sender in senders:
            start = backbone.hook_point(sender)
            if _stream(start) == _stream(end):
                if start.columns and end.columns and not set(start.columns) & set(end.columns):
                    raise ValueError(f"No path leads from {sender} to {self.receiver}: they lie side by side.")
            elif start.order > end.order:
                raise ValueError(
                    f"No path leads from {sender} to {self.receiver}, which the model computes before the sender: the "
                    "receiver must come after it."
                )

    def exchange(
        self,
        backbone: Backbone,
        base: Batch,
        rows: Tensor,
        edits: Edits,
        sources: Mapping[Site, Any],
        unmatched: Unmatched = "refuse",
        engine: FrozenPast | None = None,
    ) -> tuple[Edits, dict[Site, Tensor]]:
        """The first run: an edit of the receiver alone, and the states that it puts there.

        Args:
            rows: indices of the bases that are run, in any order and number.
            edits: the edits at the senders.
            sources: {sender: states of these rows' sources}.
            engine: an engine over these bases that knows senders and receiver. If nothing is held, the run starts from
                the states that the engine has kept.
        """
        streams = {_stream(backbone.hook_point(site)) for site in edits}
        if engine is not None and not self.hold and _stream(backbone.hook_point(self.receiver)) not in streams:
            return {self.receiver: _put}, self._resumed(engine, rows, edits, sources, unmatched)
        some = base.rows(rows)
        # Resolved for all rows, so that the number of positions agrees with the sources' states and with the engine.
        places = {site: resolve(backbone, base, site).rows(rows) for site in (*edits, self.receiver)}
        first = min(places[site].hook_point.order for site in edits)
        last = places[self.receiver].hook_point
        between = [
            place
            for place in (resolve(backbone, base, site).rows(rows) for site in self.hold)
            if first <= place.hook_point.order <= last.order and _stream(place.hook_point) != _stream(last)
        ]
        held = states_at(backbone, some, between) if between else {}
        # Hooks on one residual stream act in this order: held sites, then the exchange, then reading the receiver.
        hooks = [
            *edit_hooks(dict.fromkeys(held, _put), {one.site: one for one in between}, held),
            *edit_hooks(edits, places, sources, unmatched),
        ]
        states = states_at(backbone, some, [places[self.receiver]], hooks)
        return {self.receiver: _put}, states

    def _resumed(
        self, engine: FrozenPast, rows: Tensor, edits: Edits, sources: Mapping[Site, Any], unmatched: Unmatched
    ) -> dict[Site, Tensor]:
        """The receiver's states, recorded by an edit that changes nothing; NaN where a row has no such position."""
        found: list[Tensor] = []

        def look(states: Tensor) -> Tensor:
            found.append(states.clone())
            return states

        engine.logits(rows, {**edits, self.receiver: look}, sources, unmatched)
        present = engine.sites[self.receiver].rows(rows).present
        missing = None if present is None else ~present[..., None].to(found[0].device)
        return {self.receiver: found[0] if missing is None else found[0].masked_fill(missing, MISSING)}


def _put(states: Tensor, source: Tensor) -> Tensor:
    return source.to(states)


def _stream(point: HookPoint) -> tuple[str, str]:
    return point.path, point.side
