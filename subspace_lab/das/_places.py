"""The fits of one place: all methods, ranks and seeds at one site, or at one site for each variable.

They train together, in one run over a stacked batch, each as if it were alone. A cohort is a group of places that train
side by side in the same way, where the engine expects this to be cheaper (`engine/cohorts.py`).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate, estimate
from subspace_lab.core.sites import Site
from subspace_lab.das.equal_pairs import clusters_of, interval_labels
from subspace_lab.das.fits import Failure, Fit, Fits, Floors, place_of
from subspace_lab.das.methods import DifferenceOfMeans, FullVector
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.objectives import Loss, Metric, Outcome
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import Assignment, Draw, PreparedPairs, fit, from_pool, from_stream
from subspace_lab.das.screens import Screen, Screened
from subspace_lab.engine.cohorts import MOST_ROWS
from subspace_lab.engine.training import TrainingConfig, expect_gradients
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.sources import Unmatched, all_rows, missing_entries

SPLITS = ("dev", "test", "train")  # the splits on which a fit is scored
STACKED = MOST_ROWS  # at most this many examples in one training step of several fits
POOL = 1000  # if training pairs are drawn at each step, at least this many are drawn for methods without training
TRAINING_SCORED = 400  # fits are scored on at most this many training pairs
CHEAP: tuple[Method, ...] = (FullVector(), DifferenceOfMeans())  # a screen always judges places by these as well


@dataclass
class Places:
    """What all places of a sweep have in common, and the search at one place.

    Attributes:
        assignments: the places.
        left_out: {number of a place: (its score in the screen, why nothing is trained there)}.
        floors, facts: recorded with the fits of every place; computed from the test and dev pairs before the first
            search.
        others: the arguments of the sweep.
    """

    backbone: Backbone
    pairs: Pairs
    assignments: list[dict[str, Site]]
    methods: list[Method]
    seeds: list[int]
    config: TrainingConfig
    loss: Loss
    metrics: Sequence[Metric]
    widths: Mapping[Site, int]
    memory: int | str | None = None
    unmatched: Unmatched = "refuse"
    screen: Screen | None = None
    floors: dict[str, Floors] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: dict[int, tuple[float, str]] = field(default_factory=dict)

    # The model runs once over each split, for all places.

    @cached_property
    def test(self) -> PreparedPairs:
        return self._prepared(self.pairs.test)

    @cached_property
    def dev(self) -> PreparedPairs:
        return self._prepared(self.pairs.dev)

    @cached_property
    def train(self) -> PreparedPairs | None:
        """None if training pairs are drawn at each step."""
        return None if callable(self.pairs.train) else self._prepared(self.pairs.train)

    @cached_property
    def _ready(self) -> dict[int, tuple[list[_Cell], list[Failure]]]:
        """{number of a place: what was trained there and is not scored yet}, for the places of a cohort."""
        return {}

    def _prepared(self, data: Counterfactuals) -> PreparedPairs:
        paths = [method.path for method in self.methods if method.path is not None]
        return PreparedPairs.of(
            self.backbone, data, self.assignments, memory=self.memory, unmatched=self.unmatched, paths=paths
        )

    def cohorts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Which of some places train side by side. The result does not depend on which of them are finished."""
        trained = [m for m in self.methods if not m.control and len(m.seeds([0, 1])) == 2]  # from a random start
        rows = self.config.batch_size * sum(len(method.seeds(self.seeds)) for method in trained)
        if callable(self.pairs.train) or not rows:
            return [[number] for number in numbers]
        sets = [tuple(dict.fromkeys(self.assignments[number].values())) for number in numbers]
        return [[numbers[i] for i in cohort] for cohort in self.dev.engine.cohorts(sets, rows)]

    def fits_at(self, number: int, cohort: Sequence[int], on_step: Callable[[], Any] = lambda: None) -> Fits:
        """All fits at one place. When the first place of a cohort is needed, the whole cohort is trained."""
        if len(cohort) > 1 and number not in self._ready:
            together = self._searched([self.assignments[one] for one in cohort], on_step)
            self._ready.update(zip(cohort, together, strict=True))
        return self._evident(number, *self.at(self.assignments[number], on_step))

    def _evident(self, number: int, found: list[Fit], failed: list[Failure]) -> Fits:
        """The fits of one place, each alignment with its evidence."""
        done = {(fit.method.label, fit.seed) for fit in found} | {(one.method, one.seed) for one in failed}
        place = place_of(self.assignments[number])
        screened = [
            Screened(method.label, place, seed, *self.left_out[number])
            for method in self.methods
            for seed in method.seeds(self.seeds)
            if number in self.left_out and (method.label, seed) not in done
        ]
        return Fits(
            tuple(with_evidence(found, self.floors["test"], self.facts)),
            self.floors,
            tuple(failed),
            self.facts,
            self.labels,
            tuple(screened),
        )

    def screen_scores_of(self, cohort: Sequence[int], turn: int, share: float) -> dict[int, float]:
        """{number of a place: the highest dev score that is reached there in a round of the screen}.

        The first round uses the methods that need no training, and the others with a share of their training steps.
        Later rounds use only those that train: the rest would give the same scores again.
        """
        found: dict[int, list[_Cell]] = {}
        for number in cohort:
            cells, _ = self._short(number, share)._cells(self.assignments[number])
            found[number] = [cell for cell in cells if turn == 0 or cell.learner.parameter_groups()]
        short = self._short(cohort[0], share)
        trained = [cell for cells in found.values() for cell in cells if cell.learner.parameter_groups()]
        lost = {id(cell) for cell, _ in short._train(trained, lambda: None)}
        metric = name_of(self.metrics[0])
        # If nothing can be fitted at a place, keep it: its search reports why. In later rounds it scores lowest.
        nothing = sys.float_info.max if turn == 0 else -sys.float_info.max
        scores = {}
        for number, cells in found.items():
            left = [cell for cell in cells if id(cell) not in lost]
            fits, _ = short._scored(self.assignments[number], left, ("dev",))
            scores[number] = max((fit.score(metric, "dev").value for fit in fits), default=nothing)
        return scores

    def screen_cohorts(self, numbers: Sequence[int], share: float) -> list[list[int]]:
        """Which of some places the screen trains side by side."""
        return self._short(numbers[0], share).cohorts(numbers)

    def _short(self, number: int, share: float) -> Places:
        """A round of the screen at a place: a share of the training steps, one seed, no random subspaces."""
        possible = []
        for method in dict.fromkeys([*CHEAP, *self.methods]):
            with suppress(ValueError):  # for example the full vector, if two variables share the site
                method.check(self.assignments[number], self.widths)
                possible += [method] if method in CHEAP or not method.control else []
        config = replace(self.config, steps=max(1, round(share * self.config.steps)))
        short = replace(
            self, methods=possible, seeds=self.seeds[:1], config=config, metrics=self.metrics[:1], left_out={}
        )
        # The states of the sweep's pairs are used again.
        vars(short).update({split: getattr(self, split) for split in ("dev", "train")})
        return short

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Labels of each test pair: its kind, the exchanged variables if there are several, and the pairs' labels."""
        data = self.pairs.test
        several = {"exchanged": data.exchanged} if len(data.sources) > 1 else {}
        return {"kind": data.kinds, **several, **interval_labels(data)}

    def at(
        self, assignment: Assignment, on_step: Callable[[], Any], splits: Sequence[str] = SPLITS
    ) -> tuple[list[Fit], list[Failure]]:
        """Every fit at one place, and the searches without a result."""
        ready = self._ready.pop(self.assignments.index(dict(assignment)), None)
        cells, failures = ready or self._searched([assignment], on_step)[0]
        fits, unscored = self._scored(assignment, cells, splits)
        return fits, failures + [cell.failure(why) for cell, why in unscored]

    def _searched(
        self, assignments: Sequence[Assignment], on_step: Callable[[], Any]
    ) -> list[tuple[list[_Cell], list[Failure]]]:
        """For each of some places its trained searches, and the searches without a result."""
        searched = [self._cells(assignment) for assignment in assignments]
        trained = [cell for cells, _ in searched for cell in cells if cell.learner.parameter_groups()]
        reasons = {id(cell): why for cell, why in self._train(trained, on_step)}
        found = []
        for cells, failures in searched:
            lost = [cell.failure(reasons[id(cell)]) for cell in cells if id(cell) in reasons]
            found.append(([cell for cell in cells if id(cell) not in reasons], failures + lost))
        return found

    def _cells(self, assignment: Assignment) -> tuple[list[_Cell], list[Failure]]:
        """The searches of one place before their training, and those that cannot be run."""
        skipped = self.assignments.index(dict(assignment)) in self.left_out
        cells: list[_Cell] = []
        failures: list[Failure] = []
        place, examples = place_of(assignment), cache(lambda: self._examples(assignment))
        for method in self.methods:
            for seed in method.seeds(self.seeds):
                problem = Problem(
                    sites=assignment,
                    widths=self.widths,
                    seed=cell_seed(seed, f"{place} {method.label}"),
                    device=self.backbone.device,
                    states=lambda name: examples().flat_states(name, assignment[name]),
                    values=lambda name: examples().flat_values(name, assignment[name]),
                    kinds=() if self.train is None else tuple(dict.fromkeys(self.train.data.kinds)),
                )
                try:
                    learner = method.learner(problem)
                    if not isinstance(learner, Learner):
                        raise TypeError(f"`learner` should return a Learner, found {type(learner).__name__}.")
                    if method.path is not None and learner.parameter_groups():
                        raise TypeError("A method whose exchange follows a path is not trained along it.")
                    cells.append(_Cell(assignment, method, seed, learner))
                except ValueError as error:
                    failures.append(Failure(method.label, place, seed, " ".join(str(error).split())))
                except Exception as error:
                    error.add_note(f"in {method.label} at {place}, seed {seed}")
                    raise
        if skipped:
            # Random subspaces are the chance level of trained methods; nothing is trained here.
            untrained = [cell for cell in cells if not cell.learner.parameter_groups()]
            cells = [cell for cell in untrained if cell.method in CHEAP or not cell.method.control]
        return cells, failures

    def _train(self, cells: list[_Cell], on_step: Callable[[], Any]) -> list[tuple[_Cell, str]]:
        """Train cells, in groups of a suitable size. Returns those whose loss became NaN or infinite, and why."""
        failed = []
        size = max(1, STACKED // self.config.batch_size)
        groups = [cells[i : i + size] for i in range(0, len(cells), size)]
        for i, group in enumerate(groups):
            report = on_step if i == len(groups) - 1 else lambda: None
            begun = [cell.learner for cell in group] if len(group) > 1 else []
            states = [
                {k: v.clone() for k, v in nn.ModuleList(one.edits.values()).state_dict().items()} for one in begun
            ]
            try:
                self._train_together(group, report)
            except FloatingPointError as error:
                if len(group) == 1:
                    failed.append((group[0], str(error)))
                    continue
                # One failing cell ends the run of the whole group: start each again, alone.
                for cell, state in zip(group, states, strict=True):
                    _edits_module(cell.learner).load_state_dict(state)
                    failed += self._train([cell], lambda: None)
        return failed

    def _train_together(self, cells: list[_Cell], on_step: Callable[[], Any]) -> None:
        expect_gradients(self.backbone)
        configs = [replace(self.config, seed=cell.seed) for cell in cells]
        draws: list[Draw]
        if self.train is None:
            assert callable(self.pairs.train)
            # One stream for all cells, which are at one place, so that the pairs of a step are made once.
            draws = [from_stream(self.backbone, self.pairs.train, cells[0].assignment, self.unmatched)] * len(
                cells
            )
        else:
            draws = [from_pool(self.train, c.assignment, own) for c, own in zip(cells, configs, strict=True)]
        learners = [cell.learner for cell in cells]
        losses = fit(learners, draws, configs, self.loss, lambda *_: on_step(), self.unmatched)
        for cell, own in zip(cells, losses, strict=True):
            cell.losses = tuple(own)

    def _scored(
        self, assignment: Assignment, cells: list[_Cell], asked: Sequence[str]
    ) -> tuple[list[Fit], list[tuple[_Cell, str]]]:
        """The fits of cells, and the cells whose edits give NaN logits (which are no answers), with the reason."""
        if not cells:
            return [], []
        failed: dict[int, str] = {}
        scores: list[dict[str, dict[str, Estimate]]] = [{} for _ in cells]
        by_pair: dict[str, list[dict[str, Tensor]]] = {}
        splits: dict[str, tuple[PreparedPairs, Tensor | None]] = {"dev": (self.dev, None)}
        if "test" in asked:
            splits["test"] = self.test, None
        if "train" in asked and self.train is not None:
            splits["train"] = self.train, torch.arange(min(len(self.train), TRAINING_SCORED))
        for split, (prepared, some) in splits.items():
            # The chance level is known from the held-out pairs; a control needs no score on the training pairs.
            chosen = [i for i, cell in enumerate(cells) if split != "train" or not cell.method.control]
            if not chosen:
                continue
            by_cell: dict[int, Outcome] = {}
            for path in dict.fromkeys(cells[i].method.path for i in chosen):
                along = [i for i in chosen if cells[i].method.path == path]
                results = prepared.outcomes(assignment, [cells[i].learner.edits for i in along], some, path)
                by_cell |= dict(zip(along, results, strict=True))
            outcomes = [by_cell[i] for i in chosen]
            for i, outcome in zip(chosen, outcomes, strict=True):
                wrong = int(outcome.logits.isnan().any(-1).sum())
                if wrong:
                    failed.setdefault(
                        i,
                        f"The logits are NaN for {wrong} of {len(outcome.logits)} {split} pairs; no answer is read.",
                    )
            values = [{name_of(metric): metric(outcome) for metric in self.metrics} for outcome in outcomes]
            by_pair[split] = values
            clusters = clusters_of(prepared.data)
            if clusters is not None and some is not None:
                clusters = clusters.where(some)
            for i, found in zip(chosen, values, strict=True):
                scores[i][split] = {
                    name: estimate(each, clusters, f"a score by the metric {name!r} on {split}")
                    for name, each in found.items()
                }
        fits = [
            Fit(
                method=cell.method,
                alignment=cell.learner.alignment(),
                seed=cell.seed,
                start=cell.learner.start,
                scores=scores[i],
                losses=cell.losses,
                start_overlap=cell.learner.start_overlap(),
                pair_scores=by_pair["test"][i] if "test" in by_pair else {},
            )
            for i, cell in enumerate(cells)
            if i not in failed
        ]
        return fits, [(cells[i], why) for i, why in failed.items()]

    def _examples(self, assignment: Assignment) -> _Examples:
        """The training pairs' states at one place, for methods that are fitted without training."""
        if self.train is not None:
            return _Examples(self.train.states, _values(self.train.data))
        assert callable(self.pairs.train)
        parts: list[PreparedPairs] = []
        while sum(len(part) for part in parts) < POOL:
            data = self.pairs.train(len(parts))
            parts.append(
                PreparedPairs.of(self.backbone, data, [assignment], frozen=False, unmatched=self.unmatched)
            )
        states = {
            name: {site: all_rows([part.states[name][site] for part in parts])}
            for name, site in assignment.items()
        }
        values = {name: torch.cat([_values(part.data)[name] for part in parts]) for name in assignment}
        return _Examples(states, values)


@dataclass(eq=False)
class _Cell:
    """One search while it runs."""

    assignment: Assignment
    method: Method
    seed: int
    learner: Learner
    losses: tuple[float, ...] = ()

    def failure(self, why: str) -> Failure:
        return Failure(self.method.label, place_of(self.assignment), self.seed, why)


@dataclass(frozen=True)
class _Examples:
    """States of the training pairs' sources, and the value of each variable in these sources."""

    states: Mapping[str, Mapping[Site, Tensor]]
    values: Mapping[str, Tensor]

    def flat_states(self, name: str, site: Site) -> Tensor:
        """(examples, width): each position of each source that exists is an example."""
        states, there = self._of(name, site)
        return states if there is None else states[there]

    def flat_values(self, name: str, site: Site) -> Tensor:
        """(examples,): the variable's value in each example."""
        states, there = self._of(name, site)
        values = self.values[name].to(states.device)
        values = values.repeat_interleave(len(states) // len(values))
        return values if there is None else values[there]

    def _of(self, name: str, site: Site) -> tuple[Tensor, Tensor | None]:
        """All states, and which of them are at existing positions (None if all are)."""
        states = self.states[name][site].flatten(0, -2)
        missing = missing_entries(states) if self.states[name][site].ndim == 3 else None
        return states, None if missing is None else ~missing


def _edits_module(learner: Learner) -> nn.ModuleList:
    """A learner's edits as one module."""
    return nn.ModuleList(learner.edits.values())


def _values(data: Counterfactuals) -> dict[str, Tensor]:
    """The value of each variable in its sources; if the data do not contain it, the expected answer."""
    return {name: data.values.get(name, data.answer) for name in data.sources}


def cell_seed(seed: int, what: object) -> int:
    """A seed for one method at one place. Equal starts at different places would look like shared subspaces."""
    return zlib.crc32(f"{seed}:{what}".encode())


def name_of(function: Callable[..., Any]) -> str:
    """The name of a loss or a metric in results."""
    return getattr(function, "__name__", type(function).__name__)


def with_evidence(fits: list[Fit], floors: Floors, facts: Mapping[str, Any]) -> list[Fit]:
    """The fits of one place, each alignment with its origin and the scores of other methods at this place."""
    means = Fits(tuple(fits), {}).mean(metric=facts["metrics"][0]) if fits else []
    shared = {name: facts[name] for name in ("task", "data", "training", "loss", "versions")}
    found = []
    for one in fits:
        others = [mean for mean in means if mean.method.label != one.method.label]
        scores = {mean.method.label: {facts["metrics"][0]: mean.value} for mean in others}
        controls = {mean.method.label for mean in others if mean.method.control}
        evidence = {
            **shared,
            "model": facts["model"]["name"] or facts["model"]["class"],
            "model_facts": facts["model"],
            "method": one.method.label,
            "seed": one.seed,
            "start": one.start,
            "scores": {name: asdict(score) for name, score in one.scores["test"].items()},
            "dev_scores": {name: asdict(score) for name, score in one.scores["dev"].items()},
            "controls": {
                "no intervention": {"iia": floors.no_intervention.value},
                "best constant answer": {"iia": floors.constant.value},
                **{name: of for name, of in scores.items() if name in controls},
            },
            "baselines": {name: of for name, of in scores.items() if name not in controls},
        }
        found.append(replace(one, alignment=Alignment(one.alignment.variables, evidence)))
    return found
