"""How often a verdict is wrong: "supported" where a model holds no variable, something else where it holds one.

    python benchmarks/controls.py [--quick] [--json PATH] [--device D] [--seed N] [--out FOLDER] [--part …]

A case is a small search, of 256 to 1024 training pairs, and `check` with 19 randomly initialised twins. What is
judged is the share of "supported"; Wilson's intervals stand beside it. "underpowered" is counted apart: among
models that hold nothing it is taken out of the number of cases, so that it does not make the share smaller; where
a variable is planted it counts as missed.

Models that hold no such variable, 202 cases; 102 of them are made so that a search may succeed all the same:

    linear          DAS on random networks of two hidden layers, pairs of hierarchical equality
    decoder         DAS on random Llamas, pairs of a sum modulo 3
    readable        DAS on random networks, the sign of one direction of the input: it can be read in any state, and a
                    subspace that reads it and moves the output gets .65 to .75 of the pairs right
    fixed pool      DAS of a high rank on wide random networks, 200 pairs that are seen again and again
    shared entities DAS on random networks, arbitrary attributes of 16 entities that all splits share
    control labels  DAS on models that hold a variable, where each source has an arbitrary label; the splits share
                    sources in most of the cases
    nonlinear       RevNet maps on random networks, pairs as of "readable": they get up to .85 right

Models into which a variable was written, 104 cases (subspace_lab/tasks/planted.py): Llamas that add modulo 3,
searched at three sites, and regressions of several widths and ranks.

control_set_cost: `check` of 19 twins × 3 seeds at the chosen site, over the README's search of 16 sites and a
twin, in processor time of one thread, measured in one run.

What was seen: of 202 models that hold nothing 1 is "supported" (of 174 without the underpowered ones, .006
[.001, .032]; "shared entities", where .05 [.01, .24] of 20 are), of 104 planted variables all are, and the control
set costs 1.4 searches. One rule of the verdict, that a twin with half of the model's effect gives "expressive", was
made after the first seeds of the hard cases were seen, and these are among the cases counted here.

With --out each case is kept as it ends, and those that are there already are not run again. About 20 minutes on
one thread.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import clock, figure, options, report
from torch import Tensor, nn

from subspace_lab.analysis.checking import check, of_search
from subspace_lab.analysis.controls import control_labels
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.estimates import proportion
from subspace_lab.core.sites import Site
from subspace_lab.das.answered import only_answered
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, Method, RandomSubspace, RevNet
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.tasks.hierarchical_equality import LEFT_EQUALITY, counterfactuals
from subspace_lab.tasks.planted import planted_decoder, planted_regression

TWINS = 19
CONFIG = TrainingConfig(steps=60, learning_rate=0.05)
SIZES = {"train": 256, "dev": 128, "test": 256}
INPUTS = 16
ENTITIES = 16  # whose attributes are arbitrary


# --- models and pairs ---------------------------------------------------------------------------------------


class RandomLayer(nn.Linear):
    """tanh(W h + b), with weights that neither let the states die nor saturate them; drawn by `reset_parameters`."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.5 / self.in_features**0.5)
        nn.init.normal_(self.bias, std=0.3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class RandomNetwork(nn.Module):
    """Two hidden layers and a head over two answers, which it gives about equally often."""

    def __init__(self, seed: int, width: int, inputs: int = INPUTS) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = RandomLayer(inputs, width), RandomLayer(width, width)
            self.head = nn.Linear(width, 2, bias=False)
            self.head.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs)))


LAYERS = [Site("first.output"), Site("second.output")]


def equality(seed: int, **sizes: int) -> Pairs:
    """Is the first vector the second? Pairs of continuous inputs, of which no two are the same."""
    drawn = {name: counterfactuals(n, 1000 * seed + i, LEFT_EQUALITY) for i, (name, n) in enumerate(sizes.items())}
    return Pairs(**drawn, task="left equality")


def readable(seed: int, **sizes: int) -> Pairs:
    """Is the input on this side of a plane?"""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(INPUTS, generator=generator)

    def split(n: int) -> Counterfactuals:
        base, source = (torch.randn(n, INPUTS, generator=generator) for _ in range(2))
        before, after = ((inputs @ plane > 0).long() for inputs in (base, source))
        return Counterfactuals(Batch.of(base), {"side": Batch.of(source)}, before, after, ("0", "1"))

    return Pairs(**{name: split(n) for name, n in sizes.items()}, task="side of a plane")


def shared_entities(seed: int) -> Pairs:
    """Each entity has one of two attributes, by no rule; base and source are an entity among random numbers."""
    generator = torch.Generator().manual_seed(seed)
    entities = torch.randn(ENTITIES, INPUTS // 2, generator=generator)
    attribute = torch.randperm(ENTITIES, generator=generator) % 2

    def split(n: int) -> Counterfactuals:
        base, source = (torch.randint(ENTITIES, (n,), generator=generator) for _ in range(2))
        texts = [
            Batch.of(torch.cat([entities[one], torch.randn(n, INPUTS // 2, generator=generator)], 1))
            for one in (base, source)
        ]
        labels = {"entity": tuple(str(i) for i in base.tolist())}
        return Counterfactuals(
            texts[0], {"attribute": texts[1]}, attribute[base], attribute[source], ("0", "1"), labels=labels
        )

    return Pairs(**{name: split(n) for name, n in SIZES.items()}, task="attributes")


def with_shared_sources(pairs: Pairs, number: int, seed: int) -> Pairs:
    """The same bases, with sources out of a few that all splits share."""
    (variable,) = pairs.variables
    pool = pairs.test.sources[variable].rows(torch.arange(number))
    generator = torch.Generator().manual_seed(seed)

    def changed(split: Counterfactuals) -> Counterfactuals:
        chosen = pool.rows(torch.randint(number, (len(split),), generator=generator))
        return replace(split, sources={variable: chosen}, values={}, source_answers={})

    assert isinstance(pairs.train, Counterfactuals)
    return Pairs(changed(pairs.train), changed(pairs.dev), changed(pairs.test), pairs.task)


# --- the cases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What is searched, and how."""

    model: nn.Module
    pairs: Pairs
    sites: list[Site]
    method: Method
    config: TrainingConfig = CONFIG


def linear(seed: int) -> Search:
    pairs = equality(seed, **{**SIZES, "train": 1024})
    return Search(RandomNetwork(seed, 64), pairs, LAYERS, DAS(4), replace(CONFIG, steps=100))


def decoder(seed: int) -> Search:
    planted = planted_decoder(seed, **SIZES)
    last = Site("block_output", planted.site.layer + 1, "last")  # type: ignore[operator]
    return Search(
        reinitialised(planted.model, 1000 + seed),
        planted.pairs,
        [planted.site, last],
        DAS(2),
        replace(CONFIG, steps=100),
    )


def fixed_pool(seed: int) -> Search:
    pairs = equality(seed, **{**SIZES, "train": 200})
    return Search(RandomNetwork(seed, 512), pairs, LAYERS[:1], DAS(16), replace(CONFIG, steps=100))


def entities(seed: int) -> Search:
    return Search(RandomNetwork(seed, 64), shared_entities(seed), LAYERS, DAS(8))


def labels(seed: int) -> Search:
    found = of_regression(seed) if seed % 4 else of_decoder(seed)
    pairs = with_shared_sources(found.pairs, 24, seed) if seed % 3 else found.pairs
    return replace(found, pairs=control_labels(pairs, seed), method=DAS(4))


def reading(seed: int) -> Search:
    return Search(RandomNetwork(seed, 64), readable(seed, **SIZES), LAYERS, DAS(4))


def nonlinear(seed: int) -> Search:
    pairs = readable(seed, **{**SIZES, "train": 1024})
    return Search(RandomNetwork(seed, 64), pairs, LAYERS, RevNet(8), replace(CONFIG, batch_size=64))


def of_decoder(seed: int) -> Search:
    planted = planted_decoder(seed, **SIZES)
    layer, position = planted.site.layer, planted.site.positions
    assert layer is not None
    sites = [Site("block_output", layer - 1, position), planted.site, Site("block_output", layer, "last")]
    return Search(planted.model, planted.pairs, sites, DAS(2), replace(CONFIG, steps=40))


def of_regression(seed: int) -> Search:
    width, rank = (16, 32, 64)[seed % 3], (1, 2, 4)[seed // 3 % 3]
    planted = planted_regression(seed, width=width, rank=rank, batch=1024)
    assert callable(planted.pairs.train)
    pairs = replace(planted.pairs, train=planted.pairs.train(0))
    return Search(planted.model, pairs, [planted.site], DAS(rank), replace(CONFIG, steps=100))


Kinds = dict[str, tuple[Callable[[int], Search], int]]
RANDOM: Kinds = {
    "linear": (linear, 85),
    "decoder": (decoder, 15),
    "readable": (reading, 25),
    "fixed pool": (fixed_pool, 20),
    "shared entities": (entities, 20),
    "control labels": (labels, 20),
    "nonlinear": (nonlinear, 17),
}
PLANTED: Kinds = {"planted decoder": (of_decoder, 30), "planted regression": (of_regression, 74)}


def verdict_of(one: Search, quick: bool, device: str, seed: int) -> dict[str, Any]:
    """What is concluded, as `Verdict.as_dict`."""
    backbone = Backbone(one.model.to(device))
    rank = getattr(one.method, "rank", 1)
    beside = [DifferenceOfMeans(), PCA(rank), RandomSubspace(rank)]
    fits = sweep(
        backbone, one.pairs, one.sites, [one.method, *beside], seeds=[seed], config=one.config, min_accuracy=None,
        quiet=True,
    )  # fmt: skip
    twins = 3 if quick else TWINS
    return check(backbone, one.pairs, fits, twins=twins, seed=7 + seed, quiet=True).as_dict()


def run(kinds: Kinds, quick: bool, device: str, seed: int, out: Path | None) -> dict[str, list[dict[str, Any]]]:
    """{kind: verdicts}, those that are in the folder already as they are there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, (make, number) in kinds.items():
        found[kind] = []
        for case in range(seed, seed + (2 if quick else number)):
            path = None if out is None else out / f"{kind.replace(' ', '_')}_{case}.json"
            if path is not None and path.is_file():
                found[kind].append(json.loads(path.read_text()))
                continue
            start = clock(device)
            told = verdict_of(make(case), quick, device, seed) | {"seconds": clock(device) - start}
            found[kind].append(told)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(told) + "\n")
            line = (
                f"{kind} {case}: {told['conclusion']}, IIA {told['claim']['iia']['value']:.2f}, p {told['p']:.2g}"
            )
            print(f"{line}, {told['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def share(verdicts: list[dict[str, Any]], conclusion: str = "supported") -> dict[str, float]:
    """Of the verdicts those with a conclusion, with Wilson's interval."""
    there = proportion(torch.tensor([one["conclusion"] == conclusion for one in verdicts]))
    return {"median": there.value, "low": there.low, "high": there.high, "n": there.n}


def counted(random: dict[str, list[dict[str, Any]]], planted: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of both parts."""
    results: dict[str, Any] = {}
    for name, of in (("random_models", random), ("planted_truths", planted)):
        every = [one for verdicts in of.values() for one in verdicts]
        if not every:
            continue
        able = [one for one in every if one["conclusion"] != "underpowered"]
        results[f"supported_on_{name}"] = share(able if name == "random_models" and able else every)
        results[f"underpowered_on_{name}"] = share(every, "underpowered")
        for kind, verdicts in of.items():
            results[f"supported, {kind}"] = share(verdicts)
            results[f"seconds a case, {kind}"] = figure([one["seconds"] for one in verdicts])
    return results


def cost(quick: bool, device: str, seed: int) -> dict[str, Any]:
    """What a full set of controls costs beside the README's search."""
    from subspace_lab.cli.loading import Source, load_causal, load_tokenizer
    from subspace_lab.das.fits import Fits
    from subspace_lab.tasks import PRICE_TAGGING

    source = Source(None)
    model = load_causal(source, device, "auto")
    sizes = {"train": 100, "dev": 50, "test": 100} if quick else {"train": 1000, "dev": 200, "test": 400}
    backbone = Backbone(model)
    pairs = PRICE_TAGGING.pairs(load_tokenizer(source), **sizes, seed=seed)
    positions = ("amount", "unit", "query", "last")
    sites = [Site("block_output", layer, at) for layer in range(backbone.depth) for at in positions]
    config = TrainingConfig(steps=5 if quick else 60, learning_rate=0.05)
    start = clock(device)
    pairs = only_answered(backbone, pairs)

    def searched(of: Backbone) -> Fits:
        return search(
            of, pairs, sites, rank=8, seeds=[seed], config=config, min_accuracy=None, right_only=False, quiet=True
        )

    fits, twin = searched(backbone), searched(Backbone(reinitialised(model, seed)))
    first = of_search(backbone, pairs, fits, [twin])
    whole = clock(device) - start
    start = clock(device)
    seeds = [seed + i for i in range(3)]
    verdict = check(
        backbone, pairs, fits, twins=2 if quick else TWINS, searched=[twin], seeds=seeds, seed=seed, quiet=True
    )
    seconds = clock(device) - start
    print(f"{first}\n{verdict}", file=sys.stderr)
    return {
        "control_set_cost": figure([seconds / whole]),
        "seconds of the README's search": figure([whole]),
        "seconds of 19 twins x 3 seeds": figure([seconds]),
    }


def main() -> None:
    parser = options(__doc__, "Two cases of each kind, three twins.")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where each case is kept")
    parser.add_argument("--part", nargs="+", choices=("random", "planted", "cost"))
    args = parser.parse_args()
    parts = args.part or ["cost", "random", "planted"]
    torch.set_num_threads(1)
    given = (args.quick, args.device, args.seed)
    costs = cost(*given) if "cost" in parts else {}
    random = run(RANDOM, *given, args.out) if "random" in parts else {}
    planted = run(PLANTED, *given, args.out) if "planted" in parts else {}
    settings = {
        "twins": TWINS,
        "pairs": SIZES,
        "conclusions": {
            kind: dict(Counter(one["conclusion"] for one in verdicts))
            for kind, verdicts in (random | planted).items()
        },
        "quick": args.quick,
    }
    report("controls", settings, counted(random, planted) | costs, args.device, args.json)


if __name__ == "__main__":
    main()
