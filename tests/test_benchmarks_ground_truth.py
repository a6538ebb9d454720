"""The benchmark of known truths: its programs are what they say, and its figures follow from its records."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab.core.subspaces import Axes, FixedSubspace
from subspace_lab.das.prepared_pairs import PreparedPairs

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture
def ground_truth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ground_truth

    return ground_truth


def test_there_are_fifty_two_programs_and_each_is_told_from_the_others(ground_truth: Any) -> None:
    programs = ground_truth.variants()
    names = [ground_truth.name_of(program) for program in programs]
    assert len(programs) == len(set(names)) == 52
    assert {program.width for program in programs} == {128, 256}
    assert {program.fillers for program in programs} == {0, 1, 2, 3}
    for program in programs:
        text = program.text(program.x[0], program.y[0], program.z[0])
        # The last position answers, and a variable on the way stands at the mark.
        assert text[int(program.positions[-1])] == "=" and len(text) == int(program.positions[-1]) + 1
        assert not program.on_the_way or text[int(program.positions[0])] == ";"
        assert set(text) <= set(program.vocabulary) and text.count("_") == program.fillers
        assert 2 <= len(program.values) <= 5


@pytest.mark.skipif(find_spec("torchwright") is None, reason="torchwright is not installed (extra 'benchmarks')")
@pytest.mark.parametrize("number", [8, 26])
def test_the_true_span_is_the_variable_in_longer_texts_too(ground_truth: Any, number: int) -> None:
    """With fillers, in either layout: an exchange of the span alone is an exchange of the variable."""
    program = ground_truth.variants()[number]
    assert program.fillers
    truth = ground_truth.compiled(program, seed=0)
    site, span = next(iter(truth.spans.items()))
    assert len(span) == len(program.values) - 1
    assignment = {truth.variable: site}
    prepared = PreparedPairs.of(truth.backbone, truth.pairs.test, [assignment])
    assert torch.equal(prepared.unedited.argmax(-1), truth.pairs.test.base_answer)
    from subspace_lab.core.alignments import Alignment

    edits = Alignment({truth.variable: (site, FixedSubspace(span.float()))}).edits()
    (outcome,) = prepared.outcomes(assignment, [edits])
    assert torch.equal(outcome.logits.argmax(-1), truth.pairs.test.answer)
    assert isinstance(truth.backbone.width(site), int) and Axes(truth.backbone.width(site)).rank == program.width


def test_columns_that_hold_a_value_and_nothing_else(ground_truth: Any) -> None:
    values = torch.tensor([0, 0, 1, 1, 2, 2])
    noise = torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9, 0.5])
    states = torch.stack([values.float(), noise, values + noise, torch.ones(6), (values == 1).float() * 3], 1)
    assert ground_truth.holding(states, values).tolist() == [True, False, False, False, True]


def record(holds: bool, share: float, after: float, false: bool, test: float = 1.0) -> dict[str, Any]:
    def told(own: float, supported: bool, held: bool) -> dict[str, Any]:
        one = {
            "method": "DAS 1",
            "site": "s",
            "rank": 1,
            "dev": 1.0,
            "test": [test, 0.9, 1.0],
            "supported": supported,
        }
        return one | {"holds": held} | ({"share": own, "inside": own, "angle": 10.0, "took": "x"} if held else {})

    best = {"best": told(share, True, holds), "elsewhere": told(0.0, false, False)}
    pure = {
        "best": told(after, True, holds) | {"test": [test - 0.01, 0.9, 1.0]},
        "elsewhere": told(0.0, False, False),
    }
    families = {"DAS": best, "DAS + purify": pure}
    return {"methods": families, "illusion": {"flagged": not holds}, "seconds": 1.0}


def test_figures_are_means_over_the_programs(ground_truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_truth, "FAMILIES", {"DAS": ["DAS 1"]})
    records = {
        "a": record(True, 0.6, 1.0, False),
        "b": record(True, 0.8, 0.9, True),
        "c": record(True, 0.95, 0.5, False),  # held enough: purify is not judged on it
        "d": record(False, 0.0, 0.0, False),
    }
    found = {name: one["median"] for name, one in ground_truth.figures(records).items()}
    assert found["sites_found"] == 0.75 and found["false_supported"] == 0.25
    assert found["supported_where_true"] == 0.75  # at the wrong site it is no support of the truth
    assert found["share_before"] == 0.7 and found["share_after"] == 0.95 and found["programs_that_held_less"] == 2
    assert found["iia_fall_of_purify"] == pytest.approx(0.01) and found["flagged_where_true"] == 0.25
    assert found["share_everywhere_before"] == pytest.approx(0.7833, abs=1e-4)


def test_a_run_goes_on_where_it_was_killed(ground_truth: Any, tmp_path: Path) -> None:
    kept, settings = tmp_path / "x.partial.jsonl", {"seed": 0, "ranks": (1, 2)}
    lines = [
        {"settings": {"seed": 0, "ranks": [1, 2]}, "name": "a", "record": {"x": 1}},
        {"settings": {"seed": 1, "ranks": [1, 2]}, "name": "b", "record": {"x": 2}},
    ]
    kept.write_text("\n".join(map(json.dumps, lines)) + '\n{"settings": {"seed": 0, "ra')
    assert ground_truth.read(kept, settings) == {"a": {"x": 1}}
    assert ground_truth.read(tmp_path / "none.jsonl", settings) == {}


def test_the_file_is_json_with_a_program_a_line(ground_truth: Any, tmp_path: Path) -> None:
    records = {"a": record(True, 0.6, 1.0, False)}
    ground_truth.write(
        tmp_path / "x.json", {"seed": 0}, {"sites_found": {"median": 1}}, {"DAS": {}}, records, "cpu"
    )
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["results"] == {"sites_found": {"median": 1}} and told["name"] == "ground_truth"
    assert told["programs"]["a"]["methods"]["DAS"]["best"]["share"] == 0.6
