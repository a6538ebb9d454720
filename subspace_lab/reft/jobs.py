"""Training jobs: examples to train an adapter on, and examples to measure it on.

There are two jobs with the same methods: generating answers to prompts (here), and classifying texts
(`reft/classification_job.py`, a separate file because importing `transformers.Trainer` takes seconds).
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

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import pad, tokenise
from subspace_lab.reft.finetune import History, OnStep, finetune
from subspace_lab.reft.model import ReftModel

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The results of a model on held-out examples.

    Attributes:
        loss: the mean cross-entropy over the answers' tokens, or over the texts; None without examples.
        right: (examples,) whether the class of each text is the most likely one; None for answers or without examples.
        texts: the model's greedy continuation of each sample's prompt.
    """

    loss: float | None
    right: Tensor | None = None
    texts: tuple[str, ...] = ()


class TrainingJob(ABC):
    """Tokenised examples to train on and to measure on.

    Attributes:
        training, held_out: examples with `input_ids`, `attention_mask` and `labels`.
        shortened: how many examples were cut to the longest length that the model accepts.
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
        patience: int | None = None,
        accumulate: int = 1,
        memory: int | str | None = None,
        on_step: OnStep | None = None,
        quiet: bool = False,
    ) -> History:
        """Train the model's active adapter; `on_step(step, loss)` is called after each step.

        Args:
            patience: end after this many epochs in a row without a new lowest held-out loss, and keep the parameters of
                the lowest one.
            accumulate: in how many parts the rows of a step are computed.
        """

    @abstractmethod
    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        """Measure the model on the held-out examples, in eval mode; no parameter changes."""

    def samples(self) -> tuple[tuple[str, str], ...]:
        """(prompt, the answer in the data) of each sample, as text."""
        return ()

    @property
    def constant(self) -> float | None:
        """The score of the best constant answer on the held-out examples; None for jobs without classes."""
        return None

    def check_positions(self, config: ReftConfig) -> None:
        """IndexError or KeyError if an example does not have a position that the adapter edits."""
        config.expect_positions(self.prompt_lengths())


class GenerationJob(TrainingJob):
    """The job of generating answers: trained with a frozen past, measured by the loss and by generated texts.

    Args:
        training, held_out: examples with `prompt` and `answer`, or with `messages`.
        tokenizer: the model's tokenizer.
        longest: how many tokens the model accepts, None for any number; longer examples lose the end of their answer.
        samples: the number of prompts for which answers are generated: held-out prompts, or training prompts if none
            are held out.
        max_new_tokens: tokens of each generated answer, at most.
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
        patience: int | None = None,
        accumulate: int = 1,
        memory: int | str | None = None,
        on_step: OnStep | None = None,
        quiet: bool = False,
    ) -> History:
        held_out = None if patience is None else self.held_out
        return finetune(
            model,
            self.training,
            config,
            held_out=held_out,
            patience=patience,
            accumulate=accumulate,
            memory=memory,
            quiet=quiet,
            on_step=on_step,
        )

    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        with evaluating(model):
            loss, _ = over(model, self.held_out, batch_size, self._collate)
            return Measured(loss, None, tuple(self._continued(model, _prompt(ids)) for _, ids in self._samples))

    def _shown(self, row: Row, encoded: Row) -> tuple[str, str]:
        """Prompt and answer as in the data; for a conversation, the text that the model reads."""
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
            # Some models' defaults set these for sampling; transformers would then warn in each call.
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
    """A token to pad batches with. Any token will do, because the attention mask is 0 there."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


@contextmanager
def evaluating(model: ReftModel) -> Iterator[None]:
    """Inside the block the model is in eval mode and computes no gradients."""
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
    """(mean loss over all labels, logits of each batch of a classification); the loss is None without examples.

    The mean of each batch is weighted by its number of labels, so that all answers' tokens (or all texts) have the same
    weight.

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
