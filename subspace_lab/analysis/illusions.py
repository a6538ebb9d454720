"""Whether a subspace is a variable of the model, or only a way to steer it.

An interchange can move the answer along a direction that the model itself never uses: it reads the variable where it
stands idle (the sensor), and writes into what lies dormant (the actuator). Its IIA is high and the subspace is none of
the model's variables (Makelov et al. 2023, arXiv 2311.17030; the reply of Wu et al., arXiv 2401.12631: what is
projected has to be made orthonormal again before it is tried). So every part of a subspace is tried alone, beside the
full vector, and `purify` (`purifying.py`) keeps the part that both varies by itself and is read (`variation.py`).
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
    beside,
    check_linear,
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
"""A share of the effect below SENSED, and a fall of IIA by more than LOST, are what the tests look for."""
DRAWS = 99


@dataclass(frozen=True)
class Distance:
    """How far edited states are from natural ones.

    Attributes:
        value: the energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′| of edited states X from as many natural ones Y,
            as a share of the mean distance of two natural states. It is 0 where the distributions are the same.
        null: of one half of the natural states from the other, by draw.
        p: the share of draws, this one among them, that are as far.
    """

    value: float
    null: tuple[float, ...] = field(repr=False)
    p: float


@dataclass(frozen=True)
class Part:
    """A part of the subspaces, tried alone.

    Attributes:
        name: "varies" (what differs between sources and bases), "read" (what the answers depend on), "both"; "idle" and
            "unread" (what is left without the first and without the second); "weights" and "beyond weights" where
            the site is the input of a projection.
        ranks: {variable: its dimensions}.
        share: {variable: tr(Rᵀ P R) / k of the subspace that was found, in the space that the part is named after}.
        iia: on the test pairs; of a part without dimensions that without any exchange.
    """

    name: str
    ranks: Mapping[str, int]
    share: Mapping[str, float]
    iia: Estimate


@dataclass(frozen=True)
class IllusionReport:
    """What is left of an alignment when its parts are tried alone.

    Attributes:
        place: its sites.
        ranks: {variable: dimensions}.
        found: IIA of the subspaces on the test pairs.
        full: IIA of an exchange of the full vectors; None where variables share a site.
        parts: as `Part`.
        sensed: {variable: how much of its effect on the answers' logits, to first order, comes in by what the model
            reads there}: 1 where the subspace reads what the model reads, small where it reads a copy.
        written: the same of what is written: small where it goes into what does not vary there by itself.
        lost: {part: IIA of the subspaces less that of the part "varies" or "both", over the pairs}.
        distance: {variable: of edited states from natural ones}.
        flagged: whether the subspaces are no variables of the model by one of the criteria of `illusion`.
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
        """One part (KeyError naming those that there are)."""
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
            f"{'Flagged' if self.flagged else 'Not flagged'} at {self.place}: {self.because} IIA {self.found}; what "
            f"varies and is read alone {both.iia} (rank {_plain(both.ranks)}){full}; n = {self.found.n} pairs."
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
    """Try the parts of the subspaces that were found alone, and say whether they are variables of the model.

    What varies and what is read is taken from training pairs, scores are of test pairs. Flagged is a subspace

    - whose part that varies by itself has an IIA lower by more than .1, with an interval above 0: the effect is
      written into what never varies there;
    - less than half of whose effect comes in by what the model reads, and whose part that varies and is read has an
      IIA lower by at most .1: it reads a copy that stands idle and that it does not need, and has another span than
      the variable, though its IIA may be 1;
    - less than a tenth of whose effect comes in by what the model reads, where neither the full vector nor the part
      that varies and is read does what the subspace does: its score is higher by more than .1, with intervals apart.

    Either of the last two alone is no illusion. A full vector exchanges what else the source holds. And where the
    answer depends on a sum of two variables, each of them is read along the sum alone, but is exchanged along itself.

    Args:
        backbone, pairs, varies, read, examples: as of `purify`.
        fit: what was found.

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
            tried[without[name]] = {v: beside(bases[v], space) for v, space in of.items()}
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
    """How far states with a subspace exchanged are from natural ones; drawn with seed 0.

    Args:
        known: the site, with its natural states.
        basis: orthonormal, of the subspace.
        draws: halves of the natural states that the null is of.
    """
    bases, sources = known.bases, known.sources
    n = min(len(bases), 512)  # the distances of all states from each other are kept
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
    """How much of the effect comes in by what is read there, and how much goes out by what varies there."""
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
    comes_in = f"only {sensed[least]:.2f} of the effect of {least!r} comes in by what the model reads"
    if lost["varies"].value > LOST and lost["varies"].low > 0:
        return True, f"without directions that never vary there IIA falls by {lost['varies']}."
    if sensed[least] < SENSED and lost["both"].value <= LOST:
        return (
            True,
            f"{comes_in}; the rest is a copy that stands idle, and without it IIA falls by {lost['both']}.",
        )
    apart = full is not None and found.value > full.value + LOST and found.low > full.high
    if sensed[least] < SENSED / 5 and apart and lost["both"].low > 0:
        return True, f"{comes_in}, and the full vector does not do what the subspace does."
    return False, f"what varies there carries the effect, and {sensed[least]:.2f} of it comes in by what is read."


def _whole(known: Mapping[str, Variation]) -> dict[str, Tensor]:
    return {name: Axes(one.bases.shape[1]).basis() for name, one in known.items()}


def _mean_apart(distances: Tensor) -> float:
    """The mean distance of two different states."""
    n = len(distances)
    return float(distances.sum()) / max(1, n * (n - 1))


def _plain(ranks: Mapping[str, int]) -> str:
    return " and ".join(map(str, ranks.values()))
