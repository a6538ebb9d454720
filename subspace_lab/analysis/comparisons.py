"""Which of several subspaces overlap more than chance makes them overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from subspace_lab.analysis.geometry import CONFIDENCE, Chance, haar_overlap, orthonormal_rows, overlap
from subspace_lab.core.subspaces import Subspace
from subspace_lab.das.fits import Fit, Fits


@dataclass(frozen=True, repr=False)
class Comparison:
    """The overlaps of several subspaces, with what chance gives.

    Attributes:
        labels: of the subspaces, in the order of rows and columns.
        ranks: theirs.
        width: of the states that they are subspaces of.
        matrix: overlap of each with each.
        chance: by pair of ranks, the smaller first. A band holds for one pair: of twenty pairs of random
            subspaces one falls outside.
    """

    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    width: int
    matrix: tuple[tuple[float, ...], ...]
    chance: Mapping[tuple[int, int], Chance]

    def __repr__(self) -> str:
        return f"Comparison of {len(self.labels)} subspaces of width {self.width}: {self.summary()}"

    def summary(self) -> str:
        """How many of the pairs overlap more than random subspaces do, in one sentence."""
        pairs = [(i, j) for i in range(len(self.labels)) for j in range(i)]
        above = sum(self.matrix[i][j] > self.chance_of(i, j).high for i, j in pairs)
        return (
            f"{above} of the {len(pairs)} pairs overlap more than 97.5 % of independent random subspaces do. Where the "
            "IIA is at its floor an overlap means nothing."
        )

    def chance_of(self, i: int, j: int) -> Chance:
        """What chance gives for the ranks of two of the subspaces."""
        one, other = sorted((self.ranks[i], self.ranks[j]))
        return self.chance[one, other]

    def within_chance(self, i: int, j: int) -> bool:
        """Whether an overlap lies in the 95 % band of independent random subspaces."""
        chance = self.chance_of(i, j)
        rounding = 1e-9  # at full rank the band is the point 1
        return chance.low - rounding <= self.matrix[i][j] <= chance.high + rounding

    def as_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "labels": list(self.labels),
            "ranks": list(self.ranks),
            "width": self.width,
            "overlap": [list(row) for row in self.matrix],
            "chance": [{"ranks": list(ranks), **asdict(chance)} for ranks, chance in self.chance.items()],
            "confidence": CONFIDENCE,
        }


def compare(
    subspaces: Fits | Mapping[str, Subspace | Fit],
    seeds: Mapping[str, int | str] | None = None,
    *,
    same_start_allowed: bool = False,
) -> Comparison:
    """The overlap of each subspace with each, beside what chance gives.

    Args:
        subspaces: the fits of a sweep, or {label: subspace or fit}, all of states of one width. Of a sweep those fits
            are compared that began at a random start (all, if none did); nonlinear maps have no overlap.
        seeds: {label: what tells its random start from the others}, of all or of none; of fits they are known.
        same_start_allowed: compare also what was trained from one start.

    Raises:
        ValueError: nothing to compare, different widths, a subspace without a seed, several variables in a fit, or
            two subspaces from one start: a basis stays near its start, so they overlap whatever the model does.
    """
    named = _labelled(subspaces) if isinstance(subspaces, Fits) else dict(subspaces)
    if not named:
        raise ValueError("No subspaces to compare.")
    fits = {label: one for label, one in named.items() if isinstance(one, Fit)}
    starts = {label: fit.start for label, fit in fits.items() if fit.start is not None}
    _check_starts(list(starts if seeds is None else named), {**starts, **(seeds or {})}, same_start_allowed)
    bases = {
        label: orthonormal_rows(one.subspace() if isinstance(one, Fit) else one) for label, one in named.items()
    }
    widths = {label: basis.shape[1] for label, basis in bases.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"Subspaces of states of different widths have no overlap: {widths}.")
    ranks = tuple(len(basis) for basis in bases.values())
    width = next(iter(widths.values()))
    pairs = sorted({(min(a, b), max(a, b)) for a in ranks for b in ranks})
    matrix = tuple(tuple(overlap(a, b) for b in bases.values()) for a in bases.values())
    return Comparison(tuple(bases), ranks, width, matrix, {pair: haar_overlap(width, *pair) for pair in pairs})


def _labelled(fits: Fits) -> dict[str, Fit]:
    """The trained fits of a sweep, each under the parts of its name that others do not share."""
    linear = [fit for fit in fits if all(subspace.linear for _, subspace in fit.alignment.variables.values())]
    trained = [fit for fit in linear if fit.start is not None and not fit.method.control]
    chosen = trained or linear
    parts = [(fit.place, fit.method.label, f"seed {fit.seed}") for fit in chosen]
    differing = [k for k in range(3) if len({part[k] for part in parts}) > 1] or [0]
    labels = [", ".join(part[k] for k in differing) for part in parts]
    return dict(zip(labels, chosen, strict=True))


def _check_starts(labels: list[str], seeds: Mapping[str, int | str], same_start_allowed: bool) -> None:
    missing = [label for label in labels if label not in seeds]
    if missing:
        raise ValueError(f"No seed given for {missing}; seeds are known of {list(seeds)}.")
    by_start: dict[int | str, list[str]] = {}
    for label in labels:
        by_start.setdefault(seeds[label], []).append(label)
    shared = {start: group for start, group in by_start.items() if len(group) > 1}
    if shared and not same_start_allowed:
        raise ValueError(
            f"Trained from one start (start: subspaces): {shared}. Such subspaces overlap because each stays near "
            "its start. Train them from different seeds, or compare them all the same with "
            "same_start_allowed=True."
        )
