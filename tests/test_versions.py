"""pyproject.toml, constraints.txt, constraints-lowest.txt and `.ci/pins.py` agree."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
_specification = importlib.util.spec_from_file_location("pins", ROOT / ".ci" / "pins.py")
assert _specification is not None
pins = importlib.util.module_from_spec(_specification)
assert _specification.loader is not None
_specification.loader.exec_module(pins)

PINNED, LOWEST = ROOT / "constraints.txt", ROOT / "constraints-lowest.txt"


@pytest.mark.parametrize("path", [PINNED, LOWEST], ids=lambda path: path.name)
def test_every_line_pins_one_version(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins.pins(path)) > 50
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)


def test_every_named_package_is_pinned_within_its_range() -> None:
    named, pinned = pins.requirements(), pins.pins(PINNED)
    assert len(named) > 20
    for name, bounds in named.items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert Requirement(f"{name}{bounds}").specifier.contains(pinned[name]), (name, bounds, pinned[name])


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """After a bound was changed: `.ci/run lowest renew`."""
    expected, pinned = pins.lowest(), pins.pins(LOWEST)
    for name, version in expected.items():
        assert Requirement(f"{name}=={version}").specifier.contains(pinned[name]), (name, version, pinned[name])
    assert expected["torch"] == pins.pins(PINNED)["torch"]


def test_what_the_package_imports_is_named() -> None:
    """Nothing is used that is installed only because something else asks for it.

    IPython is imported where a picture shows itself in a notebook, which is there if IPython is.
    """
    found = set()
    for path in (ROOT / "subspace_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    named = {name.replace("-", "_") for name in pins.requirements()}
    assert found - sys.stdlib_module_names - {"subspace_lab", "IPython"} <= named


def test_the_files_tested_with_the_lowest_versions_exist() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"^lowest_tests=\(.*?^\)$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    array = found[0]
    listed = subprocess.run(
        ["bash", "-c", f'{array}\nprintf "%s\\n" "${{lowest_tests[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(listed) > 10 and [path for path in listed if not (ROOT / path).is_file()] == []


def test_files_are_written_under_their_comment_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# Why.\n#\n# How.\n\nold==1\n")
    pins.write(path)
    assert path.read_text().startswith("# Why.\n#\n# How.\n\naccelerate==")
    assert pins.compare(path) == [] and "old" not in pins.pins(path)
    assert set(pins.requirements("tests")) <= set(pins.pins(path)) and not set(pins.pins(path)) & pins.LEFT_OUT
    text = path.read_text()
    path.write_text(
        re.sub(r"^numpy==.*\n", "numpy==0.1\n", re.sub(r"^rich==.*\n", "", text, flags=re.M), flags=re.M)
    )
    here = pins.installed()
    assert sorted(pins.compare(path)) == [f"numpy: 0.1 → {here['numpy']}", f"rich: not pinned → {here['rich']}"]


def test_a_bound_that_is_missing_or_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "requirements", lambda *extras: {"numpy": "<3"})
    with pytest.raises(ValueError, match="no lowest version of numpy"):
        pins.lowest()
