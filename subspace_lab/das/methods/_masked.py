"""The learner of methods that learn which coordinates of a basis belong to a variable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.masks import Mask, Masked
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.das.methods.method import (
    Learner,
    Method,
    ParameterGroup,
    Problem,
    interchanges,
)


class MaskedLearner(Learner):
    """Soft exchanges during the training; exchanges of the subspaces that the masks chose after it.

    Args:
        problem: the search.
        wholes: {site: the basis from which coordinates are chosen}.
        mask: (rank, variables) → a mask.
        temperatures: T at the start and at the end of the training; it falls by the same factor in each step.
        penalty: a function of a mask that gives the term added to the loss.
        rates: learning rates of the bases and of the masks; None is that of the sweep.
        start: as in `Learner`.
    """

    def __init__(
        self,
        problem: Problem,
        wholes: Mapping[Site, Subspace],
        mask: Callable[[int, int], Mask],
        *,
        temperatures: tuple[float, float],
        penalty: Callable[[Any], Tensor],
        rates: tuple[float | None, float | None] = (None, None),
        start: int | None = None,
    ) -> None:
        self.start, self._first = start, {}
        self._temperatures, self._penalty, self._rates = temperatures, penalty, rates
        self._sites = dict(problem.sites)
        self._names = {site: problem.at(site) for site in wholes}
        self._wholes = {site: whole.to(problem.device) for site, whole in wholes.items()}
        self._masks = {
            site: mask(whole.rank, len(self._names[site])).to(problem.device) for site, whole in wholes.items()
        }
        self.edits: dict[Site, nn.Module] = {
            site: Intervention(
                whole, Masked(self._masks[site], self._names[site] if len(self._names[site]) > 1 else None)
            )
            for site, whole in self._wholes.items()
        }
        self.subspaces = {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trained bases, and the masks."""
        parts = [self._wholes.values(), self._masks.values()]
        found = []
        for modules, rate in zip(parts, self._rates, strict=True):
            trained = [p for module in modules for p in module.parameters() if p.requires_grad]
            if trained:
                found.append(ParameterGroup(trained, rate))
        return found

    def penalty(self) -> Tensor:
        total = [self._penalty(mask) for mask in self._masks.values()]
        return sum(total[1:], total[0])

    def advance(self, progress: float) -> None:
        first, last = self._temperatures
        for mask in self._masks.values():
            mask.temperature = first * (last / first) ** progress

    def finish(self) -> None:
        found = {}
        for site, names in self._names.items():
            for name, chosen in zip(names, self._masks[site].chosen(), strict=True):
                found[name] = (site, self._wholes[site].picked(chosen))
        self.subspaces = {name: found[name] for name in self._sites}
        self.edits = interchanges(self.subspaces)

    def alignment(self) -> Alignment:
        if not self.subspaces:
            self.finish()
        return super().alignment()


def check_temperatures(method: Method, temperatures: tuple[float, float]) -> None:
    """ValueError unless the temperature falls during the training, and stays above 0."""
    first, last = temperatures
    if not 0 < last <= first < float("inf"):
        raise ValueError(
            f"{type(method).__name__}: temperatures from {first} to {last}; needed is 0 < the last ≤ the first."
        )
