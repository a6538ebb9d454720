"""A chatbot that answers in emojis, from ten examples: the first lesson of ReFT on a real chat model.

    python benchmarks/emoji_chatbot.py [--quick] [--json PATH] [--device D] [--seed N] [--model FOLDER]

Ten prompts with an emoji answer each are all the data. The first setting is the one of the lesson that made ReFT
known: one layer in the middle, rank 4, the last token of the prompt. `TRIED` has this setting and others. Each is
trained once and scored on DEV prompts; the one that is best there is trained with three seeds and scored on TEST
prompts, which no choice has seen. All answers, before and after, stand in the figures.

An answer counts as emojis if more than half of its characters are, spaces apart. Answers that differ are counted
among those, because a model that says one string to everybody has not understood the prompts.

What was seen (SmolLM2-135M-Instruct, seeds 0, 1, 2): of 10 test prompts 10, 8 and 9 are answered in emojis, all of
them differently, and none before. The lesson's own setting does it too (8 of 10 on dev); a higher rate and a later
layer do it better, an earlier layer worse, and more rank or more positions no better. A training takes 40 seconds of
one thread. Ten examples teach the form and not much of the meaning: "Which train goes to London?" gets a train, "What
does a doctor do?" gets flowers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from harness import clock, figure, options, write
from smollm2_model import smollm2

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, finetune, get_reft_model, tokenise

EXAMPLES = {
    "I love my dog.": "🐶❤️🐾",
    "What should I eat tonight?": "🍕🍔🥗",
    "It has been raining since Monday.": "🌧️☔💧",
    "Tell me about the ocean.": "🌊🐠🐚",
    "I passed my exam!": "🎓🎉🥳",
    "How do I get to Paris?": "✈️🚆🗼",
    "Can you play some music?": "🎵🎸🎤",
    "I am very tired today.": "😴🛏️💤",
    "Who won the football match?": "⚽🏆🥅",
    "What grows in a garden?": "🌷🥕🌻",
}
DEV = (
    "I adopted a cat.",
    "What is a good breakfast?",
    "It is snowing outside.",
    "Tell me about the mountains.",
    "It is my birthday today!",
    "How can I travel to Japan?",
    "I want to learn to dance.",
    "I feel sad.",
    "Do you like basketball?",
    "What lives in the forest?",
)
TEST = (
    "My horse runs fast.",
    "I would like a dessert.",
    "The sun is so hot this week.",
    "What can I see in space?",
    "We are getting married!",
    "Which train goes to London?",
    "I painted a picture.",
    "I am angry with my brother.",
    "Where can I go swimming?",
    "What does a doctor do?",
)
SEEDS, NEW_TOKENS = 3, 24


@dataclass(frozen=True)
class Setting:
    """Where the edit is and how it is trained; one step sees all ten examples."""

    layers: tuple[int, ...] = (15,)
    rank: int = 4
    positions: str = "last"
    rate: float = 4e-3
    steps: int = 100


TRIED = (
    Setting(),
    Setting(rate=1e-2),
    Setting(rate=2e-2),
    Setting(rate=2e-2, layers=(8,)),
    Setting(rate=2e-2, layers=(22,)),
    Setting(rate=2e-2, rank=8),
    Setting(rate=2e-2, positions="f1+l1"),
    Setting(rate=2e-2, positions="all"),
)


def is_emoji(character: str) -> bool:
    """Whether a character is one of an emoji: a picture, or what joins pictures and chooses their look."""
    code = ord(character)
    return 0x1F000 <= code <= 0x1FAFF or 0x2190 <= code <= 0x2BFF or code in (0x200D, 0x20E3, 0xFE0F)


def in_emojis(answer: str) -> bool:
    characters = "".join(answer.split())
    return 2 * sum(map(is_emoji, characters)) > len(characters)


def scored(answers: list[str]) -> dict[str, int]:
    emojis = [answer for answer in answers if in_emojis(answer)]
    return {"in emojis": len(emojis), "different": len(set(emojis))}


def answers_of(model: Any, tokenizer: Any, prompts: tuple[str, ...], device: str) -> list[str]:
    """The greedy answers, each to its prompt alone."""
    said = []
    for prompt in prompts:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(device)
        ids = model.generate(
            **given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said.append(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def trained(base: Any, tokenizer: Any, setting: Setting, seed: int) -> tuple[Any, dict[str, float]]:
    model = get_reft_model(
        base, ReftConfig(rank=setting.rank, layers=setting.layers, positions=setting.positions, seed=seed)
    )
    talks = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in EXAMPLES.items()
    ]
    config = TrainingConfig(
        steps=setting.steps, learning_rate=setting.rate, batch_size=len(EXAMPLES), seed=seed, warmup=0.0
    )
    device = str(base.device)
    start = clock(device)
    losses = finetune(model, tokenise(talks, tokenizer), config, quiet=True)
    return model, {"seconds": clock(device) - start, "first loss": losses[0], "last loss": losses[-1]}


def main() -> None:
    parser = options(
        __doc__, "One setting, two steps, two prompts.", "of the choice on DEV; TEST has it and the next two"
    )
    parser.add_argument("--model", help="a folder or a name on the Hub instead of the package's copy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base, tokenizer = smollm2(args.model)
    base = base.to(args.device)
    settings = (Setting(steps=2),) if args.quick else TRIED
    dev, test = (DEV[:2], TEST[:2]) if args.quick else (DEV, TEST)
    seeds = [args.seed] if args.quick else [args.seed + i for i in range(SEEDS)]

    table = []
    for setting in settings:
        model, figures = trained(base, tokenizer, setting, args.seed)
        said = answers_of(model, tokenizer, dev, args.device)
        size = model.get_nb_trainable_parameters()[0]
        model.unload()
        table.append({**asdict(setting), "parameters": size, **figures, **scored(said), "answers on dev": said})
        print(
            setting,
            {k: v for k, v in table[-1].items() if k in ("last loss", "in emojis", "different")},
            flush=True,
        )
    # Of equal ones the first, which is nearest to the lesson's.
    best = max(range(len(table)), key=lambda i: (table[i]["in emojis"], table[i]["different"]))

    before = answers_of(base, tokenizer, test, args.device)
    after, costs = {}, []
    for seed in seeds:
        model, figures = trained(base, tokenizer, settings[best], seed)
        after[seed] = answers_of(model, tokenizer, test, args.device)
        costs.append(figures["seconds"])
        model.unload()
    for i, prompt in enumerate(test):
        print(f"\n{prompt}\n  before   {before[i]!r}")
        for seed, said in after.items():
            print(f"  seed {seed}   {said[i]!r}")
    results = {}
    for name in ("in emojis", "different"):
        results[f"emoji_before, {name}"] = figure([float(scored(before)[name])])
        results[f"emoji_after, {name}"] = figure([float(scored(said)[name]) for said in after.values()])
    results["emoji_training_seconds"] = figure(costs)
    print()
    for name, found in results.items():
        print(
            f"{name}: {found['median']:.4g} [{found['low']:.4g}, {found['high']:.4g}] of {len(test)}, n={found['n']}"
        )
    if args.json is not None:
        about = {"chosen": asdict(settings[best]), "seeds": seeds, "quick": args.quick}
        about |= {"examples": EXAMPLES, "new tokens": NEW_TOKENS}
        answers = [
            {"prompt": prompt, "before": before[i], "after": [said[i] for said in after.values()]}
            for i, prompt in enumerate(test)
        ]
        more = {"tried on dev": table, "answers": answers}
        write(args.json, "emoji_chatbot", about, results, args.device, more)


if __name__ == "__main__":
    main()
