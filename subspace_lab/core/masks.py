"""Soft masks over the coordinates of a basis: m in h + Dᵀ(m ⊙ (z − c·D h)).

A mask says how much of each coordinate is exchanged, for each of several variables. During training its values are
between 0 and 1; its temperature T makes it hard at the end. Then each coordinate belongs to at most one variable, and
the exchange is one of ordinary subspaces, given by `Mask.chosen`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import whole_number
from subspace_lab.core.kinds import Kind
from subspace_lab.core.subspaces import Subspace
from subspace_lab.core.values import Source, Value


class Mask(Kind, ABC):
    """How much of each of `rank` coordinates is exchanged, for each of some variables.

    Attributes:
        rank: number of coordinates.
        variables: how many variables share them.
        temperature: T > 0; a lower T makes the mask harder.
    """

    def __init__(self, rank: int, variables: int = 1, temperature: float = 1.0) -> None:
        super().__init__()
        self.rank, self.variables = whole_number(rank, "rank"), whole_number(variables, "variables")
        if not 1 <= self.variables <= self.rank:
            raise ValueError(f"{variables} variables share {rank} coordinates; each needs at least one.")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: needed is a number above 0.")
        self.temperature = float(temperature)

    @abstractmethod
    def forward(self) -> Float[Tensor, "variable rank"]:
        """m, in [0, 1]."""

    @abstractmethod
    def chosen(self) -> list[list[int]]:
        """For each variable its final coordinates, at least one; no coordinate belongs to two variables."""

    def description(self) -> dict[str, Any]:
        return {"rank": self.rank, "variables": self.variables, "temperature": self.temperature}


class Boundaries(Mask):
    """Consecutive coordinates between learned boundaries (Wu et al. 2023, arXiv 2305.08809).

        mᵢ = σ((i − b₀)/T) σ((b₁ − i)/T)        i = ½, 3/2, …, rank − ½

    The first variable begins at 0; each later one begins where the one before it ends. The trained parameters are
    `shares`, the share of the coordinates that each variable has.

    Args:
        start: share of the coordinates that all variables together have at the start.
    """

    def __init__(self, rank: int, variables: int = 1, temperature: float = 1.0, start: float = 0.5) -> None:
        super().__init__(rank, variables, temperature)
        if not 0 < start <= 1:
            raise ValueError(f"start={start}: possible is 0 < start ≤ 1.")
        self.start = start
        self.shares = nn.Parameter(torch.full((variables,), start / variables))

    def ends(self) -> Float[Tensor, boundary]:
        """The boundaries in coordinates, from 0 to the end of the last variable."""
        return torch.cat([self.shares.new_zeros(1), self.shares.cumsum(0)]) * self.rank

    def forward(self) -> Float[Tensor, "variable rank"]:
        ends = self.ends()
        i = torch.arange(self.rank, device=ends.device, dtype=ends.dtype) + 0.5
        left, right = ends[:-1, None], ends[1:, None]
        return torch.sigmoid((i - left) / self.temperature) * torch.sigmoid((right - i) / self.temperature)

    def keep_possible(self) -> None:
        """Move the shares back into the range where each variable has a coordinate and their sum is at most 1."""
        with torch.no_grad():
            self.shares.clamp_(min=1 / self.rank)
            least = self.shares - 1 / self.rank
            room = 1 - self.variables / self.rank
            if least.sum() > room:
                self.shares.copy_(1 / self.rank + least * (room / least.sum()))

    def chosen(self) -> list[list[int]]:
        found, start = [], 0
        for k, end in enumerate(self.ends()[1:].tolist()):
            # All coordinates whose middle is before the boundary, but leave one for each later variable.
            stop = min(max(start + 1, round(end)), self.rank - (self.variables - 1 - k))
            found.append(list(range(start, stop)))
            start = stop
        return found

    def description(self) -> dict[str, Any]:
        return {**super().description(), "start": self.start}


class Gates(Mask):
    """A gate for each coordinate: m = softmax([0, a₁, …, a_V] / T) without its first entry; σ(a/T) for one variable.

    With several variables the sum of a coordinate's gates is at most 1, so that in the end it belongs to one variable
    or to none.
    """

    def __init__(self, rank: int, variables: int = 1, temperature: float = 1.0) -> None:
        super().__init__(rank, variables, temperature)
        self.logits = nn.Parameter(torch.zeros(variables, rank))

    def forward(self) -> Float[Tensor, "variable rank"]:
        zero = self.logits.new_zeros(1, self.rank)
        return (torch.cat([zero, self.logits]) / self.temperature).softmax(0)[1:]

    def chosen(self) -> list[list[int]]:
        """For each variable the coordinates at which its logit is above 0 and the highest.

        A variable without such a coordinate gets its best free coordinate. If none is free, it gets the best coordinate
        of variables that have several.
        """
        logits = self.logits.detach()
        highest, owner = logits.max(0)
        found: list[list[int]] = [
            ((owner == v) & (highest > 0)).nonzero()[:, 0].tolist() for v in range(self.variables)
        ]
        for v, own in enumerate(found):
            if not own:
                taken = [i for other in found for i in other]
                spare = [i for other in found if len(other) > 1 for i in other]
                free = [i for i in range(self.rank) if i not in taken] or spare
                best = max(free, key=lambda i: float(logits[v, i]))
                for other in found:
                    if best in other:
                        other.remove(best)
                own.append(best)
        return found

    def description(self) -> dict[str, Any]:
        return super().description()


class Masked(Value):
    """Σᵥ mᵥ ⊙ (R hᵥ − R h): an interchange in which the mask divides the coordinates among the variables.

    Args:
        mask: m.
        names: the variables in the order of the mask, each with its own source; None for one variable, whose source
            is a tensor.
    """

    made_of = ("mask",)
    needs_source = True

    def __init__(self, mask: Mask, names: Sequence[str] | None = None) -> None:
        super().__init__()
        if len(names or [""]) != mask.variables:
            raise ValueError(f"A mask for {mask.variables} variables and the names {names}.")
        self.mask, self.names = mask, None if names is None else list(names)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        if subspace.rank != self.mask.rank:
            raise ValueError(f"A mask over {self.mask.rank} coordinates for a subspace of rank {subspace.rank}.")
        given = self._by_name(source)
        weights = self.mask().to(h.dtype)
        change = h.new_zeros(*h.shape[:-1], subspace.rank)
        for weight, name in zip(weights, self.names or [""], strict=True):
            if name in given:  # the coordinates of a variable without a source stay the base's
                states = given[name]
                if states.shape != h.shape:
                    raise ValueError(
                        f"The base gives states of shape {tuple(h.shape)}, the source {tuple(states.shape)}: batch, "
                        "positions and width must agree."
                    )
                states = states.to(h.dtype)
                found = subspace.difference(h, states) if write else subspace.read(states)
                change = change + weight * found
        return change

    def _by_name(self, source: Source) -> Mapping[str, Tensor]:
        if self.names is None:
            if isinstance(source, Tensor):
                return {"": source}
            raise ValueError("An interchange intervention needs the source's states, one tensor.")
        if isinstance(source, Mapping) and set(source) <= set(self.names):
            return source
        found = sorted(source) if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(
            f"This interchange has the variables {sorted(self.names)} and needs a mapping from them to the states of "
            f"their sources; found {found}."
        )

    def description(self) -> dict[str, Any]:
        return {"mask": self.mask, "names": self.names}
