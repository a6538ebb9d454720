"""`subspace-lab search --data`: pairs of one's own from the terminal, and the options that belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from subspace_lab.cli import app
from subspace_lab.das.counterfactuals import counterfactual_dataset
from subspace_lab.das.pairs import SURPLUS
from subspace_lab.tasks import PRICE_TAGGING

NUMBERS = {"train": 40, "dev": 20, "test": 40}
QUICK = ["--layers", "1", "--steps", "5", "--seed", "3", "--method", "DAS,FullVector", "--no-twin"]


def search(*options: str | Path) -> Any:
    return CliRunner().invoke(app, ["search", *map(str, options)])


def rows(**changes: str) -> list[dict[str, Any]]:
    """The pairs of the task as rows of a file."""
    found = []
    for split, n in NUMBERS.items():
        for row in counterfactual_dataset(PRICE_TAGGING, n, split=split, seed=3):
            name = PRICE_TAGGING.variable
            spans = {"base": row["base_spans"], name: row["source_spans"][name]}
            found.append(
                {
                    "base": row["base"],
                    "source": {name: row["sources"][name]},
                    "answer": row["answer"],
                    "base_answer": row["base_answer"],
                    "source_answer": {name: row["source_answers"][name]},
                    "position": {at: {side: of[at] for side, of in spans.items()} for at in ("amount", "last")},
                    "entity": row["entity"],
                    "template": row["template"],
                    "split": split,
                    **changes,
                }
            )
    return found


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def test_a_tasks_pairs_in_a_file_give_the_tasks_results(tmp_path: Path) -> None:
    path = written(tmp_path / "prices.jsonl", rows())
    mine = search(*QUICK, "--data", path, "--out", tmp_path / "mine")
    assert mine.exit_code == 0, (mine.stderr, mine.exception)
    n = [f"--{name}pairs" for name in ("", "dev-", "test-")]
    options = [x for pair in zip(n, map(str, NUMBERS.values()), strict=True) for x in pair]
    task = search(*QUICK, *options, "--positions", "amount,last", "--out", tmp_path / "task")
    assert task.exit_code == 0, (task.stderr, task.exception)
    one, other = results(tmp_path / "mine"), results(tmp_path / "task")
    assert one["model"]["fits"] and len(one["model"]["fits"]) == 4

    assert one["model"]["fits"] == other["model"]["fits"]
    assert one["model"]["floors"] == other["model"]["floors"]
    settings = one["settings"]
    assert settings["task"] == "prices" and settings["variable"] == PRICE_TAGGING.variable
    assert settings["positions"] == "amount,last" and settings["data"] == str(path)
    assert one["model"]["facts"]["answered"]["test"]["of"] == 40 and "of 40 test pairs" in " ".join(
        mine.stdout.split()
    )


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    lines = rows()
    wrong = next(i for i, line in enumerate(lines) if line["split"] == "test")
    other = {"yes": "no", "no": "yes"}
    lines[wrong] = {**lines[wrong], "base_answer": other[lines[wrong]["base_answer"]]}
    path = written(tmp_path / "prices.jsonl", [*lines, {**lines[-1], "answer": "Zebra"}])
    for options, n in (([], 39), (["--count-all"], 40)):
        out = tmp_path / f"out{n}"
        result = search(*QUICK, *options, "--data", path, "--out", out)
        assert result.exit_code == 0, (result.stderr, result.exception)
        facts = results(out)["model"]["facts"]
        surplus = facts["dropped"].get(SURPLUS, 0)
        assert facts["dropped"]["answers, not known to the tokenizer (Zebra)"] == 1
        assert facts["pairs"]["test"] == n - surplus
        assert "not known to the tokenizer (Zebra)" in " ".join(result.stdout.split())


def test_pairs_that_balance_left_out_are_told_and_can_be_kept(tmp_path: Path) -> None:
    lines = rows()
    lines += [{**line, "base": f"{line['base']} "} for line in lines if line["answer"] == "yes"]
    path = written(tmp_path / "prices.jsonl", lines)
    told = {}
    for options in ([], ["--no-balance"]):
        result = search(*QUICK, "--count-all", *options, "--data", path, "--out", tmp_path / f"out{len(options)}")
        assert result.exit_code == 0, (result.stderr, result.exception)
        told[len(options)] = " ".join(result.stdout.split())
    pairs = results(tmp_path / "out0")["model"]["facts"]["pairs"]
    n = len(lines) - sum(pairs.values())
    assert n > 0 and sum(results(tmp_path / "out1")["model"]["facts"]["pairs"].values()) == len(lines)
    assert (
        f"{n} pairs, so that each answer is about as frequent as the others (--no-balance keeps them)" in told[0]
    )
    assert f"Pairs that are left: {pairs['train']} train, {pairs['dev']} dev, {pairs['test']} test." in told[0]
    assert "keeps them" not in told[1]
    assert "--no-balance is for --data" in search("--no-balance", "--out", tmp_path / "out").stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--task", "price_tagging"], ["--task price_tagging and --data", "not both"]),
        (["--variable", "price"], ["--variable price", "the data have ['above_lower']"]),
        (["--positions", "unit"], ["no span is called 'unit'", "amount"]),
        (["--pairs", "10"], ["--pairs", "are for --task"]),
        (["--split-by", "entity"], ["by='entity'", "column 'split' already"]),
        (["--answers", "words"], ["--answers words", "token and sequence"]),
        (["--chat"], ["no chat template"]),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], parts: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "prices.jsonl", rows())
    result = search(*QUICK, "--data", path, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith("subspace-lab: ") and all(part in result.stderr for part in parts), (
        result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_or_lacks_columns_is_refused(tmp_path: Path) -> None:
    assert "There is no file" in search("--data", tmp_path / "none.jsonl", "--out", tmp_path / "out").stderr
    path = written(tmp_path / "few.jsonl", [{"base": "x", "anser": "y"}])
    told = search("--data", path, "--out", tmp_path / "out").stderr
    assert "missing are source, answer, base_answer" in told and "few.jsonl, line 1" in told
    assert "--split-by" in search("--split-by", "entity", "--out", tmp_path / "out").stderr
