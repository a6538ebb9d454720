"""Training an adapter with a frozen past, in this package's own loop: the fastest way if it can be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import instance
from subspace_lab.engine.training import TrainingConfig, in_mode, progress_bar, shuffled_rows, train
from subspace_lab.model.arguments import expect_integer
from subspace_lab.model.edits import Edits
from subspace_lab.reft._past import Answers, AnswersPast, AnswersTrained
from subspace_lab.reft.data import tokenised
from subspace_lab.reft.model import ReftModel

OnStep = Callable[[int, float], bool | None]


class History(list[float]):
    """The loss of each step, as a list.

    Attributes:
        held_out: (steps made, held-out loss) of each evaluation; the first is before the first step. Empty without
            held-out examples.
        kept: the step after which the adapter had the parameters that it has now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_out: list[tuple[int, float]] = []
        self.kept = 0


class FinetuneInterrupted(KeyboardInterrupt):
    """A training that was interrupted. `history` has the losses until then, and which parameters are kept."""

    def __init__(self, history: History) -> None:
        super().__init__(f"interrupted after {len(history)} steps; the adapter is that of step {history.kept}")
        self.history = history


def finetune(
    model: ReftModel,
    examples: Iterable[Mapping[str, Any]],
    config: TrainingConfig | None = None,
    *,
    epochs: int | None = None,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    patience: int | None = None,
    evaluate_every: int | None = None,
    accumulate: int = 1,
    memory: int | str | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
) -> History:
    """Train the active adapters on tokenised prompts and answers (`reft.data.tokenise`).

    The loss is the mean cross-entropy over the answers' tokens. Layers below the lowest edit, and tokens before the
    first edit, are computed once in the whole training; only the answers' positions go through the head.

    Parameters of the base model whose `requires_grad` was set again after wrapping (such as those of a LoRA) are
    trained by the same call; then nothing is computed once. They are not part of the adapter, so `save_pretrained`
    does not save them.

    Args:
        epochs: how often each example is seen; it replaces `config.steps`.
        held_out: tokenised examples to evaluate on, before the first step, at every evaluation, and at the end.
        patience: end the training after this many evaluations in a row without a new lowest held-out loss. The adapter
            then has the parameters of the lowest one, also if the training went to its end.
        evaluate_every: steps between two evaluations; by default those of one epoch.
        accumulate: in how many parts the rows of a step are computed. Their gradients are added, so that the step is
            the same, up to rounding, and needs less memory.
        memory: the memory budget of the frozen past, as in `FrozenPast`.
        quiet: show no progress bar.
        on_step: called with the number and the loss of each step; the training ends early if it returns True.

    Returns:
        The loss at each step, with the held-out losses.

    Raises:
        TypeError: a model that is not a `ReftModel`; examples or a configuration of another type.
        ValueError: examples that are not tokenised, have no prompt or no answer, or do not fit the model; a model that
            does not write answers (train a classifier with Trainer); an adapter with `modules_to_save`
            (train it with Trainer); `patience` or `evaluate_every` without held-out examples; numbers below 1.
        FloatingPointError: a loss that is not finite.
        FinetuneInterrupted: Ctrl-C. Then, and after any other error, the adapter has the parameters of the last step,
            or with `patience` those of the lowest held-out loss so far.
    """
    instance(config, (TrainingConfig, type(None)), "config", "TrainingConfig(…)")
    config = config or TrainingConfig()
    instance(model, ReftModel, "model", "get_reft_model(model, config) makes one")
    _expect_numbers(epochs, patience, evaluate_every, accumulate, held_out is not None)
    examples, others = tokenised(examples), None if held_out is None else tokenised(held_out, "held-out examples")
    edits = model.edits()
    if not edits:
        raise ValueError("No active adapter, or a merged one: nothing would be trained.")
    if any(model.adapter(name).config.modules_to_save for name in model.active_adapters):
        raise ValueError("This loop trains only edits; train modules_to_save with transformers.Trainer.")
    own = model.trained_base_parameters()
    trained = [*edits.values(), *([nn.ParameterList(own.values())] if own else [])]
    answers = answers_of(model, examples, memory)
    if epochs is not None:
        config = replace(config, steps=epochs * -(-len(answers) // config.batch_size))
    history = History()
    evaluation = None
    if others is not None:
        every = evaluate_every or -(-len(answers) // config.batch_size)
        evaluation = Evaluation(
            answers_of(model, others, memory), edits, trained, config, every, patience, history
        )

    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(f"finetune ({answers.describe()})", total=config.steps)

        def report(step: int, loss: float) -> bool:
            bar.advance(task)
            history.append(loss)
            history.kept = step + 1
            ended = on_step is not None and on_step(step, loss) is True
            if evaluation is not None and evaluation.due(step + 1, ended):
                ended |= evaluation.measure(step + 1)
                bar.update(task, description=f"finetune (held-out loss {history.held_out[-1][1]:.3g})")
            return ended

        if evaluation is not None:
            evaluation.measure(0)
        try:
            train(trained, steps_of(answers, edits, config, accumulate), config, on_step=report)
        except KeyboardInterrupt:
            raise FinetuneInterrupted(history) from None
        finally:
            if evaluation is not None and patience is not None:
                evaluation.restore()
    return history


def answers_of(model: ReftModel, examples: Sequence[Mapping[str, Any]], memory: int | str | None) -> Answers:
    """The examples under the model with its edits: with a frozen past, if no parameter of the base model is trained."""
    model.expect_columns(examples)
    edits, whole = model.edits(), model.edits_every_token()
    if not model.trained_base_parameters():
        return AnswersPast(model.backbone, examples, edits, every_token=whole, memory=memory)
    model.name_unsaved()
    return AnswersTrained(model.backbone, examples, edits, model, every_token=whole)


def steps_of(
    answers: Answers, edits: Edits, config: TrainingConfig, accumulate: int = 1
) -> Callable[[int], Tensor | Iterator[Tensor]]:
    """The loss of each step, or its parts if gradients are accumulated."""
    order = shuffled_rows(len(answers), config)

    def loss_of(_: int) -> Tensor | Iterator[Tensor]:
        rows = next(order)
        if accumulate == 1:
            return answers.loss(rows, edits)[0]
        items = answers.tokens(rows)
        return (answers.loss(part, edits, items)[0] for part in rows.chunk(accumulate))

    return loss_of


class Evaluation:
    """Measures held-out examples during a training, and remembers the parameters of the lowest loss.

    Args:
        answers: the held-out examples.
        edits: what is trained at the sites of the model.
        trained: all modules that are trained.
        every: steps between two evaluations.
        patience: evaluations in a row without a new lowest loss, after which the training ends.
        history: receives the losses.
    """

    def __init__(
        self,
        answers: Answers,
        edits: Edits,
        trained: list[nn.Module],
        config: TrainingConfig,
        every: int,
        patience: int | None,
        history: History,
    ) -> None:
        self._answers, self._edits, self._config, self._history = answers, edits, config, history
        self._every, self._patience = every, patience
        self._tensors = [t for m in trained for t in [*m.parameters(), *m.buffers()]]
        self._best: list[Tensor] = []
        self._lowest, self._since = (0, float("inf")), 0

    def due(self, steps: int, ended: bool) -> bool:
        """Whether it is time to evaluate after this many steps."""
        return ended or steps % self._every == 0 or steps == self._config.steps

    def measure(self, steps: int) -> bool:
        """Evaluate after this many steps; whether the training should end."""
        with in_mode(self._edits.values(), training=False):  # type: ignore[arg-type]
            loss = float(self._answers.token_losses(self._edits, self._config.batch_size)[0].mean())
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss on the held-out examples is {loss} after {steps} steps.")
        self._history.held_out.append((steps, loss))
        if loss < self._lowest[1]:
            self._lowest, self._since = (steps, loss), 0
            if self._patience is not None:
                self._best = [t.detach().clone() for t in self._tensors]
        else:
            self._since += 1
        return self._patience is not None and self._since >= self._patience

    def restore(self) -> None:
        """Give the trained modules the parameters that they had at the lowest loss."""
        with torch.no_grad():
            for tensor, best in zip(self._tensors, self._best, strict=True):
                tensor.copy_(best)
        self._history.kept = self._lowest[0]


def _expect_numbers(
    epochs: int | None, patience: int | None, evaluate_every: int | None, accumulate: int, evaluated: bool
) -> None:
    given = {"epochs": epochs, "patience": patience, "evaluate_every": evaluate_every, "accumulate": accumulate}
    for name, value in given.items():
        if value is not None:
            expect_integer(name, value)
    for name in ("patience", "evaluate_every"):
        if given[name] is not None and not evaluated:
            raise ValueError(f"{name}={given[name]} needs held-out examples: give held_out=tokenise(…).")
