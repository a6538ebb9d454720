"""The pieces of benchmarks/das_quality.py: which figures a file keeps, intervals, and pairs of the first argument."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_sweeps import made_fit, made_fits

from subspace_lab.core.sites import Site
from subspace_lab.das.methods import DAS

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import das_quality

    return das_quality


def figure(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value, "n": 1}


def test_a_part_replaces_its_own_figures_and_keeps_the_others(quality: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    first = {"one": ({"a": figure(1), "b": figure(2)}, {"steps": 3}), "two": ({"c": figure(4)}, {"steps": 5})}
    settings, results = quality.merged(str(path), first)
    assert results == {"a": figure(1), "b": figure(2), "c": figure(4)}
    quality.report("das_quality", settings, results, "cpu", str(path))
    # Measured again, part one has no figure "b" any more.
    settings, results = quality.merged(str(path), {"one": ({"a": figure(6)}, {"steps": 7})})
    assert results == {"c": figure(4), "a": figure(6)}
    assert settings == {
        "one": {"steps": 7, "figures": ["a"]},
        "two": {"steps": 5, "figures": ["c"]},
    }
    assert quality.merged(None, {"one": ({"a": figure(6)}, {})})[1] == {"a": figure(6)}


def test_an_unknown_part_is_refused(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["das_quality.py", "--part", "planted,plants"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "unknown ['plants']; possible are ['planted', 'compiled'" in capsys.readouterr().err


def test_the_interval_of_a_mean(quality: ModuleType) -> None:
    """By hand: mean 3, standard deviation sqrt(2.5), t 2.776 for five values."""
    found = quality.mean_figure([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3 and found["median"] == 3 and found["n"] == 5
    assert (
        found["mean_high"] - 3 == pytest.approx(2.776 * (2.5 / 5) ** 0.5) == pytest.approx(3 - found["mean_low"])
    )


def test_pairs_of_the_first_argument(quality: ModuleType) -> None:
    pairs = quality.first_argument(2000, 5)
    base, source = pairs.base.positional, pairs.sources["a"].positional
    (a, b, c, d), (of_a, of_b, _, _) = base.split(4, 1), source.split(4, 1)
    fits = of_a.eq(b).all(1)
    assert torch.equal(pairs.answer.bool(), fits == c.eq(d).all(1))
    assert torch.equal(pairs.base_answer.bool(), a.eq(b).all(1) == c.eq(d).all(1))
    # No constant answer, nor the base's, says more than chance; sources are equal as often as bases, whatever fits.
    for share in (
        fits,
        pairs.answer.bool(),
        pairs.answer == pairs.base_answer,
        of_a.eq(of_b).all(1)[fits],
        of_a.eq(of_b).all(1)[~fits],
    ):
        assert abs(share.float().mean() - 0.5) < 0.06


def test_figures_of_a_script_are_taken_over_and_the_file_says_so(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    figures = {"screen_saving": figure(0.7), "screen_lost": figure(0.0)}
    quality.report("screening", {"tie": 0.02, "quick": False}, figures, "cpu", str(tmp_path / "screening.json"))
    path = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["das_quality.py", "--take-over", "--part", "screen", "--json", str(path)])
    quality.main()
    written = json.loads(path.read_text())
    assert written["results"] == figures
    of_part = written["settings"]["screen"]
    assert of_part["taken_over_from"] == "benchmarks/results/screening.json" and of_part["tie"] == 0.02
    assert "torch" in of_part["measured_on"]
    quality.report("screening", {"quick": True}, figures, "cpu", str(tmp_path / "screening.json"))
    with pytest.raises(ValueError, match="quick run"):
        quality.main()


def test_what_a_screen_saved_and_lost_is_of_the_cases_on_which_nothing_was_chosen(quality: ModuleType) -> None:
    def case(chosen_on: bool, lost: bool, saving: float) -> dict[str, object]:
        return {"chosen_on": chosen_on, "lost": lost, "saving": saving}

    cases = {"a": case(True, True, 0.0), "b": case(False, False, 0.5), "c": case(False, True, 0.7)}
    found = quality.screening.figures(cases)
    assert found["screen_lost"]["median"] == 0.5
    assert found["screen_saving"] == {"median": 0.6, "low": 0.5, "high": 0.7, "n": 2}
    every = quality.screening.cases_of(0)
    names = [one.name for one in every]
    assert len(set(names)) == len(names)
    # Another seed has other cases.
    assert not set(names) & {one.name for one in quality.screening.cases_of(10)}
    chosen_on = sum(one.chosen_on for one in every)
    assert chosen_on >= 3 and len(names) - chosen_on >= 6


def test_a_case_is_lost_where_no_trained_site_is_near_the_best(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the dev scores of the complete sweep, whatever the screened one says and the test pairs say."""
    screening, sites = quality.screening, [Site("block_output", layer, "last") for layer in range(3)]
    full = made_fits(
        [made_fit(s, DAS(1), dev=dev, test=0.5) for s, dev in zip(sites, (0.9, 0.87, 0.89), strict=True)]
    )
    case = screening.Case("one", False, lambda _: (None, None, sites))
    for trained, lost in ((sites[1], True), (sites[2], False), (sites[0], False)):
        screened = made_fits([made_fit(trained, DAS(1), dev=0.99)])
        monkeypatch.setattr(screening, "sweep", lambda *_, screen, found=screened, **__: found if screen else full)
        for first in (True, False):
            measured = screening.measured(
                case, screening.Screen(), screening.CONFIG, screened_first=first, device="cpu", seed=0
            )
            assert measured["lost"] is lost and measured["trained"] == 1 and measured["near_best"] == 2


def test_what_a_part_measured_is_written(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["das_quality.py", "--quick", "--part", "planted", "--json", str(path)])
    monkeypatch.setitem(quality.PARTS, "planted", lambda args: ({"x": figure(float(args.quick))}, {"steps": 2}))
    quality.main()
    written = json.loads(path.read_text())
    assert written["name"] == "das_quality" and written["results"] == {"x": figure(1.0)}
    planted = written["settings"]["planted"]
    assert planted["figures"] == ["x"] and planted["steps"] == 2 and planted["quick"] is True
    assert "torch" in planted["machine"]
