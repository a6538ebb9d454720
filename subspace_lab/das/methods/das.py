"""Distributed alignment search: a trained orthonormal basis.

Source: Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
representations" (arXiv 2303.02536). R is trained by gradient descent so that, after the interchange
h + Rᵀ(R h_source − R h), the model gives the answer of the causal model.

Such training can move hidden states away from all states that the model has in normal runs. `natural` adds a
counterfactual latent loss (Grant et al. 2025, "Addressing divergent representations from causal interventions on neural
networks", arXiv 2511.04638), which pulls each edited state h′ to a natural state x in which the variable has the
source's value:

    natural · mean( ½ |h′ − x|² / s² − ½ cos(h′, x) )        s² the variance of the natural states

x is the state nearest to h′ among the training sources with that value. (In the paper it is the mean of natural states
in which all variables have the values of the counterfactual; here the other variables need not be known.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import Orthonormalise, check_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace, Subspace
from subspace_lab.das.methods._natural import NearNatural
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    ParameterGroup,
    Problem,
    check_rank_fits,
    check_setting,
    joined_at_sites,
)


@dataclass(frozen=True)
class DAS(Method):
    """Distributed alignment search.

    Attributes:
        rank: dimensions of each variable's subspace; a list runs once for each entry.
        learning_rate: learning rate of the basis, by default that of the sweep; a list runs once for each entry.
        orthonormalise: how the basis is kept orthonormal, "qr" or "polar" (see `LearnedSubspace`).
        natural: weight of the loss above, which keeps edited states near natural ones; 0 means no such loss.
        start: the start, instead of a random basis: an alignment with the same variables and ranks, or, for a single
            variable, a basis of shape (rank, width).
    """

    rank: int | Sequence[int] = 1
    learning_rate: float | Sequence[float] | None = None
    orthonormalise: Orthonormalise = "qr"
    natural: float | Sequence[float] = 0.0
    start: Alignment | Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_setting(self, "rank")
        if self.learning_rate is not None:
            check_setting(self, "learning_rate", float)
        check_setting(self, "natural", float, least=0.0)

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        assert isinstance(self.rank, int)
        check_rank_fits(self, self.rank, sites, widths)
        if self.natural and len(set(sites.values())) < len(sites):
            raise ValueError(
                f"{self.label}: natural={self.natural} for {list(sites)}, some of which share a site: natural "
                "states with the values of all of them are not known. Search one variable at a time, or set natural=0."
            )
        for name, basis in self._starts(sites).items():
            if tuple(basis.shape) != (self.rank, widths[sites[name]]):
                raise ValueError(
                    f"{self.label}: the start of {name!r} has shape {tuple(basis.shape)}; needed at {sites[name]} is "
                    f"(rank, width) = {(self.rank, widths[sites[name]])}."
                )
        for site in dict.fromkeys(sites.values()) if self.start is not None else ():
            joined = torch.cat([basis for name, basis in self._starts(sites).items() if sites[name] == site])
            check_orthonormal(joined, (joined.shape[0], joined.shape[1]))

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return list(asked)

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.rank, int)
        rank, starts = self.rank, self._starts(problem.sites)

        def basis_of(site: Site, names: list[str]) -> Subspace:
            width = problem.widths[site]
            given = torch.cat([starts[name] for name in names]) if starts else None
            # One seed for each site, so that variables at different sites also start independently.
            seed = problem.seed + list(dict.fromkeys(problem.sites.values())).index(site)
            return LearnedSubspace(
                width, rank * len(names), seed=seed, start=given, orthonormalise=self.orthonormalise
            )

        subspaces = joined_at_sites(problem, basis_of, dict.fromkeys(problem.sites, rank))
        learner = _DASLearner(subspaces, _digest(starts) if starts else problem.seed, self.learning_rate)
        if self.natural:
            assert isinstance(self.natural, int | float)
            learner.keep_natural(problem, self.natural)
        return learner

    def _starts(self, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        if self.start is None:
            return {}
        if isinstance(self.start, Tensor):
            if len(sites) > 1:
                raise ValueError(
                    f"The start of several variables, {list(sites)}, must be an Alignment; one basis is not enough."
                )
            return {name: self.start.detach().cpu() for name in sites}
        missing = [name for name in sites if name not in self.start.variables]
        if missing:
            raise ValueError(f"The start has the variables {list(self.start.variables)} and lacks {missing}.")
        return {name: self.start.subspace(name).basis().detach().cpu() for name in sites}


class _DASLearner(Learner):
    def __init__(
        self,
        subspaces: Mapping[str, tuple[Site, Subspace]],
        start: int | str,
        learning_rate: float | Sequence[float] | None,
    ) -> None:
        super().__init__(subspaces, start)
        assert learning_rate is None or isinstance(learning_rate, int | float)
        self._learning_rate = learning_rate
        self._near: dict[Site, NearNatural] = {}
        self._natural = 0.0

    def keep_natural(self, problem: Problem, weight: float) -> None:
        """Add the loss that pulls edited states to natural ones, for the training that follows."""
        self._natural = weight
        for name, site in problem.sites.items():
            states, values = problem.states(name), problem.values(name)
            self._near[site] = NearNatural(self.edits[site], states, values)
            self.edits[site] = self._near[site]

    def penalty(self) -> Tensor | None:
        if not self._near:
            return None
        return self._natural * torch.stack([near.loss() for near in self._near.values()]).mean()

    def finish(self) -> None:
        for site, near in self._near.items():
            self.edits[site] = near.edit
        self._near = {}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(group.parameters, self._learning_rate) for group in super().parameter_groups()]


def _digest(starts: Mapping[str, Tensor]) -> str:
    """Identifies a given start."""
    whole = hashlib.sha256()
    for basis in starts.values():
        whole.update(basis.contiguous().numpy().tobytes())
    return f"given {whole.hexdigest()[:12]}"
