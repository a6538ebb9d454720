"""The job of classifying texts: edits and head are trained together by plain `transformers.Trainer`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from subspace_lab.engine.training import TrainingConfig, progress_bar
from subspace_lab.reft.data import pad
from subspace_lab.reft.finetune import History, OnStep
from subspace_lab.reft.jobs import Measured, Row, TrainingJob, evaluating, over, pad_token
from subspace_lab.reft.model import ReftModel


class ClassificationJob(TrainingJob):
    """The job of classifying texts: edits and head are trained together by plain `transformers.Trainer`.

    This package's own loop cannot be used: it trains only edits, with a frozen past, but the head changes too.

    Args:
        training, held_out: examples with `text` and `label` (the number of a class).
        tokenizer, longest: as in `GenerationJob`; longer texts lose their end.
    """

    def __init__(
        self, training: Sequence[Row], held_out: Sequence[Row], tokenizer: Any, *, longest: int | None = None
    ) -> None:
        rows = [*training, *held_out]
        tokens = [tokenizer(row["text"]) for row in rows]
        too_long = [] if longest is None else [i for i, t in enumerate(tokens) if len(t["input_ids"]) > longest]
        for i in too_long:
            # The tokenizer cuts the text, so that tokens which it puts at the end of each text are not lost.
            tokens[i] = tokenizer(rows[i]["text"], truncation=True, max_length=longest)
        self.shortened = len(too_long)
        encoded = [self._row(of, row["label"]) for of, row in zip(tokens, rows, strict=True)]
        self.training, self.held_out = encoded[: len(training)], encoded[len(training) :]
        self._pad = pad_token(tokenizer)

    @staticmethod
    def _row(tokens: Mapping[str, Any], label: int) -> dict[str, Any]:
        ids = list(tokens["input_ids"])
        if not ids:
            raise ValueError("The tokenizer gives no tokens for a text.")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}

    def prompt_lengths(self) -> Tensor:
        return torch.tensor([len(row["input_ids"]) for row in [*self.training, *self.held_out]])

    @property
    def constant(self) -> float | None:
        """The share of the held-out texts in the most frequent class of the training texts."""
        if not self.held_out:
            return None
        frequent = int(torch.tensor([row["labels"] for row in self.training]).bincount().argmax())
        return sum(row["labels"] == frequent for row in self.held_out) / len(self.held_out)

    def train(
        self,
        model: ReftModel,
        config: TrainingConfig,
        *,
        patience: int | None = None,
        accumulate: int = 1,
        memory: int | str | None = None,
        on_step: OnStep | None = None,
        quiet: bool = False,
    ) -> History:
        """As `TrainingJob.train`, with `transformers.Trainer`.

        Raises:
            ValueError: a memory budget is given, but nothing is stored; a batch that cannot be split into equal parts;
                `patience` without held-out examples.
            FloatingPointError: a loss that is not finite.
        """
        if memory is not None:
            raise ValueError(f"memory={memory!r}: with a trained head there is no frozen past to store.")
        if config.batch_size % accumulate:
            raise ValueError(f"accumulate={accumulate} does not divide the batch size {config.batch_size}.")
        if patience is not None and not self.held_out:
            raise ValueError(f"patience={patience} needs held-out examples.")
        was_training = model.training
        history = History()
        with tempfile.TemporaryDirectory() as scratch, progress_bar(quiet=quiet) as bar:
            task = bar.add_task("finetune (with its head, by Trainer)", total=config.steps)

            def report(step: int, loss: float) -> None:
                bar.advance(task)
                history.append(loss)
                if on_step is not None:
                    on_step(step, loss)

            trainer = Trainer(
                model=model,
                args=_arguments(config, scratch, model.device, patience is not None, accumulate),
                train_dataset=Dataset.from_list([dict(row) for row in self.training]),
                eval_dataset=Dataset.from_list([dict(row) for row in self.held_out]) if self.held_out else None,
                data_collator=self._collate,
                callbacks=[_Progress(report)],
            )
            if patience is not None:
                trainer.add_callback(EarlyStoppingCallback(patience))
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train()
            finally:
                model.train(was_training)
        logged = trainer.state.log_history
        history.held_out = [(int(row["step"]), row["eval_loss"]) for row in logged if "eval_loss" in row]
        history.kept = len(history)
        if patience is not None:
            history.kept = min(history.held_out, key=lambda one: one[1])[0]
        return history

    def measure(self, model: ReftModel, batch_size: int) -> Measured:
        with evaluating(model):
            loss, logits = over(model, self.held_out, batch_size, self._collate)
        if loss is None:
            return Measured(None)
        found = torch.cat(logits)
        labels = torch.tensor([row["labels"] for row in self.held_out])
        right = (found.argmax(-1) == labels) & ~found.isnan().any(-1)  # argmax treats NaN as the largest
        return Measured(loss, right)

    def _collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return pad(rows, self._pad)


class _Progress(TrainerCallback):
    """Reports the loss of each step, and stops the training if a loss is not finite."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"The loss is {logs['loss']} at step {state.global_step - 1}.")
        self._on_step(state.global_step - 1, float(logs["loss"]))


def _arguments(
    config: TrainingConfig, folder: str, device: torch.device, keep_best: bool, accumulate: int
) -> TrainingArguments:
    """The arguments by which Trainer trains in the same way as `engine.training` with this configuration."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // accumulate,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.learning_rate,
        warmup_steps=round(config.warmup * config.steps),
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm or 0.0,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if keep_best else "no",
        save_strategy="epoch" if keep_best else "no",
        save_total_limit=1,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )


def heads(network: nn.Module, fresh: Sequence[str]) -> tuple[str, ...]:
    """The modules of a classifier that must be trained and saved with the edits.

    These are its head (every module outside of the base model) and all other modules that are missing in the checkpoint
    (for example BERT's pooler): they get random weights that nobody who loads the adapter could reproduce.

    Args:
        fresh: the paths of the modules that are missing in the checkpoint.

    Raises:
        ValueError: no head; or a missing block of the model itself.
    """
    trunk = getattr(network, "base_model_prefix", "")
    outside = [name for name, part in network.named_children() if name != trunk and list(part.parameters())]
    if not outside:
        raise ValueError(f"A {type(network).__name__} has no head outside its base model {trunk!r}.")
    more = [path for path in fresh if path.split(".")[0] not in outside]
    broken = [path for path in more if any(part.isdigit() for part in path.split("."))]
    if broken:
        raise ValueError(
            f"This model's checkpoint holds no weights of {', '.join(broken[:3])}"
            f"{' and more' if len(broken) > 3 else ''}: it is not one of a {type(network).__name__}."
        )
    return (*outside, *more)
