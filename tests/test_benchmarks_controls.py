"""The pieces of benchmarks/controls.py: what is counted, and cases that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import controls

    return controls


def told(*conclusions: str) -> list[dict[str, Any]]:
    return [{"conclusion": one, "seconds": 1.0} for one in conclusions]


def test_underpowered_makes_no_share_look_better(controls: ModuleType) -> None:
    random = {"a": told("supported", "not found"), "b": told("underpowered", "underpowered")}
    planted = {"c": told("supported", "supported", "underpowered", "not found")}
    found = controls.counted(random, planted)
    assert found["supported_on_random_models"]["median"] == 0.5 and found["supported_on_random_models"]["n"] == 2
    assert found["underpowered_on_random_models"]["median"] == 0.5
    assert found["supported_on_planted_truths"]["median"] == 0.5 and found["supported_on_planted_truths"]["n"] == 4
    assert found["supported, c"]["low"] < 0.5 < found["supported, c"]["high"]
    assert "supported_on_planted_truths" not in controls.counted(random, {})


def test_there_are_as_many_cases_as_are_told(controls: ModuleType) -> None:
    numbers = {kind: number for kind, (_, number) in controls.RANDOM.items()}
    hard = sum(
        numbers[kind] for kind in ("readable", "fixed pool", "shared entities", "control labels", "nonlinear")
    )
    assert sum(numbers.values()) == 202 and hard == 102
    assert sum(number for _, number in controls.PLANTED.values()) == 104


def test_a_case_that_is_kept_is_not_run_again(
    controls: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Any = []
    monkeypatch.setattr(controls, "verdict_of", lambda search, *_: runs.append(search) or told_whole())
    kinds = {"some kind": (lambda seed: seed, 2)}
    first = controls.run(kinds, False, "cpu", 0, tmp_path)
    assert runs == [0, 1] and [one["conclusion"] for one in first["some kind"]] == ["not found"] * 2
    assert controls.run(kinds, False, "cpu", 0, tmp_path) == first and len(runs) == 2
    assert json.loads((tmp_path / "some_kind_1.json").read_text())["p"] == 1.0


def told_whole() -> dict[str, Any]:
    return {"conclusion": "not found", "claim": {"iia": {"value": 0.5}}, "p": 1.0}


def test_sources_and_entities_are_shared_where_that_is_said(controls: ModuleType) -> None:
    pairs = controls.with_shared_sources(controls.equality(0, train=30, dev=20, test=40), 5, 0)
    rows = {tuple(row.tolist()) for split in (pairs.train, pairs.dev, pairs.test)
            for row in split.sources["left_equal"].positional}  # fmt: skip
    assert len(rows) == 5
    found = controls.shared_entities(3)
    halves = [split.base.positional[:, : controls.INPUTS // 2] for split in (found.train, found.test)]
    assert len(torch.cat(halves).unique(dim=0)) == controls.ENTITIES == len(halves[1].unique(dim=0))
    # Equal entities have equal attributes.
    for split in (found.train, found.test):
        known: dict[tuple[float, ...], int] = {}
        for row, answer in zip(split.base.positional.tolist(), split.base_answer.tolist(), strict=True):
            assert known.setdefault(tuple(row[: controls.INPUTS // 2]), answer) == answer
