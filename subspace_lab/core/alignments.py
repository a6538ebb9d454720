from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from subspace_lab.core.interventions import Intervention, interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace


@dataclass(frozen=True)
class Alignment:
    variables: Mapping[str, tuple[Site, Subspace]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(site for site, _ in self.variables.values()))

    def subspace(self, variable: str | None = None) -> Subspace:
        names = list(self.variables) if variable is None else [variable]
        if len(names) != 1 or names[0] not in self.variables:
            raise ValueError(f"variable={variable!r}; this alignment has {list(self.variables)}.")
        return self.variables[names[0]][1]

    def at(self, site: Site) -> dict[str, Subspace]:
        return {n: s for n, (own, s) in self.variables.items() if own == site}

    def edits(self, make: Callable[..., Intervention] = interchange) -> dict[Site, Intervention]:
        found = {}
        for site in self.sites:
            at = self.at(site)
            found[site] = make(next(iter(at.values()))) if len(at) == 1 else make(at)
        return found
