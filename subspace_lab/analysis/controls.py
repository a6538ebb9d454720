"""Pairs in which there is nothing to find: the same search on them shows what it finds anyway.

    control_labels   each source has an arbitrary answer: shows what a search can memorise about the sources
    shuffled_pairs   the expected answers of a split are shuffled: shows what it can memorise about the pairs

A control calls the same search with other pairs, with another model (`analysis/twins.py`) or with another method
(`RandomSubspace`). Related checks are elsewhere. `rival_pairs` (das/hypotheses.py) draws pairs from a plausible but
wrong causal model, for the same bases and sources. The metric `complement_stays` (das/objectives.py) measures whether
the answer stays the same if everything but the subspace is exchanged. A planted variable (`analysis/planting.py`)
shows whether a search could have found a variable that is there.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subspace_lab.core.arguments import whole_number
from subspace_lab.das.equal_pairs import keys_of
from subspace_lab.das.pairs import Counterfactuals, Pairs


def control_labels(pairs: Pairs, seed: int) -> Pairs:
    """The same bases and sources, with an arbitrary answer for each distinct source, the same in all splits.

    After an interchange, the answer of its source is expected, whatever the base. The answers are those that the
    pairs expect. They are assigned to the sources in random order, each equally often. There is no rule behind the
    assignment, so it can only be memorised. A search that scores above its floor on held-out pairs has memorised
    sources that are in both splits: sources that only the training split has tell nothing about others. (Hewitt &
    Liang 2019, arXiv 1909.03368; the control task of Arora et al. 2024, arXiv 2402.12560.)

    With several variables, the sources of a pair together count as one source. The pairs' values, answers to sources
    and kinds are dropped, because they are not true for the new answers. If each step draws new training pairs,
    sources that the other splits do not have get an answer by a hash of their inputs.

    Raises:
        ValueError: pairs that expect one answer only.
    """
    whole_number(seed, "seed")
    fixed = [split for split in (pairs.train, pairs.dev, pairs.test) if isinstance(split, Counterfactuals)]
    expected = sorted({answer for split in fixed for answer in split.answer.tolist()})
    if len(expected) < 2:
        raise ValueError(
            f"All pairs expect one answer, {pairs.test.answers[expected[0]]!r}: control labels need at least two."
        )
    sources = list(dict.fromkeys(key for split in fixed for key in _sources(split)))
    random.Random(seed).shuffle(sources)
    dealt = {source: expected[i % len(expected)] for i, source in enumerate(sources)}

    def answer_to(source: tuple[object, ...]) -> int:
        if source in dealt:
            return dealt[source]
        return expected[zlib.crc32(f"{seed}:{source}".encode()) % len(expected)]

    def labelled(split: Counterfactuals, _: int) -> Counterfactuals:
        return _with_answers(split, torch.tensor([answer_to(source) for source in _sources(split)]))

    return _changed(pairs, labelled, "control labels")


def shuffled_pairs(pairs: Pairs, seed: int) -> Pairs:
    """The same bases and sources, with the expected answers of each split shuffled among its pairs.

    Each split keeps its bases, its sources and how often each answer is expected, but there is no rule for which pair
    expects which answer. Unlike with `control_labels`, one source may get several answers, so only whole pairs can be
    memorised. The pairs' values, answers to sources and kinds are dropped.
    """
    whole_number(seed, "seed")

    def shuffled(split: Counterfactuals, number: int) -> Counterfactuals:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{number}".encode()))
        return _with_answers(split, split.answer.cpu()[torch.randperm(len(split), generator=generator)])

    return _changed(pairs, shuffled, "shuffled answers")


def _changed(pairs: Pairs, change: Callable[[Counterfactuals, int], Counterfactuals], what: str) -> Pairs:
    """The pairs with all splits changed; `change` gets a split and its number, which is different for each split."""
    stream = pairs.train
    train = (lambda step: change(stream(step), step + 3)) if callable(stream) else change(stream, 0)
    task = f"{pairs.task}: {what}" if pairs.task else what
    return Pairs(train, change(pairs.dev, 1), change(pairs.test, 2), task, pairs.dropped)


def _with_answers(split: Counterfactuals, answer: Tensor) -> Counterfactuals:
    labels = {name: of for name, of in split.labels.items() if name != "kind"}
    return replace(split, answer=answer.to(split.answer.device), values={}, source_answers={}, labels=labels)


def _sources(split: Counterfactuals) -> Sequence[tuple[object, ...]]:
    """The inputs of each pair's sources."""
    return [key[1:] for key in keys_of(split)]
