"""What a screen saves and what it loses, on sweeps that are also run in full.

    python benchmarks/screening.py [--quick] [--json PATH]

A sweep is run in full and with `Screen()`. The best site is that of the highest dev IIA of a trained subspace in the
full sweep; it is lost if the screened sweep trained no site whose dev IIA is within .02 of it. The time saved is the
share of the full sweep's seconds of the processor, the passes over the data included. The default of `Screen` was
chosen on some of the cases; reported are the others. All are of the decoder that comes along: networks with three
sites, as those of hierarchical equality, have nothing to screen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from harness import figure, report

from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, DifferenceOfMeans, FullVector, RandomSubspace
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.screens import Screen
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks import load_task

TIE = 0.02
RANK = 4


@dataclass(frozen=True)
class Case:
    """One sweep.

    Attributes:
        name: for people.
        chosen_on: whether the default was chosen on it, so that it says nothing about the default.
        make: seed → what the sweep is given.
        config: of the training.
    """

    name: str
    chosen_on: bool
    make: Callable[[], tuple[Backbone, Pairs, list[Site]]]
    config: TrainingConfig


def decoder(task: str, variable: str, seed: int, sizes: tuple[int, int, int]) -> Any:
    """The decoder that comes along, at all layers and all named positions of a task."""

    def make() -> tuple[Backbone, Pairs, list[Site]]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = str(files("subspace_lab") / "assets" / "tiny_decoder")
        backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder).eval())
        chosen = load_task(task)
        train, dev, test = sizes
        pairs = chosen.pairs(
            AutoTokenizer.from_pretrained(folder),
            train=train,
            dev=dev,
            test=test,
            seed=seed,
            variables=[variable],
        )
        specs = _spans(chosen)
        return (
            backbone,
            pairs,
            [Site("block_output", layer, at) for layer in range(backbone.depth) for at in specs],
        )

    return make


def _spans(task: Any) -> list[str]:
    import random

    return list(task.prompt(task.sample(random.Random(0), "train")).spans)


def cases(quick: bool) -> list[Case]:
    """To choose on, and to report: other variables, other pairs, another task."""
    sizes = (120, 60, 20) if quick else (300, 120, 60)
    config = TrainingConfig(steps=20 if quick else 100, learning_rate=5e-2)
    chosen_on = [("price_tagging", "above_lower", 0), ("indirect_object", "subject_is_first", 0)]
    reported = [
        ("price_tagging", "above_lower", 1),
        ("price_tagging", "below_upper", 2),
        ("price_tagging", "answer", 3),
        ("indirect_object", "subject_is_first", 1),
        ("entity_attribute", "country", 1),
        ("entity_attribute", "food", 2),
    ]
    if quick:
        chosen_on, reported = [], reported[:2]
    return [
        Case(f"{task}: {variable}, seed {seed}", those is chosen_on, decoder(task, variable, seed, sizes), config)
        for those in (chosen_on, reported)
        for task, variable, seed in those
    ]


def best_dev(fits: Fits) -> dict[str, float]:
    """{site: the highest dev IIA of a subspace that was trained there}."""
    scores: dict[str, float] = {}
    for fit in fits.where(method=DAS):
        scores[fit.place] = max(scores.get(fit.place, 0.0), fit.score("iia", "dev").value)
    return scores


def measured(case: Case, screen: Screen) -> dict[str, float]:
    """How long both sweeps took, and whether the best site was lost."""
    backbone, pairs, sites = case.make()
    methods = [DAS(RANK), DifferenceOfMeans(), RandomSubspace(RANK, draws=2), FullVector()]
    seconds, found = [], []
    for one in (None, screen):
        start = time.process_time()
        found.append(
            sweep(backbone, pairs, sites, methods, config=case.config, min_accuracy=None, quiet=True, screen=one)
        )
        seconds.append(time.process_time() - start)
    full, screened = map(best_dev, found)
    reached = max(full[site] for site in screened)
    return {
        "sites": len(sites),
        "trained": len(screened),
        "best": max(full.values()),
        "best_kept": reached,
        "lost": float(reached < max(full.values()) - TIE),
        "saving": 1 - seconds[1] / seconds[0],
        "seconds": seconds[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="two cases, few pairs and steps: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    screen = Screen()
    results = {}
    for case in cases(args.quick):
        results[case.name] = {"chosen_on": case.chosen_on, **measured(case, screen)}
        print(f"{case.name}: {results[case.name]}", file=sys.stderr, flush=True)
    reported = [one for one in results.values() if not one["chosen_on"]]
    figures = {
        "screen_saving": figure([one["saving"] for one in reported]),
        "screen_lost": figure([sum(one["lost"] for one in reported) / len(reported)]),
    }
    settings = {"screen": str(screen), "rank": RANK, "tie": TIE, "quick": args.quick, "cases": results}
    report("screening", settings, figures, "cpu", args.json)


if __name__ == "__main__":
    main()
