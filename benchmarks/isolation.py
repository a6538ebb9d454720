"""Cause and isolation: is the country of an entity exchanged without its food, on entities that the search never saw?

    python benchmarks/isolation.py [--quick] [--json PATH] [--device D] [--seed N]

The shipped decoder knows the country and the food of 72 made-up entities. The source asks for the country. A pair of
the kind "cause" asks for the country too: once the variable is exchanged, the answer has to be the source's. A pair of
the kind "isolate" asks for the food, of which the source has another one: the answer has to stay the base's. MDAS with
isolate=0 is DAS on the pairs of the first kind alone, MDAS is trained on both. Train, dev and test share no entity. For
each method and rank the place is chosen on dev by (cause + iso)/2 and scored on test. About 4 minutes on one thread.

In the complement of the subspace are the source's question and food, so that `complement_stays` is at most one half
here: it is reported for what it says of pairs of the kind "cause", where it should be 1.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import torch
from datasets import Dataset
from harness import figure, options, report

from subspace_lab.cli.loading import Source, load_causal, load_tokenizer
from subspace_lab.core.sites import Site
from subspace_lab.das.encoding import encode
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import MDAS, BoundlessDAS, DifferenceOfMeans, FullVector, RandomSubspace
from subspace_lab.das.objectives import cause, complement_stays, disentangle, iia_vocabulary, iso
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.entity_attribute import ENTITY_ATTRIBUTE, FACTS

VARIABLE, OTHER = "country", "food"


def pairs(tokenizer: Any, n: int, split: str, seed: int) -> Counterfactuals:
    """n pairs, every second one of the kind "isolate"; bases and sources have another country and another food."""
    task, rng = ENTITY_ATTRIBUTE, random.Random(f"{seed} {split}")
    rows = []
    while len(rows) < n:
        base, source = task.sample(rng, split), task.sample(rng, split)
        base["attribute"], source["attribute"] = (OTHER if len(rows) % 2 else VARIABLE), VARIABLE
        source["template"] = base["template"]
        if any(a == b for a, b in zip(FACTS[base["entity"]], FACTS[source["entity"]], strict=True)):
            continue
        asked, given = task.prompt(base), task.prompt(source)
        after = task.causal_model.interchange(task.inputs(base), {VARIABLE: task.inputs(source)})
        rows.append(
            {
                "base": asked.text,
                "base_spans": {name: list(span) for name, span in asked.spans.items()},
                "sources": {VARIABLE: given.text},
                "source_spans": {VARIABLE: {name: list(span) for name, span in given.spans.items()}},
                "source_values": {VARIABLE: FACTS[source["entity"]][0]},
                "base_answer": task.answer(base),
                "answer": task.answers[after[task.causal_model.output]],
                "entity": base["entity"],
                "template": str(base["template"]),
                "kind": "isolate" if len(rows) % 2 else "cause",
            }
        )
    return encode(Dataset.from_list(rows), tokenizer, list(task.answers.values()))


METHODS = {
    "DAS": MDAS([4, 16, 32], isolate=0.0),
    "MDAS": MDAS([4, 16, 32]),
    "BoundlessDAS": BoundlessDAS(),
    "DifferenceOfMeans": DifferenceOfMeans(),
    "FullVector": FullVector(),
    "RandomSubspace": RandomSubspace(16, draws=2),
}
SITES = [Site("block_input", 0, "entity"), Site("block_output", 0, "last"), Site("block_output", 1, "last")]
SCORES = (disentangle, cause, iso, iia_vocabulary, complement_stays)
COMPARED = 16  # the rank of the two headline figures


def results(fits: Fits) -> dict[str, Any]:
    """For each method and rank the place that dev chooses by the mean over seeds, and its scores on test."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        for variant in method.variants():
            means = fits.where(method=variant).mean(metric="disentangle", split="dev")
            chosen = max(means, key=lambda mean: mean.value)
            label = f"{name} {variant.rank}" if isinstance(variant, MDAS) else name
            print(f"{label:18} {chosen.place:24}", end="")
            for score in SCORES:
                values = [fit.score(score.__name__).value for fit in chosen.fits]
                found[f"{label}, {score.__name__}"] = {**figure(values), "site": chosen.place}
                print(f"  {score.__name__} {statistics.fmean(values):.3f}", end="")
            of_cause = fits.where(method=variant, site=chosen.place).by_kind("complement_stays")
            kept = [line["value"] for line in of_cause if line["kind"] == "cause"]
            found[f"{label}, complement_stays of cause"] = {**figure(kept), "site": chosen.place}
            print(f"  of cause {statistics.fmean(kept):.3f}  rank {[fit.rank for fit in chosen.fits]}")
    found["mdas_cause"] = found[f"MDAS {COMPARED}, cause"]
    found["mdas_isolation"] = found[f"MDAS {COMPARED}, iso"]
    return found


def measured(quick: bool, device: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, results) of the search; with `quick` one place and seed, fewer pairs and steps."""
    source = Source(None, trust_remote_code=False)
    tokenizer, model = load_tokenizer(source), load_causal(source, device, "auto")
    sizes = {"train": 100, "dev": 60, "test": 60} if quick else {"train": 800, "dev": 240, "test": 480}
    data = Pairs(**{split: pairs(tokenizer, n, split, seed) for split, n in sizes.items()}, task="isolation")
    config = TrainingConfig(steps=5 if quick else 150, learning_rate=0.05)
    sites = SITES[1:2] if quick else SITES
    fits = sweep(
        Backbone(model),
        data,
        sites,
        list(METHODS.values()),
        seeds=[seed + i for i in range(1 if quick else 3)],
        config=config,
        metrics=SCORES,
    )
    print(f"Intervals {fits.facts['intervals']}; the model answers {fits.floors['test'].accuracy} of the bases.")
    settings = {
        "task": ENTITY_ATTRIBUTE.name,
        "pairs": sizes,
        "sites": [str(site) for site in sites],
        "training": fits.facts["training"],
        "seeds": fits.facts["seeds"],
        "rank of mdas_cause and mdas_isolation": COMPARED,
        "quick": quick,
    }
    return settings, results(fits)


def main() -> None:
    args = options(__doc__, "One place and seed, fewer pairs and steps.").parse_args()
    torch.set_num_threads(1)
    settings, found = measured(args.quick, args.device, args.seed)
    report("isolation", settings, found, args.device, args.json)


if __name__ == "__main__":
    main()
