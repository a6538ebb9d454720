"""Heat maps of scores. Nothing is computed here: every number is read from the result.

The text under each picture says what the picture can and cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from subspace_lab.analysis.plots.canvas import ACCENT, GREY, INK, check_picture, new_figure, save_figure
from subspace_lab.analysis.plots.cells import COLOURS, MOST_NUMBERS, cell, finish, frame, ink, write
from subspace_lab.analysis.plots.grids import Grid
from subspace_lab.core.arguments import instance
from subspace_lab.core.sites import Site
from subspace_lab.core.texts import two_decimals
from subspace_lab.das.fits import Fits, Mean
from subspace_lab.das.methods import RandomSubspace
from subspace_lab.das.screens import Screened

SIGNED = LinearSegmentedColormap.from_list(
    "subspace_lab_signed", ["#7a3510", "#c26a35", "#e6bd98", "#f4f2ec", "#8fb3bd", "#4f82a0", "#1b2f52"]
)
MASKED = (0.89, 0.89, 0.89, 1.0)  # grey: a cell that is no higher than the highest null

# How a cell without a score looks. It is grey: the colours of the scores contain no grey.
_SCREENED: dict[str, Any] = {"facecolor": "#fafafa", "edgecolor": "#d6d6d6", "hatch": "////", "linewidth": 0}
_HATCHED = (
    "Hatched: not searched, because the screen left the site out; in brackets its screening score, on dev pairs. "
)
_IIA_CAUTION = (
    "A high IIA says that exchanging this subspace is enough to change the answer as the variable would; it does not "
    "say that the model has only this one, or that its axes mean anything"
)
_SMALL = (
    "Small numbers: the 95 % interval of one fit, or ± the standard deviation over several seeds or draws (×). "
)
_EFFECT_CAUTION = (
    "A large value says that the exchange changes the answer; it does not say that nothing else in the model would "
    "change it, or that the model does so by itself"
)


def iia_heatmap(
    fits: Fits, twin: Fits | None = None, path: str | Path | None = None, *, metric: str = "iia"
) -> Figure:
    """Scores on the test pairs by layer and position: one panel for each method, all with the same colour scale.

    If the sites are single heads, the columns are the heads, and each position has its own panels. A cell shows
    the mean over seeds and, in small print, the 95 % interval of a single fit or the standard deviation over seeds.
    The colours start at the highest null: the floors (no intervention, best constant answer), the highest draw of a
    random subspace, or the twin's highest score. A cell that is not higher is grey. Scores that are not shares, such
    as log odds, have colours that start at 0: one colour for positive values, another for negative ones. A hatched
    cell was not searched, because a screen left out its site. In brackets it shows the site's score in the screen, on
    the dev pairs, which cannot be compared with the scores of the other cells.

    Args:
        fits: from a sweep, with one or several methods, ranks, seeds and learning rates.
        twin: fits of the same sweep on a randomly initialised twin of the model; None if no twin was searched. Only
            the method of the best fit is shown.
        path: where to write a PNG; None: the figure is only returned, and a notebook shows it.
        metric: the score that is drawn.

    Raises:
        TypeError: anything but fits; a file name in the place of the twin.
        ValueError: nothing to draw, a metric that was not scored, variables at several sites, a twin without the same
            method and sites, or a path that does not end in .png.
        FileNotFoundError: the path's folder does not exist.
    """
    instance(fits, Fits, "The first argument", "give the result of search(…) or sweep(…)")
    if twin is not None:
        hint = "those of a randomly initialised twin; the name of a file is given as path='scores.png'"
        instance(twin, Fits, "twin, the second argument,", hint)
    check_picture(path)
    if not fits:
        raise ValueError("No fits to draw.")
    best = fits.best(metric)
    # Compared by label: `where(method="DifferenceOfMeans")` would select every rank of it.
    grid = Grid.with_heads([*(fit.site for fit in fits), *(Site.parse(one.place) for one in fits.screened)])
    left_out = [(one.method, one) for one in fits.screened if one.method in fits.methods]
    drawn = [(label, m) for label in fits.methods for m in fits.mean(metric=metric) if m.method.label == label]
    if twin is not None:
        same = twin.where(method=best.method)
        if set(_places(twin)) != set(_places(fits)):
            raise ValueError(f"The model was searched at {_places(fits)}, its twin at {_places(twin)}.")
        name = f"randomly initialised twin: {best.method.label}"
        drawn += [(name, m) for m in same.mean(metric=metric)]
        left_out += [(name, one) for one in same.screened]
    panels: dict[str, list[Mean]] = {}
    for label, mean in drawn:
        panels.setdefault(grid.panel(label, mean.fits[0].site), []).append(mean)
    hatched: dict[str, dict[Site, Screened]] = {}
    for label, one in left_out:  # once for each cell, not once for each seed
        hatched.setdefault(grid.panel(label, Site.parse(one.place)), {})[Site.parse(one.place)] = one
    legible = max(len(grid.rows), len(grid.columns)) <= MOST_NUMBERS
    column = (0.64 if grid.by_head else 0.85) if legible else (0.24 if grid.by_head else 0.6)  # inches
    wide = max(2.4 if legible else 1.9, column * len(grid.columns))
    across = min(len(panels), max(1, int(11 / wide)))
    if grid.by_head and across > len(grid.positions):
        across -= across % len(grid.positions)  # the positions of a method are side by side
    down = -(-len(panels) // across)
    size = wide * across, max(0.7, len(grid.rows) * (0.6 if legible else 0.2)) * down
    comparison = "; no twin was searched" if twin is None else ": compare it with the controls and the twin"
    null, null_is = _highest_null(fits, twin, metric)
    lowest = min(null, 0.95)  # the colour scale needs a length above 0
    largest = _size_of_effects([mean for _, mean in drawn], metric)
    scale, colours = (Normalize(lowest, 1), COLOURS) if largest is None else (Normalize(-largest, largest), SIGNED)
    figure = new_figure(
        (size[0] + 1.9, size[1] + 1.05 + 0.4 * down),
        f"{fits.facts.get('task') or 'Search'}: where is {' and '.join(fits.variables)}?",
        f"{best.score(metric).n} test pairs. {_SMALL if legible else ''}Framed: chosen on the dev pairs. "
        + (_HATCHED if hatched else "")
        + (
            f"{_floors(fits, twin)} {null_is}"
            if largest is None
            else "The colours start at 0, blue above and brown below."
        ),
        f"{_IIA_CAUTION if largest is None else _EFFECT_CAUTION}{comparison}.",
    )
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    to = "–" if largest is None else ", "
    for axis, (name, means) in zip(axes.flat, panels.items(), strict=False):
        masked = null if largest is None else -math.inf
        _draw_grid(axis, grid, means, lambda value: colours(scale(value)), metric, to if legible else None, masked)
        _draw_screened(axis, grid, hatched.get(name, {}), legible)
        if name == grid.panel(best.method.label, best.site):
            row, column = grid.cell(best.site)
            xs, ys = (-0.5, 0.5, 0.5, -0.5, -0.5), (-0.5, -0.5, 0.5, 0.5, -0.5)
            axis.plot([column + x for x in xs], [row + y for y in ys], color=ACCENT, linewidth=2, clip_on=False)
        most = max(mean.n for mean in means)
        title = name if most == 1 else f"{name} (×{most})"
        axis.set_title(fill(title, int(14 * wide), break_long_words=False), fontsize=9, color=INK, loc="left")
    for axis in axes[:, 0]:
        axis.set_ylabel(grid.names()[0], fontsize=9, color=INK)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=list(axes.flat), aspect=16 * down, pad=0.02)
    finish(bar, "IIA on test pairs" if metric == "iia" else metric)
    if largest is None:
        bar.ax.axhline(lowest, color=ACCENT, linewidth=2.4, clip_on=False)
    if hatched:
        figure.legend(
            handles=[Rectangle((0, 0), 1, 1, label="left out by the screen", **_SCREENED)],
            loc="upper right", fontsize=7.5, labelcolor=INK, frameon=False,
        )  # fmt: skip
    save_figure(figure, path)
    return figure


def _size_of_effects(means: Sequence[Mean], metric: str) -> float | None:
    """The largest absolute score, if a value or an interval goes beyond 0 to 1, so that the scores are not shares.

    None for shares.
    """
    scores = [fit.score(metric) for mean in means for fit in mean.fits]
    if all(0 <= limit <= 1 for one in scores for limit in (one.low, one.value, one.high)):
        return None
    return max(abs(mean.value) for mean in means) or 1.0


def _draw_grid(
    axis: Axes,
    grid: Grid,
    means: Sequence[Mean],
    colour_of: Callable[[float], tuple[float, ...]],
    metric: str,
    to: str | None,
    null: float,
) -> None:
    """One panel.

    Args:
        to: what is written between the limits of an interval; None: no numbers, because they would be too small.
        null: cells up to this value are grey.
    """
    frame(axis, grid.columns, grid.names()[1])
    axis.set_xlabel(grid.column_axis(), fontsize=9, color=INK)
    for mean in means:
        row, column = grid.cell(mean.fits[0].site)
        colour = colour_of(mean.value) if mean.value > null else MASKED
        cell(axis, column, row, colour)
        if to is not None:
            one = mean.fits[0].score(metric)
            limits = f"{_number(one.low)}{to}{_number(one.high)}"
            small = limits if mean.spread is None else f"± {mean.spread:.2f}"
            on = GREY if colour == MASKED else ink(colour)
            write(axis, column, row + 0.1, _number(mean.value), on, 10)
            write(axis, column, row - 0.24, small, on, 6.5)


def _number(value: float) -> str:
    """Two decimals, with the sign of minus as it is printed."""
    return two_decimals(value).replace("-", "−")


def _draw_screened(axis: Axes, grid: Grid, cells: Mapping[Site, Screened], legible: bool) -> None:
    """The cells of sites that the screen left out."""
    for site, one in cells.items():
        row, column = grid.cell(site)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_SCREENED))
        if legible:
            axis.text(
                column, row, f"({one.score:.2f})", color=GREY, fontsize=6.5, ha="center", va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip


def _places(fits: Fits) -> list[str]:
    """The places of all cells, including those that the screen left out."""
    return list(dict.fromkeys([*fits.places, *(one.place for one in fits.screened)]))


def _floors(fits: Fits, twin: Fits | None) -> str:
    floors = fits.floors["test"]
    of_twin = "" if twin is None else f" (twin {twin.floors['test'].no_intervention.value:.2f})"
    return (
        f"Floors: no intervention {floors.no_intervention.value:.2f}{of_twin}, best constant answer "
        f"{floors.constant.value:.2f}."
    )


def _highest_null(fits: Fits, twin: Fits | None, metric: str) -> tuple[float, str]:
    """The highest score that is reached without the variable, and a sentence that names it."""
    nulls = {"the higher floor": fits.floors["test"].highest}
    for name, of in (
        ("a random subspace", [fit for fit in fits if isinstance(fit.method, RandomSubspace)]),
        ("the twin", [] if twin is None else list(twin.where(method=fits.best(metric).method))),
    ):
        if of:
            nulls[name] = max(fit.score(metric).value for fit in of)
    highest = max(nulls, key=lambda name: nulls[name])
    return nulls[highest], f"Grey: not above the highest null, {nulls[highest]:.2f} ({highest})."
