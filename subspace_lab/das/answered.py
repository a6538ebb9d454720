"""Leave out pairs whose base or sources the model answers wrong.

Such a pair says nothing about where the model represents a variable, because the model did not follow the algorithm on
it (as in MIB, Mueller et al. 2025, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.estimates import Estimate, proportion
from subspace_lab.das.answer_engine import answer_engine
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch


def only_answered(backbone: Backbone, pairs: Pairs, *, min_accuracy: float | None = None) -> Pairs:
    """The pairs whose base and sources the model answers right without any intervention.

    `answered` of the returned pairs says how many these are, and `dropped` how many are left out. A source without a
    known answer (`source_answers`) is not checked; training pairs that are drawn at each step are not checked either.

    Args:
        min_accuracy: a model with a lower accuracy on the bases of the test split is refused; None allows any model.

    Raises:
        ValueError: a model that fails the task, a split in which no pair is left, or a min_accuracy outside [0, 1].
    """
    check_min_accuracy(min_accuracy)
    splits = {"train": pairs.train, "dev": pairs.dev, "test": pairs.test}
    fixed = {name: split for name, split in splits.items() if isinstance(split, Counterfactuals)}
    found: dict[str, Any] = {}
    dropped, answered = dict(pairs.dropped), dict(pairs.answered)
    for name in sorted(fixed, key=lambda name: name != "test"):  # the test split first: it may refuse the model
        split = fixed[name]
        given = answers_given(backbone, split, split.base)
        base, pair = _right(backbone, split, given)
        if name == "test":
            expect_accuracy(proportion(base), len(base), min_accuracy, _example(split, given))
        n, of = int(pair.sum()), len(pair)
        answered[name] = {"base": int(base.sum()), "pair": n, "of": of}
        if not n:
            raise ValueError(
                f"The model answers base and sources of none of the {of} {name} pairs right ({int(base.sum())} of the "
                "bases): no usable pair is left. Use all pairs with right_only=False."
            )
        if n < of:
            found[name] = fixed[name].rows(pair.nonzero()[:, 0])
            dropped[f"{name} pairs whose base or source the model answers wrong"] = of - n
    return replace(pairs, **found, dropped=dropped, answered={name: answered[name] for name in fixed})


def right(backbone: Backbone, data: Counterfactuals) -> tuple[Tensor, Tensor]:
    """(pairs,) whether the model answers the base right, and (pairs,) whether it answers base and all sources right."""
    return _right(backbone, data, answers_given(backbone, data, data.base))


def _right(backbone: Backbone, data: Counterfactuals, given: Tensor) -> tuple[Tensor, Tensor]:
    base = given == data.base_answer.cpu()
    pair = base.clone()
    for name, answer in data.source_answers.items():
        pair &= answers_given(backbone, data, data.sources[name]) == answer.cpu()
    return base, pair


def expect_accuracy(accuracy: Estimate, n: int, min_accuracy: float | None, example: str = "") -> None:
    """ValueError for a model that answers fewer of n bases right than `min_accuracy`.

    Args:
        example: of a base that it answers wrong, in words.
    """
    if min_accuracy is not None and accuracy.value < min_accuracy:
        raise ValueError(
            f"The model answers {accuracy} of {n} bases as the causal model does, less than the {min_accuracy} that "
            f"are asked for.{example} A variable of an algorithm that a model does not follow cannot be found in it: "
            "look at the prompts, or search nevertheless with min_accuracy=None."
        )


def _example(data: Counterfactuals, given: Tensor) -> str:
    """The first base that is answered wrong: what is expected, and what the model says."""
    wrong = (given != data.base_answer.cpu()).nonzero()[:, 0].tolist()
    if not wrong:
        return ""
    expected, said = data.answers[int(data.base_answer[wrong[0]])], data.answers[int(given[wrong[0]])]
    return f" For example base {wrong[0]} of the test split: expected is {expected!r}, it prefers {said!r}."


def check_min_accuracy(min_accuracy: float | None) -> None:
    """ValueError for what is no share."""
    if min_accuracy is None:
        return
    if isinstance(min_accuracy, bool) or not isinstance(min_accuracy, int | float) or not 0 <= min_accuracy <= 1:
        raise ValueError(f"min_accuracy={min_accuracy!r}: needed is a share from 0 to 1, such as 0.9, or None.")


def answers_given(backbone: Backbone, data: Counterfactuals, batch: Batch) -> Tensor:
    """(pairs,): the model's answer to each text of a batch; a text that occurs twice is run once."""
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
    """A key that is the same for equal rows of a batch."""

    def __init__(self, batch: Batch) -> None:
        tensors: Mapping[str, Any] = {**batch.inputs, "": batch.positional, "prompt": batch.prompt_lengths}
        self._tensors = [t.cpu() for t in tensors.values() if isinstance(t, Tensor)]

    def __call__(self, row: int) -> tuple[Any, ...]:
        return tuple(tuple(t[row].flatten().tolist()) for t in self._tensors)
