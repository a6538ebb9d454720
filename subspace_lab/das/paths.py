"""Paths: what of an exchange reaches the answer through one place of the model.

Source: Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching" (arXiv 2304.05969); with the other
heads held, Wang et al. 2022 (arXiv 2211.00593).

An exchange at the sender changes everything behind it. Two runs of the base tell what goes through one receiver:

1. with the exchange at the sender and with the sites in `hold` as they are in the base; only the receiver's states are
   kept;
2. with these states at the receiver and nothing else changed, down to the answer.

So the receiver gets all that comes from the sender on any way that no held site lies on: straight through the residual
stream, and through all attentions and MLPs between. Held at the base, a site lets nothing through. With all of them
held, only the direct path is left. In the second run nothing is held: everything behind the receiver answers to it.
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
    """The way from an exchange to the answer through a receiver.

    Attributes:
        receiver: all that is taken to the answer goes through it.
        hold: sites that stay as they are in the base while the receiver's states are found. Of these only the ones
            between sender and receiver matter. At the sender itself the exchange comes first, and the receiver is
            not held.
    """

    receiver: Site
    hold: tuple[Site, ...] = ()

    def check(self, backbone: Backbone, senders: Iterable[Site]) -> None:
        """ValueError for a sender from which no path leads to the receiver, or a site that the model has not."""
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
                    f"No path leads from {sender} to {self.receiver}, which the model computes before it: the receiver "
                    "has to lie behind the sender."
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
            rows: of the base that are run, in any order and number.
            edits: at the senders.
            sources: {sender: states of these rows' sources}.
            engine: over these bases, that knows senders and receiver. Where nothing is held the run starts from what
                it has kept.
        """
        streams = {_stream(backbone.hook_point(site)) for site in edits}
        if engine is not None and not self.hold and _stream(backbone.hook_point(self.receiver)) not in streams:
            return {self.receiver: _put}, self._resumed(engine, rows, edits, sources, unmatched)
        some = base.rows(rows)
        # Resolved in all rows, so that there are as many positions as in the states of sources and in the engine.
        places = {site: resolve(backbone, base, site).rows(rows) for site in (*edits, self.receiver)}
        first = min(places[site].hook_point.order for site in edits)
        last = places[self.receiver].hook_point
        between = [
            place
            for place in (resolve(backbone, base, site).rows(rows) for site in self.hold)
            if first <= place.hook_point.order <= last.order and _stream(place.hook_point) != _stream(last)
        ]
        held = states_at(backbone, some, between) if between else {}
        # On one stream hooks act in this order: what is held, then the sender's exchange, then the receiver's reading.
        hooks = [
            *edit_hooks(dict.fromkeys(held, _put), {one.site: one for one in between}, held),
            *edit_hooks(edits, places, sources, unmatched),
        ]
        states = states_at(backbone, some, [places[self.receiver]], hooks)
        return {self.receiver: _put}, states

    def _resumed(
        self, engine: FrozenPast, rows: Tensor, edits: Edits, sources: Mapping[Site, Any], unmatched: Unmatched
    ) -> dict[Site, Tensor]:
        """The receiver's states by an edit that changes nothing; NaN where a row has no such position."""
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
