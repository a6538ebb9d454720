"""How the cost of a sweep of DAS grows: with layers, positions, pairs, width, rank and seeds; in time and in memory.

    python benchmarks/scaling.py [--quick] [--json PATH] [--device cuda] [--seed N]

One size is changed at a time; the others stay at those of `BASE`. A sweep is timed from nothing to the last trained
basis, as in `sweep_speed.py`. The limit is what cannot be avoided if each basis makes its own steps: the blocks above
the edit, called by hand on states that are kept already, at every layer and position, times the number of steps. It
has no pass over the data, and no states to keep. The sweep can be below it, because bases at neighbouring places and
with other seeds are trained side by side, with fewer and larger operations.

Random weights; what is measured does not depend on their values. The shares of the limit are ratios within one run.
`pictures.py` draws them.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from das_speed import Case
from harness import clock, figure, options, peak_memory, print_peak, report, wait
from sweep_speed import ours

from subspace_lab.engine.training import TrainingConfig

SEQUENCE, BATCH, EPOCHS = 48, 16, 2


@dataclass(frozen=True)
class Size:
    """A sweep: all layers of a GPT-2 of random weights, at the last tokens."""

    layers: int = 6
    positions: int = 2
    pairs: int = 128
    width: int = 256
    rank: int = 8
    seeds: int = 1

    def case(self, device: str, seed: int) -> Case:
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.width // 64, "vocab_size": 2000}
        given = {"device": device, "rank": self.rank, "pairs": self.pairs, "batch": BATCH, "sequence": SEQUENCE}
        return Case({**sizes, "n_positions": SEQUENCE}, 0, argparse.Namespace(**given, seed=seed))

    def config(self, steps: int | None = None) -> TrainingConfig:
        every = EPOCHS * -(-self.pairs // BATCH)
        return TrainingConfig(steps=every if steps is None else steps, batch_size=BATCH, learning_rate=1e-3)

    def sweep(self, case: Case, steps: int | None = None) -> int:
        """Train all bases; returns the number of steps."""
        positions = [str(-i) for i in range(self.positions, 0, -1)]
        return ours(case, self.config(steps), list(range(self.layers)), positions, self.seeds)

    def limit(self, case: Case, repeats: int = 3) -> float:
        """Seconds of the blocks above each edit, for all steps of all bases."""
        total = 0.0
        for layer in range(self.layers):
            case.layer = layer
            for tail in range(1, self.positions + 1):
                step = case.step_of(*case.floor(tail))
                step()
                total += median(timed(step, case.device) for _ in range(repeats))
        return total * self.config().steps * self.seeds


BASE = Size()
AXES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "positions": (1, 2, 4, 8),
    "pairs": (64, 128, 256, 512),
    "width": (128, 256, 512, 1024),
    "rank": (1, 4, 16, 64),
    "seeds": (1, 2, 4, 8),
}


def timed(run: Any, device: str) -> float:
    gc.collect()
    wait(device)
    start = clock(device)
    run()
    wait(device)
    return clock(device) - start


def point(axis: str, value: int, device: str, seed: int, rounds: int) -> dict[str, Any]:
    """Time, limit and memory of one sweep. Sweep and limit take turns."""
    size = replace(BASE, **{axis: value})
    case = size.case(device, seed)
    taken, limits = [], []
    for _ in range(rounds):
        taken.append(timed(lambda: size.sweep(case), device))
        limits.append(size.limit(case))
    forwarded = ["--device", device, "--seed", str(seed), "--axis", axis, "--value", str(value)]
    return {
        axis: value,
        "seconds": taken,
        "limit": limits,
        "memory": peak_memory(__file__, "sweep", forwarded),
    }


def main() -> None:
    parser = options(__doc__, "Two and four layers, one round.")
    parser.add_argument("--rounds", type=int, default=3)
    for hidden, kind in (("--peak-of", str), ("--axis", str), ("--value", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.peak_of:  # what is kept decides, not how many steps start from it
        size = replace(BASE, **{args.axis: args.value})
        case = size.case(args.device, args.seed)
        print_peak(args.device, lambda: size.sweep(case, steps=1))
        return
    axes = {"layers": AXES["layers"][:2]} if args.quick else AXES
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, values in axes.items():
        points[axis] = []
        for value in values:
            points[axis].append(point(axis, value, args.device, args.seed, 1 if args.quick else args.rounds))
            print(points[axis][-1], file=sys.stderr, flush=True)
    results = {}
    for axis, found in points.items():
        for p in found:
            shares = [a / b for a, b in zip(p["seconds"], p["limit"], strict=True)]
            results[f"{axis} {p[axis]}, time over limit"] = figure(shares)
        most, least = found[-1], found[0]
        grown = [a / b for a, b in zip(most["seconds"], least["seconds"], strict=True)]
        results[f"{axis} × {most[axis] // least[axis]}, time ×"] = figure(grown)
        results[f"{axis} × {most[axis] // least[axis]}, memory ×"] = figure([most["memory"] / least["memory"]])
    settings = {"model": "GPT-2, random", **vars(BASE), "sequence": SEQUENCE, "batch": BATCH, "epochs": EPOCHS}
    report("scaling", settings, results, args.device, args.json, {"table": points})


if __name__ == "__main__":
    main()
