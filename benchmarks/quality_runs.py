"""What the parts of the quality benchmark share: one training loop, runs that are kept, and bits on disk."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import clock, machine, wait
from torch import Tensor, nn

from subspace_lab.core.files import write_text
from subspace_lab.engine.training import TrainingConfig


class NotKept(Exception):
    """A run that has not been done."""


class Kept:
    """Finished runs, one JSON line each in a file beside the figures, so that one that was stopped goes on.

    A run counts as finished only if all its settings are the same, versions of the packages included.

    Args:
        only: do no runs, and raise `NotKept` for those that are missing.
    """

    def __init__(self, path: Path | None, device: str, only: bool = False) -> None:
        self.path, self.machine, self.only = path, machine(device), only
        self.lines = [] if path is None or not path.exists() else path.read_text().splitlines()
        self.found = {json.dumps(r["settings"], sort_keys=True): r["figures"] for r in map(json.loads, self.lines)}

    def once(self, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a run: those kept, or fresh ones, which are kept at once."""
        whole = json.loads(json.dumps({**settings, "machine": self.machine}))
        key = json.dumps(whole, sort_keys=True)
        if key not in self.found:
            if self.only:
                raise NotKept(key)
            figures = json.loads(json.dumps(run()))
            self.found[key] = figures
            self.lines.append(json.dumps({"settings": whole, "figures": figures}))
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, "\n".join(self.lines) + "\n")
        return self.found[key]


def batches_by_length(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches of rows of like length without end: an epoch is a fresh permutation, sorted, cut and shuffled."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = sorted(torch.randperm(len(lengths), generator=generator).tolist(), key=lambda i: lengths[i])
        cut = [rows[i : i + size] for i in range(0, len(rows), size)]
        for i in torch.randperm(len(cut), generator=generator).tolist():
            yield cut[i]


def train(
    loss_of: Callable[[int], Tensor], groups: Sequence[tuple[list[nn.Parameter], float]], config: TrainingConfig
) -> dict[str, float]:
    """AdamW over groups of (parameters, rate), whose rates rise and fall together; the same for every method."""
    groups = [(parameters, rate) for parameters, rate in groups if parameters]
    optimizer = torch.optim.AdamW([{"params": p} for p, _ in groups], weight_decay=config.weight_decay)
    trained = [p for parameters, _ in groups for p in parameters]
    device = str(trained[0].device)
    losses = []
    wait(device)
    start = clock(device)
    for step in range(config.steps):
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * config.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        if config.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
    wait(device)
    tail = losses[-8:]
    return {"seconds": clock(device) - start, "first_loss": losses[0], "last_loss": sum(tail) / len(tail)}


def bytes_on_disk(save: Callable[[Path], Any]) -> int:
    """Size of what a library writes for a tuned model; model cards, which are for people, do not count."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file() and f.suffix != ".md")


def freed() -> None:
    """Give back the memory of the run before, so that the next one starts as the first did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def paired_interval(one: Tensor, other: Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean difference of two (seeds, rows) tables of scores, and the 95 % interval over resampled rows.

    Rows are resampled with all their seeds, so the interval says how far other test rows could move the difference
    of these trained models; how far other seeds could, only the differences seed by seed show.
    """
    difference = (one.double() - other.double()).mean(0)
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [
            difference[torch.randint(len(difference), (len(difference),), generator=generator)].mean()
            for _ in range(draws)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high
