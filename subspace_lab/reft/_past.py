"""Prompts and answers, for this package's training loop and for plain `transformers.Trainer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import expect_gradients
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits
from subspace_lab.reft._prompts import lengths_from_labels
from subspace_lab.reft.data import expect_known_tokens, pad


class Answers(ABC):
    """Tokenised prompts and answers of which the answers' tokens are scored.

    Args:
        examples: `input_ids`, `labels` (−100 for the prompt) and so on, as `reft.data.tokenise` returns them.
        edits: the edits that will be trained.
        every_token: whether the edits act on answers too. Then it does not matter where prompts end.

    Raises:
        ValueError: no examples, or an example without prompt or answer; quantised layers that give no gradients.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Iterable[Mapping[str, Any]],
        edits: Edits,
        *,
        every_token: bool = False,
    ) -> None:
        examples = list(examples)
        expect_gradients(backbone)
        if not examples:
            raise ValueError("No examples to learn from.")
        _refuse_misfits(backbone.model, examples)
        data = pad(examples, getattr(getattr(backbone.model, "config", None), "pad_token_id", None))
        labels = data.pop("labels")
        lengths = data.pop("prompt_lengths", None)
        if every_token:
            lengths = None
        elif lengths is None:
            positions = [site.positions for site in edits]
            lengths = lengths_from_labels({**data, "labels": labels}, positions)
        readout, self.targets = Readout.before_labels(labels)
        assert readout.index is not None
        valid = None if readout.valid is None else readout.valid.to(backbone.device)
        self.batch = Batch(data, lengths).to(backbone.device)
        self.readout = Readout(readout.index.to(backbone.device), valid, None)

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def logits(self, rows: Tensor, edits: Edits) -> Tensor:
        """(rows, reads, vocabulary) logits before the answers' tokens of some rows."""

    @abstractmethod
    def describe(self) -> str:
        """What is computed once, in words."""

    def tokens(self, rows: Tensor) -> int:
        """How many answer tokens some rows have."""
        return int((self.targets[rows.cpu()] != -100).sum())

    def loss(self, rows: Tensor, edits: Edits, items: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """The cross-entropy over the answers' tokens of some rows, and their logits (rows, reads, vocabulary).

        The cross-entropy is the mean over the tokens, or their sum divided by `items`, which is given when gradients
        are accumulated.
        """
        rows = rows.cpu()
        logits = self.logits(rows, edits)
        kind = "mean" if items is None else "sum"
        loss = self._entropy(rows, logits, kind)
        return loss if items is None else loss / torch.as_tensor(items, device=loss.device), logits

    def token_losses(
        self, edits: Edits, batch_size: int, run: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(tokens,) the cross-entropy of each answer's token in float64, and the number of its row; no gradients.

        Args:
            run: the rows' numbers → their logits, if these are not the logits with the edits.
        """
        losses, owners = [], []
        with torch.no_grad():
            for rows in torch.arange(len(self)).split(batch_size):
                logits = self.logits(rows, edits) if run is None else run(rows)
                there = self.targets[rows] != -100
                losses.append(self._entropy(rows, logits, "none").view(there.shape).cpu().double()[there])
                owners.append(rows[:, None].expand_as(there)[there])
        return torch.cat(losses), torch.cat(owners)

    def _entropy(self, rows: Tensor, logits: Tensor, reduction: str) -> Tensor:
        wanted = self.targets[rows].to(logits.device).flatten()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        return nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction=reduction)


class AnswersPast(Answers):
    """Prompts and answers under a frozen model. What comes before their first edit is computed once.

    Args:
        backbone, examples, edits, every_token: as in `Answers`; the sites of the edits determine what is computed once.
        memory: the memory budget, as in `FrozenPast`.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Iterable[Mapping[str, Any]],
        edits: Edits,
        *,
        every_token: bool = False,
        memory: int | str | None = None,
    ) -> None:
        super().__init__(backbone, examples, edits, every_token=every_token)
        self.past = FrozenPast(backbone, self.batch, edits, self.readout, memory=memory)

    def logits(self, rows: Tensor, edits: Edits) -> Tensor:
        return self.past.logits(rows, edits)

    def describe(self) -> str:
        return self.past.describe()


class AnswersTrained(Answers):
    """Prompts and answers under a model some of whose own parameters are trained too, so that no past is frozen.

    Args:
        backbone, examples, edits, every_token: as in `Answers`.
        run: the wrapped model with its edits: arguments of the base model → its output.
    """

    def __init__(
        self,
        backbone: Backbone,
        examples: Iterable[Mapping[str, Any]],
        edits: Edits,
        run: Callable[..., Any],
        *,
        every_token: bool = False,
    ) -> None:
        super().__init__(backbone, examples, edits, every_token=every_token)
        self._run = run

    def logits(self, rows: Tensor, edits: Edits) -> Tensor:
        part = self.batch.rows(rows)
        every = self._run(**part.inputs, prompt_lengths=part.prompt_lengths).logits
        at = self.readout.rows(rows).index
        assert at is not None
        return every.gather(1, at[..., None].expand(-1, -1, every.shape[-1]))

    def describe(self) -> str:
        return "plain run: parameters of the base model are trained too"


def _refuse_misfits(model: Any, examples: list[Mapping[str, Any]]) -> None:
    """ValueError for examples with tokens that the model does not know, or longer than it can read."""
    expect_known_tokens((row["input_ids"] for row in examples), model)
    expect_known_tokens(((t for t in row["labels"] if t != -100) for row in examples), model)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row["input_ids"]) for row in examples)
    if most is not None and longest > most:
        raise ValueError(
            f"An example has {longest} tokens; the model reads {most}: tokenise(rows, tokenizer, max_length={most}) "
            "cuts answers, or leave it out."
        )
