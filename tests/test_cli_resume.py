"""`subspace-lab search --resume`, `--twins`, `--workers`: what ended early goes on, and ends as if it had not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_cli import FILES, offline, search
from test_sweep_folders import same

from subspace_lab.das import Fit, _places
from subspace_lab.das.fits import Failure, Fits

PAIRS = ["--pairs", "40", "--dev-pairs", "20", "--test-pairs", "40"]
OPTIONS = ["--layers", "1-2", "--steps", "5", *PAIRS, "--positions", "amount,last", "--method", "DAS,PCA"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = search(*OPTIONS, "--out", folder)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder


def results_of(folder: Path) -> Any:
    """What results.json says, but for where it stands."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del found["settings"]["out"]
    return found


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C as the place of this number begins."""
    at, calls = _places.Places.at, []

    def stopping(self: Any, assignment: Any, on_step: Any) -> tuple[list[Fit], list[Failure]]:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return at(self, assignment, on_step)

    monkeypatch.setattr(_places.Places, "at", stopping)
    return calls


@pytest.mark.parametrize("number", [2, 5, 7])  # in the model, before the twin's first place, in the twin
def test_an_interrupted_search_goes_on_and_leaves_what_an_undisturbed_one_leaves(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_at(patched, number)
        result = search(*OPTIONS, "--out", out)
        assert result.exit_code == 130 and "--resume continues" in result.stderr, (result.stderr, result.exception)
    refused = search(*OPTIONS, "--out", out)  # not without --resume
    assert refused.exit_code == 2 and ("it contains a search. --resume continues it" in refused.stderr) == (
        number > 1
    )
    with monkeypatch.context() as patched:
        calls = stop_at(patched, 99)
        result = search(*OPTIONS, "--resume", "--out", out)
        assert result.exit_code == 0 and len(calls) == 8 - (number - 1), (result.stderr, result.exception)
    assert results_of(out) == results_of(whole)
    assert {path.name for path in out.iterdir()} == FILES
    for who in ("model", "twin"):
        assert (out / who / "fits.json").read_bytes() == (whole / who / "fits.json").read_bytes()
        assert same(Fits.load(out / who), Fits.load(whole / who))


def test_a_killed_search_goes_on(whole: Path, tmp_path: Path) -> None:
    """By SIGKILL, twice: in the model's search, and in the twin's."""
    out = tmp_path / "out"
    run = [sys.executable, "-m", "subspace_lab", "search", *OPTIONS, "--resume", "--out", str(out)]
    for waited_for in ("model/places/0001/fits.json", "twin/places/0000/fits.json"):
        process = subprocess.Popen(run, env=offline(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while process.poll() is None and not (out / waited_for).exists() and time.monotonic() < until:
            time.sleep(0.002)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0) and out.exists()
    assert search(*OPTIONS, "--resume", "--out", out).exit_code == 0
    assert results_of(out) == results_of(whole) and {path.name for path in out.iterdir()} == FILES


def test_resume_begins_where_nothing_is_and_ends_at_once_where_all_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new"):
        result = search(*OPTIONS, "--no-twin", "--resume", "--out", folder)
        assert result.exit_code == 0, (result.stderr, result.exception)
        assert results_of(folder)["model"] == results_of(whole)["model"]
        assert f"there is no search in {folder}; a new one begins" in result.stderr
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    calls = stop_at(monkeypatch, 1)
    result = search(*OPTIONS, "--resume", "--out", whole)
    assert result.exit_code == 0 and "finished: nothing is left to do" in result.stderr and not calls
    assert "there is no search" not in result.stderr
    told = " ".join(result.stdout.split())  # the table, and what was written before
    assert "chosen on dev" in told and "model, twin, iia.png, overlap.png, results.json." in told
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", "6"], "folder of another sweep (training: steps 5 there, 6 asked)"),
        (["--seed", "1"], "folder of another sweep"),
        (["--layers", "1"], "folder of another sweep (sites: "),
        (["--rank", "4"], "folder of another sweep (methods: of DAS rank 8 there, 4 asked)"),
        (["--test-pairs", "41"], "folder of another sweep (data: the pairs are others)"),
    ],
)
def test_another_search_is_refused(changes: list[str], message: str, whole: Path) -> None:
    result = search(*OPTIONS, *changes, "--resume", "--out", whole)
    assert result.exit_code == 2 and message in result.stderr, (result.stderr, result.exception)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = search(*OPTIONS, "--resume", "--out", tmp_path)
    assert result.exit_code == 2 and "'notes.txt', which no search writes" in result.stderr


def test_twins_are_each_saved_and_more_can_follow(whole: Path, tmp_path: Path) -> None:
    result = search(*OPTIONS, "--twins", "3", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"twin2", "twin3"}
    found = results_of(tmp_path / "out")
    assert found["model"] == results_of(whole)["model"] and found["twin"] == results_of(whole)["twin"]
    assert len(found["twins"]) == 3 and found["twins"][0] == found["twin"]
    twins = [Fits.load(tmp_path / "out" / name) for name in ("twin", "twin2", "twin3")]
    assert len({one.facts["model"]["weights"] for one in twins}) == 3
    assert [one.records() for one in twins] == [one["fits"] for one in found["twins"]]
    best = Fits.load(tmp_path / "out" / "model").best().method
    scores = [one.where(method=best, layer=2, positions="last")[0].iia.value for one in twins]
    told = f"{sum(scores) / 3:.2f} ({min(scores):.2f} to {max(scores):.2f})"
    assert told in result.stdout and "(×3)" in result.stdout
    assert "mean of 3, in brackets the lowest and the highest" in " ".join(result.stdout.split())
    result = search(*OPTIONS, "--twins", "4", "--resume", "--out", tmp_path / "out")
    assert result.exit_code == 0 and len(results_of(tmp_path / "out")["twins"]) == 4


def test_workers_give_the_same_results_and_lines_say_how_far_they_are(whole: Path, tmp_path: Path) -> None:
    result = search(*OPTIONS, "--workers", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert results_of(tmp_path / "out") == results_of(whole)
    assert re.search(r"^model: 4 of 4 sites, \d+ s$", result.stderr, re.MULTILINE)
    assert re.search(r"^twin: 4 of 4 sites, \d+ s$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(("option", "value"), [("--workers", "0"), ("--twins", "-1")])
def test_numbers_that_make_no_sense(option: str, value: str, tmp_path: Path) -> None:
    result = search(*OPTIONS, option, value, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"{option} {value}: needed is" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_screen_spares_sites_and_says_so(tmp_path: Path) -> None:
    """Also with a twin, which is trained at other sites."""
    result = search(*OPTIONS, "--layers", "all", "--method", "DAS", "--screen", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (tmp_path / "out" / "iia.png").is_file()
    found = results_of(tmp_path / "out")["model"]
    trained = [one for one in found["fits"] if one["method"] == "DAS"]
    assert len(trained) + len(found["screened"]) == 8 and found["screened"]
    assert all(one["method"] == "DAS 8" and 0 <= one["score"] <= 1 for one in found["screened"])
    assert "screened" in result.stdout and "sites were skipped" in " ".join(result.stdout.split())
