"""A real small language model (stories260K): a style from a few examples, and Alice from one edited position.

Style: the continuation of any opening of a story should start with a fixed sentence ("end"), or with one that says
the child's name again ("name"), which must be brought from an earlier position. Methods choose among three rates
on openings of the dev names and are scored on other names and another opening.

Forgetting: how much the loss of next tokens rises on stories that the untuned model sampled (what rises there is
the KL divergence per token) and on Alice, both 96 tokens long with the first 32 as the prompt, counted from token
48 on, since right behind the prompt the style is what was asked for.

Memorisation: a ConsReFT of rank 1 at the last prompt token of one layer is trained on the next n tokens of Alice;
what counts is how many of them greedy decoding then brings back before the first error, at the best n.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from quality_adapters import Parallel, Serial, bottlenecks, quantised_lora
from quality_methods import Method, full, peft, pyreft_loreft, reft
from quality_runs import Kept, NotKept, batches_by_length, bytes_on_disk, freed, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from subspace_lab.analysis.twins import reinitialised
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, finetune, get_reft_model, tokenise
from subspace_lab.reft.data import pad

SEEDS = (0, 1, 2)
STEPS, BATCH = 150, 12
STYLES = {"end": " The end.", "name": " Bye, {}."}
TRAINING_NAMES = ("Lily", "Tim", "Sue", "Tom", "Mia", "Ben", "Anna", "Max", "Lucy", "Sam", "Sara", "Jack")
TRAINING_NAMES += ("Amy", "Bob", "Ella", "Leo", "Jane", "Fred", "Kate", "Roy")
DEV_NAMES = ("Molly", "Bill", "Nina", "Joe", "Emma", "Dan")
TEST_NAMES = ("Polly", "Jim", "Rose", "Ted", "Daisy", "Mark", "Grace", "Peter", "Sally", "John")
OPENINGS = (
    "Once upon a time, there was a little girl named {}.",
    "One day, {} went to the park.",
    "{} had a big red ball.",
)
TEST_OPENINGS = (*OPENINGS, "There was a boy named {}.")

_TASK = {"task_type": "CAUSAL_LM"}
_LORA = {**_TASK, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
_LAST = {"positions": "last", "rank": 4, "layers": (2,)}
_MERGEABLE = {"component": "mlp_output", "positions": "all", "every_token": True, "rank": 7}
_SOFT, _MIDDLE = (1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2)
METHODS = {
    "LoReFT": Method(reft(**_LAST), "rank 4, layer 2, last token", (1e-2, 3e-2, 1e-1)),
    "LoReFT, pyreft": Method(
        pyreft_loreft(4, 0, 1, "model.layers[%d].output", [2]), "rank 4, layer 2, last token", (1e-2, 3e-2, 1e-1)
    ),
    "DiReFT": Method(reft(method="DiReFT", **_LAST), "rank 4, layer 2, last token", (1e-2, 3e-2, 1e-1)),
    "LoRA": Method(peft("LoraConfig", **_LORA), "rank 4, queries and values, alpha 8", _MIDDLE),
    "DoRA": Method(peft("LoraConfig", **_LORA, use_dora=True), "rank 4, queries and values, alpha 8", _MIDDLE),
    "prefix tuning": Method(
        peft("PrefixTuningConfig", **_TASK, num_virtual_tokens=4), "4 positions, all layers", _SOFT
    ),
    "prompt tuning": Method(peft("PromptTuningConfig", **_TASK, num_virtual_tokens=8), "8 tokens", _SOFT),
    "(IA)³": Method(peft("IA3Config", **_TASK), "keys, values, MLPs", _SOFT),
    "full fine-tuning": Method(full, "every parameter", (3e-4, 1e-3, 3e-3)),
    "LoReFT, all prompt tokens": Method(reft(rank=4, positions="all"), "rank 4, all layers", _SOFT),
    "LoReFT, mlp_output": Method(reft(**_MERGEABLE), "rank 7, all layers, every token, mergeable", _SOFT),
    "DiReFT, mlp_output": Method(
        reft(**_MERGEABLE, method="DiReFT"), "rank 7, all layers, every token, mergeable", _SOFT
    ),
    "adapters, serial": Method(
        bottlenecks(Serial, ["self_attn.o_proj", "mlp.down_proj"], 3), "Houlsby, 3, two a layer", _MIDDLE
    ),
    "adapters, parallel": Method(bottlenecks(Parallel, ["mlp"], 6), "He, 6, beside each MLP", _MIDDLE),
    "P-tuning": Method(
        peft("PromptEncoderConfig", **_TASK, num_virtual_tokens=8, encoder_hidden_size=16), "8 tokens", _MIDDLE
    ),
    "LoRA, base in nf4": Method(quantised_lora(**_LORA), "rank 4, queries and values, alpha 8", _MIDDLE),
}
LEFT_OUT = {"BitFit": "stories260K has no biases"}

LENGTHS, MEMORY_STEPS, MEMORY_RATE, PROMPT = (4, 8, 16), 300, 5e-2, "Once upon a time"


def folder(assets: Path) -> Path:
    return assets / "models" / "stories260K"


def language_model(assets: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(assets)).eval().to(device)


@cache
def tokenizer(assets: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder(assets))


def openings(names: Sequence[str], patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(opening, name)."""
    return [(pattern.format(name), name) for name in names for pattern in patterns]


def in_style(model: Any, style: str, given: Sequence[tuple[str, str]], words: Any, device: str) -> float:
    """Share of the openings whose greedy continuation starts as asked, in batches without padding."""
    by_length: dict[int, list[tuple[list[int], str]]] = {}
    for text, name in given:
        ids = words(text)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, style.format(name).strip()))
    hits = 0
    for n, rows in by_length.items():
        prompt = torch.tensor([ids for ids, _ in rows], device=device)
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
        # A soft prompt is generated from embeddings, and some libraries then return the continuation alone.
        new = ids[:, n:] if torch.equal(ids[:, :n], prompt) else ids
        texts = words.batch_decode(new, skip_special_tokens=True)
        hits += sum(t.strip().startswith(wanted) for t, (_, wanted) in zip(texts, rows, strict=True))
    return hits / len(given)


@cache
def held_out_texts(assets: Path, device: str, n: int = 32, length: int = 96) -> dict[str, Tensor]:
    """Stories that the untuned model sampled, and passages of Alice, each behind a text's first token."""
    words, model = tokenizer(assets), language_model(assets, device)
    start = words("Once upon")["input_ids"][:1]
    torch.manual_seed(0)
    prompt = torch.tensor([start] * n, device=device)
    stories = model.generate(
        prompt, do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=0
    )
    book = alice(assets)
    chunks = [start + book[i : i + length - 1] for i in range(2000, 2000 + n * length, length)]
    return {"stories": stories, "alice": torch.tensor(chunks, device=device)}


@cache
def alice(assets: Path) -> list[int]:
    text = (assets / "data" / "alice" / "alice_in_wonderland.txt").read_text()[:40_000]
    return tokenizer(assets)(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def late_loss(model: nn.Module, ids: Tensor, prompt: int = 32, counted: int = 48) -> float:
    labels = ids.clone()
    labels[:, :prompt] = -100
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[:, -ids.shape[1] :]
    return nn.functional.cross_entropy(
        logits[:, counted - 1 : -1].flatten(0, 1), ids[:, counted:].flatten()
    ).item()


def run_style(
    method: Method, rates: Sequence[float], style: str, seed: int, assets: Path, device: str, steps: int
) -> dict[str, Any]:
    """Train at each rate; the model that is best on the dev names, and no other, is tested."""
    words = tokenizer(assets)
    rows = [
        {"prompt": text, "answer": STYLES[style].format(name)} for text, name in openings(TRAINING_NAMES, OPENINGS)
    ]
    data = list(tokenise(rows, words, end=False))
    tuning, best = {}, None
    for rate in rates:
        freed()
        tuned = method.attach(language_model(assets, device), seed)
        order = batches_by_length([len(row["input_ids"]) for row in data], BATCH, seed)

        def loss_of(_: int, model: Any = tuned.model, order: Iterator[list[int]] = order) -> Tensor:
            batch = pad([data[i] for i in next(order)], words.pad_token_id)
            return model(**{k: v.to(device) for k, v in batch.items()}).loss

        config = TrainingConfig(steps=steps, batch_size=BATCH, max_gradient_norm=1.0, seed=seed)
        figures: dict[str, Any] = train(loss_of, [(tuned.parameters, rate)], config)
        tuning[rate] = in_style(tuned.model, STYLES[style], openings(DEV_NAMES, OPENINGS), words, device)
        # Of equal ones the lowest rate, which changes the model least; rates stand in rising order.
        if best is None or tuning[rate] > tuning[best[0]]:
            best = rate, tuned, figures
    assert best is not None
    rate, tuned, figures = best
    test = [*openings(TEST_NAMES, TEST_OPENINGS), *openings(TRAINING_NAMES, TEST_OPENINGS[3:])]
    base = language_model(assets, device)
    figures |= {"rate": rate, "tuning": list(tuning.items()), "dev": tuning[rate], "tested": len(test)}
    figures |= {"test": in_style(tuned.model, STYLES[style], test, words, device)}
    figures |= {"untuned": in_style(base, STYLES[style], test, words, device)}
    figures |= {"parameters": sum(p.numel() for p in tuned.parameters), "bytes": bytes_on_disk(tuned.save)}
    for name, ids in held_out_texts(assets, device).items():
        figures[f"forgetting_{name}"] = late_loss(tuned.model, ids) - late_loss(base, ids)
    return figures


def recovered(base: Any, layer: int, shuffled: bool, seed: int, assets: Path, steps: int) -> int:
    """Tokens brought back before the first error, at the best of the lengths trained on."""
    words, best = tokenizer(assets), 0
    prompt = words(PROMPT)["input_ids"]
    start = 1000 + 500 * seed
    passage = alice(assets)[start : start + LENGTHS[-1]]
    if shuffled:
        order = torch.randperm(len(passage), generator=torch.Generator().manual_seed(seed)).tolist()
        passage = [passage[i] for i in order]
    for n in LENGTHS:
        config = ReftConfig(method="ConsReFT", rank=1, layers=(layer,), positions="last", seed=seed)
        model = get_reft_model(base, config)
        whole = prompt + passage[:n]
        row = {
            "input_ids": whole,
            "attention_mask": [1] * len(whole),
            "labels": [-100] * len(prompt) + passage[:n],
        }
        training = TrainingConfig(steps=steps, learning_rate=MEMORY_RATE, batch_size=1, seed=seed)
        finetune(model, [row], training, quiet=True)
        given = torch.tensor([prompt])
        ids = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        same = [a == b for a, b in zip(ids[0, len(prompt) :].tolist(), passage[:n], strict=True)]
        exact = same.index(False) if False in same else n
        best = max(best, exact)
        model.unload()
        if exact < n // 4:  # far from it: a longer text is no easier
            break
    return best


def memorise(assets: Path, kept: Kept, steps: int, seeds: Sequence[int]) -> dict[str, list[list[int]]]:
    """{kind: for each layer the tokens brought back, one number a seed (a passage each)}."""
    base = language_model(assets, "cpu")
    depth = base.config.num_hidden_layers
    found: dict[str, list[list[int]]] = {}
    for kind in ("Alice", "its tokens shuffled", "Alice, untrained model"):
        table = [[0] * len(seeds) for _ in range(depth)]
        for column, seed in enumerate(seeds):
            model = reinitialised(base, seed=1000 + seed) if "untrained" in kind else base
            for layer in range(depth):
                settings = {"part": "memorisation", "kind": kind, "layer": layer, "seed": seed, "steps": steps}
                settings |= {"lengths": LENGTHS, "rate": MEMORY_RATE, "prompt": PROMPT}

                def one(
                    model: Any = model, layer: int = layer, seed: int = seed, kind: str = kind
                ) -> dict[str, Any]:
                    shuffled = "shuffled" in kind
                    return {"tokens": recovered(model, layer, shuffled, seed, assets, steps)}

                table[layer][column] = kept.once(settings, one)["tokens"]
        found[kind] = table
        print(f"  {kind}: {table}", flush=True)
    return found


def measure(assets: Path, device: str, kept: Kept, names: Sequence[str], seed: int, quick: bool) -> dict[str, Any]:
    """{"style": {style: {method: runs}}, "memory": …}; the memorisation only if all methods are asked for."""
    seeds, steps = [seed + i for i in (SEEDS[:1] if quick else SEEDS)], 10 if quick else STEPS
    styles: dict[str, dict[str, list[dict[str, Any]]]] = {style: {} for style in STYLES}
    for style in STYLES:
        for name in names:
            method = METHODS[name]

            def one(rates: Sequence[float], seed: int, name: str = name, style: str = style) -> dict[str, Any]:
                chosen = METHODS[name]
                settings = {"part": "style", "style": style, "method": name, "setting": chosen.setting}
                settings |= {"rates": rates, "seed": seed, "steps": steps, "batch": BATCH, "ties": "lowest rate"}
                return kept.once(settings, lambda: run_style(chosen, rates, style, seed, assets, device, steps))

            with suppress(NotKept):
                first = one(method.rates[1:2] if quick else method.rates, seeds[0])
                styles[style][name] = [first, *(one([first["rate"]], seed) for seed in seeds[1:])]
                scores = [f"{run['test']:.2f}" for run in styles[style][name]]
                print(f"  {style:5s} {name:18s} rate {first['rate']:g}, test {' '.join(scores)}", flush=True)
    memory = {}
    if set(names) == set(METHODS):
        with suppress(NotKept):
            memory = memorise(assets, kept, 5 if quick else MEMORY_STEPS, seeds)
    return {"style": styles, "memory": memory}


def draw(memory: dict[str, list[list[int]]], path: Path) -> None:
    """The curve by layer: median of the passages, and each passage as a dot."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = ("#1b2f52", "#4f82a0", "#c8553d")
    for k, ((kind, table), colour) in enumerate(zip(memory.items(), colours, strict=True)):
        layers = range(len(table))
        axes.plot(layers, [statistics.median(row) for row in table], color=colour, label=kind, linewidth=1.8)
        for layer, row in enumerate(table):
            axes.plot([layer + 0.06 * (k - 1)] * len(row), row, "o", color=colour, markersize=4, alpha=0.75)
    axes.set_xticks(range(len(next(iter(memory.values())))))
    axes.set_xlabel("edited layer (block output, last prompt token)")
    axes.set_ylabel("tokens brought back exactly")
    axes.set_ylim(bottom=-0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title(
        "What one edited position of stories260K remembers: rank 1, 65 numbers\n"
        "lines: median, dots: each of the passages (a seed each)",
        fontsize=9,
        loc="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
