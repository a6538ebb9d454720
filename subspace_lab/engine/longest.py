"""Models whose states of a row depend on the longest row in its batch, so that they cannot be stored.

Rotary embeddings of the kinds "dynamic" (NTK) and "longrope" choose their frequencies by the highest position in the
batch. "dynamic" changes them continuously above a limit; "longrope" has one set of frequencies below its limit and one
above it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.model.batches import Batch


def reaches(batch: Batch) -> Tensor:
    """(rows,) the highest position of each row plus 1, as the model receives it; empty if there are no tokens.

    Without position_ids a model counts columns, so the highest position of each row is that of the padded batch.
    """
    real, given = batch.real_tokens(), batch.inputs.get("position_ids")
    if real is None:
        return torch.zeros(0, dtype=torch.long)
    if not isinstance(given, Tensor):
        return torch.full((len(real),), real.shape[1])
    return given.reshape(-1, given.shape[-1]).amax(-1).cpu() + 1


def depends_on_longest(model: nn.Module, lengths: Tensor) -> str | None:
    """Why rows of these lengths influence each other in one batch; None if they do not."""
    if not len(lengths):
        return None
    low, high = int(lengths.min()), int(lengths.max())
    for module in model.modules():
        for kind, limit in _limits(module):
            if kind == "longrope" and low <= limit < high:
                return (
                    f"rotary embeddings (longrope) that depend on the longest row of a batch, and rows on both sides "
                    f"of {limit} positions"
                )
            if "dynamic" in kind and limit < high and low != high:
                return (
                    f"rotary embeddings (dynamic) that depend on the longest row of a batch, and rows of different "
                    f"lengths, some with more than {limit} positions"
                )
    return None


def _limits(module: nn.Module) -> list[tuple[str, int]]:
    """(kind, number of positions up to which the frequencies are fixed), for a module of rotary embeddings."""
    kinds: Any = getattr(module, "rope_type", None)
    if kinds is None:
        return []
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    found = []
    for name, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        own = parameters.get(name, parameters) if name else parameters
        limit = getattr(module, "original_max_seq_len", None)
        if kind == "longrope":
            limit = own.get("original_max_position_embeddings", limit)
        if isinstance(limit, int):
            found.append((str(kind), limit))
    return found
