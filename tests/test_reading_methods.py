"""Methods that are fitted to states without the model: discriminants, probes, clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_methods import found, problem, same_span
from tiny_sweeps import SITES, overlap_of, pairs, swept
from torch import Tensor, nn

from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.das.methods import LDA, DifferenceOfMeans, KMeans, Method, Probe, Problem, kmeans
from subspace_lab.das.methods.kmeans import centres_of
from subspace_lab.das.methods.method import principal_span
from subspace_lab.das.methods.probe import logistic_regression

SITE, OTHER = SITES
WIDTH = 9


def with_states(states: Tensor, values: Tensor) -> Problem:
    given = problem({"v": SITE}, width=states.shape[1])
    return replace(given, states=lambda _: states, values=lambda _: values)


def whitened() -> Problem:
    """Three classes whose covariance within is the identity to rounding."""
    g = torch.Generator().manual_seed(0)
    values = torch.arange(90) % 3
    noise = torch.randn(90, WIDTH, generator=g, dtype=torch.double)
    noise = noise - torch.stack([noise[values == c].mean(0) for c in range(3)])[values]
    root = torch.linalg.cholesky(noise.T @ noise / 90)
    noise = torch.linalg.solve(root, noise.T).T
    return with_states((noise + torch.randn(3, WIDTH, generator=g, dtype=torch.double)[values]).float(), values)


def test_with_the_identity_for_a_covariance_it_is_the_difference_of_means() -> None:
    given = whitened()
    for rank in (None, 1):
        same_span(found(LDA(rank), given)["v"], found(DifferenceOfMeans(rank), given)["v"], atol=1e-4)
    stretched = with_states(given.states("v") @ torch.diag(torch.linspace(0.2, 5, WIDTH)), given.values("v"))
    one, other = (found(method, stretched)["v"] for method in (LDA(), DifferenceOfMeans()))
    assert overlap_of(one, other) < 0.9


def test_a_discriminant_is_its_formula() -> None:
    given = problem({"v": SITE})
    states, values = given.states("v").double(), given.values("v")
    means = torch.stack([states[values == c].mean(0) for c in range(3)])
    within = torch.cov((states - means[values]).T, correction=0)
    shrunk = 0.7 * within + 0.3 * within.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.double)
    expected = torch.linalg.inv(shrunk) @ (means[1:] - means[0]).T
    same_span(found(LDA(shrinkage=0.3), given)["v"], expected.T)
    # With fewer examples than dimensions the shrunk covariance still has an inverse.
    few = with_states(states[:6].float(), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found(LDA(), few)["v"].shape == (1, WIDTH)


def test_a_probe_is_at_the_optimum_and_reads_separable_states() -> None:
    g = torch.Generator().manual_seed(1)
    direction = random_orthonormal(WIDTH, 1, 4)[0]
    states = torch.randn(300, WIDTH, generator=g)
    values = (states @ direction > 0).long()
    weights = logistic_regression(states, values, 1e-3)
    assert (
        ((states - states.mean(0)).double() @ (weights[1] - weights[0]) > 0).long() == values
    ).float().mean() > 0.95
    basis = found(Probe(), with_states(states, values))["v"]
    assert basis.shape == (1, WIDTH) and (basis[0] @ direction).abs() > 0.98
    # The gradient of the objective, written out, is 0 there, with the bias that is best for these weights.
    scale = (states - states.mean(0)).double().square().mean().sqrt()
    scaled = (states - states.mean(0)).double() / scale
    w = (weights * scale).requires_grad_()
    bias = torch.zeros((), dtype=torch.double)
    for _ in range(50):  # Newton's method for the one number that counts
        p = torch.sigmoid(scaled @ (w[1] - w[0]).detach() + bias)
        bias = bias + (values - p).sum() / (p * (1 - p)).sum()
    logits = scaled @ w.T + torch.stack([torch.zeros_like(bias), bias])
    loss = nn.functional.cross_entropy(logits, values) + 5e-4 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-6
    same = found(Probe(), with_states(1000 * states + 7, values))["v"]
    same_span(basis, same, atol=1e-3)


def test_a_probe_of_several_values_spans_one_fewer_and_a_rank_takes_the_principal_ones() -> None:
    given = problem({"v": SITE})
    whole, one = found(Probe(), given)["v"], found(Probe(1), given)["v"]
    assert len(whole) == 2 and len(one) == 1
    assert (one @ whole.T).norm().item() == pytest.approx(1, abs=1e-5)
    weights = logistic_regression(given.states("v"), given.values("v"), 1e-3)
    same_span(one, torch.linalg.svd(weights - weights.mean(0)).Vh[:1])


def test_clusters_are_found_whatever_the_variable_says() -> None:
    g = torch.Generator().manual_seed(2)
    centres = 4 * torch.randn(3, WIDTH, generator=g)
    number = torch.randint(0, 3, (200,), generator=g)
    states = centres[number] + 0.3 * torch.randn(200, WIDTH, generator=g)
    true = torch.stack([states[number == k].mean(0) for k in range(3)]).double()
    got = centres_of(states, 3)
    assert torch.cdist(true, got).amin(1).max() < 1e-4
    basis = found(KMeans(3), with_states(states, torch.zeros(200, dtype=torch.long)))["v"]
    same_span(basis, true[1:] - true[0])
    two = number > 0
    halves = with_states(states[two], torch.zeros(int(two.sum()), dtype=torch.long))
    assert (
        found(KMeans(), halves)["v"][0] @ nn.functional.normalize((true[2] - true[1]).float(), dim=0)
    ).abs() > 0.999
    assert torch.equal(got, centres_of(states, 3))


def test_of_several_starts_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(120, 3, generator=torch.Generator().manual_seed(5))

    def total(starts: int, seed: int) -> float:
        monkeypatch.setattr(kmeans, "STARTS", starts)
        return torch.cdist(states.double(), centres_of(states, 6, seed)).amin(1).square().sum().item()

    first, best = ([total(starts, seed) for seed in range(6)] for starts in (1, 8))
    assert all(b <= f + 1e-9 for f, b in zip(first, best, strict=True))
    assert sum(b < f - 1e-6 for f, b in zip(first, best, strict=True)) >= 3


@pytest.mark.parametrize("method", [LDA(1), Probe(1), KMeans()])
def test_they_run_in_a_sweep_for_several_variables(method: Method) -> None:
    fits = swept(method, [SITE, {"v": SITE, "w": OTHER}], pairs=pairs(("v", "w")), seeds=3)
    assert len(fits) == 2 and not fits.failures and {fit.seed for fit in fits} == {0}
    one, other = (fits[0].subspace(name).basis() for name in ("v", "w"))
    assert (one @ other.T).abs().max() < 1e-5 and fits[0].start is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: LDA(rank=0), "above 0"),
        (lambda: LDA(shrinkage=1.5), "0 < shrinkage ≤ 1"),
        (lambda: LDA(shrinkage=0), "above 0"),
        (lambda: Probe(decay=0.0), "above 0"),
        (lambda: KMeans(1), "two or more"),
        (lambda: KMeans([2, 1]), "two or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        method()


def test_states_without_a_difference_are_refused() -> None:
    same = torch.ones(20, WIDTH)
    one_value = torch.zeros(20, dtype=torch.long)
    for method in (LDA(), Probe()):
        with pytest.raises(ValueError, match="has 1 value here"):
            method.learner(with_states(torch.randn(20, WIDTH), one_value))
    with pytest.raises(ValueError, match="2 clusters of 20 states: fewer than that are different"):
        KMeans().learner(with_states(same, one_value))
    with pytest.raises(ValueError, match="do not vary within the values"):
        LDA().learner(with_states(same, torch.arange(20) % 2))
    with pytest.raises(ValueError, match="3 directions span 1 dimensions in place of 2"):
        principal_span(torch.ones(3, 4), None, 2)
