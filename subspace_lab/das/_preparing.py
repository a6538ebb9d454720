"""What a sweep does once, before its first search: run the model over the pairs, and record the facts of the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.estimates import proportion
from subspace_lab.das._places import TRAINING_SCORED, Places, name_of
from subspace_lab.das.answered import expect_accuracy
from subspace_lab.das.equal_pairs import clusters_of, different_in, seen_in
from subspace_lab.das.fits import Floors
from subspace_lab.das.objectives import Metric
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import Assignment, PreparedPairs
from subspace_lab.model.identity import versions


def prepare(places: Places, model: Mapping[str, Any], min_accuracy: float | None, *, train: bool) -> None:
    """Run the model over the held-out pairs, and collect the facts that every fit records about the sweep.

    Args:
        model: facts about the model.
        min_accuracy: a model with a lower accuracy on the bases of the test split is refused (ValueError).
        train: run the model over the training pairs as well; with an executor each worker does this itself.
    """
    test = places.test
    places.floors["test"] = _floors(test)
    expect_accuracy(places.floors["test"].accuracy, len(test), min_accuracy)
    places.floors["dev"] = _floors(places.dev)
    pairs = places.pairs
    splits = {"test": test, "dev": places.dev, "train": places.train if train else None}
    without_edit = _try_metrics(places.metrics, splits, places.assignments)
    seen = 0 if callable(pairs.train) else seen_in(pairs.train, pairs.test)
    different = different_in(pairs.test)
    places.facts |= {
        "task": pairs.task,
        "variables": pairs.variables,
        "model": model,
        "data": pairs.fingerprint(),
        "pairs": {
            "train": None if callable(pairs.train) else len(pairs.train),
            "dev": len(pairs.dev),
            "test": len(pairs.test),
        },
        "dropped": dict(pairs.dropped),
        "answered": {name: dict(of) for name, of in pairs.answered.items()},
        "training": {k: v for k, v in asdict(places.config).items() if k != "seed"},
        "loss": name_of(places.loss),
        "metrics": [name_of(metric) for metric in places.metrics],
        "intervals": _intervals(pairs.test),
        "without_edit": without_edit,
        **({"test pairs in training": seen} if seen else {}),
        **({"different test pairs": different} if different < len(pairs.test) else {}),
        "seeds": places.seeds,
        "engine": test.engine.describe(),
        "unmatched": places.unmatched,
        "versions": versions(),
    }
    if places.screen is not None:
        places.facts["screen"] = {**asdict(places.screen), "steps": list(places.screen.steps)}


def _try_metrics(
    metrics: Sequence[Metric], splits: Mapping[str, PreparedPairs | None], assignments: Sequence[Assignment]
) -> dict[str, float | None]:
    """Compute each metric on the bases without an edit, so that a metric that fails is found before the work.

    Returns:
        {metric: its mean over the test pairs}; None where it says nothing of them.
    """
    found: dict[str, float | None] = {}
    for split, prepared in splits.items():
        if prepared is None:
            continue
        some = torch.arange(min(len(prepared), TRAINING_SCORED) if split == "train" else len(prepared))
        for metric in metrics:
            try:
                values = metric(prepared.without_edit(some, assignments))
            except (ValueError, ArithmeticError, LookupError) as error:
                raise ValueError(f"The metric {name_of(metric)!r} on the {split} pairs: {error}") from error
            if not isinstance(values, Tensor) or values.shape != some.shape:
                given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"The metric {name_of(metric)!r} gives {given}; needed is a value for each of {len(some)} pairs."
                )
            if split == "test":
                mean = float(values.double().nanmean())
                found[name_of(metric)] = mean if math.isfinite(mean) else None
    return found


def _intervals(data: Counterfactuals) -> str:
    """How the intervals of the scores are computed, in words."""
    clusters = clusters_of(data)
    return "of independent pairs" if clusters is None else f"of a bootstrap over {clusters}"


def _floors(prepared: PreparedPairs) -> Floors:
    data, given = prepared.data, prepared.unedited.argmax(-1)
    answer = data.answer.cpu()
    most_frequent = torch.bincount(answer, minlength=len(data.answers)).argmax()
    return Floors(
        accuracy=proportion(given == data.base_answer.cpu()),
        no_intervention=proportion(given == answer),
        constant=proportion(answer == most_frequent),
    )
