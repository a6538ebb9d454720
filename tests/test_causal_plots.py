"""The picture of a causal model shows its graph: every variable above its parents, an arrow for every parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from subspace_lab.analysis.plots import plot_causal_model
from subspace_lab.analysis.plots.canvas import ACCENT
from subspace_lab.das.causal_models import CausalModel

PRICES = CausalModel(
    {
        "above": lambda lower, amount: lower <= amount,
        "below": lambda amount, upper: amount <= upper,
        "answer": lambda above, below, upper: above & below,
    }
)


def places(figure: Figure) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in figure.axes[0].findobj(Text) if text.get_text()}


def boxes(figure: Figure) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def arrows(figure: Figure) -> list[Any]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]


def test_every_variable_stands_above_its_parents_and_the_output_on_top() -> None:
    for model in (PRICES, CausalModel({"y": lambda x: x, "z": lambda y: y, "w": lambda x: x}, output="w")):
        where = places(plot_causal_model(model))
        assert set(where) == {*model.inputs, *model.variables}
        for child, parents in model.parents.items():
            assert all(where[parent][1] < where[child][1] for parent in parents)
        assert [n for n, (_, y) in where.items() if y == max(y for _, y in where.values())] == [model.output]
        assert {n for n, (_, y) in where.items() if y == 0} == set(model.inputs)


def test_there_is_an_arrow_for_every_parent_and_it_ends_at_its_boxes() -> None:
    figure: Any = plot_causal_model(PRICES)
    where, found = places(figure), arrows(figure)
    wanted = [(parent, child) for child, parents in PRICES.parents.items() for parent in parents]
    assert len(found) == len(wanted) == 7
    for arrow, (parent, child) in zip(found, wanted, strict=True):
        (x0, y0), *_, (x1, y1) = arrow._path_original.vertices
        assert x0 == where[parent][0] and abs(x1 - where[child][0]) < 0.3
        assert 0 < y0 - where[parent][1] < 0.25 and 0 < where[child][1] - y1 < 0.3
    # Arrows into one box end at different points, in the order in which they come.
    ends = {tuple(arrow._path_original.vertices[-1]) for arrow in found}
    assert len(ends) == len(found)


def test_boxes_do_not_overlap_and_no_arrow_crosses_a_box_of_its_layer() -> None:
    figure: Any = plot_causal_model(PRICES)
    spans = [(b.get_y(), b.get_x(), b.get_x() + b.get_width()) for b in boxes(figure)[:-2]]
    for y, left, right in spans:
        assert not [
            1 for other, a, b in spans if other == y and (a, b) != (left, right) and a < right and b > left
        ]
    # "upper" goes to the output past the layer of "above" and "below", not through one of them.
    last: Any = arrows(figure)[-1]
    points = last._path_original.vertices
    layer = places(figure)["above"][1]
    (x,) = {px for px, py in points if py == layer}
    assert all(not left < x < right for y, left, right in spans if y < layer < y + 0.5)


def test_what_is_searched_for_is_in_colour_and_named() -> None:
    figure: Any = plot_causal_model(PRICES, ["above"])
    coloured = [box for box in boxes(figure) if to_hex(box.get_facecolor()) == ACCENT]
    (box,) = coloured
    x, y = places(figure)["above"]
    assert box.get_x() < x < box.get_x() + box.get_width() and box.get_y() < y < box.get_y() + box.get_height()
    assert "searched for (above)" in " ".join(figure._supxlabel.get_text().split())
    plain: Any = plot_causal_model(PRICES)
    assert "searched" not in plain._supxlabel.get_text()
    assert [to_hex(a.get_edgecolor()) == ACCENT for a in arrows(figure)].count(True) == 1


def test_it_is_written_and_an_unknown_variable_is_refused(tmp_path: Path) -> None:
    plot_causal_model(PRICES, path=tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        ValueError, match=r"unknown variables \['price'\]; possible are \['lower', 'amount', 'upper'"
    ):
        plot_causal_model(PRICES, ["price"])
