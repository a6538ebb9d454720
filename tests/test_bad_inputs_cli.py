"""Odd inputs of the two commands, one by one: each is refused in one line before any work, or gives what is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from subspace_lab.cli import app

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
from _bad_inputs_cli import cases  # noqa: E402

sys.path.remove(BENCHMARKS)
CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_odd_input(name: str, tmp_path: Path) -> None:
    case, out = CASES[name], tmp_path / "made" / "for it"
    result = CliRunner().invoke(app, [*case.make(tmp_path), "--out", str(out)], input="y\n" * 9)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if case.refused is None:
        assert case.right is not None
        assert result.exit_code == 0 and case.right(out), (result.stdout, result.stderr)
        return
    lines = [line for line in result.stderr.splitlines() if "━" not in line]
    assert result.exit_code == 2 and result.stdout == "", (result.stdout, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("subspace-lab: "), lines
    assert all(part.lower() in lines[0].lower() for part in case.refused), lines
    assert "\x1b" not in lines[0] and not out.parent.exists() and not list(tmp_path.rglob("ran"))


def test_there_are_enough_of_each_kind() -> None:
    lines = [case.kind for case in CASES.values()]
    assert len(lines) >= 120 and min(lines.count(line) for line in (1, 2, 19)) >= 5
