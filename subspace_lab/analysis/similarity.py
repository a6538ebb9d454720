"""Whether two subspaces do the same, where geometry only says whether they are the same.

DAS does not identify the span: two fits of one variable at one site, both with an IIA of 1, may share a third of
their span, and still move the logits alike. The measures here run the model over counterfactual pairs or look at its
states. Each is a `Measure` for `compare(fits, measure=…)`, which puts beside it what random subspaces of the same ranks
give under the same measure.

    Functional      cosine of the effects on the logits
    Agreement       share of the changed answers that are the same
    Transfer        IIA of the basis of one site used at another
    DataWeighted    overlap, each direction counting as much as the interchange moves the state along it
    ClassMeans      overlap of what the variable's class means span inside each subspace
    DriftCorrected  overlap after the basis was carried from one site's coordinates to the other's
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

TOLERANCE = 1e-6  # what is below this share of the largest, or of all logits, is rounding


def effects(pairs: Looks, items: Sequence[Compared]) -> list[Tensor]:
    """(pairs, answers) of each subspace: by how much its interchange moves the answers' logits.

    What moves all answers' logits alike moves no answer, and is subtracted.
    """
    found = []
    for outcome in outcomes(pairs, items):
        change = (outcome.logits - outcome.unedited).double()
        found.append(change - change.mean(-1, keepdim=True))
    return found


def outcomes(pairs: Looks, items: Sequence[Compared], sites: Sequence[Site] | None = None) -> list[Outcome]:
    """What the model says with each subspace exchanged, those of one site in one run.

    Args:
        sites: where each is exchanged, by default its own site.
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
    """⟨E₁, E₂⟩ / ‖E₁‖‖E₂‖ of the effects of two interchanges on the answers' logits, over all pairs: −1 to 1.

    1: they move every answer alike, up to a common factor. An interchange that moves nothing has 0 with all others.
    The pairs have to be the same in each model.
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
        )  # else it is rounding, whose direction means nothing
        unit = torch.where(moved, flat / sizes, 0.0)
        found: list[list[float]] = (unit @ unit.T).clamp(-1, 1).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of the pairs in which one of the two interchanges changes the model's answer, the share with the same answer.

    Pairs in which both leave the answer as it was would count any two that do nothing as agreed. 0 where neither of the
    two changes any answer.
    """

    pairs: Looks
    label: str = "agreement of answers"

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`."""
        _expect_one_data_set(self.pairs)
        told = outcomes(self.pairs, items)
        answers = torch.stack([outcome.logits.argmax(-1) for outcome in told])
        changed = torch.stack([outcome.logits.argmax(-1) != outcome.unedited.argmax(-1) for outcome in told])
        either = changed[:, None] | changed
        same = (answers[:, None] == answers) & either
        found: list[list[float]] = (same.sum(-1) / either.sum(-1).clamp_min(1)).double().tolist()
        return found


@dataclass(frozen=True, eq=False)
class Transfer:
    """IIA of the row's basis used at the column's site; at its own site what it reaches by itself.

    Not symmetric. A basis that does at another layer what it does at its own is the same subspace for the model,
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
            told = outcomes(self.pairs, items, [site] * len(items))
            scores |= {(i, site): float(iia(outcome).mean()) for i, outcome in enumerate(told)}
        return [[scores[i, site_of(other)] for other in items] for i in range(len(items))]


@dataclass(frozen=True, eq=False)
class DataWeighted:
    """⟨A₁, A₂⟩ / ‖A₁‖‖A₂‖ with A = P S P, S the second moment of the differences source − base at the site: 0 to 1.

    The overlap of what the interchange writes: a direction along which sources and bases do not differ does not count.
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
    """Overlap of the spans of P M, with M the centred means of the sources' states by the variable's value.

    What the subspaces hold of the variable as its class means show it; of two values it is one direction. Where the
    pairs do not tell the values the expected answers stand in for them.
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
            raise ValueError(f"{name!r} has one value in these pairs; class means need two or more.")
        basis = orthonormal_rows(item.subspace)
        means = torch.stack([states[values == one].mean(0) for one in classes])
        _, sizes, right = torch.linalg.svd((means - means.mean(0)) @ basis.T, full_matrices=False)
        kept = right[sizes > TOLERANCE * sizes[0]]
        if not len(kept):
            raise ValueError(f"{item.label}: the class means of {name!r} do not differ inside the subspace.")
        return FixedSubspace(kept @ basis)


def _expect_one_data_set(pairs: Looks) -> None:
    looks = [pairs] if isinstance(pairs, PreparedPairs) else list(pairs.values())
    told = {(len(look), look.data.answers, tuple(look.data.answer.tolist())) for look in looks}
    if len(told) > 1:
        raise ValueError("The models are asked about different pairs; effects are compared pair by pair.")
