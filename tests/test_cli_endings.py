"""The terminal: two runs into one folder, a full disk, interrupts at the worst moments. What is finished is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import FILES, TINY, offline, search
from test_cli_finetune import ANSWERS, finetuned, results_of, written
from test_cli_finetune import FILES as ADAPTER_FILES
from test_cli_finetune import TINY as TINY_ADAPTER

from subspace_lab.analysis import search_report
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.core import files
from subspace_lab.core._locks import LOCK
from subspace_lab.das import Fit, _places, sweeps
from subspace_lab.das.fits import Failure, Fits
from subspace_lab.reft import ReftModel, jobs
from subspace_lab.reft.finetune import History, finetune

SITES = ["--positions", "amount,last", "--method", "DAS"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", ANSWERS)


def interrupt(kind: signal.Signals = signal.SIGINT) -> Any:
    os.kill(os.getpid(), kind)
    time.sleep(0.01)  # the handler runs between two instructions of this thread


# --- two runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["search", "finetune"])
def test_of_two_runs_into_one_folder_one_is_refused(command: str, rows: Path, tmp_path: Path) -> None:
    options = (
        ["search", *TINY, *SITES] if command == "search" else ["finetune", "--data", str(rows), *TINY_ADAPTER]
    )
    out = tmp_path / "out"
    run = [sys.executable, "-m", "subspace_lab", *options, "--out", str(out)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(run, env=offline(HF_HUB_OFFLINE="1"), **pipes) for _ in range(2)]
    told = [one.communicate(timeout=300)[1] for one in started]
    codes = [one.returncode for one in started]
    assert sorted(codes) == [0, 2], told
    refused = told[codes.index(2)]
    assert "being written to by process" in refused or "not empty" in refused
    assert {path.name for path in out.iterdir()} == (FILES if command == "search" else ADAPTER_FILES)


def test_a_run_beside_another_is_told_which(tmp_path: Path) -> None:
    with files.taken_folder(tmp_path / "out"):
        result = search(*TINY, "--out", tmp_path / "out")
        assert result.exit_code == 2 and f"by process {os.getpid()} on " in result.stderr
        assert [one.name for one in (tmp_path / "out").iterdir()] == [LOCK]


# --- a full disk --------------------------------------------------------------------------------------------


def fill(monkeypatch: pytest.MonkeyPatch, *names: Any) -> None:
    """A disk on which files of these names find no room."""
    whole = files.whole_file

    def full(path: Path) -> Any:
        if os.path.basename(path) in names:
            raise OSError(28, "No space left on device", str(path))
        return whole(path)

    for module in ("core.files", "analysis.plots.canvas"):
        monkeypatch.setattr(f"subspace_lab.{module}.whole_file", full)


@pytest.mark.parametrize("name", ["subspaces.safetensors", "fits.json", "iia.png", "results.json"])
def test_a_search_on_a_full_disk_tells_its_table_and_saves_the_rest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, name)
    result = search(*TINY, *SITES, "--no-twin", "--out", tmp_path / "out")
    lost = "model" if name in ("subspaces.safetensors", "fits.json") else name
    assert result.exit_code == 2 and f"could not be saved: {lost} (No space left on device)" in result.stderr
    assert "chosen on dev" in result.stdout and "on 40 test pairs" in " ".join(result.stdout.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"twin", lost}
    assert (
        f"saved: {', '.join(n for n in ('model', 'iia.png', 'overlap.png', 'results.json') if n != lost)}"
        in result.stderr
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "loss.png"])
def test_a_finetuning_on_a_full_disk_tells_its_table_and_saves_the_rest(
    name: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, name)
    result = finetuned("--data", rows, *TINY_ADAPTER, "--out", tmp_path / "out")
    lost = {"loss.png"} if name == "loss.png" else ADAPTER_FILES - {"loss.png", "results.json"}
    assert result.exit_code == 2 and "could not be saved" in result.stderr and "No space left" in result.stderr
    assert "parameters are trained" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES - lost
    assert ("Read again" in result.stdout) == (name == "loss.png")


def test_an_error_in_a_picture_does_not_cost_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_lab.analysis.search_report.iia_heatmap", lambda *_: 1 / 0)
    result = search(*TINY, *SITES, "--no-twin", "--out", tmp_path / "out")
    assert result.exit_code != 0 and (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("command", ["search", "finetune"])
def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(
    command: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("subspace_lab.core._locks.os.open", refuse)
    run = search if command == "search" else finetuned
    result = run(
        "--model", "/not/even/looked/at", *(() if run is search else ("--data", rows)), "--out", tmp_path / "out"
    )
    assert result.exit_code == 2 and "cannot be written to: Read-only file system" in result.stderr


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Where the tests run in the background a shell may have Ctrl-C ignored; here it is what it is at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- interrupts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_saves_the_sites_that_are_finished(
    kind: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, calls = _places.Places.at, []

    def stopping(self: Any, assignment: Any, on_step: Any) -> tuple[list[Fit], list[Failure]]:
        calls.append(1)
        if len(calls) == 3:
            interrupt(kind)
        return at(self, assignment, on_step)

    monkeypatch.setattr(_places.Places, "at", stopping)
    options = ["--layers", "1-2", *TINY[2:], *SITES]
    result = search(*options, "--out", tmp_path / "out")
    assert result.exit_code == 130, (result.stderr, result.exception)
    assert "2 of 4 sites were searched" in result.stderr and "2 of 4 sites were searched" in " ".join(
        result.stdout.split()
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"twin"}
    kept = Fits.load(tmp_path / "out" / "model")
    assert kept.places == ["block_output[1]@amount", "block_output[1]@last"]
    monkeypatch.setattr(_places.Places, "at", at)
    assert search(*options, "--no-twin", "--out", tmp_path / "whole").exit_code == 0
    whole = Fits.load(tmp_path / "whole" / "model")
    for fit in kept:
        (same,) = whole.where(site=fit.site)
        assert same.subspace().basis().equal(fit.subspace().basis())


def test_a_search_interrupted_before_its_first_site_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_places.Places, "at", lambda *_: interrupt())
    result = search(*TINY, *SITES, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "nothing was saved" in result.stderr and not any(tmp_path.iterdir())


def test_a_twin_that_was_interrupted_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, calls = _places.Places.at, []

    def stopping(self: Any, assignment: Any, on_step: Any) -> tuple[list[Fit], list[Failure]]:
        calls.append(1)
        if len(calls) == 4:
            interrupt()
        return at(self, assignment, on_step)

    monkeypatch.setattr(_places.Places, "at", stopping)
    result = search(*TINY, *SITES, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Interrupted while searching the twin: 1 of 2 sites" in " ".join(
        result.stdout.split()
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert len(Fits.load(tmp_path / "out" / "model").places) == 2
    assert len(Fits.load(tmp_path / "out" / "twin").places) == 1


def test_in_the_library_an_interrupt_stays_one_and_has_the_fits(tmp_path: Path) -> None:
    error = sweeps.SweepInterrupted(Fits((), {}), 3)
    assert isinstance(error, KeyboardInterrupt) and error.fits.places == [] and "0 of 3 sites" in str(error)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_search_is_saved_waits(
    kind: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = iia_heatmap
    monkeypatch.setattr(search_report, "iia_heatmap", lambda *args: interrupt(kind) or draw(*args))
    result = search(*TINY, *SITES, "--no-twin", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "Written to" in result.stdout, (result.stderr, result.exception)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"twin"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"]["fits"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_an_adapter_is_saved_waits(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ReftModel.save_pretrained
    monkeypatch.setattr(ReftModel, "save_pretrained", lambda self, folder: save(self, folder) or interrupt())
    result = finetuned("--data", rows, *TINY_ADAPTER, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "The adapter" in result.stderr.replace("the adapter", "The adapter")
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES - {"loss.png", "results.json"}


def test_an_interrupt_while_results_are_saved_waits(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_lab.analysis import finetune_report

    draw = finetune_report.loss_curve
    monkeypatch.setattr(finetune_report, "loss_curve", lambda *a, **k: interrupt() or draw(*a, **k))
    result = finetuned("--data", rows, *TINY_ADAPTER, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "ends once all is saved" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES and results_of(tmp_path / "out")


def test_sigterm_ends_a_training_as_ctrl_c_does(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = finetune

    def stopped(model: Any, rows: Any, config: Any, *, on_step: Any, **options: Any) -> History:
        def step(i: int, loss: float) -> None:
            on_step(i, loss)
            if i == 1:
                interrupt(signal.SIGTERM)

        return train(model, rows, config, on_step=step, **options)

    monkeypatch.setattr(jobs, "finetune", stopped)
    result = finetuned("--data", rows, *TINY_ADAPTER, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "Interrupted after 2 of 3 steps" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES


# --- what acts on a terminal --------------------------------------------------------------------------------


def test_prompts_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    data = [{"prompt": "a fair price \x1b[2J\x9b1m", "answer": f" is\x1b]52;c;eA==\x07 {n}"} for n in range(4)]
    rows = written(tmp_path / "rows.jsonl", data)
    result = finetuned("--data", rows, *TINY_ADAPTER, "--out", tmp_path / "o\x1b[31mut")
    assert result.exit_code == 0 and "�[2J" in result.stdout, (result.stderr, result.exception)
    assert not set("\x1b\x9b\x07") & set(result.stdout)
    samples = results_of(tmp_path / "o\x1b[31mut")["samples"]
    assert samples[0]["prompt"] == data[0]["prompt"]  # files hold what the data hold
