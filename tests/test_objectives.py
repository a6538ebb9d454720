"""Losses and metrics against their formulas, written out number by number in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from subspace_lab.das.objectives import Outcome, cross_entropy, iia, log_odds, logit_difference, logit_margin

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
def test_gradients_lower_the_loss(loss: object, outcome: Outcome) -> None:
    logits = outcome.logits.clone().requires_grad_()
    loss(logits, outcome.answer).sum().backward()
    assert (logits.grad.gather(1, outcome.answer[:, None]) < 0).all()
    lower = loss(logits.detach() - 0.1 * logits.grad, outcome.answer)
    assert (lower < loss(logits.detach(), outcome.answer)).all()
