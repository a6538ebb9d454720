"""Losses that are minimised and metrics that are reported: plain functions, to which you can add your own.

A loss is a function (logits, answer) → (pairs,), with the logits (pairs, answers) after the interchange and the
expected answer (pairs,). A loss that compares with the model's own output for the source is a `Towards`. A metric is a
function `Outcome` → (pairs,) values, NaN for pairs that it does not apply to; the score is the mean of the other
values.
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
        logits: the answers' logits after the interchange.
        unedited: the answers' logits without any intervention.
        answer: the answer that the causal model expects after the interchange.
        base_answer: the answer that it expects without.
        kinds: the kind of each pair, as `Counterfactuals.kinds`.
        run_vocabulary, run_complement: functions that compute `vocabulary` and `complement`, once for all metrics.
    """

    logits: Float[Tensor, "pair answer"]
    unedited: Float[Tensor, "pair answer"]
    answer: Int[Tensor, " pair"]
    base_answer: Int[Tensor, " pair"]
    kinds: tuple[str, ...] = ()
    run_vocabulary: Callable[[], Tensor] | None = None
    run_complement: Callable[[], Tensor] | None = None

    def vocabulary(self) -> Int[Tensor, " pair"]:
        """The answer whose token has the highest logit of the whole vocabulary; −1 if this token is no answer.

        It takes an extra run when the first metric asks for it.
        """
        return _run(self.run_vocabulary, "what the whole vocabulary says")

    def complement(self) -> Float[Tensor, "pair answer"]:
        """The answers' logits after everything but the subspace was exchanged: h + (I − RᵀR)(h_source − h).

        It takes an extra run when the first metric asks for it.

        Raises:
            ValueError: several variables at one site: their sources differ, so that there is no single source state.
        """
        return _run(self.run_complement, "what the exchange of the complement gives")

    def of_kind(self, *kinds: str) -> Bool[Tensor, " pair"]:
        """Which pairs have one of these kinds. ValueError if none has; the message names the kinds that occur."""
        found = torch.tensor([kind in kinds for kind in self.kinds], dtype=torch.bool)
        if not bool(found.any()):
            raise ValueError(
                f"No pair of the kind {' or '.join(map(repr, kinds))}; the kinds here are {sorted(set(self.kinds))}."
            )
        return found


CAUSE, ISOLATE = ("cause", "changes"), ("isolate", "stays")
"""Kinds of pairs in which the answer must become the source's, and kinds in which it must stay the base's."""

Metric = Callable[[Outcome], Tensor]


def cross_entropy(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """−log p(expected answer), in nats, over the answers' logits."""
    return nn.functional.cross_entropy(logits.float(), answer, reduction="none")


def logit_difference(logits: Float[Tensor, "pair answer"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The highest logit of another answer minus that of the expected answer: negative if the answer is right."""
    return -_margin(logits, answer)


@dataclass(frozen=True)
class Towards(ABC):
    """How far p, the model's distribution over the answers, is from a target distribution q.

    Attributes:
        target: "source": q is the model's distribution for the source without any intervention. The edit must then
            reproduce all of it, not only its highest answer. This makes sense if the expected answer is the
            source's. "answer": q gives the expected answer probability 1.
    """

    target: str = "source"

    def __post_init__(self) -> None:
        if self.target not in ("source", "answer"):
            raise ValueError(f"target={self.target!r}: possible are 'source' and 'answer'.")

    def __call__(self, logits: Float[Tensor, "pair answer"], target: Tensor) -> Float[Tensor, " pair"]:
        """The distance for each pair.

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
    """KL(q ‖ p) = Σ q log(q/p), in nats: 0 if p = q. With target="answer" it is the cross-entropy."""

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        return (torch.xlogy(q, q) - q * log_p).sum(-1)


@dataclass(frozen=True)
class SquaredError(Towards):
    """Σ (p − q)². With target="answer" it is the Brier score (Brier 1950)."""

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        return (log_p.exp() - q).square().sum(-1)


@dataclass(frozen=True)
class JensenShannon(Towards):
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q)/2, in nats: symmetric, 0 if p = q, at most log 2.

    CDAS uses this loss to match distributions (arXiv 2602.05234).
    """

    def distance(
        self, log_p: Float[Tensor, "pair answer"], q: Float[Tensor, "pair answer"]
    ) -> Float[Tensor, " pair"]:
        p = log_p.exp()
        # If m is 0 its logarithm has no gradient; the factor p + q is 0 there as well.
        log_m = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny).log()
        return ((p * log_p + torch.xlogy(q, q)) - (p + q) * log_m).sum(-1) / 2


def iia(outcome: Outcome) -> Float[Tensor, " pair"]:
    """Interchange intervention accuracy: 1 if the expected answer has the highest logit of all answers, else 0."""
    return (outcome.logits.argmax(-1) == outcome.answer).float()


def iia_vocabulary(outcome: Outcome) -> Float[Tensor, " pair"]:
    """1 if the expected answer has the highest logit of the whole vocabulary, else 0.

    It is at most `iia`: if an edit makes the model say something that is no answer at all, that is no success. Some
    models say something else before the answer even without an edit (a comma, an adverb), and score low with every
    edit. So use this metric for prompts that are followed directly by the answer.
    """
    return (outcome.vocabulary() == outcome.answer).float()


def complement_stays(outcome: Outcome) -> Float[Tensor, " pair"]:
    """1 if the answer stays the base's while everything but the subspace is exchanged, else 0.

    IIA asks whether the subspace is sufficient to change the answer; this metric asks whether it is necessary. If the
    variable is also represented elsewhere in the state, that part changes the answer. The metric is meaningful only if
    the source differs from the base in nothing else that the answer depends on. The full vector has no complement;
    its score is the model's accuracy on the bases.
    """
    return (outcome.complement().argmax(-1) == outcome.base_answer).float()


def cause(outcome: Outcome) -> Float[Tensor, " pair"]:
    """IIA over the pairs of kind "cause" or "changes", NaN for others: the answer must become the source's."""
    return iia(outcome).where(outcome.of_kind(*CAUSE), torch.nan)


def iso(outcome: Outcome) -> Float[Tensor, " pair"]:
    """IIA over the pairs of kind "isolate" or "stays", NaN for others: the answer must stay the base's."""
    return iia(outcome).where(outcome.of_kind(*ISOLATE), torch.nan)


def disentangle(outcome: Outcome) -> Float[Tensor, " pair"]:
    """(cause + iso) / 2, independent of the number of pairs of each kind (RAVEL, Huang et al. 2024, arXiv 2402.17700).

    The value of a pair is its IIA times n / 2nₖ, where nₖ of the n pairs have its kind. So the mean over all pairs is
    the mean of the two means.
    """
    parts = [outcome.of_kind(*CAUSE), outcome.of_kind(*ISOLATE)]
    n = sum(int(part.sum()) for part in parts)
    weights = torch.full((len(outcome.answer),), torch.nan)
    for part in parts:
        weights[part] = n / (2 * int(part.sum()))
    return iia(outcome) * weights


def logit_margin(outcome: Outcome) -> Float[Tensor, " pair"]:
    """The expected answer's logit minus the highest logit of the other answers."""
    return _margin(outcome.logits, outcome.answer)


def log_odds(outcome: Outcome) -> Float[Tensor, " pair"]:
    """How much the interchange raises the log odds of the expected answer against the base's answer, in nats.

    With the base's answer b, the expected answer a and the log probability lp: lp(b) − lp(a) without the interchange,
    plus lp(a) − lp(b) with it. 0 in pairs that should not change (Arora et al. 2024, arXiv 2402.12560, eq. 3).
    """

    def gap(logits: Tensor) -> Tensor:
        picked = [
            logits.float().gather(1, index[:, None])[:, 0] for index in (outcome.answer, outcome.base_answer)
        ]
        return picked[0] - picked[1]  # the normaliser of the log-probabilities cancels

    return gap(outcome.logits) - gap(outcome.unedited)


def _run(run: Callable[[], Tensor] | None, what: str) -> Tensor:
    if run is None:
        raise ValueError(f"This outcome was made without a model, so it cannot tell {what}.")
    return run()


def _margin(logits: Tensor, answer: Tensor) -> Tensor:
    logits = logits.float()
    expected = logits.gather(1, answer[:, None])[:, 0]
    others = logits.scatter(1, answer[:, None], -torch.inf).amax(1)
    return expected - others
