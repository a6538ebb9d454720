"""Subspaces of a hidden state: two verbs over one basis.

A subspace of R^d is held as R ∈ R^{k×d} with orthonormal rows. It can

    read(h)     = R h                       coordinates, R^k
    write(h, z) = h + Rᵀ(z − R h)           h with those coordinates replaced

and nothing else is needed: which z is written is what tells DAS from LoReFT (`core/interventions.py`).
The pair is a lens: read(write(h, z)) = z, write(h, read(h)) = h, write(write(h, z), z') = write(h, z'),
and what is orthogonal to the rows of R stays as it was.

The basis is kept in float32 (or float64) whatever the dtype of the stream; only the change is cast and
added, so a bfloat16 stream loses nothing outside the subspace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Orthonormalise = Literal["qr", "polar"]

_steps_taken = 0


def _count_step(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1


# Fused optimisers change parameters without raising their version, so steps are counted, whoever takes them.
register_optimizer_step_post_hook(_count_step)


class FullPrecision(nn.Module):
    """A module whose parameters stay float32 (or float64) when it is cast to a half precision.

    `model.to(torch.bfloat16)` on a parent would round a basis to 8 bits, and QR has no half kernels on CPU.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


def exactly(device: torch.device) -> torch.autocast:
    """Within the block autocast takes no product to a half precision."""
    return torch.autocast(device.type, enabled=False)


def check_rank(rank: int, width: int) -> None:
    """Refuse a rank that no subspace of R^width has."""
    if not 1 <= rank <= width:
        raise ValueError(f"rank {rank} asked for a stream of width {width}: possible are 1 to {width}.")


def wide(h: Tensor, like: Tensor) -> Tensor:
    """h in the precision of the computation: at least that of the basis."""
    return h.to(torch.promote_types(h.dtype, like.dtype))


def random_orthonormal(
    width: int, rank: int, generator: torch.Generator | int | None = None
) -> Float[Tensor, "rank width"]:
    """A basis of a subspace drawn from the Haar measure: QR of a Gaussian matrix with fixed signs."""
    check_rank(rank, width)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    return _thin_qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()


class Subspace(FullPrecision, ABC):
    """A k-dimensional subspace of R^d. Leaves say what `basis` is; the verbs are written once, here."""

    width: int
    rank: int

    @abstractmethod
    def basis(self) -> Float[Tensor, "rank width"]:
        """R, the rows of which span the subspace."""

    def read(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        """R h, in at least float32."""
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
        """write(h, read(source)), computed as h + RᵀR(source − h): exactly h where source is h."""
        with exactly(h.device):
            basis = self.basis()
            exact = wide(h, basis)
            basis = basis.to(exact.dtype)
            return h + (((source.to(exact.dtype) - exact) @ basis.T) @ basis).to(h.dtype)

    def partition(self, sizes: Mapping[str, int]) -> dict[str, Subspace]:
        """Split the basis into consecutive blocks of rows, one a name, that stay parts of this basis.

        The sizes may leave rows over; together they may not exceed the rank (ValueError).
        """
        if sum(sizes.values()) > self.rank or min(sizes.values(), default=0) < 1:
            raise ValueError(
                f"Parts {dict(sizes)} asked of a basis of rank {self.rank}: "
                f"each needs at least 1 row and together they may have {self.rank}."
            )
        parts: dict[str, Subspace] = {}
        start = 0
        for name, size in sizes.items():
            parts[name] = Part(self, start, start + size)
            start += size
        return parts

    def frozen(self) -> FixedSubspace:
        """The subspace as it stands now, as a value that no longer trains."""
        return FixedSubspace(self.basis().detach().clone())

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}"


class LearnedSubspace(Subspace):
    """A trainable orthonormal basis: R = thin QR (or polar factor) of a raw d × k matrix A.

    A starts orthonormal, so the start is reproduced exactly up to rounding. With "qr" the signs of the
    triangular factor are fixed positive, which makes the map smooth and its own inverse on orthonormal
    matrices; "polar" takes the orthonormal matrix closest to A, which treats all directions alike and is
    the better choice where single directions matter. The factorisation is evaluated once for each value of
    A (that is, once an optimiser step), not once a use, and no d × d matrix is ever made.

    Args:
        width: d, the width of the stream.
        rank: k, 1 ≤ k ≤ d (ValueError otherwise).
        seed: of the random start. Two subspaces that are to be compared need different seeds.
        start: an orthonormal k × d start instead of a random one.
        orthonormalise: "qr" or "polar".
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        seed: int | None = None,
        start: Float[Tensor, "rank width"] | None = None,
        orthonormalise: Orthonormalise = "qr",
    ) -> None:
        super().__init__()
        check_rank(rank, width)
        if orthonormalise not in ("qr", "polar"):
            raise ValueError(f"orthonormalise={orthonormalise!r}: possible are 'qr' and 'polar'.")
        if start is None:
            start = random_orthonormal(width, rank, seed)
        check_orthonormal(start, (rank, width))
        self.width, self.rank, self.orthonormalise = width, rank, orthonormalise
        # Contiguous, as safetensors asks for.
        self.raw = nn.Parameter(
            wide(start.detach(), torch.zeros(())).T.clone(memory_format=torch.contiguous_format)
        )
        self._cached: tuple[tuple, Tensor, Tensor, Tensor] | None = None

    def basis(self) -> Float[Tensor, "rank width"]:
        # In-place changes of a tensor (load_state_dict, most optimisers) raise its version; what replaces its
        # storage changes the pointer, and the old storage is held so that nothing new can lie where it was.
        key = (_steps_taken, self.raw._version, self.raw.data_ptr(), self.raw.device, self.raw.dtype)
        if self._cached is None or self._cached[0] != key:
            with torch.no_grad(), exactly(self.raw.device):
                factor = _thin_qr if self.orthonormalise == "qr" else _polar
                self._cached = (key, *factor(self.raw), self.raw.detach())
        return _Orthonormal.apply(self.raw, self._cached[1], self._cached[2], self.orthonormalise).T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cached = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> LearnedSubspace:
        self._cached = None  # a cheap second guard against changes made through `.data`
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class FreeDirections(Subspace):
    """k trainable directions that nothing keeps orthonormal (NoReFT's and DiReFT's): not a lens.

    `write` is still h + Dᵀ(z − D h), but read(write(h, z)) is z only when the rows are orthonormal.
    """

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
        self.width, self.rank = width, rank
        self.directions = nn.Parameter(start.detach().float().clone())

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.directions


class FixedSubspace(Subspace):
    """A given orthonormal basis, kept as it is (ValueError if its rows are not orthonormal)."""

    rows: Tensor

    def __init__(self, basis: Float[Tensor, "rank width"]) -> None:
        super().__init__()
        if basis.ndim != 2:
            raise ValueError(f"A basis has shape (rank, width), this one {tuple(basis.shape)}.")
        self.rank, self.width = basis.shape
        check_rank(self.rank, self.width)
        check_orthonormal(basis, (self.rank, self.width))
        self.register_buffer("rows", wide(basis.detach(), torch.zeros(())).clone())

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.rows


class Axes(Subspace):
    """Coordinate axes of the stream: single neurons, or the whole vector. Never a d × d matrix.

    Its `write` copies, so a full-vector swap is exact to the bit.

    Args:
        width: d.
        indices: which axes, all of them by default.
    """

    indices: Tensor

    def __init__(self, width: int, indices: Sequence[int] | None = None) -> None:
        super().__init__()
        chosen = list(range(width)) if indices is None else [int(i) for i in indices]
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


class Part(Subspace):
    """Rows `start` to `stop` of another subspace's basis; training it trains the whole."""

    def __init__(self, whole: Subspace, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.width, self.rank = whole.width, stop - start

    def basis(self) -> Float[Tensor, "rank width"]:
        return self.whole.basis()[self.start : self.stop]


def pca(states: Float[Tensor, "example width"], rank: int) -> FixedSubspace:
    """The span of the `rank` largest principal components of the states (centred, not standardised)."""
    check_rank(rank, states.shape[-1])
    states = wide(states, torch.zeros(()))
    if rank > min(len(states) - 1, states.shape[-1]):
        raise ValueError(
            f"{rank} principal components asked of {len(states)} states: at most {len(states) - 1} exist."
        )
    right = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:rank]
    return FixedSubspace(right)


def difference_of_means(states: Float[Tensor, "example width"], labels: Tensor) -> FixedSubspace:
    """The span of the differences between the class means: rank = classes − 1 (one direction for two).

    Raises:
        ValueError: with fewer than two classes, or means that coincide.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"The labels have {len(classes)} class; a difference of means needs two or more.")
    states = wide(states, torch.zeros(()))
    means = torch.stack([states[labels == c].mean(0) for c in classes])
    gaps = means[1:] - means[0]
    if torch.linalg.matrix_rank(gaps) < len(gaps):
        raise ValueError(f"The means of the {len(classes)} classes do not span {len(gaps)} dimensions.")
    return FixedSubspace(_thin_qr(gaps.T)[0].T)


def random_subspace(width: int, rank: int, seed: int) -> FixedSubspace:
    """A subspace drawn from the Haar measure: the control of the same rank."""
    return FixedSubspace(random_orthonormal(width, rank, seed))


def check_orthonormal(basis: Tensor, shape: tuple[int, int]) -> None:
    """ValueError unless `basis` has this (rank, width) and R Rᵀ = I to 1e-4."""
    if tuple(basis.shape) != shape:
        raise ValueError(f"A basis of shape {tuple(basis.shape)} for a subspace of (rank, width) {shape}.")
    rows = basis.detach().double()
    error = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max()
    if not error < 1e-4:
        raise ValueError(f"The rows of the basis are not orthonormal: |R Rᵀ − I| is {error:.2g}.")


def _thin_qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """A = Q T with T's diagonal positive, so that an orthonormal A comes back as itself."""
    q, t = torch.linalg.qr(a)
    signs = torch.where(t.diagonal() < 0, -1.0, 1.0).to(a.dtype)
    return q * signs, signs[:, None] * t


def _polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """A = Q H with H symmetric positive: Q is the orthonormal matrix nearest to A."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh, (vh.T * s) @ vh


class _Orthonormal(torch.autograd.Function):
    """The factor computed beforehand, with its derivative in closed form.

    Autograd's own QR would tie one evaluation to one backward pass; this way every use in every
    micro-batch shares the evaluation and pays O(d k²) for its own gradient.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, q: Tensor, factor: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(q, factor)
        ctx.kind = kind
        return q.view_as(q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, factor = ctx.saved_tensors
        inner = q.T @ grad
        if ctx.kind == "qr":
            # A = QT: dA = (G + Q·sym(−GᵀQ)) T^{-T}, where sym copies the lower triangle to the upper.
            lower = (-inner.T).tril()
            symmetric = lower + lower.tril(-1).T
            raw_grad = torch.linalg.solve_triangular(factor, (grad + q @ symmetric).T, upper=True).T
        else:
            # A = QH, H = VSVᵀ: dA = Q X + (I − QQᵀ) G H^{-1}, with H X + X H = QᵀG − GᵀQ.
            s, v = torch.linalg.eigh(factor)
            skew = v.T @ (inner - inner.T) @ v / (s[:, None] + s)
            outside = (grad - q @ inner) @ ((v / s) @ v.T)
            raw_grad = q @ (v @ skew @ v.T) + outside
        return raw_grad, None, None, None
