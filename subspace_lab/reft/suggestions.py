"""The settings that `suggest` tried, as a value that prints, and the setting that it suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from subspace_lab.core.estimates import Estimate
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft.config import ReftConfig

FEW = 20  # with fewer held-out rows than this an interval over rows is rough


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        config: the adapter.
        training: how it was trained; of the learning rates that were tried, the one with the lowest held-out loss.
        parameters: how many are trained.
        loss: the mean cross-entropy over the answers' tokens of the held-out rows; NaN if no rate gave a finite loss.
        behind: how much higher this loss is than the lowest one, paired over the held-out rows.
        seconds: of the training with this rate, the computation of the past included.
        mergeable: whether the adapter can be merged into the weights of this model.
    """

    config: ReftConfig
    training: TrainingConfig
    parameters: int
    loss: Estimate
    behind: Estimate
    seconds: float
    mergeable: bool

    @property
    def tied(self) -> bool:
        """Whether it cannot be told apart from the setting with the lowest loss: the interval reaches 0."""
        return self.behind.low <= 0

    def __str__(self) -> str:
        config = self.config
        layers = "all layers" if config.layers == "all" else f"layer {', '.join(map(str, config.layers))}"
        if config.heads:
            layers = ", ".join(f"layer {i} heads {','.join(map(str, of))}" for i, of in config.heads)  # type: ignore[misc]
        place = layers if config.component == "block_output" else f"{config.component} of {layers}"
        rank = "" if config.method == "RED" else f" rank {config.rank}"
        return f"{config.method}{rank}, {place}, {'every token' if config.every_token else config.positions}"


@dataclass(frozen=True)
class Suggestion:
    """The settings that were tried, from the lowest held-out loss to the highest.

    Attributes:
        trials: one for each setting.
        untrained: the held-out loss of the model without edits.
        gain: how much lower the lowest loss is, paired over the held-out rows.
        training_rows, held_out_rows: the numbers of the rows on which the adapters were trained, and measured.
    """

    trials: tuple[Trial, ...]
    untrained: Estimate
    gain: Estimate
    training_rows: tuple[int, ...]
    held_out_rows: tuple[int, ...]

    @property
    def chosen(self) -> Trial:
        """The smallest setting (parameters, then seconds) that cannot be told apart from the one of the lowest loss."""
        return min((t for t in self.trials if t.tied), key=lambda t: (t.parameters, t.seconds))

    @property
    def best(self) -> ReftConfig:
        """The configuration of the chosen setting."""
        return self.chosen.config

    @property
    def learning_rate(self) -> float:
        """The learning rate of the chosen setting."""
        return self.chosen.training.learning_rate

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each setting, for JSON or pandas."""
        return [
            {
                "setting": str(t),
                "config": t.config.as_dict(),
                "learning_rate": t.training.learning_rate,
                "parameters": t.parameters,
                "loss": _finite(vars(t.loss)),
                "behind": _finite(vars(t.behind)),
                "seconds": t.seconds,
                "mergeable": t.mergeable,
                "tied": t.tied,
                "chosen": t is self.chosen,
            }
            for t in self.trials
        ]

    def table(self) -> Table:
        """The table for the terminal."""
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("setting")
        for name in ("rate", "parameters", "held-out\nloss", "above the lowest\n[95 %]", "s", "can be\nmerged"):
            table.add_column(name, justify="right")
        for t in self.trials:
            mark = " *" if t is self.chosen else " ≈" if t.tied else ""
            loss = "not finite" if math.isnan(t.loss.value) else f"{t.loss.value:.3g}"
            cells = (f"{t.training.learning_rate:g}", f"{t.parameters:,}", loss, _difference(t.behind))
            more = (f"{t.seconds:.1f}", "yes" if t.mergeable else "no")
            table.add_row(f"{t}{mark}", *cells, *more, style="bold" if t is self.chosen else None)
        table.add_row("the model without edits", "", "", f"{self.untrained.value:.3g}", _difference(self.gain))
        return table

    def notes(self) -> list[str]:
        """What is needed to read the table."""
        n, training = len(self.held_out_rows), self.trials[0].training
        notes = [
            f"Each setting made {training.steps} steps of {training.batch_size} rows, on {len(self.training_rows)} "
            f"rows, and was measured on {n} others. Seeds: {training.seed} of rows and order, "
            f"{self.trials[0].config.seed} of the random starts."
        ]
        tied = [t for t in self.trials if t.tied]
        if len(tied) > 1:
            first = self.trials[: len(tied)] == tuple(tied)
            which = f"The first {len(tied)} settings" if first else f"The {len(tied)} settings marked * and ≈"
            notes.append(
                f"{which} cannot be told apart on {n} held-out rows (the interval of the difference contains 0); the "
                "smallest is taken (*): the fewest parameters, then the least time."
            )
        elif len(self.trials) > 1:
            notes.append(f"The first setting (*) is better than each of the others on {n} held-out rows.")
        if self.gain.low <= 0:
            notes.append(
                "No setting is better than the model without edits: try more steps, other learning rates, or more rows."
            )
        few = f" Intervals over {n} rows are rough." if n < FEW else ""
        notes.append(
            "The intervals are about other rows, not about other seeds or longer trainings. The rows chose the "
            f"setting, so its loss here is a little too low: measure the trained adapter on further rows.{few}"
        )
        return notes

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip() + "\n\n" + "\n".join(self.notes())


def _difference(of: Estimate) -> str:
    if math.isnan(of.value):
        return ""
    if of.value == of.low == of.high == 0:
        return "0"
    return f"{of.value:+.3f} [{of.low:+.3f}, {of.high:+.3f}]"


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
