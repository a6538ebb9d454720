"""Variables in a real language model: SmolLM2-135M, with baselines and controls beside DAS.

    python benchmarks/das_smollm2.py [--quick] [--json PATH] [--device D] [--seed N] [--part agreement,verdict,…]

    agreement   the number of the subject, at 30 layers × 3 positions, rank 1: DAS, difference of means, full vector,
                random subspaces, and DAS in a randomly initialised twin. Nouns are held out.
    verdict     the number of the subject at six of these sites, and `check` with 19 randomly initialised twins, with
                control labels and with twins that keep a part of what was learned
    names       the indirect object's name, once with names that the search has not seen, once with the same names
                in all splits: what a search has learned of the names, and what of the variable
    cities      the country of a city, exchanged without its language and continent (`cause` and `iso`, on cities that
                are held out): DAS on the pairs that ask for the country, DAS with isolation losses (MDAS), full vector

What was seen (seed 0). Agreement: the number is at the subject's own token up to layer 25 and at the last token from
layer 26 on; nothing is at the preposition between them, and the twin is at its floor everywhere. One direction is
enough: DAS has .93 or more at the subject in all layers up to 25 but one, and by the picture the difference of means
does no worse there. At layer 26, where the number arrives at the last token, DAS has .95 and the difference of means
.74. At layer 2 the search failed (.51): 48 steps did not find what the difference of means has there. The expected
verb is the likeliest word of all in .47 of the pairs only. The name: with 64 dimensions DAS is right in all its
training pairs either way, and with the same names in .95 of the test pairs; with new names in .51, which is the
floor. It has learned where these names are, not where "the name" is; the whole state of layer 28 carries new names
too (1.00).

The verdict of six sites is "supported": of 125 test pairs .97 [.92, 1.00] at the subject in layer 14; 19 twins have
effects of .05 at most, control labels of −.18. The checks add that the difference of means does as well there (.98),
that with all else exchanged the answer stays (1.00), and that twins with only the embeddings, or only one half of the
layers left, are at the floor.

Cities: the whole state at the city's last token in layer 16 moves the country in .97 of the pairs that ask for it, and
takes language and continent with it (they stay in .27). With 32 of 576 dimensions DAS moves .67 and keeps .40; with
isolation losses it moves .48 and keeps .64, and a random subspace moves .01 and keeps .91. So isolation can be bought,
but of cities that are held out no subspace of this size, learned from 211 pairs of a model this small, moves the
country alone: `disentangle` is .56 [.32, .79] at best, against .62 [.51, .73] for the whole state.

Places are chosen on dev pairs; scores are of test pairs. Prompts count where the model is right on base and source.
With --json the figures of the parts that ran replace those in the file, and the others stay; pictures go beside it.
All of agreement, with its twin, took 15 minutes with --workers 2 --threads 1 on two cores, the verdict 14 minutes on
one; --layers takes some of agreement's layers. `smollm2_model.py` says where the model comes from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import figure, machine, options, report
from smollm2_model import smollm2

from subspace_lab.analysis.checking import check
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.plots.verdicts import verdict_plot
from subspace_lab.analysis.twins import embeddings_kept, only_above, only_below, reinitialised
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, MDAS, PCA, DifferenceOfMeans, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import cause, complement_stays, disentangle, iia, iia_vocabulary, iso
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.search import search
from subspace_lab.das.workers import local_workers
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks import load_task

Figures = dict[str, dict[str, Any]]


def scores(fits: Fits, methods: Sequence[Method], metrics: Sequence[str], name: str = "") -> Figures:
    """For each method the place that dev chooses by the first metric, and its test scores over seeds."""
    found: Figures = {}
    for method in [variant for one in methods for variant in one.variants()]:
        of = fits.where(method=method)
        best = max(of.mean(metric=metrics[0], split="dev"), key=lambda mean: mean.value)
        for metric in metrics:
            values = [fit.score(metric) for fit in best.fits]
            found[f"{name}{method.label}, {metric}"] = {
                **figure([value.value for value in values]),
                "interval": [min(v.low for v in values), max(v.high for v in values)],
                "site": best.place,
            }
    return found


def numbers(text: str, depth: int) -> list[int]:
    """The layers of "all" or "0,8,14"."""
    return list(range(depth)) if text == "all" else [int(part) for part in text.split(",")]


def floors(fits: Fits) -> dict[str, float]:
    of = fits.floors["test"]
    return {
        "answered right": of.accuracy.value,
        "no intervention": of.no_intervention.value,
        "constant": of.constant.value,
    }


def agreement(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Figures, dict[str, Any]]:
    task = load_task("number_agreement")
    sizes = {"train": 24, "dev": 16, "test": 16} if args.quick else {"train": 144, "dev": 64, "test": 128}
    pairs = task.pairs(tokenizer, **sizes, seed=args.seed)
    depth = model.config.num_hidden_layers
    layers = [depth - 2] if args.quick else numbers(args.layers, depth)
    sites = [Site("block_output", i, p) for i in layers for p in ("subject", "preposition", "last")]
    # Batches of 16, as small as the subspace: 48 steps show each pair four times.
    config = TrainingConfig(steps=2 if args.quick else 48, batch_size=16, learning_rate=5e-2)
    methods: list[Method] = [DAS(1), DifferenceOfMeans(), FullVector(), RandomSubspace(1, draws=2)]
    start = time.perf_counter()
    with local_workers(args.workers) if args.workers else nullcontext() as pool:
        fits = search(
            Backbone(model), pairs, sites, methods=methods, config=config, seeds=[args.seed], label="model",
            executor=pool,
        )  # fmt: skip
        twin = search(
            Backbone(reinitialised(model, args.seed)), pairs, sites, methods=[DAS(1)], config=config,
            seeds=[args.seed], min_accuracy=None, label="twin", executor=pool,
        )  # fmt: skip
    minutes = (time.perf_counter() - start) / 60
    # The twin, searched by DAS alone, is drawn where dev chose DAS.
    drawn = twin if fits.best().method == DAS(1) else None
    iia_heatmap(fits, drawn, picture(args, "smollm2_agreement.png"))
    figures = scores(fits, methods, ["iia"]) | scores(twin, [DAS(1)], ["iia"], "twin: ")
    of_das = fits.where(method=DAS(1))
    chosen = max((f for f in of_das if f.site.layer < depth - 1), key=lambda fit: fit.score("iia", "dev").value)
    figures["smollm2_agreement_iia"] = {**figure([chosen.iia.value]), "site": chosen.place}
    figures["smollm2_agreement_minutes"] = figure([minutes])
    # Does the edited model say it, or is it only the likelier of the two answers?
    again = search(
        Backbone(model), pairs, [chosen.site], methods=[DAS(1)], config=config, seeds=[args.seed],
        metrics=[iia, iia_vocabulary, complement_stays], label="chosen",
    )  # fmt: skip
    figures |= scores(again, [DAS(1)], ["iia", "iia_vocabulary", "complement_stays"], "at the chosen site: ")
    maps: dict[str, dict[str, float]] = {f"twin: {DAS(1).label}": {f.place: round(f.iia.value, 3) for f in twin}}
    for method in fits.methods:
        maps[method] = {mean.place: round(mean.value, 3) for mean in fits.where(method=method).mean()}
    facts = {
        "pairs": fits.facts["pairs"],
        "floors": floors(fits),
        "floors of the twin": floors(twin),
        "maps": maps,
    }
    return figures, {**facts, "layers × positions": len(sites), "workers": args.workers}


def verdict(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Figures, dict[str, Any]]:
    task = load_task("number_agreement")
    sizes = {"train": 24, "dev": 16, "test": 16} if args.quick else {"train": 144, "dev": 64, "test": 128}
    pairs = task.pairs(tokenizer, **sizes, seed=args.seed)
    places = [(14, "subject"), (28, "last"), (4, "subject"), (24, "subject"), (14, "preposition"), (14, "last")]
    places = [(24, "subject"), (28, "last")] if args.quick else places
    config = TrainingConfig(steps=2 if args.quick else 48, batch_size=16, learning_rate=5e-2)
    methods: list[Method] = [DAS(1), DifferenceOfMeans(), PCA(1), RandomSubspace(1, draws=4)]
    backbone = Backbone(model)
    fits = search(
        backbone, pairs, [Site("block_output", layer, position) for layer, position in places], methods=methods,
        config=config, seeds=[args.seed], label="model", out=args.out and Path(args.out, "search"),
    )  # fmt: skip
    layer = fits.best().site.layer
    partial = {  # one twin is made and searched after the other
        "embeddings kept": (embeddings_kept(model, seed) for seed in [args.seed]),
        "only above": (only_above(model, layer, seed) for seed in [args.seed]),
        "only below": (only_below(model, layer, seed) for seed in [args.seed]),
    }
    if args.quick:
        partial = {"only above": partial["only above"]}
    found = check(
        backbone, pairs, fits, twins=1 if args.quick else 19, partial=partial, seed=args.seed,
        out=args.out and Path(args.out, "check"),
    )  # fmt: skip
    verdict_plot(found, picture(args, "smollm2_verdict.png"))
    print(found)
    figures = scores(fits, methods, ["iia"], "six sites: ")
    figures["smollm2_supported"] = figure([float(found.supported)])
    figures["smollm2_effect"] = {**figure([found.effect]), "interval": list(found.interval)}
    figures["smollm2_p"] = figure([found.p])
    checks = {one.name: one.because for one in found.checks}
    return figures, {"verdict": str(found), "checks": checks, "floors": floors(fits)}


def names(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Figures, dict[str, Any]]:
    task, variable = load_task("indirect_object"), "indirect_object"
    sizes = {"train": 16, "dev": 12, "test": 12} if args.quick else {"train": 400, "dev": 100, "test": 200}
    held_out = task.pairs(tokenizer, **sizes, seed=args.seed, variables=[variable])
    every = task.pairs(
        tokenizer, train=sum(sizes.values()), dev=1, test=1, seed=args.seed + 1, variables=[variable]
    ).train
    shares = {name: sizes[name] / sum(sizes.values()) for name in ("dev", "test")}
    same = Pairs.split(every, **shares, seed=args.seed, task=f"{task.name}, the same names in all splits")
    ranks = [16] if args.quick else [4, 16, 64]
    methods: list[Method] = [DAS(ranks), FullVector(), RandomSubspace(16, draws=3)]
    layers = [28] if args.quick else [16, 20, 22, 24, 26, 28]
    sites = [Site("block_output", layer, "last") for layer in layers]
    config = TrainingConfig(steps=2 if args.quick else 60, learning_rate=5e-2)
    figures: Figures = {}
    facts: dict[str, Any] = {}
    for name, pairs in (("new names", held_out), ("same names", same)):
        fits = search(
            Backbone(model),
            pairs,
            sites,
            methods=methods,
            config=config,
            seeds=[args.seed],
            min_accuracy=0.7,
            label=name,
        )
        figures |= scores(fits, methods, ["iia"], f"{name}: ")
        best = max((f for f in fits.where(method="DAS")), key=lambda fit: fit.score("iia", "dev").value)
        figures[f"{name}: {best.method.label}, iia in training"] = figure([best.score("iia", "train").value])
        facts[name] = {"pairs": fits.facts["pairs"], "floors": floors(fits)}
    return figures, facts


def cities(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Figures, dict[str, Any]]:
    task = load_task("city_attribute")
    sizes = {"train": 30, "dev": 18, "test": 18} if args.quick else {"train": 240, "dev": 90, "test": 180}
    pairs = task.pairs(tokenizer, **sizes, seed=args.seed, variables=["country"])
    methods: list[Method] = [MDAS(32, isolate=0.0), MDAS(32), FullVector(), RandomSubspace(32, draws=2)]
    # Where a model looks a city up lies early at its name, and what it will say late at the last word.
    places = [(22, "last")] if args.quick else [(4, "entity"), (10, "entity"), (16, "entity"), (22, "last")]
    sites = [Site("block_output", layer, position) for layer, position in places]
    config = TrainingConfig(steps=2 if args.quick else 60, batch_size=16, learning_rate=5e-2)
    fits = search(
        Backbone(model), pairs, sites, methods=methods, config=config, seeds=[args.seed],
        metrics=[disentangle, cause, iso, iia_vocabulary], min_accuracy=0.5, label="cities",
    )  # fmt: skip
    figures = scores(fits, methods, ["disentangle", "cause", "iso", "iia_vocabulary"])
    return figures, {"pairs": fits.facts["pairs"], "floors": floors(fits)}


PARTS: dict[str, Callable[..., tuple[Figures, dict[str, Any]]]] = {
    "agreement": agreement,
    "verdict": verdict,
    "names": names,
    "cities": cities,
}


def picture(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.json is None or args.quick else Path(args.json).parent / name


def main() -> None:
    parser = options(__doc__, "Few pairs, late layers, two steps.", "of the pairs, the searches and the twins")
    parser.add_argument("--model", help="a folder or a name on the Hub instead of the package's copy")
    parser.add_argument("--out", metavar="FOLDER", help="of `verdict`: keeps each search, so that it can go on")
    parser.add_argument("--layers", default="all", help="of `agreement`: all, or some as 0,14,28")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the sites of `agreement`")
    parser.add_argument("--threads", type=int, help="of the processor; torch's choice by default")
    parser.add_argument("--part", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    args = parser.parse_args()
    parts = args.part.split(",")
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--part: unknown {unknown}; possible are {list(PARTS)}, with commas between them")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = smollm2(args.model)
    model = model.to(args.device)
    settings: dict[str, Any] = {"parts": {}}
    results: dict[str, Any] = {}
    if args.json and Path(args.json).is_file():
        before = json.loads(Path(args.json).read_text())
        settings["parts"] = before["settings"]["parts"]
        kept = [name for name in settings["parts"] if name not in parts]
        results = {k: v for k, v in before["results"].items() if v.get("part") in kept}
    for name in parts:
        print(name, file=sys.stderr)
        start = time.perf_counter()
        figures, facts = PARTS[name](args, model, tokenizer)
        results |= {key: {**value, "part": name} for key, value in figures.items()}
        shared = {"seed": args.seed, "quick": args.quick, "seconds": round(time.perf_counter() - start)}
        settings["parts"][name] = {**facts, **shared, "machine": machine(args.device)}
        if args.json:  # a long part is not lost with a later one
            report("das_smollm2", settings, results, args.device, args.json)
    report("das_smollm2", settings, results, args.device, args.json)


if __name__ == "__main__":
    main()
