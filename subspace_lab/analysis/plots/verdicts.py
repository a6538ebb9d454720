"""The picture of a verdict: the effect of the model and of every twin and control, each as a point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspace_lab.analysis.plots.canvas import ACCENT, GREY, INK, new_figure, save_figure, whole_figure
from subspace_lab.analysis.verdicts import Check, Verdict

SHOWN = ("twins", "control", "random")  # how the names of the checks begin whose null consists of effects
ROW, STEP = 0.42, 0.09  # inches of a line; the distance of points with about the same value, in lines
NEAR = 0.02  # points of effects that differ by less would cover each other

_CAPTION = (
    "Effect: 0 is the floor; 1 means that every held-out pair has the answer of the causal model. The line is the 95 % "
    "interval of the model's effect, for new pairs and (where these are known) new entities. A twin or control above "
    "its lower end speaks against the claim."
)


def verdict_plot(verdict: Verdict, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
    """The model's effect with its interval, and the effects of all twins and controls.

    Args:
        path: of the PNG to write; without it the figure is only returned.
        ax: axes to draw into instead of a new figure.
    """
    lines = [one for one in verdict.checks if one.name.startswith(SHOWN) and one.null]
    if ax is None:
        figure = new_figure((7.0, 1.2 + ROW * (1 + len(lines))), verdict.headline, str(verdict), _CAPTION)
        ax = figure.add_subplot()
    else:
        figure = whole_figure(ax)
    _draw(ax, verdict, lines)
    save_figure(figure, path)
    return figure


def _draw(ax: Axes, verdict: Verdict, lines: Sequence[Check]) -> None:
    claim = verdict.claim
    low, mean, high = (
        (value - claim.floor) / (1 - claim.floor) for value in (claim.iia.low, claim.iia.value, claim.iia.high)
    )
    ax.axvspan(low, high, color=ACCENT, alpha=0.12, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.plot([low, high], [0, 0], color=ACCENT, linewidth=2)
    ax.plot([mean], [0], "D", color=ACCENT, markersize=7)
    for row, one in enumerate(lines, 1):
        beside: Counter[int] = Counter()
        for value in sorted(one.null):
            place = round(value / NEAR)
            up = (beside[place] + 1) // 2 * (1 if beside[place] % 2 else -1)
            beside[place] += 1
            ax.plot([value], [row + max(-0.4, min(0.4, STEP * up))], "o", color=INK, markersize=4, alpha=0.7)
    names = [f"model: {claim.method}", *(f"{one.name} (n = {len(one.null)})" for one in lines)]
    ax.set_yticks(range(len(names)), names, fontsize=8, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    lowest = min([0.0, low, *(value for one in lines for value in one.null)])
    ax.set_xlim(lowest - 0.05, max(1.0, high) + 0.05)
    ax.set_xlabel(f"effect on {claim.iia.n} held-out pairs (no unit)", fontsize=8, color=INK)
    ax.tick_params(axis="x", labelsize=8, colors=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
