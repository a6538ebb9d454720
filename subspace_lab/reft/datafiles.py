"""Examples to learn from in files: prompts and answers, conversations, or labelled texts."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHAPES = (("messages",), ("prompt", "answer"), ("text", "label"))
ASKED = "'prompt' and 'answer', or 'messages', or 'text' and 'label'"


@dataclass(frozen=True)
class Examples:
    """The examples of a data file, checked.

    Attributes:
        examples: each with `prompt` and `answer`, with `messages`, or with `text` and `label`, the number of a
            class.
        classes: the names of the classes, by number; None where the examples have answers.
    """

    examples: tuple[Mapping[str, Any], ...]
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def split(self, held_out: int, seed: int) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """(examples to train on, examples held out), drawn at random; each part in the order of the file."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        out = set(order[:held_out])
        parts = [[one for i, one in enumerate(self.examples) if (i in out) == side] for side in (False, True)]
        return parts[0], parts[1]


def read_examples(path: str | Path) -> Examples:
    """The examples of a .jsonl, .json, .csv or .parquet file.

    The columns decide what is learned: `prompt` and `answer`, `messages` (a conversation whose last message is
    the answer), or `text` and `label`. Labels are text or whole numbers; their sorted set is the classes. A
    CSV file holds text only: a number in it is read as text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file that cannot be read or has no examples, columns that are missing or of
            two kinds, an example without one of its values, or labels of a single class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a data file ends in one of {', '.join(READERS)}.")
    found, columns = _read(path)
    shapes = [shape for shape in SHAPES if set(shape) <= set(columns)]
    if len(shapes) != 1:
        which = "none of these" if not shapes else "more than one of these"
        raise ValueError(f"{path}: needed are the columns {ASKED}; found were {which} among {sorted(columns)}.")
    examples = [{name: _value(one[name], name, i, path) for name in shapes[0]} for i, one in enumerate(found)]
    if shapes[0] != ("text", "label"):
        return Examples(tuple(examples))
    classes = _classes([one["label"] for one in examples])
    if len(classes) < 2:
        raise ValueError(
            f"{path}: all {len(examples)} examples are labelled {classes[0]!r}; needed are two classes."
        )
    number = {label: i for i, label in enumerate(classes)}
    return Examples(tuple({**one, "label": number[one["label"]]} for one in examples), classes)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(examples, columns) of a file, read by `datasets` without leaving its cache on disk."""
    import datasets

    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        text = datasets.Features({name: datasets.Value("string") for name in header})
        # Else an answer "007" is 7, and one "None" is none.
        options = {"features": text, "keep_default_na": False, "encoding": "utf-8-sig"}
    with tempfile.TemporaryDirectory() as cache, _silent():
        try:
            found = datasets.load_dataset(
                READERS[path.suffix],
                data_files=str(path.resolve()),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
            examples, columns = list(found), list(found.column_names)
        except Exception as error:  # each format fails in its own way
            raise ValueError(f"{path} cannot be read: {_why(path, error)}") from None
    if not examples:
        raise ValueError(f"{path} has no examples.")
    return examples, columns


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file, with the number of the line where each line is an example."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    example = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as broken:
                    return f"line {number} is not JSON: {broken}"
                if not isinstance(example, dict):
                    return f"line {number} is not an object {{column: value}}."
    return " ".join(str(error.__cause__ or error or "it has no examples.").split())


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and logs of `datasets` within the block: its errors are raised, and said once."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _value(value: Any, name: str, i: int, path: Path) -> Any:
    """One value of an example: text, or the messages of a conversation."""
    if name == "messages":
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError(f"{path}: example {i} has no conversation in 'messages'.")
        if not all(isinstance(one, Mapping) and one.get("role") for one in value):
            raise ValueError(f"{path}: example {i} has a message without a role.")
        # `datasets` gives every message the keys of all.
        return [{k: v for k, v in message.items() if v is not None} for message in value]
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if name == "label" and whole:
        return str(value if isinstance(value, bool) else int(value))
    if name != "label" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # an answer that is a number
    if not isinstance(value, str) or not value.strip():
        wanted = "text or a whole number" if name == "label" else "text"
        raise ValueError(f"{path}: example {i} has {value!r} in {name!r}; needed is {wanted}.")
    return value


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The set of labels, numbers in their order."""
    found = set(labels)
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label)) if numbers else sorted(found))
