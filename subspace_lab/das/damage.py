"""What an exchange does to text that has nothing to do with the variable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import instance
from subspace_lab.core.estimates import Estimate, bootstrap_mean
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward

CHUNK = 16  # texts in one run


def damage(
    backbone: Backbone, alignment: Alignment, texts: Batch | Mapping[str, Any], *, positions: str = "all"
) -> Estimate:
    """How much the loss of the next token rises, in nats, if each text gets the subspace of the next text.

    For each text this is the mean of −log p(next token) with the exchange minus the mean without it. The result is the
    average over the texts, with a bootstrap interval over the texts. A subspace that represents one variable only
    does not change texts without this variable. A subspace as large as the state replaces the whole text.

    Args:
        backbone: a causal language model.
        alignment: the subspaces, each at the component and layer of its site.
        texts: two or more, as the tokenizer gives them (`input_ids` and `attention_mask`).
        positions: the positions that are exchanged, all by default; at a position that the next text does not have,
            the state is not changed.

    Raises:
        TypeError: `alignment` is not an alignment.
        ValueError: fewer than two texts, or a text of one token, which has no next token.
    """
    instance(alignment, Alignment, "alignment", "fits.best().alignment is one")
    batch = Batch.of(texts).to(backbone.device)
    real = batch.real_tokens()
    if len(batch) < 2 or real is None or not bool((real.sum(1) > 1).all()):
        raise ValueError(f"{len(batch)} texts; needed are two or more, each of two or more tokens.")
    moved = Alignment({name: (site.at(positions), s) for name, (site, s) in alignment.variables.items()})
    edits = {site: edit.to(backbone.device) for site, edit in moved.edits().items()}
    shared = {site: list(moved.at(site)) for site in edits}
    rises = []
    with torch.no_grad():
        for rows in torch.arange(len(batch)).split(CHUNK):
            part, other = batch.rows(rows), batch.rows((rows + 1) % len(batch))
            states = collect(backbone, other, list(edits))
            sources: dict[Any, Any] = {
                site: states[site] if len(names) == 1 else dict.fromkeys(names, states[site])
                for site, names in shared.items()
            }
            plain = forward(backbone, part, {})
            edited = forward(backbone, part, edits, sources=sources, unmatched="keep_base")
            rises.append(_loss(edited, part) - _loss(plain, part))
    return bootstrap_mean(torch.cat(rises).cpu())


def _loss(output: Any, batch: Batch) -> Tensor:
    """(texts,) the mean of −log p over all tokens of a text but the first."""
    logits = output.logits if hasattr(output, "logits") else output
    ids, real = batch.inputs["input_ids"], batch.real_tokens()
    assert real is not None
    follows = (real[:, 1:] & real[:, :-1]).to(logits.device)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none"
    )
    return (loss * follows).sum(1) / follows.sum(1)
