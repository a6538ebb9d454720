"""A sweep of DAS over all layers × the last three positions: ours, whole, against pyvene's, measured in part.

    python benchmarks/sweep_speed.py [--quick] [--json PATH] [--device cuda] [--seed N]

Ours is timed from nothing to the last trained basis: the passes over bases and sources, which serve all sites,
and every training step at every site. pyvene's sweep takes hours, so its step is measured at the first, the middle
two and the last layer, and the mean is multiplied by the number of steps; its step does not depend on the position.
The plain loop of two forward passes is measured likewise, and the bare blocks above the edit (the floor, without any
pass over the data) at each position.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from das_speed import Case, differences
from harness import clock, figure, interleaved, options, peak_memory, print_peak, report, wait

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das.methods import Learner
from subspace_lab.das.objectives import cross_entropy
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import PreparedPairs, fit, from_pool
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

POSITIONS = ("-3", "-2", "-1")


def ours(
    case: Case, config: TrainingConfig, layers: list[int], positions: Sequence[str] = POSITIONS, seeds: int = 1
) -> int:
    """The sweep; returns the number of steps."""
    mask = torch.ones_like(case.base)
    data = Counterfactuals(
        base=Batch({"input_ids": case.base, "attention_mask": mask}),
        sources={"v": Batch({"input_ids": case.source, "attention_mask": mask})},
        base_answer=case.answer,
        answer=case.answer,
        answers=("a", "b"),
        tokens=torch.tensor([17, 23]),
    )
    backbone = Backbone(case.model)
    sites = [Site("block_output", layer, p) for layer in layers for p in positions]
    pairs = PreparedPairs.of(backbone, data, [{"v": site} for site in sites])
    print(pairs.engine.describe(), file=sys.stderr)
    sites = [site for site in sites for _ in range(seeds)]
    learners = [
        Learner({"v": (site, LearnedSubspace(case.width, case.rank, seed=i).to(case.device))}, start=i)
        for i, site in enumerate(sites, start=case.seed)
    ]
    done = 0
    for cohort in pairs.engine.cohorts([(site,) for site in sites], config.batch_size):
        draws = [from_pool(pairs, {"v": sites[i]}, config) for i in cohort]
        fit([learners[i] for i in cohort], draws, [config] * len(cohort), cross_entropy)
        done += len(cohort)
        print(f"  {done}/{len(sites)}   ", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return len(sites) * config.steps


def main() -> None:
    parser = options(__doc__, "A width of 256, few short pairs, two layers.")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="of pyvene's steps")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.quick:
        args.pairs, args.epochs, args.rounds, args.sequence = 32, 1, 1, 16
    shape = "width256" if args.quick else "llama7b" if args.device.startswith("cuda") else "gpt2"
    case = Case(shape, 0, args)
    depth = case.model.config.num_hidden_layers
    layers = [0, depth - 1] if args.quick else list(range(depth))
    steps = args.epochs * -(-args.pairs // args.batch)
    config = TrainingConfig(steps=steps, batch_size=args.batch, learning_rate=1e-3)
    if args.peak_of:  # what is kept decides, not how many steps start from it
        short = TrainingConfig(steps=1, batch_size=args.batch)
        print_peak(args.device, lambda: ours(case, short, layers))
        return
    start = clock(args.device)
    taken = ours(case, config, layers)
    wait(args.device)
    whole = clock(args.device) - start
    # With as many blocks above them, in the mean, as all the layers that are swept.
    measured = layers if args.quick else sorted({0, (depth - 1) // 2, depth // 2, depth - 1})
    contenders, loss_gaps, gradient_gaps = {}, [], []
    for layer in measured:
        case.layer, case.site = layer, Site("block_output", layer, "last")
        for name in ("pyvene", "plain"):
            contenders[name, layer] = case.step_of(*getattr(case, name)())
        for tail in range(1, len(POSITIONS) + 1):  # the further from the end, the more the blocks above have to do
            contenders["floor", layer, tail] = case.step_of(*case.floor(tail))
        loss, gradient = differences(case)
        loss_gaps.append(loss)
        gradient_gaps.append(gradient)
    times = interleaved(contenders, args.rounds, args.device)

    def scaled(name: str) -> list[float]:
        """Seconds of the whole sweep, round by round, from the mean step over the measured layers."""
        steps = [[t[i] for (who, *_), t in times.items() if who == name] for i in range(args.rounds)]
        return [taken * sum(s) / len(s) for s in steps]

    forwarded = ["--device", args.device, "--seed", str(args.seed), *(["--quick"] if args.quick else [])]
    results = {
        "speedup_over_pyvene": figure([t / whole for t in scaled("pyvene")]),
        "speedup_over_plain": figure([t / whole for t in scaled("plain")]),
        "cost_over_floor": figure([whole / t for t in scaled("floor")]),
        "loss_difference": figure(loss_gaps),
        "gradient_difference": figure(gradient_gaps),
        "seconds_ours": figure([whole]),
        "seconds_pyvene_scaled": figure(scaled("pyvene")),
        "peak_memory_mb": figure([peak_memory(__file__, "ours", forwarded)]),
    }
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "peak_of")}
    settings |= {"model": shape, "sites": len(layers) * len(POSITIONS), "steps": taken}
    settings["others"] = f"a step at the last position of layers {measured}, their mean times {taken} steps"
    report("sweep_speed", settings, results, args.device, args.json)


if __name__ == "__main__":
    main()
