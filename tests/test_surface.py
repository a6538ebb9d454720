"""The names that people meet first: the package's own, and the README's imports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import subspace_lab

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", subspace_lab.__all__)
def test_every_name_of_the_surface_is_there(name: str) -> None:
    assert getattr(subspace_lab, name).__name__ == name
    assert name in dir(subspace_lab)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = subspace_lab.no_such_name  # type: ignore[attr-defined]


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
