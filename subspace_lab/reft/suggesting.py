"""Which adapter suits a task: a handful of settings, each trained for a few steps and measured on held-out rows."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import instance
from subspace_lab.core.estimates import Clusters, Estimate, cluster_mean
from subspace_lab.engine.training import TrainingConfig, in_mode, progress_bar, train
from subspace_lab.model.arguments import expect_integer
from subspace_lab.model.backbone import Backbone
from subspace_lab.reft._adapters import adapter_sites
from subspace_lab.reft._past import AnswersPast
from subspace_lab.reft._wrapper import Wrapper
from subspace_lab.reft.config import MAPPED, ReftConfig
from subspace_lab.reft.data import tokenised
from subspace_lab.reft.datafiles import split_rows
from subspace_lab.reft.finetune import steps_of
from subspace_lab.reft.merging import refuse_adapter
from subspace_lab.reft.model import get_reft_model
from subspace_lab.reft.suggestions import Suggestion, Trial

RATES = (4e-3, 2e-2)
MOST_HELD_OUT = 200
NAN = Estimate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class _Run:
    """One training: the losses of the held-out tokens, and its facts."""

    config: ReftConfig
    training: TrainingConfig
    parameters: int
    losses: Tensor | None  # None if the training did not give finite numbers
    seconds: float
    mergeable: bool


def suggest(
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    config: ReftConfig | None = None,
    *,
    settings: Sequence[ReftConfig] | None = None,
    training: TrainingConfig | None = None,
    learning_rates: Sequence[float] = RATES,
    held_out: int | None = None,
    memory: int | str | None = None,
    quiet: bool = False,
) -> Suggestion:
    """Try a handful of settings of an adapter for a few steps each, and suggest one.

    Each setting is trained by `finetune` on one part of the rows and measured on the other. The suggested one is the
    smallest that cannot be told apart from the one with the lowest held-out loss: the interval of the difference,
    paired over the held-out rows, contains 0. The model is left as it was, bit for bit, also after an error.

    Args:
        model: the base model.
        rows: tokenised prompts and answers, as `reft.data.tokenise` returns them.
        config: the setting that is tried first; the others vary its positions, layers, rank and component.
        settings: the settings to try, instead of the usual ones.
        training: 50 steps of 16 rows by default. Its seed also decides which rows are held out. Its learning rate is
            not used.
        learning_rates: each setting is trained with each of them, and the one with the lower held-out loss counts.
        held_out: how many rows to measure on; by default a quarter, at most 200. Equal rows are on the same side.
        memory: the memory budget of the frozen past, as in `FrozenPast`.
        quiet: show no progress bar.

    Returns:
        The settings with their held-out losses; `print` shows them, and `best` is the suggested `ReftConfig`.

    Raises:
        TypeError: a model that is wrapped already; settings that are not `ReftConfig`.
        ValueError, IndexError, KeyError: rows that are not tokenised, or too few to hold out any; no setting; settings
            that do not fit the model or the prompts, or with `modules_to_save`; no learning rate.
        FloatingPointError: no setting gives a finite loss.
    """
    if isinstance(model, Wrapper):
        raise TypeError("This model has ReFT adapters already: suggest needs the base model, `model.unload()`.")
    instance(model, nn.Module, "model", "the base model itself")
    instance(config, (ReftConfig, type(None)), "config", "ReftConfig(…)")
    instance(training, (TrainingConfig, type(None)), "training", "TrainingConfig(…)")
    instance(learning_rates, (list, tuple), "learning_rates", "a list of rates")
    if config is not None and settings is not None:
        raise ValueError("config is where the usual settings start, settings replace them: give one of the two.")
    listed = tokenised(rows)
    training = training or TrainingConfig(steps=50, batch_size=16)
    rates = [replace(training, learning_rate=rate) for rate in learning_rates]
    kept, out = _split(listed, held_out, training)
    backbone = Backbone(model)
    tried = usual_settings(backbone, config or ReftConfig()) if settings is None else _several(settings)
    if not rates or not tried:
        raise ValueError(f"{len(tried)} settings and {len(rates)} learning rates: at least one of each is needed.")
    lengths = torch.tensor([sum(label == -100 for label in listed[i]["labels"]) for i in (*kept, *out)])
    for one in tried:
        _refuse(one, backbone, lengths)
    parts = [listed[i] for i in kept], [listed[i] for i in out]
    with _as_it_was(model, training.seed), progress_bar(quiet=quiet) as bar:
        task = bar.add_task("suggest", total=len(tried) * len(rates) * training.steps)
        runs: list[_Run] = []
        untrained: tuple[Tensor, Tensor] | None = None
        for i, one in enumerate(tried):
            bar.update(task, description=f"suggest: setting {i + 1} of {len(tried)}")
            setting = _Setting(model, one, *parts, memory)
            untrained = untrained or setting.untrained(training.batch_size)
            if not bool(untrained[0].isfinite().all()):
                raise FloatingPointError("The loss of the model itself is not finite on the held-out rows.")
            runs.append(min((setting.run(rate, lambda: bar.advance(task)) for rate in rates), key=_level))
            del setting  # its past, before the next one is computed
    assert untrained is not None
    return _suggestion(runs, untrained, (kept, out))


def usual_settings(backbone: Backbone, config: ReftConfig) -> list[ReftConfig]:
    """The given setting, and those settings near it that the model can have.

    They vary the positions, the layers and the rank, and end with two that can be merged into weights: every token at
    `mlp_output`, without b.
    """
    depth = backbone.anatomy.depth(config.component.rpartition(".")[0])
    middle, third, two_thirds = depth // 2, depth // 3, 2 * depth // 3
    stack = config.component.rpartition(".")[0]
    merged = {
        "component": f"{stack}.mlp_output" if stack else "mlp_output",
        "positions": "all",
        "every_token": True,
        "bias": config.method not in (*MAPPED, "RED"),
        "tied": "all",
    }
    changes: list[dict[str, Any]] = [
        {},
        {"rank": 1},
        {"rank": 4 * config.rank},
        {"layers": (middle,)},
        {"positions": "last", "every_token": False},
        {"positions": "last", "every_token": False, "layers": (middle,)},
        {"positions": "all"},
        merged,
        {**merged, "layers": tuple(dict.fromkeys((third, two_thirds)))},
    ]
    found = [config]
    for change in changes[1:]:
        try:
            near = replace(config, **change)
            adapter_sites(near, backbone)
        except (ValueError, IndexError):
            continue
        rankless = config.method == "RED" and "rank" in change
        if near not in found and not rankless:
            found.append(near)
    return found


class _Setting:
    """A model with one untrained adapter, and the rows to train it on and to measure it on."""

    def __init__(
        self,
        model: nn.Module,
        config: ReftConfig,
        training: Sequence[Mapping[str, Any]],
        held_out: Sequence[Mapping[str, Any]],
        memory: int | str | None,
    ) -> None:
        began = time.perf_counter()
        self._reft = get_reft_model(model, config)
        self._reft.expect_columns(training)
        self._start = self._reft.edits()
        backbone, whole = self._reft.backbone, self._reft.edits_every_token()
        self._answers = AnswersPast(backbone, training, self._start, every_token=whole, memory=memory)
        self._seconds = time.perf_counter() - began
        self._held_out = AnswersPast(backbone, held_out, self._start, every_token=whole, memory=memory)
        self._config = config

    def untrained(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The losses of the held-out tokens without edits, and the number of each token's row."""
        plain = self._held_out.past.plain
        return self._held_out.token_losses({}, batch_size, lambda rows: plain.logits(rows, {}))

    def run(self, training: TrainingConfig, on_step: Any) -> _Run:
        """Train a fresh copy of the adapter, as `finetune` does, and measure it."""
        edits = {site: copy.deepcopy(edit) for site, edit in self._start.items()}
        parameters = sum(p.numel() for edit in edits.values() for p in edit.parameters() if p.requires_grad)
        torch.manual_seed(training.seed)  # of dropout; the generators' states are given back
        began = time.perf_counter()
        losses: Tensor | None = None
        try:
            steps = steps_of(self._answers, edits, training)
            train(edits.values(), steps, training, on_step=lambda *_: on_step())
            seconds = self._seconds + time.perf_counter() - began
            with in_mode(edits.values(), training=False):
                losses, _ = self._held_out.token_losses(edits, training.batch_size)
        except FloatingPointError:
            seconds = self._seconds + time.perf_counter() - began
        if losses is not None and not bool(losses.isfinite().all()):
            losses = None
        return _Run(self._config, training, parameters, losses, seconds, self._can_merge(edits))

    def _can_merge(self, edits: Mapping[Any, nn.Module]) -> bool:
        adapter = self._reft.adapter("default")
        before = adapter.edits
        try:
            adapter.edits = nn.ModuleList(edits.values()).eval()
            refuse_adapter(self._reft.backbone, adapter)
        except ValueError:
            return False
        finally:
            adapter.edits = before
        return True


def _suggestion(
    runs: Sequence[_Run], untrained: tuple[Tensor, Tensor], rows: tuple[Sequence[int], Sequence[int]]
) -> Suggestion:
    """The runs with intervals over held-out rows, in the order of their losses.

    Args:
        untrained: the losses of the held-out tokens without edits, and the number of each token's row.
        rows: the numbers of the rows of training, and of those held out.
    """
    ordered = sorted(runs, key=_level)
    lowest = ordered[0].losses
    if lowest is None:
        rates = sorted({run.training.learning_rate for run in runs})
        raise FloatingPointError(f"No setting gave a finite loss at the learning rates {rates}: try lower ones.")
    clusters = Clusters(("row",), (untrained[1],))

    def mean(losses: Tensor | None) -> Estimate:
        return NAN if losses is None else replace(cluster_mean(losses, clusters), n=len(rows[1]))

    def behind(run: _Run) -> Estimate:
        if run is ordered[0]:  # a column of zeros would be taken for a share, which has an interval
            return Estimate(0.0, 0.0, 0.0, len(rows[1]))
        return mean(None if run.losses is None else run.losses - lowest)

    trials = [
        Trial(
            run.config,
            run.training,
            run.parameters,
            mean(run.losses),
            behind(run),
            run.seconds,
            run.mergeable,
        )
        for run in ordered
    ]
    return Suggestion(
        tuple(trials), mean(untrained[0]), mean(untrained[0] - lowest), tuple(rows[0]), tuple(rows[1])
    )


def _level(run: _Run) -> float:
    return math.inf if run.losses is None else float(run.losses.mean())


@contextmanager
def _as_it_was(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside the block the model is in eval mode; afterwards modes, gradient flags and random numbers are as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), in_mode([model], training=False):
            torch.manual_seed(seed)
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _split(
    rows: Sequence[Mapping[str, Any]], held_out: int | None, training: TrainingConfig
) -> tuple[list[int], list[int]]:
    """(numbers of the rows to train on, of those to measure on)."""
    if held_out is not None:
        expect_integer("held_out", held_out)
    count = held_out if held_out is not None else min(MOST_HELD_OUT, max(1, len(rows) // 4))
    if count >= len(rows):
        raise ValueError(
            f"{len(rows)} rows are too few to hold out {count} and to train on others: at least {count + 1} are needed."
        )
    keys: list[Hashable] = [tuple(row["input_ids"]) for row in rows]
    kept, out = split_rows(keys, count, training.seed)
    if not out or not kept:
        raise ValueError(f"All {len(rows)} rows are the same: each held-out row would be trained on as well.")
    most = training.steps * training.batch_size
    if len(kept) > most:  # what is not trained on needs no past
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(training.seed))
        kept = sorted(kept[i] for i in order[:most].tolist())
    return kept, out


def _several(settings: Sequence[ReftConfig]) -> list[ReftConfig]:
    instance(settings, (list, tuple), "settings", "a list of ReftConfig")
    for i, one in enumerate(settings):
        instance(one, ReftConfig, f"settings[{i}]")
    return list(settings)


def _refuse(config: ReftConfig, backbone: Backbone, lengths: Tensor) -> None:
    """The errors of a setting that this model or these prompts cannot have."""
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={list(config.modules_to_save)}: suggest tries edits alone, with a frozen past."
        )
    adapter_sites(config, backbone)
    if not config.every_token:
        config.expect_positions(lengths)
