"""Curves: scores by rank and by number of pairs, methods compared, training losses, and edits by layer.

Each function takes results and returns a figure. It can also write the figure to a path, or draw on an axis of your
own figure; then only the curves are drawn, without the caption. The only numbers computed here are the mean, the
lowest and the highest of the seeds that were run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from subspace_lab.analysis.edit_effects import EditEffect
from subspace_lab.analysis.plots.canvas import (
    ACCENT,
    GREY,
    INK,
    check_picture,
    new_figure,
    save_figure,
    whole_figure,
)
from subspace_lab.core.arguments import instance
from subspace_lab.core.estimates import Estimate
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import RandomSubspace

# The lines differ in dash and marker too, for grey print and for readers who do not see the colours.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#1b2f52", "linestyle": "-", "marker": "o"},
    {"color": "#4f82a0", "linestyle": "--", "marker": "s"},
    {"color": "#7a3510", "linestyle": "-.", "marker": "^"},
    {"color": "#8fb3bd", "linestyle": ":", "marker": "D"},
    {"color": "#c26a35", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    {"color": "#222222", "linestyle": (0, (1, 1)), "marker": "P"},
)
NULL = "#d9d9d9"
ONE_PLACE = "Filter them, as in fits.where(site=...)."


def iia_by_rank(fits: Fits, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """The score of each method by its rank at one place, on held-out and on training pairs, with the nulls.

    A point is the mean over seeds. Its bar goes from the lowest seed to the highest; with one seed it is the 95 %
    interval. The grey band goes from the lowest draw of the random subspaces to the highest.

    Args:
        fits: fits at one place, with at least one method that has two or more ranks.
        path: where to write a PNG; None: the figure is only returned.
        ax: the axis to draw on; None makes a new figure.

    Raises:
        ValueError: several places, or no method with several ranks.
    """
    check_picture(path)
    place = _one_place(fits)
    by_kind = _grouped([fit for fit in fits if not fit.method.control], lambda fit: type(fit.method).__name__)
    by_kind = {name: of for name, of in by_kind.items() if len({fit.rank for fit in of}) > 1}
    if not by_kind:
        raise ValueError(f"No method has several ranks at {place}; there are {fits.methods}.")
    random = [fit for fit in fits if isinstance(fit.method, RandomSubspace)]
    figure, axis = _canvas(
        ax,
        (6.4, 3.6),
        f"{_task(fits)}: score by rank at {place}",
        f"{_held_out(fits)} {_bars(fits)} Hollow: the same on training pairs. Grey band: random subspaces, lowest to "
        "highest draw. A training score far above the held-out score means that the fit memorised its training pairs.",
    )
    if random:
        by_rank = _grouped(random, lambda fit: fit.rank)
        ranks = sorted(by_rank)
        scores = [[fit.score(fits.metric).value for fit in by_rank[rank]] for rank in ranks]
        if len(ranks) > 1:
            axis.fill_between(ranks, [min(s) for s in scores], [max(s) for s in scores], color=NULL, linewidth=0)
        else:  # with one rank a band would have no width
            axis.vlines(ranks, min(scores[0]), max(scores[0]), color=NULL, linewidth=9)
        axis.plot(ranks, [statistics.fmean(s) for s in scores], color=GREY, linewidth=1, label="random subspace")
    for (name, of), style in zip(by_kind.items(), _styles(len(by_kind)), strict=True):
        by_rank = _grouped(of, lambda fit: fit.rank)
        _curve(axis, by_rank, fits.metric, "test", name, style)
        if all("train" in fit.scores for fit in of):
            _curve(axis, by_rank, fits.metric, "train", None, style)
    _floor(axis, fits)
    ranks = sorted({fit.rank for of in by_kind.values() for fit in of})
    axis.set_xscale("log", base=2)
    _ticks(axis, ranks)
    _dress(axis, "rank (dimensions)", _unit(fits.metric))
    save_figure(figure, path)
    return figure


def iia_by_pairs(sweeps: Mapping[int, Fits], path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """The score by the number of training pairs, on held-out and on training pairs; a gap between them is memorisation.

    Args:
        sweeps: {number of training pairs: fits at one place}, two or more, with the same dev and test pairs.
        path, ax: as for `iia_by_rank`.

    Raises:
        ValueError: fewer than two numbers of training pairs, or several places.
    """
    check_picture(path)
    if len(sweeps) < 2:
        raise ValueError(
            f"Fits of {list(sweeps)} training pairs: give fits of two or more numbers of training pairs."
        )
    places = {_one_place(fits) for fits in sweeps.values()}
    if len(places) > 1:
        raise ValueError(f"Fits at the sites {sorted(places)}; one site is needed. {ONE_PLACE}")
    some = next(iter(sweeps.values()))
    methods = list(dict.fromkeys(m for fits in sweeps.values() for m in fits.methods))
    figure, axis = _canvas(
        ax,
        (6.4, 3.6),
        f"{_task(some)}: score by number of training pairs at {places.pop()}",
        f"{_held_out(some)} {_bars(some)} Hollow: the same on training pairs. Where these are far higher, the fits "
        "memorised their training pairs.",
    )
    for method, style in zip(methods, _styles(len(methods)), strict=True):
        by_number = {n: [fit for fit in fits if fit.method.label == method] for n, fits in sorted(sweeps.items())}
        by_number = {n: of for n, of in by_number.items() if of}
        _curve(axis, by_number, some.metric, "test", method, style)
        if all("train" in fit.scores for of in by_number.values() for fit in of):
            _curve(axis, by_number, some.metric, "train", None, style)
    _floor(axis, some)
    axis.set_xscale("log")
    _ticks(axis, sorted(sweeps))
    _dress(axis, "training pairs", _unit(some.metric))
    save_figure(figure, path)
    return figure


def methods_beside(fits: Fits, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """All methods at one place, one below the other, with their intervals; controls are hollow.

    Args:
        fits: fits at one place.
        path, ax: as for `iia_by_rank`.

    Raises:
        ValueError: no fits, or several places.
    """
    check_picture(path)
    place = _one_place(fits)
    means = fits.mean(metric=fits.metric)
    means.sort(key=lambda mean: (mean.method.control, -mean.value))
    rows = list(range(len(means)))[::-1]
    figure, axis = _canvas(
        ax,
        (6.4, 0.3 * len(means) + 0.9),
        f"{_task(fits)}: methods at {place}",
        f"{_held_out(fits)} Bar: 95 % interval of one fit; of several seeds or draws (×), from the lowest to the "
        "highest limit of their intervals; each small dot is one of them. Hollow: controls, which show what chance or "
        "the whole state gives.",
    )
    for row, mean in zip(rows, means, strict=True):
        # A bar of the seeds alone would leave out the sampling of the pairs, and look more certain than one fit.
        each = [fit.score(fits.metric) for fit in mean.fits]
        low, high = min(one.low for one in each), max(one.high for one in each)
        control = mean.method.control
        axis.plot([low, high], [row, row], color=GREY if control else INK, linewidth=1.4, zorder=2)
        if mean.n > 1:
            axis.scatter([one.value for one in each], [row] * mean.n, s=7, color=GREY, zorder=3)
        face = "white" if control else LINES[0]["color"]
        axis.scatter([mean.value], [row], s=40, facecolor=face, edgecolor=INK, zorder=4)
        axis.annotate(
            f"{mean.value:.2f}",
            (high, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axis.axvline(fits.floors["test"].highest, color=ACCENT, linewidth=1.2, linestyle="--", label="higher floor")
    axis.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1))
    axis.set_yticks(rows, [f"{m.method.label}{f' (×{m.n})' if m.n > 1 else ''}" for m in means])
    axis.set_ylim(-0.6, len(means) - 0.4)
    _dress(axis, _unit(fits.metric), "", grid="x")
    save_figure(figure, path)
    return figure


def training_curves(fits: Fits, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """The training loss at each step of every fit that was trained, at one place.

    Args:
        fits: fits at one place; fits that were not trained are left out.
        path, ax: as for `iia_by_rank`.

    Raises:
        ValueError: no fit was trained, or several places.
    """
    check_picture(path)
    place = _one_place(fits)
    by_method = _grouped([fit for fit in fits if fit.losses], lambda fit: fit.method.label)
    if not by_method:
        raise ValueError(f"None of the methods {fits.methods} was trained at {place}: there is no loss.")
    window = max(1, max(len(fit.losses) for of in by_method.values() for fit in of) // 20)
    figure, axis = _canvas(
        ax,
        (6.4, 3.6),
        f"{_task(fits)}: training at {place}",
        f"Loss of the expected answer on the batch of each step, one line for each seed; mean over {window} steps. It "
        "says nothing about new or held-out pairs.",
    )
    for (label, of), style in zip(by_method.items(), _styles(len(by_method)), strict=True):
        for i, fit in enumerate(of):
            losses = fit.losses
            smooth = [statistics.fmean(losses[max(0, j - window + 1) : j + 1]) for j in range(len(losses))]
            name = f"{label}{f' (×{len(of)})' if len(of) > 1 else ''}" if i == 0 else None
            axis.plot(
                range(1, len(losses) + 1), smooth, color=style["color"], linestyle=style["linestyle"], linewidth=1.2,
                alpha=0.85, label=name,
            )  # fmt: skip
    _dress(axis, "training step", f"loss ({fits.facts.get('loss', 'nats')})")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    save_figure(figure, path)
    return figure


def edits_by_layer(
    effects: Sequence[EditEffect], path: str | Path | None = None, *, ax: Axes | None = None
) -> Figure:
    """What each edit of an adapter does alone, and what is lost without it, by layer.

    Args:
        effects: from `edit_effects`.
        path, ax: as for `iia_by_rank`.

    Raises:
        ValueError: no effects.
    """
    check_picture(path)
    if not effects:
        raise ValueError("No effects to draw: `edit_effects` returns one for each edit.")
    names = [str(one.site) if one.site.layer is None else str(one.site.layer) for one in effects]
    if len(set(names)) < len(names):
        names = [str(one.site) for one in effects]
    figure, axis = _canvas(
        ax,
        (max(6.4, 0.42 * len(effects) + 1.6), 3.5),
        "Edits by layer: by how much each lowers the loss",
        f"Mean cross-entropy of the answer's tokens over {effects[0].alone.n} rows, in nats; bars are 95 % intervals "
        f"over the rows. Dashed: all {len(effects)} edits together, {effects[0].together.value:.3f}. Filled: this edit "
        "alone. Hollow: what is lost when only this edit is removed. If filled is large and hollow is small, other "
        "edits do the same.",
    )
    places = list(range(len(effects)))
    for offset, name, label, face in (
        (-0.12, "alone", "alone", LINES[0]["color"]),
        (0.12, "lost", "lost without it", "white"),
    ):
        estimates: list[Estimate] = [getattr(one, name) for one in effects]
        xs = [place + offset for place in places]
        lows, highs = [one.low for one in estimates], [one.high for one in estimates]
        axis.vlines(xs, lows, highs, color=GREY, linewidth=1.2, zorder=2)
        values = [one.value for one in estimates]
        axis.scatter(xs, values, s=34, facecolor=face, edgecolor=INK, zorder=3, label=label)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axhline(effects[0].together.value, color=ACCENT, linewidth=1.2, linestyle="--", label="all together")
    upright = max(map(len, names)) <= 4
    axis.set_xticks(places, names, rotation=0 if upright else 40, ha="center" if upright else "right")
    _dress(axis, "layer" if upright else "", "fall of the loss (nats)")
    save_figure(figure, path)
    return figure


# --- shared helpers -----------------------------------------------------------------------------------------


def _canvas(ax: Axes | None, size: tuple[float, float], title: str, *sentences: str) -> tuple[Figure, Axes]:
    if ax is not None:
        ax.set_title(title, fontsize=9.5, color=INK, loc="left")
        return whole_figure(ax), ax
    figure = new_figure(size, title, *sentences)
    return figure, figure.subplots()


def _curve(
    axis: Axes,
    groups: Mapping[int, Sequence[Fit]],
    metric: str,
    split: str,
    label: str | None,
    style: dict[str, Any],
) -> None:
    """Means with their bars, in ascending order of x."""
    xs = sorted(groups)
    scores = [[fit.score(metric, split) for fit in groups[x]] for x in xs]
    means = [statistics.fmean(one.value for one in of) for of in scores]
    held_out = split == "test"
    face = style["color"] if held_out else "white"
    axis.plot(
        xs, means, color=style["color"], linestyle=style["linestyle"], linewidth=1.6 if held_out else 0.8,
        marker=style["marker"], markersize=5, markerfacecolor=face, label=label, zorder=3, alpha=1 if held_out else 0.8,
    )  # fmt: skip
    if held_out:
        lows = [of[0].low if len(of) == 1 else min(one.value for one in of) for of in scores]
        highs = [of[0].high if len(of) == 1 else max(one.value for one in of) for of in scores]
        axis.vlines(xs, lows, highs, color=style["color"], linewidth=1, zorder=2)


def _floor(axis: Axes, fits: Fits) -> None:
    axis.axhline(
        fits.floors["test"].highest, color=ACCENT, linewidth=1.2, linestyle="--", label="higher floor", zorder=1
    )


def _dress(axis: Axes, across: str, up: str, grid: str = "y") -> None:
    axis.set_xlabel(across, fontsize=9, color=INK)
    axis.set_ylabel(up, fontsize=9, color=INK)
    axis.tick_params(labelsize=8.5, length=2, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.grid(axis="x" if grid == "x" else "y", color="#e8e8e8", linewidth=0.6)
    axis.set_axisbelow(True)
    if grid == "y":
        axis.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="best")


def _ticks(axis: Axes, values: Sequence[int]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _styles(n: int) -> list[dict[str, Any]]:
    return [LINES[i % len(LINES)] for i in range(n)]


def _grouped(fits: Sequence[Fit], of: Callable[[Fit], Any]) -> dict[Any, list[Fit]]:
    found: dict[Any, list[Fit]] = {}
    for fit in fits:
        found.setdefault(of(fit), []).append(fit)
    return found


def _one_place(fits: Fits) -> str:
    instance(
        fits, Fits, "The first argument", "give the result of search(…) or sweep(…), filtered by fits.where(…)"
    )
    if not fits:
        raise ValueError("No fits to draw.")
    if len(fits.places) > 1:
        raise ValueError(f"Fits at {len(fits.places)} sites, {fits.places[:4]}; one is needed. {ONE_PLACE}")
    return fits.places[0]


def _task(fits: Fits) -> str:
    return str(fits.facts.get("task") or "Search")


def _held_out(fits: Fits) -> str:
    return f"{fits[0].score(fits.metric).n} test pairs, {' and '.join(fits.variables)}."


def _bars(fits: Fits) -> str:
    seeds = len({fit.seed for fit in fits if not fit.method.control})
    several = f"mean of {seeds} seeds, from the lowest to the highest"
    return f"Filled: {several}." if seeds > 1 else "Filled: one seed with its 95 % interval."


def _unit(metric: str) -> str:
    return "IIA" if metric == "iia" else metric
