"""How near two subspaces are, and how near two subspaces are by chance.

Two orthonormal bases of one span are the same subspace. So spans are compared, never the entries of their matrices.
Let θ₁ ≤ … ≤ θₖ be the principal angles between spans of ranks k₁ and k₂, with k = min(k₁, k₂), and P₁, P₂ the
orthogonal projectors on them:

    overlap      tr(P₁P₂)/k = (1/k) Σ cos² θ    1: one span contains the other; 0: they are orthogonal
    containment  tr(P₁P₂)/k₁                    the share of the first that lies in the second; not symmetric
    chordal      (Σ sin² θ)^½                   a distance, 0 to √k
    geodesic     (Σ θ²)^½                       a distance in radians, 0 to √k · π/2

Sources: Björck & Golub 1973 for the angles; Edelman, Arias & Smith 1998, table 4.1, for the distances. For spans of
different ranks, Ye & Lim 2016 (arXiv 1407.0900): the distance from the smaller span to the nearest span of its rank
inside the larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.core.orthonormal import check_orthonormal, check_rank, random_orthonormal
from subspace_lab.core.subspaces import FixedSubspace, Subspace

CONFIDENCE = 0.95
# With 18 draws, even a value above all of them has p = 1/19, which is more than .05: they give no 95 % band.
FEWEST_DRAWS = 19


@dataclass(frozen=True)
class Chance:
    """The values of a measure for unrelated subspaces: their mean, and the band that holds 95 % of the draws.

    Attributes:
        mean: in closed form if there is one, otherwise the mean of the draws.
        low, high: the limits of the band; with fewer than 19 draws, the lowest and the highest draw.
        draws: the number of draws.
        sd: the standard deviation over pairs, in closed form; None if there is no closed form.
    """

    mean: float
    low: float
    high: float
    draws: int
    sd: float | None = None

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Chance:
        """Mean and band of drawn values; of a `few`, the lowest and the highest (ValueError if there are none)."""
        if not len(values):
            raise ValueError("A null of no value has no mean.")
        drawn = np.asarray(values, dtype=float)
        low, high = (drawn.min(), drawn.max()) if len(values) < FEWEST_DRAWS else _band(drawn)
        return cls(float(np.mean(values)), float(low), float(high), len(values))

    @property
    def few(self) -> bool:
        """Whether the draws are too few for a 95 % band; `low` and `high` are then the lowest and the highest."""
        return self.draws < FEWEST_DRAWS


def overlap(a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]) -> float:
    """tr(P₁ P₂) / min(k₁, k₂): 1 if one span contains the other, 0 if they are orthogonal.

    It is the mean squared cosine of the principal angles.

    Raises:
        ValueError: bases that are not orthonormal, or that have different widths.
    """
    one, other = _pair(a, b)
    return float((one @ other.T).square().sum()) / min(len(one), len(other))


def containment(a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]) -> float:
    """tr(P₁ P₂) / k₁: the share of the first span that lies in the second; errors as for `overlap`.

    1 if b contains a. If a is a line in the plane b, it is 1, and the other way round ½.
    """
    one, other = _pair(a, b)
    return float((one @ other.T).square().sum()) / len(one)


def chordal(a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]) -> float:
    """(Σ sin² θ)^½; for spans of the same rank this is ‖P₁ − P₂‖_F / √2. Errors as for `overlap`."""
    return float(principal_angles(a, b).sin().norm())


def geodesic(a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]) -> float:
    """(Σ θ²)^½ in radians, the length of the shortest path on the Grassmannian; errors as for `overlap`."""
    return float(principal_angles(a, b).norm())


def principal_angles(
    a: Subspace | Float[Tensor, "k1 width"], b: Subspace | Float[Tensor, "k2 width"]
) -> Float[Tensor, " angle"]:
    """The min(k₁, k₂) principal angles in radians, ascending, in float64.

    Small angles are computed from their sines, since the cosine of 1e-8 rounds to 1 (Björck & Golub 1973; Knyazev &
    Argentati 2002, algorithm 3.1). Errors as for `overlap`.
    """
    one, other = _pair(a, b)
    if len(one) < len(other):
        one, other = other, one
    inner = one @ other.T
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other.T - one.T @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def haar_overlap(width: int, k1: int, k2: int, draws: int = 2000, seed: int = 0) -> Chance:
    """The overlap of independent random (Haar) subspaces of ranks k₁ and k₂: exact moments, simulated 95 % band.

    tr(P₁ P₂) has the mean k₁k₂/d and the variance 2k₁k₂(d−k₁)(d−k₂)/(d²(d−1)(d+2)). The band is simulated; the cost
    does not grow with the width. For independent W₁ ~ Wishart_k(k₁) and W₂ ~ Wishart_k(d − k₁) with k = k₂, tr(P₁ P₂)
    has the distribution of tr(W₁ (W₁ + W₂)⁻¹) (the matrix-variate beta; Muirhead 1982, section 3.3).

    This is the weakest null: two subspaces among the main directions of the states overlap more.

    Raises:
        ValueError: a rank that the width does not have, or fewer than 100 draws.
    """
    small, large = _checked(width, k1, k2, draws)
    traces = _haar_traces(width, large, small, draws, np.random.default_rng(seed))
    low, high = _band(traces / small)
    free = (width - k1) * (width - k2)  # 0 if one span is the whole stream; then width − 1 may be 0 too
    variance = 2 * k1 * k2 * free / (width**2 * (width - 1) * (width + 2)) if free else 0.0
    return Chance(large / width, float(low), float(high), draws, variance**0.5 / small)


@dataclass(frozen=True)
class AngleBand:
    """The principal angles of independent random subspaces, in radians, ascending: mean and 95 % band of each."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    draws: int


def haar_angles(width: int, k1: int, k2: int, draws: int = 2000, seed: int = 0) -> AngleBand:
    """All principal angles of independent random (Haar) subspaces; drawn and with errors as for `haar_overlap`."""
    small, large = _checked(width, k1, k2, draws)
    squares = _haar_squared_cosines(width, large, small, draws, np.random.default_rng(seed))
    angles = np.arccos(np.sqrt(squares))
    low, high = _band(angles)
    return AngleBand(tuple(angles.mean(0).tolist()), tuple(low.tolist()), tuple(high.tolist()), draws)


def haar_largest_cosine(width: int, k1: int, k2: int, draws: int = 2000, seed: int = 0) -> Chance:
    """The cosine of the smallest principal angle of independent random (Haar) subspaces, by simulation.

    It is far above 0: in width 64, .39 for rank 4 and .83 for rank 16. So the claim "one direction is shared" needs
    this null. Errors as for `haar_overlap`.
    """
    small, large = _checked(width, k1, k2, draws)
    squares = _haar_squared_cosines(width, large, small, draws, np.random.default_rng(seed))
    return Chance.of(np.sqrt(squares[:, 0]))


@dataclass(frozen=True)
class Consensus:
    """What several subspaces have in common: the spectrum of their mean projector (1/n) Σ Pᵢ.

    An eigenvalue is the mean share of its direction that lies in the subspaces: 1 if all contain it, 1/n if one
    contains it and the others are orthogonal to it.

    Attributes:
        eigenvalues: the largest ones, descending; their number is the largest rank.
        directions: (eigenvalues, width) their eigenvectors.
        n: the number of subspaces.
        null: the largest eigenvalue of as many independent random (Haar) subspaces of the same ranks.
    """

    eigenvalues: tuple[float, ...]
    directions: Float[Tensor, "eigenvalue width"]
    n: int
    null: Chance

    @property
    def dimensions(self) -> int:
        """How many directions the subspaces agree on: eigenvalues above the band of the null's largest eigenvalue."""
        return sum(value > self.null.high for value in self.eigenvalues)

    def subspace(self) -> FixedSubspace:
        """The span of the directions that the subspaces agree on (ValueError if there is none)."""
        if not self.dimensions:
            raise ValueError(
                f"The subspaces agree on no direction: the eigenvalues {[round(v, 2) for v in self.eigenvalues]} are "
                f"not above those of independent random subspaces (up to {self.null.high:.2f})."
            )
        return FixedSubspace(self.directions[: self.dimensions])


def consensus(
    subspaces: Sequence[Subspace | Float[Tensor, "rank width"]], draws: int = 200, seed: int = 0
) -> Consensus:
    """The consensus of several fits of one variable at one site, such as those of several seeds.

    No matrix of width × width is needed: the eigenvalues come from the singular values of the stacked bases.

    Args:
        draws, seed: the number of draws for the null, and their seed.

    Raises:
        ValueError: fewer than two subspaces, different widths, a basis that is not orthonormal.
    """
    bases = [orthonormal_rows(one) for one in subspaces]
    if len(bases) < 2:
        raise ValueError(f"A consensus of {len(bases)} subspaces: at least two are needed.")
    if len({basis.shape[1] for basis in bases}) > 1:
        raise ValueError(
            f"Subspaces of streams of widths {[basis.shape[1] for basis in bases]}: all need one width."
        )
    ranks, width = [len(basis) for basis in bases], bases[0].shape[1]
    most = max(ranks)
    _, sizes, right = torch.linalg.svd(torch.cat(bases) / len(bases) ** 0.5, full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    largest = [
        float(torch.linalg.svdvals(torch.cat([random_orthonormal(width, k, generator) for k in ranks]))[0])
        for _ in range(draws)
    ]
    null = Chance.of(np.square(largest) / len(bases))
    return Consensus(tuple(sizes[:most].square().tolist()), right[:most], len(bases), null)


def _checked(width: int, k1: int, k2: int, draws: int) -> tuple[int, int]:
    """The smaller and the larger rank."""
    for rank in (k1, k2):
        check_rank(rank, width)
    if draws < 100:
        raise ValueError(f"{draws} draws are too few for a 95 % band; it needs 100 or more.")
    return min(k1, k2), max(k1, k2)


def _band(values: np.ndarray) -> np.ndarray:
    """(2, …) the limits of the middle 95 % of the draws."""
    tail = (1 - CONFIDENCE) / 2
    found: np.ndarray = np.quantile(values, [tail, 1 - tail], axis=0)
    return found


def _pair(a: Subspace | Tensor, b: Subspace | Tensor) -> tuple[Tensor, Tensor]:
    one, other = orthonormal_rows(a), orthonormal_rows(b)
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"Subspaces of streams of width {one.shape[1]} and {other.shape[1]}: both need the same width."
        )
    return one, other


def orthonormal_rows(subspace: Subspace | Tensor) -> Tensor:
    """The basis in float64 on the CPU (ValueError where its vectors are not orthonormal)."""
    basis = (subspace.basis() if isinstance(subspace, Subspace) else subspace).detach()
    if basis.ndim != 2:
        raise ValueError(f"A basis needs the shape (rank, width); this one has {tuple(basis.shape)}.")
    check_orthonormal(basis, (basis.shape[0], basis.shape[1]))
    # A float32 basis is orthonormal only to about 1e-7. It is made exact, so that no overlap exceeds 1.
    return torch.linalg.qr(basis.double().cpu().T)[0].T


def _haar_traces(width: int, large: int, small: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) values of tr(P₁ P₂) for ranks large ≥ small."""
    rest = width - large
    if not rest:
        return np.full(draws, float(small))
    if rest < small:  # W₂ would be singular, so use the complement of P₁: tr(P₁ P₂) = tr P₂ − tr((I − P₁) P₂)
        return small - _haar_traces(width, small, rest, draws, rng)
    inside, outside = (_wishart(freedom, small, draws, rng) for freedom in (large, rest))
    return np.trace(np.linalg.solve(inside + outside, inside), axis1=1, axis2=2)


def _haar_squared_cosines(width: int, large: int, small: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, small) values of cos² θ, descending: the eigenvalues of the matrix whose trace `_haar_traces` returns."""
    rest = width - large
    if rest < small:  # ranks that add up to more than the width: the spans share at least small − rest directions
        shared = np.ones((draws, small - rest))
        if not rest:
            return shared
        apart = 1 - _haar_squared_cosines(width, small, rest, draws, rng)
        return np.concatenate([shared, apart[:, ::-1]], 1)
    inside, outside = (_wishart(freedom, small, draws, rng) for freedom in (large, rest))
    root = np.linalg.cholesky(inside + outside)
    half = np.linalg.solve(root, inside)
    whole = np.linalg.solve(root, half.transpose(0, 2, 1))
    return np.linalg.eigvalsh(whole)[:, ::-1].clip(0, 1)


def _wishart(freedom: int, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, size, size) draws from the Wishart distribution with unit scale, by Bartlett's decomposition."""
    lower = np.tril(rng.standard_normal((draws, size, size)), -1)
    diagonal = np.sqrt(rng.chisquare(freedom - np.arange(size), (draws, size)))
    lower[:, np.arange(size), np.arange(size)] = diagonal
    return lower @ lower.transpose(0, 2, 1)
