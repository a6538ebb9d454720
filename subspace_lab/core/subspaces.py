"""Subspaces of a hidden state: two methods over one basis.

A subspace of R^d is given by a basis R ∈ R^{k×d}, whose k rows are orthonormal: the basis vectors. Its methods are

    read(h)     = R h                       coordinates, R^k
    write(h, z) = h + Rᵀ(z − R h)           h with these coordinates replaced

and no others are needed: DAS and LoReFT differ only in the z that is written (`core/interventions.py`). The pair is a
lens: read(write(h, z)) = z, write(h, read(h)) = h, write(write(h, z), z') = write(h, z'), and everything orthogonal to
the basis vectors is not changed.

The basis is float32 (or float64), whatever the dtype of the stream. Only the change is cast and added, so a bfloat16
stream loses no precision outside of the subspace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import finite, instance, no_zero_vector, whole_number
from subspace_lab.core.kinds import Kind
from subspace_lab.core.orthonormal import (
    CachedFactor,
    Orthonormalise,
    check_orthonormal,
    check_rank,
    exactly,
    random_orthonormal,
    thin_qr,
    wide,
)


class Subspace(Kind, ABC):
    """A k-dimensional subspace of R^d. A subclass defines `basis`; the other methods are written here, once.

    Attributes:
        width: d.
        rank: k.
        moving: for a learned basis in parts, the parts that train; None for other subspaces.
        copies: whether `swap` copies the source's coordinates bit by bit; others add a rounded difference.
        linear: whether it really is a subspace with a basis. The classes of `nonlinear.py` and `dictionaries.py` are
            not.
    """

    width: int
    rank: int
    moving: tuple[str, ...] | None = None
    copies: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    @abstractmethod
    def basis(self) -> Float[Tensor, "rank width"]:
        """R: the basis vectors, one in each row of the matrix."""

    def read(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        """R h: the coordinates, in at least float32."""
        with exactly(h.device):
            basis = self.basis()
            h = wide(h, basis)
            return h @ basis.to(h.dtype).T

    def embed(self, z: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch width"]:
        """Rᵀ z: the vector of the stream with these coordinates."""
        with exactly(z.device):
            return z @ self.basis().to(z.dtype)

    def write(
        self, h: Float[Tensor, "*batch width"], z: Float[Tensor, "*batch rank"]
    ) -> Float[Tensor, "*batch width"]:
        """h + Rᵀ(z − R h), in the dtype of h."""
        with exactly(h.device):
            basis = self.basis()
            exact = wide(h, basis)
            basis = basis.to(exact.dtype)
            return h + ((z.to(exact.dtype) - exact @ basis.T) @ basis).to(h.dtype)

    def swap(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """write(h, read(source)), computed as h + RᵀR(source − h), which is exactly h if source = h."""
        with exactly(h.device):
            basis = self.basis()
            exact = wide(h, basis)
            basis = basis.to(exact.dtype)
            return h + (((source.to(exact.dtype) - exact) @ basis.T) @ basis).to(h.dtype)

    def difference(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch rank"]:
        """read(source) − read(h), computed as R(source − h), which is exactly 0 if source = h."""
        return self.read(source - h)

    def partition(self, sizes: Mapping[str, int]) -> dict[str, Subspace]:
        """Split the basis into parts, {name: number of basis vectors}, in this order, beginning with the first vector.

        The parts stay parts of this basis: training one trains the whole. Some vectors may be left over.

        Raises:
            ValueError: a part without vectors, or more vectors than the basis has.
        """
        instance(sizes, Mapping, "sizes", "{name: number of basis vectors}")
        sizes = {name: whole_number(size, f"the size of part {name!r}") for name, size in sizes.items()}
        if sum(sizes.values()) > self.rank or min(sizes.values(), default=0) < 1:
            raise ValueError(
                f"Parts {sizes} asked of a basis of rank {self.rank}: "
                f"each needs at least 1 basis vector and together they may have {self.rank}."
            )
        parts: dict[str, Subspace] = {}
        start = 0
        for name, size in sizes.items():
            parts[name] = Part(self, start, start + size)
            start += size
        return parts

    def frozen(self) -> Subspace:
        """A copy of the present subspace, with a basis that does not train."""
        return self.sliced(0, self.rank)

    def sliced(self, start: int, stop: int) -> Subspace:
        """The present span of the basis vectors `start` to `stop` − 1; its basis does not train."""
        return FixedSubspace(self.basis().detach()[start:stop])

    def picked(self, indices: Sequence[int]) -> Subspace:
        """The present span of some of the basis vectors; its basis does not train."""
        return FixedSubspace(self.basis().detach()[list(indices)])

    def set_basis(self, basis: Float[Tensor, "rank width"]) -> None:
        """Replace the basis, in place, by another one of the same shape. TypeError if it cannot be set."""
        raise TypeError(f"The basis of a {type(self).__name__} cannot be set.")

    def train_parts(self, names: Sequence[str]) -> None:
        """From now on train these parts of the basis; the others stay fixed. A fixed basis has no parts to train.

        Raises:
            ValueError: a learned basis that is not in parts, or that has no parts of these names.
        """
        if any(True for _ in self.parameters()):
            raise ValueError(f"Parts {list(names)} asked for; a {type(self).__name__} has none.")

    def freeze_resting_parts(self) -> None:
        """Switch off the gradients of the parts of the basis that do not train."""

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}"


class Orthonormalised(Subspace, ABC):
    """A trained subspace whose basis is the orthonormal factor of raw parameters, computed once in each step."""

    def __init__(self, width: int, rank: int, orthonormalise: Orthonormalise) -> None:
        super().__init__()
        check_rank(rank, width)
        if orthonormalise not in ("qr", "polar"):
            raise ValueError(f"orthonormalise={orthonormalise!r}: possible are 'qr' and 'polar'.")
        self.width, self.rank, self.orthonormalise = int(width), int(rank), orthonormalise
        self._factor = CachedFactor(orthonormalise)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._factor.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Orthonormalised:
        self._factor.clear()  # a cheap additional guard against changes made through `.data`
        return super().train(mode)


class LearnedSubspace(Orthonormalised):
    """A trainable orthonormal basis: R = thin QR (or polar factor) of a raw d × k matrix A.

    A starts orthonormal, so the first basis is the given start, up to rounding. With "qr" the diagonal of the
    triangular factor is made positive. This makes the map smooth, and orthonormal matrices are mapped to themselves.
    "polar" takes the orthonormal matrix closest to A. It treats all directions alike, so use it if single directions
    matter. The factor is computed once for each value of A (once in each optimiser step), not in each use, and no d ×
    d matrix is ever created.

    Args:
        width: d, the width of the stream.
        rank: k, 1 ≤ k ≤ d (ValueError otherwise).
        seed: seed of the random start. Subspaces that are to be compared need different seeds.
        start: an orthonormal k × d start instead of a random one.
        orthonormalise: "qr" or "polar".
    """

    vectors_along: ClassVar[Mapping[str, int]] = {"raw": 0}

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        seed: int | None = None,
        start: Float[Tensor, "rank width"] | None = None,
        orthonormalise: Orthonormalise = "qr",
    ) -> None:
        super().__init__(width, rank, orthonormalise)
        start = random_orthonormal(width, rank, seed) if start is None else start
        check_orthonormal(start, (self.rank, self.width))
        # Contiguous, as safetensors requires.
        self.raw = nn.Parameter(
            wide(start.detach(), torch.zeros(())).T.clone(memory_format=torch.contiguous_format)
        )

    def basis(self) -> Float[Tensor, "rank width"]:
        return self._factor([self.raw], lambda: self.raw).T

    def set_basis(self, basis: Float[Tensor, "rank width"]) -> None:
        finite(basis, "A basis")
        no_zero_vector(basis, 1, "A basis")
        with torch.no_grad():
            self.raw.copy_(basis.T)

    def description(self) -> dict[str, Any]:
        return {"width": self.width, "rank": self.rank, "orthonormalise": self.orthonormalise}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(**description, seed=0)


class FreeDirections(Subspace):
    """k trainable directions that need not stay orthonormal (as in NoReFT and DiReFT). This is not a lens.

    `write` is still h + Dᵀ(z − D h), but read(write(h, z)) = z only while the directions are orthonormal.
    """

    vectors_along: ClassVar[Mapping[str, int]] = {"directions": 1}

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        seed: int | None = None,
        start: Float[Tensor, "rank width"] | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, width)
        if start is None:
            start = random_orthonormal(width, rank, seed)
        if tuple(start.shape) != (rank, width):
            raise ValueError(f"A start of shape {tuple(start.shape)} for directions of shape {(rank, width)}.")
        finite(start, "A start")
        no_zero_vector(start, 1, "A start")
        self.width, self.rank = int(width), int(rank)
        self.directions = nn.Parameter(wide(start.detach(), torch.zeros(())).clone())

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.directions

    def sliced(self, start: int, stop: int) -> Subspace:
        """The span of these directions, with an orthonormal basis. ValueError if they are linearly dependent."""
        basis, factor = thin_qr(self.directions.detach()[start:stop].T)
        sizes = factor.diagonal().abs()
        if not sizes.min() > 1e-6 * sizes.max():
            raise ValueError(f"The {stop - start} directions span a subspace of a smaller rank.")
        return FixedSubspace(basis.T)

    def set_basis(self, basis: Float[Tensor, "rank width"]) -> None:
        finite(basis, "Directions")
        no_zero_vector(basis, 1, "Directions")
        with torch.no_grad():
            self.directions.copy_(basis)

    def description(self) -> dict[str, Any]:
        return {"width": self.width, "rank": self.rank}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(**description, seed=0)


class FixedSubspace(Subspace):
    """A given orthonormal basis that does not train. ValueError if its vectors are not orthonormal."""

    vectors: Tensor
    renamed: ClassVar[Mapping[str, str]] = {"rows": "vectors"}
    vectors_along: ClassVar[Mapping[str, int]] = {"vectors": 1}

    def __init__(self, basis: Float[Tensor, "rank width"]) -> None:
        super().__init__()
        instance(basis, Tensor, "The basis", "its shape is (rank, width)")
        if basis.ndim != 2:
            raise ValueError(f"A basis has shape (rank, width), this one {tuple(basis.shape)}.")
        self.rank, self.width = basis.shape
        check_rank(self.rank, self.width)
        check_orthonormal(basis, (self.rank, self.width))
        self.register_buffer("vectors", wide(basis.detach(), torch.zeros(())).clone())

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.vectors

    def description(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(tensors["vectors"], **description)


class Axes(Subspace):
    """Coordinate axes of the stream: single neurons, or the whole vector, without a d × d matrix.

    Its `write` copies numbers, so an interchange of the full vector is exact bit by bit.

    Args:
        width: d.
        indices: which axes, by default all.

    Raises:
        ValueError: indices outside of the stream, or the same index twice.
    """

    indices: Tensor
    copies = True

    def __init__(self, width: int, indices: Sequence[int] | None = None) -> None:
        super().__init__()
        width = whole_number(width, "width")
        if indices is not None and not isinstance(indices, Iterable):
            raise TypeError(f"indices={indices!r} is of type {type(indices).__name__}; needed are whole numbers.")
        chosen = list(range(width)) if indices is None else [whole_number(i, "an index") for i in indices]
        wrong = [i for i in chosen if not 0 <= i < width]
        if wrong or not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"Axes {chosen[:8]}{'…' if len(chosen) > 8 else ''} of a stream of width {width}: "
                f"possible are distinct indices from 0 to {width - 1}."
            )
        self.width, self.rank = width, len(chosen)
        self.register_buffer("indices", torch.tensor(chosen), persistent=True)

    def basis(self) -> Float[Tensor, "rank width"]:
        return nn.functional.one_hot(self.indices, self.width).float()

    def read(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        return wide(h, torch.zeros((), device=h.device)).index_select(-1, self.indices)

    def embed(self, z: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch width"]:
        return z.new_zeros(*z.shape[:-1], self.width).index_copy(-1, self.indices, z)

    def write(
        self, h: Float[Tensor, "*batch width"], z: Float[Tensor, "*batch rank"]
    ) -> Float[Tensor, "*batch width"]:
        return h.index_copy(-1, self.indices, z.to(h.dtype).expand(*h.shape[:-1], self.rank))

    def swap(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        return self.write(h, source.index_select(-1, self.indices))

    def sliced(self, start: int, stop: int) -> Axes:
        return Axes(self.width, self.indices[start:stop].tolist())

    def picked(self, indices: Sequence[int]) -> Axes:
        return Axes(self.width, self.indices[list(indices)].tolist()).to(self.indices.device)

    def description(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        return cls(**description, indices=tensors["indices"].tolist())


class Part(Subspace):
    """The basis vectors `start` to `stop` − 1 of another subspace; training the part trains the whole."""

    made_of = ("whole",)

    def __init__(self, whole: Subspace, start: int, stop: int) -> None:
        super().__init__()
        if not 0 <= start < stop <= whole.rank:
            raise ValueError(f"Basis vectors {start} to {stop - 1} asked of a basis of rank {whole.rank}.")
        self.whole, self.start, self.stop = whole, start, stop
        self.width, self.rank = whole.width, stop - start

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.whole.basis()[self.start : self.stop]

    def sliced(self, start: int, stop: int) -> Subspace:
        return self.whole.sliced(self.start + start, self.start + stop)

    def description(self) -> dict[str, Any]:
        return {"whole": self.whole, "start": self.start, "stop": self.stop}


def pca(states: Float[Tensor, "example width"], rank: int) -> FixedSubspace:
    """The span of the `rank` largest principal components of the states (centred, not standardised)."""
    check_rank(rank, states.shape[-1])
    states = _expect_finite(states)
    if rank > min(len(states) - 1, states.shape[-1]):
        raise ValueError(
            f"{rank} principal components asked of {len(states)} states: at most {len(states) - 1} exist."
        )
    right = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:rank]
    return FixedSubspace(right)


def difference_of_means(states: Float[Tensor, "example width"], labels: Tensor) -> FixedSubspace:
    """The span of the differences between the class means: rank = classes − 1 (one direction for two classes).

    Raises:
        ValueError: fewer than two classes, or means that coincide.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"The labels have {len(classes)} class; a difference of means needs two or more.")
    states = _expect_finite(states)
    means = torch.stack([states[labels == c].mean(0) for c in classes])
    gaps = means[1:] - means[0]
    if torch.linalg.matrix_rank(gaps) < len(gaps):
        raise ValueError(f"The means of the {len(classes)} classes do not span {len(gaps)} dimensions.")
    return FixedSubspace(thin_qr(gaps.T)[0].T)


def _expect_finite(states: Tensor) -> Tensor:
    """States in a precision to compute with. ValueError for NaN or infinite numbers."""
    states = wide(states, torch.zeros(()))
    wrong = int((~states.isfinite().all(-1)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {len(states)} states hold NaN or infinite numbers; `collect` gives NaN where a row has fewer "
            "positions than others: leave these entries out."
        )
    return states


def random_subspace(width: int, rank: int, seed: int) -> FixedSubspace:
    """A random subspace from the Haar measure, for controls of the same rank."""
    return FixedSubspace(random_orthonormal(width, rank, seed))
