"""Your own counterfactual pairs, from a file, a data set, or a list of rows.

A row is one pair. Only the first four columns are required:

    base                 the prompt
    source               the prompt from which the variable's value is taken. For several variables there is a column
                         `source.NAME` for each (in JSON also {"source": {NAME: text}}); if its cell is empty, the pair
                         does not exchange this variable
    answer               the answer expected after the interchange
    base_answer          the answer to the base
    variable             the name of the variable, if there is a single column `source`
    source_answer        the answer to the source (`source_answer.NAME`); with it, pairs whose source the model answers
                         wrong can be left out
    span.NAME            a named position: a piece of text that base and sources contain (the last occurrence counts);
                         `span.NAME.base` and `span.NAME.source` (or `span.NAME.VARIABLE`) if it is another piece in the
                         source. In JSON also {"span": {NAME: piece or {"base": piece, "source": piece}}}
    position.NAME        the same, as characters start:end of the text
    split                train, dev or test
    entity, template     the subject of the pair and its wording: held out together, clusters of intervals
    source_entity        the entity of the source
    kind                 the kind of the pair ("cause", "isolate"); scores can be split by it
    id                   a different text for each pair

Other columns are ignored, unless they look like a misspelt name of a column.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from subspace_lab.core.positions import names
from subspace_lab.core.rows import FORMATS, Found, Number, read_rows
from subspace_lab.das.answers import Answers, Speller, check_tokenizer, serving
from subspace_lab.das.encoding import as_message, from_texts, span_of
from subspace_lab.das.pairs import SURPLUS, Counterfactuals, Pairs

NEEDED = ("base", "source", "answer", "base_answer")
LABELS = ("entity", "source_entity", "template", "kind")
OTHERS = ("variable", "source_answer", "span", "position", "split", "id", *LABELS)
SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "val", "valid", "validation", "development"),
    "test": ("test", "testing", "heldout", "held_out"),
}
ONE = "variable"  # the name of the variable if the data do not name it
MISSING = ("nan", "NaN", "NAN")


def load_pairs(
    data: Any,
    tokenizer: Any,
    *,
    columns: Mapping[str, str] | None = None,
    variable: str | None = None,
    by: str | Sequence[str] | None = None,
    dev: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
    balance: bool = True,
    answers: Answers = "token",
    chat: bool = False,
    drop: bool = False,
    add_special_tokens: bool = True,
    task: str | None = None,
) -> Pairs:
    """Counterfactual pairs in three splits, from data in the format described at the top of this file.

    Args:
        data: a .jsonl, .json, .csv or .parquet file, a `datasets.Dataset`, {split: data set}, or a list of rows.
        tokenizer: a fast Hugging Face tokenizer.
        columns: {name in this format: name of the column in the data}.
        variable: keep only the pairs that exchange this variable and no other; by default all pairs.
        by: what no two splits share, as in `Pairs.split`; not possible with a column `split`.
        dev, test, seed: shares and seed of randomly drawn splits, as in `Pairs.split`.
        balance: leave out surplus pairs of the more frequent answers in each split (`Counterfactuals.balanced`).
        answers, chat, add_special_tokens: as in `from_texts`.
        drop: leave out pairs with an answer that the tokenizer cannot write, or that begins with another answer;
            otherwise they are an error. With answers="token", answers that share their first token with another one
            are left out as well, if they are few, because reading several tokens costs extra runs.
        task: a short description of the pairs, for people; by default the file's name.

    Raises:
        FileNotFoundError: no such file.
        TypeError: data of another type.
        ValueError: columns that are missing or misspelt, empty cells, values of the wrong type, the same id twice, a
            span that is not in its text, answers that no token distinguishes, or a split without pairs. The message
            names the row.
    """
    check_tokenizer(tokenizer)
    rows, dropped = _of_variable(_rows(data, columns), variable)
    if drop:
        rows = _answerable(rows, tokenizer, answers, chat, dropped)
    named = task if task is not None else Path(data).stem if isinstance(data, str | Path) else ""

    variables = list(dict.fromkeys(name for row in rows for name in row.sources))

    def encoded(some: Sequence[_Row]) -> Counterfactuals:
        return _encoded(some, variables, tokenizer, answers, chat, add_special_tokens)

    if not rows[0].split:
        made = Pairs.split(encoded(rows), by=by, dev=dev, test=test, seed=seed, balance=balance, task=named)
        return Pairs(made.train, made.dev, made.test, task=named, dropped={**dropped, **made.dropped})
    if by is not None:
        raise ValueError(f"by={by!r}: the data have a column 'split' already; leave one of the two out.")
    found = {name: [row for row in rows if row.split == name] for name in SPLITS}
    if empty := [name for name, own in found.items() if not own]:
        counts = {name: len(own) for name, own in found.items()}
        raise ValueError(
            f"No pairs of the split {empty[0]!r}: the column 'split' gives {counts}. Needed are train, dev and test; "
            "without this column the splits are drawn at random."
        )
    splits = {name: encoded(own) for name, own in found.items()}
    if balance:
        even = {name: split.balanced(seed) for name, split in splits.items()}
        if surplus := sum(len(splits[name]) - len(even[name]) for name in splits):
            dropped[SURPLUS] = surplus
        splits = even
    return Pairs(splits["train"], splits["dev"], splits["test"], task=named, dropped=dropped)


def described(data: Any, columns: Mapping[str, str] | None = None) -> tuple[list[str], list[str]]:
    """(the variables, the named positions) of data; the data are read and checked as in `load_pairs`."""
    rows = _rows(data, columns)
    return list(dict.fromkeys(name for row in rows for name in row.sources)), list(rows[0].spans)


@dataclass(frozen=True)
class _Row:
    """A pair as it is in the data, after checks.

    Attributes:
        where: its place in the data, for messages.
        spans: {name: {"base" or a variable: piece of text, or characters}}.
    """

    where: str
    base: str
    sources: Mapping[str, str]
    answer: str
    base_answer: str
    source_answers: Mapping[str, str]
    spans: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, str]
    split: str = ""
    id: str = ""


@dataclass(frozen=True)
class _Cells:
    """The values of one row, by the column names of this format."""

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def text(self, name: str, *, words: bool = True) -> str:
        """The text in a cell, which must not be empty; with `words`, also not white space only."""
        value = self.values.get(name)
        value = value.text if isinstance(value, Number) else value
        if value is None or value in ("", *MISSING) or (words and isinstance(value, str) and not value.strip()):
            raise ValueError(f"{self.where} has no {name!r}: the cell is {_shown(value)}; needed is text.")
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where} has {_shown(value)} ({type(value).__name__}) in {name!r}; needed is text."
            )
        return value

    def has(self, name: str) -> bool:
        return self.values.get(name) not in (None, "")


def _rows(data: Any, columns: Mapping[str, str] | None) -> list[_Row]:
    rows = [_row(one) for one in _checked(_read(data), columns or {})]
    _check_alike(rows)
    return rows


def _of_variable(rows: list[_Row], variable: str | None) -> tuple[list[_Row], dict[str, int]]:
    """The rows that exchange only this variable, and the number of the others."""
    if variable is None:
        return rows, {}
    kept = [row for row in rows if list(row.sources) == [variable]]
    if not kept:
        found = dict.fromkeys(", ".join(row.sources) for row in rows)
        raise ValueError(f"No pair exchanges {variable!r} alone; the pairs exchange {', or '.join(found)}.")
    lost = len(rows) - len(kept)
    return kept, {"pairs that exchange other variables": lost} if lost else {}


def _read(data: Any) -> list[Found]:
    """Every row with its place in the data."""
    if isinstance(data, str | Path):
        return read_rows(Path(data), texts=NEEDED, nested=("source", "span", "position", "source_answer"))
    if isinstance(data, Mapping):
        if not all(isinstance(of, Dataset | list) for of in data.values()):
            raise TypeError("A mapping of data is {split: data set or list of rows}.")
        found = []
        for split, of in data.items():
            found += [Found(one.where, {**one.values, "split": split}) for one in _read(of)]
        return found
    if isinstance(data, Dataset) or (isinstance(data, Sequence) and not isinstance(data, bytes)):
        rows = list(data)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise TypeError(f"Row {i} of the data is {_shown(row)}; needed is {{column: value}}.")
        if not rows:
            raise ValueError("The data have no rows.")
        return [
            Found(f"Row {i} of the data", {k: _spelled(v) for k, v in row.items()}) for i, row in enumerate(rows)
        ]
    raise TypeError(
        f"Pairs are read from a file ({', '.join(FORMATS)}), a datasets.Dataset, {{split: data set}} or a list of "
        f"rows; found {type(data).__name__}."
    )


def _spelled(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Number(repr(value)) if number else value


def _checked(found: Sequence[Found], columns: Mapping[str, str]) -> list[_Cells]:
    """The rows with the column names of this format. ValueError for columns that are missing or misspelt."""
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns must be {{name here: name in the data}}, found {type(columns).__name__}.")
    there = list(dict.fromkeys(name for one in found for name in one.values))
    if odd := [name for name in there if not isinstance(name, str)]:
        raise TypeError(f"{found[0].where} has the column {odd[0]!r} ({type(odd[0]).__name__}); names are text.")
    if unknown := sorted(set(columns) - {*NEEDED, *OTHERS} - {n for n in columns if "." in n}):
        raise ValueError(
            f"columns={dict(columns)}: {unknown} are no columns of a pair; possible are {[*NEEDED, *OTHERS]}."
        )
    if absent := [name for name in columns.values() if name not in there]:
        raise ValueError(f"columns={dict(columns)}: the data have no column {absent[0]!r}; they have {there}.")
    named = {of: name for name, of in columns.items()}
    names = [named.get(name, name) for name in there]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"columns={dict(columns)}: the data have a column {twice[0]!r} as well; which one is meant?"
        )
    have = {name.partition(".")[0] for name in names if not name.startswith("source.")} | {
        "source" for name in names if name.startswith("source.")
    }
    missing = [name for name in NEEDED if name not in have]
    if missing:
        close = difflib.get_close_matches(missing[0], [n for n in names if n not in {*NEEDED, *OTHERS}], 1, 0.5)
        hint = f" Is {close[0]!r} meant? Say so with columns={{{missing[0]!r}: {close[0]!r}}}." if close else ""
        raise ValueError(
            f"{found[0].where}: pairs need the columns {', '.join(NEEDED)}; missing are {', '.join(missing)}, found "
            f"{', '.join(names) or 'none'}.{hint}"
        )
    known = [*NEEDED, *OTHERS]
    for name in names:
        head = name.partition(".")[0]
        dotted = "." in name
        close = difflib.get_close_matches(head.lower(), known, 1, 0.7 if dotted else 0.84)
        if head not in known and close and (dotted or close[0] not in have):
            raise ValueError(
                f"The column {name!r} is unknown but similar to {close[0]!r}: rename it. Known are {', '.join(known)}."
            )
    return [_Cells(one.where, {named.get(k, k): v for k, v in one.values.items()}) for one in found]


def _row(cells: _Cells) -> _Row:
    base = cells.text("base")
    sources = _by_name(cells, "source", cells.text("variable") if cells.has("variable") else ONE)
    if not sources:
        raise ValueError(f"{cells.where} has no 'source'; needed is text.")
    split = ""
    if "split" in cells.values:
        given = cells.text("split")
        split = next((name for name, all_ in SPLITS.items() if given.strip().lower() in all_), "")
        if not split:
            raise ValueError(f"{cells.where} is of the split {given!r}; possible are {', '.join(SPLITS)}.")
    spans = _spans(cells, list(sources))
    for name, of in spans.items():
        if name != "last" and not (name.isidentifier() and names(name)):
            raise ValueError(
                f"{cells.where}: {name!r} cannot be the name of a span: it is no identifier, or it has another meaning "
                "as a position; rename it."
            )
        for which, piece in of.items():
            try:
                at = span_of(base if which == "base" else sources[which], piece, name)
            except ValueError as error:
                raise ValueError(f"{cells.where}: {error}") from None
            text = base if which == "base" else sources[which]
            if name == "last" and text[at[1] :].strip():
                raise ValueError(
                    f"{cells.where}: the span 'last' is not at the end of {text!r}, but this name means the last token "
                    "of the prompt: rename it."
                )
    return _Row(
        where=cells.where,
        base=base,
        sources=sources,
        answer=cells.text("answer", words=False),
        base_answer=cells.text("base_answer", words=False),
        source_answers=_by_name(cells, "source_answer", next(iter(sources)), words=False),
        spans=spans,
        labels={name: cells.text(name) for name in LABELS if name in cells.values},
        split=split,
        id=cells.text("id") if "id" in cells.values else "",
    )


def _by_name(cells: _Cells, column: str, one: str, *, words: bool = True) -> dict[str, str]:
    """{variable: text}, from one column, from an object in it, or from columns `column.NAME`, without empty cells."""
    value = cells.values.get(column)
    if isinstance(value, Mapping):
        inner = {name: _spelled(own) for name, own in value.items()}
    else:
        start = f"{column}."
        inner = {name.removeprefix(start): own for name, own in cells.values.items() if name.startswith(start)}
        if cells.has(column):
            inner[one] = value
    own = _Cells(cells.where, {f"{column}.{name}": of for name, of in inner.items()})
    return {name: own.text(f"{column}.{name}", words=words) for name in inner if own.has(f"{column}.{name}")}


def _spans(cells: _Cells, variables: list[str]) -> dict[str, dict[str, Any]]:
    """{position: {"base" or a variable: a piece of text, or [start, end]}}."""
    every = [*variables, *(n.removeprefix("source.") for n in cells.values if n.startswith("source."))]
    given: dict[str, Any] = {}
    for head in ("span", "position"):
        nested = cells.values.get(head)
        if isinstance(nested, Mapping):
            given |= {f"{head}.{name}": own for name, own in nested.items() if own is not None}
        elif cells.has(head):
            raise ValueError(f"{cells.where} has {_shown(nested)} in {head!r}; name the position: '{head}.NAME'.")
    given |= {name: own for name, own in cells.values.items() if name.startswith(("span.", "position."))}
    found: dict[str, dict[str, Any]] = {}
    for column, value in given.items():
        head, _, rest = column.partition(".")
        name, _, which = rest.rpartition(".")
        if which not in ("base", "source", *every) or not name:
            name, which = rest, ""
        inner = value if isinstance(value, Mapping) else {which: value}
        for of, piece in inner.items():
            if piece in (None, "") and of not in ("", "base"):
                continue
            if of not in ("", "base", "source", *every):
                raise ValueError(
                    f"{cells.where}: the span {name!r} is given for {of!r}, which is neither base nor source."
                )
            if of not in ("", "base", "source", *variables):
                raise ValueError(
                    f"{cells.where}: the span {name!r} is given for the source of {of!r}, but this pair has no such "
                    "source: give the source, or leave the cell of the span empty."
                )
            read = _piece(cells.where, column, piece, characters=head == "position")
            sides = {"": ["base", *variables], "source": variables}.get(of, [of])
            found.setdefault(name, {}).update({side: read for side in sides if of or side not in found[name]})
    for name, of in found.items():
        if lacking := [side for side in ("base", *variables) if side not in of]:
            side = lacking[0]
            text = "the base" if side == "base" else "the source" + (f" of {side!r}" if len(variables) > 1 else "")
            raise ValueError(f"{cells.where} does not say where the span {name!r} is in {text}.")
    return found


def _piece(where: str, column: str, piece: Any, *, characters: bool) -> Any:
    if isinstance(piece, Sequence) and not isinstance(piece, str):
        numbers = [one.text if isinstance(one, Number) else str(one) for one in piece]
        piece, characters = ":".join(numbers), True
    if not characters:
        return _Cells(where, {column: piece}).text(column)
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", piece) if isinstance(piece, str) else None
    if match is None:
        raise ValueError(
            f"{where} has {_shown(piece)} in {column!r}; needed are characters of the text, such as 4:9."
        )
    return [int(match[1]), int(match[2])]


def _check_alike(rows: Sequence[_Row]) -> None:
    """ValueError if rows have different kinds of cells, or if an id occurs twice."""
    first = rows[0]
    for row in rows:
        for what, own, other in (
            ("positions", set(row.spans), set(first.spans)),
            ("labels", set(row.labels), set(first.labels)),
            ("a split", bool(row.split), bool(first.split)),
            ("an id", bool(row.id), bool(first.id)),
            ("answers to the sources", bool(row.source_answers), bool(first.source_answers)),
        ):
            if own != other:
                raise ValueError(
                    f"{row.where} and {first.where} differ in {what}: {_listed(own)} and {_listed(other)}. Every row "
                    "needs the same."
                )
    seen: dict[str, str] = {}
    for row in rows:
        if row.id and seen.setdefault(row.id, row.where) != row.where:
            raise ValueError(f"{row.where} has the id {row.id!r}, which {seen[row.id]} has too.")


def _listed(own: Any) -> str:
    return str(sorted(own) if isinstance(own, set) else own)


def _answerable(
    rows: list[_Row], tokenizer: Any, answers: Answers, chat: bool, dropped: dict[str, int]
) -> list[_Row]:
    """The rows whose answers the tokenizer can write and distinguish."""
    words = list(
        dict.fromkeys(a for row in rows for a in (row.base_answer, row.answer, *row.source_answers.values()))
    )
    prompts = [as_message(tokenizer, row.base, {})[0] if chat else row.base for row in rows]
    _, left = serving(Speller(tokenizer), words, prompts, answers)
    kept = [row for row in rows if not {row.base_answer, row.answer, *row.source_answers.values()} & set(left)]
    for why in dict.fromkeys(left.values()):
        dropped[f"answers, {why} ({', '.join(a for a in left if left[a] == why)})"] = sum(
            w == why for w in left.values()
        )
    if len(kept) < len(rows):
        dropped["pairs with such an answer"] = len(rows) - len(kept)
    if not kept:
        raise ValueError(
            f"None of {len(rows)} pairs has answers that this tokenizer can write and distinguish: {left}."
        )
    return kept


def _encoded(
    rows: Sequence[_Row], variables: Sequence[str], tokenizer: Any, answers: Answers, chat: bool, special: bool
) -> Counterfactuals:
    """Some rows as tensors. If a row does not exchange a variable, the variable's source is the base."""
    names = list(rows[0].spans)
    known = bool(rows[0].source_answers)
    return from_texts(
        tokenizer,
        base=[row.base for row in rows],
        source={v: [row.sources.get(v, row.base) for row in rows] for v in variables},
        answer=[row.answer for row in rows],
        base_answer=[row.base_answer for row in rows],
        source_answer={v: [row.source_answers.get(v, row.base_answer) for row in rows] for v in variables}
        if known
        else None,
        spans={
            name: {
                "base": [row.spans[name]["base"] for row in rows],
                **{v: [row.spans[name].get(v, row.spans[name]["base"]) for row in rows] for v in variables},
            }
            for name in names
        },
        labels={name: [row.labels[name] for row in rows] for name in rows[0].labels},
        answers=answers,
        chat=chat,
        add_special_tokens=special,
    )


def _shown(value: Any) -> str:
    text = value.text if isinstance(value, Number) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
