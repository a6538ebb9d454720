"""Interchange intervention accuracy on hierarchical equality, by layer, in trained and untrained networks.

    python benchmarks/hierarchical_equality.py [--quick] [--json PATH] [--device D] [--seed N] [--networks N]

One thread, about 3 minutes with 5 networks. One setting for every search, controls included; it was chosen on
other networks (see `SEARCH_TRAINING`). A network's random subspaces are the mean of 5. The networks trained as
published are less accurate and have a lower IIA, so how well a network learned its task is part of the figure.
An untrained network says the same whatever it sees; `calibrated` it says both answers, which makes the control
one that could have failed.
"""

import statistics
import time
from dataclasses import asdict, replace

import torch
from harness import options, summary, write

from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.hierarchical_equality import (
    BOTH_EQUALITIES,
    LAYERS,
    LEFT_EQUALITY,
    NETWORK_TRAINING,
    PUBLISHED_TRAINING,
    SEARCH_TRAINING,
    EqualityMLP,
    calibrated,
    counterfactuals,
    fresh,
    hidden,
    train_network,
)

parser = options(
    __doc__, "One network of each kind, 50 steps a search.", "of the first network; the others follow"
)
parser.add_argument("--networks", type=int, default=5)
args = parser.parse_args()
torch.set_num_threads(1)
started = time.perf_counter()

RANK, HELD_OUT, HELD_OUT_SEED, DEV_SEED = 8, 4096, 1_000_000, 2_000_000
METHODS = [DAS(RANK), RandomSubspace(RANK)]
seeds = range(args.seed, args.seed + (1 if args.quick else args.networks))
config = replace(SEARCH_TRAINING, steps=50) if args.quick else SEARCH_TRAINING
hypotheses = {"both equalities": BOTH_EQUALITIES, "left equality": LEFT_EQUALITY}

# The networks.
trained = [train_network(seed) for seed in seeds]
published = [train_network(seed, PUBLISHED_TRAINING, min_accuracy=0.98) for seed in seeds]
networks = {
    "trained": [network for network, _ in trained],
    "trained as published": [network for network, _ in published],
    "untrained": [EqualityMLP(seed) for seed in seeds],
    "untrained, calibrated": [calibrated(EqualityMLP(seed)) for seed in seeds],
}
figures = {
    "trained, accuracy": [accuracy.value for _, accuracy in trained],
    "trained as published, accuracy": [accuracy.value for _, accuracy in published],
}

# The searches: every layer of every network, each from a random start of its own.
seconds = []
for kind, of_kind in networks.items():
    for hypothesis, variables in hypotheses.items():
        dev, held_out = (counterfactuals(HELD_OUT, s, variables) for s in (DEV_SEED, HELD_OUT_SEED))
        for seed, network in zip(seeds, of_kind, strict=True):
            began = time.process_time()
            fits = sweep(
                Backbone(network.to(args.device)),
                Pairs(fresh(config.batch_size, seed, variables), dev, held_out),
                [hidden(layer) for layer in range(1, LAYERS + 1)],
                METHODS,
                seeds=[seed],
                config=config,
                min_accuracy=None,
                label=f"{kind}, {hypothesis}, network {seed}",
            )
            seconds.append((time.process_time() - began) / LAYERS)
            for layer in range(1, LAYERS + 1):
                name = f"{kind}, {hypothesis}, layer {layer}"
                for method, label in ((DAS, "IIA"), (RandomSubspace, "random subspace")):
                    (mean,) = fits.where(site=hidden(layer), method=method).mean()
                    figures.setdefault(f"{name}, {label}", []).append(mean.value)

# Two searches of one network, which differ in their random start and their pairs.
again = {}
for seed, network in zip(seeds, networks["trained"], strict=True):
    held_out = (counterfactuals(HELD_OUT, s) for s in (DEV_SEED, HELD_OUT_SEED))
    pairs = Pairs(fresh(config.batch_size, seed + 1000), *held_out)
    fits = sweep(
        Backbone(network.to(args.device)),
        pairs,
        [hidden(1)],
        [DAS(RANK)],
        seeds=[seed + 1000],
        config=config,
        quiet=True,
    )
    again[seed] = fits[0].iia.value
first = figures["trained, both equalities, layer 1, IIA"]
figures["trained, both equalities, layer 1, IIA of a second search"] = list(again.values())
figures["trained, both equalities, layer 1, difference of two searches"] = [
    abs(a - b) for a, b in zip(first, again.values(), strict=True)
]
figures["processor seconds a search"] = seconds

print(f"{'':68} {'mean':>6} {'sd':>6}   each network")
for name, values in figures.items():
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    each = " ".join(f"{value:.3f}" for value in values) if len(values) == len(seeds) else ""
    print(f"{name:68} {statistics.mean(values):6.3f} {spread:6.3f}   {each}")
print(f"{time.perf_counter() - started:.0f} s")

if args.json:
    results = {name: summary(values) for name, values in figures.items()}
    settings = {
        "rank of each variable": RANK,
        "width": 16,
        "held-out pairs": HELD_OUT,
        "search": asdict(config),
        "networks": asdict(NETWORK_TRAINING),
        "networks trained as published": asdict(PUBLISHED_TRAINING),
        "seeds": list(seeds),
        "low, high": "the lowest and the highest of n",
        "pairs": "fresh at every step",
    }
    write(args.json, "hierarchical_equality", settings, results, args.device)
