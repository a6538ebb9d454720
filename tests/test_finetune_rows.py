"""What `finetune`, `suggest`, `keep_past` and `generate` accept, and what they say about other input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import fresh
from test_reft_trainer import answers, decoder, equal, numbers

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, finetune, get_reft_model, suggest

CONFIG = TrainingConfig(steps=2, batch_size=4, learning_rate=2e-2)


def as_tensors(row: dict[str, Any]) -> dict[Any, Any]:
    return {name: torch.tensor(value) for name, value in row.items()}


def as_arrays(row: dict[str, Any]) -> dict[Any, Any]:
    return {name: np.array(value) for name, value in row.items()}


def others(rows: list[Any]) -> dict[Any, Any]:
    return {
        "tensors": [as_tensors(row) for row in rows],
        "arrays": [as_arrays(row) for row in rows],
        "torch": Dataset.from_list(rows).with_format("torch"),
        "numpy": Dataset.from_list(rows).with_format("numpy"),
        "generator": iter(rows),
    }


@pytest.mark.parametrize("form", ["tensors", "arrays", "torch", "numpy", "generator"])
def test_rows_in_every_form_train_the_same(form: str) -> None:
    rows = list(answers(6))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    one, other = decoder(), decoder()
    losses = finetune(one, rows, CONFIG, quiet=True)
    assert finetune(other, others(rows)[form], CONFIG, quiet=True) == losses
    assert equal(numbers(one), numbers(other))


def test_equal_rows_of_tensors_are_on_one_side_of_a_suggestion() -> None:
    rows = [as_tensors(row) for row in [*answers(3)] * 3]
    found = suggest(fresh("llama"), rows, settings=[ReftConfig(rank=1)], training=CONFIG, quiet=True)
    ids = [
        {tuple(rows[i]["input_ids"].tolist()) for i in side} for side in (found.training_rows, found.held_out_rows)
    ]
    assert not ids[0] & ids[1]


ROW = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, -100, 7]}
WRONG = {
    "no rows": ([], ValueError, "No examples"),
    "no labels in the second": ([ROW, {"input_ids": [5]}], ValueError, "no labels"),
    "other columns": ([ROW, {k: ROW[k] for k in ("input_ids", "labels")}], ValueError, "example 1 has"),
    "a label less": ([ROW, {**ROW, "labels": [-100, 7]}], ValueError, "Example 1 .*'labels': 2"),
    "a fraction": ([{**ROW, "input_ids": [5.0, 6.0, 7.0]}], ValueError, "token 5.0"),
    "unknown token": ([{**ROW, "input_ids": [5, 6, 10**6]}], ValueError, "token 1000000"),
    "negative token": ([{**ROW, "input_ids": [5, -6, 7]}], ValueError, "token -6"),
    "unknown label": ([{**ROW, "labels": [-100, -100, 10**6]}], ValueError, "token 1000000"),
    "a column of text": ([{**ROW, "id": "x"}], ValueError, "columns \\['id'\\]"),
    "a column of numbers": ([{**ROW, "id": 3}], ValueError, "columns \\['id'\\]"),
}


@pytest.mark.parametrize("rows, kind, text", WRONG.values(), ids=WRONG)
def test_other_rows_are_refused_with_the_reason(rows: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        finetune(decoder(), rows, CONFIG, quiet=True)
    with pytest.raises(kind, match=text.replace("examples", "held-out examples")):
        finetune(decoder(), answers(4), CONFIG, held_out=rows, quiet=True)


@pytest.mark.parametrize("change, text", [({"id": 3}, "columns"), ({"labels": [7]}, "one of each")])
def test_suggest_and_keep_past_refuse_them_too(change: dict[str, Any], text: str) -> None:
    rows = [{**row, **change} for row in answers(6)]
    with pytest.raises(ValueError, match=text):
        suggest(fresh("llama"), rows, training=CONFIG, quiet=True)
    with pytest.raises(ValueError, match=text):
        decoder().keep_past(Dataset.from_list(rows))


def test_rows_longer_than_the_model_reads_are_refused() -> None:
    model = fresh("gpt2")
    most = model.config.max_position_embeddings
    row = {"input_ids": [5] * (most + 1), "labels": [-100] * most + [5]}
    with pytest.raises(ValueError, match=f"{most + 1} tokens; the model reads {most}"):
        finetune(get_reft_model(model, ReftConfig(rank=1)), [row], CONFIG, quiet=True)


def test_a_model_that_writes_no_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="no causal language model"):
        finetune(get_reft_model(fresh("bert"), ReftConfig(rank=1)), [ROW], CONFIG, quiet=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(context: Callable[..., Any]) -> None:
    model = decoder()
    with context(), pytest.raises(ValueError, match="Gradients are switched off"):
        finetune(model, answers(4), CONFIG, quiet=True)


# The checks of types that tests run under would speak first, hence another process.
TYPES = """
from test_finetune_rows import *

for name, call in {
    "nothing": lambda: finetune(decoder(), None),
    "text": lambda: finetune(decoder(), "abc"),
    "one batch": lambda: finetune(decoder(), ROW),
    "lists": lambda: finetune(decoder(), [[5, 6, 7]]),
    "held out": lambda: finetune(decoder(), [ROW], held_out=3),
    "kept": lambda: decoder().keep_past([ROW]),
    "config": lambda: finetune(decoder(), [ROW], {"steps": 2}),
    "suggest": lambda: suggest(fresh("llama"), 3),
    "training": lambda: suggest(fresh("llama"), [ROW], training={"steps": 2}),
    "rates": lambda: suggest(fresh("llama"), [ROW], learning_rates=1e-3),
    "written from text": lambda: decoder().generate("hello"),
    "written from rows": lambda: decoder().generate(input_ids=[[5, 6, 7]]),
    "written from nothing": lambda: decoder().generate(max_new_tokens=2),
    "lengths": lambda: decoder()(torch.tensor([[5, 6, 7]]), prompt_lengths=torch.tensor([1.5])),
    "parts": lambda: ReftConfig(parts=3),
    "parts of text": lambda: ReftConfig(parts="ab"),
    "modules": lambda: ReftConfig(modules_to_save=3),
    "a module": lambda: ReftConfig(modules_to_save=[3]),
    "activation": lambda: ReftConfig(activation=[]),
    "dropout": lambda: ReftConfig(dropout=[0.1]),
    "base": lambda: ReftConfig(base_model_name_or_path=3),
    "revision": lambda: ReftConfig(revision={}),
}.items():
    try:
        call()
    except Exception as error:
        print(f"{name}| {type(error).__name__}: {error}")
"""
SAID = {
    "nothing": "TypeError: The examples are of type NoneType",
    "text": "TypeError: The examples are of type str",
    "one batch": "TypeError: The examples are of type dict",
    "lists": "TypeError: One of the examples is of type list",
    "held out": "TypeError: The held-out examples are of type int",
    "kept": "TypeError: examples is of type list; needed is Dataset",
    "config": "TypeError: config is of type dict",
    "suggest": "TypeError: The examples are of type int",
    "training": "TypeError: training is of type dict",
    "rates": "TypeError: learning_rates is of type float",
    "written from text": "TypeError: input_ids is of type str",
    "written from rows": "TypeError: input_ids is of type list",
    "written from nothing": "ValueError: generate needs a prompt",
    "lengths": "ValueError: Prompt lengths [1.5] for rows of [3] real tokens: each must be a whole number",
    "parts": "TypeError: parts=3",
    "parts of text": "TypeError: parts='ab'",
    "modules": "TypeError: modules_to_save=3",
    "a module": "TypeError: modules_to_save=[3]",
    "activation": "ValueError: activation=[]",
    "dropout": "ValueError: dropout=[0.1]",
    "base": "TypeError: base_model_name_or_path is of type int",
    "revision": "TypeError: revision is of type dict",
}


def test_other_types_are_refused_with_a_sentence() -> None:
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", TYPES], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split("| ", 1) for line in done.stdout.splitlines())
    assert said.keys() == SAID.keys()
    assert not {name: said[name] for name in SAID if not said[name].startswith(SAID[name])}


def test_a_model_whose_own_loss_is_not_finite_is_named() -> None:
    model = fresh("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="loss of the model itself"):
        suggest(model, answers(4), training=CONFIG, quiet=True)
