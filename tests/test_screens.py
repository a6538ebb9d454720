"""Screens: training where a cheap pass leaves hope. What is left out says so, what is not is what it always was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep_folders import interrupt, kept, same
from tiny_sweeps import QUICK, pairs, swept

from subspace_lab.core.sites import Site
from subspace_lab.das import _places
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, Method, RandomSubspace
from subspace_lab.das.screens import Screen
from subspace_lab.das.sweeps import SweepInterrupted
from subspace_lab.das.workers import local_workers

METHODS: list[Method] = [DAS([1, 2]), PCA(2), FullVector(), RandomSubspace(1, draws=1)]
SIX = [Site("block_output", layer, at) for layer in (0, 1, 2) for at in ("2", "last")]
STRICT = Screen(steps=(0.25, 0.5), keep=0.5, margin=0.0, least=1)


@pytest.fixture(scope="module")
def complete() -> Fits:
    return swept(METHODS, SIX, seeds=2)


@pytest.fixture(scope="module")
def screened() -> Fits:
    return swept(METHODS, SIX, seeds=2, screen=STRICT)


def test_every_cell_is_there_once_as_a_fit_or_as_screened(complete: Fits, screened: Fits) -> None:
    cells = {(fit.place, fit.method.label, fit.seed) for fit in complete}
    fits = {(fit.place, fit.method.label, fit.seed) for fit in screened}
    left_out = {(one.place, one.method, one.seed) for one in screened.screened}
    assert fits | left_out == cells and not fits & left_out and len(complete.screened) == 0
    # What needs no training is not spared, but for random subspaces, which stand beside what is trained.
    assert {method for _, method, _ in left_out} == {"DAS 1", "DAS 2", "RandomSubspace 1"}
    assert all(
        [place for place, other, _ in left_out if other == "RandomSubspace 1"].count(place) == 1
        for place, method, _ in left_out if method == "DAS 1"
    )  # fmt: skip
    assert len({place for place, _, _ in left_out}) >= 3
    assert len(screened.where(method=FullVector)) == len(screened.where(method=PCA)) == 6


def test_what_is_not_left_out_is_what_it_is_in_a_complete_sweep(complete: Fits, screened: Fits) -> None:
    for fit in screened:
        same_cell = [
            one for one in complete if (one.place, one.method, one.seed) == (fit.place, fit.method, fit.seed)
        ]
        assert same_cell[0].record() == fit.record()
        assert torch.equal(same_cell[0].subspace().basis(), fit.subspace().basis())


def test_the_screen_looks_at_dev_and_keeps_what_scores_highest(
    screened: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, tuple[str, ...]]] = []
    tried: list[set[str]] = []
    scored = _places.Places._scored

    def watched(places: Any, assignment: Any, cells: Any, splits: Any) -> Any:
        asked.append((places.config.steps, len(places.seeds), tuple(splits)))
        tried.append({cell.method.label for cell in cells})
        return scored(places, assignment, cells, splits)

    monkeypatch.setattr(_places.Places, "_scored", watched)
    swept(METHODS, SIX[:2], seeds=2, screen=STRICT)
    assert asked[:3] == [(2, 1, ("dev",)), (2, 1, ("dev",)), (4, 1, ("dev",))]
    assert asked[3:] == [(QUICK.steps, 2, _places.SPLITS)] * 2
    first = {"DAS 1", "DAS 2", "PCA 2", "FullVector", "DifferenceOfMeans"}
    assert tried[:3] == [first, first, {"DAS 1", "DAS 2"}]  # what needs no training is scored once
    scores = {one.place: one.score for one in screened.screened}
    trained = {fit.place for fit in screened.where(method=DAS)}
    assert trained and not trained & set(scores)
    assert all(
        "of the screen, after" in one.reason and "the best site had" in one.reason for one in screened.screened
    )


def test_the_table_tells_screened_cells_from_missing_ones(screened: Fits) -> None:
    one = screened.screened[0]
    for shown in (repr(screened), screened._repr_html_()):
        assert f"screened ({one.score:.2f})" in shown and "sites were skipped" in shown
    assert screened.best() in screened.fits
    only = screened.where(method=DAS)
    assert len(only.places) <= 3  # the other sites have no fit at all, and stand in the table all the same
    assert repr(only).count("screened (") == 2 * (6 - len(only.places)) and "–" not in repr(only)


def test_screened_cells_are_saved(screened: Fits, tmp_path: Path) -> None:
    screened.save(tmp_path / "fits")
    again = Fits.load(tmp_path / "fits")
    assert again.screened == screened.screened and same(again, screened)


def test_a_screened_sweep_goes_on(screened: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the screen, and then in the search."""
    screen_scores_of = _places.Places.screen_scores_of
    calls: Any = []

    def counted(places: Any, cohort: Any, turn: int, share: float) -> Any:
        calls.extend((number, share) for number in cohort)
        if len(set(calls)) >= 4 and not interrupted:
            interrupted.append(len(cohort))
            interrupt()
        return screen_scores_of(places, cohort, turn, share)

    interrupted: list[int] = []
    monkeypatch.setattr(_places.Places, "screen_scores_of", counted)
    with pytest.raises(KeyboardInterrupt):
        swept(METHODS, SIX, seeds=2, screen=STRICT, out=tmp_path)
    with monkeypatch.context() as patched:
        found, at = [], _places.Places.at

        def counted_at(places: Any, assignment: Any, on_step: Any, splits: Any = _places.SPLITS) -> Any:
            found.append(splits == _places.SPLITS)
            return interrupt() if sum(found) == 4 else at(places, assignment, on_step, splits)

        patched.setattr(_places.Places, "at", counted_at)
        with pytest.raises(SweepInterrupted, match="3 of 6 sites"):
            swept(METHODS, SIX, seeds=2, screen=STRICT, out=tmp_path)
    done = len(calls)
    assert same(swept(METHODS, SIX, seeds=2, screen=STRICT, out=tmp_path), screened)
    # None is scored twice, but for those at which it was interrupted.
    assert len(calls) == done == interrupted[0] + 6 + len({n for n, share in calls if share == 0.5})
    assert kept(tmp_path) == {"sweep.json", "fits.json", "subspaces.safetensors"}
    with pytest.raises(ValueError, match=r"folder of another sweep \(screen: "):
        swept(METHODS, SIX, seeds=2, out=tmp_path)


def test_a_screen_on_an_executor_leaves_out_the_same(screened: Fits) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        assert same(swept(METHODS, SIX, seeds=2, screen=STRICT, executor=executor), screened)


def test_a_screen_in_worker_processes_leaves_out_the_same(screened: Fits) -> None:
    """Begun anew, so that all of the screen goes through files: the rounds' scores and why a site was left out."""
    with local_workers(2) as executor:
        assert same(swept(METHODS, SIX, seeds=2, screen=STRICT, executor=executor), screened)


def test_a_later_round_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that the full vector saved in the first round is not lost since a few steps more say less."""
    said = {0: {0: 0.9, 1: 0.5, 2: 0.4, 3: 0.3}, 1: {0: 0.2, 1: 0.6, 2: 0.5}}
    monkeypatch.setattr(
        _places.Places,
        "screen_scores_of",
        lambda _, cohort, turn, share: {number: said[turn][number] for number in cohort},
    )
    left = swept([DAS(1)], SIX[:4], screen=Screen(steps=(0.2, 0.4), keep=0.7, margin=0, least=1))
    assert left.places == [str(SIX[0]), str(SIX[1]), str(SIX[2])]
    strict = swept([DAS(1)], SIX[:4], screen=Screen(steps=(0.2, 0.4), keep=0.34, margin=0, least=1))
    assert strict.places == [str(SIX[0])]
    assert {one.place: one.score for one in strict.screened}[str(SIX[1])] == 0.6


def test_where_nothing_can_be_trained_a_later_round_changes_nothing() -> None:
    found = swept([PCA(2), RandomSubspace(1, draws=1)], SIX, screen=STRICT)
    assert len(found.where(method=PCA)) == 6 and len({one.place for one in found.screened}) == 4  # 3 and 1


def test_variables_that_share_a_site_are_screened_without_the_full_vector() -> None:
    found = swept([DAS(1)], SIX[:2], pairs=pairs(("v", "w")), screen=STRICT)
    assert len(found) == 1 and len(found.screened) == 1 and found.failures == ()


def test_what_is_kept() -> None:
    scores = {0: 0.5, 1: 0.9, 2: 0.7, 3: 0.89, 4: 0.5}
    assert Screen(keep=0.4, margin=0, least=1).kept(scores) == [1, 3]
    assert Screen(keep=0.2, margin=0, least=1).kept(scores) == [1]
    assert Screen(keep=0.2, margin=0.02, least=1).kept(scores) == [1, 3]
    assert Screen(keep=0.2, margin=0, least=3).kept(scores) == [1, 2, 3]
    assert Screen(keep=0.9, margin=0, least=9).kept(scores) == [0, 1, 2, 3, 4]
    assert Screen(keep=0.5, margin=0, least=1).kept({7: 0.1}) == [7]


@pytest.mark.parametrize(
    "wrong", [{"steps": ()}, {"steps": (0.0,)}, {"steps": (0.1, 1.0)}, {"keep": 0.0}, {"keep": 1.0},
              {"margin": -0.1}, {"margin": float("nan")}, {"least": 0}]
)  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needed are"):
        Screen(**wrong)


def test_log_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one in ten seconds, and the last."""
    from subspace_lab.das import _progress

    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with _progress.progress("sweep", 90, 5, quiet=False) as shown:
        for seconds in (4.0, 8.0, 200.0, 203.0):
            clock[0] = seconds
            shown.end()
    assert capsys.readouterr().err == "sweep: 3 of 90 sites, 3 min 20 s, about 1 h 36 min left\n"
    with _progress.progress("sweep", 1, 5, quiet=False) as shown:
        shown.end()
    assert capsys.readouterr().err == "sweep: 1 of 1 sites, 0 s\n"
    with _progress.progress("sweep", 1, 5, quiet=True) as shown:
        shown.end()
    assert capsys.readouterr().err == ""


def test_the_screen_is_named_in_the_facts(screened: Fits, complete: Fits) -> None:
    assert screened.facts["screen"]["keep"] == 0.5 and "screen" not in complete.facts
