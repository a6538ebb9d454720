"""Pairs of one's own in files and data sets: one schema, several formats, and what is refused with its row."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.pairs import Counterfactuals, Pairs

ROWS = [
    {
        "base": f"price : {a} dollars . answer :",
        "source": f"the price : {b} dollars . answer :",
        "base_answer": "yes" if a % 2 else "no",
        "answer": "yes" if b % 2 else "no",
        "source_answer": "yes" if b % 2 else "no",
        "span.amount.base": str(a),
        "span.amount.source": str(b),
        "span.unit": "dollars",
        "entity": f"n{a % 7}",
        "template": f"t{b % 4}",
        "kind": "odd" if a % 2 else "even",
        "id": f"{a}-{b}",
    }
    for a, b in ((i + 1, (i * 7) % 60 + 1) for i in range(60))
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(files("subspace_lab") / "assets" / "tiny_decoder"))


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"pairs.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark and CRLF
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return path


def told(tokenizer: Any, data: Counterfactuals) -> set[tuple[Any, ...]]:
    """Each pair as its texts, answers, positions and labels."""
    found = set()
    (source,) = data.sources.values()
    for i in range(len(data)):
        texts = []
        for batch in (data.base, source):
            ids = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
            at = [tokenizer.decode(ids[batch.columns[name][i]]) for name in sorted(batch.columns)]
            texts.append((tokenizer.decode(ids), *at))
        answers = [
            data.answers[int(of[i])] for of in (data.base_answer, data.answer, *data.source_answers.values())
        ]
        found.add((*texts, *answers, *(data.labels[name][i] for name in sorted(data.labels))))
    return found


def every(tokenizer: Any, pairs: Pairs) -> set[tuple[Any, ...]]:
    assert isinstance(pairs.train, Counterfactuals)
    return set().union(*(told(tokenizer, split) for split in (pairs.train, pairs.dev, pairs.test)))


EXPECTED = {
    (
        (row["base"], row["span.amount.base"], "dollars"),
        (row["source"], row["span.amount.source"], "dollars"),
        row["base_answer"],
        row["answer"],
        row["source_answer"],
        row["entity"],
        row["kind"],
        row["template"],
    )
    for row in ROWS
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "data set", "list"])
def test_every_format_holds_the_same_pairs(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    data: Any = {"data set": lambda: Dataset.from_list(ROWS), "list": lambda: ROWS}.get(
        kind, lambda: written(tmp_path, kind, ROWS)
    )()
    made = load_pairs(data, tokenizer, balance=False)
    assert every(tokenizer, made) == EXPECTED and made.variables == ["variable"]
    assert made.dropped == {} and made.task == ("pairs" if isinstance(data, Path) else "")
    again = load_pairs(data, tokenizer, balance=False)
    assert made.fingerprint() == again.fingerprint()
    assert load_pairs(data, tokenizer, balance=False, seed=1).fingerprint() != made.fingerprint()


def test_spans_are_pieces_or_characters_or_objects(tokenizer: Any) -> None:
    def rest(row: dict[str, Any]) -> dict[str, Any]:
        return {name: of for name, of in row.items() if not name.startswith("span")}

    def place(text: str, piece: str) -> list[int]:
        return [text.rfind(piece), text.rfind(piece) + len(piece)]

    nested, characters = [], []
    for row in ROWS:
        both = {"base": row["span.amount.base"], "source": row["span.amount.source"]}
        nested.append({**rest(row), "span": {"amount": both, "unit": "dollars"}})
        at = {side: place(row[side], both[side]) for side in both}
        characters.append(
            {
                **rest(row),
                "position.amount.base": "{}:{}".format(*at["base"]),
                "position.amount.variable": "{}:{}".format(*at["source"]),
                "position": {"unit": {side: place(row[side], "dollars") for side in both}},
            }
        )
    for rows in (nested, characters):
        assert every(tokenizer, load_pairs(rows, tokenizer, balance=False)) == EXPECTED


def test_columns_may_have_other_names_and_others_are_ignored(tokenizer: Any) -> None:
    rows = [{**{{"base": "prompt"}.get(k, k): v for k, v in row.items()}, "remark": None} for row in ROWS]
    made = load_pairs(rows, tokenizer, columns={"base": "prompt"}, balance=False)
    assert every(tokenizer, made) == EXPECTED
    with pytest.raises(ValueError, match=r"missing are base.* Is 'bse' meant\?|missing are base"):
        load_pairs(rows, tokenizer)
    with pytest.raises(ValueError, match="no column 'prompts'"):
        load_pairs(rows, tokenizer, columns={"base": "prompts"})


def test_a_span_of_a_source_that_is_not_there_is_refused_with_its_row(tmp_path: Path, tokenizer: Any) -> None:
    row = {"base": "price : 1 dollars", "source.lower": "price : 2 dollars", "source.upper": "", "base_answer": "yes",
           "answer": "no", "span.amount.base": "1", "span.amount.lower": "2", "span.amount.upper": "3"}  # fmt: skip
    with pytest.raises(ValueError, match=r"line 2: the span 'amount' is given for the source of 'upper', but"):
        load_pairs(written(tmp_path, "csv", [row]), tokenizer)


def test_several_variables_have_a_source_each(tmp_path: Path, tokenizer: Any) -> None:
    """A cell that is empty leaves its variable alone: the base stands there."""
    rows = [
        {
            "base": f"price : {i} dollars",
            "source.lower": f"price : {i + 1} dollars" if i % 2 else "",
            "source.upper": f"price : {i + 2} dollars" if i % 3 else ("" if i % 2 else f"price : {i + 2} dollars"),
            "base_answer": "yes",
            "answer": "no" if i % 4 else "yes",
            "span.amount.base": str(i),
            "span.amount.lower": str(i + 1) if i % 2 else "",
            "span.amount.upper": str(i + 2),
        }
        for i in range(1, 40)
    ]
    rows = [{**row, "span.amount.upper": row["span.amount.upper"] if row["source.upper"] else ""} for row in rows]
    made = load_pairs(written(tmp_path, "csv", rows), tokenizer, balance=False)
    assert made.variables == ["lower", "upper"] and made.test.source_answers == {}
    for split in (made.train, made.dev, made.test):
        assert isinstance(split, Counterfactuals)
        for i, exchanged in enumerate(split.exchanged):
            ids = split.base.inputs["input_ids"][i]
            n = int(tokenizer.decode(ids).split()[2])
            assert exchanged == ", ".join(name for name in ("lower", "upper") if rows[n - 1][f"source.{name}"])
            lower = split.sources["lower"]
            at = lower.inputs["input_ids"][i][lower.columns["amount"][i]]
            assert tokenizer.decode(at) == (str(n + 1) if n % 2 else str(n))


def test_a_column_says_the_splits(tokenizer: Any) -> None:
    names = ["train", "Validation", "test"]
    rows = [{**row, "split": names[i % 3]} for i, row in enumerate(ROWS)]
    made = load_pairs(rows, tokenizer, balance=False)
    assert isinstance(made.train, Counterfactuals)
    parts = [told(tokenizer, split) for split in (made.train, made.dev, made.test)]
    assert [len(part) for part in parts] == [20, 20, 20]
    for k, part in enumerate(parts):
        assert {one[0][0] for one in part} == {row["base"] for i, row in enumerate(ROWS) if i % 3 == k}
    by_mapping = load_pairs({n: ROWS[k::3] for k, n in enumerate(names)}, tokenizer, balance=False)
    assert by_mapping.fingerprint() == made.fingerprint()
    with pytest.raises(ValueError, match="No pairs of the split 'dev'"):
        load_pairs([{**row, "split": "train" if i else "test"} for i, row in enumerate(ROWS)], tokenizer)
    with pytest.raises(ValueError, match="have a column 'split' already"):
        load_pairs(rows, tokenizer, by="entity")


def test_an_entity_is_in_one_split(tokenizer: Any) -> None:
    made = load_pairs(ROWS, tokenizer, by="entity", balance=False)
    assert isinstance(made.train, Counterfactuals)
    found = [set(split.labels["entity"]) for split in (made.train, made.dev, made.test)]
    assert all(found) and not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    assert isinstance(made.train, Counterfactuals)
    assert made.dropped == {} and sum(map(len, (made.train, made.dev, made.test))) == 60
    both = load_pairs(ROWS, tokenizer, by=("entity", "template"), balance=False)
    for name in ("entity", "template"):
        assert isinstance(both.train, Counterfactuals)
        found = [set(split.labels[name]) for split in (both.train, both.dev, both.test)]
        assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    (lost,) = both.dropped.values()
    assert isinstance(both.train, Counterfactuals)
    assert lost == 60 - sum(map(len, (both.train, both.dev, both.test))) > 0


# --- refused ------------------------------------------------------------------------------------------------


def changed(at: int = 3, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if i == at else row for i, row in enumerate(ROWS)]


def without(*names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in names} for row in ROWS]


def renamed(old: str, new: str) -> list[dict[str, Any]]:
    return [{(new if k == old else k): v for k, v in row.items()} for row in ROWS]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without("answer", "base_answer"), "missing are answer, base_answer, found base, source"),
        (renamed("answer", "anser"), r"Is 'anser' meant\? Say so with columns=\{'answer': 'anser'\}"),
        (renamed("template", "tempalte"), "'tempalte' is unknown but similar to 'template'"),
        (renamed("span.unit", "spam.unit"), "'spam.unit' is unknown but similar to 'span'"),
        (changed(base=""), "Row 3 of the data has no 'base': the cell is ''"),
        (changed(source="  "), "Row 3 of the data has no 'source.variable': the cell is '  '"),
        (changed(source=None), "Row 3 of the data has no 'source'"),
        (changed(answer=float("nan")), "Row 3 of the data has no 'answer': the cell is 'nan'"),
        (changed(answer="NaN"), "Row 3 of the data has no 'answer': the cell is 'NaN'"),
        (changed(base=["price"]), r"Row 3 of the data has \['price'\] \(list\) in 'base'"),
        (changed(base=b"price"), r"Row 3 of the data has b'price' \(bytes\) in 'base'"),
        (changed(answer=True), r"Row 3 of the data has True \(bool\) in 'answer'"),
        (
            changed(3, **{"span.unit": "euros"}),
            "Row 3 of the data: The position 'unit' is the text 'euros', which is not",
        ),
        (changed(3, **{"span.unit": [3, 99]}), "Row 3 of the data: The position 'unit' is at characters 3 to 99"),
        (changed(3, **{"span.unit": [3, 3]}), "characters 3 to 3"),
        (changed(3, **{"span.amount.base": ""}), "Row 3 of the data has no 'span.amount.base'"),
        (changed(3, **{"span.amount.source": ""}), "does not say where the span 'amount' is in the source"),
        (changed(split="train"), "differ in a split"),
        (changed(id="1-1"), "Row 3 of the data has the id '1-1', which Row 0 of the data has too"),
        (changed(answer="Zebra"), "'Zebra' cannot be written with this tokenizer"),
        ([{k: v for k, v in row.items() if k != "entity" or i} for i, row in enumerate(ROWS)], "differ in labels"),
        (ROWS[:1], "leave a split without pairs"),
        (renamed("span.unit", "span."), "'' cannot be the name of a span: it is no identifier"),
        (renamed("span.unit", "span.f3"), "'f3' cannot be the name of a span: it is no identifier, or it has"),
        (renamed("span.unit", "span.last"), "the span 'last' is not at the end of 'price : "),
        ([{**row, "variable": "base"} for row in without("span.amount.source", "span.amount.base")], "called 'base'"),
        (changed(base_answer="a \ud800"), "which contains half of a character"),
        ([], "The data have no rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_row(rows: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(rows, tokenizer)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_pairs(tmp_path / "none.csv", tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        load_pairs(tmp_path / "empty.jsonl", tokenizer)
    (tmp_path / "pairs.txt").write_text("base")
    with pytest.raises(ValueError, match="a data file ends in one of"):
        load_pairs(tmp_path / "pairs.txt", tokenizer)
    path = written(tmp_path, "csv", changed(answer=""))
    with pytest.raises(ValueError, match=r"pairs\.csv, line 5 has no 'answer'"):
        load_pairs(path, tokenizer)
    with pytest.raises(TypeError, match="found int"):
        load_pairs(3, tokenizer)


def test_pairs_that_cannot_be_answered_are_left_out_if_asked(tokenizer: Any) -> None:
    rows = changed(answer="Zebra")
    made = load_pairs(rows, tokenizer, drop=True, balance=False)
    assert len(every(tokenizer, made)) == 59 and made.dropped == {
        "answers, not known to the tokenizer (Zebra)": 1,
        "pairs with such an answer": 1,
    }
