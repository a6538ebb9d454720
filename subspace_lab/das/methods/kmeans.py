"""k-means: the directions between clusters of the states, found without looking at the variable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    Problem,
    check_setting,
    orthonormal_together,
    principal_span,
)

STARTS, ROUNDS = 8, 100


@dataclass(frozen=True)
class KMeans(Method):
    """The span of the differences between cluster centres of the training pairs' source states.

    The variable's values are not used. With two clusters it is one direction (Arora et al. 2024, arXiv 2402.12560).
    The centres are found by Lloyd's algorithm, the best of eight starts (k-means++, Arthur & Vassilvitskii 2007). The
    starts are the same in every run.

    Attributes:
        clusters: how many clusters; a list runs once for each entry.
    """

    clusters: int | Sequence[int] = 2

    def __post_init__(self) -> None:
        check_setting(self, "clusters")
        given = self.clusters if isinstance(self.clusters, list | tuple) else [self.clusters]
        if min(given) < 2:
            raise ValueError(f"KMeans(clusters={self.clusters!r}): needed are two or more.")

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.clusters, int)
        found: dict[str, FixedSubspace] = {}
        for name in problem.sites:
            centres = centres_of(problem.states(name), self.clusters)
            found[name] = principal_span(centres - centres.mean(0), None, self.clusters - 1)
        return Learner(orthonormal_together(problem, found))


def centres_of(states: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """(clusters, width) centres, from the start with the least sum of squared distances between states and centres.

    Raises:
        ValueError: fewer different states than clusters.
    """
    states = states.double()
    if len(states.unique(dim=0)) < clusters:
        raise ValueError(f"{clusters} clusters of {len(states)} states: fewer than that are different.")
    generator = torch.Generator().manual_seed(seed)
    best, least = states[:clusters], torch.inf
    for _ in range(STARTS):
        centres = _spread(states, clusters, generator)
        for _ in range(ROUNDS):
            distance = torch.cdist(states, centres)
            nearest = distance.argmin(1)
            # A centre stays where it is if no state is nearest to it.
            moved = torch.stack(
                [
                    states[nearest == k].mean(0) if bool((nearest == k).any()) else centres[k]
                    for k in range(clusters)
                ]
            )
            if torch.equal(moved, centres):
                break
            centres = moved
        total = float(torch.cdist(states, centres).amin(1).square().sum())
        if total < least:
            best, least = centres, total
    return best


def _spread(states: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """States that are far from each other: each is drawn with probability ∝ its squared distance to those before."""
    chosen = [int(torch.randint(len(states), (1,), generator=generator))]
    for _ in range(clusters - 1):
        square = torch.cdist(states, states[chosen]).amin(1).square().cpu()
        chosen.append(int(torch.multinomial(square, 1, generator=generator)))
    return states[chosen]
