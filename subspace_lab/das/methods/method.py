"""What a method is: a frozen value that builds a learner, whose result is an alignment.

    method.learner(problem) → learner → trained, if it has parameters → learner.alignment()

A method without training (principal components, a random subspace) builds a learner without parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import whole_number
from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, Subspace
from subspace_lab.das.paths import Path


@dataclass(frozen=True)
class Problem:
    """One search: the variables, and their sites.

    Attributes:
        sites: {variable: its site}.
        widths: {site: width of its states}.
        seed: the seed of everything random in the method; different for each method, site and seed of the sweep.
        device: the model's device.
        states: variable → (examples, width) states of its sources in the training pairs, at its site.
        values: variable → (examples,) the variable's value in these sources, as a number.
        kinds: the kinds of the training pairs, each once; empty if pairs are drawn at each step.
    """

    sites: Mapping[str, Site]
    widths: Mapping[Site, int]
    seed: int
    device: torch.device
    states: Callable[[str], Float[Tensor, "example width"]] = field(repr=False)
    values: Callable[[str], Int[Tensor, " example"]] = field(repr=False)
    kinds: tuple[str, ...] = ()

    def width(self, variable: str) -> int:
        return self.widths[self.sites[variable]]

    def at(self, site: Site) -> list[str]:
        """The variables that share a site."""
        return [name for name, own in self.sites.items() if own == site]


class Learner:
    """Subspaces of variables while they are being fitted.

    Derive from this class if a method's edits are not simply interchanges of subspaces.

    Args:
        subspaces: {variable: (site, subspace)}; several variables at one site are parts of one basis.
        start: identifies this random start; None if nothing was drawn at random.

    Attributes:
        weights: {kind of pair: weight of its mean loss}, with the kinds of `Counterfactuals.kinds`; kinds without a
            weight are not trained on. None gives all pairs the same weight.
    """

    weights: Mapping[str, float] | None = None

    def __init__(self, subspaces: Mapping[str, tuple[Site, Subspace]], start: int | str | None = None) -> None:
        self.subspaces = dict(subspaces)
        self.start = start
        self.edits: dict[Site, nn.Module] = interchanges(self.subspaces)
        linear = {name: subspace for name, (_, subspace) in subspaces.items() if subspace.linear}
        first = {name: subspace.basis().detach().clone() for name, subspace in linear.items()}
        self._first = {} if start is None else first

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters to train; empty if there are none."""
        trained = [p for edit in self.edits.values() for p in edit.parameters() if p.requires_grad]
        return [ParameterGroup(trained)] if trained else []

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss."""
        return None

    def advance(self, progress: float) -> None:
        """Called before each step with the fraction of the training that is done, for example to set temperatures."""

    def finish(self) -> None:
        """Called once after the last step. Soft choices become hard here, so that the score is that of the result."""

    def alignment(self) -> Alignment:
        """The result: fixed subspaces on the CPU."""
        return Alignment({name: (site, s.frozen().to("cpu")) for name, (site, s) in self.subspaces.items()})

    def start_overlap(self) -> dict[str, float]:
        """{variable: tr(P P₀) / k}, the overlap of its subspace with its random start: 1 if training did not move it.

        A subspace as large as its site's width is always the whole space; it is left out.
        """
        overlaps = {}
        for name, first in self._first.items():
            rank, width = first.shape
            if rank < width:
                now = self.subspaces[name][1].basis().detach()
                overlaps[name] = float((now @ first.T).square().sum()) / rank
        return overlaps


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained with one learning rate; None is the sweep's own rate."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Method(ABC):
    """How subspaces are found: a frozen dataclass whose fields are the method's settings.

    Class attributes:
        control: whether it shows the chance level or the effect of the whole state; a control is never the best fit.
        caution: a note that is needed to interpret its scores; shown below every table with its scores.
    """

    control: ClassVar[bool] = False
    caution: ClassVar[str] = ""

    @abstractmethod
    def learner(self, problem: Problem) -> Learner:
        """The learner of one search."""

    def variants(self) -> list[Method]:
        """The method with single settings: once for each value of a setting that is a list, such as `rank=[1, 4]`."""
        found: list[Method] = [self]
        for name in (f.name for f in fields(self)):
            if isinstance(getattr(self, name), list | tuple):
                found = [replace(one, **{name: value}) for one in found for value in getattr(one, name)]
        return found

    def seeds(self, asked: Sequence[int]) -> list[int]:
        """The seeds with which the method is run; a method without randomness runs once."""
        return list(asked)

    @property
    def path(self) -> Path | None:
        """The path by which the exchange reaches the answer, for methods without training; None means all paths."""
        return None

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:  # noqa: B027 (most need none)
        """ValueError if the method cannot be fitted at sites of these widths."""

    @property
    def label(self) -> str:
        """Its name and the settings that differ from their defaults, for tables and plots."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        defaults = {f.name: f.default for f in fields(self)}
        rank = given.pop("rank", None)
        settings = [f"{name}={value}" for name, value in given.items() if value != defaults[name]]
        return " ".join([type(self).__name__, *([] if rank is None else [str(rank)]), *settings])

    def as_dict(self) -> dict[str, Any]:
        """Its name and settings, as JSON."""
        return {
            "method": type(self).__name__,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.compare},
        }


def interchanges(subspaces: Mapping[str, tuple[Site, Subspace]]) -> dict[Site, nn.Module]:
    """{site: interchange} of these subspace objects themselves (an alignment would copy them), so that they train."""
    at: dict[Site, dict[str, Subspace]] = {}
    for name, (site, subspace) in subspaces.items():
        at.setdefault(site, {})[name] = subspace
    return {site: interchange(next(iter(s.values())) if len(s) == 1 else s) for site, s in at.items()}


def check_rank_fits(method: Method, rank: int, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
    """ValueError if a subspace of this rank for each variable does not fit into the width of its site."""
    for site in dict.fromkeys(sites.values()):
        count = sum(own == site for own in sites.values())
        if not 1 <= rank * count <= widths[site]:
            raise ValueError(
                f"{method.label} at {site}: rank {rank} for {count} variable(s) in states of width {widths[site]}; "
                f"possible are 1 to {widths[site] // count}."
            )


def check_setting(method: Method, name: str, kind: type = int, *, least: float | None = None) -> None:
    """Check a setting, or each entry if it is a list. TypeError for the wrong type, such as a rank of 2.5. ValueError
    for an empty list, and for a value that is not above 0 or, if `least` is given, below `least`."""
    value = getattr(method, name)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"{type(method).__name__}({name}=[]): an empty list leaves nothing to run.")
    for one in values:
        if kind is int:
            whole_number(one, f"{type(method).__name__}: {name}")
        elif isinstance(one, bool) or not isinstance(one, int | float):
            raise TypeError(f"{type(method).__name__}({name}={value!r}): needed is a number or a list of them.")
        if least is not None and not least <= one < float("inf"):
            raise ValueError(f"{type(method).__name__}({name}={value!r}): needed is a value of {least:g} or more.")
        if least is None and not 0 < one < float("inf"):
            raise ValueError(f"{type(method).__name__}({name}={value!r}): needed is a value above 0.")


def joined_at_sites(
    problem: Problem, basis_of: Callable[[Site, list[str]], Subspace], ranks: Mapping[str, int]
) -> dict[str, tuple[Site, Subspace]]:
    """{variable: (site, subspace)}, from one basis for each site, split among the variables that share it."""
    found: dict[str, tuple[Site, Subspace]] = {}
    for site in dict.fromkeys(problem.sites.values()):
        names = problem.at(site)
        basis = basis_of(site, names).to(problem.device)
        parts = {names[0]: basis} if len(names) == 1 else basis.partition({n: ranks[n] for n in names})
        found |= {name: (site, part) for name, part in parts.items()}
    return {name: found[name] for name in problem.sites}


def orthonormal_together(
    problem: Problem, directions: Mapping[str, FixedSubspace]
) -> dict[str, tuple[Site, Subspace]]:
    """Subspaces that were fitted separately, as parts of one orthonormal basis at each site.

    Variables at one site need orthogonal subspaces. The basis is orthonormalised in the order of the variables: the
    first keeps its span, and each later one loses the part that lies in the spans before it. ValueError if nothing of
    a direction is left.
    """

    def basis_of(site: Site, names: list[str]) -> Subspace:
        if len(names) == 1:
            return directions[names[0]]
        rows = torch.cat([directions[name].basis() for name in names])
        if torch.linalg.matrix_rank(rows, rtol=1e-4) < len(rows):
            raise ValueError(
                f"{site}: the directions of {names} lie in each other's spans, so they cannot be parts."
            )
        return FixedSubspace(torch.linalg.qr(rows.T)[0].T)

    return joined_at_sites(problem, basis_of, {name: s.rank for name, s in directions.items()})


def principal_span(directions: Tensor, rank: int | None, most: int) -> FixedSubspace:
    """The span of some directions, or its largest principal directions.

    Args:
        directions: (n, width).
        rank: how many dimensions, at most; None for all.
        most: the dimensions that the span has in theory.

    Raises:
        ValueError: directions that span fewer than `most` dimensions.
    """
    _, sizes, right = torch.linalg.svd(directions.double(), full_matrices=False)
    there = int((sizes > 1e-9 * sizes[0]).sum()) if sizes[0] > 0 else 0
    if there < most:
        raise ValueError(f"{len(directions)} directions span {there} dimensions in place of {most}.")
    return FixedSubspace(right[: most if rank is None else min(rank, most)].float())
