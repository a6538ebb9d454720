"""The names that people meet first: the package's own, and the README's imports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_lab

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", subspace_lab.__all__)
def test_every_name_of_the_surface_is_there(name: str) -> None:
    assert getattr(subspace_lab, name).__name__ == name
    assert name in dir(subspace_lab)


ROOMS = (
    "core",
    "model",
    "engine",
    "das",
    "das.methods",
    "das.loaders",
    "reft",
    "tasks",
    "analysis",
    "analysis.plots",
)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_lists_its_names(room: str) -> None:
    module = importlib.import_module(f"subspace_lab.{room}")
    assert len(module.__all__) == len(set(module.__all__)) > 0
    for name in module.__all__:
        assert hasattr(module, name) and name in dir(module)


def test_the_first_rooms_import_nothing_by_themselves() -> None:
    code = "import sys, subspace_lab.core, subspace_lab.model; print({'torch', 'nnsight'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = subspace_lab.no_such_name


def test_imports_of_the_readme_work() -> None:
    lines = re.findall(r"^from subspace_lab.* import .*$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        exec(line, {})


SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_benchmarks_import_from_the_package_is_there(script: Path) -> None:
    """Names that moved are seen here, not when somebody measures."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "subspace_lab":
            room = importlib.import_module(node.module or "")
            for alias in node.names:
                found = hasattr(room, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert found, f"{script.name} imports {alias.name} from {node.module}"
