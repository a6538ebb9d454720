"""The page of the benchmarks is what their results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pictures  # noqa: E402
import write_readme  # noqa: E402

RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def test_the_page_is_written_from_the_results() -> None:
    assert (BENCHMARKS / "README.md").read_text(encoding="utf-8") == write_readme.whole(), (
        "run `python benchmarks/write_readme.py`"
    )


def test_the_tables_of_methods_are_written_from_the_results() -> None:
    page = write_readme.FINETUNING.read_text(encoding="utf-8")
    assert page == write_readme.with_tables(page), "run `python benchmarks/write_readme.py`"
    assert page.count("| rank 2, queries and values, alpha 4 | 115,200 |") == 2
    assert [write_readme.signed(value) for value in (-1.26, -0.04, 0.04, 0.06)] == ["−1.3", "0.0", "0.0", "+0.1"]
    with pytest.raises(ValueError, match="no mark '<!-- table minilm -->'"):
        write_readme.with_tables("")


def test_every_result_and_every_picture_is_on_it() -> None:
    assert {path.stem for path in RESULTS} == set(write_readme.FIRST)
    pictures = {picture for _, of in write_readme.FIRST.values() for picture in of}
    assert {path.name for path in (BENCHMARKS / "results").glob("*.png")} == pictures


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_a_day_a_machine_and_figures(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["date"][:2] == "20" and len(found["date"]) == 10
    assert found["machine"]["torch"] and found["machine"]["threads"] >= 1
    assert all({"median", "n"} <= set(of) for of in found["results"].values())
    assert (BENCHMARKS / f"{write_readme.SCRIPTS.get(path.stem, path.stem)}.py").is_file()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_those_of_the_present_results(name: str) -> None:
    sources, _, _ = pictures.PICTURES[name]
    assert pictures.results_of(BENCHMARKS / "results" / f"{name}.png") == pictures.fingerprint(*sources), (
        f"run `python benchmarks/pictures.py {name}`"
    )


def test_other_figures_are_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pictures.loaded("hypotheses")
    before = pictures.fingerprint("hypotheses")
    found["results"]["left boundary, IIA"]["median"] += 0.001
    (tmp_path / "hypotheses.json").write_text(json.dumps(found))
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    assert pictures.fingerprint("hypotheses") != before
    drawn = pictures.draw("hypotheses")
    assert pictures.results_of(drawn) == pictures.fingerprint("hypotheses") != before


def test_numbers_are_readable() -> None:
    assert write_readme.number(1923938) == "1,923,938" and write_readme.number(0.98738) == "0.9874"
    assert write_readme.line("a", {"median": 1.0, "low": 1.0, "high": 1.0, "n": 1}) == "| a | 1 |  | 1 |"
    assert write_readme.line("a", {"median": 0.5, "low": 0.25, "high": 1, "n": 3}) == "| a | 0.5 | 0.25 to 1 | 3 |"


def test_it_needs_nothing_installed() -> None:
    asked = "import sys, write_readme; print('torch' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-S", "-c", asked], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
