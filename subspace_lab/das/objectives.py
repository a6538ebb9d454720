"""Losses that are minimised and scores that are reported, as plain functions to choose from or to add to.

A loss is a function (logits, answer) → (pairs,): logits (pairs, answers) after the interchange, answer (pairs,) the
expected one. A loss towards what the model itself says about the source is a `Towards`. A metric is a function of an
`Outcome` → (pairs,) values, NaN for pairs that it says nothing about; the mean of the others is the score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
        kinds: of the pairs, as `Counterfactuals.kinds`.
        run_vocabulary, run_complement: what `vocabulary` and `complement` run, once for all that ask.
    """

    logits: Float[Tensor, "pair answer"]
    unedited: Float[Tensor, "pair answer"]
    answer: Int[Tensor, " pair"]
    base_answer: Int[Tensor, " pair"]
    kinds: tuple[str, ...] = ()
    run_vocabulary: Callable[[], Tensor] | None = None
    run_complement: Callable[[], Tensor] | None = None

    def vocabulary(self) -> Int[Tensor, " pair"]:
        """The answer that has the highest logit of the whole vocabulary, −1 where that token is no answer.

        It takes a run of its own, the first time that a metric asks.
        """
        return _run(self.run_vocabulary, "what the whole vocabulary says")

    def complement(self) -> Float[Tensor, "pair answer"]:
        """The answers' logits after everything but the subspace was exchanged: h + (I − RᵀR)(h_source − h).

        It takes a run of its own, the first time that a metric asks.

        Raises:
            ValueError: several variables at one site, whose sources differ in what lies outside.
        """
        return _run(self.run_complement, "what the exchange of the complement gives")

    def of_kind(self, *kinds: str) -> Bool[Tensor, " pair"]:
        """Which pairs are of some kinds (ValueError where none is, naming those that there are)."""
        found = torch.tensor([kind in kinds for kind in self.kinds], dtype=torch.bool)
        if not bool(found.any()):
            raise ValueError(
                f"No pair of the kind {' or '.join(map(repr, kinds))}; the kinds here are {sorted(set(self.kinds))}."
            )
        return found


CAUSE, ISOLATE = ("cause", "changes"), ("isolate", "stays")
"""Kinds of pairs in which the answer has to become the source's, and in which it has to stay the base's."""

Metric = Callable[[Outcome], Tensor]


def cross_entropy(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """−log p(expected answer), in nats, over the answers' logits."""
    return nn.functional.cross_entropy(logits.float(), answer, reduction="none")


def logit_difference(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The highest logit of another answer less that of the expected one: negative where the answer is right."""
    return -_margin(logits, answer)


@dataclass(frozen=True)
class Towards(ABC):
    """How far p, the distribution over the answers, is from a target distribution q.

    Attributes:
        target: "source" takes for q what the model says about the source, without any intervention: then the edit
            is asked to give all of the source's answer, not its highest alone. It makes sense where the expected
            answer is the source's. "answer" takes the expected answer with probability 1.
    """

    target: str = "source"

    def __post_init__(self) -> None:
        if self.target not in ("source", "answer"):
            raise ValueError(f"target={self.target!r}: possible are 'source' and 'answer'.")

    def __call__(self, logits: Float[Tensor, "pair answer"], target: Tensor) -> Float[Tensor, " pair"]:
        """The distance by pair.

        Args:
            logits: after the interchange.
            target: (pairs, answers) the source's logits, or (pairs,) the expected answers.
        """
        log_p = logits.float().log_softmax(-1)
        if target.ndim == 1:
            return self.distance(log_p, nn.functional.one_hot(target, logits.shape[-1]).float())
        return self.distance(log_p, target.float().softmax(-1))

    @abstractmethod
    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        """The distance of p = exp(log_p) from q."""


@dataclass(frozen=True)
class Divergence(Towards):
    """KL(q ‖ p) = Σ q log(q/p), in nats: 0 where p is q. With target="answer" it is the cross-entropy."""

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        return (torch.xlogy(q, q) - q * log_p).sum(-1)


@dataclass(frozen=True)
class SquaredError(Towards):
    """Σ (p − q)²; with target="answer" the score of Brier (1950)."""

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        return (log_p.exp() - q).square().sum(-1)


@dataclass(frozen=True)
class JensenShannon(Towards):
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2, in nats: symmetric, 0 where p is q, at most log 2.

    The loss that matches distributions in CDAS (arXiv 2602.05234).
    """

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        p = log_p.exp()
        # The logarithm of a mean that is 0 has no gradient; its factor is 0 there as well.
        log_m = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        return ((p * log_p + torch.xlogy(q, q)) - (p + q) * log_m).sum(-1) / 2


def iia(outcome: Outcome) -> Float[Tensor, " pair"]:
    """Interchange intervention accuracy: 1 where the highest of the answers' logits is the expected answer's."""
    return (outcome.logits.argmax(-1) == outcome.answer).float()


def iia_vocabulary(outcome: Outcome) -> Float[Tensor, " pair"]:
    """1 where the highest logit of the whole vocabulary is the expected answer's.

    It is at most `iia`: an edit that makes the model say something else altogether is no success. A model that says
    other things than the answers by itself (a comma, an adverb) scores low whatever the edit: ask for this where the
    prompts leave the answers alone.
    """
    return (outcome.vocabulary() == outcome.answer).float()


def complement_stays(outcome: Outcome) -> Float[Tensor, " pair"]:
    """1 where the answer stays the base's while everything but the subspace is exchanged.

    IIA asks whether the subspace is enough to change the answer; this asks whether it is needed: a variable that is
    also held elsewhere in the state moves the answer from there. It says so where the source differs from the base
    in nothing else that the answer depends on. The full vector has no complement and scores what the model knows.
    """
    return (outcome.complement().argmax(-1) == outcome.base_answer).float()


def cause(outcome: Outcome) -> Float[Tensor, " pair"]:
    """IIA over the pairs of kind "cause" or "changes", NaN for others: the answer becomes the source's."""
    return iia(outcome).where(outcome.of_kind(*CAUSE), torch.nan)


def iso(outcome: Outcome) -> Float[Tensor, " pair"]:
    """IIA over the pairs of kind "isolate" or "stays", NaN for others: what is asked for stays the base's."""
    return iia(outcome).where(outcome.of_kind(*ISOLATE), torch.nan)


def disentangle(outcome: Outcome) -> Float[Tensor, " pair"]:
    """(cause + iso) / 2, whatever the numbers of the two kinds (RAVEL, Huang et al. 2024, arXiv 2402.17700).

    The value of a pair is its IIA times n / 2nₖ, with nₖ of the n pairs of its kind, so that the mean is that of
    the two means.
    """
    parts = [outcome.of_kind(*CAUSE), outcome.of_kind(*ISOLATE)]
    n = sum(int(part.sum()) for part in parts)
    weights = torch.full((len(outcome.answer),), torch.nan)
    for part in parts:
        weights[part] = n / (2 * int(part.sum()))
    return iia(outcome) * weights


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


def _run(run: Callable[[], Tensor] | None, what: str) -> Tensor:
    if run is None:
        raise ValueError(f"This outcome was made without a model that could be asked {what}.")
    return run()


def _margin(logits: Tensor, answer: Tensor) -> Tensor:
    logits = logits.float()
    expected = logits.gather(1, answer[:, None])[:, 0]
    others = logits.scatter(1, answer[:, None], -torch.inf).amax(1)
    return expected - others
