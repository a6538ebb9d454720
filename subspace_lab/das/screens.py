"""A cheap first pass over the sites of a sweep, which selects the sites at which methods are trained.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): in each round the remaining sites are trained for a
few steps, and those that score lowest on the dev pairs are left out. The first round also uses methods that need no
training: the full vector, the difference of means, and others that the sweep has. The score of a site is the highest
that any method reached there in any round, so a site is left out only if no method works there.

At a site that is left out, the methods that need no training are still fitted and scored, such as the full vector. The
methods that train are skipped. Random subspaces are skipped too, because they serve as the chance level of trained
methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Screen:
    """How many sites are left out.

    Attributes:
        steps: for each round the share of the training steps that a site gets.
        keep: the share of the sites that each round keeps.
        margin: sites whose score is within this margin of the round's highest score are also kept.
        least: at least this many sites are kept.

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
                f"steps={self.steps}, keep={self.keep}: needed are shares above 0 and below 1, for at least one round."
            )
        if not self.margin >= 0 or self.least < 1:
            raise ValueError(f"margin={self.margin}, least={self.least}: needed are 0 or more, and 1 or more.")

    def kept(self, scores: Mapping[int, float]) -> list[int]:
        """The numbers of the sites that are kept, in their order."""
        order = sorted(scores, key=lambda number: -scores[number])
        count = max(self.least, math.ceil(self.keep * len(order)))
        limit = scores[order[0]] - self.margin
        return sorted(number for i, number in enumerate(order) if i < count or scores[number] >= limit)


@dataclass(frozen=True)
class Screened:
    """A cell that was skipped because its site was left out. This is not a score of the cell, and not a zero.

    Attributes:
        method, place, seed: identify the cell.
        score: the score of its site in the screen, on the dev pairs.
        reason: the round in which the site was left out, and the score of the best site.
    """

    method: str
    place: str
    seed: int
    score: float
    reason: str
