"""Training an adapter with a frozen past, in this package's own loop: the fastest way if it can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from subspace_lab.core.arguments import instance
from subspace_lab.engine.training import TrainingConfig, progress_bar, shuffled_rows, train
from subspace_lab.reft._past import AnswersPast
from subspace_lab.reft.model import ReftModel


def finetune(
    model: ReftModel,
    examples: Iterable[Mapping[str, Any]],
    config: TrainingConfig | None = None,
    *,
    memory: int | str | None = None,
    quiet: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the active adapters on tokenised prompts and answers (`reft.data.tokenise`).

    The loss is the mean cross-entropy over the answers' tokens. Layers below the lowest edit, and tokens before the
    first edit, are computed once in the whole training; only the answers' positions go through the head.

    Args:
        memory: the memory budget of the frozen past, as in `FrozenPast`.
        quiet: show no progress bar.
        on_step: called with the number and the loss of each step.

    Returns:
        The loss at each step.

    Raises:
        TypeError: a model that is not a `ReftModel`.
        ValueError: examples that are not tokenised or have no prompt or no answer; an adapter with
            `modules_to_save` (train it with Trainer).
    """
    config = config or TrainingConfig()
    instance(model, ReftModel, "model", "get_reft_model(model, config) makes one")
    examples = list(examples)
    if examples and "input_ids" not in examples[0]:
        raise ValueError(
            f"The examples have {sorted(examples[0])} and no input_ids: make them with tokenise(examples, tokenizer)."
        )
    edits = model.edits()
    if not edits:
        raise ValueError("No active adapter: nothing would be trained.")
    if any(model.adapter(name).config.modules_to_save for name in model.active_adapters):
        raise ValueError("This loop trains only edits; train modules_to_save with transformers.Trainer.")
    whole = model.edits_every_token()
    past = AnswersPast(model.backbone, examples, edits, every_token=whole, memory=memory)
    order = shuffled_rows(len(past), config)

    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(f"finetune ({past.past.describe()})", total=config.steps)

        def report(step: int, loss: float) -> None:
            bar.advance(task)
            if on_step is not None:
                on_step(step, loss)

        return train(edits.values(), lambda _: past.loss(next(order), edits)[0], config, on_step=report)
