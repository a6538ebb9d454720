"""The result of a comparison: how similar subspaces are, and how similar the yardstick and the nulls are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from subspace_lab.analysis.geometry import CONFIDENCE, Chance
from subspace_lab.analysis.plots.matrices import overlap_heatmap
from subspace_lab.core.texts import counted

ROUNDING = 1e-9


@dataclass(frozen=True)
class Level:
    """The mean of a measure over some pairs of fits.

    Attributes:
        mean: mean over the pairs. If the measure is not symmetric, the value of a pair is the mean of both directions.
        low, high: its 95 % interval, by a jackknife over the fits, since pairs share fits. It says how the mean would
            vary with other random starts at these sites. None if one fit is in every pair.
        fits: how many fits these pairs contain.
        values: the value of each pair.
    """

    mean: float
    low: float | None
    high: float | None
    fits: int
    values: tuple[float, ...] = field(repr=False)

    @property
    def pairs(self) -> int:
        """How many pairs."""
        return len(self.values)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.mean:.2f}{interval} ({counted(self.pairs, 'pair', 'pairs')} of {self.fits} fits)"


@dataclass(frozen=True, repr=False)
class Comparison:
    """A measure for every pair of several subspaces, with its yardstick and its nulls.

    Attributes:
        labels: the labels of the subspaces, in the order of rows and columns.
        ranks: their ranks.
        width: the width of the states.
        matrix: the measure of every pair: `matrix[i][j]` is that of subspace i with subspace j.
        chance: {(rank, rank): the measure of independent random subspaces}. A band holds for one pair: one of twenty
            pairs of random subspaces lies outside it.
        measure: the name of the measure.
        counts: for each subspace, whether it takes part in means; the others are at their floor.
        facets: (what differs across, what differs within); None for what was not asked.
        across, within: the mean of each; None for what was not asked.
        null: the measure of random subspaces, over the pairs that were compared across.
        nulls: {name: the measure of another null}, such as fits on a random model.
    """

    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    width: int
    matrix: tuple[tuple[float, ...], ...]
    chance: Mapping[tuple[int, int], Chance]
    measure: str = "overlap"
    counts: tuple[bool, ...] = ()
    facets: tuple[str | None, str | None] = (None, None)
    across: Level | None = None
    within: Level | None = None
    null: Chance | None = None
    nulls: Mapping[str, Chance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", (True,) * len(self.labels))

    def __repr__(self) -> str:
        return f"Comparison of {len(self.labels)} subspaces of width {self.width}: {self.sentence}"

    @property
    def symmetric(self) -> bool:
        """Whether the measure of two subspaces is the same in both directions."""
        n = range(len(self.labels))
        return all(abs(self.matrix[i][j] - self.matrix[j][i]) <= ROUNDING for i in n for j in n)

    @property
    def distance(self) -> bool:
        """Whether a smaller measure means more similar subspaces: that of a subspace with itself is below chance."""
        n = range(len(self.labels))
        return fmean(self.matrix[i][i] - self.chance_of(i, i).mean for i in n) < -ROUNDING

    @property
    def masked(self) -> int:
        """How many subspaces are at their floor, and so not counted."""
        return self.counts.count(False)

    @property
    def sentence(self) -> str:
        """What was found, in plain words."""
        left_out = (
            f" {self.masked} of {len(self.labels)} fits are at their floor and are not counted."
            if self.masked
            else ""
        )
        if self.across is None:
            return self._count() + left_out
        what, yardstick = self.facets
        parts = [f"The {self.measure} across {what}s is {self.across}"]
        if self.within is not None:
            parts.append(f"that of two {yardstick}s at one site {self.within}")
        if self.null is not None:
            parts.append(f"that of random subspaces {_band_text(self.null)}")
        parts += [f"that of {name} {_band_text(chance)}" for name, chance in self.nulls.items()]
        return f"{'; '.join(parts)}. {self._verdict()}{left_out}"

    def chance_of(self, i: int, j: int) -> Chance:
        """The measure of random subspaces with the ranks of subspaces i and j."""
        ordered = self.ranks[i], self.ranks[j]
        one, other = sorted(ordered)
        return self.chance[ordered] if ordered in self.chance else self.chance[one, other]

    def within_chance(self, i: int, j: int) -> bool:
        """Whether the measure of i and j lies in the 95 % band of independent random subspaces."""
        chance = self.chance_of(i, j)  # at full rank the band is a single point
        return chance.low - ROUNDING <= self.matrix[i][j] <= chance.high + ROUNDING

    def as_dict(self) -> dict[str, Any]:
        """What a program reads."""
        levels = {"across": self.across, "within": self.within, "null": self.null}
        return {
            "measure": self.measure,
            "labels": list(self.labels),
            "ranks": list(self.ranks),
            "width": self.width,
            "matrix": [list(row) for row in self.matrix],
            "counts": list(self.counts),
            "chance": [{"ranks": list(ranks), **asdict(chance)} for ranks, chance in self.chance.items()],
            "confidence": CONFIDENCE,
            "facets": list(self.facets),
            **{name: None if one is None else asdict(one) for name, one in levels.items()},
            "nulls": {name: asdict(chance) for name, chance in self.nulls.items()},
            "sentence": self.sentence,
        }

    def plot(self, path: str | Path | None = None) -> Figure:
        """The matrix as a picture, with the means and the nulls beside it (`analysis/plots/matrices.py`)."""
        return overlap_heatmap(self, path)

    def _count(self) -> str:
        """How many of the pairs are above chance."""
        n = [i for i, counts in enumerate(self.counts) if counts]
        pairs = [(i, j) for i in n for j in n if (j < i if self.symmetric else i != j)]
        if not pairs:
            return "No two subspaces to compare."
        if self.distance:
            near = sum(self.matrix[i][j] < self.chance_of(i, j).low - ROUNDING for i, j in pairs)
        else:
            near = sum(self.matrix[i][j] > self.chance_of(i, j).high + ROUNDING for i, j in pairs)
        side, beyond = ("smaller", "below") if self.distance else ("higher", "above")
        return (
            f"{near} of {len(pairs)} pairs have a {side} {self.measure} than expected by chance ({beyond} 97.5 % "
            "of pairs of random subspaces)."
        )

    def _verdict(self) -> str:
        """The mean across, compared with the yardstick and the nulls."""
        assert self.across is not None
        parts, one = [], self.across
        if self.within is not None:
            other = self.within
            if one.low is None or one.high is None or other.low is None or other.high is None:
                parts.append("not distinguishable from the yardstick without more fits")
            elif one.high < other.low:
                parts.append(f"lower than that of two {self.facets[1]}s at one site")
            elif one.low > other.high:
                parts.append(f"higher than that of two {self.facets[1]}s at one site")
            else:
                parts.append(f"not distinguishable from that of two {self.facets[1]}s at one site")
        for name, null in {"chance": self.null, **self.nulls}.items():
            if null is not None:
                parts.append(_against(one, null, name))
        return f"Across {self.facets[0]}s it is {_listed(parts)}." if parts else ""


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _against(level: Level, null: Chance, name: str) -> str:
    """A mean compared with a null: outside the band of 95 % of its pairs, or only distinguishable from its mean.

    Of a null of few pairs it is said only where the mean is among them, which is no finding.
    """
    outside = not null.low - ROUNDING <= level.mean <= null.high + ROUNDING
    side = "above" if level.mean > null.high else "below"
    if null.few:
        where = f"{side} all of" if outside else "among"
        return f"{where} the {counted(null.draws, 'pair', 'pairs')} of {name} (too few for a conclusion)"
    if outside:
        return f"{side} {name}"
    if level.low is not None and level.low > null.mean + ROUNDING:
        return f"a little above {name}"
    if level.high is not None and level.high < null.mean - ROUNDING:
        return f"a little below {name}"
    return f"not distinguishable from {name}"


def _band_text(chance: Chance) -> str:
    return f"{chance.mean:.2f} ({range_text(chance)})"


def range_text(chance: Chance) -> str:
    """Where the pairs of a null lie: 95 % of them, or all if they are few."""
    if chance.draws == 1:
        return "one pair"
    which = f"all {chance.draws}" if chance.few else "95 % of"
    return f"{which} pairs {chance.low:.2f} to {chance.high:.2f}"
