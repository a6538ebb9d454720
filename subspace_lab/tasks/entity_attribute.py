"""Entities and attributes: facts about made-up entities (after RAVEL, Huang et al. 2024).

An entity has two attributes, and exchanging one must not change the other. So with this task cause (the attribute takes
the source's value) and isolation (the other attribute keeps the base's value) can be measured separately.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, cause_or_isolate, check_split
from subspace_lab.tasks.wording import fill

COUNTRIES = ("France", "Japan", "Peru", "Kenya", "Norway", "India")
FOODS = ("bread", "rice", "soup", "cheese", "apples", "fish")
ATTRIBUTES = ("country", "food")
TEMPLATES = (
    "the {attribute} of {entity} {last}",
    "{entity} was asked and said that the {attribute} {last}",
    "about {entity} we know that the {attribute} {last}",
)


def _table() -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, ...]]]:
    """72 entities, each pair of values twice, and their split: 36 train, 12 dev, 24 test."""
    starts = ("Zor", "Mal", "Tig", "Bren", "Quo", "Fal", "Dru", "Kes", "Lom")
    names = [start + end for start in starts for end in ("bel", "nik", "dor", "via", "mun", "rax", "lit", "pos")]
    random.Random(0).shuffle(names)
    facts: dict[str, tuple[str, str]] = {}
    split: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for second in (False, True):
        for i, country in enumerate(COUNTRIES):
            for j, food in enumerate(FOODS):
                facts[name := names[len(facts)]] = (country, food)
                # A Latin square: in each split all countries, and all foods, are equally frequent.
                held_out = "test" if (i + j) % 3 else "dev"
                split[held_out if second else "train"].append(name)
    return facts, {name: tuple(entities) for name, entities in split.items()}


FACTS, ENTITIES = _table()


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """An entity of the split, with a question about one of its two attributes."""
    check_split(split)
    return {
        "entity": rng.choice(ENTITIES[split]),
        "attribute": rng.choice(ATTRIBUTES),
        "template": rng.randrange(len(TEMPLATES)),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `entity`, `attribute` and `last`, the closing "is"."""
    return fill(TEMPLATES[setting["template"]], {**setting, "last": "is"})


ENTITY_ATTRIBUTE = Task(
    name="entity_attribute",
    description="country or food of a made-up entity, whichever is asked for",
    causal_model=CausalModel(
        {
            "country": lambda entity: FACTS[entity][0],
            "food": lambda entity: FACTS[entity][1],
            "answer": lambda attribute, country, food: country if attribute == "country" else food,
        }
    ),
    variable="country",
    answers={value: value for value in (*COUNTRIES, *FOODS)},
    sample=sample,
    prompt=prompt,
    entity="entity",
    kind=cause_or_isolate,
)
