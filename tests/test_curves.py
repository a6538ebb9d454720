"""Curves show what the fits hold, with their nulls, units and n."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from test_plots import caption, check_file
from tiny_sweeps import SITES, made_fit, made_fits, score

from subspace_lab.analysis.edit_effects import EditEffect
from subspace_lab.analysis.plots import (
    edits_by_layer,
    iia_by_pairs,
    iia_by_rank,
    methods_beside,
    training_curves,
)
from subspace_lab.core.estimates import Estimate
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, Method, RandomSubspace

RANKS = (1, 2, 4)


def fit(method: Method, rank: int, seed: int, test: float, train: float | None = None, **changes: Any) -> Fit:
    scores = {"dev": {"iia": score(test)}, "test": {"iia": score(test)}}
    if train is not None:
        scores["train"] = {"iia": score(train)}
    return made_fit(method=method, rank=rank, seed=seed, scores=scores, **changes)


def by_rank() -> Fits:
    found = [fit(DAS(k), k, s, 0.6 + 0.1 * i + 0.02 * s, 0.9) for i, k in enumerate(RANKS) for s in (0, 1)]
    found += [fit(PCA(k), k, 0, 0.5 + 0.02 * i) for i, k in enumerate(RANKS)]
    found += [fit(RandomSubspace(k, draws=2), k, s, 0.4 + 0.05 * s + 0.01 * k) for k in RANKS for s in (0, 1)]
    return made_fits([*found, fit(FullVector(), 16, 0, 0.8)])


def by_pairs() -> dict[int, Fits]:
    return {n: made_fits([fit(DAS(2), 2, s, test, 0.99) for s in (0, 1)]) for n, test in ((20, 0.5), (200, 0.8))}


def effects(layers: int = 3) -> list[EditEffect]:
    return [
        EditEffect(
            Site("block_output", i, "last"),
            Estimate(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05, 40),
            Estimate(0.02 * i, 0.0, 0.05, 40),
            Estimate(0.4, 0.3, 0.5, 40),
        )
        for i in range(layers)
    ]


def curves(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), round(float(y), 4)) for x, y in line.get_xydata()]
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }


def test_by_rank_shows_means_over_seeds_training_and_the_random_band(tmp_path: Path) -> None:
    figure: Any = iia_by_rank(by_rank(), tmp_path / "rank.png")
    check_file(tmp_path / "rank.png")
    (axis,) = figure.axes
    found = curves(axis)
    assert found["DAS"] == [(1, 0.61), (2, 0.71), (4, 0.81)] and found["PCA"] == [(1, 0.5), (2, 0.52), (4, 0.54)]
    assert found["random subspace"] == [(1, 0.435), (2, 0.445), (4, 0.465)]
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [[round(float(y), 4) for y in line.get_ydata()] for line in hollow] == [[0.9, 0.9, 0.9]]
    (band,) = [c for c in axis.collections if c.get_facecolor().size and len(c.get_paths()[0].vertices) > 6]
    ys = band.get_paths()[0].vertices[:, 1]
    assert (round(ys.min(), 4), round(ys.max(), 4)) == (0.41, 0.49)
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2", "4"]
    assert axis.get_xlabel() == "rank (dimensions)" and axis.get_ylabel() == "IIA"
    assert "321 test pairs" in caption(figure) and "mean of 2 seeds" in caption(figure)
    assert any(line.get_ydata()[0] == 0.38 for line in axis.lines)  # the higher floor


def test_by_pairs_shows_held_out_and_training_pairs(tmp_path: Path) -> None:
    figure: Any = iia_by_pairs(by_pairs(), tmp_path / "pairs.png")
    check_file(tmp_path / "pairs.png")
    (axis,) = figure.axes
    assert curves(axis)["DAS 2"] == [(20, 0.5), (200, 0.8)] and axis.get_xlabel() == "training pairs"
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[0.99, 0.99]]


def test_methods_stand_below_each_other_with_controls_apart(tmp_path: Path) -> None:
    figure: Any = methods_beside(by_rank().where(rank=4), tmp_path / "methods.png")
    check_file(tmp_path / "methods.png")
    (axis,) = figure.axes
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names == ["DAS 4 (×2)", "PCA 4", "RandomSubspace 4 (×2)"]
    assert [t.get_text() for t in axis.texts] == ["0.81", "0.54", "0.46"]
    bars = [line.get_xdata() for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert [[round(float(x), 2) for x in bar] for bar in bars] == [[0.77, 0.84], [0.51, 0.56], [0.41, 0.51]]


def test_training_curves_are_the_losses(tmp_path: Path) -> None:
    losses = tuple(2.0 - 0.1 * i for i in range(10))
    given = made_fits(
        [fit(DAS(2), 2, s, 0.5, losses=losses) for s in (0, 1)] + [fit(PCA(2), 2, 0, 0.5, losses=())]
    )
    figure: Any = training_curves(given, tmp_path / "training.png")
    check_file(tmp_path / "training.png")
    (axis,) = figure.axes
    assert len(axis.lines) == 2 and curves(axis)["DAS 2 (×2)"] == [
        (i + 1, round(x, 4)) for i, x in enumerate(losses)
    ]


def test_edits_by_layer_show_what_each_does_and_what_is_lost(tmp_path: Path) -> None:
    figure: Any = edits_by_layer(effects(), tmp_path / "edits.png")
    check_file(tmp_path / "edits.png")
    (axis,) = figure.axes
    alone, lost = ([round(float(y), 3) for _, y in c.get_offsets()] for c in axis.collections[1::2])
    assert alone == [0, 0.1, 0.2] and lost == [0, 0.02, 0.04]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2"]
    assert "40 rows" in caption(figure) and "0.400" in caption(figure) and "nats" in axis.get_ylabel()


@pytest.mark.parametrize(
    ("draw", "given"),
    [
        (iia_by_rank, by_rank()), (iia_by_pairs, by_pairs()), (methods_beside, by_rank()), (training_curves, by_rank()),
        (edits_by_layer, effects()),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)  # fmt: skip
def test_an_axis_of_ones_own_is_drawn_on(draw: Callable[..., Figure], given: Any) -> None:
    figure: Any = Figure()
    first, second = figure.subplots(1, 2)
    assert draw(given, ax=second) is figure
    assert second.get_title(loc="left") and second.has_data() and not first.has_data()
    assert figure._supxlabel is None  # type: ignore[attr-defined]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    two = made_fits([made_fit(site) for site in SITES])
    for draw in (iia_by_rank, methods_beside, training_curves):
        with pytest.raises(ValueError, match=r"Fits at 2 sites.*Filter them"):
            draw(two, tmp_path / "no.png")
        with pytest.raises(ValueError, match="No fits to draw"):
            draw(made_fits([]), tmp_path / "no.png")
    with pytest.raises(ValueError, match="No method has several ranks"):
        iia_by_rank(made_fits([made_fit()]), tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"Fits of \[20\] training pairs"):
        iia_by_pairs({20: by_pairs()[20]}, tmp_path / "no.png")
    with pytest.raises(ValueError, match="was trained at"):
        training_curves(made_fits([fit(PCA(2), 2, 0, 0.5, losses=())]), tmp_path / "no.png")
    with pytest.raises(ValueError, match="No effects to draw"):
        edits_by_layer([], tmp_path / "no.png")
    assert not list(tmp_path.iterdir())
