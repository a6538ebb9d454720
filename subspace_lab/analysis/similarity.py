"""Whether two subspaces do the same. Geometry can only say whether they are the same.

DAS does not determine the span: two fits of one variable at one site, both with an IIA of 1, may share only a third of
their span and still change the logits in the same way. The measures here run the model over counterfactual pairs or
look at its states. Each is a `Measure` for `compare(fits, measure=…)`. `compare` also reports the value of the same
measure for random subspaces of the same ranks.

    Functional      cosine of the effects on the logits
    Agreement       share of the changed answers that are the same
    Transfer        IIA of the basis of one site used at another
    DataWeighted    overlap, with each direction weighted by how much the interchange moves the state along it
    ClassMeans      overlap of the spans of the variable's class means inside each subspace
    DriftCorrected  overlap after the basis was mapped from one site's coordinates to the other's
                    (`analysis/drift.py`)

>>> look = prepared(backbone, pairs.test, fits)
>>> compare(fits, across="layer", within="seed", measure=Functional(look))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.analysis.compared import Compared
from subspace_lab.analysis.geometry import orthonormal_rows, overlap
from subspace_lab.analysis.looks import (
    Looks,
    differences_at,
    look_of,
    site_of,
    states_at_sources,
    variable_in,
)
from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.objectives import Outcome, iia
from subspace_lab.das.prepared_pairs import PreparedPairs

TOLERANCE = 1e-6  # a value below this share of the largest value, or of the norm of all logits, is rounding


def effects(pairs: Looks, items: Sequence[Compared]) -> list[Tensor]:
    """(pairs, answers) for each subspace: by how much its interchange changes the answers' logits.

    The mean over the answers is subtracted: if all logits change by the same amount, no answer changes.
    """
    found = []
    for outcome in outcomes(pairs, items):
        change = (outcome.logits - outcome.unedited).double()
        found.append(change - change.mean(-1, keepdim=True))
    return found


def outcomes(pairs: Looks, items: Sequence[Compared], sites: Sequence[Site] | None = None) -> list[Outcome]:
    """The model's answers when each subspace is exchanged; the subspaces of one site share one run.

    Args:
        sites: where each subspace is exchanged; by default at its own site.
    """
    sites = [site_of(item) for item in items] if sites is None else sites
    together: dict[tuple[str, str, Site], list[int]] = {}
    for i, (item, site) in enumerate(zip(items, sites, strict=True)):
        name = variable_in(look_of(pairs, item.model).data, item)
        together.setdefault((item.model, name, site), []).append(i)
    found: dict[int, Outcome] = {}
    for (model, name, site), members in together.items():
        look = look_of(pairs, model)
        edits = [{site: interchange(items[i].subspace.frozen().to(look.backbone.device))} for i in members]
        found |= dict(zip(members, look.outcomes({name: site}, edits), strict=True))
    return [found[i] for i in range(len(items))]


@dataclass(frozen=True, eq=False)
class Functional:
    """⟨E₁, E₂⟩ / ‖E₁‖‖E₂‖ for the effects of two interchanges on the answers' logits, over all pairs: −1 to 1.

    1: they change every answer's logit in the same way, up to a common factor. An interchange that changes nothing has
    0 with all others. The pairs have to be the same for each model.
    """

    pairs: Looks
    label: str = "cosine of effects"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        _expect_one_data_set(self.pairs)
        flat = torch.stack([effect.flatten() for effect in effects(self.pairs, items)])
        sizes = flat.norm(dim=1, keepdim=True)
        logits = [look_of(self.pairs, item.model).unedited.double().norm() for item in items]
        moved = (
            sizes > TOLERANCE * torch.stack(logits)[:, None]
        )  # otherwise the effect is rounding, and its direction means nothing
        unit = torch.where(moved, flat / sizes, 0.0)
        found: list[list[float]] = (unit @ unit.T).clamp(-1, 1).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Agreement:
    """The share of pairs with the same answer under both interchanges.

    Only pairs count in which at least one of the two changes the model's answer: otherwise any two interchanges that do
    nothing would agree. 0 if neither of the two changes any answer.
    """

    pairs: Looks
    label: str = "agreement of answers"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        _expect_one_data_set(self.pairs)
        results = outcomes(self.pairs, items)
        answers = torch.stack([outcome.logits.argmax(-1) for outcome in results])
        changed = torch.stack([outcome.logits.argmax(-1) != outcome.unedited.argmax(-1) for outcome in results])
        either = changed[:, None] | changed
        same = (answers[:, None] == answers) & either
        found: list[list[float]] = (same.sum(-1) / either.sum(-1).clamp_min(1)).double().tolist()
        return found


@dataclass(frozen=True, eq=False)
class Transfer:
    """IIA of the row's basis used at the column's site; at its own site this is its own IIA.

    Not symmetric. If a basis does the same at another layer as at its own, it is the same subspace for the model,
    whatever the angles say.
    """

    pairs: PreparedPairs
    label: str = "IIA of the row's basis at the column's site"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        sites = list(dict.fromkeys(site_of(item) for item in items))
        scores: dict[tuple[int, Site], float] = {}
        for site in sites:
            wide = [item for item in items if item.subspace.width != self.pairs.backbone.width(site)]
            if wide:
                raise ValueError(f"{site} has another width than the subspaces {[item.label for item in wide]}.")
            results = outcomes(self.pairs, items, [site] * len(items))
            scores |= {(i, site): float(iia(outcome).mean()) for i, outcome in enumerate(results)}
        return [[scores[i, site_of(other)] for other in items] for i in range(len(items))]


@dataclass(frozen=True, eq=False)
class DataWeighted:
    """⟨A₁, A₂⟩ / ‖A₁‖‖A₂‖ with A = P S P, S the second moment of the differences source − base at the site: 0 to 1.

    It is the overlap of what the two interchanges write. A direction along which sources and bases do not differ does
    not count.
    """

    pairs: PreparedPairs
    label: str = "data-weighted overlap"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        differences: dict[tuple[str, Site], Tensor] = {}
        bases, moments = [], []
        for item in items:
            key = variable_in(self.pairs.data, item), site_of(item)
            if key not in differences:
                differences[key] = differences_at(self.pairs, *key)
            basis = orthonormal_rows(item.subspace)
            written = differences[key] @ basis.T
            bases.append(basis)
            moments.append(written.T @ written / len(written))
        sizes = [float(moment.norm()) for moment in moments]
        found = []
        for basis, moment, size in zip(bases, moments, sizes, strict=True):
            inner = [basis @ other.T for other in bases]
            found.append(
                [
                    float(((moment @ m) * (m @ other)).sum()) / (size * own) if size * own > 0 else 0.0
                    for m, other, own in zip(inner, moments, sizes, strict=True)
                ]
            )
        return found


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Overlap of the spans of P M, where M are the centred means of the sources' states for each value of the variable.

    It compares how the subspaces hold the variable, as far as class means show it; for two values this is one
    direction. If the pairs do not give the values, the expected answers are used in their place.
    """

    pairs: PreparedPairs
    label: str = "class-mean overlap"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        spans = [self._span(item) for item in items]
        return [[overlap(one, other) for other in spans] for one in spans]

    def _span(self, item: Compared) -> FixedSubspace:
        name = variable_in(self.pairs.data, item)
        states, row = states_at_sources(self.pairs, name, site_of(item))
        values = self.pairs.data.values.get(name, self.pairs.data.answer).cpu()[row]
        classes = values.unique()
        if len(classes) < 2:
            raise ValueError(f"{name!r} has one value in these pairs; class means need at least two.")
        basis = orthonormal_rows(item.subspace)
        means = torch.stack([states[values == one].mean(0) for one in classes])
        _, sizes, right = torch.linalg.svd((means - means.mean(0)) @ basis.T, full_matrices=False)
        kept = right[sizes > TOLERANCE * sizes[0]]
        if not len(kept):
            raise ValueError(f"{item.label}: the class means of {name!r} do not differ inside the subspace.")
        return FixedSubspace(kept @ basis)


def _expect_one_data_set(pairs: Looks) -> None:
    looks = [pairs] if isinstance(pairs, PreparedPairs) else list(pairs.values())
    data_sets = {(len(look), look.data.answers, tuple(look.data.answer.tolist())) for look in looks}
    if len(data_sets) > 1:
        raise ValueError(
            "The models have different pairs; they need the same, since effects are compared pair by pair."
        )
