"""Creates an adapter that starts in the subspaces of an alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.parts import joined
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.reft.config import ORTHONORMAL, ReftConfig


@dataclass(frozen=True)
class Start:
    """The subspaces in which an adapter starts, and where they come from.

    Attributes:
        subspaces: {site: subspace}, with all variables of a site in one subspace.
        variables: the variable at each site; empty if several variables share one site, as parts of one basis.
        facts: the facts of the alignment.
    """

    subspaces: Mapping[Site, Subspace]
    variables: tuple[str, ...]
    facts: Mapping[str, Any]

    def at(self, sites: Sequence[Site], backbone: Backbone) -> dict[Site, Subspace]:
        """The subspaces by the adapter's own sites, whose layers are counted from 0.

        Raises:
            ValueError: a subspace whose width is not that of its site.
        """
        found = dict(zip(sites, self.subspaces.values(), strict=True))
        for site, subspace in found.items():
            if subspace.width != backbone.width(site):
                raise ValueError(
                    f"{site} has width {backbone.width(site)}; the subspace of the alignment there was found in "
                    f"width {subspace.width}."
                )
        return found


def started(alignment: Alignment, config: ReftConfig | None) -> tuple[ReftConfig, Start]:
    """The configuration of an adapter that starts in an alignment's subspaces, and the start.

    Args:
        config: all settings that the alignment does not contain.

    Raises:
        ValueError: a method without orthonormal basis, or an alignment that a single adapter cannot have.
    """
    config = config or ReftConfig()
    if config.method not in ORTHONORMAL:
        raise ValueError(
            f"{config.method} has no orthonormal basis that could start in an alignment's subspaces; "
            f"{', '.join(ORTHONORMAL)} have."
        )
    sites = alignment.sites
    here = {site: alignment.at(site) for site in sites}
    sizes = {site: {name: s.rank for name, s in subspaces.items()} for site, subspaces in here.items()}
    same = {(site.component, site.positions, site.heads, sum(sizes[site].values())) for site in sites}
    layers = [site.layer for site in sites if site.layer is not None]
    several = any(len(subspaces) > 1 for subspaces in here.values())
    if len(same) != 1 or len(layers) != len(sites) or sites[0].heads is not None or (several and len(sites) > 1):
        shown = {name: f"{site}, rank {subspace.rank}" for name, (site, subspace) in alignment.variables.items()}
        raise ValueError(
            f"No single adapter can have {shown}: an adapter has one component, one set of positions and one rank in "
            "all its layers, no single heads, and several variables at one site only. Make several adapters: "
            "`add_adapter(name, alignment.only(…))`."
        )
    component, positions, _, rank = same.pop()
    config = replace(
        config,
        component=component,
        positions=positions,
        rank=rank,
        layers=layers,
        tied="all",
        parts=sizes[sites[0]] if several else (),
    )
    if several:
        parts = joined(here[sites[0]])
        return config, Start({sites[0]: next(iter(parts.values())).whole}, (), alignment.facts)
    found = {site: subspace for site, subspace in alignment.variables.values()}
    return config, Start(found, tuple(alignment.variables), alignment.facts)
