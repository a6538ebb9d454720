"""Boundless DAS: a rotated basis, and the number of its vectors that a variable needs.

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

    R is a trained orthonormal basis and b₁ a learned boundary. b₀ is 0; if several variables share a site, they share
    the basis, and b₀ is the boundary of the variable before. T falls during the training. At the end the boundaries
    become hard. The result, which is scored and returned, is the ordinary subspace of the vectors between them.

    Attributes:
        vectors: number of vectors of the basis. By default the width of the states, but at most 256: a larger basis
            makes each step slower, and a variable is unlikely to need so many vectors.
        penalty: weight in the loss of the share of vectors (between 0 and 1) that the variables use, so that fewer
            vectors are preferred; 0 means no penalty.
        first_temperature, last_temperature: T at the start and at the end, in basis vectors. The first is for 4,096
            vectors, as published, and is scaled down in proportion to their number. At the default last value of 0.1
            only the vector next to the boundary is still soft.
        learning_rate: learning rate of the basis, by default that of the sweep.
        boundary_rate: learning rate of the boundaries, in shares of the vectors. (Published: 0.01, for longer
            trainings than the few hundred steps that are usual here.)
        boundary_start: share of the vectors that all variables together have at the start.
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
            # Each variable at the site needs at least one vector.
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
