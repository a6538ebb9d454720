"""Rival hypotheses on the same pairs: which causal model does a network follow?

A hypothesis is a causal model and a choice of its variables, which are exchanged. All hypotheses give the same answers
to the bases; they differ in the answers that they expect after an interchange. So bases and sources are drawn once, and
each hypothesis adds the answers that it expects. Each is searched for, and the scores are compared pair by pair:

    rivals = rival_pairs(task, hypotheses, tokenizer)
    fits = {name: sweep(lab, pairs, sites, methods) for name, pairs in rivals.items()}
    rank_hypotheses(rivals, fits)  # das/ranking.py

Pairs in which all hypotheses expect the same answer distinguish nothing. So scores are also given for the other pairs
alone.

Source: Wu et al. 2023, "Interpretability at Scale" (arXiv 2305.08809), section 4, which compares several hypotheses
about one task by their IIA.
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

from subspace_lab.core.arguments import instance
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import CounterfactualPair, Task, check_split, counted
from subspace_lab.das.encoding import encode
from subspace_lab.das.pairs import Counterfactuals, Pairs

OVERSAMPLING = 10  # draws for each pair; the pairs that distinguish the hypotheses best are chosen from them


@dataclass(frozen=True)
class Hypothesis:
    """A claim about what a network computes.

    Attributes:
        name: for people.
        causal_model: what the network computes, according to this hypothesis.
        variables: the variables of the causal model that are exchanged, each with its own source.

    Raises:
        TypeError: a text instead of a tuple of names.
        ValueError: no variable, a variable twice, or a variable that is not in the causal model.
    """

    name: str
    causal_model: CausalModel
    variables: tuple[str, ...]

    def __post_init__(self) -> None:
        instance(self.causal_model, CausalModel, f"hypothesis {self.name!r}: causal_model")
        if isinstance(self.variables, str):
            raise TypeError(
                f"hypothesis {self.name!r}: variables is a tuple of names; write ({self.variables!r},) for this one"
            )
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
    """Pairs for each hypothesis: the same bases and sources for all, and each hypothesis's own expected answers.

    A hypothesis takes the first source for its first variable, the second for its second, and so on. If it has several
    variables, each pair exchanges a random non-empty subset of them; a variable outside of the subset has the base as
    its source. More pairs are drawn than needed. A combination is the answer to the base with the answers that the
    hypotheses expect. Pairs are chosen so that there are many combinations, as equally frequent as possible: so most
    pairs distinguish hypotheses, and a constant answer helps no hypothesis.

    Args:
        task: gives settings, prompts and answers; its own causal model is not used.
        tokenizer: the model's tokenizer, a fast Hugging Face tokenizer.
        train, dev, test: how many pairs each split gets.
        seed: seed of the random draw.

    Raises:
        TypeError: a name instead of a task or a tokenizer.
        ValueError: fewer than two hypotheses, two with the same name, two that answer a base differently, hypotheses
            that expect the same answers in all pairs; also as in `Task.pairs`.
    """
    instance(task, Task, "task", "of one that comes along load_task('price_tagging')")
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
    """n pairs, each as {hypothesis: the pair according to it}, of as many combinations of answers as possible."""
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
            "split: no search could distinguish them"
        )
    number = {kind: i for i, kind in enumerate(dict.fromkeys(combinations))}
    chosen = balanced(torch.tensor([number[kind] for kind in combinations]), n, seed)
    return [drawn[i] for i in chosen.tolist()]


def balanced(kinds: Int[Tensor, " pairs"], n: int, generator: torch.Generator | int) -> Int[Tensor, " chosen"]:
    """Indices of n of some pairs, chosen so that all kinds are equally frequent, in random order.

    If a kind has too few pairs, all of them are taken. ValueError if n is larger than the number of pairs.
    """
    if n > len(kinds):
        raise ValueError(f"{n} pairs asked for, of {len(kinds)}")
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    order = torch.randperm(len(kinds), generator=generator)
    order = order[kinds[order].argsort(stable=True)]
    _, counts = kinds[order].unique_consecutive(return_counts=True)
    # The index of each pair within its kind. Pairs are then taken in this order: one of each kind, then a second, ...
    before = torch.cat([torch.arange(count) for count in counts.tolist()])
    chosen = order[before.argsort(stable=True)[:n]]
    return chosen[torch.randperm(n, generator=generator)]
