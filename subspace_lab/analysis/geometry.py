"""How near two subspaces are, and how near chance alone brings two.

Two orthonormal bases of one span are the same subspace, so spans are compared and never matrices by entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.core.orthonormal import check_orthonormal, check_rank
from subspace_lab.core.subspaces import Subspace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Chance:
    """What independent random subspaces overlap: the mean, and the band that holds 95 % of the draws."""

    mean: float
    low: float
    high: float
    draws: int


def overlap(a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]) -> float:
    """tr(P₁ P₂) / min(k₁, k₂): 1 where one span holds the other, 0 where they are orthogonal.

    It is the mean squared cosine of the principal angles.

    Raises:
        ValueError: bases that are not orthonormal, or of streams of different widths.
    """
    one, other = _pair(a, b)
    return float((one @ other.T).square().sum()) / min(len(one), len(other))


def principal_angles(
    a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]
) -> Float[Tensor, " angle"]:
    """The min(k₁, k₂) principal angles in radians, ascending, in float64.

    Small angles come from their sines: the cosine of an angle of 1e-8 is 1 (Björck & Golub 1973; Knyazev &
    Argentati 2002, algorithm 3.1). Errors as of `overlap`.
    """
    one, other = _pair(a, b)
    if len(one) < len(other):
        one, other = other, one
    inner = one @ other.T
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other.T - one.T @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def haar_overlap(width: int, k1: int, k2: int, draws: int = 2000, seed: int = 0) -> Chance:
    """The overlap of independent random (Haar) subspaces of ranks k₁ and k₂: exact mean, simulated 95 % band.

    E tr(P₁ P₂) = k₁ k₂ / d. The band is simulated at a cost that does not grow with the width: with
    W₁ ~ Wishart_k(k₁) and W₂ ~ Wishart_k(d − k₁) independent, tr(P₁ P₂) is distributed as
    tr(W₁ (W₁ + W₂)⁻¹) for k = k₂ (the matrix-variate beta; Muirhead 1982, section 3.3).

    This is the weakest null: subspaces of what a stream mostly holds overlap more.

    Raises:
        ValueError: a rank that the width does not have, or fewer than 100 draws.
    """
    for rank in (k1, k2):
        check_rank(rank, width)
    if draws < 100:
        raise ValueError(f"A 95 % band from {draws} draws is no band; possible are 100 or more.")
    small, large = sorted((k1, k2))
    traces = _haar_traces(width, large, small, draws, np.random.default_rng(seed))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(traces / small, [tail, 1 - tail])
    return Chance(large / width, float(low), float(high), draws)


def _pair(a: Subspace | Tensor, b: Subspace | Tensor) -> tuple[Tensor, Tensor]:
    one, other = orthonormal_rows(a), orthonormal_rows(b)
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"Subspaces of streams of width {one.shape[1]} and {other.shape[1]}: needed is one width."
        )
    return one, other


def orthonormal_rows(subspace: Subspace | Tensor) -> Tensor:
    """The basis in float64 on the CPU (ValueError where its vectors are not orthonormal)."""
    basis = (subspace.basis() if isinstance(subspace, Subspace) else subspace).detach()
    if basis.ndim != 2:
        raise ValueError(f"A basis has shape (rank, width), this one {tuple(basis.shape)}.")
    check_orthonormal(basis, (basis.shape[0], basis.shape[1]))
    # A basis held in float32 is orthonormal to 1e-7; made exact, no overlap exceeds 1.
    return torch.linalg.qr(basis.double().cpu().T)[0].T


def _haar_traces(width: int, large: int, small: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) of tr(P₁ P₂) for ranks large ≥ small."""
    rest = width - large
    if not rest:
        return np.full(draws, float(small))
    if rest < small:  # W₂ would be singular; the complement of P₁ is the smaller one: tr P₂ − tr((I − P₁) P₂)
        return small - _haar_traces(width, small, rest, draws, rng)
    inside, outside = (_wishart(freedom, small, draws, rng) for freedom in (large, rest))
    return np.trace(np.linalg.solve(inside + outside, inside), axis1=1, axis2=2)


def _wishart(freedom: int, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, size, size) of the Wishart distribution with unit scale, by Bartlett's decomposition."""
    lower = np.tril(rng.standard_normal((draws, size, size)), -1)
    diagonal = np.sqrt(rng.chisquare(freedom - np.arange(size), (draws, size)))
    lower[:, np.arange(size), np.arange(size)] = diagonal
    return lower @ lower.transpose(0, 2, 1)
