"""Does the effect of one subspace pass through another? What geometry cannot say, and causal comparison can.

Two subspaces at different layers may be orthogonal and one variable on its way, or overlap and have nothing to do with
each other. So the variable is exchanged at the first site while the subspace at the second is held at what it is in the
base: the part of the effect that is lost went through it.

    share = 1 − ⟨E_held, E⟩ / ⟨E, E⟩

with E and E_held the effects on the answers' logits (what moves all answers alike subtracted), summed over the pairs.
1: all of it passes; 0: none, as where the held site lies before the exchange. Above 1: what is held
turned the effect around. Random subspaces of the same rank are the control: of a large rank they hold back much, too.

Source: the direct and indirect effects of Pearl 2001, on subspaces; holding a site is what path patching does
(Goldowsky-Dill et al. 2023, arXiv 2304.05969), here with a subspace of it.
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
ROWS = 64  # of the bases that are run at once
TOLERANCE = 1e-9  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class Mediation:
    """How much of an exchange's effect passes through a subspace further on.

    Attributes:
        sender, receiver: the sites of the exchange and of what is held.
        rank: of what is held.
        share: of the effect that is lost, with its 95 % interval over pairs (their clusters where these are known);
            the size of the whole effect is taken as given.
        iia: of the exchange alone.
        iia_held: while the subspace is held.
        control: the share with random subspaces of the same rank; None where none were drawn.
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
        """What was found, in plain words."""
        beside = ""
        if self.control is not None:
            beside = (
                f" Random subspaces of rank {self.rank} there carry {self.control.mean:.2f} "
                f"({self.control.low:.2f} to {self.control.high:.2f}, {self.control.draws} draws)."
            )
        return (
            f"{self.share} of the effect at {self.sender} passes the subspace of rank {self.rank} at {self.receiver}; "
            f"the IIA is {self.iia.value:.2f}, with that subspace held {self.iia_held.value:.2f}.{beside}"
        )

    def as_dict(self) -> dict[str, Any]:
        """What a program reads."""
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
    """The share of the effect of exchanging the sender's subspace that passes the receiver's.

    Args:
        data: the pairs, as a rule those of the test split.
        sender: one variable and its subspace; what is exchanged.
        receiver: one subspace; what is held at the base.
        draws, seed: of random subspaces in the receiver's place; 0 for none.
        memory: budget of the frozen past.

    Raises:
        ValueError: alignments with several variables, a variable that the pairs do not have, both at one site, or an
            exchange that moves no logit: nothing can pass anywhere.
    """
    (name, (start, subspace)), (_, (end, held)) = (_only(one) for one in (sender, receiver))
    name = name if name in data.sources or len(data.sources) > 1 else next(iter(data.sources))
    if name not in data.sources:
        raise ValueError(f"The pairs have the variables {list(data.sources)}, none of which is {name!r}.")
    if start == end:
        raise ValueError(f"Sender and receiver are both at {start}: the receiver has to lie behind it.")
    # The base as its own source: an exchange with it holds a subspace where it is.
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
        raise ValueError(f"The exchange at {start} moves no answer's logit: there is no effect that could pass.")
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
        alignment: the subspace there, of the same rank as it was.
        eigenvalues: of the mean outer product, descending: how much of the movement lies along each direction.
        share: of all movement there that lies in the subspace. Far below 1 the subspace does not stay a subspace of its
            rank on its way: each text moves it elsewhere.
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
    """The subspace of a later site in which the states move when those of an alignment's subspace move a little.

    With J the Jacobian of the later states by the earlier ones in one text and R the basis, the subspace is that of the
    largest eigenvectors of E[J RᵀR Jᵀ], the mean over the bases. The mean of the outer products and not of J: what
    moves one way in one text and the other way in the next would cancel. J Rᵀ is taken by central differences, one
    basis vector at a time, all positions of the site together: exact for what is linear between the sites, else to the
    second order of the step.

    Args:
        data: of which the bases are run.
        alignment: one variable and its subspace.
        site: where it is carried to.
        step: as a share of the mean length of the states at the alignment's site.

    Raises:
        ValueError: several variables, a step that is not above 0, or a site that the movement does not reach.
    """
    name, (start, subspace) = _only(alignment)
    if not 0 < step < float("inf"):
        raise ValueError(f"step={step}: needed is a share of the states' length, above 0.")
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
            f"What moves at {start} moves {reached} dimensions at {site}, where {rank} are needed: no way leads there, "
            "or the site lies before it."
        )
    facts = {**alignment.facts, "carried": {"from": str(start), "step": step}}
    found = Alignment({name: (site, FixedSubspace(vectors[:, :rank].T.contiguous()))}, facts)
    return Carried(found, tuple(values[: max(rank, 8)].tolist()), float(values[:rank].sum() / values.sum()))


def _effect(outcome: Outcome) -> Tensor:
    """(pairs, answers) what the exchange moves, without what it moves alike in all answers."""
    change = (outcome.logits - outcome.unedited).double()
    return change - change.mean(-1, keepdim=True)


def _only(alignment: Alignment) -> tuple[str, tuple[Site, Subspace]]:
    if len(alignment.variables) != 1:
        raise ValueError(
            f"One subspace is needed, this alignment has those of {list(alignment.variables)}: use "
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
    """Each subspace with each one that lies behind it: pairs of sites in the order of the model."""
    points = [backbone.hook_point(one.site()).order for one in alignments]
    order = sorted(range(len(alignments)), key=lambda i: points[i])
    return [
        mediation(backbone, data, alignments[i], alignments[j], draws=draws, seed=seed)
        for place, i in enumerate(order)
        for j in order[place + 1 :]
        if points[i] < points[j]
    ]
