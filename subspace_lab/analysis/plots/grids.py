"""The row and the column of a heat map that each site belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_lab.core.sites import Site


@dataclass(frozen=True)
class Grid:
    """Layers as rows, positions or heads as columns.

    Attributes:
        rows: (component, layer, heads) of each row; heads is None if the columns are heads.
        columns: the names of positions or of heads.
        positions: all positions of the sites.
        by_head: whether the columns are heads. Each position then has its own panel.
    """

    rows: tuple[tuple[str, int | None, tuple[int, ...] | None], ...]
    columns: tuple[str, ...]
    positions: tuple[str, ...]
    by_head: bool = False

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Grid:
        """Layer × position."""
        rows = dict.fromkeys((s.component, s.layer, s.heads) for s in sites)
        order = sorted(rows, key=lambda row: (row[1] is not None, row[1] or 0))
        positions = tuple(dict.fromkeys(s.positions for s in sites))
        return cls(tuple(order), positions, positions)

    @classmethod
    def with_heads(cls, sites: Sequence[Site]) -> Grid:
        """Layer × head if each site is a single head of one component and the heads differ, else layer × position."""
        alone = [site.heads[0] for site in sites if site.heads is not None and len(site.heads) == 1]
        components = {site.component for site in sites}
        if len(alone) < len(sites) or len(set(alone)) < 2 or len(components) > 1:
            return cls.of(sites)
        layers = sorted({site.layer for site in sites if site.layer is not None})
        return cls(
            tuple((sites[0].component, layer, None) for layer in layers),
            tuple(map(str, sorted(set(alone)))),
            tuple(dict.fromkeys(site.positions for site in sites)),
            by_head=True,
        )

    def cell(self, site: Site) -> tuple[int, int]:
        """(row, column) of a site."""
        if self.by_head:
            assert site.heads is not None
            return self.rows.index((site.component, site.layer, None)), self.columns.index(str(site.heads[0]))
        return self.rows.index((site.component, site.layer, site.heads)), self.columns.index(site.positions)

    def panel(self, label: str, site: Site) -> str:
        """The name of the panel that shows a method's score at a site."""
        return f"{label}, position {site.positions}" if self.by_head and len(self.positions) > 1 else label

    def column_axis(self) -> str:
        """The title of the columns' axis."""
        if not self.by_head:
            return "position"
        return "head" if len(self.positions) > 1 else f"head  (position {self.positions[0]})"

    def names(self) -> tuple[str, list[str]]:
        """The title of the rows' axis and their labels, which are layers alone if nothing else differs."""
        kinds = {(component, heads) for component, _, heads in self.rows}
        if len(kinds) == 1 and None not in {layer for _, layer, _ in self.rows}:
            component, heads = next(iter(kinds))
            which = f", heads {', '.join(map(str, heads))}" if heads else ""
            return f"layer  ({component}{which})", [str(layer) for _, layer, _ in self.rows]
        return "", [str(Site(c, layer, "all", heads)).removesuffix("@all") for c, layer, heads in self.rows]
