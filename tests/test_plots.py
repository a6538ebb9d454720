"""Pictures show what the results hold, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from tiny_sweeps import made_fit, made_fits, score

from subspace_lab.analysis.comparisons import Comparison, compare
from subspace_lab.analysis.geometry import Chance, chordal, containment, haar_angles
from subspace_lab.analysis.plots import angle_spectrum, iia_heatmap, overlap_heatmap
from subspace_lab.analysis.plots.canvas import new_figure
from subspace_lab.analysis.plots.cells import COLOURS
from subspace_lab.analysis.plots.heatmaps import MASKED, SIGNED
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, RandomSubspace
from subspace_lab.das.screens import Screened

POSITIONS = ("amount", "last")
DAS_3 = DAS(3)
EFFECTS = (-2.5, 0.0, 2.0, 1.0, 0.5, -1.0)


def result(values: dict[Site, float], accuracy: float = 0.97) -> Fits:
    """One DAS fit at each site."""
    return made_fits([made_fit(site, DAS_3, test=value, dev=value) for site, value in values.items()], accuracy)


def grid(values: list[float], component: str = "block_output") -> dict[Site, float]:
    sites = [Site(component, layer, position) for layer in (0, 3, 7) for position in POSITIONS]
    return dict(zip(sites, values, strict=True))


MODEL = result(grid([0.41, 0.42, 0.53, 0.64, 0.85, 0.96]))
TWIN = made_fits([made_fit(f.site, DAS_3, test=v, dev=0.5) for f, v in
                  zip(MODEL, [0.30, 0.33, 0.34, 0.35, 0.36, 0.64], strict=True)], 0.21)  # fmt: skip


def texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def cell(axis: Axes, column: int, row: int) -> str:
    """The colour at a place, as hexadecimal."""
    for patch in axis.patches:
        if isinstance(patch, Rectangle) and patch.get_xy() == (column - 0.5, row - 0.5):
            return to_hex(patch.get_facecolor())
    raise AssertionError(f"no cell at {column}, {row}")


def caption(figure: Any) -> str:
    return " ".join(figure._supxlabel.get_text().split())


def check_file(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    height, width, _ = imread(path).shape
    assert width > 600 and height > 250
    assert imread(path)[..., :3].std() > 0.05  # something is drawn
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left aside


def test_dollars_in_names_are_dollars(tmp_path: Path) -> None:
    """Between two dollars matplotlib would set a formula: "from 3to" in italics, and "$\\frac$" would fail."""
    figure: Any = new_figure((3, 2), "from $3 to $5", "A caption with $\\frac$ in it.")
    axis = figure.subplots()
    axis.set_xticks([0, 1], ["$a$", "b"])
    axis.set_yscale("log")
    figure.savefig(tmp_path / "dollars.png")
    texts = {text.get_text(): text.get_parse_math() for text in figure.findobj(Text)}
    assert not texts["from $3 to $5"] and not texts["$a$"]
    powers = [of for text, of in texts.items() if text.startswith("$\\mathdefault")]
    assert powers and all(powers)


def test_without_a_path_a_picture_is_what_a_notebook_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    matrix = [[1.0, 0.4], [0.4, 1.0]]
    labels = ["block_output[0]@last", "block_output[1]@last"]
    for figure in (iia_heatmap(MODEL), overlap_heatmap(comparison(labels, matrix))):
        assert not list(tmp_path.iterdir())
        figure._ipython_display_()  # type: ignore[attr-defined]
        picture = shown.pop()
        assert picture.alt == figure.get_suptitle() and 600 <= picture.width <= 1000
        (tmp_path / "shown.png").write_bytes(picture.data)
        check_file(tmp_path / "shown.png")
        (tmp_path / "shown.png").unlink()
    assert len(iia_heatmap(MODEL).axes) == 2  # no twin: one panel and its colours


def test_iia_and_its_interval_stand_in_their_cells(tmp_path: Path) -> None:
    figure: Any = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png")
    check_file(tmp_path / "iia.png")
    model, twin, _ = figure.axes
    for axis, shown in ((model, MODEL), (twin, TWIN)):
        told = {(round(t.get_position()[0]), round(t.get_position()[1]), t.get_text()) for t in axis.texts}
        expected = set()
        for one in shown:
            place = POSITIONS.index(one.site.positions), (0, 3, 7).index(one.site.layer)
            expected |= {(*place, f"{one.iia.value:.2f}"), (*place, f"{one.iia.low:.2f}–{one.iia.high:.2f}")}
        assert told == expected
        assert [t.get_text() for t in axis.get_xticklabels()] == list(POSITIONS)
        assert axis.get_xlabel() == "position"
    assert [t.get_text() for t in model.get_yticklabels()] == ["0", "3", "7"]
    assert "layer" in model.get_ylabel() and "block_output" in model.get_ylabel()
    assert model.get_title(loc="left") == "DAS 3"
    assert twin.get_title(loc="left") == "randomly initialised twin: DAS 3"


def test_every_method_has_a_panel_with_the_mean_over_its_seeds(tmp_path: Path) -> None:
    """Several ranks, seeds and methods at each site: each shown once, and no cell drawn over another."""
    methods = [DAS(1), DAS(4), DifferenceOfMeans(), DifferenceOfMeans(1), PCA(4), RandomSubspace(4)]
    values = {(site, method, seed): 0.4 + 0.01 * (7 * i + 3 * j + 2 * seed)
              for i, site in enumerate(list(grid([0] * 6))[:4])
              for j, method in enumerate(methods)
              for seed in range(3 if isinstance(method, DAS | RandomSubspace) else 1)}  # fmt: skip
    fits = made_fits([made_fit(s, m, seed, test=v, dev=v) for (s, m, seed), v in values.items()])
    figure: Any = iia_heatmap(fits, path=tmp_path / "iia.png")
    check_file(tmp_path / "iia.png")
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == [
        "DAS 1 (×3)", "DAS 4 (×3)", "DifferenceOfMeans", "DifferenceOfMeans 1", "PCA 4", "RandomSubspace 4 (×3)",
    ]  # fmt: skip
    for axis, method in zip(panels, methods, strict=True):
        assert len(axis.patches) == 4
        shown = {(round(t.get_position()[0]), round(t.get_position()[1]), t.get_text()) for t in axis.texts}
        expected = set()
        for mean in fits.mean():
            if mean.method == method:
                site = mean.fits[0].site
                place = POSITIONS.index(site.positions), (0, 3).index(site.layer)
                one = mean.fits[0].iia
                small = f"± {mean.spread:.2f}" if mean.n > 1 else f"{one.low:.2f}–{one.high:.2f}"
                expected |= {(*place, f"{mean.value:.2f}"), (*place, small)}
        assert shown == expected


def test_a_site_without_a_result_stays_empty() -> None:
    fits = made_fits(
        [made_fit(site, DAS(2)) for site in grid([0] * 6)] + [made_fit(list(grid([0] * 6))[2], PCA(1))]
    )
    das, components = (axis for axis in iia_heatmap(fits).axes if axis.get_title(loc="left"))
    assert len(das.patches) == 6 and len(components.patches) == 1


def test_a_screened_cell_is_hatched_with_the_score_of_its_site() -> None:
    """No colour of the ramp and no number of a score: in brackets what the screen said, once for all seeds."""
    sites = list(grid([0] * 6))
    trained = [made_fit(site, DAS(2), seed, test=0.8, dev=0.8) for site in sites[4:] for seed in (0, 1)]
    swaps = [made_fit(site, FullVector(), test=0.7) for site in sites]
    left_out = tuple(
        Screened("DAS 2", str(site), seed, 0.41 + i / 100, "left out") for i, site in enumerate(sites[:4])
        for seed in (0, 1)
    )  # fmt: skip
    fits = made_fits([*trained, *swaps], screened=left_out)
    figure: Any = iia_heatmap(fits)
    das, full = (axis for axis in figure.axes if axis.get_title(loc="left"))
    hatched = {p.get_xy(): p for p in das.patches if p.get_hatch()}
    assert set(hatched) == {(x - 0.5, y - 0.5) for x in (0, 1) for y in (0, 1)} and len(das.patches) == 6
    assert [t for t in texts(das) if t.startswith("(")] == ["(0.41)", "(0.42)", "(0.43)", "(0.44)"]
    assert not [p for p in full.patches if p.get_hatch()] and len(full.patches) == 6
    assert figure.legends[0].get_texts()[0].get_text() == "left out by the screen"
    assert "Hatched: not searched" in caption(figure)
    plain = iia_heatmap(made_fits([*trained, *swaps]))
    assert not plain.legends and "Hatched" not in caption(plain)


def test_a_screened_model_and_its_twin_may_be_trained_at_different_sites() -> None:
    sites = list(grid([0] * 6))

    def of(trained: list[Site]) -> Fits:
        left_out = tuple(Screened("DAS 2", str(site), 0, 0.3, "left out") for site in sites if site not in trained)
        return made_fits([made_fit(site, DAS(2)) for site in trained], screened=left_out)

    _, twin = (axis for axis in iia_heatmap(of(sites[4:]), of(sites[:1])).axes if axis.get_title(loc="left"))
    assert len([p for p in twin.patches if p.get_hatch()]) == 5 and len(twin.patches) == 6
    with pytest.raises(ValueError, match="its twin at"):
        iia_heatmap(of(sites[4:]), replace(of(sites[:1]), screened=()))


def test_another_score_is_drawn_by_its_name() -> None:
    scored = {"iia": score(0.5), "share": score(0.77), "margin": score(0.9)}
    margins = {**scored, "margin": made_fit().iia.__class__(-2.5, -3.0, -2.0, 9)}
    fits = made_fits([made_fit(scores={"dev": scored, "test": margins})])
    figure: Any = iia_heatmap(fits, metric="share")
    assert texts(figure.axes[0])[0] == "0.77" and figure.axes[-1].get_ylabel() == "share"


def test_a_score_that_is_no_share_has_colours_that_start_at_0() -> None:
    effects = {
        site: made_fit().iia.__class__(v, v - 0.2, v + 0.2, 9)
        for site, v in zip(grid([0] * 6), EFFECTS, strict=True)
    }
    fits = made_fits(
        [
            made_fit(
                site,
                scores={"dev": {"iia": score(0.5), "effect": one}, "test": {"iia": score(0.5), "effect": one}},
            )
            for site, one in effects.items()
        ]
    )
    figure: Any = iia_heatmap(fits, metric="effect")
    axis, bar = figure.axes
    assert bar.get_ylim() == (-2.5, 2.5) and not bar.lines
    assert cell(axis, 0, 0) == to_hex(SIGNED(0.0)) and cell(axis, 1, 0) == to_hex(SIGNED(0.5))
    assert cell(axis, 0, 1) == to_hex(SIGNED(0.9)) and "−2.50" in texts(axis)
    assert "start at 0" in caption(figure) and "Floors" not in caption(figure)


def heads(positions: tuple[str, ...], layers: tuple[int, ...] = (0, 2), n: int = 3) -> dict[Site, float]:
    sites = [Site("head_output", i, p, heads=h) for i in layers for h in (2, 0, 1)[:n] for p in positions]
    return {site: 0.4 + 0.01 * i for i, site in enumerate(sites)}


def test_heads_are_columns() -> None:
    values = heads(("last",))
    axis, _ = iia_heatmap(result(values)).axes
    assert axis.get_xlabel() == "head  (position last)" and axis.get_ylabel() == "layer  (head_output)"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["0", "2"]
    numbers = {
        (t.get_position()[0], round(t.get_position()[1])): t.get_text()
        for t in axis.texts
        if t.get_fontsize() == 10
    }
    assert numbers == {(site.heads[0], (0, 2).index(site.layer)): f"{value:.2f}" for site, value in values.items()}  # type: ignore[index]


def test_heads_at_several_positions_have_a_panel_each() -> None:
    values = heads(("amount", "last"))
    amount, last, _ = iia_heatmap(result(values)).axes
    assert [a.get_title(loc="left") for a in (amount, last)] == ["DAS 3, position amount", "DAS 3, position last"]
    assert amount.get_xlabel() == "head" and len(amount.patches) == len(last.patches) == 6
    assert texts(amount)[0] == "0.40" and texts(last)[0] == "0.41"
    # What dev chose is framed in its own panel: the last site has the highest score.
    assert not amount.lines and len(last.lines) == 1


def test_one_head_or_several_together_are_rows() -> None:
    alone, _ = iia_heatmap(result(heads(("last",), n=1))).axes
    assert alone.get_xlabel() == "position" and "heads 2" in alone.get_ylabel()
    two = result({Site("head_output", 0, "last", heads=h): 0.5 for h in ((0, 1), (2,))})
    together, _ = iia_heatmap(two).axes
    assert together.get_xlabel() == "position"


def test_many_heads_are_drawn_without_numbers(tmp_path: Path) -> None:
    values = {Site("head_output", i, "last", heads=h): 0.5 for i in range(2) for h in range(20)}
    figure: Any = iia_heatmap(result(values), path=tmp_path / "heads.png")
    assert not texts(figure.axes[0]) and len(figure.axes[0].patches) == 40
    small = "Small numbers:"
    assert small not in caption(figure) and small in caption(iia_heatmap(result(heads(("last",)))))
    check_file(tmp_path / "heads.png")


def test_model_and_twin_share_one_colour_scale(tmp_path: Path) -> None:
    figure: Any = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png")
    assert figure.axes[-1].get_ylim() == (0.64, 1.0)
    higher = result(grid([0.65, 0.42, 0.75, 0.64, 0.85, 0.75]))
    model, *_ = iia_heatmap(higher, TWIN).axes
    assert len({cell(model, 0, row) for row in range(3)}) == 3
    assert cell(model, 0, 1) == cell(model, 1, 2) == to_hex(COLOURS((0.75 - 0.64) / 0.36))


def test_cells_that_are_no_higher_than_the_highest_null_are_grey() -> None:
    """The null is the twin's highest score, a random subspace's highest draw, or a floor, whichever is highest."""
    grey = to_hex(MASKED)
    model, twin, _ = iia_heatmap(MODEL, TWIN).axes
    places = [(x, y) for y in range(3) for x in range(2)]
    assert [cell(model, *place) == grey for place in places] == [True, True, True, True, False, False]
    assert all(cell(twin, *place) == grey for place in places)
    assert "Grey: not above the highest null, 0.64 (the twin)" in caption(iia_heatmap(MODEL, TWIN))
    alone, _ = iia_heatmap(MODEL).axes
    assert not any(cell(alone, *place) == grey for place in places)
    assert "0.38 (the higher floor)" in caption(iia_heatmap(MODEL))
    draws = [
        made_fit(fit.site, RandomSubspace(3, draws=2), seed, test=0.5 + 0.14 * seed * (i == 2))
        for i, fit in enumerate(MODEL) for seed in (0, 1)
    ]  # fmt: skip
    figure: Any = iia_heatmap(made_fits([*MODEL, *draws]))
    assert "0.64 (a random subspace)" in caption(figure) and figure.axes[-1].get_ylim() == (0.64, 1)
    assert [cell(figure.axes[0], *place) == grey for place in places] == [True] * 4 + [False] * 2
    full = made_fits([*MODEL, made_fit(MODEL[0].site, FullVector(), test=0.9)])
    assert "(the higher floor)" in caption(iia_heatmap(full))  # a full vector is no null
    assert iia_heatmap(MODEL, made_fits([made_fit(f.site, DAS_3, test=1.0) for f in MODEL])).axes[-1].get_ylim() == (
        0.95, 1.0,
    )  # fmt: skip


def test_title_floors_and_caution_are_stated(tmp_path: Path) -> None:
    figure: Any = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png")
    assert "prices" in figure.get_suptitle() and "above" in figure.get_suptitle()
    told = caption(figure)
    for part in (
        "321 test pairs",
        "no intervention 0.29 (twin 0.29)",
        "constant answer 0.38",
        "standard deviation over",
    ):
        assert part in told
    assert "does not say that the model has only this one" in told
    assert "compare it with the controls and the twin" in told
    (mark,) = figure.axes[-1].lines
    assert mark.get_ydata()[0] == 0.64 == figure.axes[-1].get_ylim()[0]
    alone = caption(iia_heatmap(MODEL, None, tmp_path / "iia.png"))
    assert "no twin was searched" in alone and "and the twin" not in alone


def test_rows_of_one_picture_may_be_of_several_components(tmp_path: Path) -> None:
    sites = [Site("mlp_output", 1, "last"), Site("block_output", 1, "last"), Site("wte.output", None, "last")]
    figure: Any = iia_heatmap(result(dict.fromkeys(sites, 0.5)), None, tmp_path / "iia.png")
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == ["block_output[1]", "mlp_output[1]", "wte.output"]


def test_many_layers_lose_their_numbers_not_their_cells(tmp_path: Path) -> None:
    sites = {Site("block_output", layer, "last"): layer / 32 for layer in range(32)}
    figure: Any = iia_heatmap(result(sites), None, tmp_path / "iia.png")
    assert texts(figure.axes[0]) == [] and len(figure.axes[0].patches) == 32
    check_file(tmp_path / "iia.png")


def test_results_that_do_not_fit_a_picture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "iia.png"
    with pytest.raises(ValueError, match="its twin at"):
        iia_heatmap(MODEL, TWIN[1:], path)
    with pytest.raises(ValueError, match=r"No fit of method DAS\(rank=3"):
        iia_heatmap(MODEL, made_fits([made_fit(fit.site, PCA(3)) for fit in MODEL]), path)
    with pytest.raises(ValueError, match="No fits to draw"):
        iia_heatmap(made_fits([]), None, path)
    with pytest.raises(ValueError, match=r"by metric='log_odds': their scores on dev are \['iia'\]"):
        iia_heatmap(MODEL, None, path, metric="log_odds")
    assert not list(tmp_path.iterdir())


def comparison(labels: list[str], matrix: list[list[float]]) -> Comparison:
    n = len(labels)
    rows = tuple(tuple(row) for row in matrix)
    return Comparison(tuple(labels), (3,) * n, 16, rows, {(3, 3): Chance(0.188, 0.081, 0.317, 2000)})


def test_overlaps_are_shown_by_position_and_chance_is_marked(tmp_path: Path) -> None:
    labels = [str(Site("block_output", layer, position)) for layer in (0, 1) for position in POSITIONS]
    matrix = [[1, 0.5, 0.20, 0.5], [0.5, 1, 0.5, 0.77], [0.20, 0.5, 1, 0.5], [0.5, 0.77, 0.5, 1]]
    figure: Any = overlap_heatmap(comparison(labels, matrix), tmp_path / "overlap.png")
    check_file(tmp_path / "overlap.png")
    amount, last, bar = figure.axes
    assert "amount" in amount.get_title(loc="left") and texts(amount) == ["0.20", "chance"]
    assert "last" in last.get_title(loc="left") and texts(last) == ["0.77"]
    assert [t.get_text() for t in amount.get_xticklabels()] == ["0"]
    assert [t.get_text() for t in amount.get_yticklabels()] == ["1"]
    told = caption(figure)
    for part in ("Haar", "width 16", "rank 3", "mean 0.188", "0.081 to 0.317", "independent starts"):
        assert part in told
    assert "does not mean different mechanisms" in told
    assert any(line.get_ydata()[0] == 0.188 for line in bar.lines)


def test_overlaps_of_anything_else_are_one_matrix(tmp_path: Path) -> None:
    matrix = [[1, 0.11, 0.12], [0.11, 1, 0.63], [0.12, 0.63, 1]]
    for labels in (["seed 0", "seed 1", "seed 2"], [str(Site("block_output", 2, p)) for p in ("a", "b", "c")]):
        figure: Any = overlap_heatmap(comparison(labels, matrix), tmp_path / "overlap.png")
        panel = figure.axes[0]
        assert len(figure.axes) == 2
        assert [t for t in texts(panel) if t != "chance"] == ["0.11", "0.12", "0.63"]
        assert [t.get_text() for t in panel.get_yticklabels()] == labels[1:]
        assert cell(panel, 0, 0) == cell(panel, 0, 1) != cell(panel, 1, 1)


@pytest.mark.parametrize("n", [4, 20, 60])
def test_a_matrix_of_any_size_has_a_cell_a_pair_and_every_label(n: int, tmp_path: Path) -> None:
    fits = [made_fit(Site("block_output", i // 2, "last"), DAS_3, i % 2, test=0.9) for i in range(n)]
    found = compare(made_fits(fits), across="layer", within="seed")
    figure: Any = overlap_heatmap(found, tmp_path / "overlap.png")
    check_file(tmp_path / "overlap.png")
    levels, panel, _ = figure.axes
    assert len([p for p in panel.patches if isinstance(p, Rectangle)]) == n * (n - 1) // 2
    assert [t.get_text() for t in panel.get_yticklabels()] == list(found.labels[1:])
    numbers = [t for t in texts(panel) if t not in ("chance", "below")]
    assert len(numbers) == (n * (n - 1) // 2 if n <= 24 else 0)
    # No label lies on another one.
    figure.canvas.draw()
    for labels, side in ((panel.get_yticklabels(), "y"), (panel.get_xticklabels(), "x")):
        boxes = [label.get_window_extent() for label in labels]
        starts = [(b.y0, b.y1) if side == "y" else (b.x0, b.x1) for b in boxes]
        if n > 16:
            ordered = sorted(starts)
            assert all(a[1] <= b[0] + 1 for a, b in pairwise(ordered))
    assert found.sentence.split(";")[0] in caption(figure)
    names = [t.get_text().split("\n")[0] for t in levels.get_yticklabels()]
    assert names == ["across layers", "two seeds at one site", "random subspaces"]


def test_the_means_stand_beside_their_nulls() -> None:
    fits = [made_fit(Site("block_output", i // 3, "last"), DAS_3, i % 3, test=0.9) for i in range(6)]
    twin = made_fits([replace(fit, start=100 + i) for i, fit in enumerate(fits)])
    found = compare(made_fits(fits), across="layer", within="seed", null={"twin": twin})
    levels = found.plot().axes[0]
    means = [line.get_xdata()[0] for line in levels.lines if line.get_marker() == "o"]  # type: ignore[index]
    assert found.across is not None
    assert found.within is not None
    assert means == [found.across.mean, found.within.mean]
    bands = [(p.get_x(), p.get_x() + p.get_width()) for p in levels.patches]  # type: ignore[attr-defined]
    assert found.null is not None
    assert bands[0] == pytest.approx((found.null.low, found.null.high))
    assert bands[1] == pytest.approx((found.nulls["twin"].low, found.nulls["twin"].high))
    marks = [line for line in levels.lines if line.get_marker() == "|"]
    assert list(marks[0].get_xdata()) == list(found.across.values)  # type: ignore[arg-type]
    assert "9 pairs, 6 fits" in levels.get_yticklabels()[0].get_text()


def test_cells_of_fits_at_their_floor_are_hatched() -> None:
    fits = [made_fit(Site("block_output", i, "last"), DAS_3, test=0.3 if i == 1 else 0.9) for i in range(3)]
    figure: Any = overlap_heatmap(compare(made_fits(fits)))
    panel = figure.axes[0]
    hatched = {p.get_xy() for p in panel.patches if p.get_hatch()}
    assert hatched == {(-0.5, -0.5), (0.5, 0.5)}  # layer 1 with 0, layer 2 with 1
    assert len([t for t in texts(panel) if t not in ("chance", "below")]) == 1
    assert "Hatched: the IIA is at its floor" in caption(figure)
    assert "Hatched" not in caption(overlap_heatmap(compare(made_fits(fits[::2]))))


def test_of_many_fits_that_mostly_count_not_those_that_do_are_shown() -> None:
    fits = [made_fit(Site("block_output", i, "last"), DAS_3, test=0.9 if i < 10 else 0.3) for i in range(30)]
    figure: Any = overlap_heatmap(compare(made_fits(fits), across="layer"))
    panel = figure.axes[1]
    assert len(panel.patches) == 45 and not [p for p in panel.patches if p.get_hatch()]
    assert len(panel.get_yticklabels()) == 9 and "30 fits; those at their floor are not shown" in caption(figure)
    most = overlap_heatmap(compare(made_fits(fits[:18] + fits[20:28]), across="layer"))
    few = overlap_heatmap(compare(made_fits(fits[:20]), across="layer"))
    assert [len([p for p in one.axes[1].patches if p.get_hatch()]) for one in (most, few)] == [0, 190 - 45]


def test_a_measure_that_is_not_the_same_both_ways_has_all_its_cells() -> None:
    spans = {"small": random_subspace(16, 2, 0), "large": random_subspace(16, 6, 1)}
    panel, bar = overlap_heatmap(compare(spans, measure=containment)).axes
    assert len(panel.patches) == 4 and "in the column" in bar.get_ylabel()
    assert [t.get_text() for t in panel.get_xticklabels()] == ["small", "large"]
    far, bar = overlap_heatmap(compare(spans, measure=chordal)).axes
    assert len(far.patches) == 1 and "chordal" in bar.get_ylabel()


def test_angles_stand_in_their_band(tmp_path: Path) -> None:
    null = haar_angles(16, 3, 3)
    figure: Any = angle_spectrum({"a": (0.1, 0.5, 1.0), "b": (0.2, 0.6, 1.5)}, null, tmp_path / "angles.png")
    check_file(tmp_path / "angles.png")
    axis = figure.axes[0]
    a = next(line for line in axis.lines if line.get_label() == "a")
    assert list(a.get_ydata()) == pytest.approx([0.1 * 180 / 3.14159265, 0.5 * 180 / 3.14159265, 57.29577951])
    assert len({line.get_marker() for line in axis.lines}) == 3  # told apart in grey: the null has none
    assert axis.get_ylabel() == "degrees" and "2000 draws" in caption(figure)
    drawn = angle_spectrum({"a": (0.1, 0.5, 1.0)}, null, ax=axis)
    assert drawn is figure
    whole = new_figure((6, 4), "two beside each other")
    halves: Any = whole.subfigures(1, 2)
    part = halves[1].subfigures(2, 1)[0]
    assert angle_spectrum({"a": (0.1, 0.5, 1.0)}, null, ax=part.subplots()) is whole
    with pytest.raises(ValueError, match=r"The null has 3 angles; these pairs have others: \{'a': 2\}"):
        angle_spectrum({"a": (0.1, 0.5)}, null)
    with pytest.raises(ValueError, match="No angles"):
        angle_spectrum({}, null)


def test_one_subspace_alone_is_said_to_be_alone(tmp_path: Path) -> None:
    figure: Any = overlap_heatmap(
        compare({"block_output[1]@last": random_subspace(8, 2, 0)}), tmp_path / "overlap.png"
    )
    assert "nothing to compare" in texts(figure.axes[0])[0]
    check_file(tmp_path / "overlap.png")


def test_a_failing_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "iia.png"
    path.write_bytes(b"old")

    def fail(self: Any, target: Any, **options: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        iia_heatmap(MODEL, None, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_drawing_changes_no_result(tmp_path: Path) -> None:
    before = torch.get_rng_state(), MODEL.as_dict()
    iia_heatmap(MODEL, TWIN, tmp_path / "iia.png")
    assert torch.equal(before[0], torch.get_rng_state()) and MODEL.as_dict() == before[1]
