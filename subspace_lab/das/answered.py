"""Pairs that count: those whose base and sources the model answers right.

A pair whose base or source the model answers wrong says nothing about where a variable is kept: the algorithm that is
looked for did not run on it (as in MIB, Mueller et al. 2025, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.das.answer_engine import answer_engine
from subspace_lab.das.estimates import Estimate, proportion
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch


def only_answered(backbone: Backbone, pairs: Pairs, *, min_accuracy: float | None = None) -> Pairs:
    """The pairs whose base and sources the model answers right, without any intervention.

    How many that is stands in `answered` of what is returned, and how many are left out in `dropped`. Sources whose
    answer the pairs do not tell (`source_answers`) are not looked at; neither are training pairs that are drawn afresh.

    Args:
        min_accuracy: a model that answers the test split's bases worse than this is refused; None allows any.

    Raises:
        ValueError: a model that fails the task, or a split of which nothing is left.
    """
    splits = {"train": pairs.train, "dev": pairs.dev, "test": pairs.test}
    fixed = {name: split for name, split in splits.items() if isinstance(split, Counterfactuals)}
    found: dict[str, Any] = {}
    dropped, answered = dict(pairs.dropped), dict(pairs.answered)
    for name in sorted(fixed, key=lambda name: name != "test"):  # what may be refused comes first
        base, pair = right(backbone, fixed[name])
        if name == "test":
            expect_accuracy(proportion(base), len(base), min_accuracy)
        n, of = int(pair.sum()), len(pair)
        answered[name] = {"base": int(base.sum()), "pair": n, "of": of}
        if not n:
            raise ValueError(
                f"The model answers base and sources of none of the {of} {name} pairs right ({int(base.sum())} of the "
                "bases): no pair is left that says anything. Count all of them with right_only=False."
            )
        if n < of:
            found[name] = fixed[name].rows(pair.nonzero()[:, 0])
            dropped[f"{name} pairs whose base or source the model answers wrong"] = of - n
    return replace(pairs, **found, dropped=dropped, answered={name: answered[name] for name in fixed})


def right(backbone: Backbone, data: Counterfactuals) -> tuple[Tensor, Tensor]:
    """(pairs,) whether the model answers the base right, and (pairs,) whether base and all sources."""
    base = answers_given(backbone, data, data.base) == data.base_answer.cpu()
    pair = base.clone()
    for name, answer in data.source_answers.items():
        pair &= answers_given(backbone, data, data.sources[name]) == answer.cpu()
    return base, pair


def expect_accuracy(accuracy: Estimate, n: int, min_accuracy: float | None) -> None:
    """ValueError for a model that answers fewer of n bases right than asked."""
    if min_accuracy is not None and accuracy.value < min_accuracy:
        raise ValueError(
            f"The model answers {accuracy} of {n} bases as the causal model does, less than "
            f"{min_accuracy}: a variable of an algorithm that it does not follow is not worth a search. "
            "Ask for it all the same, of a randomly initialised twin for instance, with min_accuracy=None."
        )


def answers_given(backbone: Backbone, data: Counterfactuals, batch: Batch) -> Tensor:
    """(pairs,): the answer that the model gives to each text of a batch; a text that comes twice runs once."""
    seen: dict[Any, int] = {}
    first: list[int] = []
    number = torch.empty(len(batch), dtype=torch.long)
    for i, key in enumerate(map(_Key(batch), range(len(batch)))):
        if key not in seen:
            seen[key] = len(first)
            first.append(i)
        number[i] = seen[key]
    asked = (
        replace(data, base=batch, sources=dict.fromkeys(data.sources, batch))
        .rows(torch.tensor(first))
        .to(backbone.device)
    )
    engine = answer_engine(asked, lambda base, readout: PlainEngine(backbone, base, readout))
    given = PreparedPairs(engine, {}, asked, backbone).unedited.argmax(-1)
    return given[number]


class _Key:
    """What a row of a batch consists of."""

    def __init__(self, batch: Batch) -> None:
        tensors: Mapping[str, Any] = {**batch.inputs, "": batch.positional, "prompt": batch.prompt_lengths}
        self._tensors = [t.cpu() for t in tensors.values() if isinstance(t, Tensor)]

    def __call__(self, row: int) -> tuple[Any, ...]:
        return tuple(tuple(t[row].flatten().tolist()) for t in self._tensors)
