"""Trains the small decoder that ships with the package, from scratch, on text that the tasks write.

    python benchmarks/train_shipped_model.py --out subspace_lab/assets/tiny_decoder

One thread, about 18 minutes, 1.1 MB. The model sees both splits of every task: a split is for the search for a
subspace, not for the language model. Price prompts also come with two other questions, "too low :" and "too
high :", so that either comparison is worth knowing on its own.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspace_lab.das.counterfactuals import Task
from subspace_lab.tasks import entity_attribute, indirect_object, price_tagging
from subspace_lab.tasks.entity_attribute import ENTITY_ATTRIBUTE
from subspace_lab.tasks.indirect_object import INDIRECT_OBJECT
from subspace_lab.tasks.price_tagging import PRICE_TAGGING

TASKS = (PRICE_TAGGING, INDIRECT_OBJECT, ENTITY_ATTRIBUTE)
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
IGNORED = -100
LONGEST = 64  # tokens


def example(task: Task, rng: random.Random) -> tuple[str, str]:
    """A fresh prompt and its answer; a price prompt asks for one of the comparisons half of the time."""
    setting = task.sample(rng, rng.choice(["train", "test"]))
    text, answer = task.prompt(setting).text, task.answer(setting)
    if task is PRICE_TAGGING and rng.random() < 0.5:
        values = task.causal_model.run(task.inputs(setting))
        query, variable = rng.choice([("too low", "above_lower"), ("too high", "below_upper")])
        text = text.removesuffix("answer :") + f"{query} :"
        answer = "no" if values[variable] else "yes"
    return text, answer


def words() -> list[str]:
    """Every word that the tasks and the two other questions can use, sorted, numbers last and in order."""
    texts = [*price_tagging.TEMPLATES, *indirect_object.TEMPLATES, *entity_attribute.TEMPLATES]
    found = {word for text in texts for word in text.split() if "{" not in word}
    found |= {"too", "low", "high", "dollars", "answer", ":", "to", "is", "yes", "no"}
    found |= {name for names in indirect_object.NAMES.values() for name in names}
    found |= {*entity_attribute.FACTS, *entity_attribute.ATTRIBUTES, *ENTITY_ATTRIBUTE.answers.values()}
    return [*sorted(found), *(str(number) for number in range(1, price_tagging.HIGHEST + 1))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=LONGEST,
    )


def batch_of(
    tokenizer: PreTrainedTokenizerFast, task: Task, size: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids of `prompt answer <eos>`, next-token labels, the index of each prompt's last token."""
    pairs = [example(task, rng) for _ in range(size)]
    rows = tokenizer([f"{text} {answer} <eos>" for text, answer in pairs])["input_ids"]
    width = max(map(len, rows))
    ids = torch.full((size, width), tokenizer.pad_token_id)
    labels = torch.full((size, width), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, : len(row) - 1] = torch.tensor(row[1:])
    return ids, labels, torch.tensor([len(row) - 3 for row in rows])


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, n: int, seed: int
) -> dict[str, float]:
    """Top-1 over the whole vocabulary after `n` fresh prompts, with the Wilson 95 % interval."""
    rng, right = random.Random(seed), 0
    for _ in range(n // 500):
        settings = [task.sample(rng, rng.choice(["train", "test"])) for _ in range(500)]
        batch = tokenizer([task.prompt(setting).text for setting in settings], padding=True, return_tensors="pt")
        guesses = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1].argmax(-1)
        wanted = tokenizer.convert_tokens_to_ids([task.answer(setting) for setting in settings])
        right += (guesses == torch.tensor(wanted)).sum().item()
    n = n // 500 * 500
    p, z = right / n, 1.959964
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return {"accuracy": p, "n": n, "wilson_low": low, "wilson_high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    # Rows of a step for each task: price is the slow one, the other two are learned in a few hundred steps.
    parser.add_argument("--rows", type=int, nargs=3, default=(192, 48, 48))
    # Weight of the tokens before the answer, most of which cannot be foreseen.
    parser.add_argument("--prompt-weight", type=float, default=0.02)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        initializer_range=0.02 * math.sqrt(512 / args.width),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / args.steps)) / 2),
    )
    started = time.perf_counter()
    for step in range(args.steps):
        total = {}
        for task, size in zip(TASKS, args.rows, strict=True):
            ids, labels, last = batch_of(tokenizer, task, size, rng)
            logits = model(ids).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            ).view_as(labels)
            answer_loss = losses.gather(1, last[:, None]).mean()
            loss = answer_loss + args.prompt_weight * losses.sum() / (labels != IGNORED).sum()
            loss.backward()
            total[task.name] = answer_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            parts = "  ".join(f"{name} {value:.4f}" for name, value in total.items())
            print(f"{step + 1:6d}  {time.perf_counter() - started:6.0f} s  {parts}", flush=True)
        if (step + 1) % 500 == 0:
            print(
                {task.name: accuracy(model, tokenizer, task, 2000, step)["accuracy"] for task in TASKS},
                flush=True,
            )

    model.eval()
    record = {
        "seed": args.seed,
        "steps": args.steps,
        "settings": {
            "width": args.width,
            "layers": args.layers,
            "lr": args.lr,
            "rows": dict(zip((task.name for task in TASKS), args.rows, strict=True)),
            "prompt_weight": args.prompt_weight,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "seconds": round(time.perf_counter() - started),
        "accuracy": {task.name: accuracy(model, tokenizer, task, 10_000, 10**6 + args.seed) for task in TASKS},
    }
    model.save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)  # one that carries no padding from its use above
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["accuracy"], indent=2))


if __name__ == "__main__":
    main()
