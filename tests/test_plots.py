"""Pictures show what the results hold, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from subspace_lab.analysis.geometry import Chance, Comparison, compare
from subspace_lab.analysis.plots import iia_heatmap, overlap_heatmap
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.das.metrics import Estimate
from subspace_lab.das.search import Found, SearchResult

POSITIONS = ("amount", "last")


def estimate(value: float) -> Estimate:
    return Estimate(value, round(max(0.0, value - 0.03), 2), round(min(1.0, value + 0.02), 2), 321)


def result(values: dict[Site, float], accuracy: float = 0.97) -> SearchResult:
    found = [
        Found(
            site=site, rank=3, seed=0, learning_rate=0.01, iia=estimate(value), train_iia=estimate(value),
            full_vector=None, random_subspace=estimate(0.31 + i / 100), start_overlap=0.5, loss=1.0,
            subspaces={"above": random_subspace(16, 3, i)},
        )
        for i, (site, value) in enumerate(values.items())
    ]  # fmt: skip
    return SearchResult(tuple(found), estimate(accuracy), estimate(0.29), estimate(0.38), "plain run")


def grid(values: list[float], component: str = "block_output") -> dict[Site, float]:
    sites = [Site(component, layer, position) for layer in (0, 3, 7) for position in POSITIONS]
    return dict(zip(sites, values, strict=True))


MODEL = result(grid([0.41, 0.42, 0.53, 0.64, 0.85, 0.96]))
TWIN = result(grid([0.30, 0.33, 0.34, 0.35, 0.36, 0.64]), accuracy=0.21)


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def cell(axis, column: int, row: int) -> str:
    """The colour at a place, as hexadecimal."""
    for patch in axis.patches:
        if isinstance(patch, Rectangle) and patch.get_xy() == (column - 0.5, row - 0.5):
            return to_hex(patch.get_facecolor())
    raise AssertionError(f"no cell at {column}, {row}")


def caption(figure: Figure) -> str:
    return " ".join(figure._supxlabel.get_text().split())  # type: ignore[union-attr]


def check_file(path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    height, width, _ = imread(path).shape
    assert width > 600 and height > 250
    assert imread(path)[..., :3].std() > 0.05  # something is drawn
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left aside


def test_without_a_path_a_picture_is_what_a_notebook_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    matrix = [[1.0, 0.4], [0.4, 1.0]]
    labels = ["block_output[0]@last", "block_output[1]@last"]
    for figure in (iia_heatmap(MODEL, task="prices"), overlap_heatmap(comparison(labels, matrix))):
        assert not list(tmp_path.iterdir())
        figure._ipython_display_()
        picture = shown.pop()
        assert picture.alt == figure.get_suptitle() and 600 <= picture.width <= 1000
        (tmp_path / "shown.png").write_bytes(picture.data)
        check_file(tmp_path / "shown.png")
        (tmp_path / "shown.png").unlink()
    assert len(iia_heatmap(MODEL, task="prices").axes) == 2  # no twin: one panel and its colours


def test_what_a_search_found_is_compared_with_its_own_starts():
    found = {str(one.site): one for one in MODEL.found}
    plain = {label: one.subspace() for label, one in found.items()}
    assert compare(found) == compare(plain)
    assert len({one.start for one in MODEL.found}) == len(found)
    beside = compare({**found, "random": random_subspace(16, 3, 99)})
    assert beside.labels[-1] == "random" and beside.matrix[0][:6] == compare(found).matrix[0]
    again = replace(MODEL.found[0], rank=2, subspaces={"above": random_subspace(16, 2, 8)})
    with pytest.raises(ValueError, match=r"one start.*'again'.*same_start_allowed"):
        compare({**found, "again": again})
    with pytest.raises(ValueError, match=r"No seed given for \['random'\]"):
        compare({**found, "random": random_subspace(16, 3, 99)}, {})


def test_iia_and_its_interval_stand_in_their_cells(tmp_path):
    figure = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png", task="prices")
    check_file(tmp_path / "iia.png")
    model, twin, _ = figure.axes
    for axis, shown in ((model, MODEL), (twin, TWIN)):
        told = {(round(t.get_position()[0]), round(t.get_position()[1]), t.get_text()) for t in axis.texts}
        expected = set()
        for one in shown.found:
            place = POSITIONS.index(one.site.positions), (0, 3, 7).index(one.site.layer)
            expected |= {(*place, f"{one.iia.value:.2f}"), (*place, f"{one.iia.low:.2f}–{one.iia.high:.2f}")}
        assert told == expected
        assert [t.get_text() for t in axis.get_xticklabels()] == list(POSITIONS)
        assert axis.get_xlabel() == "position"
    assert [t.get_text() for t in model.get_yticklabels()] == ["0", "3", "7"]
    assert "layer" in model.get_ylabel() and "block_output" in model.get_ylabel()
    assert "0.97" in model.get_title(loc="left")
    assert "twin" in twin.get_title(loc="left") and "0.21" in twin.get_title(loc="left")


def test_model_and_twin_share_one_colour_scale(tmp_path):
    figure = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png", task="prices")
    model, twin, bar = figure.axes
    assert cell(model, 1, 1) == cell(twin, 1, 2)  # 0.64 in both
    assert len({cell(model, 0, row) for row in range(3)}) == 3
    assert bar.get_ylim() == (0.38, 1.0)


def test_title_floors_and_caution_are_stated(tmp_path):
    figure = iia_heatmap(MODEL, TWIN, tmp_path / "iia.png", task="prices")
    assert "prices" in figure.get_suptitle() and "above" in figure.get_suptitle()
    told = caption(figure)
    for part in ("Rank 3", "321 held-out pairs", "no intervention 0.29", "constant answer 0.38", "0.31 to 0.36"):
        assert part in told
    assert "does not say that the model has only this one" in told and "see the twin" in told
    (mark,) = figure.axes[-1].lines
    assert mark.get_ydata()[0] == 0.38 == figure.axes[-1].get_ylim()[0]
    assert cell(figure.axes[1], 0, 0) == cell(figure.axes[1], 0, 2)  # 0.30 and 0.36, both below the floor
    alone = caption(iia_heatmap(MODEL, None, tmp_path / "iia.png", task="prices"))
    assert "no twin was searched" in alone and "see the twin" not in alone


def test_rows_of_one_picture_may_be_of_several_components(tmp_path):
    sites = [Site("mlp_output", 1, "last"), Site("block_output", 1, "last"), Site("wte.output", None, "last")]
    figure = iia_heatmap(result(dict.fromkeys(sites, 0.5)), None, tmp_path / "iia.png", task="t")
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert sorted(labels) == ["block_output[1]", "mlp_output[1]", "wte.output"]


def test_many_layers_lose_their_numbers_not_their_cells(tmp_path):
    sites = {Site("block_output", layer, "last"): layer / 32 for layer in range(32)}
    figure = iia_heatmap(result(sites), None, tmp_path / "iia.png", task="t")
    assert texts(figure.axes[0]) == [] and len(figure.axes[0].patches) == 32
    check_file(tmp_path / "iia.png")


def test_results_that_do_not_fit_a_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twin at"):
        iia_heatmap(MODEL, replace(TWIN, found=TWIN.found[1:]), tmp_path / "iia.png", task="t")
    with pytest.raises(ValueError, match="12 results for 6 sites"):
        iia_heatmap(replace(MODEL, found=MODEL.found * 2), None, tmp_path / "iia.png", task="t")
    assert not list(tmp_path.iterdir())


def comparison(labels: list[str], matrix: list[list[float]]) -> Comparison:
    n = len(labels)
    rows = tuple(tuple(row) for row in matrix)
    return Comparison(tuple(labels), (3,) * n, 16, rows, {(3, 3): Chance(0.188, 0.081, 0.317, 2000)})


def test_overlaps_are_shown_by_position_and_chance_is_marked(tmp_path):
    labels = [str(Site("block_output", layer, position)) for layer in (0, 1) for position in POSITIONS]
    matrix = [[1, 0.5, 0.20, 0.5], [0.5, 1, 0.5, 0.77], [0.20, 0.5, 1, 0.5], [0.5, 0.77, 0.5, 1]]
    figure = overlap_heatmap(comparison(labels, matrix), tmp_path / "overlap.png")
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


def test_overlaps_of_anything_else_are_one_matrix(tmp_path):
    matrix = [[1, 0.11, 0.12], [0.11, 1, 0.63], [0.12, 0.63, 1]]
    for labels in (["seed 0", "seed 1", "seed 2"], [str(Site("block_output", 2, p)) for p in ("a", "b", "c")]):
        figure = overlap_heatmap(comparison(labels, matrix), tmp_path / "overlap.png")
        panel = figure.axes[0]
        assert len(figure.axes) == 2
        assert [t for t in texts(panel) if t != "chance"] == ["0.11", "0.12", "0.63"]
        assert [t.get_text() for t in panel.get_yticklabels()] == labels[1:]
        assert cell(panel, 0, 0) == cell(panel, 0, 1) != cell(panel, 1, 1)


def test_one_subspace_alone_is_said_to_be_alone(tmp_path):
    figure = overlap_heatmap(compare({"block_output[1]@last": random_subspace(8, 2, 0)}), tmp_path / "overlap.png")
    assert "nothing to compare" in texts(figure.axes[0])[0]
    check_file(tmp_path / "overlap.png")


def test_a_failing_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "iia.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        iia_heatmap(MODEL, None, path, task="t")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_drawing_changes_no_result(tmp_path):
    before = torch.get_rng_state(), MODEL.as_dict()
    iia_heatmap(MODEL, TWIN, tmp_path / "iia.png", task="t")
    assert torch.equal(before[0], torch.get_rng_state()) and MODEL.as_dict() == before[1]
