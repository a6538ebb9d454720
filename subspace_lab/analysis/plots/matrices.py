"""Pictures of comparisons: the matrix of a measure, its means with their nulls, and spectra of angles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from subspace_lab.analysis.geometry import AngleBand, Chance
from subspace_lab.analysis.plots.canvas import (
    ACCENT,
    GREY,
    INK,
    check_picture,
    new_figure,
    save_figure,
    whole_figure,
)
from subspace_lab.analysis.plots.cells import COLOURS, MOST_NUMBERS, cell, finish, frame, ink, write
from subspace_lab.analysis.plots.grids import Grid
from subspace_lab.core.sites import Site

SMALL_NUMBERS = 24  # subspaces, at most, for which small numbers in the cells can be read
PALE = (0.945, 0.945, 0.945, 1.0)
MASKED: dict[str, Any] = {"facecolor": "#fafafa", "edgecolor": "#c4c4c4", "hatch": "/////", "linewidth": 0}
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

CAUTION = (
    "The subspaces were trained from independent starts. A low overlap at high IIA does not mean different mechanisms, "
    "because the data do not determine the span. If the IIA is at its floor, an overlap means nothing."
)
FORMULAS = {
    "overlap": "overlap  tr(P₁P₂) / min(k₁, k₂)",
    "containment": "containment of the row in the column  tr(P₁P₂) / k₁",
    "chordal": "chordal distance  (Σ sin² θ)^½",
    "geodesic": "geodesic distance  (Σ θ²)^½, radians",
}


@runtime_checkable
class Matrix(Protocol):
    """What is drawn: a `Comparison`."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def width(self) -> int: ...
    @property
    def matrix(self) -> tuple[tuple[float, ...], ...]: ...
    @property
    def chance(self) -> Mapping[tuple[int, int], Chance]: ...
    @property
    def measure(self) -> str: ...
    @property
    def counts(self) -> tuple[bool, ...]: ...
    @property
    def facets(self) -> tuple[str | None, str | None]: ...
    @property
    def across(self) -> Any: ...
    @property
    def within(self) -> Any: ...
    @property
    def null(self) -> Chance | None: ...
    @property
    def nulls(self) -> Mapping[str, Chance]: ...
    @property
    def sentence(self) -> str: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def distance(self) -> bool: ...

    def chance_of(self, i: int, j: int) -> Chance: ...
    def within_chance(self, i: int, j: int) -> bool: ...


def overlap_heatmap(comparison: Matrix, path: str | Path | None = None) -> Figure:
    """The measure of each subspace with each other one; beside it the means with their nulls, if there are means.

    A symmetric measure is drawn as a triangle. If the labels are sites and every position has several layers, there
    is one panel for each position, layer against layer; otherwise there is one matrix for all. Cells inside the 95 %
    band of random subspaces are pale and marked. Cells of fits at their floor are hatched and count in no mean. If
    there are many fits and most of them are at their floor, these are not shown.

    Args:
        comparison: from `compare`.
        path: where to write a PNG; None: the figure is only returned, and a notebook shows it.

    Raises:
        TypeError: fits that were not compared yet.
        ValueError, FileNotFoundError: a path that does not end in .png, or whose folder does not exist.
    """
    if not isinstance(comparison, Matrix):
        raise TypeError(
            f"overlap_heatmap draws the result of compare(fits); found {type(comparison).__name__}. Write "
            "overlap_heatmap(compare(fits))."
        )
    check_picture(path)
    shown = list(range(len(comparison.labels)))
    if len(shown) > SMALL_NUMBERS and 2 * sum(comparison.counts) < len(shown) and sum(comparison.counts) > 1:
        shown = [i for i in shown if comparison.counts[i]]
    compared, panels = _panels([comparison.labels[i] for i in shown])
    panels = {name: ([shown[i] for i in members], ticks) for name, (members, ticks) in panels.items()}
    most = max(len(members) for members, _ in panels.values())
    each = 0.6 if most <= MOST_NUMBERS else 0.4 if most <= SMALL_NUMBERS else 0.2 if most <= 40 else 0.165
    size = max(1, most - (1 if comparison.symmetric else 0)) * each + 0.6
    down = -(-len(panels) // max(1, int(11 / size)))
    across = -(-len(panels) // down)
    has_means = comparison.across is not None
    height = max(down * size + 1.1, 2.6 if has_means else 0)
    what = f"{comparison.measure[:1].upper()}{comparison.measure[1:]}"
    floors = " Hatched: the IIA is at its floor, not counted." if not all(comparison.counts) else ""
    if len(shown) < len(comparison.labels):
        floors = f" There are {len(comparison.labels)} fits; those at their floor are not shown."
    bands = "; ".join(_band(ranks, chance) for ranks, chance in comparison.chance.items())
    figure = new_figure(
        (across * size + 1.9 + (4.2 if has_means else 0), height),
        f"{what} of the subspaces found{f', {compared}' if compared else ''}",
        *([comparison.sentence] if has_means else []),
        f"Independent random (Haar) subspaces of a stream of width {comparison.width}: {bands} (marked on the "
        "colour bar). Cells in the band or below it are pale. By chance, 1 of 20 random pairs is outside the band."
        f"{floors}",
        CAUTION,
    )
    upper: FigureBase = figure
    if has_means:
        upper, right = figure.subfigures(1, 2, width_ratios=[across * size + 1.9, 4.2], squeeze=False)[0]
        # Its height depends on its own lines, not on the height of the matrix.
        lines = 2 + len(comparison.nulls) + (comparison.within is not None)
        high = min(0.75 * lines + 0.6, height)
        rest = max(height - high, 1e-3)
        draw_levels(comparison, right.add_subplot(right.add_gridspec(2, 1, height_ratios=[high, rest])[0]))
    axes = upper.subplots(down, across, squeeze=False).flatten()
    scale = _scale(comparison)
    for axis, (name, (members, ticks)) in zip(axes, panels.items(), strict=False):
        _draw(axis, comparison, members, ticks, scale, most)
        axis.set_title(name, fontsize=9.5, color=INK, loc="left")
        axis.set_xlabel("layer" if compared else "", fontsize=9, color=INK)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    bar = upper.colorbar(ScalarMappable(scale, COLOURS), ax=list(axes), aspect=16 * down, pad=0.02)
    finish(bar, FORMULAS.get(comparison.measure, comparison.measure))
    for chance in comparison.chance.values():
        bar.ax.axhspan(chance.low, chance.high, facecolor="none", edgecolor=ACCENT, linewidth=1.2)
        bar.ax.axhline(chance.mean, color=ACCENT, linewidth=1.2)
    save_figure(figure, path)
    return figure


def draw_levels(comparison: Matrix, axis: Axes) -> None:
    """The means across and within, with their 95 % intervals and every pair; below them the bands of the nulls."""
    what, yardstick = comparison.facets
    levels = [(f"across {what}s", comparison.across), (f"two {yardstick}s at one site", comparison.within)]
    levels = [(name, level) for name, level in levels if level is not None]
    nulls = [*([("random subspaces", comparison.null)] if comparison.null else []), *comparison.nulls.items()]
    names = []
    for y, (name, level) in enumerate(levels):
        axis.plot(level.values, [y - 0.24] * len(level.values), "|", color=GREY, markersize=7, alpha=0.7)
        if level.low is not None:
            axis.plot([level.low, level.high], [y, y], color=INK, linewidth=2.2, solid_capstyle="butt")
        axis.plot([level.mean], [y], "o", color=INK, markersize=6)
        axis.annotate(f"{level.mean:.2f}", (level.mean, y), (0, -12), textcoords="offset points", fontsize=8,
                      color=INK, ha="center")  # fmt: skip
        names.append(f"{name}\n{level.pairs} pairs, {level.fits} fits")
    for y, (name, chance) in enumerate(nulls, len(levels)):
        axis.add_patch(
            Rectangle((chance.low, y - 0.17), chance.high - chance.low, 0.34, facecolor="#e3e3e3", edgecolor=GREY,
                      linewidth=0.8)
        )  # fmt: skip
        axis.plot([chance.mean, chance.mean], [y - 0.17, y + 0.17], color=ACCENT, linewidth=1.6)
        names.append(f"{name}\n{chance.draws} pairs")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(comparison.measure, fontsize=9, color=INK)
    explained = "mean, 95 % interval; nulls: mean, 95 % of pairs\n(of fewer than 19 pairs: lowest to highest)"
    axis.set_title(explained, fontsize=8, color=INK, loc="left")
    axis.tick_params(length=2, colors=INK, labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0), high)


def angle_spectrum(
    angles: Mapping[str, Sequence[float]],
    null: AngleBand,
    path: str | Path | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Principal angles of pairs of subspaces in degrees, ascending, with those of random subspaces.

    Args:
        angles: {name of a pair: its `principal_angles`, in radians}; each pair has the ranks of the null.
        null: from `haar_angles`.
        ax: the axis to draw on; None makes a new figure.

    Raises:
        ValueError: nothing to draw, or a number of angles that is not that of the null.
    """
    check_picture(path)
    if not angles:
        raise ValueError("No angles to draw.")
    wrong = {name: len(of) for name, of in angles.items() if len(of) != len(null.mean)}
    if wrong:
        raise ValueError(f"The null has {len(null.mean)} angles; these pairs have others: {wrong}.")
    if ax is None:
        figure = new_figure(
            (6.4, 3.6),
            "Principal angles",
            f"Grey: independent random (Haar) subspaces, mean and 95 % band of each angle, {null.draws} draws. A small "
            "first angle alone is not a finding, because random subspaces have small ones too. 0°: a direction that "
            "both have; 90°: orthogonal directions.",
        )
        ax = figure.subplots()
    else:
        figure = whole_figure(ax)
    numbers = list(range(1, len(null.mean) + 1))
    low, mean, high = ([_degrees(angle) for angle in of] for of in (null.low, null.mean, null.high))
    ax.fill_between(numbers, low, high, color="#dedede", linewidth=0, label="random subspaces")
    ax.plot(numbers, mean, color=GREY, linewidth=1, linestyle="--")
    for k, (name, of) in enumerate(angles.items()):
        shade = COLOURS(0.95 - 0.55 * k / max(1, len(angles) - 1))
        ax.plot(
            numbers, [_degrees(float(angle)) for angle in of], marker=MARKS[k % len(MARKS)], markersize=4.5,
            linewidth=1.2, color=shade, label=name,
        )  # fmt: skip
    ax.set_ylim(0, 93)
    ax.set_yticks(range(0, 91, 15))
    ax.set_xticks(numbers if len(numbers) <= 20 else numbers[:: len(numbers) // 10])
    ax.set_xlabel("principal angle, from the smallest", fontsize=9, color=INK)
    ax.set_ylabel("degrees", fontsize=9, color=INK)
    ax.tick_params(length=2, colors=INK, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="lower right")
    save_figure(figure, path)
    return figure


def _degrees(radians: float) -> float:
    return radians * 180 / 3.141592653589793


def _scale(comparison: Matrix) -> Normalize:
    """0 to 1 for shares; otherwise from 0, or from the lowest value if that is negative, to the largest."""
    values = [value for row in comparison.matrix for value in row]
    least, most = min(values), max(values)
    if least >= -1e-9 and most <= 1 + 1e-9:
        return Normalize(0, 1)
    return Normalize(min(0.0, least), most)


def _draw(
    axis: Axes, comparison: Matrix, members: Sequence[int], ticks: Sequence[str], scale: Normalize, most: int
) -> None:
    """One panel; for a symmetric measure only the triangle below the diagonal."""
    if len(members) == 1:
        axis.axis("off")
        axis.text(0, 0.5, f"Only {ticks[0]}:\nnothing to compare it with", fontsize=9, color=INK, va="center")
        return
    triangle = comparison.symmetric
    rows, columns = (members[1:], members[:-1]) if triangle else (members, members)
    frame(axis, ticks[:-1] if triangle else ticks, ticks[1:] if triangle else ticks)
    axis.invert_yaxis()
    if most > MOST_NUMBERS:
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
        for label in axis.get_xticklabels():
            label.set(ha="center", rotation_mode="default")
    large = most <= MOST_NUMBERS
    for row, i in enumerate(rows):
        for column, j in enumerate(columns[: row + 1] if triangle else columns):
            value = comparison.matrix[i][j]
            if not (comparison.counts[i] and comparison.counts[j]):
                axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **MASKED))
                continue
            chance = i != j and comparison.within_chance(i, j)
            mean = comparison.chance_of(i, j).mean
            beyond = (value > mean) if comparison.distance else (value < mean)
            pale = i != j and (chance or beyond)
            colour = PALE if pale else COLOURS(scale(value))
            cell(axis, column, row, colour)
            if most <= SMALL_NUMBERS:
                shift = 0.08 * pale if large else 0.0
                write(
                    axis, column, row - shift, f"{value:.2f}", GREY if pale else ink(colour), 9 if large else 6.5
                )
            if large and pale:
                write(
                    axis,
                    column,
                    row + 0.24,
                    "chance" if chance else "above" if comparison.distance else "below",
                    GREY,
                    6.5,
                )


def _panels(labels: Sequence[str]) -> tuple[str, dict[str, tuple[list[int], list[str]]]]:
    """(what is compared, {title of a panel: (the indices of its subspaces, their labels)})."""
    whole = "", {"": (list(range(len(labels))), list(labels))}
    try:
        sites = [Site.parse(label) for label in labels]
    except ValueError:
        return whole
    grid = Grid.of(sites)
    axis, names = grid.names()
    panels = {}
    for column, position in enumerate(grid.columns):
        rows = {grid.cell(site)[0]: i for i, site in enumerate(sites) if grid.cell(site)[1] == column}
        panels[f"position {position}"] = ([rows[r] for r in sorted(rows)], [names[r] for r in sorted(rows)])
    if min(len(members) for members, _ in panels.values()) < 2:
        return whole
    return (f"{axis.replace('  ', ' ')} against layer" if axis else ""), panels


def _band(ranks: tuple[int, int], chance: Chance) -> str:
    which = f"rank {ranks[0]}" if ranks[0] == ranks[1] else f"ranks {ranks[0]} and {ranks[1]}"
    return f"{which}, mean {chance.mean:.3f}, 95 % band {chance.low:.3f} to {chance.high:.3f}"
