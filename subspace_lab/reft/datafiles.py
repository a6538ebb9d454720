"""Rows to learn from, as people keep them: files of prompts and answers, conversations, or labelled texts."""

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
class Rows:
    """Checked rows.

    Attributes:
        rows: of `prompt` and `answer`, of `messages`, or of `text` and `label`, the number of a class.
        classes: what the labels are called, by number; None where the rows have answers.
    """

    rows: tuple[Mapping[str, Any], ...]
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, held_out: int, seed: int) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """(rows to train on, rows held out), drawn at random; each part in the order of the file."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        out = set(order[:held_out])
        parts = [[row for i, row in enumerate(self.rows) if (i in out) == side] for side in (False, True)]
        return parts[0], parts[1]


def read_rows(path: str | Path) -> Rows:
    """The rows of a .jsonl, .json, .csv or .parquet file.

    The columns tell what is learned: `prompt` and `answer`, `messages` (a conversation whose last message is
    the answer), or `text` and `label`. Labels are text or whole numbers; their sorted set is the classes. What a
    CSV file holds is text, as it stands there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file that cannot be read or has no rows, columns that are missing or of two
            kinds, a row without one of its values, or labels of a single class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a data file ends in one of {', '.join(READERS)}.")
    rows, columns = _read(path)
    shapes = [shape for shape in SHAPES if set(shape) <= set(columns)]
    if len(shapes) != 1:
        found = "no such columns" if not shapes else "more than one of these"
        raise ValueError(f"{path}: rows have {ASKED}; found were {found} among {sorted(columns)}.")
    rows = [{name: _value(row[name], name, i, path) for name in shapes[0]} for i, row in enumerate(rows)]
    if shapes[0] != ("text", "label"):
        return Rows(tuple(rows))
    classes = _classes([row["label"] for row in rows])
    if len(classes) < 2:
        raise ValueError(f"{path}: all {len(rows)} rows are labelled {classes[0]!r}; needed are two classes.")
    number = {label: i for i, label in enumerate(classes)}
    return Rows(tuple({**row, "label": number[row["label"]]} for row in rows), classes)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, columns) of a file, by `datasets`, without what it keeps of them on disk."""
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
            rows, columns = list(found), list(found.column_names)
        except Exception as error:  # each format fails in its own way
            raise ValueError(f"{path} cannot be read: {_why(path, error)}") from None
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows, columns


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file, by its line where it has a row on each."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as broken:
                    return f"line {number} is no JSON: {broken}"
                if not isinstance(row, dict):
                    return f"line {number} is no row {{column: value}}."
    return " ".join(str(error.__cause__ or error or "it has no rows.").split())


@contextmanager
def _silent() -> Iterator[None]:
    """Neither bars nor logs of `datasets`: what goes wrong is said once, by us."""
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
    """One value of a row: text, or the messages of a conversation."""
    if name == "messages":
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise ValueError(f"{path}: row {i} has no conversation in 'messages'.")
        if not all(isinstance(one, Mapping) and one.get("role") for one in value):
            raise ValueError(f"{path}: row {i} has a message without a role.")
        # `datasets` gives every message the keys of all.
        return [{k: v for k, v in message.items() if v is not None} for message in value]
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if name == "label" and whole:
        return str(value if isinstance(value, bool) else int(value))
    if name != "label" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # an answer that is a number
    if not isinstance(value, str) or not value.strip():
        wanted = "text or a whole number" if name == "label" else "text"
        raise ValueError(f"{path}: row {i} has {value!r} in {name!r}; needed is {wanted}.")
    return value


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The set of labels, numbers in their order."""
    found = set(labels)
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label)) if numbers else sorted(found))
