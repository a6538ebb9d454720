"""This checkout against another one, in turns: is it still as quick?

    git worktree add ../before SOME_COMMIT
    python benchmarks/against_checkout.py [--quick] [--json PATH] [--device D] [--seed N] --other ../before

Each checkout runs the steps of its own benchmarks (`das_speed.py`, `sweep_speed.py`, `reft_speed.py`) in a process of
its own, and the two take turns, so that a machine that slows down slows both. Reported is the ratio this / other
within a round: median, lowest, highest, and the 95 % interval of the median (its order statistics). Without --other
it is compared with itself, which shows how far the ratio of equal code is from 1. Seconds are those of the processor,
on one thread; with another device those of the wall.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CASES = ("das_step", "loreft_step", "generate", "sweep", "import")


# --- in the process of one checkout -------------------------------------------------------------------------


def step_of(case: str, quick: bool, device: str, seed: int) -> Callable[[], object]:
    """One step of a case, by the benchmarks of the checkout that this process imports."""
    import torch

    torch.set_num_threads(1)
    if case == "das_step":
        from das_speed import Case

        args = Namespace(device=device, seed=seed, rank=64, batch=16, sequence=64, pairs=16 if quick else 64)
        found = Case("width256" if quick else "gpt2", 6, args)
        return found.step_of(*found.ours())
    if case == "sweep":
        from das_speed import Case
        from sweep_speed import TrainingConfig, ours

        args = Namespace(device=device, seed=seed, rank=64, batch=16, sequence=64, pairs=32 if quick else 64)
        found = Case("width256", 0, args)
        config = TrainingConfig(steps=8, batch_size=16, learning_rate=1e-3)
        return lambda: ours(found, config, [0, 6, 11])
    from reft_speed import Case

    shape = "small" if quick else "width1024"
    seeded = {"seed": seed} if seed else {}  # the steps of an older checkout have no other seed than 0
    if case == "loreft_step":
        return Case(shape, device, 4, 64, 16, "f3+l3", "all", **seeded).ours()
    found = Case(shape, device, 2, 32, 1, "f3+l3", "all", **seeded)
    model, prompt = found.reft().eval(), found.ids[:, :32]
    return lambda: model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def serve(case: str, quick: bool, device: str, seed: int) -> None:
    """Make a step for every line read, and answer with its seconds."""
    import warnings

    from harness import clock, wait

    warnings.simplefilter("ignore")
    step = step_of(case, quick, device, seed)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        wait(device)
        start = clock(device)
        step()
        wait(device)
        print(clock(device) - start, flush=True)


# --- in the process that compares ---------------------------------------------------------------------------


class Worker:
    """A process of one checkout."""

    def __init__(self, checkout: Path, case: str, given: list[str]) -> None:
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{checkout / 'benchmarks'}{os.pathsep}{checkout}",
            "OMP_NUM_THREADS": "1",
        }
        # Else every start of a checkout that has never run would compile its files anew.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.case = case
        if case == "import":
            self.seconds()
            return
        # -P: not the folder of this file, but the benchmarks of that checkout.
        command = [sys.executable, "-P", __file__, "--serve", case, *given]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=self.environment,
        )  # fmt: skip
        self._answer()

    def seconds(self) -> float:
        if self.case == "import":
            program = (
                "import time; start = time.process_time(); import subspace_lab; print(time.process_time() - start)"
            )
            done = subprocess.run(
                [sys.executable, "-c", program], env=self.environment, capture_output=True, text=True, check=True
            )
            return float(done.stdout)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        if self.case != "import":
            self.process.kill()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.strip()
            if text == "ready" or text.replace(".", "", 1).replace("e-", "", 1).isdigit():
                return text
        raise RuntimeError(f"{self.case}: the process ended; run its benchmark by itself to see why.")


def median_interval(values: list[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with at least 95 % (binomial)."""
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (ordered[0], ordered[-1])


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:  # `harness` is then the other checkout's, and may be an older one
        case, quick, device, seed = sys.argv[2:]
        serve(case, quick == "quick", device, int(seed))
        return
    from harness import figure, options, report

    parser = options(__doc__, "Small models, 3 rounds.")
    parser.add_argument(
        "--other", type=Path, default=HERE, help="the root of the other checkout; this one by default"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    if not (args.other / "subspace_lab").is_dir():
        parser.error("--other names the root of another checkout, with a folder subspace_lab in it")
    given = ["quick" if args.quick else "whole", args.device, str(args.seed)]
    rounds = 3 if args.quick else args.rounds
    results = {}
    for case in args.cases.split(","):
        workers = [Worker(checkout.resolve(), case, given) for checkout in (HERE, args.other)]
        ratios, seconds = [], []
        for i in range(rounds):
            order = workers if i % 2 == 0 else workers[::-1]  # neither always has the other's warm caches
            times = {id(worker): worker.seconds() for worker in order}
            ratios.append(times[id(workers[0])] / times[id(workers[1])])
            seconds.append(times[id(workers[0])])
            print(f"  {case} {i + 1}/{rounds}", end="\r", file=sys.stderr, flush=True)
        for worker in workers:
            worker.close()
        low, high = median_interval(ratios)
        results[f"{case}_over_other"] = {**figure(ratios), "median_low": low, "median_high": high}
        results[f"{case}_seconds"] = figure(seconds)
    print(file=sys.stderr)
    for name, found in results.items():
        if "median_low" in found:
            print(f"{name}: median {found['median']:.3f} [{found['median_low']:.3f}, {found['median_high']:.3f}]")
    settings = {"rounds": rounds, "quick": args.quick}
    report("against_checkout", settings, results, args.device, args.json)


if __name__ == "__main__":
    main()
