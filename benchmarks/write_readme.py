"""Writes benchmarks/README.md from the results: for each benchmark its question, command, machine and figures.

    python benchmarks/write_readme.py

The tables of docs/finetuning.md that compare methods are written too, between their marks.

No figure is written by hand. The texts are the first paragraphs of the scripts, and `FIRST` names the figures that
are shown without a click; all others are in a table that unfolds. A test writes the file anew and compares. The
pictures are drawn by `pictures.py`, or by the benchmark itself.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

# In the order of the file: the results, the figures that are shown first, the pictures.
FIRST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "das_speed": (
        ("speedup_over_pyvene", "speedup_over_pyvene_layer1", "speedup_over_plain", "cost_over_floor"),
        ("speed.png",),
    ),
    "sweep_speed": (("speedup_over_pyvene", "cost_over_floor"), ()),
    "scaling": (
        (
            "layers × 8, time ×",
            "positions × 8, time ×",
            "pairs × 8, time ×",
            "width × 8, time ×",
            "rank × 64, time ×",
            "seeds × 8, time ×",
        ),
        ("scaling.png",),
    ),
    "reft_speed": (("speedup_over_pyreft_width4096", "generate_merged_cost"), ()),
    "against_version_0_1": (("das_step_over_other", "loreft_step_over_other", "generate_over_other"), ()),
    "das_quality": (
        ("planted_sites_found", "compiled_sites_found", "equality_iia_layer1", "iia_minus_pyvene"),
        (),
    ),
    "das_smollm2": (
        ("smollm2_agreement_iia", "smollm2_effect", "smollm2_p"),
        ("smollm2_agreement.png", "smollm2_verdict.png"),
    ),
    "hierarchical_equality": (
        (
            "trained, both equalities, layer 1, IIA",
            "trained, both equalities, layer 1, random subspace",
            "untrained, calibrated, both equalities, layer 1, IIA",
        ),
        ("hierarchical_equality.png",),
    ),
    "distributive_law": (
        ("trained, layer 1, And-Or less And-Or-And where they differ",),
        ("distributive_law.png",),
    ),
    "hypotheses": (("boundaries_stand_first", "counterfactuals_per_second"), ("hypotheses.png",)),
    "isolation": (("MDAS 16, disentangle", "DAS 16, disentangle"), ("isolation.png",)),
    "screening": ((), ("screening.png",)),
    "controls": (
        ("supported_on_random_models", "supported_on_planted_truths", "control_set_cost"),
        ("controls.png",),
    ),
    "ground_truth": (("sites_found", "false_supported", "share_before", "share_after"), ("ground_truth.png",)),
    "compare_subspaces": (
        (
            "layers: overlap, across layers",
            "layers: overlap, two seeds",
            "models: models, overlap, across models",
            "models: models, effects, across models",
        ),
        ("compare_layers.png", "compare_angles.png", "compare_loreft.png"),
    ),
    "reft_quality": (
        ("minilm, LoReFT, all tokens, test", "minilm, LoRA, test", "stories, name, LoReFT, test"),
        ("reft_quality.png", "memorisation.png"),
    ),
    "suggested_settings": ((), ("suggested_settings.png",)),
    "emoji_chatbot": (("emoji_before, in emojis", "emoji_after, in emojis", "emoji_after, different"), ()),
    "robustness": ((), ()),
}
SCRIPTS = {"against_version_0_1": "against_checkout"}  # where the script is called otherwise

HEAD = """# Benchmarks

One script for each claim. A figure is a median with the lowest and the highest value in brackets, or an interval where
the script says so, and `n`, the number of values. Figures of speed are ratios of contenders that took turns in one
run: the seconds of one machine are not compared with another's. Where a method loses, the table says so.

Each script takes `--quick` (does it run? under two minutes of one thread), `--json PATH`, `--device` and `--seed`, and
says with `--help` what else it needs. This page is written from [results](results) by
`python benchmarks/write_readme.py`.

"""


def text_of(script: Path) -> tuple[str, list[str]]:
    """The first sentence of a script's text, and the commands in it."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return text.splitlines()[0], [c for c in commands if c.startswith(("python benchmarks/", "pip ", "git "))]


def number(value: float) -> str:
    """Four significant digits, and no exponent for what people count."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def line(name: str, found: dict[str, Any]) -> str:
    """A figure as a line of a table; a value that was measured once has no range."""
    low, high = found.get("median_low", found.get("low")), found.get("median_high", found.get("high"))
    if "interval" in found:
        low, high = found["interval"]
    between = "" if low is None or low == high else f"{number(low)} to {number(high)}"
    return f"| {name} | {number(found['median'])} | {between} | {found['n']} |"


def table(results: dict[str, Any], names: list[str]) -> list[str]:
    head = ["| figure | median | low to high | n |", "|---|---:|---:|---:|"]
    return [*head, *(line(name, results[name]) for name in names), ""]


def machine(of: dict[str, Any]) -> str:
    """The machine and the versions, in a line."""
    device = of.get("device", of.get("processor"))
    packages = [f"{name} {of[name]}" for name in ("torch", "transformers") if name in of]
    return ", ".join([f"{device}", f"{of['threads']} thread{'s' * (of['threads'] > 1)}", *packages])


def section(name: str) -> list[str]:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    script = f"{SCRIPTS.get(name, name)}.py"
    claim, commands = text_of(HERE / script)
    first, pictures = FIRST[name]
    results = found["results"]
    lines = [f"## {name}", "", f"{claim} ([script]({script}), [results](results/{name}.json))", ""]
    lines += ["```bash", *commands, "```", "", f"Measured on {found['date']}: {machine(found['machine'])}.", ""]
    lines += table(results, list(first)) if first else []
    lines += [line for picture in pictures for line in (f"![{name}](results/{picture})", "")]
    others = [key for key in results if key not in first]
    if others:
        word = "other figures" if first else "figures"
        lines += ["<details>", f"<summary>{len(others)} {word}</summary>", ""]
        lines += [*table(results, others), "</details>", ""]
    return lines


def whole() -> str:
    contents = [f"- [{name}](#{name}): {text_of(HERE / f'{SCRIPTS.get(name, name)}.py')[0]}" for name in FIRST]
    sections = [line for name in FIRST for line in section(name)]
    return HEAD + "\n".join([*contents, "", *sections]).rstrip() + "\n"


# Of each table of docs/finetuning.md: the part of reft_quality's table, and which of its rows.
COMPARED: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "minilm": ("minilm", lambda row: True),
    "names": ("smollm2", lambda row: row["task"] == "name"),
    "sentiment": ("smollm2", lambda row: row["task"] == "sentiment"),
    "stories": ("stories", lambda row: row["style"] == "name"),
}
FINETUNING = HERE.parent / "docs" / "finetuning.md"


def signed(value: float) -> str:
    """One decimal, with a true minus, and no sign for 0."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def compared(name: str) -> str:
    """The rows of one table, from the highest score to the lowest; what no row has is no column."""
    part, wanted = COMPARED[name]
    table = json.loads((RESULTS / "reft_quality.json").read_text(encoding="utf-8"))["table"][part]
    rows = sorted(filter(wanted, table), key=lambda row: -row["test"])
    lines = []
    for row in rows:
        edge = "\\*" if row["rate at the edge of its grid"] else ""
        spread = f" ± {100 * row['test sd']:.1f}" if len(row["test by seed"]) > 1 else ""
        against = ""
        if (gap := row.get("− LoRA")) is not None:
            mean, low, high = (signed(100 * gap[of]) for of in ("mean", "low", "high"))
            against = f"{mean} [{low}, {high}]"
        forgotten = "" if row.get("forgetting") is None else f"{row['forgetting']:.2f}".replace("-0.00", "0.00")
        cells = (f"{row['method']}{edge}", row["setting"], f"{row['adapter parameters']:,}")
        lines.append([*cells, f"{100 * row['test']:.1f}{spread}", against, forgotten])
    head = ["method", "setting", "parameters", "right, %", "against LoRA [95 %]", "forgetting"]
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    shown = [[line[i] for i in kept] for line in [head, ["---"] * len(head), *lines]]
    return "".join(f"| {' | '.join(line)} |\n" for line in shown)


def with_tables(page: str) -> str:
    """A page whose tables between `<!-- table NAME -->` and `<!-- end -->` are those of the results."""
    for name in COMPARED:
        mark = f"<!-- table {name} -->\n"
        before, found, rest = page.partition(mark)
        if not found:
            raise ValueError(f"docs/finetuning.md has no mark {mark.strip()!r}.")
        page = f"{before}{mark}\n{compared(name)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


if __name__ == "__main__":
    (HERE / "README.md").write_text(whole(), encoding="utf-8")
    FINETUNING.write_text(with_tables(FINETUNING.read_text(encoding="utf-8")), encoding="utf-8")
