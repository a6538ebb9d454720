"""Training jobs: examples to train an adapter on, and examples to measure it on.

There are two jobs with the same methods: to generate answers to prompts (here), and to classify texts
(`reft/classification_job.py`, apart because importing `transformers.Trainer` takes seconds).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.positions import select
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import pad, tokenise
from subspace_lab.reft.finetune import finetune
from subspace_lab.reft.model import ReftModel

OnStep = Callable[[int, float], None]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A model on held-out examples.

    Attributes:
        loss: the mean cross-entropy over the answers' tokens, or over the texts; None without examples.
        right: (examples,) whether each text's class is the likeliest one; None for answers, and without examples.
        texts: the model's greedy continuation of each sample's prompt.
    """

    loss: float | None
    right: Tensor | None = None
    texts: tuple[str, ...] = ()


class TrainingJob(ABC):
    """Tokenised examples to train on and to measure on.

    Attributes:
        training, held_out: examples with `input_ids`, `attention_mask` and `labels`.
        shortened: how many examples were cut to the longest that the model takes.
    """

    training: Sequence[Row]
    held_out: Sequence[Row]
    shortened: int

    @abstractmethod
    def prompt_lengths(self) -> Tensor:
        """(examples,) the number of prompt tokens of every example."""

    @abstractmethod
    def train(
        self,
        model: ReftModel,
        config: TrainingConfig,
        *,
        memory: int | str | None = None,
        on_step: OnStep | None = None,
        quiet: bool = False,
    ) -> None:
        """Train the model's active adapter; `on_step(step, loss)` is called at each step."""

    @abstractmethod
    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        """The model on the held-out examples, in eval mode; no parameter changes."""

    def samples(self) -> tuple[tuple[str, str], ...]:
        """(prompt, the answer that the data has) of each sample, as text."""
        return ()

    @property
    def constant(self) -> float | None:
        """What the best constant answer scores on the held-out examples; None for jobs without classes."""
        return None

    def check_positions(self, config: ReftConfig) -> None:
        """Raise IndexError or KeyError where an example lacks a position that an adapter edits."""
        lengths = self.prompt_lengths()
        for group in config.groups():
            select(group, lengths, {})


class GenerationJob(TrainingJob):
    """To generate answers: trained through the frozen past, measured by loss and by what is generated.

    Args:
        training, held_out: examples with `prompt` and `answer`, or of `messages`.
        tokenizer: of the model.
        longest: how many tokens the model takes, None for any number; longer examples lose the end of their
            answer.
        samples: for how many prompts to generate answers: held-out ones, or training prompts where none is held
            out.
        max_new_tokens: of each generation.
        end: put the end-of-text token after each answer.

    Raises:
        ValueError: an example without prompt or answer, or whose prompt leaves no room for its answer.
    """

    def __init__(
        self,
        training: Sequence[Row],
        held_out: Sequence[Row],
        tokenizer: Any,
        *,
        longest: int | None = None,
        samples: int = 0,
        max_new_tokens: int = 32,
        end: bool = True,
    ) -> None:
        self._tokenizer, self._longest, self._new = tokenizer, longest, max_new_tokens
        encoded = tokenise([*training, *held_out], tokenizer, end=end).to_list()
        too_long = [] if longest is None else [i for i, row in enumerate(encoded) if len(row["labels"]) > longest]
        self.shortened = len(too_long)
        if too_long:
            encoded = tokenise([*training, *held_out], tokenizer, end=end, max_length=longest).to_list()
        self.training, self.held_out = encoded[: len(training)], encoded[len(training) :]
        shown = held_out or training
        self._samples = list(zip(shown, self.held_out or self.training, strict=True))[:samples]

    def prompt_lengths(self) -> Tensor:
        return torch.tensor([len(_prompt(row)) for row in [*self.training, *self.held_out]])

    def samples(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._shown(row, ids) for row, ids in self._samples)

    def train(
        self,
        model: ReftModel,
        config: TrainingConfig,
        *,
        memory: int | str | None = None,
        on_step: OnStep | None = None,
        quiet: bool = False,
    ) -> None:
        finetune(model, self.training, config, memory=memory, quiet=quiet, on_step=on_step)

    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        with evaluating(model):
            loss, _ = over(model, self.held_out, batch_size, self._collate)
            return Measured(loss, None, tuple(self._continued(model, _prompt(ids)) for _, ids in self._samples))

    def _shown(self, row: Row, encoded: Row) -> tuple[str, str]:
        """Prompt and answer as in the data; a conversation as the model reads it."""
        if "messages" not in row:
            return row["prompt"], row["answer"]
        before = _prompt(encoded)
        return self._text(before), self._text(encoded["input_ids"][len(before) :])

    def _continued(self, model: ReftModel, prompt: Sequence[int]) -> str:
        room = self._new if self._longest is None else min(self._new, self._longest - len(prompt))
        ids = torch.tensor([list(prompt)], device=model.device)
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            # The defaults of some models set these for sampling, and transformers would warn at each call.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_token(self._tokenizer),
        )
        return self._text(new[0, len(prompt) :].tolist())

    def _collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return pad(rows, pad_token(self._tokenizer))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _prompt(row: Row) -> list[int]:
    """The ids before the first label that is not −100."""
    return [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]


def pad_token(tokenizer: Any) -> int:
    """The token that pads batches: where the attention mask is 0 any token will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


@contextmanager
def evaluating(model: ReftModel) -> Iterator[None]:
    """Within the block the model is in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def over(
    model: ReftModel, rows: Sequence[Row], batch_size: int, collate: Callable[[Sequence[Row]], dict[str, Tensor]]
) -> tuple[float | None, list[Tensor]]:
    """(mean loss over all labels, logits of each batch of classes); the loss is None without examples.

    Each batch's mean is weighted by its number of labels, so that all answers' tokens, or texts, count alike.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    total, count, logits = 0.0, 0, []
    for start in range(0, len(rows), batch_size):
        batch: dict[str, Any] = {
            name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()
        }
        out = model(**batch)
        labels = batch["labels"]
        n = int((labels != -100).sum())
        total, count = total + n * float(out.loss), count + n
        if labels.ndim == 1:
            logits.append(out.logits.float().cpu())
    if not math.isfinite(total):
        raise FloatingPointError(f"The loss on the held-out examples is {total / count}.")
    return (total / count if count else None), logits
