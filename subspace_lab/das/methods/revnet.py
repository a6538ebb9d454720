"""A nonlinear alignment map. It is a control that serves as a warning: it finds variables even where none exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from subspace_lab.core.nonlinear import InvertibleMap
from subspace_lab.core.sites import Site
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    ParameterGroup,
    Problem,
    check_rank_fits,
    check_setting,
)


@dataclass(frozen=True)
class RevNet(Method):
    """The exchange of the first k coordinates of a trained invertible map: φ⁻¹(φ(h_source)₁…ₖ, φ(h)ₖ₊₁…).

    Warning: a search with unrestricted maps reaches about 100 % IIA on randomly initialised language models, and over
    80 % on random multilayer perceptrons, although these implement no algorithm (Sutter et al. 2025, arXiv 2507.08802).
    A high score of this method is not evidence that the model represents the variable. Use it together with the same
    search in a randomly initialised twin, to see what a linear map does not find.

    The result is not a subspace: it can be exchanged, read, saved and loaded, but it has no basis, no angles and no
    overlap with others. Variables that share a site cannot have a map each.

    Attributes:
        rank: k; a list runs once for each entry.
        blocks: number of reversible blocks of the map.
        hidden: number of units in each layer of a block, by default the width of the states.
        learning_rate: learning rate of the map. (A linear basis learns well at higher rates than these layers.)
    """

    rank: int | Sequence[int] = 1
    blocks: int | Sequence[int] = 4
    hidden: int | None = None
    learning_rate: float | Sequence[float] = 3e-3
    caution: ClassVar[str] = (
        "RevNet is a nonlinear map. With it a search reaches about 100 % on randomly initialised models too (Sutter et "
        "al. 2025), so its score is not evidence unless a randomly initialised twin scores far lower."
    )

    def __post_init__(self) -> None:
        check_setting(self, "rank")
        check_setting(self, "blocks")
        check_setting(self, "learning_rate", float)
        if self.hidden is not None:
            check_setting(self, "hidden")

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        assert isinstance(self.rank, int)
        if len(set(sites.values())) < len(sites):
            raise ValueError(
                f"{self.label} for {list(sites)} at {sorted(set(sites.values()))}: variables that share a site need "
                "parts of one basis, and a nonlinear map has none. Leave the method out, or search one at a time."
            )
        check_rank_fits(self, self.rank, sites, widths)
        for site, width in widths.items():
            if site in sites.values() and width < 2:
                raise ValueError(
                    f"{self.label} at {site}: states of width {width} cannot be split into two halves."
                )

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.rank, int) and isinstance(self.blocks, int)
        found = {}
        for i, (name, site) in enumerate(problem.sites.items()):
            states = problem.states(name)
            size = float((states - states.mean(0)).float().square().mean().sqrt())
            if not 0 < size < float("inf"):
                raise ValueError(f"The states at {site} have the scale {size}: a map needs states that differ.")
            made = InvertibleMap(
                problem.width(name),
                self.rank,
                blocks=self.blocks,
                hidden=self.hidden,
                scale=size,
                seed=problem.seed + i,
            )
            found[name] = (site, made.to(problem.device))
        assert isinstance(self.learning_rate, int | float)
        return _RevNetLearner(found, problem.seed, self.learning_rate)


class _RevNetLearner(Learner):
    def __init__(self, maps: Mapping[str, tuple[Site, InvertibleMap]], start: int, learning_rate: float) -> None:
        super().__init__(maps, start)
        self._learning_rate = learning_rate

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(group.parameters, self._learning_rate) for group in super().parameter_groups()]
