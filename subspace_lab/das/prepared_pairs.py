"""Counterfactual pairs made ready for many interventions: an engine over the bases, the states of the sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.das.methods.method import Learner
from subspace_lab.das.objectives import Loss, Outcome
from subspace_lab.das.pairs import Counterfactuals, Stream
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine
from subspace_lab.engine.stacking import Stack, rows_of
from subspace_lab.engine.training import TrainingConfig, shuffled_rows, train_together
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect
from subspace_lab.model.resolved_sites import resolve
from subspace_lab.model.sources import Unmatched, all_rows, expect_unmatched, fitted

CHUNK = 64  # pairs a run
SMALL_BATCH = 2**16  # numbers

Assignment = Mapping[str, Site]
"""{variable: the site where it is searched for}"""


@dataclass
class PreparedPairs:
    """Pairs under a model.

    Attributes:
        engine: over the bases.
        states: {variable: {site: (pairs, positions, width) states of its sources}}, NaN where a source has fewer.
        data: the pairs.
        unmatched: what becomes of positions that a base or its source lacks, as in `forward`.
    """

    engine: Engine
    states: dict[str, dict[Site, Tensor]]
    data: Counterfactuals
    unmatched: Unmatched = "refuse"

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        data: Counterfactuals,
        assignments: Sequence[Assignment],
        *,
        memory: int | str | None = None,
        frozen: bool = True,
        unmatched: Unmatched = "refuse",
    ) -> PreparedPairs:
        """One pass over the bases and one over each variable's sources, for all sites.

        Args:
            assignments: where variables will be exchanged, each on its own.
            memory: budget of the frozen past.
            frozen: compute once what comes before the edits; without, every run is a plain one.
            unmatched: "refuse" pairs whose base and source have different numbers of positions, or "keep_base" there.

        Raises:
            ValueError: a pair whose base and source differ in that way; the message names it.
        """
        expect_unmatched(unmatched)
        data = data.to(backbone.device)
        together = [tuple(dict.fromkeys(one.values())) for one in assignments]
        engine: Engine = (
            FrozenPast(backbone, data.base, together, data.readout, memory=memory)
            if frozen
            else PlainEngine(backbone, data.base, data.readout)
        )
        states = {}
        for name, source in data.sources.items():
            own = list(dict.fromkeys(one[name] for one in assignments if name in one))
            parts = [collect(backbone, source.rows(r), own) for r in torch.arange(len(data)).split(_chunk(data))]
            states[name] = {site: all_rows([p[site] for p in parts]) for site in own}
            for site in own:
                # Once for all pairs, so that the message names the pair and not a row of some batch.
                fitted(resolve(backbone, data.base, site), states[name][site], unmatched, f" for {name!r}")
        return cls(engine, states, data, unmatched)

    def __len__(self) -> int:
        return len(self.data)

    def sources(self, assignment: Assignment, pairs: Tensor) -> dict[Site, Any]:
        """{site: states of the sources of some pairs}, or {variable: states} where variables share the site."""
        found: dict[Site, Any] = {}
        for site in dict.fromkeys(assignment.values()):
            names = [name for name, own in assignment.items() if own == site]
            of = {name: rows_of(self.states[name][site], pairs) for name in names}
            found[site] = of[names[0]] if len(names) == 1 else of
        return found

    def outcomes(
        self, assignment: Assignment, edits: Sequence[Mapping[Site, nn.Module]], pairs: Tensor | None = None
    ) -> list[Outcome]:
        """What the model says with each of several sets of edits, all in one run; by default about all pairs."""
        pairs = torch.arange(len(self)) if pairs is None else pairs
        stacked = stacked_edits(edits)
        parts = []
        with torch.no_grad():
            for some in pairs.split(max(1, _chunk(self.data) // len(edits))):
                again = some.repeat(len(edits))
                sources = self.sources(assignment, again)
                logits = one_read(self.engine.logits(again, stacked, sources, self.unmatched))
                parts.append(rearrange(logits.cpu(), "(edit pair) answer -> edit pair answer", edit=len(edits)))
        answer, base = self.data.answer.cpu()[pairs], self.data.base_answer.cpu()[pairs]
        return [Outcome(logits, self.unedited[pairs], answer, base) for logits in torch.cat(parts, 1)]

    @cached_property
    def unedited(self) -> Tensor:
        """(pairs, answers): the logits that the model gives to the bases without any intervention.

        Raises:
            ValueError: logits that are NaN.
        """
        parts = torch.arange(len(self)).split(_chunk(self.data))
        with torch.no_grad():
            logits = torch.cat([one_read(self.engine.logits(some, {})).cpu() for some in parts])
        wrong = int(logits.isnan().any(-1).sum())
        if wrong:
            raise ValueError(
                f"The model gives NaN in the place of logits for {wrong} of {len(self)} bases, without any "
                "intervention: no answer can be read from them. Is its dtype too narrow, or are its weights broken?"
            )
        return logits


Draw = Callable[[int], tuple[Engine, Tensor, dict[Site, Any], Tensor]]
"""step → (engine, pairs, states of their sources, expected answers)"""


def fit(
    learners: Sequence[Learner],
    draws: Sequence[Draw],
    configs: Sequence[TrainingConfig],
    loss: Loss,
    on_step: Callable[[int, list[float]], None] | None = None,
    unmatched: Unmatched = "refuse",
) -> list[list[float]]:
    """Train learners at one place, all in one run over a stacked batch, each as if it were alone.

    Args:
        draws: for each learner the pairs of its steps; all from one engine, equally many a step.
        configs: for each its training; their numbers of steps agree.
        loss: of the answers' logits and the expected answers, by pair; the learner's penalty is added to its mean.
        unmatched: what becomes of positions that a base or its source lacks.

    Returns:
        For each the loss at each step.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    stacked = stacked_edits([learner.edits for learner in learners])
    groups = [
        (group, config) for one, config in zip(learners, configs, strict=True) for group in one.parameter_groups()
    ]
    steps = configs[0].steps

    def losses_of(step: int) -> Tensor:
        for learner in learners:
            learner.advance(step / steps)
        drawn = [draw(step) for draw in draws]
        engine, pairs = drawn[0][0], torch.cat([d[1] for d in drawn])
        logits = one_read(engine.logits(pairs, stacked, _joined([d[2] for d in drawn]), unmatched))
        answers = torch.cat([d[3] for d in drawn]).to(logits.device)
        losses = reduce(loss(logits, answers), "(learner pair) -> learner", "mean", learner=len(learners))
        penalties = [learner.penalty() for learner in learners]
        if all(penalty is None for penalty in penalties):
            return losses
        return torch.stack(
            [one if more is None else one + more for one, more in zip(losses, penalties, strict=True)]
        )

    modules = [nn.ParameterList(group.parameters) for group, _ in groups]
    rates = [
        c if group.learning_rate is None else replace(c, learning_rate=group.learning_rate) for group, c in groups
    ]
    return train_together(modules, losses_of, rates, on_step=on_step)


def from_pool(pairs: PreparedPairs, assignment: Assignment, config: TrainingConfig) -> Draw:
    """Fixed pairs, shuffled anew each epoch."""
    order: Iterator[Tensor] = shuffled_rows(len(pairs), config)
    answers = pairs.data.answer.cpu()

    def draw(_: int) -> tuple[Engine, Tensor, dict[Site, Any], Tensor]:
        some = next(order)
        return pairs.engine, some, pairs.sources(assignment, some), answers[some]

    return draw


def from_stream(
    backbone: Backbone, stream: Stream, assignment: Assignment, unmatched: Unmatched = "refuse"
) -> Draw:
    """Fresh pairs at every step; those of a step are made once, however many ask for them."""
    latest: list[tuple[int, PreparedPairs]] = []

    def draw(step: int) -> tuple[Engine, Tensor, dict[Site, Any], Tensor]:
        if not latest or latest[0][0] != step:
            made = PreparedPairs.of(backbone, stream(step), [assignment], frozen=False, unmatched=unmatched)
            latest[:] = [(step, made)]
        pairs = latest[0][1]
        every = torch.arange(len(pairs))
        return pairs.engine, every, pairs.sources(assignment, every), pairs.data.answer.cpu()

    return draw


def stacked_edits(edits: Sequence[Mapping[Site, nn.Module]]) -> dict[Site, Stack]:
    """Several sets of edits of the same sites as one: each acts on its own share of a batch."""
    return {site: Stack([one[site] for one in edits]) for site in edits[0]}


def _chunk(data: Counterfactuals) -> int:
    """Pairs a run. A plain module's are many: starting a run costs more than running some numbers more."""
    positional = data.base.positional
    return CHUNK if positional is None else max(CHUNK, SMALL_BATCH // max(1, positional.shape[1:].numel()))


def one_read(logits: Tensor) -> Tensor:
    """(pairs, answers), read at one position."""
    return logits[:, 0] if logits.ndim == 3 else logits


def _joined(sources: list[dict[Site, Any]]) -> dict[Site, Any]:
    """The sources of several draws, one behind the other."""
    if len(sources) == 1:
        return sources[0]
    joined: dict[Site, Any] = {}
    for site, first in sources[0].items():
        parts = [source[site] for source in sources]
        joined[site] = (
            torch.cat(parts)
            if isinstance(first, Tensor)
            else {name: torch.cat([part[name] for part in parts]) for name in first}
        )
    return joined
