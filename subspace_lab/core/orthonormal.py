"""Orthonormal bases: checks, random bases, and bases that are factors of trained matrices.

A trained basis is the orthonormal factor of a raw matrix A. With autograd's own QR, each use would compute the factor
again and keep its own graph for the backward pass. Here the factor is computed once for each value of A and shared by
all uses, and the derivative of each use costs O(d k²).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from subspace_lab.core.arguments import finite, whole_number

Orthonormalise = Literal["qr", "polar"]

_steps_taken = 0


def _count_step(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1


# Fused optimisers change parameters without raising their version, so the steps of all optimisers are counted.
register_optimizer_step_post_hook(_count_step)


def exactly(device: torch.device) -> torch.autocast:
    """Inside the block autocast does not compute products in half precision."""
    return torch.autocast(device.type, enabled=False)


def check_rank(rank: int, width: int) -> None:
    """ValueError for a rank that no subspace of R^width has; TypeError if it is not a whole number."""
    rank, width = whole_number(rank, "rank"), whole_number(width, "width")
    if not 1 <= rank <= width:
        raise ValueError(f"rank {rank} asked for a stream of width {width}: possible are 1 to {width}.")


def wide(h: Tensor, like: Tensor) -> Tensor:
    """h in the precision of the computation: the wider of its own and that of `like`."""
    return h.to(torch.promote_types(h.dtype, like.dtype))


def random_orthonormal(
    width: int, rank: int, generator: torch.Generator | int | None = None
) -> Float[Tensor, "rank width"]:
    """A basis of a subspace drawn uniformly (Haar measure): the QR factor, signs fixed, of a Gaussian matrix."""
    check_rank(rank, width)
    if generator is not None and not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(whole_number(generator, "seed"))
    return thin_qr(torch.randn(width, rank, generator=generator))[0].T.contiguous()


def check_orthonormal(basis: Tensor, shape: tuple[int, int]) -> None:
    """ValueError unless `basis` has this (rank, width) and R Rᵀ = I to 1e-4."""
    if tuple(basis.shape) != shape:
        raise ValueError(f"A basis of shape {tuple(basis.shape)} for a subspace of (rank, width) {shape}.")
    finite(basis, "A basis")
    exact = basis.detach().double()
    error = (exact @ exact.T - torch.eye(len(exact), dtype=exact.dtype, device=exact.device)).abs().max()
    if not error < 1e-4:
        raise ValueError(f"The basis vectors are not orthonormal: |R Rᵀ − I| is {error:.2g}.")


def thin_qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """A = Q T with a positive diagonal of T, so that Q = A if A is orthonormal."""
    q, t = torch.linalg.qr(a)
    signs = torch.where(t.diagonal() < 0, -1.0, 1.0).to(a.dtype)
    return q * signs, signs[:, None] * t


def polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """A = Q H with H symmetric positive: Q is the orthonormal matrix closest to A."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh, (vh.T * s) @ vh


class CachedFactor:
    """The orthonormal factor of a matrix made of some parameters, computed again only if one of them changed.

    Args:
        kind: "qr" or "polar".
    """

    def __init__(self, kind: Orthonormalise) -> None:
        self.kind = kind
        # (key, Q, T or H, the parameters' storages)
        self._held: tuple[tuple, Tensor, Tensor, list[Tensor]] | None = None

    def __call__(self, parameters: Sequence[Tensor], matrix: Callable[[], Tensor], state: Any = None) -> Tensor:
        """Q of `matrix()`, with its gradient; `state` is anything else on which the matrix depends."""
        # In-place changes of a tensor (load_state_dict, most optimisers) raise its version. If its storage is replaced,
        # the pointer changes; the old storage is kept alive, so that no new storage can have the same address.
        key = (_steps_taken, state, *((p._version, p.data_ptr(), p.device, p.dtype) for p in parameters))
        raw = matrix()
        if self._held is None or self._held[0] != key:
            with torch.no_grad(), exactly(raw.device):
                q, factor = (thin_qr if self.kind == "qr" else polar)(raw)
            self._held = (key, q, factor, [p.detach() for p in parameters])
        return Orthonormal.apply(raw, self._held[1], self._held[2], self.kind)

    def clear(self) -> None:
        """Forget the factor, so that the next use computes it again."""
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "_held": None}


class Orthonormal(torch.autograd.Function):
    """A factor that is already computed, with its derivative in closed form."""

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
