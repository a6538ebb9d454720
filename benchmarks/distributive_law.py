"""Which algorithm for the distributive law do small networks follow? Both, at all layers, in ten networks.

    python benchmarks/distributive_law.py [--quick] [--json PATH] [--device D] [--seed N] [--networks N]

The answer is (c = d) ∧ ((a = b) ∨ (e = f)). And-Or-And searches for the two conjunctions, And-Or for c = d and the
disjunction, both on the same bases and sources and with the setting that was chosen for hierarchical equality, in half
of its steps (which costs .01 there). Given are, for each layer, the IIA on all pairs and on those where the two expect
different answers, with the random subspace and some untrained networks beside it; and by how much more often And-Or is
right than And-Or-And, pair by pair.

What was seen: at layer 1 the conjunctions are found better than c = d and the disjunction, .85 against .72 of the pairs
where the two differ, in eight networks of ten; so most hold rather And-Or-And there, none of them exactly, and which
of the two is a matter of the network. Both fall with depth. At layer 3 little but the answer is left: on all pairs the
searches have .61 and .73 where random subspaces of the same rank have .59 and .69. In untrained networks all is .50 to
.53, with random subspaces .49 to .50.
"""

import statistics
import time
from dataclasses import asdict, replace

import torch
from harness import options, summary, write

from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.das.sweeps import sweep
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.distributive_law import AND_OR, AND_OR_AND, WIDTH, rivals, sample, train_network
from subspace_lab.tasks.hierarchical_equality import LAYERS, SEARCH_TRAINING, EqualityMLP, calibrated, hidden

parser = options(__doc__, "One network, 40 steps a search.", "of the first network; the others follow")
parser.add_argument("--networks", type=int, default=10)
args = parser.parse_args()
torch.set_num_threads(1)
started = time.perf_counter()

RANK, TEST, UNTRAINED = WIDTH // 2, 4096, 3
seeds = range(args.seed, args.seed + (1 if args.quick else args.networks))
config = replace(SEARCH_TRAINING, steps=40 if args.quick else 200)
figures: dict[str, list[float]] = {}


def add(name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


for seed in seeds:
    network, accuracy = train_network(seed)
    add("accuracy", accuracy.value)
    pairs = rivals(config.batch_size, seed, dev=256, test=TEST)
    differ = pairs[AND_OR.name].test.answer != pairs[AND_OR_AND.name].test.answer
    add("share of pairs on which they differ", differ.double().mean().item())
    networks = {"trained": network}
    if seed - args.seed < UNTRAINED:
        networks["untrained, calibrated"] = calibrated(
            EqualityMLP(seed, WIDTH, WIDTH), inputs=sample(20_000, 0)[0]
        )
    for kind, model in networks.items():
        by_pair = {}
        for name, of in pairs.items():
            fits = sweep(
                Backbone(model.to(args.device)),
                of,
                [hidden(layer) for layer in range(1, LAYERS + 1)],
                [DAS(RANK), RandomSubspace(RANK)],
                seeds=[seed],
                config=config,
                min_accuracy=None,
                label=f"network {seed}, {kind}, {name}",
            )
            for layer in range(1, LAYERS + 1):
                for method, label in ((DAS, "IIA"), (RandomSubspace, "random subspace")):
                    chosen = fits.where(site=hidden(layer), method=method)
                    values = torch.stack([fit.pair_scores["iia"] for fit in chosen]).mean(0)
                    add(f"{kind}, {name}, layer {layer}, {label}", values.mean().item())
                    if method is DAS:
                        add(
                            f"{kind}, {name}, layer {layer}, {label} where they differ",
                            values[differ].mean().item(),
                        )
                        by_pair[name, layer] = values
        for layer in range(1, LAYERS + 1):
            less = by_pair[AND_OR.name, layer] - by_pair[AND_OR_AND.name, layer]
            add(f"{kind}, layer {layer}, And-Or less And-Or-And where they differ", less[differ].mean().item())

print(f"{'':72} {'mean':>6} {'sd':>6}   each network")
for name, values in figures.items():
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"{name:72} {statistics.mean(values):6.3f} {spread:6.3f}   {' '.join(f'{v:.3f}' for v in values)}")
print(f"{time.perf_counter() - started:.0f} s")

if args.json:
    results = {
        name: {**summary(values), "each": [round(value, 4) for value in values]}
        for name, values in figures.items()
    }
    settings = {
        "rank of each variable": RANK,
        "width": WIDTH,
        "held-out pairs": TEST,
        "search": asdict(config),
        "seeds": list(seeds),
        "low, high": "the lowest and the highest of n networks",
        "pairs": "fresh at every step; combinations of the three answers equally frequent",
    }
    write(args.json, "distributive_law", settings, results, args.device)
