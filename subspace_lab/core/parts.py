"""Parts of one basis: subspaces that stay orthogonal to each other during training.

A part never reads what another part writes. There are three ways to make parts: `Subspace.partition` splits a basis,
`joined` makes parts from subspaces that were found separately, and a `PartedSubspace` is a learned basis whose parts
can be trained one after the other (Wu et al. 2024, arXiv 2404.03592, appendix G).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.orthonormal import check_orthonormal, exactly, random_orthonormal
from subspace_lab.core.subspaces import Axes, FixedSubspace, Orthonormalised, Part, Subspace

ORTHOGONAL = 1e-4  # the largest allowed cosine between vectors of two parts


class PartedSubspace(Orthonormalised):
    """A learned orthonormal basis in named parts, of which some can stay fixed while the others train.

    The basis contains the vectors of all parts, in their order. The vectors of parts that do not train stay the same
    bit by bit. The others are the QR factor of their raw matrices A after projection onto the complement,

        A − SᵀS A        with S the vectors that do not train,

    so that all vectors are always orthonormal.

    Args:
        width: d.
        sizes: {part: number of its basis vectors}, together at most d (ValueError otherwise).
        seed: seed of the random start.
        start: an orthonormal start instead of a random one: the vectors of all parts, in their order.
        moving: the parts that train, by default all; the vectors of the others stay fixed.
    """

    vectors_along: ClassVar[Mapping[str, int]] = {"raw": 0}

    def __init__(
        self,
        width: int,
        sizes: Mapping[str, int],
        *,
        seed: int | None = None,
        start: Float[Tensor, "rank width"] | None = None,
        moving: Sequence[str] | None = None,
    ) -> None:
        sizes = {str(name): whole_number(size, f"the size of part {name!r}") for name, size in sizes.items()}
        super().__init__(width, sum(sizes.values()), "qr")
        self.sizes = sizes
        start = random_orthonormal(self.width, self.rank, seed) if start is None else start
        check_orthonormal(start, (self.rank, self.width))
        blocks = zip(sizes, start.detach().split(list(sizes.values())), strict=True)
        self.raw = nn.ParameterDict(
            {name: block.T.clone(memory_format=torch.contiguous_format) for name, block in blocks}
        )
        self.moving: tuple[str, ...] = tuple(sizes) if moving is None else tuple(moving)

    def basis(self) -> Float[Tensor, "rank width"]:
        fixed_parts = self._fixed_parts()
        learned = self._factor(list(self.raw.values()), self._projected, self.moving).T
        if not fixed_parts:
            return learned.contiguous()
        vectors = {name: self.raw[name].detach().T for name in fixed_parts}
        vectors |= zip(self.moving, learned.split([self.sizes[name] for name in self.moving]), strict=True)
        return torch.cat([vectors[name] for name in self.sizes])

    def part(self, name: str) -> Part:
        """One part, which trains with the whole basis. KeyError if there is no part of this name."""
        start, stop = spans(self.sizes)[name]
        return Part(self, start, stop)

    def train_parts(self, names: Sequence[str]) -> None:
        """From now on train these parts; the vectors of the others stay fixed.

        Raises:
            ValueError: no part, or one that the basis does not have.
        """
        if not names or set(names) - set(self.sizes):
            raise ValueError(f"Parts {list(names)} asked for; there are {list(self.sizes)}.")
        wanted = tuple(name for name in self.sizes if name in names)
        if wanted == self.moving:
            return
        with torch.no_grad():
            for name, vectors in zip(self.sizes, self.basis().split(list(self.sizes.values())), strict=True):
                self.raw[name].copy_(vectors.T)
        self.moving = wanted

    def freeze_resting_parts(self) -> None:
        for name in self._fixed_parts():
            self.raw[name].requires_grad_(False)

    def set_basis(self, basis: Float[Tensor, "rank width"]) -> None:
        with torch.no_grad():
            for name, vectors in zip(self.sizes, basis.split(list(self.sizes.values())), strict=True):
                self.raw[name].copy_(vectors.T)

    def description(self) -> dict[str, Any]:
        return {"width": self.width, "sizes": self.sizes, "moving": list(self.moving)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(**description, seed=0)

    def _fixed_parts(self) -> list[str]:
        return [name for name in self.sizes if name not in self.moving]

    def _projected(self) -> Tensor:
        """The raw matrices that train, projected onto the complement of the vectors that do not train."""
        raw = torch.cat([self.raw[name] for name in self.moving], 1)
        with exactly(raw.device):
            for name in self._fixed_parts():
                fixed = self.raw[name].detach()
                raw = raw - fixed @ (fixed.T @ raw)
        return raw

    # The names of the parts that train are saved too: raw matrices of the other parts are orthonormal as they are.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}moving"] = torch.tensor([name in self.moving for name in self.sizes])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        moving = state_dict.pop(f"{prefix}moving", None)
        if moving is None:
            rest[2].append(f"{prefix}moving")  # the missing keys
        else:
            self.moving = tuple(name for name, moves in zip(self.sizes, moving.tolist(), strict=True) if moves)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def spans(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """{part: (first basis vector, one after its last)} for parts that follow each other."""
    return {name: (stop - sizes[name], stop) for name, stop in zip(sizes, accumulate(sizes.values()), strict=True)}


def joined(subspaces: Mapping[str, Subspace]) -> dict[str, Part]:
    """Parts of one basis that span these subspaces; their vectors stay the same bit by bit.

    Consecutive parts of one basis are returned as they are. Other subspaces are joined in a new basis that does not
    train.

    Args:
        subspaces: {name: subspace} of one stream, orthogonal to each other.

    Raises:
        ValueError: no subspace; different widths; two subspaces that are not orthogonal (|cosine| > 1e-4); parts of one
            learned basis with a gap or an overlap; learned subspaces that are not parts of one basis (training would
            not keep them orthogonal).
    """
    if not subspaces:
        raise ValueError("No variable: at least one subspace is needed to make parts of one basis.")
    for name, subspace in subspaces.items():
        instance(subspace, Subspace, f"The subspace of {name!r}", "FixedSubspace(basis) makes one of a matrix")
    if found := _consecutive(subspaces):
        return found
    if any(p.requires_grad for s in subspaces.values() for p in s.parameters()):
        raise ValueError(
            f"{list(subspaces)} are learned, so they must be parts of one basis: all of it or its first vectors, "
            "without gap or overlap. Make them with `subspace.partition({'a': 8, 'b': 8})`."
        )
    widths = {name: subspace.width for name, subspace in subspaces.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"Subspaces of different widths {widths} are not of one stream.")
    for (one, a), (other, b) in combinations(subspaces.items(), 2):
        cosine = _largest_cosine(a, b)
        if not cosine <= ORTHOGONAL:
            raise ValueError(
                f"{one!r} and {other!r} are not orthogonal: the largest cosine between vectors of their bases is "
                f"{cosine:.2g}, at most {ORTHOGONAL} is possible. Edit one of them, or search for both together."
            )
    parts = list(subspaces.values())
    whole: Subspace
    if all(isinstance(subspace, Axes) for subspace in parts):
        whole = Axes(parts[0].width, torch.cat([axes.indices for axes in parts]).tolist())  # type: ignore[misc]
    else:
        whole = FixedSubspace(torch.cat([subspace.basis().detach() for subspace in parts]))
    sizes = {name: subspace.rank for name, subspace in subspaces.items()}
    return {name: Part(whole, start, stop) for name, (start, stop) in spans(sizes).items()}


def _consecutive(subspaces: Mapping[str, Subspace]) -> dict[str, Part] | None:
    """The subspaces in the order of their basis if they are its first parts, without gap or overlap; otherwise None."""
    parts = [(name, s) for name, s in subspaces.items() if isinstance(s, Part)]
    if len(parts) < len(subspaces) or len({id(part.whole) for _, part in parts}) > 1:
        return None
    parts.sort(key=lambda item: item[1].start)
    stops = [0, *(part.stop for _, part in parts)]
    return dict(parts) if all(part.start == stop for (_, part), stop in zip(parts, stops, strict=False)) else None


def _largest_cosine(one: Subspace, other: Subspace) -> float:
    """The largest |cosine| between a basis vector of one and a basis vector of the other."""
    axes, rest = (one, other) if isinstance(one, Axes) else (other, one)
    with torch.no_grad():
        if isinstance(axes, Axes) and isinstance(rest, Axes):
            return float(bool(torch.isin(axes.indices, rest.indices).any()))
        return float(axes.read(rest.basis()).abs().max())
