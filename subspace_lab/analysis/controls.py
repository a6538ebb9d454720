"""Pairs in which there is nothing to find: the same search on them says what it finds anyway.

    control_labels   each source has an arbitrary answer: what a search can learn by heart about the sources
    shuffled_pairs   the expected answers of a split change places: what it can learn by heart about the pairs

A control is other pairs, another model (`analysis/twins.py`) or another method (`RandomSubspace`), handed to the
same call. A causal model that is plausible and wrong is other pairs too: `rival_pairs` (das/hypotheses.py) draws
them for the same bases and sources. Whether the answer stays where all but the subspace is exchanged is a metric,
`complement_stays` (das/objectives.py). Whether a search could have found a variable that is there is asked of a
planted one (`analysis/planting.py`).
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

    After an interchange the answer of its source is expected, whatever the base. The answers are those that the
    pairs expect, dealt to the sources in random order so that each is as frequent as the next; which source gets
    which has no reason, so that it can be learned by heart and in no other way. Sources that only the training
    split has say nothing of others: a search that is above its floor on held-out pairs has learned the sources
    that splits share. (Hewitt & Liang 2019, arXiv 1909.03368; the control task of Arora et al. 2024, arXiv
    2402.12560.)

    Of several variables the sources of a pair count as one. What the pairs said of values, of the answers to
    sources and of their kinds is left out, since it is not true of these answers. Of training pairs that are drawn
    afresh, sources that the other splits do not have get an answer by a digest of their inputs.

    Raises:
        ValueError: pairs that expect one answer only.
    """
    whole_number(seed, "seed")
    fixed = [split for split in (pairs.train, pairs.dev, pairs.test) if isinstance(split, Counterfactuals)]
    expected = sorted({answer for split in fixed for answer in split.answer.tolist()})
    if len(expected) < 2:
        raise ValueError(
            f"All pairs expect one answer, {pairs.test.answers[expected[0]]!r}: others need two to deal."
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
    """The same bases and sources, with the expected answers of each split dealt to its pairs anew.

    Each split keeps its bases, its sources and how often each answer is expected; which pair expects which has no
    reason. Other than with `control_labels` one source may get several answers, so that only the pairs themselves
    can be learned by heart. What the pairs said of values, of the answers to sources and of their kinds is left
    out.
    """
    whole_number(seed, "seed")

    def shuffled(split: Counterfactuals, number: int) -> Counterfactuals:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{number}".encode()))
        return _with_answers(split, split.answer.cpu()[torch.randperm(len(split), generator=generator)])

    return _changed(pairs, shuffled, "shuffled answers")


def _changed(pairs: Pairs, change: Callable[[Counterfactuals, int], Counterfactuals], what: str) -> Pairs:
    """All splits changed; `change` gets a split and its number, which no two of them share."""
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
