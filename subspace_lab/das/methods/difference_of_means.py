"""Difference of means: the directions between the mean states of a variable's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.core.subspaces import FixedSubspace, difference_of_means, pca
from subspace_lab.das.methods.method import Learner, Method, Problem, check_setting, orthonormal_together


@dataclass(frozen=True)
class DifferenceOfMeans(Method):
    """The span of the differences between the mean states of the variable's values, over the training pairs' sources.

    Nothing is trained. With two values it is one direction, and often as good as DAS of rank 1 (Marks & Tegmark 2023,
    arXiv 2310.06824; Arora et al. 2024, arXiv 2402.12560).

    Attributes:
        rank: at most this many dimensions, the principal ones of the span. By default all dimensions: the number of
            values minus one.
    """

    rank: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_setting(self, "rank")

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def learner(self, problem: Problem) -> Learner:
        rank = self.rank
        assert rank is None or isinstance(rank, int)
        found = {name: _span(problem.states(name), problem.values(name), rank) for name in problem.sites}
        return Learner(orthonormal_together(problem, found))


def _span(states: Tensor, values: Tensor, rank: int | None) -> FixedSubspace:
    whole = difference_of_means(states, values)
    if rank is None or rank >= whole.rank:
        return whole
    means = torch.stack([states[values == value].mean(0) for value in values.unique()])
    return pca(means, rank)
