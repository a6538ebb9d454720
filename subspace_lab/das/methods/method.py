"""What a method is: a frozen value that builds a learner, which ends as an alignment.

    method.learner(problem) → learner → trained, if it has parameters → learner.alignment()

A method with nothing to train (the principal components, a random subspace) builds a learner without parameters.
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
    """One search: which variables are looked for, and where.

    Attributes:
        sites: {variable: its site}.
        widths: {site: width of its states}.
        seed: of everything that the method draws at random. It belongs to this method, site and sweep seed alone.
        device: of the model.
        states: variable → (examples, width) states of its sources in the training pairs, at its site.
        values: variable → (examples,) the variable's value in these sources, as a number.
        kinds: of the training pairs, each once; empty where they are drawn afresh at each step.
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

    A method whose edits are more than an interchange of subspaces derives from this class.

    Args:
        subspaces: {variable: (site, subspace)}; several variables at one site are parts of one basis.
        start: what tells this random start from others; None where nothing was drawn.

    Attributes:
        weights: {kind of pair: what its mean loss counts}, as `Counterfactuals.kinds` names them; kinds without a
            weight are not trained on. None counts all pairs alike.
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
        """What is trained; empty where nothing is."""
        trained = [p for edit in self.edits.values() for p in edit.parameters() if p.requires_grad]
        return [ParameterGroup(trained)] if trained else []

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss."""
        return None

    def advance(self, progress: float) -> None:
        """Called before each step with the share of the training that is done, for temperatures."""

    def finish(self) -> None:
        """Called once, after the last step: what is soft becomes hard, so that what is scored is what is found."""

    def alignment(self) -> Alignment:
        """What was found: fixed subspaces on the CPU."""
        return Alignment({name: (site, s.frozen().to("cpu")) for name, (site, s) in self.subspaces.items()})

    def start_overlap(self) -> dict[str, float]:
        """{variable: tr(P P₀) / k}, how near its subspace still is to its random start: 1 if training went nowhere.

        A subspace that fills its site's width is always the whole space and tells nothing; it is left out.
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
    """How subspaces are found. A frozen dataclass whose fields are the method's settings.

    Class attributes:
        control: whether it says what chance or the whole state gives, so that it is never "the best" of a sweep.
        caution: what has to be known to read its scores, shown below every table that has them.
    """

    control: ClassVar[bool] = False
    caution: ClassVar[str] = ""

    @abstractmethod
    def learner(self, problem: Problem) -> Learner:
        """The learner of one search."""

    def variants(self) -> list[Method]:
        """This method once for each of its settings that was given as a list, such as `rank=[1, 4]`."""
        found: list[Method] = [self]
        for name in (f.name for f in fields(self)):
            if isinstance(getattr(self, name), list | tuple):
                found = [replace(one, **{name: value}) for one in found for value in getattr(one, name)]
        return found

    def seeds(self, asked: Sequence[int]) -> list[int]:
        """The seeds that it is run with; one that draws nothing at random runs once."""
        return list(asked)

    @property
    def path(self) -> Path | None:
        """The way that the exchange takes to the answer, of a method that trains nothing; None for all ways."""
        return None

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:  # noqa: B027 (most need none)
        """ValueError where it cannot be fitted at sites of these widths."""

    @property
    def label(self) -> str:
        """Its name and the settings that differ from their defaults, for tables and pictures."""
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
    """{site: interchange} of these very subspaces, which an alignment would copy, so that training reaches them."""
    at: dict[Site, dict[str, Subspace]] = {}
    for name, (site, subspace) in subspaces.items():
        at.setdefault(site, {})[name] = subspace
    return {site: interchange(next(iter(s.values())) if len(s) == 1 else s) for site, s in at.items()}


def check_rank_fits(method: Method, rank: int, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
    """ValueError unless a subspace of this rank for each variable has room at its site."""
    for site in dict.fromkeys(sites.values()):
        count = sum(own == site for own in sites.values())
        if not 1 <= rank * count <= widths[site]:
            raise ValueError(
                f"{method.label} at {site}: rank {rank} for {count} variable(s) in states of width {widths[site]}; "
                f"possible are 1 to {widths[site] // count}."
            )


def check_setting(method: Method, name: str, kind: type = int, *, least: float | None = None) -> None:
    """Refuse a setting of the wrong type, such as a rank of 2.5 (TypeError), an empty list, or a value that is not
    above 0, or where `least` is given not at least that (ValueError)."""
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
    """{variable: (site, subspace)} from one basis a site, split among the variables that share it."""
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
    """Subspaces that were fitted one by one, as parts of one orthonormal basis at each site.

    Variables at one site need orthogonal subspaces. The basis is orthonormalised in the order of the variables, so
    the first keeps its span, and each later one loses what lies in the spans before it (ValueError where nothing of
    a direction is left).
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
    """The span of some directions, or of its largest principal ones.

    Args:
        directions: (n, width).
        rank: how many dimensions, at most; None for all.
        most: dimensions that the span has in theory.

    Raises:
        ValueError: directions that do not span that many dimensions.
    """
    _, sizes, right = torch.linalg.svd(directions.double(), full_matrices=False)
    there = int((sizes > 1e-9 * sizes[0]).sum()) if sizes[0] > 0 else 0
    if there < most:
        raise ValueError(f"{len(directions)} directions span {there} dimensions in place of {most}.")
    return FixedSubspace(right[: most if rank is None else min(rank, most)].float())
