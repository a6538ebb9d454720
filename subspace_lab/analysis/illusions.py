"""Whether a subspace is a variable of the model, or only a way to steer it.

An interchange can change the answer along a direction that the model itself never uses. It reads a copy of the
variable that the model does not read, and it writes into a direction that never varies by itself (a dormant one).
Then the IIA is high although the subspace is not a variable of the model (Makelov et al. 2023, arXiv 2311.17030). So
each part of a subspace is tried alone, and so is the full vector. After a projection a basis has to be made
orthonormal again before it is tried (Wu et al., arXiv 2401.12631, a reply to Makelov et al.). `purify`
(`purifying.py`) keeps the part that both varies by itself and is read (`variation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.analysis._subspace_parts import (
    bases_of,
    check_linear,
    outside_of,
    projected,
    scores_of,
    share_in,
)
from subspace_lab.analysis.variation import EXAMPLES, READ, VARIES, Variation, variations
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate, estimate
from subspace_lab.core.subspaces import Axes
from subspace_lab.das.equal_pairs import clusters_of
from subspace_lab.das.fits import Fit
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.model.backbone import Backbone

SENSED, LOST = 0.5, 0.1
"""The tests look for a share of the effect below SENSED, and for a fall of the IIA by more than LOST."""
DRAWS = 99


@dataclass(frozen=True)
class Distance:
    """How far edited states are from natural ones.

    Attributes:
        value: the energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′| between edited states X and as many natural
            states Y, as a share of the mean distance between two natural states. It is 0 if both have the same
            distribution.
        null: the same distance between two random halves of the natural states, for each draw.
        p: the share of distances, the observed one included, that are at least as large as the observed one.
    """

    value: float
    null: tuple[float, ...] = field(repr=False)
    p: float


@dataclass(frozen=True)
class Part:
    """A part of the subspaces, tried alone.

    Attributes:
        name: "varies" (what differs between sources and bases), "read" (what the answers depend on), "both"; "idle" and
            "unread" (the rest without "varies" and without "read"); also "weights" and "beyond weights" if the site is
            the input of a projection.
        ranks: {variable: its dimensions}.
        share: {variable: tr(Rᵀ P R) / k, how much of its fitted subspace lies in the space that names the part}.
        iia: on the test pairs. For a part without dimensions: the IIA without any exchange.
    """

    name: str
    ranks: Mapping[str, int]
    share: Mapping[str, float]
    iia: Estimate


@dataclass(frozen=True)
class IllusionReport:
    """What the parts of an alignment do when they are tried alone.

    Attributes:
        place: its sites.
        ranks: {variable: dimensions}.
        found: IIA of the subspaces on the test pairs.
        full: IIA if the full vectors are exchanged; None if variables share a site.
        parts: the parts, each tried alone.
        sensed: {variable: the share of its effect on the answers' logits, to first order, that depends on directions
            which the model reads there}: 1 if the subspace reads what the model reads, small if it reads a copy.
        written: {variable: the share of its effect that is written into directions which vary there by themselves}.
        lost: {"varies" or "both": IIA of the subspaces minus IIA of this part, over the pairs}.
        distance: {variable: how far its edited states are from natural ones}.
        flagged: whether a criterion of `illusion` says that the subspaces are not variables of the model.
        because: the reason, in a sentence.
    """

    place: str
    ranks: Mapping[str, int]
    found: Estimate
    full: Estimate | None
    parts: tuple[Part, ...]
    sensed: Mapping[str, float]
    written: Mapping[str, float]
    lost: Mapping[str, Estimate]
    distance: Mapping[str, Distance]
    flagged: bool
    because: str

    def part(self, name: str) -> Part:
        """One part by its name (KeyError if there is none; the message names all parts)."""
        found = {part.name: part for part in self.parts}
        if name not in found:
            raise KeyError(f"No part {name!r}; there are {list(found)}.")
        return found[name]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        full = "" if self.full is None else f", full vector {self.full}"
        both = self.part("both")
        return (
            f"{'Flagged' if self.flagged else 'Not flagged'} at {self.place}: {self.because} IIA {self.found}; "
            f"the part that varies and is read, alone {both.iia} (rank {_plain(both.ranks)}){full}; "
            f"n = {self.found.n} pairs."
        )


def illusion(
    backbone: Backbone,
    pairs: Pairs,
    fit: Fit | Alignment,
    *,
    varies: float = VARIES,
    read: float = READ,
    examples: int = EXAMPLES,
) -> IllusionReport:
    """Try each part of the fitted subspaces alone, and say whether the subspaces are variables of the model.

    Training pairs show what varies and what is read; the scores are on test pairs. Each criterion flags a subspace:

    - The part that varies by itself has a lower IIA, by more than .1, and the interval of the difference is above 0.
      Then the effect is written into directions that never vary there.
    - Less than half of the effect depends on what the model reads, and the part that varies and is read has an IIA
      that is at most .1 lower. Then the subspace reads a copy that the model does not read, and that it does not
      need. Its span is not that of the variable, although its IIA may be 1.
    - Less than a tenth of the effect depends on what the model reads, and both the full vector and the part that
      varies and is read have a lower score. The full vector's score is lower by more than .1, and the intervals do
      not overlap.

    In the last criterion, one of the two lower scores alone would not show an illusion. A full vector also exchanges
    everything else that the source holds. And if the answer depends on the sum of two variables, each variable is
    read only along the sum, but is exchanged along its own direction.

    Args:
        backbone, pairs, varies, read, examples: as for `purify`.
        fit: the fit or alignment to test.

    Raises:
        TypeError, ValueError: as `purify`.
    """
    alignment = fit.alignment if isinstance(fit, Fit) else fit
    check_linear(pairs, alignment)
    assignment = {name: site for name, (site, _) in alignment.variables.items()}
    known = variations(backbone, pairs, assignment, varies=varies, read=read, examples=examples)
    bases = bases_of(alignment)
    spaces = {"varies": {n: v.varies for n, v in known.items()}, "read": {n: v.read for n, v in known.items()}}
    spaces["both"] = {n: v.both for n, v in known.items()}
    if all(v.weights is not None for v in known.values()):
        spaces["weights"] = {n: v.weights for n, v in known.items() if v.weights is not None}
    without = {"varies": "idle", "read": "unread", "weights": "beyond weights"}
    tried: dict[str, dict[str, Tensor]] = {}
    shares: dict[str, dict[str, float]] = {}
    for name, of in spaces.items():
        tried[name] = {v: projected(bases[v], space)[0] for v, space in of.items()}
        shares[name] = {v: share_in(bases[v], space) for v, space in of.items()}
        if name in without:
            tried[without[name]] = {v: outside_of(bases[v], space) for v, space in of.items()}
            shares[without[name]] = {v: 1 - share for v, share in shares[name].items()}
    prepared = PreparedPairs.of(backbone, pairs.test, [assignment])
    whole = [] if len(set(assignment.values())) < len(assignment) else [_whole(known)]
    found, *each = scores_of(prepared, assignment, [bases, *tried.values(), *whole])
    clusters = clusters_of(pairs.test)
    by_part = dict(zip(tried, each, strict=False))
    lost = {name: estimate(found - by_part[name], clusters) for name in ("varies", "both")}
    full = estimate(each[-1], clusters) if whole else None
    effects = {name: _effect_shares(bases[name], one) for name, one in known.items()}
    sensed, written = ({name: pair[i] for name, pair in effects.items()} for i in range(2))
    parts = tuple(
        Part(name, {v: len(b) for v, b in of.items()}, shares[name], estimate(by_part[name], clusters))
        for name, of in tried.items()
    )
    flagged, because = _judged(sensed, lost, estimate(found, clusters), full)
    return IllusionReport(
        place=", ".join(dict.fromkeys(str(site) for site in assignment.values())),
        ranks={name: len(basis) for name, basis in bases.items()},
        found=estimate(found, clusters),
        full=full,
        parts=parts,
        sensed=sensed,
        written=written,
        lost=lost,
        distance={name: off_natural(one, bases[name]) for name, one in known.items()},
        flagged=flagged,
        because=because,
    )


def off_natural(known: Variation, basis: Float[Tensor, "rank width"], *, draws: int = DRAWS) -> Distance:
    """How far states with an exchanged subspace are from natural ones; the draws have seed 0.

    Args:
        known: the site, with its natural states.
        basis: an orthonormal basis of the subspace.
        draws: how many times the natural states are split into halves, for the null.
    """
    bases, sources = known.bases, known.sources
    n = min(len(bases), 512)  # all distances between the states are in memory at once
    some = torch.linspace(0, len(bases) - 1, n).round().long()
    bases, sources = bases[some], sources[some]
    edited = bases + ((sources - bases) @ basis.T) @ basis
    natural = torch.cat([bases, sources])
    inside, across = torch.cdist(natural, natural), torch.cdist(edited, natural)
    own = _mean_apart(torch.cdist(edited, edited))
    scale = _mean_apart(inside)
    generator = torch.Generator().manual_seed(0)
    values, null = [], []
    for _ in range(draws):
        order = torch.randperm(2 * n, generator=generator)
        one, other = order[:n], order[n:]
        apart = _mean_apart(inside[other][:, other])
        values.append(2 * float(across[:, other].mean()) - own - apart)
        null.append(2 * float(inside[one][:, other].mean()) - _mean_apart(inside[one][:, one]) - apart)
    scale = max(scale, torch.finfo(torch.double).tiny)
    value, far = sum(values) / draws / scale, [x / scale for x in null]
    return Distance(value, tuple(far), (1 + sum(x >= value for x in far)) / (1 + draws))


def _effect_shares(basis: Tensor, known: Variation) -> tuple[float, float]:
    """The share of the effect that depends on what is read there, and the share that is written into what varies."""
    whole = known.effects(basis)
    size = float(whole.square().sum())
    if size <= 0:
        return 0.0, 0.0
    sensed = float((known.effects(known.both, basis) * whole).sum()) / size
    return sensed, float((known.effects(basis, known.varies) * whole).sum()) / size


def _judged(
    sensed: Mapping[str, float], lost: Mapping[str, Estimate], found: Estimate, full: Estimate | None
) -> tuple[bool, str]:
    """Whether an alignment is flagged, and the reason."""
    least = min(sensed, key=lambda name: sensed[name])
    by_reading = f"only {sensed[least]:.2f} of the effect of {least!r} depends on what the model reads there"
    if lost["varies"].value > LOST and lost["varies"].low > 0:
        return True, f"without the directions that never vary there, IIA falls by {lost['varies']}."
    if sensed[least] < SENSED and lost["both"].value <= LOST:
        return (
            True,
            f"{by_reading}; the rest depends on a copy that the model does not read, and without it IIA falls by "
            f"{lost['both']}.",
        )
    apart = full is not None and found.value > full.value + LOST and found.low > full.high
    if sensed[least] < SENSED / 5 and apart and lost["both"].low > 0:
        return True, f"{by_reading}, and exchanging the full vector does not have the same effect."
    return (
        False,
        "the directions that vary there carry the effect, and "
        f"{sensed[least]:.2f} of it depends on what the model reads.",
    )


def _whole(known: Mapping[str, Variation]) -> dict[str, Tensor]:
    return {name: Axes(one.bases.shape[1]).basis() for name, one in known.items()}


def _mean_apart(distances: Tensor) -> float:
    """The mean distance between two different states."""
    n = len(distances)
    return float(distances.sum()) / max(1, n * (n - 1))


def _plain(ranks: Mapping[str, int]) -> str:
    return " and ".join(map(str, ranks.values()))
