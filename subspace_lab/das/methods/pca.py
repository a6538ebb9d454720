"""Principal components: the directions in which the states vary most, independent of the variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace, pca
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    Problem,
    check_rank_fits,
    check_setting,
    joined_at_sites,
)


@dataclass(frozen=True)
class PCA(Method):
    """The largest principal components of the sources' states in the training pairs (centred, not standardised).

    The variable's values are not used: a search that is no better than PCA has only found where the states vary. If
    several variables share a site, the first gets the largest components.

    Attributes:
        rank: dimensions of each variable's subspace; a list runs once for each entry.
    """

    rank: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        check_setting(self, "rank")

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        assert isinstance(self.rank, int)
        check_rank_fits(self, self.rank, sites, widths)

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.rank, int)
        rank = self.rank

        def basis_of(site: Site, names: list[str]) -> Subspace:
            return pca(problem.states(names[0]), rank * len(names))

        return Learner(joined_at_sites(problem, basis_of, dict.fromkeys(problem.sites, rank)))
