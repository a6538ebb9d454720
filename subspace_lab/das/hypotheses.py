"""Rival hypotheses on the same pairs: which causal model does a network follow?

Every hypothesis is a causal model and those of its variables that are exchanged. All of them answer every base alike;
they differ in what they expect after an interchange. So bases and sources are drawn once, each hypothesis says what
it expects of them, each is searched for, and the scores are compared pair by pair:

    rivals = rival_pairs(task, hypotheses, tokenizer)
    fits = {name: sweep(lab, pairs, sites, methods) for name, pairs in rivals.items()}
    rank_hypotheses(rivals, fits)  # das/ranking.py

Pairs of which all hypotheses expect the same tell nothing, so scores are also given on those where they differ.

Source: Wu et al. 2023, "Interpretability at Scale" (arXiv 2305.08809), section 4, whose hypotheses share a task and
are told apart by their IIA.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import CounterfactualPair, Task, check_split, counted
from subspace_lab.das.encoding import encode
from subspace_lab.das.pairs import Counterfactuals, Pairs

OVERSAMPLING = 10  # draws for each pair that is asked for, from which those are chosen that tell most


@dataclass(frozen=True)
class Hypothesis:
    """A claim about what a network computes.

    Attributes:
        name: for people.
        causal_model: what it computes.
        variables: those of its variables that are exchanged, each with a source of its own.

    Raises:
        ValueError: no variable, one twice, or one that the causal model lacks.
    """

    name: str
    causal_model: CausalModel
    variables: tuple[str, ...]

    def __post_init__(self) -> None:
        possible = [*self.causal_model.inputs, *self.causal_model.variables]
        given = list(self.variables)
        if not given or len(set(given)) < len(given) or not set(given) <= set(possible):
            raise ValueError(
                f"hypothesis {self.name!r}: variables {given} asked for; possible are one or more, each once, of "
                f"{possible}"
            )


def rival_pairs(
    task: Task,
    hypotheses: Sequence[Hypothesis],
    tokenizer: Any,
    *,
    train: int = 1000,
    dev: int = 200,
    test: int = 400,
    seed: int = 0,
) -> dict[str, Pairs]:
    """For each hypothesis pairs with the same bases and sources as the others have, and its own expected answers.

    A hypothesis takes the first source for its first variable, the second for its second, and so on. One of several
    variables exchanges in each pair a non-empty subset of them, drawn uniformly; a variable left alone has the base
    as its source. Of many draws those pairs are taken in which the answer of the base and the answers expected by
    the hypotheses come in as many combinations as possible, each as often as the next where that can be had: so most
    pairs tell hypotheses apart, and no hypothesis is served by its constant answer.

    Args:
        task: gives settings, prompts and answers; its own causal model takes no part.
        tokenizer: of the model, a fast Hugging Face tokenizer.
        train, dev, test: how many pairs each split gets.
        seed: of the draw.

    Raises:
        ValueError: fewer than two hypotheses, two of one name, an answer of a base on which two of them differ,
            hypotheses that expect the same of every pair; and as `Task.pairs`.
    """
    names = [hypothesis.name for hypothesis in hypotheses]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"hypotheses {names}: two or more are needed, of different names")
    tasks = {h.name: replace(task, causal_model=h.causal_model, variable=h.variables[0]) for h in hypotheses}
    kept, left = task.serving(tokenizer, seed=seed)
    found: dict[str, dict[str, Counterfactuals]] = {name: {} for name in names}
    for split, n in (("train", train), ("dev", dev), ("test", test)):
        drawn = _drawn(tasks, hypotheses, n, split, seed, left)
        for hypothesis in hypotheses:
            name = hypothesis.name
            rows = [pairs[name].row(tasks[name], hypothesis.variables) for pairs in drawn]
            found[name][split] = encode(Dataset.from_list(rows), tokenizer, kept)
    return {
        name: Pairs(of["train"], of["dev"], of["test"], f"{task.name}: {name}", counted(left))
        for name, of in found.items()
    }


def _drawn(
    tasks: Mapping[str, Task],
    hypotheses: Sequence[Hypothesis],
    n: int,
    split: str,
    seed: int,
    without: Collection[str],
) -> list[dict[str, CounterfactualPair]]:
    """n pairs, each as every hypothesis sees it, of as many combinations of answers as there are."""
    check_split(split)
    if n < 1:
        raise ValueError(f"n = {n} pairs asked for; possible are 1 or more")
    rng, task = random.Random(seed), next(iter(tasks.values()))
    most = max(len(hypothesis.variables) for hypothesis in hypotheses)
    drawn, combinations = [], []
    for _ in range(n * OVERSAMPLING):
        base, *sources = (task.sample(rng, split) for _ in range(most + 1))
        subset = rng.random()
        seen = {}
        for hypothesis in hypotheses:
            mask = 1 + int(subset * ((1 << len(hypothesis.variables)) - 1))
            exchanged = {v: sources[i] for i, v in enumerate(hypothesis.variables) if mask >> i & 1}
            seen[hypothesis.name] = CounterfactualPair.of(tasks[hypothesis.name], base, exchanged)
        if without and not all(pair.avoids(tasks[name], without) for name, pair in seen.items()):
            continue
        before = {name: pair.base_answer for name, pair in seen.items()}
        if len(set(before.values())) > 1:
            raise ValueError(f"the hypotheses give other answers to the base {dict(base)}: {before}")
        drawn.append(seen)
        combinations.append((next(iter(before.values())), *(pair.answer for pair in seen.values())))
    if all(len(set(expected)) == 1 for _, *expected in combinations):
        raise ValueError(
            f"the hypotheses {list(tasks)} expect the same of all {len(drawn)} pairs that were drawn for the {split} "
            "split: no search could tell them apart"
        )
    number = {kind: i for i, kind in enumerate(dict.fromkeys(combinations))}
    chosen = balanced(torch.tensor([number[kind] for kind in combinations]), n, seed)
    return [drawn[i] for i in chosen.tolist()]


def balanced(kinds: Int[Tensor, " pairs"], n: int, generator: torch.Generator | int) -> Int[Tensor, " chosen"]:
    """Which n of some pairs to take, so that each kind is as frequent as the next; in random order.

    Of a kind with fewer pairs all are taken. ValueError for more pairs than there are.
    """
    if n > len(kinds):
        raise ValueError(f"{n} pairs asked for, of {len(kinds)}")
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    order = torch.randperm(len(kinds), generator=generator)
    order = order[kinds[order].argsort(stable=True)]
    _, counts = kinds[order].unique_consecutive(return_counts=True)
    # How many of its kind come before each pair: pairs are then taken kind by kind, one of each in turn.
    before = torch.cat([torch.arange(count) for count in counts.tolist()])
    chosen = order[before.argsort(stable=True)[:n]]
    return chosen[torch.randperm(n, generator=generator)]
