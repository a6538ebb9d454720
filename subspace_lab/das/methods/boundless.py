"""Boundless DAS: a rotated basis, and how many of its vectors a variable needs.

Source: Wu et al. 2023, "Interpretability at scale: identifying causal mechanisms in Alpaca" (arXiv 2305.08809).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from subspace_lab.core.masks import Boundaries
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das.methods._masked import MaskedLearner, check_temperatures
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    Problem,
    check_rank_fits,
    check_setting,
)


@dataclass(frozen=True)
class BoundlessDAS(Method):
    """DAS that learns the rank: h + Rᵀ(m ⊙ (R h_source − R h)) with mᵢ = σ((i − b₀)/T) σ((b₁ − i)/T).

    R is a trained orthonormal basis and b₁ a learned boundary (b₀ is 0, or where the variable before ends: several
    variables at one site share one basis, with a boundary each). T falls during the training, and at the end the
    boundaries are hard: what is scored and given back are the basis vectors between them, an ordinary subspace.

    Attributes:
        vectors: of the basis, of which the boundary chooses; by default as many as the states are wide, at most 256:
            a wider basis makes each step slower, and no variable is likely to need so many.
        penalty: what the boundary's share of the vectors (between 0 and 1) is multiplied with before it is added to
            the loss, so that fewer vectors are preferred; 0 leaves it out.
        first_temperature, last_temperature: T in basis vectors. The first is for 4,096 vectors, as published, and
            shrinks with their number; a last one of 0.1 leaves the vector next to the boundary alone soft.
        boundary_rate: learning rate of the boundaries, in shares of the vectors (published: 0.01, for longer
            trainings than the few hundred steps that are usual here); that of the basis is
            `learning_rate`, by default the sweep's.
        boundary_start: share of the vectors that the variables together begin with.
    """

    vectors: int | Sequence[int] | None = None
    penalty: float | Sequence[float] = 1.0
    first_temperature: float = 50.0
    last_temperature: float = 0.1
    learning_rate: float | Sequence[float] | None = None
    boundary_rate: float = 3e-2
    boundary_start: float = 0.5

    def __post_init__(self) -> None:
        if self.vectors is not None:
            check_setting(self, "vectors")
        if self.learning_rate is not None:
            check_setting(self, "learning_rate", float)
        check_setting(self, "penalty", float, least=0.0)
        for name in ("first_temperature", "last_temperature", "boundary_rate", "boundary_start"):
            check_setting(self, name, float)
        check_temperatures(self, (self.first_temperature, self.last_temperature))
        if self.boundary_start > 1:
            raise ValueError(f"BoundlessDAS(boundary_start={self.boundary_start}): possible is up to 1.")

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        for site in dict.fromkeys(sites.values()):
            # Of the vectors each variable at the site needs one.
            there = {name: own for name, own in sites.items() if own == site}
            check_rank_fits(self, 1, there, widths)
            if self._vectors(widths[site]) > widths[site] or self._vectors(widths[site]) < len(there):
                raise ValueError(
                    f"{self.label} at {site}: {self._vectors(widths[site])} basis vectors for {len(there)} variable(s) "
                    f"in states of width {widths[site]}; possible are {len(there)} to {widths[site]}."
                )

    def learner(self, problem: Problem) -> Learner:
        wholes = {}
        for i, site in enumerate(dict.fromkeys(problem.sites.values())):
            width = problem.widths[site]
            wholes[site] = LearnedSubspace(width, self._vectors(width), seed=problem.seed + i)
        most = max(whole.rank for whole in wholes.values())
        first = max(self.last_temperature, self.first_temperature * most / 4096)
        assert isinstance(self.penalty, int | float)
        assert self.learning_rate is None or isinstance(self.learning_rate, int | float)
        return _BoundlessLearner(
            problem,
            wholes,
            lambda rank, variables: Boundaries(rank, variables, first, self.boundary_start),
            temperatures=(first, self.last_temperature),
            penalty=_Share(self.penalty),
            rates=(self.learning_rate, self.boundary_rate),
            start=problem.seed,
        )

    def _vectors(self, width: int) -> int:
        assert self.vectors is None or isinstance(self.vectors, int)
        return min(width, 256) if self.vectors is None else self.vectors


@dataclass(frozen=True)
class _Share:
    weight: float

    def __call__(self, mask: Boundaries) -> Tensor:
        return self.weight * mask.shares.sum()


class _BoundlessLearner(MaskedLearner):
    def advance(self, progress: float) -> None:
        super().advance(progress)
        self._keep_possible()

    def finish(self) -> None:
        self._keep_possible()
        super().finish()

    def _keep_possible(self) -> None:
        for mask in self._masks.values():
            assert isinstance(mask, Boundaries)
            mask.keep_possible()
