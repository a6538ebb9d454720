"""Intervals: the values of the literature, their own equation, and how often they cover."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from subspace_lab.core.estimates import (
    Clusters,
    Estimate,
    _times_drawn,
    bootstrap_mean,
    cluster_mean,
    estimate,
    proportion,
)


def outcomes(successes: int, n: int) -> Tensor:
    return torch.arange(n) < successes


def coverage(intervals: list[tuple[float, float]], p: float) -> float:
    """How often the interval of a binomial count contains p, summed over all counts."""
    n = len(intervals) - 1
    weights = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    return sum(w for w, (low, high) in zip(weights, intervals, strict=True) if low <= p <= high)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3; to four digits.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_limits(successes: int, n: int, low: float, high: float) -> None:
    found = proportion(outcomes(successes, n))
    assert (found.value, found.n) == (successes / n, n)
    assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)
    mirrored = proportion(~outcomes(successes, n))
    assert mirrored.low == pytest.approx(1 - found.high) and mirrored.high == pytest.approx(1 - found.low)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_limits_solve_their_equation(confidence: float) -> None:
    """(p̂ − p)² = z² p (1 − p)/n at both limits."""
    found = proportion(outcomes(31, 50), confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for p in (found.low, found.high):
        assert (found.value - p) ** 2 == pytest.approx(z * z * p * (1 - p) / 50)
    assert found.low < found.value < found.high


def test_wilson_covers_what_it_claims() -> None:
    """Exactly, by summing over all counts; the textbook's p̂ ± z√(p̂(1 − p̂)/n) does not."""
    n = 60
    wilson, wald = [], []
    for k in range(n + 1):
        found = proportion(outcomes(k, n))
        half = 1.96 * (found.value * (1 - found.value) / n) ** 0.5
        wilson.append((found.low, found.high))
        wald.append((found.value - half, found.value + half))
    shares = [i / 100 for i in range(3, 98)]
    covered = [coverage(wilson, p) for p in shares]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.9
    assert min(coverage(wald, p) for p in shares) < 0.85


def test_an_interval_at_the_edge_has_width_and_stays_inside() -> None:
    for k in (0, 40):
        found = proportion(outcomes(k, 40))
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert 0.05 < found.high - found.low < 0.15


def test_the_bootstrap_has_the_width_of_theory() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 7
    found = bootstrap_mean(values, draws=4000)
    assert found.value == pytest.approx(values.double().mean().item()) and found.n == 400
    theory = 2 * 1.96 * values.std().item() / 20
    assert found.high - found.low == pytest.approx(theory, rel=0.08)
    assert found.low < found.value < found.high
    narrow = bootstrap_mean(values, confidence=0.5, draws=4000)
    assert (narrow.high - narrow.low) / (found.high - found.low) == pytest.approx(0.674 / 1.96, rel=0.1)


def test_the_bootstrap_covers_a_skewed_mean() -> None:
    """Exponential values, mean 1: percentile intervals of 80 cases cover it a little less often than 95 %."""
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for repeat in range(300):
        values = torch.empty(80).exponential_(generator=generator)
        found = bootstrap_mean(values, draws=300, seed=repeat)
        hits += found.low <= 1 <= found.high
    assert 0.88 < hits / 300 < 0.98


def test_the_bootstrap_is_its_seed() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)
    assert bootstrap_mean(torch.full((9,), 2.5)) == Estimate(2.5, 2.5, 2.5, 9)


def test_shapes_do_not_matter() -> None:
    grid = outcomes(7, 24).view(2, 3, 4)
    assert proportion(grid) == proportion(grid.flatten())
    assert bootstrap_mean(grid.float()) == bootstrap_mean(grid.flatten().float())


@pytest.mark.parametrize("of_nothing", [proportion, bootstrap_mean])
def test_nothing_has_no_score(of_nothing: Callable[..., Estimate]) -> None:
    with pytest.raises(ValueError, match="0 cases is not defined"):
        of_nothing(torch.empty(0))


def test_an_estimate_prints_itself_with_its_interval() -> None:
    assert str(Estimate(0.876, 0.8, 0.9312, 50)) == "0.88 [0.80, 0.93]"


# --- clusters -----------------------------------------------------------------------------------------------


def drawn(
    entities: int, templates: int, n: int, spread: tuple[float, float], seed: int
) -> tuple[Tensor, Clusters]:
    """Cases whose chance of being right depends on their entity and template."""
    g = torch.Generator().manual_seed(seed)
    of_entity = torch.randn(entities, generator=g) * spread[0]
    of_template = torch.randn(templates, generator=g) * spread[1]
    e, t = torch.randint(entities, (n,), generator=g), torch.randint(templates, (n,), generator=g)
    right = torch.rand(n, generator=g) < torch.sigmoid(1 + of_entity[e] + of_template[t])
    return right.float(), Clusters(("entity", "template"), (e, t))


@pytest.mark.parametrize(("spread", "templates"), [((1.0, 0.5), 12), ((1.5, 0.0), 30)])
def test_cluster_intervals_cover_new_entities_and_templates_and_wilson_does_not(
    spread: tuple[float, float], templates: int
) -> None:
    g = torch.Generator().manual_seed(9)
    one, other = torch.randn(3000, 1, generator=g) * spread[0], torch.randn(1, 3000, generator=g) * spread[1]
    truth = torch.sigmoid(1 + one + other).mean().item()
    by_cluster = wilson = 0
    for seed in range(150):
        right, clusters = drawn(40, templates, 400, spread, seed)
        found, alone = cluster_mean(right, clusters, draws=500), proportion(right.bool())
        by_cluster += found.low <= truth <= found.high
        wilson += alone.low <= truth <= alone.high
        assert found.low <= alone.low and found.high >= alone.high and found.value == pytest.approx(alone.value)
    assert by_cluster >= 0.91 * 150 > 0.8 * 150 > wilson


def test_cases_that_agree_within_an_entity_count_as_one() -> None:
    """Of 40 cases of each of 10 entities the interval is about that of 10 cases."""
    right = (torch.arange(10) < 7).float()
    clusters = Clusters(("entity",), (torch.arange(10).repeat_interleave(40),))
    found, few = cluster_mean(right.repeat_interleave(40), clusters), proportion(right.bool())
    many = proportion(right.repeat_interleave(40).bool())
    assert found.n == 400 and found.high - found.low > 4 * (many.high - many.low)
    assert found.low == pytest.approx(few.low, abs=0.07) and found.high == pytest.approx(few.high, abs=0.1)


def test_where_all_agree_the_entities_are_the_cases() -> None:
    clusters = Clusters(("entity", "template"), (torch.arange(400) % 8, torch.arange(400) % 3))
    for value in (0.0, 1.0):
        found, few = cluster_mean(torch.full((400,), value), clusters), proportion(torch.full((8,), bool(value)))
        assert (found.low, found.high, found.n) == (few.low, few.high, 400)
    assert cluster_mean(torch.full((400,), 2.5), clusters) == Estimate(2.5, 2.5, 2.5, 400)


def test_the_bootstrap_of_two_labels_draws_both() -> None:
    """By a loop over the draws, written out."""
    right, clusters = drawn(6, 4, 60, (1.0, 1.0), 3)
    found = cluster_mean(right, clusters, draws=300, seed=5)
    times = [_times_drawn(size, 300, 5 + i) for i, size in enumerate((6, 4))]
    assert all((t.sum(1) == t.shape[1]).all() for t in times)
    means = []
    for d in range(300):
        weight = times[0][d][clusters.numbers[0]] * times[1][d][clusters.numbers[1]]
        means.append((weight * right).sum() / weight.sum())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    assert found.low == pytest.approx(low) and found.high == pytest.approx(high)


def test_clusters_are_those_labels_that_differ() -> None:
    labels = {"entity": ("a", "b", "a", "c"), "template": ("x",) * 4, "kind": ("p", "q", "p", "q")}
    found = Clusters.of(labels)
    assert found is not None and found.names == ("entity",) and found.numbers[0].tolist() == [0, 1, 0, 2]
    assert str(found) == "3 values of 'entity'" and Clusters.of({"kind": ("p", "q")}) is None
    values = torch.tensor([1.0, torch.nan, 0.0, 1.0])
    assert estimate(values, found) == cluster_mean(values[[0, 2, 3]], found.where(~values.isnan()))
    assert estimate(values) == proportion(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="None of 2 cases has a value"):
        estimate(torch.full((2,), torch.nan))
