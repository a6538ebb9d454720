"""The four hypotheses of price tagging in the decoder that ships with the package, ranked.

    python benchmarks/hypotheses.py [--quick] [--json PATH] [--device D] [--seed N]

The decoder was trained on text that says yes where lower ≤ amount ≤ upper, and half of whose prompts ask for one of the
two comparisons alone (benchmarks/train_shipped_model.py): the hypotheses of the boundaries are right, that of the
midpoint and that of the bracket's identity are not. All four are searched on the same bases and sources, at every
layer, at the amount and at the last token, with one setting. Of two hypotheses that are right the one with fewer
parts has less that can go wrong, so what is asked is that both boundaries' hypotheses stand before the two others.

What was seen: left boundary .92 and both boundaries .86, midpoint .56 and bracket .51, which are at their floor of .51,
on the pairs where the four do not agree. The two that are right cannot be told apart from each other on these pairs.
The right ones are found at layer 1, last token. The intervals are those of new amounts and templates.
"""

import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from harness import options, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import subspace_lab
from subspace_lab.core.sites import Site
from subspace_lab.das.hypotheses import rival_pairs
from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.das.ranking import rank_hypotheses
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.hierarchical_equality import counterfactuals
from subspace_lab.tasks.price_tagging import HYPOTHESES, PRICE_TAGGING

args = options(__doc__, "Two sites, one rank, few steps.", "of the pairs and of the searches").parse_args()
torch.set_num_threads(1)
started = time.perf_counter()

folder = Path(subspace_lab.__file__).parent / "assets" / "tiny_decoder"
lab = Backbone(AutoModelForCausalLM.from_pretrained(folder).to(args.device))
tokenizer = AutoTokenizer.from_pretrained(folder)
layers = [1] if args.quick else list(range(lab.anatomy.depth("")))
positions = ["amount", "last"]
ranks = [4] if args.quick else [1, 2, 4]
config = TrainingConfig(steps=20 if args.quick else 80, batch_size=64, learning_rate=0.03)
numbers = {"train": 128, "dev": 64, "test": 128} if args.quick else {"train": 800, "dev": 300, "test": 600}
seeds = [args.seed]

rivals = rival_pairs(PRICE_TAGGING, HYPOTHESES, tokenizer, seed=args.seed, **numbers)
fits = {
    name: sweep(
        lab,
        pairs,
        [Site("block_output", layer, position) for layer in layers for position in positions],
        [DAS(ranks), RandomSubspace(ranks[-1])],
        seeds=seeds,
        config=config,
        label=name,
    )
    for name, pairs in rivals.items()
}
ranking = rank_hypotheses(rivals, fits)
print(ranking)

# How quickly counterfactuals are made, of a whole batch by one pass of the causal model.
speeds = []
for i in range(7):
    began = time.process_time()
    counterfactuals(100_000, i)
    speeds.append(100_000 / (time.process_time() - began))
print(f"counterfactuals of hierarchical equality: {statistics.median(speeds):,.0f} a second")
print(f"{time.perf_counter() - started:.0f} s")

if args.json:
    order = [one.name for one in ranking.standings]
    boundaries = {"left boundary", "both boundaries"}
    results = {
        "boundaries_stand_first": {"median": float(set(order[:2]) == boundaries), "n": 1},
        "counterfactuals_per_second": {
            "median": round(statistics.median(speeds)),
            "low": round(min(speeds)),
            "high": round(max(speeds)),
            "n": len(speeds),
        },
    }
    for one in ranking.standings:
        results |= {
            f"{one.name}, {what}": {
                "median": round(e.value, 4),
                "low": round(e.low, 4),
                "high": round(e.high, 4),
                "n": e.n,
            }
            for what, e in (
                ("IIA", one.iia),
                ("IIA where they differ", one.differing),
                ("first less this", one.behind),
            )
            if e is not None
        }
        results[f"{one.name}, smallest rank"] = {"median": one.rank, "n": 1}
    settings = {
        "order": order,
        "ranking": ranking.as_dict(),
        "layers": layers,
        "positions": positions,
        "ranks": ranks,
        "seeds": seeds,
        "pairs": numbers,
        "search": asdict(config),
        "low, high": "the 95 % interval over test pairs, by amounts and templates; of the speed lowest and highest",
    }
    write(args.json, "hypotheses", settings, results, args.device)
