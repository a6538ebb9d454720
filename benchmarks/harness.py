"""What the benchmarks share: their options, interleaved timing, ratios, and the JSON they all write.

Machines drift, so contenders take turns (A B C A B C …) and what is reported are ratios within a round: median,
lowest and highest, and how many rounds. On a CPU seconds are those of the processor, spent by this process on one
thread, which other people's processes hardly touch. Times of one machine are not compared with another's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from subspace_lab.core.files import write_text

# With models/ and data/, for the scripts that read real ones.
ASSETS = Path(os.environ.get("SUBSPACE_LAB_ASSETS", Path(__file__).resolve().parents[2] / "shared"))


def options(
    doc: str | None, quick: str, seed: str = "added to every seed of weights, data and searches"
) -> argparse.ArgumentParser:
    """A parser with the four options of every benchmark; a script adds its own.

    Args:
        doc: the text of the script.
        quick: what is left in the quick run, which asks only whether it runs: its figures say nothing.
        seed: what the seed is of. 0 is that of the results that are kept.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"does it run? {quick}")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the figures there")
    parser.add_argument("--device", default="cpu", help="where the models are: cpu (default), cuda, …")
    parser.add_argument("--seed", type=int, default=0, help=f"{seed}; 0 by default")
    return parser


def figure(values: list[float]) -> dict[str, float]:
    """Median, lowest, highest and number of some values."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def summary(values: list[float]) -> dict[str, float]:
    """`figure` with mean and standard deviation, all to four places."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    found = {**figure(values), "mean": statistics.mean(values), "sd": spread}
    return {name: value if name == "n" else round(value, 4) for name, value in found.items()}


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender, round by round; the first `warmup` rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + warmup):
        for name, step in contenders.items():
            gc.collect()
            wait(device)
            start = clock(device)
            step()
            wait(device)
            if i >= warmup:
                times[name].append(clock(device) - start)
        print(f"  round {i + 1}/{rounds + warmup}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def ratio(times: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """How many times longer one contender takes than another, within rounds."""
    return figure([a / b for a, b in zip(times[over], times[under], strict=True)])


def clock(device: str) -> float:
    """Seconds: of the wall where a card works, of the processor where it does."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def wait(device: str) -> None:
    """Let a card finish."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(script: str, contender: str, arguments: list[str]) -> float:
    """MiB at the highest, of a process of its own that runs a few steps of one contender."""
    command = [sys.executable, script, *arguments, "--peak-of", contender]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(out.strip().splitlines()[-1])


def print_peak(device: str, steps: Callable[[], Any]) -> None:
    """What `peak_memory` reads: the highest while `steps` runs, model and data included."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        steps()
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    # Building a random model peaks far above running it: start counting now.
    Path("/proc/self/clear_refs").write_text("5")
    steps()
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


def today() -> str:
    """The day, as 2026-01-31."""
    return time.strftime("%Y-%m-%d")


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on, without naming the host."""
    packages = {}
    for name in ("torch", "transformers", "nnsight", "pyvene", "pyreft", "peft", "subspace-lab"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    card = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "device": card or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def report(
    name: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    device: str,
    path: str | Path | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print the figures and, where asked, write them as JSON, with `more` behind them."""
    print(f"\n{name}: " + ", ".join(f"{k}={v}" for k, v in settings.items()))
    for key, f in results.items():
        print(f"  {key:42s} {f['median']:10.4g}  [{f['low']:.4g}, {f['high']:.4g}]  n={f['n']}")
    if path is not None:
        write(Path(path), name, settings, results, device, more)


def write(
    path: Path,
    name: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    device: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """The file of a benchmark; `more` stands behind what all of them have."""
    whole = {"name": name, "date": today(), "settings": settings, "machine": machine(device), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**whole, **(more or {})}, indent=2, ensure_ascii=False) + "\n")
