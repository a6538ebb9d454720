"""Reads the rows of a data file exactly as they are written. A value is the file's own text, or an error with its line.

CSV and JSON are read by the standard library. Readers that guess the types of whole columns (pandas, pyarrow) change
values: a 4 next to a 2.5 becomes 4.0, twenty digits become 1.23e+19, a date becomes a time stamp, and the cells of a
row with one comma more than the header are shifted.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
BEGINNINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "", b"\x1f\x8b": ""}
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Number:
    """A number of a JSON file, as it is written there."""

    text: str


@dataclass(frozen=True)
class Found:
    """One row of a file.

    Attributes:
        where: its place in the file, for messages.
        values: {column: value}: text, numbers, and for all else what JSON gives.
    """

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path, *, texts: Collection[str], nested: Collection[str]) -> list[Found]:
    """Every row of a file.

    Args:
        texts: columns of text. A parquet file must not store them as fractions, times or similar types.
        nested: columns that may contain lists and objects in a JSON file with objects one after another.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file without rows, or a file that cannot be read; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: a data file ends in one of {', '.join(FORMATS)}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    if suffix == ".parquet":
        found = _parquet(path, texts)
    else:
        readers = {
            ".csv": _csv,
            ".jsonl": lambda path, text: _json_lines(path, text, nested),
            ".json": lambda path, text: _json(path, text, nested),
        }
        try:
            found = list(readers[suffix](path, _text(path)))
        except RecursionError:
            raise ValueError(f"{path} cannot be read: values are nested too deep.") from None
    if not found:
        raise ValueError(f"{path} has no examples.")
    return found


def plain(value: Any, where: str) -> Any:
    """A value of a message, with Python's own numbers. ValueError for a number that Python cannot represent."""
    if isinstance(value, Mapping):
        return {name: plain(one, where) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one, where) for one in value]
    if not isinstance(value, Number):
        return value
    whole = value.text.lstrip("-").isdecimal()
    number = (int(value.text) if len(value.text) < 1000 else None) if whole else float(value.text)
    if number is None or abs(number) == float("inf"):
        raise ValueError(f"{where}: the number {value.text[:20]}… is too large.")
    return number


def _text(path: Path) -> str:
    """The content of a text file, without a byte order mark at its beginning."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        kind = next((kind for mark, kind in BEGINNINGS.items() if raw.startswith(mark)), "ISO-8859-1")
        cure = f"convert it: iconv -f {kind} -t UTF-8 {path.name} > utf8{path.suffix}"
        guess = {
            "": "it is a compressed file or one of a spreadsheet program; unpack it, or export it as CSV in UTF-8",
            "UTF-16": f"it is UTF-16; {cure}",
        }.get(kind, f"perhaps it is Latin-1 (Windows: CP1252); {cure}")
        raise ValueError(f"{path}, line {line}: the byte 0x{byte:02x} is not UTF-8: {guess}.") from None


# --- CSV ----------------------------------------------------------------------------------------------------


def _csv(path: Path, text: str) -> Iterator[Found]:
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = (
                    str(error) if "unexpected end" not in str(error) else "a quote that is opened is never closed"
                )
                raise ValueError(f"{path}, line {line} cannot be read as CSV: {why}.") from None
            if not cells:
                continue  # a blank line
            if not header:
                header = cells
                _check_separator(header, f"{path}, line {line}")
                _check_names(header, f"{path}, line {line}")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {line} has {len(cells)} cells, the header {len(header)} ({', '.join(header)}): "
                    'text with a comma must be in quotes, such as "one, two".'
                )
            yield Found(f"{path}, line {line}", dict(zip(header, cells, strict=True)))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells of any length. The library's limit is a setting of the whole process and is restored."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_separator(names: list[str], where: str) -> None:
    """ValueError for a header whose names stand apart by something else than commas."""
    for mark, what in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        if len(names) == 1 and mark in names[0]:
            raise ValueError(
                f"{where}: the columns {', '.join(names[0].split(mark))} are separated by {what}; needed are commas. "
                "Save the table as comma-separated values, or as .jsonl."
            )


def _check_names(names: list[str], where: str) -> None:
    """ValueError for a column name that occurs twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where} names {twice[0]!r} twice among {names}: which of them is meant?")


# --- JSON ---------------------------------------------------------------------------------------------------


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=_no_number
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {twice!r} twice")
    return dict(pairs)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write it as text, or leave the row out")


def _json_lines(path: Path, text: str, nested: Collection[str]) -> Iterator[Found]:
    if text.lstrip().startswith("["):  # a JSON list, in spite of the file name
        yield from _json(path, text, nested)
        return
    decoder = _decoder()
    # Not splitlines(): Python also splits at other characters, which a text may contain.
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = decoder.decode(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} (character {error.pos}).") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}.") from None
            yield _row(value, where)


def _json(path: Path, text: str, nested: Collection[str]) -> Iterator[Found]:
    """Rows from a list of objects, or from objects one after another."""
    decoder, at = _decoder(), _after_space(text, 0)
    listed = text[at : at + 1] == "["
    at = _after_space(text, at + 1) if listed else at
    while at < len(text) and not (listed and text[at] == "]"):
        where = f"{path}, line {_line(text, at)}"
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {_line(text, error.pos)} is not JSON: {error.msg}.") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
        row = _row(value, where)
        if (
            not listed
            and any(isinstance(one, dict | list) for one in row.values.values())
            and not set(nested) & set(value)
        ):
            raise ValueError(
                f"{where} has the keys {sorted(value)}; needed is a list of objects {{column: value}}."
            )
        yield row
        at = _after_space(text, end)
        if listed:
            if text[at : at + 1] not in (",", "]"):
                raise ValueError(
                    f"{path}, line {_line(text, at)} is not JSON: needed is ',' or ']' after an object."
                )
            if text[at] == ",":
                at = _after_space(text, at + 1)
                if text[at : at + 1] == "]":
                    raise ValueError(f"{path}, line {_line(text, at)} is not JSON: a ',' before the ']'.")
    if listed and (at >= len(text) or _after_space(text, at + 1) < len(text)):
        what = "the list is not closed" if at >= len(text) else "there is text after the list"
        raise ValueError(f"{path}, line {_line(text, at)} is not JSON: {what}.")


def _row(value: Any, where: str) -> Found:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object {{column: value}}.")
    return Found(where, value)


def _after_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return at if match is None else match.end()


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet(path: Path, texts: Collection[str]) -> list[Found]:
    """Rows of a table with types; read by `datasets` without leaving its cache on disk."""
    import datasets

    with tempfile.TemporaryDirectory() as cache, _silent():
        try:
            found = datasets.load_dataset(
                "parquet", data_files=str(path.resolve()), split="train", cache_dir=cache, keep_in_memory=True
            )
            rows = list(found)
        except Exception as error:  # it raises errors of many types
            why = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{path} cannot be read: {why}") from None
    for name, kind in ((field.name, str(field.type)) for field in found.data.table.schema):
        # A double may have been written as 4 in a table with empty cells: the file does not contain the original text.
        if name in texts and not re.match(r"(large_)?string|u?int\d+$|dictionary|null", kind):
            raise ValueError(
                f"{path}: the column {name!r} holds {kind}, which can be written as text in several ways; "
                "save it as text."
            )
    return [Found(f"{path}, example {i}", _numbered(row)) for i, row in enumerate(rows)]


def _numbered(row: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return Number(repr(value)) if is_number else value

    return {name: number(value) for name, value in row.items()}


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and logs of `datasets` inside the block; its errors are raised instead."""
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
