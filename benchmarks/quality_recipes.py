"""The settings of the ReFT paper (Wu et al. 2024, appendix C and the authors' commands) as values that run.

With the real models and data on a GPU, which is what the published figures are of; or on stand-ins, a language
model of 260,032 parameters and a small encoder with a few hundred real rows, where scores are near chance and what
is shown is that the pipeline runs from data to score. Training is plain `transformers.Trainer`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import quality_minilm as minilm
import torch
from datasets import Dataset, load_dataset
from quality_runs import Kept
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from subspace_lab.reft import PromptCollator, ReftConfig, get_reft_model, tokenise
from subspace_lab.reft.data import pad

DATA = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One experiment of the paper.

    Attributes:
        kind: "choice", "number", "text" or "class": how rows become prompts and continuations become scores.
        model: a name on the Hub or a folder.
        train, tests: a file or an address that ends in .json, .jsonl or .tsv, or a Hub name, "name:config:split".
        rate, epochs, batch, accumulate, warmup, decay: of AdamW with a linear schedule.
        max_length: tokens of prompt and answer.
        new_tokens: of a continuation.
        generation: what else `generate` is given.
        limit: rows of each set; None takes all.
        stand_in: what replaces the model and the data where there is no GPU, with paths inside the assets.
    """

    kind: str
    model: str
    train: str
    tests: tuple[str, ...]
    rank: int
    positions: str
    layers: str | tuple[int, ...]
    rate: float
    epochs: float
    batch: int
    accumulate: int = 1
    tied: str = "all"
    warmup: float = 0.0
    decay: float = 0.0
    dropout: float = 0.0
    max_length: int = 512
    new_tokens: int = 32
    generation: Row = field(default_factory=dict)
    seed: int = 42
    limit: int | None = None
    stand_in: Row = field(default_factory=dict)

    def small(self, assets: Path) -> Recipe:
        """The same on the stand-ins: 96 rows, one epoch, 32 rows of each test."""
        model = assets / "models" / "stories260K" if self.kind != "class" else minilm.folder()
        places = {
            "train": str(assets / "data" / self.stand_in["train"]),
            "tests": tuple(str(assets / "data" / t) for t in self.stand_in["tests"]),
        }
        fitting = {"layers": (1, 3)} if isinstance(self.layers, tuple) else {}
        size = {"limit": 96, "epochs": 1, "batch": min(self.batch, 8), "accumulate": 2}
        size |= {"new_tokens": min(self.new_tokens, 24), "max_length": min(self.max_length, 448)}
        return replace(self, model=str(model), **places, **fitting, **size)  # type: ignore[arg-type]


RECIPES = {
    "commonsense": Recipe(
        "choice",
        "yahma/llama-7b-hf",
        f"{DATA}/ft-training_set/commonsense_170k.json",
        tuple(
            f"{DATA}/dataset/{name}/test.json"
            for name in (
                "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande",
                "ARC-Easy", "ARC-Challenge", "openbookqa",
            )
        ),
        rank=8, positions="f7+l7", layers="all", rate=9e-4, epochs=6, batch=16, accumulate=2, warmup=0.1,
        stand_in={
            "train": "boolq/train.json",
            "tests": ("boolq/test.json", "arc_easy/test.json", "openbookqa/test.json"),
        },
    ),
    "arithmetic": Recipe(
        "number",
        "yahma/llama-7b-hf",
        f"{DATA}/ft-training_set/math_10k.json",
        tuple(f"{DATA}/dataset/{name}/test.json" for name in ("AQuA", "gsm8k", "mawps", "SVAMP")),
        rank=8, positions="f7+l7", layers="all", rate=9e-4, epochs=12, batch=16, accumulate=2, warmup=0.1,
        new_tokens=512,
        stand_in={
            "train": "gsm8k/train.jsonl",
            "tests": ("gsm8k/test.jsonl", "mawps/test.json", "svamp/test.json", "aqua/test.json"),
        },
    ),
    "instruct": Recipe(
        "text",
        "meta-llama/Llama-2-7b-hf",
        "https://raw.githubusercontent.com/frankaging/ultrafeedback-dataset/main/train.json",
        ("tatsu-lab/alpaca_eval:alpaca_eval:eval",),
        rank=4, positions="f5+l5", tied="group", layers=(3, 9, 18, 24), rate=9e-4, epochs=9, batch=4,
        accumulate=32, max_length=768, new_tokens=2048,
        generation={"no_repeat_ngram_size": 5, "repetition_penalty": 1.1},
        seed=44,
        stand_in={
            "train": "ultrafeedback/ultrafeedback_1k.json", "tests": ("ultrafeedback/ultrafeedback_1k.json",)
        },
    ),
    "glue-sst2": Recipe(
        "class",
        "FacebookAI/roberta-base",
        "nyu-mll/glue:sst2:train",
        ("nyu-mll/glue:sst2:validation",),
        rank=1, positions="f3", layers="all", rate=6e-4, epochs=40, batch=32, warmup=0.1,
        dropout=0.1, max_length=256,
        stand_in={"train": "sst2/train.tsv", "tests": ("sst2/test.tsv",)},
    ),
}  # fmt: skip


# --- data ---------------------------------------------------------------------------------------------------


def rows_of(source: str, limit: int | None) -> list[Row]:
    """The rows of a file, an address or a set on the Hub."""
    if source.endswith(".tsv"):
        cells = [line.split("\t") for line in Path(source).read_text().splitlines()]
        rows: Iterable[Row] = [{"sentence": text, "label": int(label)} for text, label in cells]
    elif source.startswith("http"):
        rows = load_dataset("json", data_files=source, split="train")
    elif source.endswith((".json", ".jsonl")):
        text = Path(source).read_text()
        # Some files called .json hold one object a line.
        rows = json.loads(text) if text.lstrip()[0] == "[" else map(json.loads, text.splitlines())
    else:
        name, *more = source.split(":")
        split = more.pop() if more else "train"
        rows = load_dataset(name, *more, split=split)
    found = list(rows)
    return found if limit is None else found[:limit]


def prompted(kind: str, row: Row) -> Row:
    """{prompt, answer to learn, gold to be scored by}."""
    if kind == "choice":
        gold = str(row["answer"])
        return {"prompt": row["instruction"] + "\n", "answer": f"the correct answer is {gold}", "gold": gold}
    question = row.get("question") or row.get("instruction") or row.get("original_text")
    answer = row.get("output") or row.get("answer") or row.get("ans")
    if kind == "text":
        whole = question if not row.get("input") else f"{question}\n{row['input']}"
        return {"prompt": ALPACA.format(whole), "answer": str(answer).strip(), "gold": None}
    text = str(answer)
    gold = text.split("####")[-1].strip() if "####" in text else str(row.get("answer", answer))
    text = text.replace("####", "The final answer is:").strip()
    return {"prompt": ALPACA.format(question), "answer": text, "gold": gold}


def is_right(kind: str, said: str, gold: str) -> bool:
    """Whether a continuation gives the gold answer: the choice it names, or its last number or letter."""
    if kind == "choice":
        found = re.search(r"the correct answer is (\w+)", said)
        return found is not None and found[1].lower() == gold.lower()
    if re.fullmatch("[A-E]", gold):
        letters = re.findall(r"\b([A-E])\b", said)
        return bool(letters) and letters[-1] == gold
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", said)
    return bool(numbers) and abs(number(numbers[-1]) - number(gold)) < 1e-3


def number(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))


# --- running ------------------------------------------------------------------------------------------------


def trained(
    recipe: Recipe, model: Any, rows: Dataset, collate: Callable[[list[Row]], Any], folder: str, device: str
) -> float:
    """Train by plain Trainer; the last loss it logged."""
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.rate,
        warmup_steps=recipe.warmup,  # a share of the steps, where it is below 1
        weight_decay=recipe.decay,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
        remove_unused_columns=False,
    )
    run = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry][-1]


def run(recipe: Recipe, device: str, batch: int = 16) -> Row:
    """Train one recipe and score it on each of its tests; chance is that of the most frequent gold answer."""
    config = ReftConfig(
        rank=recipe.rank,
        layers=recipe.layers,
        positions=recipe.positions,
        tied=recipe.tied,  # type: ignore[arg-type]
        dropout=recipe.dropout,
        seed=recipe.seed,
        modules_to_save=("classifier",) if recipe.kind == "class" else (),
    )
    torch.manual_seed(recipe.seed)
    words = AutoTokenizer.from_pretrained(recipe.model, padding_side="left")
    words.pad_token = words.pad_token or words.unk_token or words.eos_token
    kind = {"dtype": torch.bfloat16 if device != "cpu" else torch.float32}
    auto = AutoModelForSequenceClassification if recipe.kind == "class" else AutoModelForCausalLM
    base: Any = auto.from_pretrained(recipe.model, **kind).to(device)
    model = get_reft_model(base, config)
    score = classified if recipe.kind == "class" else continued
    with tempfile.TemporaryDirectory() as folder:
        figures = score(recipe, model, words, folder, device, batch)
    return {**figures, "parameters": model.get_nb_trainable_parameters()[0]}


def continued(recipe: Recipe, model: Any, words: Any, folder: str, device: str, batch: int) -> Row:
    room = recipe.max_length
    rows = [prompted(recipe.kind, row) for row in rows_of(recipe.train, recipe.limit)]
    # Of longer prompts nothing of the answer would be left.
    rows = [row for row in rows if row["answer"] and len(words(row["prompt"])["input_ids"]) < room - 8]
    data = tokenise([{k: row[k] for k in ("prompt", "answer")} for row in rows], words, max_length=room)
    figures: Row = {"rows": len(data), "loss": trained(recipe, model, data, PromptCollator(words), folder, device)}
    model.eval()
    for source in recipe.tests:
        test = [prompted(recipe.kind, row) for row in rows_of(source, None if recipe.limit is None else 32)]
        name = Path(source).parent.name if "/" in source and ":" not in source.split("/")[-1] else source
        said = []
        for i in range(0, len(test), batch):
            prompts = [row["prompt"] for row in test[i : i + batch]]
            given = words(prompts, return_tensors="pt", padding=True, truncation=True, max_length=room)
            given = {k: given[k].to(device) for k in ("input_ids", "attention_mask")}
            ids = model.generate(
                **given,
                max_new_tokens=recipe.new_tokens,
                do_sample=False,
                pad_token_id=words.pad_token_id,
                **recipe.generation,
            )
            said += words.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        if recipe.kind == "text":
            # What a judge is asked about: the scores of the paper are AlpacaEval's.
            figures[name] = {"continuations": len(said), "mean length": sum(map(len, said)) / len(said)}
            continue
        golds = [row["gold"] for row in test]
        hits = sum(is_right(recipe.kind, s, g) for s, g in zip(said, golds, strict=True))
        most = max(golds.count(gold) for gold in set(golds))
        figures[name] = {"score": hits / len(test), "constant answer": most / len(test), "n": len(test)}
    return figures


def classified(recipe: Recipe, model: nn.Module, words: Any, folder: str, device: str, batch: int) -> Row:
    words.padding_side = "right"

    def encoded(source: str, limit: int | None) -> list[Row]:
        rows = rows_of(source, limit)
        ids = words([row["sentence"] for row in rows], truncation=True, max_length=recipe.max_length)
        pairs = zip(rows, ids["input_ids"], ids["attention_mask"], strict=True)
        return [{"input_ids": i, "attention_mask": m, "labels": row["label"]} for row, i, m in pairs]

    def collate(rows: list[Row]) -> Any:
        return pad(rows, words.pad_token_id)

    data = encoded(recipe.train, recipe.limit)
    figures: Row = {
        "rows": len(data),
        "loss": trained(recipe, model, Dataset.from_list(data), collate, folder, device),
    }
    model.eval()
    for source in recipe.tests:
        rows = encoded(source, None if recipe.limit is None else 128)
        hits = 0
        with torch.no_grad():
            for i in range(0, len(rows), batch):
                given = {k: v.to(device) for k, v in collate(rows[i : i + batch]).items()}
                labels = given.pop("labels")
                hits += int((model(**given).logits.argmax(-1) == labels).sum())
        share = sum(row["labels"] for row in rows) / len(rows)
        name = Path(source).parent.name if ":" not in source else source
        figures[name] = {"score": hits / len(rows), "constant answer": max(share, 1 - share), "n": len(rows)}
    return figures


def measure(assets: Path, device: str, kept: Kept, names: Iterable[str], seed: int) -> dict[str, Row]:
    """Every recipe on its stand-ins."""
    found = {}
    for name in names:
        recipe = RECIPES[name].small(assets)
        recipe = replace(recipe, seed=recipe.seed + seed)
        found[name] = kept.once({"part": "recipes", "name": name, **asdict(recipe)}, partial(run, recipe, device))
        print(f"  {name}: {found[name]}", flush=True)
    return found
