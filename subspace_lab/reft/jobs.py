"""What is learned from rows, and how well: answers to prompts, or classes of texts.

A job knows its rows as token ids, how an adapter is trained on them, and what is measured of a model on rows that
were held out. Both jobs show the same verbs, so that whoever runs them need not know which one it is. Answers are
here; classes, which need `transformers.Trainer` and the seconds that its import takes, are
in `reft/classification_job.py`.
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
    """A model on held-out rows.

    Attributes:
        loss: the mean cross-entropy over the answers' tokens, or over the texts; None without rows.
        right: (rows,) whether each text's class is the likeliest one; None of answers, and without rows.
        texts: how the model goes on from each sample's prompt, greedily.
    """

    loss: float | None
    right: Tensor | None = None
    texts: tuple[str, ...] = ()


class TrainingJob(ABC):
    """Tokenised rows to train on and rows that were held out.

    Attributes:
        training, held_out: with `input_ids`, `attention_mask` and `labels`.
        shortened: how many rows were cut to the longest that the model takes.
    """

    training: Sequence[Row]
    held_out: Sequence[Row]
    shortened: int

    @abstractmethod
    def prompt_lengths(self) -> Tensor:
        """(rows,) of all rows, by which positions are counted."""

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
        """Train the model's active adapter; `on_step(step, loss)` is told of each step."""

    @abstractmethod
    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        """The model on the held-out rows, in eval mode; no parameter is moved."""

    def samples(self) -> tuple[tuple[str, str], ...]:
        """(prompt, the row's own answer) of each sample, as text."""
        return ()

    @property
    def constant(self) -> float | None:
        """What the best constant answer scores on the held-out rows; None where that means nothing."""
        return None

    def check_positions(self, config: ReftConfig) -> None:
        """Whether every row has the positions of an adapter (IndexError or KeyError where one has not)."""
        lengths = self.prompt_lengths()
        for group in config.groups():
            select(group, lengths, {})


class GenerationJob(TrainingJob):
    """Prompts and answers: trained through the frozen past, measured by loss and by what is generated.

    Args:
        training, held_out: rows of `prompt` and `answer`, or of `messages`.
        tokenizer: of the model.
        longest: tokens that the model takes, None for any number; longer rows lose the end of their answer.
        samples: from how many prompts to generate: held-out ones, or those trained on where none is held out.
        max_new_tokens: of each generation.
        end: put the end-of-text token behind each answer.

    Raises:
        ValueError: a row without prompt or answer, or whose prompt leaves no room for its answer.
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
        """Prompt and answer as the row has them; a conversation as the model reads it."""
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
            # What a model's own defaults set for sampling would be complained of at each call.
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
    """What batches are filled up with: behind the mask any token will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


@contextmanager
def evaluating(model: ReftModel) -> Iterator[None]:
    """The model in eval mode and without gradients, then as it was."""
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
    """The mean loss over everything that rows have a label for (None without rows), and their first logits.

    Each batch's mean weighs as many labels as it is of: all answers' tokens, or texts, count alike.

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
        raise FloatingPointError(f"The loss on the held-out rows is {total / count}.")
    return (total / count if count else None), logits
