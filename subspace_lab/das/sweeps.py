"""Many searches in one call: sites × methods × ranks × seeds.

The model runs once over the data for all sites. All fits of one place train together, in one run over a stacked
batch, each as if it were alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.das._arguments import assignments_of, check_types
from subspace_lab.das._places import TRAINING_SCORED, Places, name_of
from subspace_lab.das.answered import expect_accuracy
from subspace_lab.das.estimates import Clusters, proportion
from subspace_lab.das.fits import Failure, Fit, Fits, Floors, place_of
from subspace_lab.das.methods.method import Method
from subspace_lab.das.objectives import Loss, Metric, cross_entropy, iia
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import Assignment, PreparedPairs
from subspace_lab.engine.training import TrainingConfig, progress_bar
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.identity import model_facts, versions
from subspace_lab.model.intervene import collect
from subspace_lab.model.sources import Unmatched


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C in a sweep some of whose places were finished.

    Attributes:
        fits: those of the finished places.
    """

    def __init__(self, fits: Fits, places: int) -> None:
        super().__init__(f"Interrupted: {len(fits.places)} of {places} sites were searched.")
        self.fits = fits


def sweep(
    backbone: Backbone,
    pairs: Pairs,
    sites: Sequence[Site | Mapping[str, Site]],
    methods: Sequence[Method],
    *,
    seeds: int | Sequence[int] = 1,
    config: TrainingConfig | None = None,
    loss: Loss = cross_entropy,
    metrics: Sequence[Metric] = (iia,),
    min_accuracy: float | None = 0.9,
    memory: int | str | None = None,
    unmatched: Unmatched = "refuse",
    quiet: bool = False,
    label: str = "sweep",
) -> Fits:
    """Fit every method at every site, with every seed.

    Args:
        backbone: of the model.
        pairs: in three splits: fits are trained on `train`, chosen by `dev`, and reported on `test`.
        sites: each is searched on its own. A site holds all variables, as parts of one basis; a mapping {variable:
            site} gives each variable a site of its own, all exchanged at once.
        methods: a setting that is a list, such as `DAS(rank=[1, 4])`, runs once for each of its values.
        seeds: how many, or which: of random starts and of the order of the pairs.
        config: of the training; its `seed` is replaced by each of the seeds.
        loss: minimised by methods that train.
        metrics: functions of an `Outcome`; the first is the one that tables show.
        min_accuracy: a model that answers the test split's bases worse than this is refused; None allows any.
        memory: budget of the frozen past, as in `FrozenPast`.
        unmatched: what becomes of positions that a base has and its source has not, or the other way round: "refuse"
            raises, "keep_base" leaves them as they are in the base.
        quiet: show no progress bar.

    Raises:
        TypeError: an argument of another kind.
        ValueError: nothing to search, a rank above a site's width, the same method twice, a pair whose base and
            source have different numbers of positions, or a model that fails the task. All this before anything is
            trained.
        SweepInterrupted: a KeyboardInterrupt that has the fits of the sites which were finished before it.
    """
    config = config or TrainingConfig()
    check_types(backbone, pairs, sites, methods, seeds, config, loss, metrics)
    assignments = assignments_of(sites, pairs.variables)
    variants = [variant for method in methods for variant in method.variants()]
    asked = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not assignments or not variants or not asked or not metrics:
        raise ValueError(
            f"Nothing to search: {len(assignments)} sites, {len(variants)} methods, {len(asked)} seeds, "
            f"{len(metrics)} metrics."
        )
    named: dict[str, list[Any]] = {
        "methods": [method.label for method in variants],
        "metrics": [name_of(metric) for metric in metrics],
        "seeds": asked,
    }
    for what, names in named.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Given twice, so that results could not be told apart: the {what} {twice}.")
    widths = {site: _width(backbone, site, pairs.test) for one in assignments for site in one.values()}
    for assignment in assignments:
        for method in variants:
            method.check(assignment, widths)
    prepared = partial(PreparedPairs.of, backbone, assignments=assignments, memory=memory, unmatched=unmatched)
    test = prepared(data=pairs.test)
    floors = {"test": _floors(test)}
    expect_accuracy(floors["test"].accuracy, len(test), min_accuracy)
    dev = prepared(data=pairs.dev)
    floors["dev"] = _floors(dev)
    train = None if callable(pairs.train) else prepared(data=pairs.train)
    _try_metrics(metrics, {"test": test, "dev": dev, "train": train}, assignments)
    job = Places(
        backbone,
        pairs,
        variants,
        asked,
        config,
        loss,
        metrics,
        widths,
        {"dev": dev, "test": test},
        train,
        unmatched,
    )
    facts = {
        "task": pairs.task,
        "variables": pairs.variables,
        "model": model_facts(backbone.model),
        "data": pairs.fingerprint(),
        "pairs": {"train": None if train is None else len(train), "dev": len(dev), "test": len(test)},
        "dropped": dict(pairs.dropped),
        "answered": {name: dict(of) for name, of in pairs.answered.items()},
        "training": {k: v for k, v in asdict(config).items() if k != "seed"},
        "loss": name_of(loss),
        "metrics": named["metrics"],
        "intervals": _intervals(pairs.test),
        "seeds": asked,
        "engine": test.engine.describe(),
        "unmatched": unmatched,
        "versions": versions(),
    }
    fits: list[Fit] = []
    failures: list[Failure] = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(label, total=len(assignments) * config.steps)
        for i, assignment in enumerate(assignments):
            bar.update(task, description=f"{label} {place_of(assignment)}")
            try:
                found, failed = job.at(assignment, lambda: bar.advance(task))
            except KeyboardInterrupt:
                if not fits:
                    raise
                facts["interrupted"] = f"{i} of {len(assignments)} sites were searched"
                raise SweepInterrupted(
                    Fits(tuple(fits), floors, tuple(failures), facts, _labels(pairs.test)), len(assignments)
                ) from None
            fits += _with_evidence(found, floors["test"], facts)
            failures += failed
            bar.update(task, completed=(i + 1) * config.steps)
    return Fits(tuple(fits), floors, tuple(failures), facts, _labels(pairs.test))


def _try_metrics(
    metrics: Sequence[Metric], splits: Mapping[str, PreparedPairs | None], assignments: Sequence[Assignment]
) -> None:
    """Ask each metric about the bases without an edit, so that one that cannot be had is found out before the work."""
    for split, prepared in splits.items():
        if prepared is None:
            continue
        some = torch.arange(min(len(prepared), TRAINING_SCORED) if split == "train" else len(prepared))
        for metric in metrics:
            try:
                values = metric(prepared.without_edit(some, assignments))
            except ValueError as error:
                raise ValueError(f"The metric {name_of(metric)!r} on the {split} pairs: {error}") from error
            if not isinstance(values, Tensor) or values.shape != some.shape:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"The metric {name_of(metric)!r} gives {found}; needed is a value for each of {len(some)} pairs."
                )


def _labels(data: Counterfactuals) -> dict[str, tuple[str, ...]]:
    """What is known of each pair: its kind, which variables it exchanges where there are several, its labels."""
    several = {"exchanged": data.exchanged} if len(data.sources) > 1 else {}
    return {"kind": data.kinds, **several, **data.labels}


def _intervals(data: Counterfactuals) -> str:
    """How the intervals of the scores are made, in words."""
    clusters = Clusters.of(data.labels)
    return "of independent pairs" if clusters is None else f"of a bootstrap over {clusters}"


def _width(backbone: Backbone, site: Site, pairs: Counterfactuals) -> int:
    """The width of the states at a site: from the model's structure, or else from a run of one pair."""
    width = backbone.hook_point(site).width
    if width is None:
        base = pairs.base.rows(torch.arange(1)).to(backbone.device)
        width = collect(backbone, base, [site])[site].shape[-1]
    return width


def _floors(prepared: PreparedPairs) -> Floors:
    data, given = prepared.data, prepared.unedited.argmax(-1)
    answer = data.answer.cpu()
    most_frequent = torch.bincount(answer, minlength=len(data.answers)).argmax()
    return Floors(
        accuracy=proportion(given == data.base_answer.cpu()),
        no_intervention=proportion(given == answer),
        constant=proportion(answer == most_frequent),
    )


def _with_evidence(fits: list[Fit], floors: Floors, facts: Mapping[str, Any]) -> list[Fit]:
    """The fits of one place, each alignment with where it comes from and what other methods reach."""
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
