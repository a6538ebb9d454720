"""Pairs that are one and the same: their base and all their sources are equal.

A pair that comes eight times is not eight pieces of evidence, and a test pair that was trained on is not held out.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspace_lab.das.estimates import Clusters

if TYPE_CHECKING:
    from subspace_lab.das.pairs import Counterfactuals

PAIR = "pair"  # the label of equal pairs


def keys_of(pairs: Counterfactuals) -> list[tuple[Any, ...]]:
    """For each pair (base, source, …) of what makes it equal to another: the inputs, without padding."""
    columns: list[Any] = []
    for batch in (pairs.base, *pairs.sources.values()):
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


def interval_labels(pairs: Counterfactuals) -> dict[str, tuple[str, ...]]:
    """The labels of the pairs; where some are equal and no entity or template is known, also which are.

    `Clusters.of` makes the clusters of intervals from these.
    """
    labels = dict(pairs.labels)
    if Clusters.of(labels) is not None:
        return labels
    numbers: dict[Any, int] = {}
    found = tuple(str(numbers.setdefault(key, len(numbers))) for key in keys_of(pairs))
    return labels if len(numbers) == len(found) else {**labels, PAIR: found}


def clusters_of(pairs: Counterfactuals) -> Clusters | None:
    """The clusters over which intervals of these pairs are bootstrapped; None where the pairs are independent."""
    return Clusters.of(interval_labels(pairs))


def seen_in(training: Counterfactuals, pairs: Counterfactuals) -> int:
    """How many of some pairs are training pairs too."""
    there = set(keys_of(training))
    return sum(key in there for key in keys_of(pairs))
