"""Counterfactual pairs made ready for many interventions: a run over the bases, the states of the sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.das.encoding import Counterfactuals
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine
from subspace_lab.engine.stacking import Stack, rows_of
from subspace_lab.engine.training import TrainingConfig, shuffled_rows, train_together
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect

CHUNK = 64
SMALL_BATCH = 2**16  # numbers


@dataclass(frozen=True)
class PreparedPairs:
    """PreparedPairs under a model.

    Attributes:
        run: over the bases.
        states: {site: states of the sources, or {variable: states} where there are several variables}.
        data: the pairs.
    """

    engine: Engine
    states: dict[Site, Any]
    data: Counterfactuals

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        data: Counterfactuals,
        sites: Sequence[Site],
        *,
        memory: int | str | None = None,
        frozen: bool = True,
    ) -> PreparedPairs:
        """One pass over the bases and one over the sources, for all sites.

        Args:
            memory: budget of the frozen past.
            frozen: keep the past; without, every run is a plain one.
        """
        data = data.to(backbone.device)
        engine: Engine = (
            FrozenPast(backbone, data.base, sites, data.readout, memory=memory)
            if frozen
            else PlainEngine(backbone, data.base, data.readout)
        )
        return cls(engine, source_states(backbone, data, sites), data)

    def __len__(self) -> int:
        return len(self.data)

    def answers(self, site: Site, edits: Sequence[Intervention]) -> Tensor:
        """(edits, pairs): the answers given with each of several interventions at a site, in one run."""
        given = []
        stack = Stack(edits)
        with torch.no_grad():
            for rows in torch.arange(len(self)).split(max(1, _chunk(self.data) // len(edits))):
                again = rows.repeat(len(edits))
                states = rows_of(self.states[site], again)
                logits = self.engine.logits(again, {site: stack}, {site: states})
                picked = one_read(logits).argmax(-1).cpu()
                given.append(rearrange(picked, "(edit row) -> edit row", edit=len(edits)))
        return torch.cat(given, 1)

    def correct(self, site: Site, edits: Sequence[Intervention]) -> Tensor:
        """(edits, pairs): whether the answer is the one that the causal model expects."""
        return self.answers(site, edits) == self.data.answer.cpu()

    def unedited(self) -> Tensor:
        """(pairs,): the answers that the model gives to the bases."""
        parts = torch.arange(len(self)).split(_chunk(self.data))
        with torch.no_grad():
            return torch.cat([one_read(self.engine.logits(rows, {})).argmax(-1).cpu() for rows in parts])


Draw = Callable[[int], tuple[Engine, Tensor, Any, Tensor]]
"""step → (engine, rows, states of their sources, expected answers)"""


def fit(
    edits: Sequence[Intervention],
    site: Site,
    draws: Sequence[Draw],
    configs: Sequence[TrainingConfig],
    on_step: Callable[[int, list[float]], None] | None = None,
) -> list[list[float]]:
    """Train interchange interventions at one site, all in one run, each as if it were alone.

    The loss of each is the cross-entropy between the answers' logits and the expected answers of its rows.

    Args:
        draws: for each intervention the rows of its steps; all from one run, equally many a step.
        configs: for each its training.

    Returns:
        For each the loss at each step.
    """
    stack = Stack(edits)

    def losses_of(step: int) -> Tensor:
        drawn = [draw(step) for draw in draws]
        run, rows = drawn[0][0], torch.cat([d[1] for d in drawn])
        logits = one_read(run.logits(rows, {site: stack}, {site: _joined([d[2] for d in drawn])}))
        answers = torch.cat([d[3] for d in drawn]).to(logits.device)
        losses = nn.functional.cross_entropy(logits.float(), answers, reduction="none")
        return reduce(losses, "(edit row) -> edit", "mean", edit=len(edits))

    return train_together(list(edits), losses_of, configs, on_step=on_step)


def from_pool(pairs: PreparedPairs, site: Site, config: TrainingConfig) -> Draw:
    """Rows of fixed pairs, shuffled anew each epoch."""
    order: Iterator[Tensor] = shuffled_rows(len(pairs), config)

    def draw(_: int) -> tuple[Engine, Tensor, Any, Tensor]:
        rows = next(order)
        return pairs.engine, rows, rows_of(pairs.states[site], rows), pairs.data.answer.cpu()[rows]

    return draw


def from_stream(backbone: Backbone, stream: Callable[[int], Counterfactuals], site: Site) -> Draw:
    """Fresh pairs at every step; those of a step are made once, however many ask for them."""
    latest: list[tuple[int, PreparedPairs]] = []

    def draw(step: int) -> tuple[Engine, Tensor, Any, Tensor]:
        if not latest or latest[0][0] != step:
            latest[:] = [(step, PreparedPairs.of(backbone, stream(step), [site], frozen=False))]
        pairs = latest[0][1]
        return pairs.engine, torch.arange(len(pairs)), pairs.states[site], pairs.data.answer.cpu()

    return draw


def source_states(backbone: Backbone, data: Counterfactuals, sites: Sequence[Site]) -> dict[Site, Any]:
    """{site: states of the sources}, or {site: {variable: states}} where there are several variables.

    One run over the sources serves all sites; it ends after the last of them.
    """
    by_variable = {}
    chunk = _chunk(data)
    for name, source in data.sources.items():
        parts = [collect(backbone, source.rows(r), sites) for r in torch.arange(len(data)).split(chunk)]
        by_variable[name] = {site: _one([p[site] for p in parts], site) for site in sites}
    if len(by_variable) == 1:
        return dict(next(iter(by_variable.values())))
    return {site: {name: states[site] for name, states in by_variable.items()} for site in sites}


def _chunk(data: Counterfactuals) -> int:
    """Rows a run. A plain module's are many: starting a run costs more than running some numbers more."""
    rows = data.base.positional
    return CHUNK if rows is None else max(CHUNK, SMALL_BATCH // max(1, rows.shape[1:].numel()))


def one_read(logits: Tensor) -> Tensor:
    """(rows, answers), read at one position."""
    return logits[:, 0] if logits.ndim == 3 else logits


def _joined(states: list[Any]) -> Any:
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    return {name: torch.cat([s[name] for s in states]) for name in states[0]}


def _one(parts: list[Tensor], site: Site) -> Tensor:
    if len({p.shape[1:] for p in parts}) > 1:
        raise ValueError(
            f"{site}: the sources have different numbers of positions; an interchange needs as many in each row."
        )
    return torch.cat(parts)
