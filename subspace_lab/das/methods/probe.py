"""A linear probe: the directions along which a logistic regression reads the variable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
class Probe(Method):
    """The span of the weights of a multinomial logistic regression from the states to the variable's value.

    It is fitted to the optimum by L-BFGS from zero weights, so nothing is random. If a variable can be read along a
    direction, this does not mean that the model itself reads it there: a probe can be right about every state while an
    exchange of its subspace changes nothing (Arora et al. 2024, arXiv 2402.12560).

    Attributes:
        rank: at most this many dimensions, the principal ones of the span. By default all dimensions: the number of
            values minus one.
        decay: λ in the mean cross-entropy + λ/2 ‖W‖². Before, the states are centred and divided by one number, their
            root mean square.
    """

    rank: int | Sequence[int] | None = None
    decay: float | Sequence[float] = 1e-3

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_setting(self, "rank")
        check_setting(self, "decay", float)

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def learner(self, problem: Problem) -> Learner:
        found = {name: self._span(problem.states(name), problem.values(name)) for name in problem.sites}
        return Learner(orthonormal_together(problem, found))

    def _span(self, states: Tensor, values: Tensor) -> FixedSubspace:
        assert isinstance(self.decay, int | float) and (self.rank is None or isinstance(self.rank, int))
        weights = logistic_regression(states, values, self.decay)
        return principal_span(weights - weights.mean(0), self.rank, len(weights) - 1)


def logistic_regression(states: Tensor, values: Tensor, decay: float) -> Tensor:
    """(values, width) weights at the optimum, in float64. ValueError for fewer than two values."""
    classes, number = values.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"The variable has {len(classes)} value here; a probe needs two or more.")
    centred = states.detach().double()
    centred = centred - centred.mean(0)
    scale = centred.square().mean().sqrt().clamp_min(torch.finfo(torch.double).tiny)
    centred = centred / scale
    with torch.enable_grad():
        weights = centred.new_zeros(len(classes), centred.shape[1], requires_grad=True)
        bias = centred.new_zeros(len(classes), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias],
            max_iter=500,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (
                nn.functional.cross_entropy(centred @ weights.T + bias, number)
                + decay / 2 * weights.square().sum()
            )
            loss.backward()
            return loss

        optimizer.step(closure)
    return weights.detach() / scale
