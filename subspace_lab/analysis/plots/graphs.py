"""A causal model as a picture: inputs below, the output above."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from subspace_lab.analysis.plots.canvas import ACCENT, GREY, INK, check_picture, new_figure, save_figure
from subspace_lab.das.causal_models import CausalModel

HEIGHT, GAP, RISE, DOUBLE = (
    0.34,
    0.32,
    0.95,
    0.05,
)  # inches: the height of a box, between boxes, from layer to layer, between the two lines of a double frame
CHARACTER, MARGIN = 0.088, 0.26  # inches: the width of a character in a box, of the space around the name
ARRIVAL = 0.14  # inches between two arrows that end at one box
PASSING = 0.2  # inches that an arrow needs between two boxes
SWEEPS = 8  # passes up and down through the layers; in small graphs the order no longer changes after two or three

Node = tuple[str, int]
"""(name, layer) of a variable, or of a place that is left free for an arrow that passes through the layer."""


def plot_causal_model(model: CausalModel, variables: Sequence[str] = (), path: str | Path | None = None) -> Figure:
    """The graph of a causal model: each variable above its parents, an arrow from each parent to it.

    Args:
        variables: the variables that are searched for; they are shown in colour.
        path: where to write a PNG; None: the figure is only returned, and a notebook shows it.

    Raises:
        ValueError: a variable that the model does not have.
    """
    check_picture(path)
    names = [*model.inputs, *model.variables]
    if unknown := [name for name in variables if name not in names]:
        raise ValueError(f"unknown variables {unknown}; possible are {names}")
    layers, links = _layered(model)
    centres = _places(layers, links)
    width = max(x + _width(node, layers) / 2 for node, (x, _) in centres.items()) + 0.1
    height = (len(layers) - 1) * RISE + HEIGHT + DOUBLE + 0.1
    searched = f"In colour: searched for ({', '.join(variables)}). " if variables else ""
    figure = new_figure(
        (width + 0.3, height + 0.7),
        f"Causal model of {model.output}",
        f"Inputs below (no frame), the output above (double frame). {searched}An arrow leads from a parent to the "
        "variable whose mechanism reads it.",
    )
    axis = figure.add_subplot()
    room = figure.get_size_inches()[0] - 0.3
    axis.set_xlim(
        (width - room) / 2, (width + room) / 2
    )  # one unit is one inch; otherwise the boxes would not fit their text
    axis.set_ylim(-HEIGHT / 2 - 0.05, (len(layers) - 1) * RISE + HEIGHT / 2 + DOUBLE + 0.05)
    axis.set_aspect("equal")
    axis.axis("off")
    for chain in links:
        points = [centres[node] for node in chain]
        together = sorted(centres[other[-2]][0] for other in links if other[-1] == chain[-1])
        # Arrows end side by side, in the order in which they start.
        shift = (together.index(points[-2][0]) - (len(together) - 1) / 2) * ARRIVAL
        edge = DOUBLE if chain[-1][0] == model.output else 0.0
        points[-1] = (points[-1][0] + shift, points[-1][1] - edge)
        _arrow(axis, points, chain[0][0] in variables)
    for name in names:
        x, y = centres[_node(name, layers)]
        _box(axis, x, y, name, name in variables, name in model.inputs, name == model.output)
    save_figure(figure, path)
    return figure


def _layered(model: CausalModel) -> tuple[list[list[Node]], list[list[Node]]]:
    """The nodes of each layer, from the lowest layer up, and each arrow as the list of nodes that it passes."""
    depth = dict.fromkeys(model.inputs, 0)
    for name, parents in model.parents.items():
        depth[name] = 1 + max((depth[parent] for parent in parents), default=0)
    others = [at for name, at in depth.items() if name != model.output]
    depth[model.output] = max([depth[model.output], *(at + 1 for at in others)])
    layers: list[list[Node]] = [[] for _ in range(max(depth.values()) + 1)]
    for name, at in depth.items():
        layers[at].append((name, at))
    links = []
    for child, parents in model.parents.items():
        for parent in parents:
            between = [(f"{parent} to {child}", at) for at in range(depth[parent] + 1, depth[child])]
            for node in between:
                layers[node[1]].append(node)
            links.append([(parent, depth[parent]), *between, (child, depth[child])])
    return [layer for layer in layers if layer], links


def _places(layers: list[list[Node]], links: list[list[Node]]) -> dict[Node, tuple[float, float]]:
    """The centre of each node, in inches; layers are ordered so that few arrows cross (Sugiyama et al. 1981)."""
    near: dict[Node, list[Node]] = {node: [] for layer in layers for node in layer}
    for chain in links:
        for below, above in pairwise(chain):
            near[below].append(above)
            near[above].append(below)
    centres: dict[Node, tuple[float, float]] = {}
    widest = max(_extent(layer, layers) for layer in layers)
    for row, layer in enumerate(layers):
        _spread(layer, layers, row, widest, centres)
    for sweep in range(SWEEPS):
        rows = range(len(layers))
        for row in rows if sweep % 2 == 0 else reversed(rows):
            looked_at = row - 1 if sweep % 2 == 0 else row + 1
            mean = {}
            for node in layers[row]:
                xs = [centres[other][0] for other in near[node] if _row(other, layers) == looked_at]
                mean[node] = sum(xs) / len(xs) if xs else centres[node][0]
            layers[row].sort(key=lambda node, mean=mean: mean[node])  # type: ignore[misc]
            _spread(layers[row], layers, row, widest, centres)
    return centres


def _spread(
    layer: list[Node],
    layers: list[list[Node]],
    row: int,
    widest: float,
    centres: dict[Node, tuple[float, float]],
) -> None:
    """Put the nodes of a layer side by side in their order, evenly over the width of the widest layer."""
    gap = GAP + (widest - _extent(layer, layers)) / (len(layer) + 1)
    x = gap - GAP
    for node in layer:
        width = _width(node, layers)
        centres[node] = (x + width / 2, row * RISE)
        x += width + gap


def _extent(layer: list[Node], layers: list[list[Node]]) -> float:
    return sum(_width(node, layers) for node in layer) + GAP * (len(layer) - 1)


def _width(node: Node, layers: list[list[Node]]) -> float:
    return PASSING if " to " in node[0] else len(node[0]) * CHARACTER + MARGIN


def _row(node: Node, layers: list[list[Node]]) -> int:
    return next(row for row, layer in enumerate(layers) if node in layer)


def _node(name: str, layers: list[list[Node]]) -> Node:
    return next(node for layer in layers for node in layer if node[0] == name)


def _arrow(axis: Axes, points: Sequence[tuple[float, float]], searched: bool) -> None:
    """From the upper edge of a box to the lower edge of another, through the places left free for it."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ys[0], ys[-1] = ys[0] + HEIGHT / 2 + 0.02, ys[-1] - HEIGHT / 2 - 0.04
    corners, codes = [(xs[0], ys[0])], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        middle = (y0 + y1) / 2
        corners += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    axis.add_patch(
        FancyArrowPatch(
            path=Curve(corners, codes),
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=1.5 if searched else 1.0,
            color=ACCENT if searched else GREY,
            zorder=1,
        )
    )


def _box(axis: Axes, x: float, y: float, name: str, searched: bool, is_input: bool, is_output: bool) -> None:
    width = len(name) * CHARACTER + MARGIN
    frames = [0.0, DOUBLE] if is_output else [0.0]
    for out in reversed(frames):
        axis.add_patch(
            FancyBboxPatch(
                (x - width / 2 - out, y - HEIGHT / 2 - out),
                width + 2 * out,
                HEIGHT + 2 * out,
                boxstyle="round,pad=0,rounding_size=0.09",
                facecolor=ACCENT if searched and not out else "#f4f2ec" if is_input else "white",
                edgecolor="none" if is_input else ACCENT if searched else INK,
                linewidth=1.1,
                zorder=2,
            )
        )
    axis.text(
        x, y, name, ha="center", va="center", fontsize=9, color="white" if searched else INK, zorder=3,
        weight="bold" if searched else "normal",
    )  # fmt: skip
