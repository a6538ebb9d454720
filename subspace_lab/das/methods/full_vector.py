"""The interchange of the whole state, which exchanges everything that any subspace of the site can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, Subspace
from subspace_lab.das.methods.method import Learner, Method, Problem


@dataclass(frozen=True)
class FullVector(Method):
    """Exchange the whole state: h becomes h_source. Not possible if variables share a site.

    The state may hold other variables too, and the full vector exchanges all of them, so its score can be lower than
    that of a subspace. Also called activation patching.
    """

    control: ClassVar[bool] = True

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        expect_apart(self, sites)

    def learner(self, problem: Problem) -> Learner:
        return Learner(whole_states(problem))


def expect_apart(method: Method, sites: Mapping[str, Site]) -> None:
    """ValueError if variables share a site, because each of them would exchange all of it."""
    if len(set(sites.values())) < len(sites):
        raise ValueError(
            f"{type(method).__name__} for {list(sites)} at {sorted(set(sites.values()))}: variables that share a site "
            "cannot each have all of it. Leave the method out, or search one variable at a time."
        )


def whole_states(problem: Problem) -> dict[str, tuple[Site, Subspace]]:
    """{variable: (its site, the subspace of all dimensions)}."""
    whole = {name: Axes(problem.width(name)).to(problem.device) for name in problem.sites}
    return {name: (problem.sites[name], axes) for name, axes in whole.items()}
