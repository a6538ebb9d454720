"""What makes one pair equal to another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subspace_lab.model.batches import Batch


def keys_of(batches: Sequence[Batch]) -> list[tuple[Any, ...]]:
    """For each row of some batches (base, sources) a key of each, the same for equal inputs; padding does not count."""
    columns: list[Any] = []
    for batch in batches:
        ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
        if batch.positional is not None:
            columns.append(_digests(batch.positional))
        elif isinstance(ids, Tensor):
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            both = zip(ids.tolist(), real.tolist(), strict=True)
            columns.append([tuple(i for i, is_real in zip(*one, strict=True) if is_real) for one in both])
        else:
            tensors = [_digests(t) for t in batch.inputs.values() if isinstance(t, Tensor)]
            columns.append(list(zip(*tensors, strict=True)))
    return list(zip(*columns, strict=True))


def _digests(inputs: Tensor) -> list[bytes]:
    """For each row a digest of its numbers: images are large."""
    rows = inputs.detach().cpu().contiguous()
    return [hashlib.blake2b(row.flatten().view(torch.uint8).numpy().tobytes()).digest() for row in rows]
