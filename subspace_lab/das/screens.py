"""A cheap first pass over the sites of a sweep: training is spent where it leaves hope.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): in each round the sites that are left are trained for
a few steps, and those that score lowest on the dev pairs are left out. In the first round a site is judged by what
costs no training as well: the swap of the full vector, the difference of means, and what else the sweep has. Its score
is the highest of all that was reached there in any round, so a site is left out only where nothing works.

At a site that is left out what needs no training is still fitted and scored, such as the swap of the full vector;
what is trained is not, nor are random subspaces, which say what chance gives beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Screen:
    """How sites are left out.

    Attributes:
        steps: for each round the share of the training steps that a site gets in it.
        keep: the share of the sites that each round keeps.
        margin: a site whose score is so near the round's highest is kept besides.
        least: so many sites are always kept.

    Raises:
        ValueError: shares that are not above 0 and below 1, a margin below 0, fewer than 1 site.
    """

    steps: tuple[float, ...] = (0.05, 0.15)
    keep: float = 0.34
    margin: float = 0.02
    least: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps or not all(0 < share < 1 for share in self.steps) or not 0 < self.keep < 1:
            raise ValueError(
                f"steps={self.steps}, keep={self.keep}: needed are shares above 0 and below 1, of one round at least."
            )
        if not self.margin >= 0 or self.least < 1:
            raise ValueError(f"margin={self.margin}, least={self.least}: needed are 0 or more, and 1 or more.")

    def kept(self, scores: Mapping[int, float]) -> list[int]:
        """The numbers of the sites that stay, in their order."""
        order = sorted(scores, key=lambda number: -scores[number])
        count = max(self.least, math.ceil(self.keep * len(order)))
        limit = scores[order[0]] - self.margin
        return sorted(number for i, number in enumerate(order) if i < count or scores[number] >= limit)


@dataclass(frozen=True)
class Screened:
    """A cell that was spared since its site was left out: no score of the cell, and no zero.

    Attributes:
        method, place, seed: which cell.
        score: of its site in the screen, on the dev pairs.
        reason: in which round it was left out, and what the best site had.
    """

    method: str
    place: str
    seed: int
    score: float
    reason: str
