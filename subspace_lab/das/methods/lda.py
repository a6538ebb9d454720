"""Linear discriminant analysis: the directions that best separate a variable's values, given how states vary."""

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


@dataclass(frozen=True)
class LDA(Method):
    """The span of Σ⁻¹(μ_c − μ), with μ_c the mean state of value c and Σ the covariance within the values.

    Nothing is trained. If Σ is a multiple of the identity, it is the difference of means. (Fisher 1936; used as a
    search method by Arora et al. 2024, arXiv 2402.12560.)

    Attributes:
        rank: at most this many dimensions, the principal ones of the span. By default all dimensions: the number of
            values minus one.
        shrinkage: s in (1 − s) Σ + s tr(Σ)/d · I, which replaces Σ, so that it can be inverted even with fewer examples
            than dimensions.
    """

    rank: int | Sequence[int] | None = None
    shrinkage: float | Sequence[float] = 0.01

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_setting(self, "rank")
        check_setting(self, "shrinkage", float)
        given = self.shrinkage if isinstance(self.shrinkage, list | tuple) else [self.shrinkage]
        if max(given) > 1:
            raise ValueError(f"LDA(shrinkage={self.shrinkage}): possible is 0 < shrinkage ≤ 1.")

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def learner(self, problem: Problem) -> Learner:
        found = {name: self._span(problem.states(name), problem.values(name)) for name in problem.sites}
        return Learner(orthonormal_together(problem, found))

    def _span(self, states: Tensor, values: Tensor) -> FixedSubspace:
        assert isinstance(self.shrinkage, int | float) and (self.rank is None or isinstance(self.rank, int))
        classes, number = values.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"The variable has {len(classes)} value here; a discriminant needs two or more.")
        states = states.double()
        means = torch.stack([states[number == i].mean(0) for i in range(len(classes))])
        within = states - means[number]
        covariance = within.T @ within / len(states)
        size = covariance.diagonal().mean()
        identity = torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * size * identity
        if not size > 0:
            raise ValueError("The states do not vary within the values: their covariance cannot be inverted.")
        directions = torch.linalg.solve(shrunk, (means - means.mean(0)).T).T
        return principal_span(directions, self.rank, len(classes) - 1)
