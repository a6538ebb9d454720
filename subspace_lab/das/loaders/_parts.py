"""Helpers of the loaders: reading files, holding out words, filling templates."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "dev", "test")
SHARES = {"dev": 0.15, "test": 0.25}
NUMBERS = {"train": 1000, "dev": 200, "test": 400}

Row = dict[str, Any]


def read(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file; the message names the files in the folder.
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {path.parent}; {path.name} is looked for in it.")
        there = sorted(one.name for one in path.parent.glob("*.json"))
        raise FileNotFoundError(
            f"There is no file {path}; in its folder are {', '.join(there[:8]) or 'no .json files'}."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def expect(value: Any, kind: type, where: str) -> Any:
    """The value, if it has this type and is not empty; otherwise ValueError."""
    if not isinstance(value, kind) or not value:
        found = f"an empty {type(value).__name__}" if isinstance(value, kind) else type(value).__name__
        raise ValueError(f"{where}: needed is a {kind.__name__} that is not empty, found {found}.")
    return value


def parted(values: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Distinct values in three random splits, each value in one split. ValueError for fewer than six values."""
    order = list(dict.fromkeys(values))
    if len(order) < 6:
        raise ValueError(
            f"{len(order)} different values ({', '.join(order)}) for three splits: each split needs at least two."
        )
    random.Random(seed).shuffle(order)
    n = {name: max(2, round(share * len(order))) for name, share in SHARES.items()}
    return {
        "test": order[: n["test"]],
        "dev": order[n["test"] :][: n["dev"]],
        "train": order[n["test"] + n["dev"] :],
    }


def filled(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, list[int]]]:
    """A template with each {name} replaced, and the span of each name (of its last occurrence)."""
    text, rest = "", template
    places: dict[str, list[int]] = {}
    while True:
        found = [(rest.find(f"{{{name}}}"), name) for name in values if f"{{{name}}}" in rest]
        if not found:
            return text + rest, places
        at, name = min(found)
        text += rest[:at]
        places[name] = [len(text), len(text) + len(values[name])]
        text, rest = text + values[name], rest[at + len(name) + 2 :]


def numbers_of(pairs: int | Mapping[str, int] | None) -> dict[str, int]:
    """How many pairs each split gets. A single number is that of train; dev gets a fifth of it, test two fifths."""
    if pairs is None:
        return dict(NUMBERS)
    if isinstance(pairs, int):
        return {"train": pairs, "dev": max(1, pairs // 5), "test": max(1, 2 * pairs // 5)}
    if unknown := sorted(set(pairs) - set(SPLITS)):
        raise ValueError(f"pairs={dict(pairs)}: {unknown} are no splits; possible are {list(SPLITS)}.")
    return {name: pairs.get(name, NUMBERS[name]) for name in SPLITS}
