"""Random subspaces: the chance level of an interchange of the same rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace, random_subspace
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    Problem,
    check_rank_fits,
    check_setting,
    joined_at_sites,
)


@dataclass(frozen=True)
class RandomSubspace(Method):
    """Subspaces drawn uniformly (from the Haar measure), independent of model and data.

    Attributes:
        rank: dimensions of each variable's subspace; a list runs once for each entry.
        draws: how many subspaces are drawn at each site. Each draw is a separate fit, and its seed is the draw's
            number.
    """

    rank: int | Sequence[int] = 1
    draws: int = 5
    control: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_setting(self, "rank")
        check_setting(self, "draws")

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return list(range(self.draws))

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        assert isinstance(self.rank, int)
        check_rank_fits(self, self.rank, sites, widths)

    @property
    def label(self) -> str:
        return f"RandomSubspace {self.rank}"

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.rank, int)
        rank = self.rank

        def basis_of(site: Site, names: list[str]) -> Subspace:
            seed = problem.seed + list(dict.fromkeys(problem.sites.values())).index(site)
            return random_subspace(problem.widths[site], rank * len(names), seed)

        return Learner(joined_at_sites(problem, basis_of, dict.fromkeys(problem.sites, rank)))
