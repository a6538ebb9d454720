"""The names that people meet first: the package's own, and the README's imports."""

from __future__ import annotations

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
