"""`subspace-lab finetune --suggest`: the settings that are tried before the training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace_lab.engine.training import TrainingConfig
    from subspace_lab.reft.config import ReftConfig
    from subspace_lab.reft.jobs import TrainingJob
else:  # names in annotations must exist at run time too, but importing these takes seconds
    TrainingConfig = ReftConfig = TrainingJob = Any

STEPS, FASTER = 50, 5.0  # steps of each setting, at most; the second learning rate is this many times the first
CHOSEN = ("positions", "layers", "rank", "component", "every_token", "bias")  # what the suggestion decides


def suggested(
    network: Any, job: TrainingJob, config: ReftConfig, training: TrainingConfig, memory: str | None
) -> tuple[ReftConfig, TrainingConfig, list[dict[str, Any]]]:
    """Print the table of the settings, and return the suggested one, how to train it, and the table for JSON.

    Only the training rows are used, so that the held-out rows are new to the suggested setting.
    """
    from subspace_lab.analysis.plots.canvas import console
    from subspace_lab.reft.suggesting import suggest

    rates = [training.learning_rate, FASTER * training.learning_rate]
    short = replace(training, steps=min(STEPS, training.steps))
    found = suggest(network, job.training, config, training=short, learning_rates=rates, memory=memory)
    terminal = console()
    terminal.print(found.table())
    for note in found.notes():
        terminal.print(note, markup=False)
    chosen = found.chosen
    terminal.print(f"Training goes on with {chosen} at the rate {found.learning_rate:g}.", markup=False)
    return found.best, replace(training, learning_rate=found.learning_rate), found.records()
