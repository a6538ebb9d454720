"""Scores with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """The mean of n cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def proportion(correct: Tensor, confidence: float = 0.95) -> Estimate:
    """The share of True values with Wilson's score interval, which has a width above 0 even at shares of 0 and 1.

    The interval is about new pairs from the same distribution, for this one fitted subspace. It does not cover the
    spread between seeds, and it ignores that pairs may share an entity.

    Raises:
        ValueError: no cases.
    """
    n = correct.numel()
    if not n:
        raise ValueError("A share of 0 cases is not defined.")
    share = correct.double().mean().item()
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At a share of 0 or 1 one limit is the share itself; rounding must not put the share outside of the interval.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def estimate(values: Tensor, clusters: Clusters | None = None, what: str = "a value") -> Estimate:
    """The mean of the cases' values with its 95 % interval; cases whose value is NaN are left out.

    Without clusters the interval is Wilson's if all values are 0 or 1, otherwise a bootstrap over the cases. With
    clusters it is the interval of `cluster_mean`.

    Args:
        what: the values are, for the error message.

    Raises:
        ValueError: all values are NaN.
    """
    there = ~values.isnan()
    if not bool(there.any()):
        raise ValueError(f"None of {len(values)} cases has {what}: all are NaN, and there is no mean.")
    if not bool(there.all()):
        values, clusters = values[there], None if clusters is None else clusters.where(there)
    share = bool(((values == 0) | (values == 1)).all())
    if clusters is not None:
        return cluster_mean(values, clusters)
    return proportion(values.bool()) if share else bootstrap_mean(values)


def bootstrap_mean(values: Tensor, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Estimate:
    """The mean with a percentile bootstrap interval over the cases (Efron 1979)."""
    n = values.numel()
    if not n:
        raise ValueError("A mean of 0 cases is not defined.")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n, (draws, n), generator=generator)
    means = values.double().flatten()[picks].mean(1)
    low, high = means.quantile(_tails(confidence)).tolist()
    return Estimate(values.double().mean().item(), low, high, n)


@dataclass(frozen=True)
class Clusters:
    """Which cases belong together, because they share an entity or a template.

    Attributes:
        names: one or two labels.
        numbers: for each label (cases,) the number of the cluster.
    """

    names: tuple[str, ...]
    numbers: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, labels: Mapping[str, Sequence[str]], names: Sequence[str] = ("entity", "template")
    ) -> Clusters | None:
        """The clusters of those labels that exist and that differ between cases; None if there are none.

        If neither is known, the label "pair" says which cases come from equal pairs.
        """
        known = tuple(name for name in names if len(set(labels.get(name, ()))) > 1)
        known = known or tuple(name for name in ("pair",) if name in labels)
        numbers = []
        for name in known:
            number = {text: i for i, text in enumerate(dict.fromkeys(labels[name]))}
            numbers.append(torch.tensor([number[text] for text in labels[name]]))
        return cls(known, tuple(numbers)) if known else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many clusters each label has."""
        return tuple(len(numbers.unique()) for numbers in self.numbers)

    def where(self, there: Tensor) -> Clusters:
        """The clusters of some of the cases."""
        return Clusters(self.names, tuple(numbers[there] for numbers in self.numbers))

    def __str__(self) -> str:
        whats = ("different pairs" if name == "pair" else f"values of {name!r}" for name in self.names)
        return " and ".join(f"{n} {what}" for n, what in zip(self.sizes, whats, strict=True))


def cluster_mean(
    values: Tensor, clusters: Clusters, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The mean of clustered cases, with an interval that is about new clusters.

    Each bootstrap draw takes as many entities as there are, with replacement, and independently as many templates. The
    weight of a case is the number of times its entity was drawn, multiplied by the number of times its template was
    drawn (Owen 2007, "The pigeonhole bootstrap", arXiv 0712.1111); with one label it is the number of times its cluster
    was drawn. The limits are percentiles of the draws' means.

    The interval is never narrower than the interval of independent cases. If all values are equal, the bootstrap has no
    spread; if they are all 0 or all 1, the interval is then Wilson's for as many cases as the first label has clusters.

    Raises:
        ValueError: no cases.
    """
    values = values.double().flatten()
    n = len(values)
    if not n:
        raise ValueError("A mean of 0 cases is not defined.")
    share = bool(((values == 0) | (values == 1)).all())
    if bool((values == values[0]).all()):
        single = float(values[0])
        if not share:
            return Estimate(single, single, single, n)
        few = proportion(values[:1].bool().expand(clusters.sizes[0]), confidence)
        return replace(few, n=n)
    index = [numbers.unique(return_inverse=True)[1] for numbers in clusters.numbers]
    sizes = [int(numbers.max()) + 1 for numbers in index]
    times = [_times_drawn(size, draws, seed + i) for i, size in enumerate(sizes)]
    if len(index) == 1:
        sums, counts = (
            values.new_zeros(sizes[0]).index_add(0, index[0], of) for of in (values, torch.ones_like(values))
        )
        total, weight = times[0] @ sums, times[0] @ counts
    else:
        cell = index[0] * sizes[1] + index[1]
        empty = values.new_zeros(sizes[0] * sizes[1])
        sums, counts = (empty.index_add(0, cell, of).view(sizes) for of in (values, torch.ones_like(values)))
        total, weight = (((times[0] @ of) * times[1]).sum(1) for of in (sums, counts))
    # If few combinations of the clusters have cases, a draw can contain no case at all.
    means = (total / weight)[weight > 0]
    low, high = means.quantile(_tails(confidence)).tolist()
    alone = proportion(values.bool(), confidence) if share else bootstrap_mean(values, confidence=confidence)
    return Estimate(values.mean().item(), min(low, alone.low), max(high, alone.high), n)


@lru_cache(maxsize=16)
def _times_drawn(size: int, draws: int, seed: int) -> Tensor:
    """(draws, size): how often each cluster is drawn in each draw. The same for all fits of a sweep."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(size, (draws, size), generator=generator)
    return torch.zeros(draws, size, dtype=torch.double).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.double)
    )


def _tails(confidence: float) -> Tensor:
    return torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.double)
