"""A real chat model, SmolLM2-135M: a name that must be carried, and a classification posed as a prompt.

name        the style "name" of quality_stories.py: " Bye, NAME." behind a story's opening that has the name
sentiment   SST-2 as "SENTENCE\\nSentiment:" and " positive" or " negative", sentences of 4 to 16 tokens

An answer is right if greedy decoding gives all of it. Every method has the same steps and batches and three rates.
The rate that is best on dev with the first seed is taken for all seeds (of equal ones the lowest); the models of
this rate, and no others, are scored on test. Where the size of a method is free it is that of LoRA of rank 2 on
queries and values, 115,200, within 20 %; RED, (IA)³ and edits of a few heads are as large as they are.

Forgetting: how much the loss of next tokens rises on Alice, 48 tokens behind a prompt of 24, counted from the 33rd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_adapters import head_edits, keep_heads
from quality_methods import Method, peft, reft
from quality_runs import Kept, NotKept, batches_by_length, bytes_on_disk, freed, train
from quality_stories import (
    DEV_NAMES,
    OPENINGS,
    STYLES,
    TEST_NAMES,
    TEST_OPENINGS,
    TRAINING_NAMES,
    late_loss,
    openings,
)
from smollm2_model import smollm2
from torch import Tensor

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import tokenise
from subspace_lab.reft.data import pad

Rows = list[dict[str, Any]]

SEEDS = (0, 1, 2)
STEPS, BATCH = 30, 8
SENTENCES = {"train": 240, "dev": 60, "test": 150}
SHORTEST, LONGEST = 4, 16
HEADS = 27  # of 270, a tenth as in LoFiT
REFERENCES = ("LoRA", "LoReFT, all prompt tokens")  # what the others are compared with

_TASK = {"task_type": "CAUSAL_LM"}
_LORA = {**_TASK, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
_MERGEABLE = {"component": "mlp_output", "positions": "all", "every_token": True}
_LOW, _RATES, _HIGH = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
METHODS = {
    "LoRA": Method(peft("LoraConfig", **_LORA), "rank 2, queries and values, alpha 4", _RATES),
    "LoReFT, all prompt tokens": Method(reft(rank=3, positions="all"), "rank 3, all layers", _LOW),
    "LoReFT, mlp_output, every token": Method(reft(rank=3, **_MERGEABLE), "rank 3, all layers, mergeable", _LOW),
    "LoReFT, f3+l3": Method(reft(rank=3, positions="f3+l3"), "rank 3, all layers", _LOW),
    "DiReFT, mlp_output, every token": Method(
        reft(method="DiReFT", rank=3, **_MERGEABLE), "rank 3, all layers, mergeable", _RATES
    ),
    "LoReFT, two layers": Method(
        reft(rank=50, positions="all", layers=(10, 20)), "rank 50, layers 10 and 20, all prompt tokens", _LOW
    ),
    "RED": Method(reft(method="RED", **_MERGEABLE), "mlp_output of all layers, every token, mergeable", _RATES),
    "head edits": Method(
        head_edits(),
        f"scale and bias of the {HEADS} heads of 270 whose scales have the largest gradient, every token",
        _RATES,
    ),
    "DoRA": Method(peft("LoraConfig", **_LORA, use_dora=True), "rank 2, queries and values, alpha 4", _RATES),
    "(IA)³": Method(peft("IA3Config", **_TASK), "keys, values, MLPs", _HIGH),
}
TASKS = ("name", "sentiment")


@cache
def loaded(device: str) -> tuple[Any, Any]:
    model, tokenizer = smollm2()
    return model.to(device), tokenizer


@cache
def rows(task: str, split: str, assets: Path) -> Rows:
    """Tokenised rows of a task."""
    tokenizer = loaded("cpu")[1]
    if task == "sentiment":
        lines = [line.split("\t") for line in (assets / "data" / "sst2" / f"{split}.tsv").read_text().splitlines()]
        words = ("negative", "positive")
        asked = [{"prompt": f"{text}\nSentiment:", "answer": f" {words[int(label)]}"} for text, label in lines]
        short = [row for row in asked if SHORTEST <= len(tokenizer(row["prompt"])["input_ids"]) - 3 <= LONGEST]
        order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0)).tolist()
        return list(tokenise([short[i] for i in order[: SENTENCES[split]]], tokenizer, end=False))
    given = {
        "train": openings(TRAINING_NAMES, OPENINGS),
        "dev": openings(DEV_NAMES, OPENINGS),
        "test": [*openings(TEST_NAMES, TEST_OPENINGS), *openings(TRAINING_NAMES, TEST_OPENINGS[3:])],
    }[split]
    asked = [{"prompt": text, "answer": STYLES["name"].format(name)} for text, name in given]
    return list(tokenise(asked, tokenizer, end=False))


def batch_of(some: Rows, device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in pad(some, loaded("cpu")[1].pad_token_id).items()}


@torch.no_grad()
def right(model: Any, some: Rows, device: str, size: int = 32) -> list[bool]:
    """Of each row, whether greedy decoding gives the answer: each of its tokens is the likeliest behind the others."""
    found: dict[int, bool] = {}
    order = sorted(range(len(some)), key=lambda i: len(some[i]["input_ids"]))
    for i in range(0, len(order), size):
        batch = batch_of([some[k] for k in order[i : i + size]], device)
        labels = batch["labels"][:, 1:]
        same = (model(**batch).logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        found |= dict(zip(order[i : i + size], same.all(1).tolist(), strict=True))
    return [found[i] for i in range(len(some))]


@cache
def alice(assets: Path, n: int = 8, length: int = 48, start: int = 2000) -> Tensor:
    text = (assets / "data" / "alice" / "alice_in_wonderland.txt").read_text()[:40_000]
    ids = loaded("cpu")[1](text)["input_ids"][start : start + n * length]
    return torch.tensor(ids).view(n, length)


def forgotten(model: Any, assets: Path, device: str) -> float:
    return late_loss(model, alice(assets).to(device), prompt=24, counted=32)


def prepared(
    name: str, task: str, seed: int, assets: Path, device: str
) -> tuple[Any, Callable[[int], Tensor], int]:
    """(the model with the method on it, its loss, how many numbers the method trains)."""
    freed()
    tuned = METHODS[name].attach(deepcopy(loaded(device)[0]), seed)
    tuned.model.eval()
    data = rows(task, "train", assets)
    order = batches_by_length([len(row["input_ids"]) for row in data], BATCH, seed)

    def loss_of(_: int) -> Tensor:
        return tuned.model(**batch_of([data[i] for i in next(order)], device)).loss

    size = sum(p.numel() for p in tuned.parameters)
    return tuned, loss_of, keep_heads(tuned, loss_of, HEADS) if name == "head edits" else size


def run(
    name: str, task: str, rates: Sequence[float], seed: int, assets: Path, device: str, steps: int, few: int | None
) -> dict[str, Any]:
    """Train at each rate; the model that is best on dev, and no other, is tested."""
    dev, test = (rows(task, split, assets)[:few] for split in ("dev", "test"))
    tuning: dict[float, float] = {}
    best: tuple[float, Any, dict[str, Any]] | None = None
    for rate in rates:
        tuned, loss_of, size = prepared(name, task, seed, assets, device)
        config = TrainingConfig(steps=steps, batch_size=BATCH, max_gradient_norm=1.0, seed=seed)
        figures: dict[str, Any] = train(loss_of, [(tuned.parameters, rate)], config)
        hits = right(tuned.model, dev, device)
        tuning[rate] = sum(hits) / len(hits)
        # Of equal ones the lowest rate, which changes the model least; rates stand in rising order.
        if best is None or tuning[rate] > tuning[best[0]]:
            best = rate, tuned, {**figures, "parameters": size}
    assert best is not None
    rate, tuned, figures = best
    hits = right(tuned.model, test, device)
    base = loaded(device)[0]
    return {
        **figures,
        "rate": rate,
        "tuning": list(tuning.items()),
        "dev": tuning[rate],
        "tested": len(hits),
        "wrong": [i for i, hit in enumerate(hits) if not hit],
        "bytes": bytes_on_disk(tuned.save),
        "drift": forgotten(tuned.model, assets, device) - forgotten(base, assets, device),
    }


def few_steps(name: str, assets: Path, device: str) -> Callable[[], Any]:
    """Three training steps of the name task, whose peak of memory is measured."""
    tuned, loss_of, _ = prepared(name, "name", 0, assets, device)
    config = TrainingConfig(steps=3, batch_size=BATCH)
    return lambda: train(loss_of, [(tuned.parameters, 1e-4)], config)


def untuned(task: str, assets: Path, device: str, few: int | None) -> dict[str, Any]:
    """How often the model gives the answers as it is, and how often the commonest of them would be right."""
    test = rows(task, "test", assets)[:few]
    hits = right(loaded(device)[0], test, device)
    answers = [tuple(t for t in row["labels"] if t != -100) for row in test]
    return {"untuned": sum(hits) / len(hits), "constant": max(map(answers.count, answers)) / len(answers)}


def measure(
    assets: Path, device: str, kept: Kept, names: Sequence[str], seed: int, quick: bool
) -> tuple[dict[str, dict[str, Rows]], dict[str, dict[str, Any]]]:
    """({task: {method: one run a seed}}, {task: the floors})."""
    seeds = [seed + i for i in (SEEDS[:1] if quick else SEEDS)]
    steps, few = (2, 8) if quick else (STEPS, None)
    tasks = TASKS[:1] if quick else TASKS
    found: dict[str, dict[str, Rows]] = {task: {} for task in tasks}
    floors = {}
    for task in tasks:
        given = {
            "part": "smollm2",
            "task": task,
            "few": few,
            "sentences": SENTENCES,
            "tokens": (SHORTEST, LONGEST),
        }
        with suppress(NotKept):
            floors[task] = kept.once({**given, "of": "floors"}, lambda t=task: untuned(t, assets, device, few))
        for name in names:
            settings = {**given, "method": name, "setting": METHODS[name].setting, "steps": steps, "batch": BATCH}

            def one(
                rates: Sequence[float], seed: int, name: str = name, task: str = task, settings: Any = settings
            ) -> dict[str, Any]:
                return kept.once(
                    {**settings, "rates": rates, "seed": seed},
                    lambda: run(name, task, rates, seed, assets, device, steps, few),
                )

            rates = METHODS[name].rates
            with suppress(NotKept):
                first = one(rates[1:2] if quick else rates, seeds[0])
                found[task][name] = [first, *(one([first["rate"]], seed) for seed in seeds[1:])]
                scores = [f"{1 - len(r['wrong']) / r['tested']:.2f}" for r in found[task][name]]
                print(f"  {task:9s} {name:32s} {first['tuning']}, test {' '.join(scores)}", flush=True)
    return found, floors
