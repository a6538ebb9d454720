"""What each edit of an adapter does: alone, and what is lost without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import instance
from subspace_lab.core.estimates import Estimate, bootstrap_mean
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch
from subspace_lab.reft.data import pad, prompt_lengths_of
from subspace_lab.reft.model import ReftModel

CHUNK = 16  # rows in one forward pass


@dataclass(frozen=True)
class EditEffect:
    """By how much one edit of an adapter lowers the mean loss of a row's answer, in nats.

    Attributes:
        site: where the edit is.
        alone: the fall from the base model to the model with this edit only.
        lost: the fall from all edits but this one to all edits.
        together: the fall from the base model to all edits.
    """

    site: Site
    alone: Estimate
    lost: Estimate
    together: Estimate


def edit_effects(model: ReftModel, rows: Sequence[Mapping[str, Any]]) -> tuple[EditEffect, ...]:
    """By how much each edit of the active adapters lowers the loss, alone and together with the others.

    The loss of a row is the mean of −log p over its answer's tokens; intervals are a bootstrap over the rows. If
    several edits do the same, each has a large effect alone, and little is lost without it. If edits only work
    together, each has a small effect alone, and much is lost without it.

    Args:
        model: a causal language model with adapters.
        rows: two or more held-out examples with `input_ids`, `attention_mask` and `labels`, as `tokenise` gives them.

    Raises:
        TypeError: anything but such a model.
        ValueError: no edit, fewer than two rows, or a row without an answer.
    """
    instance(model, ReftModel, "model", "get_reft_model(model, config) makes one")
    edits, examples = model.edits(), list(rows)
    if not edits or len(examples) < 2:
        raise ValueError(f"{len(edits)} edits and {len(examples)} rows: at least 1 edit and 2 rows are needed.")
    config: Any = model.backbone.model.config
    padded = {name: t.to(model.backbone.device) for name, t in pad(examples, config.pad_token_id).items()}
    labels = padded.pop("labels")
    if bool((labels[:, 1:] == -100).all(1).any()):
        raise ValueError("A row has no answer: all of its labels are −100.")
    batch = Batch(padded, prompt_lengths_of(labels, padded.get("attention_mask")))
    readout, answers = Readout.before_labels(labels)
    engine = PlainEngine(model.backbone, batch, readout)

    def loss(some: Mapping[Site, Intervention]) -> Tensor:
        parts = []
        with torch.no_grad():
            for chunk in torch.arange(len(batch)).split(CHUNK):
                logits = engine.logits(chunk, some).float()
                targets = answers[chunk.to(answers.device)].to(logits.device)
                each = nn.functional.cross_entropy(
                    logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
                )
                parts.append(each.sum(1) / (targets != -100).sum(1))
        return torch.cat(parts).cpu()

    training = model.training
    model.eval()
    try:
        base, whole = loss({}), loss(edits)
        together = bootstrap_mean(base - whole)
        return tuple(
            EditEffect(
                site,
                bootstrap_mean(base - loss({site: edit})),
                bootstrap_mean(loss({s: e for s, e in edits.items() if s != site}) - whole),
                together,
            )
            for site, edit in edits.items()
        )
    finally:
        model.train(training)
