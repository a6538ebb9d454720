"""Losses and metrics against their formulas, written out number by number in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from subspace_lab.das.objectives import (
    Divergence,
    JensenShannon,
    Outcome,
    SquaredError,
    cause,
    cross_entropy,
    disentangle,
    iia,
    iia_vocabulary,
    iso,
    log_odds,
    logit_difference,
    logit_margin,
)

CASES = 40


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    g = torch.Generator().manual_seed(0)
    logits, before = (3 * torch.randn(CASES, 5, generator=g) for _ in range(2))
    answer, base = (torch.randint(0, 5, (CASES,), generator=g) for _ in range(2))
    base[:8] = answer[:8]  # pairs that should not change
    return Outcome(logits, before, answer, base)


def log_probability(logits: list[float], index: int) -> float:
    return logits[index] - math.log(sum(math.exp(x) for x in logits))


def close(found: Tensor, expected: list[float]) -> None:
    assert found.shape == (CASES,)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.double), rtol=1e-5, atol=1e-5)


def numbers(outcome: Outcome) -> list[tuple[list[float], list[float], int, int]]:
    return list(
        zip(
            outcome.logits.double().tolist(),
            outcome.unedited.double().tolist(),
            outcome.answer.tolist(),
            outcome.base_answer.tolist(),
            strict=True,
        )
    )


def test_cross_entropy_is_that_of_the_expected_answer(outcome: Outcome) -> None:
    expected = [-log_probability(logits, answer) for logits, _, answer, _ in numbers(outcome)]
    close(cross_entropy(outcome.logits, outcome.answer), expected)


def test_margins_are_against_the_highest_other_answer(outcome: Outcome) -> None:
    expected = [
        logits[answer] - max(x for i, x in enumerate(logits) if i != answer)
        for logits, _, answer, _ in numbers(outcome)
    ]
    close(logit_margin(outcome), expected)
    close(logit_difference(outcome.logits, outcome.answer), [-x for x in expected])
    assert ((logit_margin(outcome) > 0) == (iia(outcome) == 1)).all()


def test_iia_is_the_share_of_expected_answers(outcome: Outcome) -> None:
    expected = [
        float(max(range(5), key=lambda i: logits[i]) == answer) for logits, _, answer, _ in numbers(outcome)
    ]
    assert iia(outcome).tolist() == expected and 0 < sum(expected) < CASES


def test_log_odds_are_those_of_arora_et_al(outcome: Outcome) -> None:
    """log(p(b)/p(a)) without the interchange plus log(p(a)/p(b)) with it, eq. 3."""
    expected = [
        (log_probability(before, base) - log_probability(before, answer))
        + (log_probability(logits, answer) - log_probability(logits, base))
        for logits, before, answer, base in numbers(outcome)
    ]
    close(log_odds(outcome), expected)
    assert log_odds(outcome)[:8].abs().max() == 0 and log_odds(outcome)[8:].abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(outcome: Outcome, dtype: torch.dtype) -> None:
    """Of logits that were rounded to a half precision the losses are those of the rounded numbers."""
    half, exact = outcome.logits.to(dtype), outcome.logits.to(dtype).float()
    for loss in (cross_entropy, logit_difference):
        found = loss(half, outcome.answer)
        assert found.dtype == torch.float32 and torch.equal(found, loss(exact, outcome.answer))
    rounded = Outcome(half, half, outcome.answer, outcome.base_answer)
    assert log_odds(rounded).dtype == logit_margin(rounded).dtype == torch.float32


@pytest.mark.parametrize("loss", [cross_entropy, logit_difference])
def test_gradients_lower_the_loss(loss: Callable[..., Tensor], outcome: Outcome) -> None:
    logits = outcome.logits.clone().requires_grad_()
    loss(logits, outcome.answer).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.gather(1, outcome.answer[:, None]) < 0).all()
    lower = loss(logits.detach() - 0.1 * logits.grad, outcome.answer)
    assert (lower < loss(logits.detach(), outcome.answer)).all()


# --- losses towards a distribution --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    one, other = (3 * torch.randn(CASES, 5, generator=g, dtype=torch.double) for _ in range(2))
    return one, other


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_losses_towards_a_distribution_are_their_formulas(two: tuple[Tensor, Tensor]) -> None:
    p, q = (logits.softmax(-1) for logits in two)
    m = (p + q) / 2
    for loss, expected in (
        (Divergence(), kl(q, p)),
        (SquaredError(), ((p - q) ** 2).sum(-1)),
        (JensenShannon(), (kl(p, m) + kl(q, m)) / 2),
    ):
        torch.testing.assert_close(loss(*two).double(), expected, rtol=1e-4, atol=1e-5)
        assert loss(two[0], two[0]).abs().max() < 1e-6
        moved = two[0].clone().requires_grad_()
        loss(moved, two[1]).sum().backward()
        assert moved.grad is not None
        assert (loss(moved.detach() - 0.1 * moved.grad, two[1]) < loss(*two)).all()


def test_jensen_shannon_is_symmetric_and_bounded(two: tuple[Tensor, Tensor]) -> None:
    loss = JensenShannon()
    torch.testing.assert_close(loss(*two), loss(*reversed(two)))
    apart = torch.eye(5)[:2] * 200
    assert loss(apart[:1], apart[1:]).item() == pytest.approx(math.log(2), abs=1e-6)
    moved = apart[:1].clone().requires_grad_()
    loss(moved, apart[1:]).sum().backward()
    assert moved.grad is not None
    assert moved.grad.isfinite().all()
    assert (loss(*two) < math.log(2)).all() and (Divergence()(*two) > math.log(2)).any()


def test_towards_the_answer_divergence_is_cross_entropy(outcome: Outcome) -> None:
    assert torch.allclose(Divergence("answer")(outcome.logits, outcome.answer),
                          cross_entropy(outcome.logits, outcome.answer), atol=1e-5)  # fmt: skip
    brier = SquaredError("answer")(outcome.logits, outcome.answer)
    one_hot = nn.functional.one_hot(outcome.answer, 5)
    torch.testing.assert_close(brier, (outcome.logits.softmax(-1) - one_hot).square().sum(-1))
    with pytest.raises(ValueError, match="possible are 'source' and 'answer'"):
        Divergence("base")


# --- cause and isolation ------------------------------------------------------------------------------------


def test_cause_and_iso_are_of_their_kinds_alone(outcome: Outcome) -> None:
    kinds = tuple(["cause"] * 10 + ["isolate"] * 25 + ["other"] * 5)
    some = replace(outcome, kinds=kinds)
    right = iia(outcome)
    assert torch.equal(cause(some)[:10], right[:10]) and cause(some)[10:].isnan().all()
    assert (
        torch.equal(iso(some)[10:35], right[10:35])
        and iso(some)[:10].isnan().all()
        and iso(some)[35:].isnan().all()
    )
    mean = (right[:10].mean() + right[10:35].mean()) / 2
    assert (
        disentangle(some).nanmean().item() == pytest.approx(mean.item()) and disentangle(some)[35:].isnan().all()
    )
    of_answers = replace(outcome, kinds=tuple(["changes"] * 15 + ["stays"] * 25))
    assert cause(of_answers).isfinite().sum() == 15 and iso(of_answers).isfinite().sum() == 25
    with pytest.raises(ValueError, match=r"'isolate' or 'stays'; the kinds here are \['cause'\]"):
        iso(replace(outcome, kinds=("cause",) * CASES))
    with pytest.raises(ValueError, match="made without a model"):
        iia_vocabulary(outcome)
