"""The report of a finetuning, in the folder of its adapter: its numbers, a picture of its loss, and a printed summary.

results.json            "settings"; numbers of "parameters" and "rows"; "losses" of each step; "held_out": loss,
                        accuracy and the score of a constant answer, before and after; "classes"; "samples"
loss.png                the training loss, and the held-out loss before and after

The adapter (adapter_config.json, adapter_model.safetensors, README.md) is written by `ReftModel.save_pretrained`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from subspace_lab.analysis.plots.canvas import ACCENT, GREY, INK, console, new_figure, save_figure
from subspace_lab.analysis.saves import Saves
from subspace_lab.core.estimates import Estimate, proportion
from subspace_lab.core.files import write_json
from subspace_lab.core.texts import printable
from subspace_lab.reft.jobs import Measured
from subspace_lab.reft.model import ReftModel
from subspace_lab.reft.storage import CONFIG, NEXT, WEIGHTS

LINE_COLOUR, PALE = "#2b557e", "#8fb3bd"
WINDOWS = 12  # the smoothed curve is a running mean over a twelfth of the steps
SPREAD = 30  # a loss that falls by more than this is drawn on a logarithmic scale
SHOWN = 160  # characters of a text in the table, at most


@dataclass(frozen=True)
class Finetuned:
    """How a finetuning went.

    Attributes:
        losses: the loss of the training rows at each step that was made.
        before, after: the measurements on the held-out rows with the base model, and with the adapter.
        trained, parameters: the number of trained parameters, and of all parameters.
        rows: {"training": …, "held_out": …, "shortened": …, "repeated": …}, numbers of rows; a repeated row is equal to
            an earlier one.
        samples: (prompt, the row's own answer), one for each of the measured texts.
        classes: of labelled texts; None where rows have answers.
        kept: the step of the lowest held-out loss, whose parameters the adapter has, if the training could end early.
        constant: what the most frequent class of the training rows scores on those held out.
    """

    losses: tuple[float, ...]
    before: Measured
    after: Measured
    trained: int
    parameters: int
    rows: Mapping[str, int]
    samples: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] | None = None
    constant: float | None = None
    kept: int | None = None

    def ended(self, steps: int) -> str:
        """How the training ended, if it did not just make all these steps."""
        n = len(self.losses)
        if self.kept is None:
            return "" if n == steps else f" Interrupted after {n} of {steps} steps."
        return f" The adapter is that of step {self.kept} of {n}, with the lowest held-out loss."

    def accuracies(self) -> tuple[Estimate, Estimate] | None:
        """Before and after, on held-out texts with their classes."""
        if self.before.right is None or self.after.right is None:
            return None
        return proportion(self.before.right), proportion(self.after.right)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        accuracies = self.accuracies()
        texts = zip(self.samples, self.before.texts, self.after.texts, strict=True)
        return {
            "parameters": {"trained": self.trained, "all": self.parameters},
            "rows": dict(self.rows),
            "losses": list(self.losses),
            "held_out": {
                "loss": {"before": self.before.loss, "after": self.after.loss},
                "accuracy": None
                if accuracies is None
                else {"before": vars(accuracies[0]), "after": vars(accuracies[1])},
                "constant": self.constant,
            },
            "classes": None if self.classes is None else dict(enumerate(self.classes)),
            "samples": [
                {"prompt": prompt, "answer": answer, "before": old, "after": new}
                for (prompt, answer), old, new in texts
            ],
        }


def save_adapter(folder: Path, reft: ReftModel) -> Saves:
    """Write the adapter into an empty folder: all its files, or none if there is an error."""
    saves = Saves(folder)
    saves.save((CONFIG, WEIGHTS, "README.md"), lambda: reft.save_pretrained(folder))
    if saves.errors:
        (folder / NEXT).unlink(missing_ok=True)
    return saves


def save_finetuned(saves: Saves, settings: Mapping[str, Any], done: Finetuned) -> None:
    """Write the picture and the numbers into the folder of the adapter; `results.json` comes last."""
    picture, numbers = saves.folder / "loss.png", saves.folder / "results.json"
    saves.save("loss.png", lambda: loss_curve(done, picture, title=_title(settings), steps=settings["steps"]))
    saves.save("results.json", lambda: write_json(numbers, {"settings": dict(settings), **done.as_dict()}))


def loss_curve(done: Finetuned, path: str | Path, *, title: str, steps: int) -> Figure:
    """The training loss by step, thin, and its running mean; the held-out loss before and after as points.

    Args:
        path: of the PNG; it is written under another name first and then renamed.
        steps: the number of steps in the settings.
    """
    losses, n = done.losses, len(done.losses)
    window = max(1, n // WINDOWS)
    # Centred, and shorter at the ends: a mean of past steps alone would lag behind the curve.
    near = [min(window // 2, i, n - 1 - i) for i in range(n)]
    smooth = [_mean(losses[i - reach : i + reach + 1]) for i, reach in enumerate(near)]
    held = [(0, done.before.loss), (n if done.kept is None else done.kept, done.after.loss)]
    points = [(x, y) for x, y in held if y is not None]
    unit = "an answer's token" if done.classes is None else "a text"
    out = f"the points on {done.rows['held_out']} held-out rows" if points else "no rows were held out"
    ended = done.ended(steps)
    caution = "A training loss that goes on falling while the held-out loss has not fallen is memorising."
    figure = new_figure(
        (6.6, 3.7),
        title,
        f"Mean cross-entropy of {unit}, on batches of the {done.rows['training']} training rows; {out}.{ended}",
        caution if points else "It is not known whether the loss has fallen on other rows too.",
    )
    axis = figure.subplots()
    dots = "." if window == 1 else ""  # a single step would give no line
    axis.plot(range(1, n + 1), losses, color=PALE, linewidth=0.8, marker=dots, label="training, each step")
    if window > 1:
        label = f"training, mean over {window // 2 * 2 + 1} steps"
        axis.plot(range(1, n + 1), smooth, color=LINE_COLOUR, linewidth=1.8, label=label)
    if points:
        xs, ys = zip(*points, strict=True)
        axis.scatter(xs, ys, s=36, color=ACCENT, zorder=3, label="held out, before and after", clip_on=False)
        for x, y in points:
            # The curve begins next to the first point, so its number is above both.
            right, up, side = (2, 14, "left") if x == 0 else (0, 8, "right")
            number = axis.annotate(_short(y), (x, y), (right, up), textcoords="offset points", ha=side, fontsize=9)
            number.set(color=ACCENT, zorder=4, path_effects=[withStroke(linewidth=3, foreground="white")])
    every = [*losses, *(y for _, y in points)]
    if min(every) > 0 and max(every) > SPREAD * min(every):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(0, 1.15 * max(every) or 1)
    axis.set_xlim(0, max(n, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training step", fontsize=9, color=INK)
    axis.set_ylabel("cross-entropy (nats)", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, length=2, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")
    save_figure(figure, path)
    return figure


def print_finetuned(saves: Saves, settings: Mapping[str, Any], done: Finetuned) -> None:
    """Print the samples or the accuracy to standard output, followed by remarks that are needed to interpret them."""
    terminal = console()
    terminal.print(printable(_title(settings)), style="bold", markup=False)
    if accuracies := done.accuracies():
        terminal.print(_accuracies(*accuracies, done.constant))
    elif done.samples:
        terminal.print(_samples(done))
    for line in _remarks(saves, settings, done):
        terminal.print(printable(line), markup=False)


def _title(settings: Mapping[str, Any]) -> str:
    rank = "" if settings["method"] == "RED" else f", rank {settings['rank']}"
    layers = "all layers" if settings["layers"] == "all" else f"layers {settings['layers']}"
    return f"{settings['method']}{rank}, {settings['component']} of {layers}, positions {settings['positions']}"


def _samples(done: Finetuned) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_lines=False, leading=1)
    for column in ("prompt", "before", "after", "the row's answer"):
        table.add_column(column, ratio=1, overflow="fold")
    for (prompt, answer), old, new in zip(done.samples, done.before.texts, done.after.texts, strict=True):
        cells = (_shortened(prompt, start=True), *(_shortened(text) for text in (old, new, answer)))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _accuracies(before: Estimate, after: Estimate, constant: float | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"accuracy on {before.n} held-out texts")
    table.add_column("[95 %]", justify="right")
    table.add_row("always the most frequent class", "" if constant is None else f"{constant:.2f}")
    table.add_row("before", str(before))
    table.add_row("after", str(after), style="bold")
    return table


def _remarks(saves: Saves, settings: Mapping[str, Any], done: Finetuned) -> list[str]:
    rows, share = done.rows, 100 * done.trained / done.parameters
    remarks = [
        f"{done.trained:,} parameters are trained, {share:.2g} % of all {done.parameters:,}."
        f"{done.ended(settings['steps'])}"
    ]
    if done.before.loss is not None and done.after.loss is not None:
        remarks.append(
            f"Loss on {rows['held_out']} held-out rows: {_short(done.before.loss)} before, "
            f"{_short(done.after.loss)} after."
        )
    else:
        remarks.append(
            f"Training loss: {_short(done.losses[0])} at the start, {_short(done.losses[-1])} at the end. No "
            "held-out loss, so it is not known whether the loss falls on other rows too."
        )
    if done.kept is not None:
        remarks.append("These rows chose the step, so their loss is a little too low: measure on further rows.")
    if rows["shortened"]:
        remarks.append(f"{rows['shortened']} rows were longer than the model takes and lost their end.")
    if rows.get("repeated"):
        remarks.append(
            f"{rows['repeated']} rows are the same as one before them; all of the same are trained on, or held out."
        )
    if done.classes is not None:
        shown = ", ".join(repr(one) for one in done.classes[:8])
        remarks.append(f"{len(done.classes)} classes: {shown}{' and more' if len(done.classes) > 8 else ''}.")
    accuracies = done.accuracies()
    if accuracies and done.constant is not None and accuracies[1].low <= done.constant:
        remarks.append(
            "The accuracy is not above the constant answer: the held-out texts do not show that anything was learned."
        )
    kind, options = ("CausalLM", "") if done.classes is None else ("SequenceClassification", ", num_labels=")
    options += "" if done.classes is None else str(len(done.classes))
    base = f"AutoModelFor{kind}.from_pretrained(model{options})"
    remarks.append(saves.line())
    if WEIGHTS in saves.written:
        remarks.append(f"Read again by ReftModel.from_pretrained({base}, {str(saves.folder)!r}).")
    return remarks


def _shortened(text: str, *, start: bool = False) -> str:
    """A text in one line. A long text is cut: `start` cuts its beginning (prompts), otherwise its end is cut."""
    line = printable(" ".join(text.split()))
    if len(line) <= SHOWN:
        return line
    return f"…{line[1 - SHOWN :]}" if start else f"{line[: SHOWN - 1]}…"


def _short(loss: float) -> str:
    return f"{loss:.3g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
