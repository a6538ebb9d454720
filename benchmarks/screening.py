"""What a screen saves and what it loses, on sweeps that are also run in full.

    python benchmarks/screening.py [--quick] [--json PATH] [--device D] [--seed N] [--case NAME]

A case is one variable of one model, searched at all layers and positions by `default_methods` of ranks 1 and 8. It is
swept in full and with `Screen()`; which goes first alternates from case to case. Time is of the processor, of the
whole sweep: the passes over the data, the screen, the training, and the scores of every method on dev, test and train
pairs. Saved is the share of the full sweep's time.

The best site is that of the highest dev IIA of a trained subspace in the full sweep. It is lost if no site that the
screened sweep trained is within .02 of it, by the full sweep's dev IIA too.

The default of `Screen` was chosen on the cases that say so, by what each setting would have kept; the two headline
figures are of the other cases, which were first run when the default stood. Both kinds are in the file. A sweep of
few sites has nothing to screen: two always stay.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from compiled_programs import PROGRAMS
from harness import clock, figure, options, report

from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.screens import Screen
from subspace_lab.das.search import default_methods
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks import load_task
from subspace_lab.tasks import planted as plants

TIE = 0.02
RANKS = [1, 8]
SIZES = {"train": 256, "dev": 128, "test": 256}
CONFIG = TrainingConfig(steps=200, learning_rate=0.05)  # as many steps as are the default

Made = tuple[Backbone, Pairs, list[Site]]


@dataclass(frozen=True)
class Case:
    """One sweep.

    Attributes:
        name: for people.
        chosen_on: whether the default was chosen on it, so that it says nothing about the default.
        make: what is searched, on a device.
    """

    name: str
    chosen_on: bool
    make: Callable[[str], Made]


def decoder(task: str, variable: str, seed: int, chosen_on: bool = False) -> Case:
    """A task of the decoder that comes along, at all its named positions."""

    def make(device: str) -> Made:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = str(files("subspace_lab") / "assets" / "tiny_decoder")
        backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder).eval().to(device))
        asked = load_task(task)
        pairs = asked.pairs(AutoTokenizer.from_pretrained(folder), seed=seed, variables=[variable], **SIZES)
        positions = list(asked.prompt(asked.sample(random.Random(0), "train")).spans)
        # What is known of an entity is in its embedding already.
        first = [Site("block_input", 0, at) for at in positions] if task == "entity_attribute" else []
        return backbone, pairs, [*first, *_outputs(backbone.depth, positions)]

    return Case(f"{task}: {variable}, seed {seed}", chosen_on, make)


def planted(seed: int, chosen_on: bool = False) -> Case:
    """A variable that was written into a rotated subspace at one site."""

    def make(device: str) -> Made:
        made = plants.planted_decoder(seed, **SIZES)
        backbone = Backbone(made.model.to(device))
        return backbone, made.pairs, _outputs(backbone.depth, [str(i) for i in range(plants.LENGTH)])

    return Case(f"planted decoder, seed {seed}", chosen_on, make)


def compiled(name: str, seed: int, chosen_on: bool = False) -> Case:
    """A program that torchwright compiled."""

    def make(device: str) -> Made:
        program = next(one for one in PROGRAMS if one.name == name)
        with tempfile.TemporaryDirectory() as folder:
            made = program.compiled(Path(folder) / "model")
        backbone = Backbone(made.model.to(device))
        length = len(program.text(program.x[0], program.y[0], program.z[0]))
        sites = _outputs(backbone.depth, [str(i) for i in range(length)])
        return backbone, program.pairs(made.tokenizer, seed=seed, **SIZES), sites

    return Case(f"compiled program: {name}" + f", seed {seed}" * (seed > 0), chosen_on, make)


def _outputs(layers: int, positions: list[str]) -> list[Site]:
    return [Site("block_output", layer, at) for layer in range(layers) for at in positions]


def cases_of(seed: int) -> list[Case]:
    """All cases; `seed` is added to the seeds of their models and pairs."""
    return [
        planted(seed, chosen_on=True),
        planted(seed + 1, chosen_on=True),
        decoder("price_tagging", "above_lower", seed, chosen_on=True),
        compiled("equal", seed, chosen_on=True),
        planted(seed + 2),
        planted(seed + 3),
        decoder("price_tagging", "below_upper", seed + 2),
        decoder("entity_attribute", "country", seed + 1),
        decoder("entity_attribute", "food", seed + 2),
        compiled("carry", seed),
        compiled("modular sum", seed),
    ]


def best_dev(fits: Fits) -> dict[str, float]:
    """{site: the highest dev IIA of a subspace that was trained there}."""
    scores: dict[str, float] = {}
    for fit in fits.where(method=DAS):
        scores[fit.place] = max(scores.get(fit.place, 0.0), fit.score("iia", "dev").value)
    return scores


def measured(
    case: Case, screen: Screen, config: TrainingConfig, *, screened_first: bool, device: str, seed: int
) -> dict[str, Any]:
    """How long both sweeps took, and whether the best site was lost."""
    backbone, pairs, sites = case.make(device)

    def swept(one: Screen | None, some: list[Site], config: TrainingConfig = config) -> tuple[Fits, float]:
        start = clock(device)
        fits = sweep(
            backbone, pairs, some, default_methods(RANKS), seeds=[seed], config=config, min_accuracy=None,
            quiet=True, screen=one,
        )  # fmt: skip
        return fits, clock(device) - start

    swept(None, sites[:1], replace(config, steps=2))  # what a model's first run costs is neither's
    took = {}
    for screened in (screened_first, not screened_first):
        took[screened] = swept(screen if screened else None, sites)
    full, kept = best_dev(took[False][0]), best_dev(took[True][0])
    best, reached = max(full.values()), max(full[site] for site in kept)
    return {
        "chosen_on": case.chosen_on,
        "sites": len(sites),
        "trained": len(kept),
        "best": best,
        "best_kept": reached,
        "near_best": sum(score >= best - TIE for score in full.values()),
        "lost": reached < best - TIE,
        "saving": 1 - took[True][1] / took[False][1],
        "seconds": took[False][1],
        "seconds_screened": took[True][1],
    }


def figures(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the cases on which nothing was chosen: the share of the time saved, and of the cases with the best lost."""
    reported = [one for one in cases.values() if not one["chosen_on"]]
    return {
        "screen_saving": figure([one["saving"] for one in reported]),
        "screen_lost": figure([sum(one["lost"] for one in reported) / len(reported)]),
    }


def all_measured(quick: bool, device: str, seed: int, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """{case: what `measured` says of it}.

    Args:
        quick: two cases and few steps, which says only whether it runs.
        device: where the models are.
        seed: added to those of the cases, and that of the sweeps.
        names: of the cases, all by default.
    """
    config = replace(CONFIG, steps=20) if quick else CONFIG
    cases = [case for case in cases_of(seed) if names is None or case.name in names]
    found = {}
    for i, case in enumerate(cases[:: max(1, len(cases) - 1)] if quick else cases):
        found[case.name] = measured(case, Screen(), config, screened_first=i % 2 == 1, device=device, seed=seed)
        print(f"  {case.name}: {found[case.name]}", file=sys.stderr, flush=True)
    return found


def settings(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "screen": asdict(Screen()),
        "ranks": RANKS,
        "pairs": SIZES,
        "training": asdict(CONFIG),
        "tie": TIE,
        "cases": cases,
    }


def main() -> None:
    parser = options(__doc__, "Two cases, few steps.")
    parser.add_argument("--case", action="append", help="one of the cases by its name; may be given again")
    args = parser.parse_args()
    names = [case.name for case in cases_of(args.seed)]
    if unknown := [name for name in args.case or [] if name not in names]:
        parser.error(f"--case: unknown {unknown}; possible are {names}")
    torch.set_num_threads(1)
    cases = all_measured(args.quick, args.device, args.seed, args.case)
    found = figures(cases) if any(not one["chosen_on"] for one in cases.values()) else {}
    report("screening", {**settings(cases), "quick": args.quick}, found, args.device, args.json)


if __name__ == "__main__":
    main()
