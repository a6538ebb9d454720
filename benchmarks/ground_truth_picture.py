"""The picture of `ground_truth.py`: by method, whether its verdict was right and how much of the truth it held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspace_lab.analysis.plots.canvas import ACCENT, GREY, INK, new_figure, save_figure

SHARES = {"site found": "o", "supported": "s"}


def draw(results: Mapping[str, Any], path: str) -> None:
    """A row for each method: shares of programs, false verdicts, and the share of the truth in each program."""
    table, programs, figures = results["table"], results["programs"], results["figures"]
    methods = list(table)
    n = len(programs)
    low, before, after = (
        figures[name]["median"] for name in ("programs_that_held_less", "share_before", "share_after")
    )
    without = table["DAS"]["programs with sites without"]
    figure = new_figure(
        (10.4, 0.36 * len(methods) + 1.2),
        f"Which method to believe: {n} programs whose truth is known",
        f"{n} programs, one variable each, one seed. Sites and ranks chosen on dev pairs, scores of test pairs. "
        "Supported: the test interval lies above both floors and above a randomly initialised twin. False: the same of "
        f"the best of the sites that do not hold the variable ({without:.0f} programs have such sites).",
        "Share of the true span: mean squared cosine between what was found and the truth, at the site found; a dot is "
        "a program, the line the mean; what is large holds it whatever it is (diamond). "
        f"In {low:.0f} programs DAS at the rank chosen on dev held less than .9: "
        f"{before:.2f} on average, {after:.3f} after purify.",
    )
    places = {method: len(methods) - 1 - i for i, method in enumerate(methods)}
    verdicts, false, shares = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 4))
    for name, marker in SHARES.items():
        values = [table[method][name] for method in methods]
        filled = INK if marker == "o" else "none"
        verdicts.scatter(
            values,
            list(places.values()),
            s=34,
            marker=marker,
            facecolor=filled,
            edgecolor=INK,
            label=name,
            zorder=3,
        )
    verdicts.set_xlabel("share of programs", fontsize=9, color=INK)
    verdicts.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=INK)
    verdicts.set_title("Where the variable is", fontsize=9.5, loc="left", color=INK)
    false.barh(
        list(places.values()),
        [table[method]["false supported"] for method in methods],
        height=0.5,
        color="#8fb3bd",
        edgecolor=INK,
        linewidth=0.6,
    )
    for method, place in places.items():
        value = table[method]["false supported"]
        false.text(max(value, 0.05) + 0.006, place, f"{value:.2f}", fontsize=7.5, va="center", color=INK)
    false.axvline(0.05, color=ACCENT, linewidth=1.2, linestyle="--")
    false.set_xlabel("share of searches", fontsize=9, color=INK)
    false.set_title("Supported where it is not", fontsize=9.5, loc="left", color=INK)
    for method, place in places.items():
        found = [one["methods"][method]["best"] for one in programs.values()]
        values = [one["share"] for one in found if one["holds"]]
        offsets = [0.26 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
        shares.scatter(values, [place + x for x in offsets], s=9, color=GREY, alpha=0.55, linewidth=0, zorder=2)
        if values:
            middle = sum(values) / len(values)
            shares.plot([middle, middle], [place - 0.34, place + 0.34], color=ACCENT, linewidth=2.2, zorder=3)
            shares.text(1.03, place, f"{middle:.2f}", fontsize=7.5, va="center", color=INK)
            inside = table[method]["inside"]
            label = "of what was found, the share that is true (mean)" if place == 0 else None
            shares.scatter(
                [inside], [place], s=30, marker="D", facecolor="white", edgecolor=INK, zorder=4, label=label
            )
    shares.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=INK, bbox_to_anchor=(0, 0.02))
    shares.set_xlabel("share of the true span", fontsize=9, color=INK)
    shares.set_title("How much of the truth is in it", fontsize=9.5, loc="left", color=INK)
    for axis, ticks, most in (
        (verdicts, (0, 0.5, 1), 1.03),
        (false, (0, 0.05, 0.1), 0.12),
        (shares, (0, 0.5, 1), 1.12),
    ):
        axis.set_xlim(-0.03 * ticks[-1], most)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8.5)
        axis.tick_params(length=0, colors=INK)
        axis.set_yticks(list(places.values()), methods, fontsize=8.5)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(GREY)
    save_figure(figure, path)
