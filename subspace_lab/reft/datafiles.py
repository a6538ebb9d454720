"""Training examples from files: prompts and answers, conversations, or labelled texts."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from subspace_lab.core.rows import Number, plain, read_rows

SHAPES = (("messages",), ("prompt", "answer"), ("text", "label"))
ASKED = "'prompt' and 'answer', or 'messages', or 'text' and 'label'"
WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Examples:
    """The examples of a data file, checked.

    Attributes:
        examples: each with `prompt` and `answer`, or with `messages`, or with `text` and `label` (a class number).
        classes: the names of the classes, by number; None if the examples have answers.
    """

    examples: tuple[Mapping[str, Any], ...]
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def repeated(self) -> int:
        """How many examples repeat an earlier one: the same texts, apart from white space."""
        return len(self) - len(set(map(_same, self.examples)))

    def split(self, held_out: int, seed: int) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """(training examples, held-out examples), drawn at random; each in the order of the file.

        Equal examples go to the same side, so that no held-out example is also trained on. Therefore fewer examples
        than asked may be held out. More are held out only if even the smallest group of equal examples is larger.

        Raises:
            ValueError: all examples are equal.
        """
        training, out = split_rows([_same(one) for one in self.examples], held_out, seed)
        if held_out and not out:
            raise ValueError(
                f"All {len(self)} examples are the same: each held-out example would be trained on as well. Hold out "
                "none, or add other examples."
            )
        return [self.examples[i] for i in training], [self.examples[i] for i in out]


def split_rows(keys: Sequence[Hashable], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """(numbers of training rows, numbers of held-out rows), drawn at random, each in order.

    Rows with equal keys go to the same side, see `Examples.split`. None are held out if all keys are equal.
    """
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    same: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        same.setdefault(key, []).append(i)
    out: set[int] = set()
    for i in order:
        group = same[keys[i]]
        if i not in out and len(out) + len(group) <= held_out:
            out.update(group)
    if held_out and not out and len(same) > 1:
        least = min(len(group) for group in same.values())
        out.update(next(group for i in order if len(group := same[keys[i]]) == least))
    return [i for i in range(len(keys)) if i not in out], sorted(out)


def read_examples(path: str | Path) -> Examples:
    """The examples of a .jsonl, .json, .csv or .parquet file.

    The columns determine the task: `prompt` and `answer`, `messages` (a conversation whose last message is the
    answer), or `text` and `label`. Labels are text or whole numbers; the sorted set of labels gives the classes. Text
    is used exactly as it is in the file: the cells of a CSV file, and also numbers in JSON as they are written there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format; a file that cannot be read or has no examples; columns that are missing, named
            twice or of two tasks; an example without one of its values; labels of a single class or of two kinds.
            The message names file and line.
    """
    path = Path(path)
    found = read_rows(path, texts=("prompt", "answer", "text"), nested=("messages",))
    columns = {name for one in found for name in one.values}
    shapes = [shape for shape in SHAPES if set(shape) <= columns]
    if len(shapes) != 1:
        which = "none of these" if not shapes else "more than one of these"
        raise ValueError(f"{path}: needed are the columns {ASKED}; found were {which} among {sorted(columns)}.")
    places = [one.where if "example" in one.where else f"{one.where} (example {i})" for i, one in enumerate(found)]
    examples = [
        {name: _value(one.values.get(name), name, where) for name in shapes[0]}
        for one, where in zip(found, places, strict=True)
    ]
    if shapes[0] != ("text", "label"):
        return Examples(tuple(examples))
    _check_labels([one["label"] for one in examples], places)
    classes = _classes([one["label"] for one in examples])
    if len(classes) < 2:
        raise ValueError(
            f"{path}: all {len(examples)} examples are labelled {classes[0]!r}; needed are two classes."
        )
    number = {label: i for i, label in enumerate(classes)}
    return Examples(tuple({**one, "label": number[one["label"]]} for one in examples), classes)


def _same(example: Mapping[str, Any]) -> Hashable:
    """A key that is the same for equal examples: their texts without white space and label."""
    if "messages" in example:
        return json.dumps(example["messages"], sort_keys=True, default=str)
    return tuple(" ".join(example[name].split()) for name in ("prompt", "answer", "text") if name in example)


def _value(value: Any, name: str, where: str) -> Any:
    """One value of an example: text, or the messages of a conversation."""
    if name == "messages":
        return _messages(value, where)
    if name == "label" and isinstance(value, bool):
        return str(value)
    if isinstance(value, Number):
        # A table with empty cells contains whole numbers as 1.0.
        whole = re.fullmatch(r"(-?\d+)(?:\.0*)?", value.text)
        if name == "label" and whole:
            return "0" if whole[1] == "-0" else whole[1]
        value = value.text if name != "label" else float(value.text)
    if not isinstance(value, str) or not value.strip():
        wanted = "text or a whole number" if name == "label" else "text"
        raise ValueError(f"{where} has {_shown(value)} in {name!r}; needed is {wanted}.")
    return _text(value, where)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where} has no conversation in 'messages'; needed is a list of messages.")
    found = []
    for one in value:
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str) or not one["role"]:
            raise ValueError(f"{where} has a message without a role.")
        # A table gives every message the keys of all messages.
        message = {k: v for k, v in one.items() if v is not None}
        content = message.get("content")
        if isinstance(content, Number):
            message["content"] = content.text
        elif isinstance(content, bool) or (content is None and len(message) < 2):
            raise ValueError(f"{where} has {_shown(content)} as the content of a message; needed is text.")
        found.append(_text(plain(message, where), where))
    return found


def _text(value: Any, where: str) -> Any:
    """The value, if all its text can be written in UTF-8; ValueError for half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} contains {error.object[error.start]!a}, half of a character, not text."
        ) from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_labels(labels: Sequence[str], places: Sequence[str]) -> None:
    """ValueError if labels are of two kinds, or if two labels differ only in how they are written."""
    first: dict[str, str] = {}
    for label, where in zip(labels, places, strict=True):
        first.setdefault(label, where)
    numbers = [label for label in first if WHOLE.fullmatch(label)]
    if numbers and len(numbers) < len(first):
        other = next(label for label in first if label not in numbers)
        raise ValueError(
            f"{first[other]} is labelled {_shown(other)}, {first[numbers[0]]} {numbers[0]!r}: a whole number and "
            "another text would be different classes. Write all labels in one way."
        )
    spelled: dict[Any, str] = {}
    for label, where in first.items():
        meant: Any = int(label) if numbers and len(label) < 1000 else " ".join(label.split())
        if meant in spelled:
            one = spelled[meant]
            raise ValueError(
                f"{where} is labelled {label!r}, {first[one]} {one!r}: two ways to write one label would be two "
                "classes."
            )
        spelled[meant] = label


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels in sorted order, numbers by value."""
    found = set(labels)
    numbers = all(WHOLE.fullmatch(label) and len(label) < 1000 for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label)) if numbers else sorted(found))
