"""Does the effect of one subspace pass through another? Geometry cannot say this; interventions can.

Two subspaces at different layers may be orthogonal and still hold one variable on its way, or they may overlap and be
unrelated. So the variable is exchanged at the first site, while the subspace at the second site is held at its value
in the base. The part of the effect that is lost passed through it.

    share = 1 − ⟨E_held, E⟩ / ⟨E, E⟩

E and E_held are the effects on the answers' logits, minus their mean over the answers, summed over the pairs. 1: the
whole effect passes. 0: nothing passes; for example, the held site is before the exchange. Above 1: holding the
subspace reverses the effect. Random subspaces of the same rank are the control: with a large rank, they too hold back
much of the effect.

Source: the direct and indirect effects of Pearl 2001, for subspaces. Path patching holds whole sites in the same way
(Goldowsky-Dill et al. 2023, arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.analysis.geometry import Chance, orthonormal_rows
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate, estimate
from subspace_lab.core.interventions import interchange, steer
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, Subspace, random_subspace
from subspace_lab.das.equal_pairs import clusters_of
from subspace_lab.das.objectives import Outcome, iia
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.edits import edit_hooks
from subspace_lab.model.intervene import states_at
from subspace_lab.model.resolved_sites import resolve

HELD = "held at the base"
ROWS = 64  # bases in one forward pass
TOLERANCE = 1e-9  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class Mediation:
    """How much of an exchange's effect passes through a later subspace.

    Attributes:
        sender, receiver: the site of the exchange, and the site of the held subspace.
        rank: of the held subspace.
        share: the share of the effect that is lost, with its 95 % interval over pairs (over clusters of pairs if these
            are known). The interval treats the size of the whole effect as exactly known.
        iia: of the exchange alone.
        iia_held: of the exchange while the subspace is held.
        control: the same share with random subspaces of the same rank; None if none were drawn.
    """

    sender: Site
    receiver: Site
    rank: int
    share: Estimate
    iia: Estimate
    iia_held: Estimate
    control: Chance | None = None

    @property
    def sentence(self) -> str:
        """The result in words."""
        compared = ""
        if self.control is not None:
            compared = (
                f" Through random subspaces of rank {self.rank} there, the share is {self.control.mean:.2f} "
                f"({self.control.low:.2f} to {self.control.high:.2f}, {self.control.draws} draws)."
            )
        return (
            f"{self.share} of the effect at {self.sender} passes through the subspace of rank {self.rank} at "
            f"{self.receiver}. The IIA is {self.iia.value:.2f}; while that subspace is held, it is "
            f"{self.iia_held.value:.2f}.{compared}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All values and the sentence, for JSON."""
        return {
            **asdict(self),
            "sender": str(self.sender),
            "receiver": str(self.receiver),
            "sentence": self.sentence,
        }


def mediation(
    backbone: Backbone,
    data: Counterfactuals,
    sender: Alignment,
    receiver: Alignment,
    *,
    draws: int = 5,
    seed: int = 0,
    memory: int | str | None = None,
) -> Mediation:
    """The share of the effect of exchanging the sender's subspace that passes through the receiver's.

    Args:
        data: the pairs, usually those of the test split.
        sender: one variable and the subspace that is exchanged.
        receiver: one subspace, which is held at its value in the base.
        draws, seed: number and first seed of random subspaces in the receiver's place; draws=0 for none.
        memory: memory budget of the prefix cache.

    Raises:
        ValueError: alignments with several variables, a variable that the pairs do not have, sender and receiver at
            one site, or an exchange that changes no logit, so that there is no effect that could pass.
    """
    (name, (start, subspace)), (_, (end, held)) = (_only(one) for one in (sender, receiver))
    name = name if name in data.sources or len(data.sources) > 1 else next(iter(data.sources))
    if name not in data.sources:
        raise ValueError(f"The pairs have the variables {list(data.sources)}, none of which is {name!r}.")
    if start == end:
        raise ValueError(f"Sender and receiver are both at {start}: the receiver has to come later in the model.")
    # The base is its own source here: exchanging a subspace with it holds the subspace at its value in the base.
    data = replace(data, sources={**data.sources, HELD: data.base})
    both = {name: start, HELD: end}
    pairs = PreparedPairs.of(backbone, data, [{name: start}, both], memory=memory)
    random = [random_subspace(held.width, held.rank, seed + i) for i in range(draws)]
    exchange, *others = (interchange(one.frozen().to(backbone.device)) for one in (subspace, held, *random))
    whole = pairs.outcomes({name: start}, [{start: exchange}])[0]
    first, *rest = pairs.outcomes(both, [{start: exchange, end: other} for other in others])
    effect = _effect(whole)
    size = effect.square().sum(-1)
    if not float(size.sum()) > 0:
        raise ValueError(f"The exchange at {start} changes no answer's logit: there is no effect that could pass.")
    clusters = clusters_of(data)

    def lost(outcome: Outcome) -> Tensor:
        return (size - (_effect(outcome) * effect).sum(-1)) / size.mean()

    return Mediation(
        sender=start,
        receiver=end,
        rank=held.rank,
        share=estimate(lost(first), clusters),
        iia=estimate(iia(whole), clusters),
        iia_held=estimate(iia(first), clusters),
        control=Chance.of([float(lost(one).mean()) for one in rest]) if rest else None,
    )


@dataclass(frozen=True)
class Carried:
    """A subspace carried to a later site.

    Attributes:
        alignment: the subspace at the later site, of the same rank.
        eigenvalues: of the mean outer product, descending: how much the states move along each direction.
        share: the share of all movement there that lies in the subspace. Far below 1, no subspace of this rank holds
            the movement, because each text moves the state in other directions.
    """

    alignment: Alignment
    eigenvalues: tuple[float, ...]
    share: float


def carried(
    backbone: Backbone,
    data: Counterfactuals,
    alignment: Alignment,
    site: Site,
    *,
    step: float = 1e-2,
) -> Carried:
    """The subspace at a later site in which the states move if the states move a little in an alignment's subspace.

    J is the Jacobian of the later states with respect to the earlier ones in one text, and R is the basis. The result
    is the span of the largest eigenvectors of E[J RᵀR Jᵀ], the mean over the bases. The outer products are averaged,
    and not J itself: movements in opposite directions in two texts would cancel. J Rᵀ is computed by central
    differences, one basis vector at a time, at all positions of the site together. This is exact if the map between
    the sites is linear; otherwise the error is of second order in the step.

    Args:
        data: the pairs; only their bases are run.
        alignment: one variable and its subspace.
        site: where it is carried to.
        step: as a share of the mean length of the states at the alignment's site.

    Raises:
        ValueError: several variables, a step that is not above 0, or a site that the movement does not reach.
    """
    name, (start, subspace) = _only(alignment)
    if not 0 < step < float("inf"):
        raise ValueError(f"step={step}: it has to be a share of the states' length, above 0.")
    base = data.base.to(backbone.device)
    directions = orthonormal_rows(subspace).float().to(backbone.device)
    moments: Tensor | None = None
    count = 0
    for some in torch.arange(len(base)).split(ROWS):
        rows = base.rows(some)
        there, here = resolve(backbone, rows, site), resolve(backbone, rows, start)
        length = states_at(backbone, rows, [here])[start]
        size = step * float(length.float().nan_to_num().norm(dim=-1).mean())
        for direction in directions:
            moved = []
            for amount in (size, -size):
                edit = steer(FixedSubspace(direction[None]), torch.tensor([amount])).to(backbone.device)
                hooks = edit_hooks({start: edit}, {start: here})
                moved.append(states_at(backbone, rows, [there], hooks)[site].double().cpu())
            column = ((moved[0] - moved[1]) / (2 * size)).flatten(0, -2)
            column = column[~column.isnan().any(-1)]
            outer = column.T @ column
            moments = outer if moments is None else moments + outer
        count += len(rows)
    assert moments is not None
    values, vectors = torch.linalg.eigh(moments / count)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = min(subspace.rank, len(values))
    reached = int((values > TOLERANCE * values[0]).sum())
    if reached < rank:
        raise ValueError(
            f"Moving the states at {start} moves {reached} dimensions at {site}, but {rank} are needed: there is no "
            "path between the sites, or the second comes first in the model."
        )
    facts = {**alignment.facts, "carried": {"from": str(start), "step": step}}
    found = Alignment({name: (site, FixedSubspace(vectors[:, :rank].T.contiguous()))}, facts)
    return Carried(found, tuple(values[: max(rank, 8)].tolist()), float(values[:rank].sum() / values.sum()))


def _effect(outcome: Outcome) -> Tensor:
    """(pairs, answers) by how much the exchange changes the logits, minus the mean over the answers."""
    change = (outcome.logits - outcome.unedited).double()
    return change - change.mean(-1, keepdim=True)


def _only(alignment: Alignment) -> tuple[str, tuple[Site, Subspace]]:
    if len(alignment.variables) != 1:
        raise ValueError(
            f"An alignment of one variable is needed; this one has {list(alignment.variables)}: use "
            "alignment.only(name)."
        )
    return next(iter(alignment.variables.items()))


def mediations(
    backbone: Backbone,
    data: Counterfactuals,
    alignments: Sequence[Alignment],
    *,
    draws: int = 5,
    seed: int = 0,
) -> list[Mediation]:
    """`mediation` of each subspace with each one at a later site, in the order of the model."""
    points = [backbone.hook_point(one.site()).order for one in alignments]
    order = sorted(range(len(alignments)), key=lambda i: points[i])
    return [
        mediation(backbone, data, alignments[i], alignments[j], draws=draws, seed=seed)
        for place, i in enumerate(order)
        for j in order[place + 1 :]
        if points[i] < points[j]
    ]
