"""CausalGym (Arora et al. 2024, arXiv 2402.12560): linguistic minimal pairs.

There are two published formats. Templates, many in one file:

    {name: {"templates": ["The {noun}"], "label": "noun", "variables": {"noun": {"is": [words], "are": [words]}, …}}}

The values of the variable named by `label` are the answers. Suites of SyntaxGym (Gauthier et al. 2020), one in a file:

    {"items": [{"item_number": 1, "conditions": [{"condition_name": "match_sing",
                "regions": [{"region_number": 1, "content": "The"}, …]}, …]}, …],
     "predictions": [{"formula": "(6;%match_sing%) < (6;%mismatch_sing%)"}, …], "region_meta": {"1": "intro", …}}

A prediction says in which of two conditions a region is less surprising. The text before the region is the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace_lab.das.loaders._parts import Row, expect, filled, numbers_of, parted, read

FORMULA = re.compile(r"\s*\((\d+);%([^%]+)%\)\s*([<>])\s*\((\d+);%([^%]+)%\)\s*")


def templates_of(path: str | Path) -> list[str]:
    """The names of the sets in a file of templates."""
    return list(expect(read(Path(path)), dict, str(path)))


def minimal_pairs(
    path: str | Path, name: str, *, pairs: int | Mapping[str, int] | None = None, seed: int = 0
) -> list[Row]:
    """Rows of pairs from a set of templates. Base and source differ only in the word of the variable named by `label`.

    In half of the pairs the source's word, and with it the answer, is of the other type. The words of each type are
    divided into three splits. The variable, and the position of its word, have the name that `label` gives; the labels
    are entity and source_entity (the words) and template.

    Args:
        path: a file of templates.
        name: the name of the set.
        pairs: how many pairs, such as {"train": 1000, "dev": 200, "test": 400}, or a number for train.
        seed: seed of the random draw and of the splits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such set, or a set with fewer than two answers or fewer than six words for an answer.
    """
    sets = expect(read(Path(path)), dict, str(path))
    if name not in sets:
        raise ValueError(f"{path} has no set {name!r}; it has {list(sets)}.")
    one = sets[name]
    where = f"{path}, {name!r}"
    label, variables = (
        expect(one.get("label"), str, f"{where}, 'label'"),
        expect(one.get("variables"), dict, where),
    )
    kinds = expect(variables.get(label), dict, f"{where}, the variable {label!r}")
    if len(kinds) < 2:
        raise ValueError(f"{where}: the variable {label!r} has the answers {list(kinds)}; needed are two.")
    templates = [
        text for text in expect(one.get("templates"), list, f"{where}, 'templates'") if f"{{{label}}}" in text
    ]
    words = {answer: parted(own, seed) for answer, own in kinds.items()}
    rng, rows = random.Random(seed), []
    for split, n in numbers_of(pairs).items():
        for i in range(n):
            template = rng.choice(expect(templates, list, f"{where}, templates with {{{label}}}"))
            answer = rng.choice(list(kinds))
            other = rng.choice([a for a in kinds if a != answer]) if i % 2 == 0 else answer
            base = rng.choice(words[answer][split])
            source = rng.choice([word for word in words[other][split] if word != base])
            shared = {v: rng.choice(own) for v, own in variables.items() if v != label and f"{{{v}}}" in template}
            text, at = filled(template, {**shared, label: base})
            text_of_source, at_source = filled(template, {**shared, label: source})
            rows.append(
                {
                    "base": text,
                    "source": {label: text_of_source},
                    "base_answer": answer,
                    "source_answer": {label: other},
                    "answer": other,
                    "position": {v: {"base": at[v], "source": at_source[v]} for v in at},
                    "entity": base,
                    "source_entity": source,
                    "template": template,
                    "split": split,
                }
            )
    return rows


def suite(
    path: str | Path,
    *,
    instead: str | None = None,
    pairs: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Rows of pairs from a SyntaxGym suite. The prompt is the text before the region that the predictions compare.

    If two conditions have the same prompt and different regions, the right answer is the region that is predicted to
    be less surprising. If all conditions have the same region ("any", which one prompt licenses and the other does
    not), `instead` is the answer to prompts that do not license it. In half of the pairs base and source are of
    different types and of the same item; in the other half they are of the same type and of different items. The
    items are divided into three splits.

    The variable is called "type". The positions have the names of the regions; the labels are entity and source_entity
    (the items).

    Args:
        path: a file with a suite.
        instead: the answer to prompts after which the region is not expected.
        pairs, seed: as in `minimal_pairs`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or `instead` is missing and the predictions compare one region after different
            prompts.
    """
    whole = expect(read(Path(path)), dict, str(path))
    items = expect(whole.get("items"), list, f"{path}, 'items'")
    predictions = [FORMULA.fullmatch(str(one.get("formula"))) for one in whole.get("predictions", [])]
    names = {int(number): _named(text) for number, text in whole.get("region_meta", {}).items()}
    types: dict[str, dict[str, _Prompt]] = {}
    for item in items:
        number = str(item.get("item_number"))
        conditions = {one["condition_name"]: one["regions"] for one in item["conditions"]}
        types[number] = _types(conditions, [p for p in predictions if p is not None], names, instead, str(path))
    kinds = sorted(set.intersection(*(set(of) for of in types.values())))
    if len(kinds) < 2:
        raise ValueError(
            f"{path}: its predictions {[one.get('formula') for one in whole.get('predictions', [])]} give {len(kinds)} "
            "types of prompts with an answer; needed are two. If conditions differ only before the region that is "
            "compared, use instead=… for the answer to prompts that do not license this region."
        )
    parts = parted(list(types), seed)
    rng = random.Random(seed)
    rows: list[Row] = []
    for split, n in numbers_of(pairs).items():
        for i in range(n):
            number, kind = rng.choice(parts[split]), rng.choice(kinds)
            base = types[number][kind]
            others = [one for one in kinds if types[number][one].answer != base.answer]
            changes = i % 2 == 0 and bool(others)
            of = number if changes else rng.choice([one for one in parts[split] if one != number])
            source = types[of][rng.choice(others) if changes else kind]
            both = [name for name in base.places if name in source.places]
            rows.append(
                {
                    "base": base.text,
                    "source": {"type": source.text},
                    "base_answer": base.answer,
                    "source_answer": {"type": source.answer},
                    "answer": source.answer if changes else base.answer,
                    "position": {
                        name: {"base": base.places[name], "source": source.places[name]} for name in both
                    },
                    "entity": number,
                    "source_entity": of,
                    "split": split,
                }
            )
    shared = set.intersection(*(set(row["position"]) for row in rows))
    return [
        {**row, "position": {name: at for name, at in row["position"].items() if name in shared}} for row in rows
    ]


@dataclass(frozen=True)
class _Prompt:
    """The text before a region, the content of the region as the answer, and the spans of the regions before it."""

    text: str
    answer: str
    places: Mapping[str, list[int]]


def _types(
    conditions: Mapping[str, list[Mapping[str, Any]]],
    predictions: list[re.Match[str]],
    names: Mapping[int, str],
    instead: str | None,
    path: str,
) -> dict[str, _Prompt]:
    """{type: its prompt}, one for each condition in which a region is expected."""
    found: dict[str, _Prompt] = {}
    for one in predictions:
        region, (expected, other) = int(one[1]), (one[2], one[5]) if one[3] == "<" else (one[5], one[2])
        if missing := [name for name in (expected, other) if name not in conditions]:
            raise ValueError(
                f"{path}: a prediction names the condition {missing[0]!r}; the item has {list(conditions)}."
            )
        right, wrong = (_prompt(conditions[name], region, names) for name in (expected, other))
        if right.text == wrong.text and right.answer != wrong.answer:
            found[expected] = right
        elif instead is not None and right.text != wrong.text:
            found[expected] = right
            found[other] = _Prompt(wrong.text, instead, wrong.places)
    return found


def _prompt(regions: list[Mapping[str, Any]], region: int, names: Mapping[int, str]) -> _Prompt:
    """The prompt before a region, and the content of this region as its answer."""
    text, answer = "", ""
    places: dict[str, list[int]] = {}
    for one in sorted(regions, key=lambda one: int(one["region_number"])):
        number, content = int(one["region_number"]), str(one["content"]).strip()
        if number == region:
            answer = content
            break
        if content:
            text += " " if text else ""
            places[names.get(number, f"region_{number}")] = [len(text), len(text) + len(content)]
            text += content
    return _Prompt(text, answer, places)


def _named(text: str) -> str:
    """A region's name as the name of a position: letters, digits and underscores."""
    name = re.sub(r"\W+", "_", text.strip().lower()).strip("_")
    return name if name and not name[0].isdigit() else f"region_{name}"
