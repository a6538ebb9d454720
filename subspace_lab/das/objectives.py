"""Losses that are minimised and scores that are reported, as plain functions to choose from or to add to.

A loss is a function (logits, answer) → (pairs,): logits (pairs, answers) after the interchange, answer (pairs,) the
expected one. A metric is a function of an `Outcome` → (pairs,) values, whose mean is the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What the model says about some pairs, with an interchange and without.

    Attributes:
        logits: of the answers, after the interchange.
        unedited: of the answers, without any intervention.
        answer: the answer that the causal model expects after the interchange.
        base_answer: the one that it expects without.
    """

    logits: Float[Tensor, "pair answer"]
    unedited: Float[Tensor, "pair answer"]
    answer: Int[Tensor, " pair"]
    base_answer: Int[Tensor, " pair"]


Metric = Callable[[Outcome], Tensor]


def cross_entropy(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """−log p(expected answer), in nats, over the answers' logits."""
    return nn.functional.cross_entropy(logits.float(), answer, reduction="none")


def logit_difference(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The highest logit of another answer less that of the expected one: negative where the answer is right."""
    return -_margin(logits, answer)


def iia(outcome: Outcome) -> Float[Tensor, " pair"]:
    """Interchange intervention accuracy: 1 where the highest of the answers' logits is the expected answer's."""
    return (outcome.logits.argmax(-1) == outcome.answer).float()


def logit_margin(outcome: Outcome) -> Float[Tensor, " pair"]:
    """The expected answer's logit less the highest of the others."""
    return _margin(outcome.logits, outcome.answer)


def log_odds(outcome: Outcome) -> Float[Tensor, " pair"]:
    """By how much the interchange moves the log odds of the expected answer against the base's, in nats.

    [lp(b) − lp(a)] without plus [lp(a) − lp(b)] with the interchange, for the base's answer b and the expected
    answer a; 0 in pairs that should not change (Arora et al. 2024, arXiv 2402.12560, eq. 3).
    """

    def gap(logits: Tensor) -> Tensor:
        picked = [
            logits.float().gather(1, index[:, None])[:, 0] for index in (outcome.answer, outcome.base_answer)
        ]
        return picked[0] - picked[1]  # the normaliser of the log-probabilities cancels

    return gap(outcome.logits) - gap(outcome.unedited)


def _margin(logits: Tensor, answer: Tensor) -> Tensor:
    logits = logits.float()
    expected = logits.gather(1, answer[:, None])[:, 0]
    others = logits.scatter(1, answer[:, None], -torch.inf).amax(1)
    return expected - others
