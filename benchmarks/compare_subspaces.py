"""How near are the subspaces that DAS finds in other layers, from other seeds, in other models, and those of LoReFT?

    python benchmarks/compare_subspaces.py [--quick] [--json PATH] [--device D] [--seed N] [--part layers|models|loreft]

Price tagging in the shipped decoder, the variable "at least the lower bound". Beside each figure stand what two seeds
at one site share, and what subspaces give that know nothing: random ones, random ones of the top principal components,
fits on a randomly initialised twin.

    layers   4 layers × 4 positions, rank 4, three seeds; fits at their floor do not count. By overlap of the spans, and
             by what they do: `analysis/similarity.py`. Whether the effect of one layer passes the next one's
             subspace: `analysis/mediation.py`. About 3 minutes on one thread.
    models   the shipped decoder, and two that were trained anew from seeds 1 and 2 by train_shipped_model.py (about 20
             minutes each on one thread, once; kept in the user's cache folder). What independently trained models
             share, and what is left of it in common coordinates. About 4 minutes besides.
    loreft   an adapter of rank 4 at the site that dev chooses, taught to answer as if the variable had its other value:
             what it reads and what it writes against what DAS finds there. About 2 minutes.

What was seen across models: the spans of three independently trained models overlap as random ones do (.06, two seeds
of one model .37), a quarter is shared once the states are mapped onto each other (ridge .25), and what the subspaces do
is nearly the same (cosine of effects .92 [.87, .96], two seeds of one model .97).

Parts that are run alone are put together in the file of --json; the pictures lie beside it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import options, write

from subspace_lab.analysis.compared import read
from subspace_lab.analysis.comparisons import Comparison, compare, spectra
from subspace_lab.analysis.drift import DriftCorrected, procrustes, ridge
from subspace_lab.analysis.geometry import Chance, consensus, overlap
from subspace_lab.analysis.looks import prepared, principal_null
from subspace_lab.analysis.mediation import carried, mediation
from subspace_lab.analysis.plots import angle_spectrum
from subspace_lab.analysis.reft_subspaces import reft_alignments
from subspace_lab.analysis.similarity import Agreement, ClassMeans, DataWeighted, Functional, outcomes
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.cli.loading import Source, load_causal, load_tokenizer
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS
from subspace_lab.das.objectives import iia
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import tokenise
from subspace_lab.reft.finetune import finetune
from subspace_lab.reft.model import get_reft_model
from subspace_lab.tasks.price_tagging import PRICE_TAGGING

RANK, TOP = 4, 16
POSITIONS = ("amount", "unit", "query", "last")
RETRAINED = (1, 2)
Found = dict[str, Any]


# --- what is searched -------------------------------------------------------------------------------------------


def sizes(quick: bool) -> dict[str, int]:
    return {"train": 60, "dev": 40, "test": 60} if quick else {"train": 1000, "dev": 200, "test": 400}


def training(quick: bool) -> TrainingConfig:
    return TrainingConfig(steps=25 if quick else 100, learning_rate=0.05)


def places(quick: bool) -> list[Site]:
    layers, positions = (range(1, 3), POSITIONS[-1:]) if quick else (range(4), POSITIONS)
    return [Site("block_output", layer, position) for layer in layers for position in positions]


def seeds_of(args: Namespace) -> list[int]:
    return [args.seed + i for i in range(2 if args.quick else 3)]


def drawn(tokenizer: Any, args: Namespace) -> Pairs:
    return PRICE_TAGGING.pairs(tokenizer, **sizes(args.quick), seed=args.seed)


def searched(
    backbone: Backbone, pairs: Pairs, seeds: list[int], quick: bool, min_accuracy: float | None = 0.9
) -> Fits:
    return sweep(
        backbone, pairs, places(quick), [DAS(RANK)], seeds=seeds, config=training(quick), quiet=True,
        min_accuracy=min_accuracy,
    )  # fmt: skip


def shipped(device: str) -> tuple[Any, Any]:
    """(tokenizer, model)"""
    source = Source(None, trust_remote_code=False)
    return load_tokenizer(source), load_causal(source, device, "auto")


def retrained(seed: int, args: Namespace) -> Any:
    """The shipped decoder trained anew from another seed, once, in the user's cache folder."""
    from transformers import AutoModelForCausalLM

    if args.quick:  # a training takes 20 minutes: the shipped one again, with weights that are a little larger
        model = shipped(args.device)[1]
        model.get_input_embeddings().weight.data.mul_(1.001)
        return model
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "subspace_lab" / f"tiny_decoder_seed_{seed}"
    if not (folder / "training.json").is_file():  # written last
        script = Path(__file__).with_name("train_shipped_model.py")
        subprocess.run([sys.executable, str(script), "--out", str(folder), "--seed", str(seed)], check=True)
    return AutoModelForCausalLM.from_pretrained(folder).eval().to(args.device)


# --- figures ----------------------------------------------------------------------------------------------------


def figures(name: str, found: Comparison) -> Found:
    """The means of a comparison as figures: the interval of the mean, and the median of the pairs."""
    told = {}
    what = {"across": f"across {found.facets[0]}s", "within": f"two {found.facets[1]}s"}
    for which, called in what.items():
        level = getattr(found, which)
        if level is not None:
            told[f"{name}, {called}"] = {
                "median": statistics.median(level.values),
                "mean": level.mean,
                "low": level.mean if level.low is None else level.low,
                "high": level.mean if level.high is None else level.high,
                "n": level.pairs,
            }
    nulls = {"random": found.null, **found.nulls}
    return told | {f"{name}, {called}": of_chance(null) for called, null in nulls.items() if null is not None}


def of_chance(null: Chance) -> Found:
    return {"median": null.mean, "mean": null.mean, "low": null.low, "high": null.high, "n": null.draws}


def say(found: Comparison) -> None:
    print(f"  {found.sentence}", flush=True)


# --- the parts --------------------------------------------------------------------------------------------------


def layers(args: Namespace, pictures: Path | None) -> Found:
    """Layers against layers, beside seeds against seeds."""
    tokenizer, model = shipped(args.device)
    backbone, pairs = Backbone(model), drawn(tokenizer, args)
    quick, seeds = args.quick, seeds_of(args)
    fits = searched(backbone, pairs, seeds, quick)
    twin = searched(Backbone(reinitialised(model, args.seed)), pairs, seeds, quick, min_accuracy=None)
    found: Found = {}
    spans = compare(fits, across="layer", within="seed", null={"twin": twin})
    if pictures is not None:
        spans.plot(pictures / "compare_layers.png")
        angles = spectra(fits, across="layer", within="seed")
        angle_spectrum(angles.angles, angles.null, pictures / "compare_angles.png")
    found["fits above their floor"] = single(len(fits) - spans.masked, len(fits))
    fits = replace(fits, fits=tuple(fit for fit, item in zip(fits, read(fits), strict=True) if item.counts))
    look, trained_on = prepared(backbone, pairs.test, fits), prepared(backbone, pairs.train, fits)
    null = {f"top {TOP} components": principal_null(look, fits, TOP), "twin": twin}
    asked = partial(compare, fits, across="layer", within="seed")
    for name, measure in {
        "overlap": overlap,
        "data-weighted": DataWeighted(look),
        "class means": ClassMeans(look),
        "drift, Procrustes": DriftCorrected(trained_on, procrustes),
        "drift, ridge": DriftCorrected(trained_on, ridge),
        "effects": Functional(look),
        "answers": Agreement(look),
    }.items():
        # A fit on the twin, exchanged in the model, is not what it was on the twin: there it is a null of spans alone.
        nulls = null if measure is overlap else {name: of for name, of in null.items() if name != "twin"}
        one = asked(measure=measure, null=nulls)
        found |= figures(name, one)
        say(one)
    found |= passing(backbone, pairs, fits, args)
    best = fits.best()
    agreed = consensus([fit.subspace() for fit in fits.where(site=best.place)])
    found["dimensions that the seeds agree on"] = single(agreed.dimensions, agreed.n)
    print(
        f"  At {best.place} the mean projector of {agreed.n} seeds has {[round(v, 2) for v in agreed.eigenvalues]}."
    )
    return found


def passing(backbone: Backbone, pairs: Pairs, fits: Fits, args: Namespace) -> Found:
    """Whether the effect of each layer's subspace passes the next one's, at the last token."""
    data, found = pairs.test, {}
    items = [
        item
        for item in read(fits.where(positions="last", seed=args.seed))
        if item.counts and item.site is not None
    ]
    chain = [Alignment({item.variable: (item.site, item.subspace)}) for item in items]
    for one, other in pairwise(chain):
        first, second = one.site().layer, other.site().layer
        through = mediation(backbone, data, one, other, draws=2 if args.quick else 20)
        print(f"  {through.sentence}", flush=True)
        name, share = f"effect of layer {first} through layer {second}", through.share
        found[name] = {"median": share.value, "low": share.low, "high": share.high, "n": share.n}
        if through.control is not None:
            found[f"{name}, random"] = of_chance(through.control)
        moved = carried(backbone, data.rows(torch.arange(min(64, len(data)))), one, other.site())
        found[f"layer {first} carried by the Jacobian, overlap with layer {second}"] = single(
            overlap(moved.alignment.subspace(), other.subspace()), 1
        )
        found[f"layer {first} carried by the Jacobian, share of its movement"] = single(moved.share, 1)
        along = mediation(backbone, data, one, moved.alignment, draws=0)
        found[f"{name}, carried by the Jacobian"] = single(along.share.value, along.share.n)
    return found


def single(value: float, n: int) -> Found:
    return {"median": value, "low": value, "high": value, "n": n}


def models(args: Namespace, pictures: Path | None) -> Found:
    """Independently trained models, each searched from seeds of its own."""
    tokenizer, model = shipped(args.device)
    pairs, quick = drawn(tokenizer, args), args.quick
    networks = {"shipped": model}
    networks |= {f"seed {seed}": retrained(seed, args) for seed in (RETRAINED[:1] if quick else RETRAINED)}
    fits, looks, trained_on = {}, {}, {}
    found: Found = {}
    for number, (name, network) in enumerate(networks.items()):
        backbone = Backbone(network)
        seeds = [10 * number + seed for seed in seeds_of(args)]  # starts of its own
        fits[name] = searched(backbone, pairs, seeds, quick)
        looks[name] = prepared(backbone, pairs.test, fits[name])
        trained_on[name] = prepared(backbone, pairs.train, fits[name])
        best = fits[name].best()
        found[f"{name}, accuracy"] = single(fits[name].floors["test"].accuracy.value, len(pairs.test))
        found[f"{name}, IIA at the site that dev chooses"] = {
            **single(best.iia.value, best.iia.n), "low": best.iia.low, "high": best.iia.high, "site": best.place,
        }  # fmt: skip
        print(f"  {name}: {best.method.label} at {best.place}, IIA {best.iia}", flush=True)
    for name, measure in {
        "overlap": overlap,
        "drift, Procrustes": DriftCorrected(trained_on, procrustes),
        "drift, ridge": DriftCorrected(trained_on, ridge),
        "effects": Functional(looks),
        "answers": Agreement(looks),
    }.items():
        one = compare(fits, across="model", within="seed", measure=measure)
        found |= figures(f"models, {name}", one)
        say(one)
        if name == "effects" and pictures is not None:
            one.plot(pictures / "compare_models.png")
    return found


def loreft(args: Namespace, pictures: Path | None) -> Found:
    """What LoReFT reads and writes, taught to answer as if the variable had its other value."""
    tokenizer, model = shipped(args.device)
    backbone, pairs = Backbone(model), drawn(tokenizer, args)
    quick, seeds = args.quick, seeds_of(args)
    every = searched(backbone, pairs, seeds, quick)
    # An adapter counts its positions in prompts of any kind, so it is at their last token.
    site = every.where(positions="last").best().site
    fits = every.where(site=site)
    examples = inverted(60 if quick else 1000, "train", args.seed)
    asked = inverted(60 if quick else 400, "test", args.seed)
    groups: dict[str, Any] = {"DAS": fits, "LoReFT, read": [], "LoReFT, written": []}
    found: Found = {}
    right = []
    for seed in seeds:
        config = ReftConfig("LoReFT", rank=RANK, layers=[site.layer], positions="last", seed=100 + seed)
        reft = get_reft_model(shipped(args.device)[1], config)
        finetune(reft, tokenise(examples, tokenizer, end=False), training(quick), quiet=True)
        right.append(correct(reft, tokenizer, asked))
        sides = reft_alignments(reft, PRICE_TAGGING.variable)
        for side in ("read", "written"):
            groups[f"LoReFT, {side}"].append(sides[side][site])
            strengths = sides[side][site].facts["strengths"]
        found[f"LoReFT, strengths, seed {seed}"] = {**single(strengths[0], len(strengths)), "strengths": strengths}
    found["LoReFT, inverted answers right"] = {
        "median": statistics.median(right), "low": min(right), "high": max(right), "n": len(right),
    }  # fmt: skip
    look = prepared(backbone, pairs.test, fits)
    top = {f"top {TOP} components": principal_null(look, fits, TOP)}
    for name, measure in {
        "overlap": overlap,
        "data-weighted": DataWeighted(look),
        "class means": ClassMeans(look),
        "effects": Functional(look),
        "answers": Agreement(look),
    }.items():
        for side in ("read", "written"):
            pair = {"DAS": groups["DAS"], f"LoReFT, {side}": groups[f"LoReFT, {side}"]}
            one = compare(pair, across="method", within="seed", measure=measure, null=top)
            found |= figures(f"LoReFT {side}, {name}", one)
            say(one)
        if measure is overlap and pictures is not None:
            compare(groups, across="method", within="seed").plot(pictures / "compare_loreft.png")
    for name, group in groups.items():
        scores = [float(iia(one).mean()) for one in outcomes(look, read({"x": group}))]
        found[f"interchange in {name}, IIA"] = {
            "median": statistics.median(scores), "low": min(scores), "high": max(scores), "n": len(scores),
        }  # fmt: skip
    return found


def inverted(n: int, split: str, seed: int) -> list[dict[str, str]]:
    """Prompts with the answer that they would have if the variable had its other value."""
    task, rng, found = PRICE_TAGGING, random.Random(f"inverted {split}{seed or ''}"), []
    while len(found) < n:
        setting = task.sample(rng, split)
        values = task.causal_model.run(task.inputs(setting))
        answer = (not values["above_lower"]) & values["below_upper"]
        found.append({"prompt": task.prompt(setting).text, "answer": f" {task.answers[answer]}"})
    return found


@torch.no_grad()
def correct(reft: Any, tokenizer: Any, examples: list[dict[str, str]]) -> float:
    """The share of prompts that the adapter answers as it was taught to."""
    right = 0
    for one in examples:
        batch = tokenizer([one["prompt"]], return_tensors="pt").to(reft.device)
        logits = reft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, -1]
        right += int(logits.argmax()) == tokenizer.convert_tokens_to_ids(one["answer"].strip())
    return right / len(examples)


PARTS = {"layers": layers, "models": models, "loreft": loreft}


def main() -> None:
    parser = options(__doc__, "Fewer pairs, sites, steps and seeds; nothing is trained anew.")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: Found = {}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.json is not None and args.json.is_file():
        found = json.loads(args.json.read_text())["results"]
    for name, part in PARTS.items():
        if args.part in (name, "all"):
            print(f"{name}:", flush=True)
            results = part(args, None if args.json is None else args.json.parent)
            found |= {f"{name}: {key}": value for key, value in results.items()}
            if args.json is not None:
                settings = {
                    "task": PRICE_TAGGING.name, "variable": PRICE_TAGGING.variable, "rank": RANK,
                    "pairs": sizes(args.quick), "steps": training(args.quick).steps, "quick": args.quick,
                }  # fmt: skip
                write(args.json, "compare_subspaces", settings, found, args.device)
    for key, value in found.items():
        print(f"  {key:70s} {value['median']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]  n={value['n']}")


if __name__ == "__main__":
    main()
