"""What TRL's trainers ask of a model instead of logits: the labels' log-probabilities.

From version 1.9 on they replace a model's `forward` by one that runs `base_model` without labels and multiplies
its last states by the head. There the adapter would not edit anything, and the prompt would not be known. So
`ReftModel` gives these log-probabilities itself, from its own `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class LabelOutput(ModelOutput):
    """Of each next token, zero where there is no label; all (batch, sequence − 1).

    Attributes:
        loss: as the model's own forward gives it.
        log_probs: of the labels.
        entropy: of the distributions, in nats, without gradient.
        is_top1: whether the label is the most likely token.
        label_mask: where there are labels.
        aux_loss: none, for no base model with routed experts has one here.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def label_output(logits: Tensor, labels: Tensor, loss: Tensor | None) -> LabelOutput:
    """The labels' log-probabilities under logits (batch, sequence, vocabulary), labels (batch, sequence)."""
    wanted = labels[:, 1:]
    mask = wanted != -100
    known = logits[:, :-1][mask].float().log_softmax(-1)  # (labels, vocabulary)
    chosen = wanted[mask]
    with torch.no_grad():
        entropy = -(known.exp() * known).sum(-1)
        top = (known.argmax(-1) == chosen).float()

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    log_probs = known.gather(-1, chosen[:, None])[:, 0]
    return LabelOutput(loss, spread(log_probs), spread(entropy), spread(top), mask)
