"""Parts of a subspace and the scores of exchanging them; used by `illusion` and `purify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import instance
from subspace_lab.core.interventions import interchange
from subspace_lab.core.orthonormal import polar, thin_qr
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, Subspace
from subspace_lab.das.objectives import iia
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.prepared_pairs import Assignment, PreparedPairs

LEAST = 0.1
"""Directions with a smaller singular value after projecting are dropped: scaling them to length 1 would only scale up
noise."""


def projected(
    basis: Float[Tensor, "rank width"], space: Float[Tensor, "size width"]
) -> tuple[Float[Tensor, "left width"], Float[Tensor, " cosine"]]:
    """An orthonormal basis of the part of a subspace that lies in a space, and the cosines of all directions.

    The directions are the singular vectors of the projection P R, in descending order of their singular values (the
    cosines); values below a tenth are dropped. Source: Makelov et al. 2023, who project one direction and normalise it.
    """
    if not len(basis):
        return basis, basis.new_zeros(0)
    cosines, right = torch.linalg.svd(basis @ space.T, full_matrices=False)[1:]
    return right[cosines > LEAST] @ space, cosines.clamp(max=1)


def outside_of(
    basis: Float[Tensor, "rank width"], space: Float[Tensor, "size width"]
) -> Float[Tensor, "left width"]:
    """An orthonormal basis of the part of a subspace that lies outside a space, by the rule of `projected`."""
    rest = basis - (basis @ space.T) @ space
    _, sizes, right = torch.linalg.svd(rest, full_matrices=False)
    return right[sizes > LEAST]


def share_in(basis: Float[Tensor, "rank width"], space: Float[Tensor, "size width"]) -> float:
    """tr(R P Rᵀ) / k: how much of a subspace of rank k lies in a space."""
    return float((basis @ space.T).square().sum()) / len(basis)


# --- exchanges of bases -------------------------------------------------------------------------------------


class _Nothing(nn.Module):
    def forward(self, h: Tensor, source: Any = None) -> Tensor:
        return h


class _OfSome(nn.Module):
    """An exchange of some of the variables that share a site; the sources of the others are ignored."""

    def __init__(self, edit: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.edit, self.names = edit, names

    def forward(self, h: Tensor, source: Mapping[str, Tensor]) -> Tensor:
        edited: Tensor = self.edit(h, {name: source[name] for name in self.names})
        return edited


def edits_of(assignment: Assignment, bases: Mapping[str, Tensor]) -> dict[Site, nn.Module]:
    """{site: the exchange of its bases}; a site whose bases are all empty is left unchanged."""
    there = apart(assignment, {name: basis for name, basis in bases.items() if len(basis)})
    edits: dict[Site, nn.Module] = {}
    for site in dict.fromkeys(assignment.values()):
        names = [name for name, own in assignment.items() if own == site]
        here = {name: there[name] for name in names if name in there}
        if not here:
            edits[site] = _Nothing()
        else:
            edits[site] = _OfSome(interchange(here), list(here)) if len(names) > 1 else interchange(here[names[0]])
    return edits


def apart(assignment: Assignment, bases: Mapping[str, Tensor]) -> dict[str, Subspace]:
    """The bases as subspaces; those that share a site are made orthogonal to each other by the smallest rotation."""
    found: dict[str, Subspace] = {}
    for site in dict.fromkeys(assignment.values()):
        names = [name for name, own in assignment.items() if own == site and name in bases]
        if not names:
            continue
        joined = torch.cat([bases[name] for name in names])
        if len(names) > 1:
            if torch.linalg.matrix_rank(joined, rtol=1e-4) < len(joined):
                raise ValueError(
                    f"{site}: the parts that are left of {names} lie in each other's spans, so they are not separate."
                )
            joined = polar(joined.T)[0].T
        for name, basis in zip(names, joined.split([len(bases[name]) for name in names]), strict=True):
            found[name] = FixedSubspace(basis.float())
    return found


def scores_of(prepared: PreparedPairs, assignment: Assignment, sets: list[dict[str, Any]]) -> list[Tensor]:
    """The IIA of each pair, for each set of bases."""
    edits = [
        {site: edit.to(prepared.backbone.device) for site, edit in edits_of(assignment, bases).items()}
        for bases in sets
    ]
    return [iia(outcome) for outcome in prepared.outcomes(assignment, edits)]


def bases_of(alignment: Alignment) -> dict[str, Tensor]:
    """{variable: its basis in float64 on the CPU}."""
    return {name: basis_of(subspace) for name, (_, subspace) in alignment.variables.items()}


def basis_of(subspace: Subspace) -> Float[Tensor, "rank width"]:
    """An orthonormal basis in float64 on the CPU."""
    return thin_qr(subspace.basis().detach().double().cpu().T)[0].T


def check_linear(pairs: Pairs, alignment: Alignment) -> None:
    """TypeError or ValueError unless this is an alignment of the pairs' variables with linear subspaces."""
    instance(pairs, Pairs, "pairs")
    instance(alignment, Alignment, "alignment", "fits.best().alignment is one")
    if set(alignment.variables) != set(pairs.variables):
        raise ValueError(
            f"The alignment has the variables {list(alignment.variables)}, the pairs exchange {pairs.variables}."
        )
    for name, (site, subspace) in alignment.variables.items():
        if not subspace.linear:
            raise ValueError(
                f"{name!r} at {site} is a nonlinear map; a linear subspace is needed, since only that has a basis."
            )
