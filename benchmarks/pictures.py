"""Draws the pictures of benchmarks/README.md from the results. Nothing is measured.

    python benchmarks/pictures.py [NAME ...]

A picture carries the fingerprint of the results that it was drawn from (`results_of`), so that a test notices one
that is older than its figures.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT = "LoReFT rank 4, all layers, f3+l3"
KEYWORD = "results"  # of the text in a PNG file
EDIT, WEIGHTS, PROMPT, CONTROL = "C0", "C1", "C2", "0.6"

Row = tuple[str, float, float | None, float | None, str]  # label, value, low, high, colour


def loaded(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def fingerprint(*names: str) -> str:
    """What stands for the figures of some results."""
    figures = [(found["results"], found.get("table")) for found in map(loaded, names)]
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]


def results_of(picture: Path) -> str | None:
    """The fingerprint in a PNG file, or None."""
    data, at = picture.read_bytes(), 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        word, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and word.decode("latin-1") == KEYWORD:
            return text.decode("latin-1")
        at += 12 + length
    return None


def intervals(axes: Axes, rows: Sequence[Row], *, at: float | None = None, label: str = "") -> None:
    """One line for each row: its value and its interval; from top to bottom."""
    for i, (_, value, low, high, colour) in enumerate(rows):
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=colour, lw=2, alpha=0.5, solid_capstyle="butt")
        axes.plot(value, i, "o", color=colour, ms=5)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label, loc="right")  # so that a long one has the room of the names too
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if at is not None:
        axes.axvline(at, color="0.3", lw=1, ls="--")


def rows_of(results: Mapping[str, Any], names: Mapping[str, str], colour: str = EDIT) -> list[Row]:
    """{figure: label} as rows."""
    found = []
    for name, label in names.items():
        of = results[name]
        found.append((label, of["median"], of.get("low"), of.get("high"), colour))
    return found


def speed(figure: Figure) -> None:
    axes = figure.subplots()
    das, sweep, reft = (loaded(name)["results"] for name in ("das_speed", "sweep_speed", "reft_speed"))
    rows = [
        *rows_of(
            das,
            {
                "speedup_over_pyvene": "a step of DAS, layer 6 of 12, than pyvene",
                "speedup_over_pyvene_layer1": "a step of DAS, layer 1 of 12, than pyvene",
                "speedup_over_plain": "a step of DAS, layer 6 of 12, than two plain forward passes",
            },
        ),
        *rows_of(sweep, {"speedup_over_pyvene": "a sweep, 12 layers × 3 positions, than pyvene"}),
        *rows_of(
            reft,
            {
                "speedup_over_pyreft_width4096": "a step of LoReFT, width 4096, than pyreft",
                "speedup_over_pyreft_width4096_trainer": "the same with transformers' Trainer",
                "speedup_over_pyreft_last_position": "a step of LoReFT at the last position, than pyreft",
                "speedup_over_pyreft_width1024": "a step of LoReFT, width 1024, than pyreft",
            },
            WEIGHTS,
        ),
    ]
    intervals(axes, rows, at=1, label="times as fast (median, lowest and highest of the rounds of one run)")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_title("Speed", loc="left")


def equality(figure: Figure) -> None:
    results = loaded("hierarchical_equality")["results"]
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {"trained": EDIT, "trained as published": WEIGHTS, "untrained, calibrated": CONTROL}
    for axes, hypothesis in zip(panels, ("both equalities", "left equality"), strict=True):
        for kind, colour in kinds.items():
            across_layers(axes, results, f"{kind}, {hypothesis}", "IIA", colour, kind)
        across_layers(
            axes, results, f"trained, {hypothesis}", "random subspace", "0.2", "trained, random subspace", "--"
        )
        axes.set_title(hypothesis, loc="left")
    panels[0].set_ylabel("IIA")
    panels[0].legend(frameon=False, fontsize=8)


def distributive(figure: Figure) -> None:
    results = loaded("distributive_law")["results"]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("trained", "untrained, calibrated"), strict=True):
        for name, colour in (("And-Or-And", EDIT), ("And-Or", WEIGHTS)):
            across_layers(axes, results, f"{kind}, {name}", "IIA where they differ", colour, name)
        axes.axhline(0.5, color="0.6", lw=1, ls=":")
        axes.set_title(f"{kind} networks", loc="left")
    panels[0].set_ylabel("IIA where the two differ")
    panels[0].legend(frameon=False, fontsize=8)


def across_layers(
    axes: Axes, results: Mapping[str, Any], name: str, what: str, colour: str, label: str, line: str = "-"
) -> None:
    """The mean over networks in each layer, with the lowest and the highest."""
    layers = [1, 2, 3]
    found = [results[f"{name}, layer {layer}, {what}"] for layer in layers]
    axes.plot(layers, [of["mean"] for of in found], f"o{line}", color=colour, label=label, ms=4)
    axes.fill_between(layers, [of["low"] for of in found], [of["high"] for of in found], color=colour, alpha=0.12)
    axes.set_xticks(layers)
    axes.set_xlabel("hidden layer")
    axes.grid(alpha=0.3)


def hypotheses(figure: Figure) -> None:
    axes = figure.subplots()
    found = loaded("hypotheses")
    names = {f"{name}, IIA where they differ": name for name in found["settings"]["order"]}
    intervals(
        axes,
        rows_of(found["results"], names),
        at=0.5,
        label="IIA on pairs where the hypotheses differ, at each one's best site (95 %)",
    )
    axes.set_title("Four hypotheses about one model", loc="left")


def isolation(figure: Figure) -> None:
    results = loaded("isolation")["results"]
    methods = list(dict.fromkeys(name.rpartition(", ")[0] for name in results if name.endswith(", cause")))
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"cause": "the variable changes the answer", "iso": "another attribute stays"}
    for axes, (score, title) in zip(panels, titles.items(), strict=True):
        colours = ["0.6" if method.startswith(("Random", "Full")) else EDIT for method in methods]
        rows = [
            (*row[:4], colour)
            for row, colour in zip(
                rows_of(results, {f"{method}, {score}": method for method in methods}), colours, strict=True
            )
        ]
        intervals(axes, rows)
        axes.set_title(title, loc="left")
        axes.set_xlim(-0.03, 1.03)
    figure.supxlabel("share of pairs (median, lowest and highest of the seeds)", fontsize=10)


def screening(figure: Figure) -> None:
    axes = figure.subplots()
    cases = loaded("screening")["settings"]["cases"]
    rows = [
        (
            f"{name}{' *' if of['chosen_on'] else ''}",
            of["saving"],
            None,
            None,
            CONTROL if of["chosen_on"] else EDIT,
        )
        for name, of in cases.items()
    ]
    intervals(axes, rows, label="share of the full sweep's time that is saved (* the settings were chosen here)")
    axes.set_xlim(0, 1)
    axes.set_title("Screen() loses the best site in none of these sweeps", loc="left")
    assert not any(of["lost"] for of in cases.values()), "the title says that no best site is lost"


def controls(figure: Figure) -> None:
    axes = figure.subplots()
    results = loaded("controls")["results"]
    kinds = [name.removeprefix("supported, ") for name in results if name.startswith("supported, ")]
    rows = []
    for kind in sorted(kinds, key=lambda kind: kind.startswith("planted")):
        of = results[f"supported, {kind}"]
        colour = EDIT if kind.startswith("planted") else WEIGHTS
        rows.append((f"{kind} (n = {of['n']})", of["median"], of["low"], of["high"], colour))
    intervals(axes, rows, label="share of the models with the verdict “supported” (95 %)")
    axes.set_xlim(-0.02, 1.02)
    axes.set_title("Models that hold no variable (orange), and models that do (blue)", loc="left")


def quality(figure: Figure) -> None:
    table = loaded("reft_quality")["table"]
    parts = {
        "SST-2, MiniLM": table["minilm"],
        "SST-2 as a prompt, SmolLM2-135M": [row for row in table["smollm2"] if row["task"] == "sentiment"],
        "a name carried on, SmolLM2-135M": [row for row in table["smollm2"] if row["task"] == "name"],
        "a name carried on, stories260K": [row for row in table["stories"] if row["style"] == "name"],
    }
    panels = figure.subplots(2, 2, gridspec_kw={"height_ratios": [len(parts["SST-2, MiniLM"]), 17]})
    for axes, (title, rows) in zip(panels.flat, parts.items(), strict=True):
        shown = []
        for row in sorted(rows, key=lambda row: -row["test"]):
            scores = [100 * score for score in row.get("test by seed", [row["test"]])]
            spread = (min(scores), max(scores)) if len(scores) > 1 else (None, None)
            shown.append((row["method"], 100 * row["test"], *spread, colour_of(row["method"])))
        intervals(axes, shown, label="right, % (mean, lowest and highest of 3 seeds)")
        axes.set_title(title, loc="left")
    kinds = {"edits of states": EDIT, "weights": WEIGHTS, "prompts": PROMPT, "controls": CONTROL}
    handles = [panels[0, 0].plot([], [], "o", color=colour, label=kind)[0] for kind, colour in kinds.items()]
    figure.legend(handles=handles, frameon=False, ncols=len(kinds), loc="outside upper center")


def suggested(figure: Figure) -> None:
    axes = figure.subplots()
    table = loaded("suggested_settings")["table"]
    tasks = list(table[0]["share by task"])
    for i, row in enumerate(table):
        for k, task in enumerate(tasks):
            axes.plot(row["share by task"][task], i, "os^"[k], color=f"C{k}", label=None if i else task, ms=5)
        axes.plot(row["share"], i, "|", color="0.2", ms=14, mew=2, label=None if i else "mean")
    axes.set_yticks(range(len(table)), [row["setting"] for row in table])
    axes.get_yticklabels()[[row["setting"] for row in table].index(DEFAULT)].set_fontweight("bold")
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel(
        "share of the gain (1: the lowest held-out loss of all settings); the default is bold", loc="right"
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, fontsize=9, ncols=len(tasks) + 1, loc="outside upper right")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def colour_of(method: str) -> str:
    if method.startswith("control") or method == "head only":
        return CONTROL
    if "ReFT" in method or method in ("RED", "head edits"):
        return EDIT
    return PROMPT if "tuning" in method and "fine" not in method else WEIGHTS


def scaling(figure: Figure) -> None:
    """Above the time of each sweep and its limit, below the highest memory."""
    from matplotlib.ticker import FixedLocator, NullLocator

    found = loaded("scaling")
    points, base = found["table"], found["settings"]
    panels = figure.subplots(2, len(points), sharex="col", sharey="row")
    for (above, below), (name, of) in zip(panels.T, points.items(), strict=True):
        at = [p[name] for p in of]
        above.plot(at, [median(p["seconds"]) for p in of], "o-", color=EDIT, label="sweep")
        above.plot(at, [median(p["limit"]) for p in of], "--", color="0.35", label="limit")
        below.plot(at, [p["memory"] for p in of], "o-", color=WEIGHTS)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(at))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
        below.set_xticks(at, [str(value) for value in at])
        above.set_yscale("log")
        below.set_xlabel(name)
    panels[1, 0].set_ylim(0, 1.08 * max(p["memory"] for of in points.values() for p in of))
    panels[0, 0].set_ylabel("seconds of one thread")
    panels[1, 0].set_ylabel("peak memory (MiB)")
    panels[0, 0].legend(frameon=False)
    rest = ", ".join(f"{name} {base[name]}" for name in points)
    figure.suptitle(f"A sweep of DAS, one size changed at a time. Else: {rest}", fontsize=11)


# Of each picture the results that it is drawn from, its size in inches, and what draws it.
PICTURES: dict[str, tuple[tuple[str, ...], tuple[float, float], Callable[[Figure], None]]] = {
    "speed": (("das_speed", "sweep_speed", "reft_speed"), (8, 3.4), speed),
    "hierarchical_equality": (("hierarchical_equality",), (8, 3.2), equality),
    "distributive_law": (("distributive_law",), (8, 3.2), distributive),
    "hypotheses": (("hypotheses",), (7, 2.4), hypotheses),
    "isolation": (("isolation",), (8.5, 4), isolation),
    "screening": (("screening",), (8, 3.6), screening),
    "controls": (("controls",), (8, 3.4), controls),
    "reft_quality": (("reft_quality",), (11, 9.5), quality),
    "suggested_settings": (("suggested_settings",), (8, 3.6), suggested),
    "scaling": (("scaling",), (13, 4.6), scaling),
}


def draw(name: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sources, size, drawn = PICTURES[name]
    figure = plt.figure(figsize=size, layout="constrained")
    drawn(figure)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110, metadata={KEYWORD: fingerprint(*sources), "Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    for wanted in sys.argv[1:] or PICTURES:
        print(draw(wanted).name)
