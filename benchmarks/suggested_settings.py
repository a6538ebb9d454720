"""Which setting `suggest` would choose on several tasks, and whether the default of `ReftConfig` is a good one.

    python benchmarks/suggested_settings.py [--quick] [--json PATH] [--device D] [--seed N] [--assets FOLDER]

Each task is given to `suggest` with three seeds (of the rows held out, the order, and the random starts), which starts
from `ReftConfig()` and tries it beside its neighbours with two learning rates. A setting's share of the gain is how
much of the way it goes from the held-out loss of the model without edits to the lowest loss that any setting reached:
1 for the best one, 0 for no effect. The mean over tasks has an interval over tasks (t, each task its mean over seeds),
which is wide because the tasks are few. A second call with the same `--json` adds what is missing there.

tasks   names      a name carried through a story's opening, SmolLM2-135M (`quality_smollm2.py`)
        sentiment  a sentence of SST-2 as a prompt, SmolLM2-135M
        stories    the names again, stories260K
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import quality_smollm2
import quality_stories
import torch
import transformers
from harness import ASSETS, clock, figure, options, write

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, suggest, tokenise
from subspace_lab.reft.suggesting import RATES

SEEDS, STEPS, BATCH, ROWS = 3, 15, 8, 80
T95 = {2: 12.706, 3: 4.303}  # of Student's t, by the number of tasks

Rows = list[dict[str, Any]]


def stories(assets: Path) -> Rows:
    given = quality_stories.openings(quality_stories.TRAINING_NAMES, quality_stories.OPENINGS)
    rows = [{"prompt": text, "answer": quality_stories.STYLES["name"].format(name)} for text, name in given]
    return list(tokenise(rows, quality_stories.tokenizer(assets), end=False))


def smollm2(_: Path, device: str) -> Any:
    return quality_smollm2.loaded(device)[0]


TASKS: Mapping[str, tuple[Callable[[Path, str], Any], Callable[[Path], Rows]]] = {
    "names": (smollm2, lambda assets: quality_smollm2.rows("name", "train", assets)),
    "sentiment": (smollm2, lambda assets: quality_smollm2.rows("sentiment", "train", assets)),
    "stories": (quality_stories.language_model, stories),
}


def measured(
    task: str, seed: int, assets: Path, device: str, steps: int, rows: int, rates: Sequence[float]
) -> dict[str, Any]:
    """The settings with their share of the gain, for one task and seed."""
    load, rows_of = TASKS[task]
    start = clock(device)
    found = suggest(
        load(assets, device),
        rows_of(assets)[:rows],
        replace(ReftConfig(), seed=seed),
        training=TrainingConfig(steps=steps, batch_size=BATCH, seed=seed),
        learning_rates=rates,
        quiet=True,
    )
    lowest = found.trials[0].loss.value
    settings = []
    for one, trial in zip(found.records(), found.trials, strict=True):
        gained = (found.untrained.value - trial.loss.value) / (found.untrained.value - lowest)
        settings.append({**{k: v for k, v in one.items() if k != "config"}, "share": gained})
    default = next(i for i, t in enumerate(found.trials) if t.config == replace(ReftConfig(), seed=seed))
    return {
        "task": task,
        "seed": seed,
        "untrained": found.untrained.value,
        "held out": len(found.held_out_rows),
        "default": settings[default]["setting"],
        "settings": settings,
        "seconds": clock(device) - start,
    }


def over_tasks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each setting: its place in the tasks, and its mean share of the gain with an interval over tasks.

    Layers have other numbers in other models, so that a setting is known by its place in the list of `suggest`.
    """
    table = []
    for name in [one["setting"] for one in sorted(runs[0]["settings"], key=lambda one: -one["share"])]:
        by_task: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            for one in run["settings"]:
                if role(one["setting"]) == role(name):
                    by_task.setdefault(run["task"], []).append(one)
        means = {task: mean(one["share"] for one in some) for task, some in by_task.items()}
        values = list(means.values())
        half = T95[len(values)] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        every = [one for some in by_task.values() for one in some]
        table.append(
            {
                "setting": role(name),
                "share by task": means,
                "share": mean(values),
                "interval": None if math.isnan(half) else [mean(values) - half, mean(values) + half],
                "tied with the best": sum(one["tied"] for one in every),
                "chosen": sum(one["chosen"] for one in every),
                "runs": len(every),
                "parameters": {task: some[0]["parameters"] for task, some in by_task.items()},
            }
        )
    return sorted(table, key=lambda row: -row["share"])


def role(setting: str) -> str:
    """A setting without the numbers of its layers, which differ between models."""
    return re.sub(r"layer (\d+(?:, \d+)*)", lambda m: "two layers" if "," in m[1] else "one layer", setting)


def main() -> None:
    parser = options(
        __doc__, "One seed, one step at one rate, few rows, names and stories.", "the first of the three seeds"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="the folder with models/ and data/")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="all by default")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if given.device == "cpu":
        torch.set_num_threads(1)
    seeds = [given.seed + i for i in range(1 if given.quick else SEEDS)]
    steps, rows, rates = (1, 16, RATES[:1]) if given.quick else (STEPS, ROWS, RATES)
    tasks = given.tasks or (["names", "stories"] if given.quick else list(TASKS))
    settings = {"steps": steps, "batch": BATCH, "rows": rows, "rates": rates}
    runs = kept(given.json, settings)
    for task in tasks:
        for seed in seeds:
            if not any((run["task"], run["seed"]) == (task, seed) for run in runs):
                runs.append(measured(task, seed, given.assets, given.device, steps, rows, rates))
                keep(given.json, settings, runs, given.device)
    for run in runs:
        shown = [(one["setting"], round(one["share"], 2), one["tied"]) for one in run["settings"]]
        print(run["task"], run["seed"], f"{run['seconds']:.0f} s", *shown, sep="\n  ")
    for row in over_tasks(runs):
        of_tasks = "  ".join(f"{task} {share:.2f}" for task, share in row["share by task"].items())
        print(f"{row['share']:.2f}  tied {row['tied with the best']}/{row['runs']}  {row['setting']}: {of_tasks}")


def kept(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that stand in a file of the same settings, so that a second call adds what is missing."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if {name: found["settings"][name] for name in settings} != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} is of the settings {found['settings']}, not of {settings}: name another file.")
    return list(found["runs"])


def keep(path: Path | None, settings: dict[str, Any], runs: list[dict[str, Any]], device: str) -> None:
    """Write all runs, with a figure for each setting: its share of the gain in each run."""
    if path is None:
        return
    table = over_tasks(runs)
    shares: dict[str, list[float]] = {}
    for run in runs:
        for one in run["settings"]:
            shares.setdefault(role(one["setting"]), []).append(one["share"])
    results = {f"share of the gain, {row['setting']}": figure(shares[row["setting"]]) for row in table}
    seeds = {
        task: [run["seed"] for run in runs if run["task"] == task] for task in {r["task"]: None for r in runs}
    }
    write(
        path, "suggested_settings", {**settings, "seeds": seeds}, results, device, {"table": table, "runs": runs}
    )


if __name__ == "__main__":
    main()
