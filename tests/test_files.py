"""Folders for results: one writer, nothing mixed, nothing half, and what a killed process leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subspace_lab.core._locks import LOCK
from subspace_lab.core.files import taken_folder, write_text
from subspace_lab.core.texts import printable

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from subspace_lab.core.files import taken_folder, whole_file
with taken_folder(sys.argv[1]) as folder, whole_file(folder / "results.json") as provisional:
    provisional.write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    """Another process that has taken the folder and is in the middle of a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_results_are_never_mixed(tmp_path: Path) -> None:
    with taken_folder(tmp_path / "a" / "b") as folder:
        write_text(folder / "old", "mine")
    assert [one.name for one in folder.iterdir()] == ["old"]
    for path in (folder, folder / "old"):
        with pytest.raises(FileExistsError, match="not empty"), taken_folder(path):
            pass
    assert [one.name for one in folder.iterdir()] == ["old"]


def test_folders_in_which_nothing_comes_to_stand_are_gone(tmp_path: Path) -> None:
    (tmp_path / "was there").mkdir()
    for name in ("a/b/c", "was there"):
        with pytest.raises(ZeroDivisionError), taken_folder(tmp_path / name):
            raise ZeroDivisionError
    assert [one.name for one in tmp_path.rglob("*")] == ["was there"]


def test_one_of_two_processes_gets_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    other = holder(folder)
    told = f"{folder} is being written to by process {other.pid} on .*, since"
    with pytest.raises(BlockingIOError, match=told), taken_folder(folder):
        pass
    assert {one.name for one in folder.iterdir()} == {LOCK, f".results.json.{other.pid}"}
    other.communicate()
    assert [one.name for one in folder.iterdir()] == ["results.json"]


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Whoever does not get it is told so; none sees a folder that is half another's."""
    program = (
        "import sys, time; from subspace_lab.core.files import *\n"
        "try:\n"
        "    with taken_folder(sys.argv[1]) as folder: time.sleep(0.2); write_text(folder / 'mine', sys.argv[2])\n"
        "except (BlockingIOError, FileExistsError): sys.exit(2)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out"), str(i)],
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
        for i in range(4)
    ]  # fmt: skip
    codes = [one.wait() for one in started]
    assert sorted(codes) == [0, 2, 2, 2]
    assert (tmp_path / "out" / "mine").read_text() == str(codes.index(0))


def test_what_a_killed_process_left_is_taken_over_with_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said: list[Any] = []
    other = holder(folder)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (folder / f".results.json.{other.pid}").read_text() == "half"
    with taken_folder(folder, said.append):
        assert [one.name for one in folder.iterdir()] == [LOCK]
    assert len(said) == 1 and f"process {other.pid}" in said[0] and "removed with 1 unfinished files" in said[0]


def test_what_a_killed_process_finished_is_not_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    other = holder(folder)
    other.send_signal(signal.SIGKILL)
    other.wait()
    (folder / "adapter").write_text("whole")
    with pytest.raises(FileExistsError, match="not empty"), taken_folder(folder):
        pass
    assert [one.name for one in folder.iterdir()] == ["adapter"]


def test_unfinished_files_whose_process_is_not_known_are_named(tmp_path: Path) -> None:
    (tmp_path / ".fits.json.4711").write_text("half")
    with pytest.raises(FileExistsError, match=r"unfinished files .*\.fits\.json\.4711"), taken_folder(tmp_path):
        pass


def test_without_locks_of_the_system_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_lab.core import _locks

    monkeypatch.setattr(_locks, "fcntl", None)
    with taken_folder(tmp_path):
        held = json.loads((tmp_path / LOCK).read_text())
        assert held["pid"] == os.getpid()
        with pytest.raises(BlockingIOError, match=f"remove {tmp_path / LOCK}"), taken_folder(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    with taken_folder(tmp_path):
        pass


@pytest.mark.parametrize("place", ["under a file", "too long", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {"under a file": tmp_path / "file" / "out", "too long": tmp_path / ("x" * 300)}.get(
        place, tmp_path / "out"
    )
    if place == "read-only":  # tests may run as root, whom no permission stops

        def refuse(path: Path, *_: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("subspace_lab.core._locks.os.open", refuse)
    with pytest.raises(OSError, match=r"cannot be written to: .*Name another folder"), taken_folder(folder):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_acts_on_a_terminal_is_not_printed() -> None:
    assert printable("a\x1b[31mred\x9b2J\x07 \u202eyes\tand\nnö 👩‍🔬") == "a�[31mred�2J� �yes\tand\nnö 👩‍🔬"
