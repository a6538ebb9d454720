"""Values: z in h + Dᵀ(z − c·D h), the formula of `core/interventions.py`.

A value computes the change of the coordinates, z − c·D h, with c = 1 for a write and c = 0 for an addition. It also
says whether it needs the states of a source. If it is affine in h, it gives its change as plain matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import finite, whole_number
from subspace_lab.core.kinds import Kind
from subspace_lab.core.orthonormal import wide
from subspace_lab.core.parts import spans
from subspace_lab.core.subspaces import Part, Subspace

Source = Tensor | Mapping[str, Tensor] | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Value(Kind, ABC):
    """z in the formula. A subclass defines the change of the coordinates, z − c·D h.

    Attributes:
        needs_source: whether it needs the states of a source.
    """

    needs_source: bool = False

    @property
    def is_affine(self) -> bool:
        """Whether the change is M h + v with the same M and v for every state h of every example.

        Such edits can be merged into weights (`model/merging.py`). Your own value classes override this.
        """
        return False

    @abstractmethod
    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        """z − D h for a write, z for an addition.

        Args:
            subspace: D.
            h: (…, width) the states, in the precision of the computation.
            source: states of the shape of h, or {variable: states}, if the value needs them.
            write: c = 1 if True.
        """

    def edit(
        self, subspace: Subspace, h: Tensor, source: Source, write: bool, dropout: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """h + Dᵀ dropout(z − c·D h), in the dtype of h."""
        exact = h.to(torch.promote_types(h.dtype, torch.float32))
        return h + subspace.embed(dropout(self.change(subspace, exact, source, write))).to(h.dtype)

    def affine(self, subspace: Subspace, write: bool) -> tuple[Tensor, Tensor] | None:
        """(M, v), if the change is M h + v for every h; otherwise None."""
        return None

    def coordinates(self, rank: int) -> list[int]:
        """The coordinates that are edited: all, unless only some parts of the basis are in use."""
        return list(range(rank))

    def use_parts(self, names: Sequence[str]) -> None:
        """Use only some parts. ValueError if there are no parts of these names."""
        raise ValueError(f"Parts {list(names)} asked for; a {type(self).__name__} has none.")

    def freeze_resting_parts(self, moving: Sequence[str] | None) -> None:
        """Switch off the gradients of parts that do not train; `moving` names the parts that do."""


class FromSource(Value):
    """z = R h_source: the interchange of one variable, or of several variables that have parts of one basis.

    Args:
        parts: {variable: (first basis vector, one after its last)}, each variable with its own source.
    """

    needs_source = True

    def __init__(self, parts: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.parts = None if parts is None else {name: (start, stop) for name, (start, stop) in parts.items()}

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        if self.parts is None:
            if not isinstance(source, Tensor):
                raise ValueError("An interchange intervention needs the source's states, one tensor.")
            difference = self._difference(h, source, write)
            return subspace.read(difference) if subspace.copies else difference @ subspace.basis().to(h.dtype).T
        if not isinstance(source, Mapping) or not set(source) <= set(self.parts):
            found = sorted(source) if isinstance(source, Mapping) else type(source).__name__
            raise ValueError(
                f"This interchange has the variables {sorted(self.parts)} and needs a mapping from them to "
                f"the states of their sources; found {found}."
            )
        basis = None if subspace.copies else subspace.basis().to(h.dtype)
        change = h.new_zeros(*h.shape[:-1], subspace.rank)
        columns = []
        for name, (start, stop) in self.parts.items():
            if name not in source:  # its coordinates stay those of the base
                columns.append(change[..., start:stop])
                continue
            difference = self._difference(h, source[name], write)
            if basis is None:
                columns.append(subspace.read(difference)[..., start:stop])
            else:
                columns.append(difference @ basis[start:stop].T)
        rest = subspace.rank - sum(c.shape[-1] for c in columns)
        return torch.cat([*columns, change[..., :rest]], dim=-1)

    @staticmethod
    def _difference(h: Tensor, source: Tensor, write: bool) -> Tensor:
        if source.shape != h.shape:
            raise ValueError(
                f"The base gives states of shape {tuple(h.shape)}, the source {tuple(source.shape)}: batch, "
                "positions and width must agree."
            )
        source = source.to(h.dtype)
        # R(s − h), not R s − R h: half of the work, and exactly zero if source and base are equal.
        return source - h if write else source

    def edit(
        self, subspace: Subspace, h: Tensor, source: Source, write: bool, dropout: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As in `Value`. If the subspace copies coordinates (axes), the result is exact bit by bit. If the subspace is
        nonlinear, its own `swap` is used."""
        fits = isinstance(source, Tensor) and source.shape == h.shape
        if (subspace.copies or not subspace.linear) and write and self.parts is None and fits:
            assert isinstance(source, Tensor)
            return subspace.swap(h, source)
        return super().edit(subspace, h, source, write, dropout)

    def description(self) -> dict[str, Any]:
        return {"parts": self.parts}


class Affine(Value):
    """z = σ(W h + b), with W (rank, width) and b (rank,) learned.

    Args:
        width: d.
        rank: k.
        activation: σ, a name in `ACTIVATIONS` (ValueError otherwise).
        seed: seed of the random W, which is drawn as in `nn.Linear`. b starts at 0.
        bias: whether there is a b.
    """

    def __init__(
        self, width: int, rank: int, activation: str = "linear", seed: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: possible are {sorted(ACTIVATIONS)}.")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(rank, width))
        self.bias = nn.Parameter(torch.zeros(rank)) if bias else None
        # Far from the seed of a basis that was drawn with the same number, so that the two share no random numbers.
        generator = None if seed is None else torch.Generator().manual_seed(whole_number(seed, "seed") + 2**32)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5, generator=generator)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        if self.activation == "linear":
            # (W − R) h + b is one product instead of two, and exactly b if W = R.
            weight = self.weight - subspace.basis() if write else self.weight
            return nn.functional.linear(h, weight.to(h.dtype), self._shift(h.dtype))
        z = nn.functional.linear(h, self.weight.to(h.dtype), self._shift(h.dtype))
        z = ACTIVATIONS[self.activation](z)
        return z - h @ subspace.basis().to(h.dtype).T if write else z

    def affine(self, subspace: Subspace, write: bool) -> tuple[Tensor, Tensor] | None:
        if self.activation != "linear":
            return None
        weight = self.weight.detach()
        shift = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach()
        return weight - subspace.basis().detach() if write else weight, shift

    @property
    def is_affine(self) -> bool:
        return self.activation == "linear"

    def description(self) -> dict[str, Any]:
        rank, width = self.weight.shape
        # Only written if there is no b, since files of earlier versions do not have the field.
        return {
            **{"width": width, "rank": rank, "activation": self.activation},
            **({"bias": False} if self.bias is None else {}),
        }

    def _shift(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class Constant(Value):
    """z = b, the same for every example, or one z for each example of the batch.

    Args:
        z: (rank,) or (batch, rank).
        learned: whether z is trained.
    """

    z: Tensor

    def __init__(self, z: Float[Tensor, "*batch rank"], learned: bool) -> None:
        super().__init__()
        z = wide(z.detach(), torch.zeros(())).clone()
        finite(z, "Coordinates")
        if learned:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        z, axes = self.z.to(h.dtype), self.z.shape[:-1]
        if len(axes) >= h.ndim or any(n not in (1, m) for n, m in zip(axes, h.shape, strict=False)):
            raise ValueError(
                f"Coordinates of shape {tuple(z.shape)} for states of shape {tuple(h.shape)}: the axes before the "
                "rank must be the first axes of the states."
            )
        z = z.reshape(*axes, *(1,) * (h.ndim - z.ndim), z.shape[-1])  # axes of the batch, not of the positions
        return z - subspace.read(h) if write else z.expand(*h.shape[:-1], z.shape[-1])

    def affine(self, subspace: Subspace, write: bool) -> tuple[Tensor, Tensor] | None:
        if self.z.ndim > 1:
            return None
        basis, z = subspace.basis().detach(), self.z.detach()
        return -basis if write else torch.zeros_like(basis), z

    @property
    def is_affine(self) -> bool:
        return self.z.ndim == 1

    def description(self) -> dict[str, Any]:
        return {"learned": isinstance(self.z, nn.Parameter)}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(tensors["z"], **description)


class Diagonal(Value):
    """z = s ⊙ D h + b, with s and b (rank,) learned. Over the whole stream this is RED.

    Args:
        width: k, the rank of the subspace; for the whole stream its width.
        bias: whether there is a b.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        scale = self.scale - 1 if write else self.scale
        scaled = scale.to(h.dtype) * subspace.read(h)
        return scaled if self.bias is None else scaled + self.bias.to(h.dtype)

    @property
    def is_affine(self) -> bool:
        return True

    def description(self) -> dict[str, Any]:
        return {"width": self.scale.numel(), **({"bias": False} if self.bias is None else {})}


class ByPart(Value):
    """A value for each part of one basis. Each part in use writes its own coordinates; the others change nothing.

    Args:
        values: {part: its value}.
        sizes: {part: number of its basis vectors}, in the order of the basis.
        in_use: the parts in use, by default all.
    """

    made_of: ClassVar[tuple[str, ...]] = ("values",)

    def __init__(
        self, values: Mapping[str, Value], sizes: Mapping[str, int], in_use: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if list(values) != list(sizes):
            raise ValueError(f"Values for the parts {list(values)} of a basis with the parts {list(sizes)}.")
        self.sizes = dict(sizes)
        self.values = nn.ModuleDict(values)
        self.in_use: tuple[str, ...] = tuple(sizes)
        self.needs_source = any(value.needs_source for value in values.values())
        if in_use is not None:
            self.use_parts(in_use)

    def use_parts(self, names: Sequence[str]) -> None:
        if not names or set(names) - set(self.sizes):
            raise ValueError(f"Parts {list(names)} asked for; there are {list(self.sizes)}.")
        self.in_use = tuple(name for name in self.sizes if name in names)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        changes, basis = [], subspace.basis()  # computed once for all parts
        for name, (start, stop) in spans(self.sizes).items():
            if name in self.in_use:
                own = source[name] if isinstance(source, Mapping) and name in source else source
                changes.append(self._of(name).change(_Vectors(basis[start:stop]), h, own, write))
            else:
                changes.append(h.new_zeros(*h.shape[:-1], stop - start))
        return torch.cat(changes, -1)

    def affine(self, subspace: Subspace, write: bool) -> tuple[Tensor, Tensor] | None:
        maps, shifts = [], []
        for name, (start, stop) in spans(self.sizes).items():
            found = self._of(name).affine(Part(subspace, start, stop), write)
            if found is None:
                return None
            used = float(name in self.in_use)
            maps.append(used * found[0])
            shifts.append(used * found[1])
        return torch.cat(maps), torch.cat(shifts)

    @property
    def is_affine(self) -> bool:
        return all(self._of(name).is_affine for name in self.in_use)

    def coordinates(self, rank: int) -> list[int]:
        return [i for name, span in spans(self.sizes).items() if name in self.in_use for i in range(*span)]

    def freeze_resting_parts(self, moving: Sequence[str] | None) -> None:
        for name in self.sizes:
            if name not in (self.in_use if moving is None else moving):
                self._of(name).requires_grad_(False)

    def description(self) -> dict[str, Any]:
        return {"values": dict(self.values.items()), "sizes": self.sizes, "in_use": list(self.in_use)}

    def _of(self, name: str) -> Value:
        return self.values[name]  # type: ignore[return-value]


class _Vectors(Subspace):
    """Basis vectors that are already computed, with their gradient; only for use within one forward pass."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.rank, self.width = vectors.shape
        self._vectors = vectors

    def basis(self) -> Float[Tensor, "rank width"]:
        return self._vectors
