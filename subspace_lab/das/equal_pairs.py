"""Pairs that are one and the same: their base and all their sources are equal.

A pair that comes eight times is not eight pieces of evidence, and a test pair that was trained on is not held out.
"""

from __future__ import annotations

from typing import Any

from subspace_lab.core.estimates import Clusters
from subspace_lab.das._pair_keys import keys_of as _keys_of
from subspace_lab.das.pairs import Counterfactuals

PAIR = "pair"  # the label of equal pairs


def keys_of(pairs: Counterfactuals) -> list[tuple[Any, ...]]:
    """For each pair (base, source, …) of what makes it equal to another: the inputs, without padding."""
    return _keys_of((pairs.base, *pairs.sources.values()))


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


def different_in(pairs: Counterfactuals) -> int:
    """How many different pairs there are."""
    return len(set(keys_of(pairs)))


def seen_in(training: Counterfactuals, pairs: Counterfactuals) -> int:
    """How many of some pairs are training pairs too."""
    there = set(keys_of(training))
    return sum(key in there for key in keys_of(pairs))
