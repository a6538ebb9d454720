"""Subspaces of different sites in common coordinates.

The same information may have other directions at another layer, and independently trained models share no directions
at all. So a map from the states at one site to those at another is fitted on states of the same texts, and the basis
is mapped with it; then an overlap is meaningful again. A flexible map brings almost any subspace near the other, so
the null is the same map applied to random subspaces; `compare` computes it without being asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.analysis.compared import Compared
from subspace_lab.analysis.geometry import orthonormal_rows, overlap
from subspace_lab.analysis.looks import Looks, look_of, states_at_sources, variable_at
from subspace_lab.core.subspaces import FixedSubspace

TOLERANCE = 1e-6  # singular values below this share of the largest are rounding

Map = Callable[[Tensor, Tensor], Tensor]
"""(example, width) states at one site and at another → (width, width) W with states₂ ≈ states₁ W, both centred."""


def procrustes(one: Float[Tensor, "example w1"], other: Float[Tensor, "example w2"]) -> Float[Tensor, "w1 w2"]:
    """The orthogonal map that brings H nearest to G: W = U Vᵀ, from the SVD of HᵀG = U S Vᵀ (Schönemann 1966).

    It rotates and mirrors but never stretches, so it can only match states that have the same shape.
    """
    left, _, right = torch.linalg.svd(one.T @ other, full_matrices=False)
    return left @ right


def ridge(
    one: Float[Tensor, "example w1"], other: Float[Tensor, "example w2"], strength: float = 1e-2
) -> Float[Tensor, "w1 w2"]:
    """The linear map W = (HᵀH + λI)⁻¹ HᵀG with λ = strength · tr(HᵀH)/width.

    It may stretch and drop directions, so random subspaces come near too: compare the result with its null.
    """
    moment = one.T @ one
    penalty = strength * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(moment + penalty, one.T @ other)


@dataclass(frozen=True, eq=False)
class DriftCorrected:
    """Overlap of the row's subspace, mapped to the column's site, with the column's subspace.

    A direction r at the first site becomes r W at the second. If both sites are the same, nothing is mapped.

    Attributes:
        pairs: training pairs; the map is fitted on the states of their sources. If several models are compared, the
            same pairs for each of them.
        fit: `procrustes`, `ridge` or a function like them (`functools.partial(ridge, strength=0.1)`).
    """

    pairs: Looks
    fit: Map = procrustes
    label: str = "drift-corrected overlap"
    _maps: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`.

        Raises:
            ValueError: sites with different numbers of positions, so that their states cannot be matched.
        """
        return [[overlap(self.carried(one, other), other.subspace) for other in items] for one in items]

    def carried(self, one: Compared, other: Compared) -> FixedSubspace:
        """The first subspace in the coordinates of the second one's site."""
        basis = orthonormal_rows(one.subspace)
        looks = [look_of(self.pairs, item.model) for item in (one, other)]
        places = [(item.model, *variable_at(look, item)) for item, look in zip((one, other), looks, strict=True)]
        if places[0] == places[1]:
            return FixedSubspace(basis)
        key = tuple(places)
        if key not in self._maps:
            (first, rows), (second, others) = (
                states_at_sources(look, name, site) for look, (_, name, site) in zip(looks, places, strict=True)
            )
            if len(rows) != len(others) or not torch.equal(rows, others):
                raise ValueError(
                    f"{one.site} has {len(rows)} positions in these texts, {other.site} has {len(others)}: to fit a "
                    "map between them, each state at one site needs its partner at the other."
                )
            self._maps[key] = self.fit(first - first.mean(0), second - second.mean(0))
        moved = basis @ self._maps[key]
        _, sizes, right = torch.linalg.svd(moved, full_matrices=False)
        return FixedSubspace(right[sizes > TOLERANCE * sizes[0]])
