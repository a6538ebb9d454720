"""The only training loop: DAS, LoReFT, sweeps and controls all use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from subspace_lab.model.arguments import expect_integer, expect_number
from subspace_lab.model.backbone import Backbone


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training.

    Attributes:
        steps: number of optimiser steps.
        learning_rate: the highest learning rate of AdamW.
        batch_size: rows in one step.
        warmup: share of the steps in which the rate rises from 0.
        schedule: "linear" falls to 0 at the end, "constant" stays.
        weight_decay: of AdamW. The scale of a learned basis has no meaning, so leave it at 0 for those.
        max_gradient_norm: gradients with a larger norm are scaled down to this norm; None for no limit.
        seed: seed of the order of the rows.

    Raises:
        TypeError: text instead of a number, or a fraction instead of a whole number.
        ValueError: a number that makes no sense; the message says which are possible.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    batch_size: int = 32
    warmup: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    max_gradient_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", None)):
            expect_integer(name, getattr(self, name), least)
        for name in ("learning_rate", "warmup", "weight_decay"):
            expect_number(name, getattr(self, name))
        if self.max_gradient_norm is not None:
            expect_number("max_gradient_norm", self.max_gradient_norm)
        if (
            not 0 < self.learning_rate < math.inf
            or not 0 <= self.warmup < 1
            or not 0 <= self.weight_decay < math.inf
        ):
            raise ValueError(
                f"learning_rate={self.learning_rate}, warmup={self.warmup}, weight_decay={self.weight_decay}: "
                "needed are > 0, 0 ≤ warmup < 1 and ≥ 0."
            )
        # A negative norm would reverse the gradients.
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm={self.max_gradient_norm}: needed is > 0, or None.")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"schedule={self.schedule!r}: possible are 'linear' and 'constant'.")

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step; steps are counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising and self.warmup > 0:
            return (step + 1) / rising
        if self.schedule == "constant":
            return 1.0
        return max(0.0, (self.steps - step) / max(1, self.steps - (rising if self.warmup > 0 else 0)))


def train(
    modules: Iterable[nn.Module],
    loss_of: Callable[[int], Tensor | Iterable[Tensor]],
    config: TrainingConfig,
    *,
    on_step: Callable[[int, float], bool | None] | None = None,
) -> list[float]:
    """Minimise `loss_of(step)` over the trainable parameters of the modules with AdamW.

    Gradients are computed for these parameters only; no other `.grad` is changed.

    Args:
        loss_of: the loss of a step, or its parts. The gradients of a part are computed, and its memory is freed, before
            the next part is computed.
        on_step: called after each step with its number and its loss; the training ends early if it returns True.

    Returns:
        The loss at each step that was made.

    Raises:
        TypeError: one module instead of several.
        ValueError: nothing to train.
        FloatingPointError: a loss that is not finite (the modules then have the values of the step before).
    """
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
        raise TypeError(f"several modules are expected, found one: write [{type(modules).__name__}(...)].")
    each = None if on_step is None else lambda step, losses: on_step(step, losses[0])

    def losses_of(step: int) -> Iterator[Tensor]:
        loss = loss_of(step)
        return (part[None] for part in ([loss] if isinstance(loss, Tensor) else loss))

    return train_together([nn.ModuleList(modules)], losses_of, [config], on_step=each)[0]


def train_together(
    modules: Sequence[nn.Module],
    losses_of: Callable[[int], Tensor | Iterable[Tensor]],
    configs: Sequence[TrainingConfig],
    *,
    on_step: Callable[[int, list[float]], bool | None] | None = None,
) -> list[list[float]]:
    """Train K independent modules, each with its own loss and configuration, in one loop.

    Args:
        losses_of: step → (K,) losses, or their parts; the k-th loss depends only on the k-th module's parameters.
        configs: one for each module, all with the same number of steps.

    Returns:
        For each module its loss at each step. Errors as in `train`.
    """
    if len(modules) != len(configs) or len({c.steps for c in configs}) != 1:
        raise ValueError(f"{len(modules)} modules, {len(configs)} configurations: one each, of equal steps.")
    if not torch.is_grad_enabled():
        raise ValueError("Gradients are switched off here (torch.no_grad or inference_mode): train outside of it.")
    groups = [[p for p in m.parameters() if p.requires_grad] for m in modules]
    if not all(groups):
        raise ValueError("Nothing to train: an intervention has no parameter that requires a gradient.")
    parameters = [p for group in groups for p in group]
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": c.weight_decay} for g, c in zip(groups, configs, strict=True)]
    )
    history: list[list[float]] = []
    with in_mode(modules, training=True):
        for step in range(configs[0].steps):
            for group, config in zip(optimizer.param_groups, configs, strict=True):
                group["lr"] = config.learning_rate * config.rate(step)
            losses, gradients = _summed(losses_of(step), parameters, f"at step {step} of {configs[0].steps}")
            history.append(losses)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            for own, config in zip(groups, configs, strict=True):
                if config.max_gradient_norm is not None:
                    nn.utils.clip_grad_norm_(own, config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None and on_step(step, losses) is True:
                break
    return [list(losses) for losses in zip(*history, strict=True)]


def _summed(
    losses: Tensor | Iterable[Tensor], parameters: Sequence[Tensor], where: str
) -> tuple[list[float], list[Tensor | None]]:
    """The losses and their gradients, summed over the parts. FloatingPointError for a loss that is not finite."""
    total: list[float] = []
    summed: list[Tensor | None] = [None] * len(parameters)
    for part in [losses] if isinstance(losses, Tensor) else losses:
        found = part.tolist()
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        if not all(map(math.isfinite, total)):
            raise FloatingPointError(f"The loss is {total} {where}.")
        gradients = torch.autograd.grad(part.sum(), parameters, allow_unused=True)
        summed = [
            new if old is None else old if new is None else old + new
            for old, new in zip(summed, gradients, strict=True)
        ]
    return total, summed


def expect_gradients(backbone: Backbone) -> None:
    """ValueError for a model with 4-bit layers of bitsandbytes that lose the gradient on this CPU.

    At their first run in eval mode such layers pack their weights for an operation that gives no gradients to its
    input, without an error.
    """
    if backbone.device.type != "cpu":
        return
    for path, module in backbone.anatomy.modules.items():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            raise ValueError(
                f"bitsandbytes runs {path} on this CPU in a form that gives no gradients. Before the first run, set "
                "`support_avx512bf16_for_cpu = False` on each such module, or load the model on a GPU."
            )


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Inside the block all parts of the modules are in one mode; afterwards each has its own mode again."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, mode in before:
            part.training = mode


def shuffled_rows(n: int, config: TrainingConfig) -> Iterator[Tensor]:
    """Endless batches of row indices. Every epoch is a new permutation, and its last batch may be shorter."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        yield from torch.randperm(n, generator=generator).split(config.batch_size)


def progress_bar(*, quiet: bool = False) -> Progress:
    """The progress bar of long work, on standard error, so that results can be piped."""
    from rich.console import Console

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=False,
    )
