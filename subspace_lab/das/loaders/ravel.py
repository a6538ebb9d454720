"""RAVEL (Huang et al. 2024, arXiv 2402.17700): attributes of cities, laureates, objects, verbs and occupations.

Its files, as published, for an entity type TYPE:

    ravel_TYPE_entity_attributes.json      {entity: {attribute: value}}
    ravel_TYPE_attribute_to_prompts.json   {attribute: [prompt with %s in the entity's place]}
    ravel_TYPE_entity_to_split.json        {entity: train | val | test}
    ravel_TYPE_prompt_to_split.json        {prompt: train | val | test}
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_lab.das.loaders._parts import Row, expect, numbers_of, read

ALTERNATIVES = re.compile(r",(?! )")  # as in "Arabic,Kurdish"; a comma followed by a space is part of a value
FACTS = re.compile(r"ravel_(.+)_entity_attributes\.json")
ITS_SPLIT = {"train": "train", "dev": "val", "test": "test"}
PLACE = "%s"
PATIENCE = 1000  # at most so many draws to find two entities that differ


def ravel(
    folder: str | Path,
    entity_type: str,
    variable: str,
    *,
    isolated: Sequence[str] | None = None,
    pairs: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Rows of pairs about one attribute. Half of the prompts ask for this attribute, half for another one.

    If the prompt asks for the attribute (kind "cause"), the answer after the interchange is the source's. If it asks
    for another attribute (kind "isolate"), the answer must stay the base's. The two entities of a pair have different
    values of the variable and of the attribute that the prompt asks for. Base and source have the same prompt. The
    splits of entities and prompts are RAVEL's own. The position `entity` is the entity. Of several values
    ("Arabic,Kurdish") the first is the answer. The labels are entity, source_entity, template and kind.

    Args:
        folder: the folder with RAVEL's files.
        entity_type: "city", "nobel_prize_winner", "physical_object", "verb" or "occupation".
        variable: the attribute to search for, for example "Country".
        isolated: the other attributes that prompts ask for; by default all.
        pairs: how many pairs, such as {"train": 1000, "dev": 200, "test": 400}, or a number for train.
        seed: seed of the random draw.

    Raises:
        FileNotFoundError: no such folder or files.
        ValueError: an entity type without files, an attribute that does not exist, or a split without entities or
            prompts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; needed is the one with RAVEL's files.")
    there = [found[1] for one in sorted(folder.glob("*.json")) if (found := FACTS.fullmatch(one.name))]
    if there and entity_type not in there:
        raise ValueError(f"entity_type={entity_type!r}: the files in {folder} are of {', '.join(there)}.")
    files = {
        what: expect(read(folder / f"ravel_{entity_type}_{what}.json"), dict, f"ravel_{entity_type}_{what}.json")
        for what in ("entity_attributes", "attribute_to_prompts", "entity_to_split", "prompt_to_split")
    }
    facts, prompts = files["entity_attributes"], files["attribute_to_prompts"]
    others = [name for name in prompts if name != variable] if isolated is None else list(isolated)
    if unknown := [name for name in (variable, *others) if name not in prompts]:
        raise ValueError(f"{unknown} are no attributes of {entity_type!r}; it has {list(prompts)}.")
    rng, rows = random.Random(seed), []
    for split, n in numbers_of(pairs).items():
        own = ITS_SPLIT[split]
        entities = [name for name, of in files["entity_to_split"].items() if of == own and name in facts]
        asked = {
            name: [p for p in prompts[name] if files["prompt_to_split"].get(p) == own and p.count(PLACE) == 1]
            for name in (variable, *others)
        }
        others_here = [name for name in others if asked[name]]
        if len(entities) < 2 or not asked[variable]:
            raise ValueError(
                f"The {own} split has {len(entities)} entities and {len(asked[variable])} prompts that ask for "
                f"{variable!r}: too few for pairs."
            )
        for i in range(n):
            attribute = rng.choice(others_here) if i % 2 and others_here else variable
            base, source = _two(rng, entities, facts, {variable, attribute})
            rows.append(_row(base, source, rng.choice(asked[attribute]), attribute, variable, facts, split))
    return rows


def _two(
    rng: random.Random, entities: Sequence[str], facts: Mapping[str, Mapping[str, Any]], differ: set[str]
) -> tuple[str, str]:
    """Two entities that both have these attributes, with different values."""
    for _ in range(PATIENCE):
        one, other = rng.sample(entities, 2)
        values = [(facts[one].get(name), facts[other].get(name)) for name in differ]
        if all(a and b and a != b for a, b in values):
            return one, other
    raise ValueError(f"In {PATIENCE} draws no two entities differed in {sorted(differ)}.")


def _row(
    base: str,
    source: str,
    prompt: str,
    attribute: str,
    variable: str,
    facts: Mapping[str, Mapping[str, Any]],
    split: str,
) -> Row:
    def value(entity: str) -> str:
        return ALTERNATIVES.split(str(facts[entity][attribute]))[0]

    at = prompt.index(PLACE)
    return {
        "base": prompt.replace(PLACE, base),
        "source": {variable: prompt.replace(PLACE, source)},
        "base_answer": value(base),
        "source_answer": {variable: value(source)},
        "answer": value(source if attribute == variable else base),
        "position": {"entity": {"base": [at, at + len(base)], "source": [at, at + len(source)]}},
        "entity": base,
        "source_entity": source,
        "template": prompt,
        "kind": "cause" if attribute == variable else "isolate",
        "split": split,
    }
