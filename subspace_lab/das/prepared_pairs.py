"""Counterfactual pairs prepared for many interventions: an engine over the bases, and the states of the sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.das.answer_engine import SpelledAnswers, answer_engine, rows_a_pair
from subspace_lab.das.methods.method import Learner
from subspace_lab.das.objectives import Loss, Outcome, Towards
from subspace_lab.das.pairs import Counterfactuals, Stream
from subspace_lab.das.paths import Path
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine, Part
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.stacking import Stack, rows_of
from subspace_lab.engine.training import TrainingConfig, shuffled_rows, train_together
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits
from subspace_lab.model.intervene import collect
from subspace_lab.model.resolved_sites import resolve
from subspace_lab.model.sources import Unmatched, all_rows, expect_unmatched, fitted

CHUNK = 64  # pairs in one run, at most
# Tokens in one run on a CPU. With more, the intermediate results do not fit its caches (64 × 64 tokens: 15 % slower).
TOKENS = 2048
SMALL_BATCH = 2**16  # numbers in the input of one run of a plain module

Assignment = Mapping[str, Site]
"""{variable: the site where it is searched}"""


@dataclass
class PreparedPairs:
    """Pairs with the model's states.

    Attributes:
        engine: the engine over the bases.
        states: {variable: {site: (pairs, positions, width) states of its sources}}, NaN at positions that a source
            does not have.
        data: the pairs.
        backbone: the model.
        unmatched: what happens at positions that only the base or only its source has, as in `forward`.
    """

    engine: Engine
    states: dict[str, dict[Site, Tensor]]
    data: Counterfactuals
    backbone: Backbone
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
        paths: Iterable[Path] = (),
    ) -> PreparedPairs:
        """Run the model once over the bases and once over each variable's sources, for all sites.

        Args:
            assignments: the places where variables will be exchanged, each separately.
            memory: memory budget of the frozen past.
            frozen: compute the part before the edits once. Without it, every run is a full forward pass.
            unmatched: "refuse" pairs whose base and source have different numbers of positions, or "keep_base" at
                positions that only one of them has.
            paths: the paths of the methods that restrict an exchange to a path.

        Raises:
            ValueError: with "refuse", a pair with different numbers of positions; the message names the pair.
        """
        expect_unmatched(unmatched)
        data = data.to(backbone.device)
        together = [tuple(dict.fromkeys(one.values())) for one in assignments]
        for path in paths:
            ways = [tuple(dict.fromkeys((*one.values(), path.receiver))) for one in assignments]
            together += [(path.receiver,), *ways]

        def build(base: Batch, readout: Readout) -> Engine:
            if frozen:
                return FrozenPast(backbone, base, together, readout, memory=memory)
            return PlainEngine(backbone, base, readout)

        engine = answer_engine(data, build)
        states = {}
        for name, source in data.sources.items():
            own = list(dict.fromkeys(one[name] for one in assignments if name in one))
            parts = [collect(backbone, source.rows(r), own) for r in torch.arange(len(data)).split(_chunk(data))]
            states[name] = {site: all_rows([p[site] for p in parts]) for site in own}
            for site in own:
                # Checked for all pairs at once, so that the message names the pair and not an index in a batch.
                fitted(resolve(backbone, data.base, site), states[name][site], unmatched, f" for {name!r}")
        return cls(engine, states, data, backbone, unmatched)

    def __len__(self) -> int:
        return len(self.data)

    def sources(self, assignment: Assignment, pairs: Tensor) -> dict[Site, Any]:
        """{site: states of the sources of some pairs}; if variables share the site, {site: {variable: states}}."""
        found: dict[Site, Any] = {}
        for site in dict.fromkeys(assignment.values()):
            names = [name for name, own in assignment.items() if own == site]
            of = {name: rows_of(self.states[name][site], pairs) for name in names}
            found[site] = of[names[0]] if len(names) == 1 else of
        return found

    def outcomes(
        self,
        assignment: Assignment,
        edits: Sequence[Mapping[Site, nn.Module]],
        pairs: Tensor | None = None,
        path: Path | None = None,
    ) -> list[Outcome]:
        """The outcomes with each of several sets of edits, computed in one run, by default for all pairs.

        Args:
            path: the only path by which the edits reach the answer; by default they reach it by all paths.
        """
        pairs = torch.arange(len(self)) if pairs is None else pairs
        runs = partial(self._runs, assignment, edits=len(edits), pairs=pairs, path=path)
        logits = runs(stacked_edits(edits))
        vocabulary = cache(lambda: runs(stacked_edits(edits), vocabulary=True))
        complement = cache(lambda: runs(self._complements(assignment, edits)))
        return [
            self._outcome(pairs, of, partial(_one_of, vocabulary, i), partial(_one_of, complement, i))
            for i, of in enumerate(logits)
        ]

    def without_edit(self, pairs: Tensor | None = None, assignments: Sequence[Assignment] = ()) -> Outcome:
        """The outcome without any intervention, by default for all pairs.

        Args:
            assignments: the places for which metrics will need the complement.
        """
        some = torch.arange(len(self)) if pairs is None else pairs
        vocabulary = cache(lambda: self._runs({}, {}, 1, some, vocabulary=True))

        def complement() -> Tensor:
            for one in assignments:
                _expect_one_source_a_site(one)
            return self.unedited[some]

        return self._outcome(some, self.unedited[some], partial(_one_of, vocabulary, 0), complement)

    def _outcome(
        self, pairs: Tensor, logits: Tensor, vocabulary: Callable[[], Tensor], complement: Callable[[], Tensor]
    ) -> Outcome:
        kinds = self.data.kinds
        return Outcome(
            logits=logits,
            unedited=self.unedited[pairs],
            answer=self.data.answer.cpu()[pairs],
            base_answer=self.data.base_answer.cpu()[pairs],
            kinds=tuple(kinds[i] for i in pairs.tolist()),
            run_vocabulary=vocabulary,
            run_complement=complement,
        )

    def _runs(
        self,
        assignment: Assignment,
        stacked: Mapping[Site, nn.Module],
        edits: int,
        pairs: Tensor,
        *,
        vocabulary: bool = False,
        path: Path | None = None,
    ) -> Tensor:
        """(edits, pairs, answers) logits of each of several stacked sets of edits.

        With `vocabulary` (edits, pairs): the answer whose token has the highest logit of the vocabulary, −1 if this
        token is no answer. The logits themselves, of all tokens for all pairs, would not fit in memory.
        """
        parts = []
        with torch.no_grad():
            for some in pairs.split(max(1, _chunk(self.data) // edits)):
                again = some.repeat(edits)
                these: Edits = stacked
                sources = self.sources(assignment, again)
                if path is not None:
                    engine = self.engine if isinstance(self.engine, FrozenPast) else None
                    these, sources = path.exchange(
                        self.backbone, self.data.base, again, stacked, sources, self.unmatched, engine
                    )
                logits = one_read(self.engine.logits(again, these, sources, self.unmatched, vocabulary=vocabulary))
                found = self._answers_of(logits.argmax(-1).cpu()) if vocabulary else logits.cpu()
                parts.append(rearrange(found, "(edit pair) ... -> edit pair ...", edit=edits))
        return torch.cat(parts, 1)

    def _answers_of(self, tokens: Tensor) -> Tensor:
        """The number of the answer that each token is, −1 if it is none."""
        if self.data.scored is None:  # the model's output has one logit for each answer
            return tokens
        # This engine has compared all tokens of the answers, and has an extra entry for "no answer".
        if isinstance(self.engine, SpelledAnswers):
            return torch.where(tokens < len(self.data.answers), tokens, -1)
        same = tokens[:, None] == self.data.scored.cpu()
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def _complements(self, assignment: Assignment, edits: Sequence[Mapping[Site, nn.Module]]) -> dict[Site, Stack]:
        """The exchanges with base and source swapped: everything but the subspace becomes the source's."""
        _expect_one_source_a_site(assignment)
        return stacked_edits([{site: _Turned(edit) for site, edit in one.items()} for one in edits])

    @cached_property
    def source_logits(self) -> Tensor:
        """(pairs, answers): the model's logits for the sources without any intervention.

        Raises:
            ValueError: several variables, each with its own sources.
        """
        if len(self.data.sources) > 1:
            raise ValueError(
                f"A loss that compares with the model's output for the source needs one source; the variables "
                f"{list(self.data.sources)} have one each. Use target='answer', or search one variable at a time."
            )
        source = next(iter(self.data.sources.values()))
        asked = replace(self.data, base=source)
        engine = answer_engine(asked, lambda base, readout: PlainEngine(self.backbone, base, readout))
        with torch.no_grad():
            parts = [
                one_read(engine.logits(some, {})) for some in torch.arange(len(self)).split(_chunk(self.data))
            ]
        return torch.cat(parts).cpu()

    @cached_property
    def unedited(self) -> Tensor:
        """(pairs, answers): the model's logits for the bases without any intervention.

        Raises:
            ValueError: logits that are NaN.
        """
        parts = torch.arange(len(self)).split(_chunk(self.data))
        with torch.no_grad():
            logits = torch.cat([one_read(self.engine.logits(some, {})).cpu() for some in parts])
        wrong = int(logits.isnan().any(-1).sum())
        if wrong:
            raise ValueError(
                f"The model gives NaN instead of logits for {wrong} of {len(self)} bases, without any "
                "intervention: no answer can be read from them. Is its dtype too narrow, or are its weights broken?"
            )
        return logits


@dataclass(frozen=True)
class Drawn:
    """The pairs of one training step.

    Attributes:
        of: all pairs, from which these are drawn.
        pairs: (n,) indices of the drawn pairs.
        sources: the states of their sources, as in `PreparedPairs.sources`.
    """

    of: PreparedPairs
    pairs: Tensor
    sources: dict[Site, Any]

    def targets(self, loss: Loss) -> Tensor:
        """The second argument of a loss: the expected answers, or the sources' logits."""
        if isinstance(loss, Towards) and loss.target == "source":
            return self.of.source_logits[self.pairs]
        return self.of.data.answer.cpu()[self.pairs]

    def weights(self, by_kind: Mapping[str, float] | None) -> Tensor:
        """(pairs,) the weight of each pair. The sum is 1; the total of each kind is proportional to the kind's weight.

        A kind without a weight has weight 0. If `by_kind` is None, all pairs have the same weight.
        """
        n = len(self.pairs)
        if by_kind is None:
            return torch.full((n,), 1 / n)
        kinds = self.of.data.kinds
        own = [kinds[i] for i in self.pairs.tolist()]
        weights = torch.tensor([by_kind.get(kind, 0.0) / own.count(kind) for kind in own])
        # A step may by chance contain only pairs of weight 0; then it changes nothing.
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


Draw = Callable[[int], Drawn]
"""step → the pairs of this step"""


def fit(
    learners: Sequence[Learner],
    draws: Sequence[Draw],
    configs: Sequence[TrainingConfig],
    loss: Loss,
    on_step: Callable[[int, list[float]], None] | None = None,
    unmatched: Unmatched = "refuse",
) -> list[list[float]]:
    """Train several learners in one run over a stacked batch; each is trained as if it were alone.

    Learners may be at several places. Learners at the same place must follow each other, so that they share its edits.

    Args:
        draws: for each learner the pairs of its steps; all from one engine, the same number in each step.
        configs: the training configuration of each learner, all with the same number of steps.
        loss: a function of the answers' logits and the expected answers that gives a loss for each pair, or a
            `Towards`. Minimised is its mean (weighted, if the learner has weights) plus the learner's penalty.
        unmatched: what happens at positions that only the base or only its source has.

    Returns:
        For each learner the loss at each step.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    places = [list(of) for _, of in groupby(range(len(learners)), lambda i: tuple(learners[i].edits))]
    stacks = [stacked_edits([learners[i].edits for i in of]) for of in places]
    groups = [
        (group, config) for one, config in zip(learners, configs, strict=True) for group in one.parameter_groups()
    ]
    steps = configs[0].steps
    weighted = any(learner.weights is not None for learner in learners)

    def losses_of(step: int) -> Tensor:
        for learner in learners:
            learner.advance(step / steps)
        drawn = [draw(step) for draw in draws]
        parts = [
            Part(torch.cat([drawn[i].pairs for i in of]), stack, _joined([drawn[i].sources for i in of]))
            for of, stack in zip(places, stacks, strict=True)
        ]
        logits = one_read(drawn[0].of.engine.side_by_side(parts, unmatched))
        by_pair = loss(logits, torch.cat([one.targets(loss) for one in drawn]).to(logits.device))
        if weighted:
            weights = [one.weights(learner.weights) for one, learner in zip(drawn, learners, strict=True)]
            by_pair = rearrange(by_pair, "(learner pair) -> learner pair", learner=len(learners))
            losses = (by_pair * torch.stack(weights).to(by_pair)).sum(1)
        else:
            losses = reduce(by_pair, "(learner pair) -> learner", "mean", learner=len(learners))
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
    by_group = train_together(modules, losses_of, rates, on_step=on_step)
    for learner in learners:
        learner.finish()
    return by_group


def from_pool(pairs: PreparedPairs, assignment: Assignment, config: TrainingConfig) -> Draw:
    """Draws from fixed pairs, in a new order in each epoch."""
    order: Iterator[Tensor] = shuffled_rows(len(pairs), config)

    def draw(_: int) -> Drawn:
        some = next(order)
        return Drawn(pairs, some, pairs.sources(assignment, some))

    return draw


def from_stream(
    backbone: Backbone, stream: Stream, assignment: Assignment, unmatched: Unmatched = "refuse"
) -> Draw:
    """Draws fresh pairs at each step. The pairs of a step are made once, and all learners of the step share them."""
    latest: list[tuple[int, Drawn]] = []

    def draw(step: int) -> Drawn:
        if not latest or latest[0][0] != step:
            made = PreparedPairs.of(backbone, stream(step), [assignment], frozen=False, unmatched=unmatched)
            every = torch.arange(len(made))
            latest[:] = [(step, Drawn(made, every, made.sources(assignment, every)))]
        return latest[0][1]

    return draw


def stacked_edits(edits: Sequence[Mapping[Site, nn.Module]]) -> dict[Site, Stack]:
    """Several sets of edits at the same sites as one set, in which each edit acts on its own part of a batch."""
    return {site: Stack([one[site] for one in edits]) for site in edits[0]}


def _chunk(data: Counterfactuals) -> int:
    """Pairs in one run. A plain module gets many: starting a run costs more than computing some more numbers."""
    positional, ids = data.base.positional, data.base.inputs.get("input_ids")
    if positional is not None:
        return max(CHUNK, SMALL_BATCH // max(1, positional.shape[1:].numel()))
    rows = CHUNK
    if isinstance(ids, Tensor) and ids.device.type == "cpu":
        rows = min(CHUNK, max(8, TOKENS // ids.shape[1]))
    return max(1, rows // rows_a_pair(data))


class _Turned(nn.Module):
    """The exchange of a subspace, with base and source swapped."""

    def __init__(self, edit: nn.Module) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, h: Tensor, source: Tensor) -> Tensor:
        turned: Tensor = self.edit(source.to(h.dtype), h)
        return turned


def _expect_one_source_a_site(assignment: Assignment) -> None:
    """ValueError if variables share a site: there is then no single source for the complement."""
    sites = list(assignment.values())
    if twice := [site for site in dict.fromkeys(sites) if sites.count(site) > 1]:
        names = [name for name, site in assignment.items() if site == twice[0]]
        raise ValueError(
            f"The variables {names} share the site {twice[0]} and have different sources, so that there is no single "
            "source for the complement of their subspaces. Search one variable at a time, or leave this metric out."
        )


def _one_of(found: Callable[[], Tensor], i: int) -> Tensor:
    return found()[i]


def one_read(logits: Tensor) -> Tensor:
    """(pairs, answers) logits that were read at one position."""
    return logits[:, 0] if logits.ndim == 3 else logits


def _joined(sources: list[dict[Site, Any]]) -> dict[Site, Any]:
    """The sources of several draws, concatenated."""
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
