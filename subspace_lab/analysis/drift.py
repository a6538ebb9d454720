"""Subspaces of different sites in common coordinates.

The same information may be written in other directions at another layer, and independently trained models share no
directions at all. A map from the states at one site to those at another, fitted on states of the same texts, carries a
basis over; then overlaps mean something again. A map fitted freely carries almost anything somewhere near, so the null
is the same map on random subspaces, which `compare` draws by itself.
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
    """The orthogonal map nearest to taking one to the other: W = U Vᵀ of the SVD of HᵀG (Schönemann 1966).

    Turns and mirrors, never stretches: what it brings together had the same shape before.
    """
    left, _, right = torch.linalg.svd(one.T @ other, full_matrices=False)
    return left @ right


def ridge(
    one: Float[Tensor, "example w1"], other: Float[Tensor, "example w2"], strength: float = 1e-2
) -> Float[Tensor, "w1 w2"]:
    """The linear map W = (HᵀH + λI)⁻¹ HᵀG with λ = strength · tr(HᵀH)/width.

    It may stretch and forget, so random subspaces come near as well: read it beside its null.
    """
    moment = one.T @ one
    penalty = strength * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(moment + penalty, one.T @ other)


@dataclass(frozen=True, eq=False)
class DriftCorrected:
    """Overlap of the row's subspace, carried to the column's site, with the column's.

    A direction r, in which the states at the first site may move, becomes r W. At one site nothing is carried.

    Attributes:
        pairs: of the training split, whose sources' states the map is fitted on; of each model where several are
            compared, the same pairs under each.
        fit: `procrustes`, `ridge` or a function like them (`functools.partial(ridge, strength=0.1)`).
    """

    pairs: Looks
    fit: Map = procrustes
    label: str = "drift-corrected overlap"
    _maps: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def matrix(self, items: Sequence[Compared]) -> list[list[float]]:
        """As `Measure.matrix`.

        Raises:
            ValueError: sites with different numbers of positions, of which no state belongs to one of the other.
        """
        return [[overlap(self.carried(one, other), other.subspace) for other in items] for one in items]

    def carried(self, one: Compared, other: Compared) -> FixedSubspace:
        """A subspace in the coordinates of another one's site."""
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
                    f"{one.site} has {len(rows)} positions in these texts, {other.site} {len(others)}: a map between "
                    "them needs the states of one to belong to those of the other."
                )
            self._maps[key] = self.fit(first - first.mean(0), second - second.mean(0))
        moved = basis @ self._maps[key]
        _, sizes, right = torch.linalg.svd(moved, full_matrices=False)
        return FixedSubspace(right[sizes > TOLERANCE * sizes[0]])
