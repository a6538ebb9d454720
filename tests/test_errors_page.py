"""docs/errors.md names messages that the package has, each with its type, and says what to do."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import subspace_lab as lab
from subspace_lab.analysis.verdicts import CONCLUSIONS
from subspace_lab.cli import app
from subspace_lab.das import load_pairs
from subspace_lab.engine import FrozenPast

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/errors.md"
HOLE = "\0"  # where a message has names and numbers of the case
# Entries about something that happens without a message.
SILENT = ("torch.compile makes nothing faster", "The score is at its floor everywhere")
# Prefixes of a message that are printed by one of these functions, not raised.
PRINTED = {"subspace_lab": ("say_once", "_notify"), "UserWarning": ("warn",)}


def entries() -> dict[str, str]:
    """{title: text} of the page."""
    found = re.split(r"^### (.*)\n", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [re.split(r"^## ", text, flags=re.MULTILINE)[0] for text in found[2::2]]
    assert len(set(found[1::2])) == len(texts), "two entries have one title"
    return dict(zip(found[1::2], texts, strict=True))


def messages(text: str) -> list[tuple[str, str]]:
    """(type, message) of each line in the fenced block of an entry."""
    block = re.search(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [] if block is None else block[1].splitlines()
    return [(kind, said) for kind, _, said in (line.partition(": ") for line in lines)]


ENTRIES = entries()
SAID = [message for text in ENTRIES.values() for message in messages(text)]


def spelled(node: ast.AST, texts: dict[str, str]) -> str:
    """The text of an argument, with a hole for what only a run knows; `texts`: what functions of the file return."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(spelled(part, texts) for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return texts.get(node.func.id, HOLE)
    return HOLE


@cache
def calls() -> list[tuple[str, str]]:
    """(function, text) of every call in the package with text among its arguments."""
    found = []
    for path in sorted((ROOT / "subspace_lab").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        ends = [(f.name, f.body[-1]) for f in nodes if isinstance(f, ast.FunctionDef)]
        texts = {name: spelled(end.value, {}) for name, end in ends if isinstance(end, ast.Return) and end.value}
        for node in nodes:
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found += [(name, text) for arg in node.args if (text := spelled(arg, texts)).strip(HOLE)]
    return found


def beginning(said: str) -> re.Pattern[str]:
    """What a text in the source begins with if it is this message; each … stands for at least one hole."""
    return re.compile(f".*?{HOLE}.*?".join(map(re.escape, said.rstrip("…").split("…"))), re.DOTALL)


def occurs(kind: str, said: str) -> bool:
    names = PRINTED.get(kind, (kind,))
    return any(name in names and beginning(said).match(text) for name, text in calls())


@pytest.mark.parametrize(("kind", "said"), SAID, ids=[said[:50] for _, said in SAID])
def test_the_package_says_this(kind: str, said: str) -> None:
    if kind == "torch.OutOfMemoryError":  # torch says it
        return
    if kind == "Verdict":
        assert said.rstrip(".") in CONCLUSIONS
        return
    if kind == "subspace_lab":
        said = said.partition(" instead of")[0]  # where it is put together from two texts, the first one
    assert occurs(kind, said), f"nothing in the package raises or prints {kind}: {said}"


@pytest.mark.parametrize("title", ENTRIES)
def test_each_entry_has_a_message_its_meaning_and_what_to_do(title: str) -> None:
    text = ENTRIES[title]
    assert bool(messages(text)) == (title not in SILENT)
    assert text.count("**Meaning.** ") == text.count("**What to do.** ") == 1
    assert text.index("**Meaning.**") < text.index("**What to do.**")


def test_the_page_is_of_use() -> None:
    assert len(ENTRIES) >= 25 and len(set(SAID)) == len(SAID) and set(SILENT) <= set(ENTRIES)
    assert {said for kind, said in SAID if kind == "Verdict"} == {f"{c}." for c in CONCLUSIONS if c != "supported"}


def test_what_the_package_does_not_say_is_noticed() -> None:
    assert not occurs("ValueError", "No token tells … whatever")
    assert not occurs("TypeError", "A memory budget of")
    assert not occurs("ValueError", "budget of")


def spans() -> list[str]:
    """The code spans of the page."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def test_the_arguments_and_options_in_the_advice_exist() -> None:
    functions: tuple[Any, ...] = (
        lab.Batch,
        lab.Pairs.split,
        lab.ReftConfig,
        lab.Site,
        lab.check,
        lab.finetune,
        lab.forward,
    )
    functions += (lab.from_texts, lab.sweep, FrozenPast, load_pairs)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    of_transformers = {"device", "device_map"}
    used = {name for span in spans() for name in re.findall(r"(\w+)=(?!=)", span)}
    assert len(used) > 12 and used <= known | of_transformers, used - known

    group: Any = typer.main.get_command(app)
    options = {option for command in group.commands.values() for p in command.params
               for option in p.opts}  # fmt: skip
    asked = {option for span in spans() for option in re.findall(r"--[\w-]+", span)}
    assert len(asked) >= 4 and asked <= options, asked - options
