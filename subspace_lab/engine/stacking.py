"""Several interventions at one site, trained or evaluated in one run.

The model is the same for all of them, so their batches are concatenated. The blocks above the site run once over all
rows, and each intervention edits its own part of the rows. No result of one depends on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.values import Source


class Stack(nn.Module):
    """K interventions as one edit: the k-th acts on the k-th of K equal parts of the rows.

    Each gives the same result as alone.

    Raises:
        TypeError: one intervention instead of several.
        ValueError: no intervention; (from a call) a number of rows that cannot be divided by K.
    """

    def __init__(self, edits: Sequence[nn.Module]) -> None:
        super().__init__()
        if isinstance(edits, nn.Module) and not isinstance(edits, nn.ModuleList):
            raise TypeError(f"several interventions are expected, found one: write [{type(edits).__name__}(...)].")
        if not edits:
            raise ValueError("A stack needs at least one intervention.")
        self.edits = nn.ModuleList(edits)

    def forward(self, h: Tensor, source: Source = None) -> Tensor:
        if len(h) % len(self.edits):
            raise ValueError(f"{len(h)} rows do not divide into {len(self.edits)} equal shares.")
        shares = h.chunk(len(self.edits))
        if source is None:
            return torch.cat([edit(share) for edit, share in zip(self.edits, shares, strict=True)])
        sources = split(source, len(self.edits))
        return torch.cat([e(h_, s) for e, h_, s in zip(self.edits, shares, sources, strict=True)])


def split(source: Any, shares: int) -> list[Any]:
    """A source, or a source for each variable, in equal parts of its rows."""
    if isinstance(source, Tensor):
        return list(source.chunk(shares))
    parts = {name: states.chunk(shares) for name, states in source.items()}
    return [{name: part[k] for name, part in parts.items()} for k in range(shares)]


def rows_of(source: Any, rows: Tensor) -> Any:
    """Some rows of a source, or of a source for each variable."""
    if isinstance(source, Tensor):
        return source[rows.to(source.device)]
    return {name: states[rows.to(states.device)] for name, states in source.items()}
