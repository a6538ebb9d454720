"""Prompts and answers with a frozen past, for this package's training loop and for plain `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits
from subspace_lab.reft._prompts import lengths_from_labels
from subspace_lab.reft.data import pad


class AnswersPast:
    """Tokenised prompts and answers. What comes before their first edit is computed once.

    Args:
        examples: `input_ids`, `labels` (−100 for the prompt) and so on, as `reft.data.tokenise` returns them.
        edits: the edits that will be trained; their sites determine what is computed once.
        every_token: whether the edits act on answers too. Then it does not matter where prompts end.
        memory: the memory budget, as in `FrozenPast`.

    Raises:
        ValueError: no examples, or an example without prompt or answer.
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
        examples = list(examples)
        if not examples:
            raise ValueError("No examples to learn from.")
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
        batch = Batch(data, lengths).to(backbone.device)
        readout = Readout(readout.index.to(backbone.device), valid, None)
        self.past = FrozenPast(backbone, batch, edits, readout, memory=memory)

    def __len__(self) -> int:
        return len(self.past)

    def loss(self, rows: Tensor, edits: Edits, items: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """The cross-entropy over the answers' tokens of some rows, and their logits (rows, reads, vocabulary).

        The cross-entropy is the mean over the tokens, or their sum divided by `items`. Trainer gives `items` when it
        accumulates gradients.
        """
        rows = rows.cpu()
        logits = self.past.logits(rows, edits)
        wanted = self.targets[rows].to(logits.device).flatten()
        kind = "mean" if items is None else "sum"
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=-100, reduction=kind)
        return loss if items is None else loss / torch.as_tensor(items, device=loss.device), logits
