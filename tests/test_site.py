"""The pages of the documentation site, as far as they are made here; `.ci/run` builds it with MkDocs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "site"


def script(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"site_{name}", FOLDER / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


sys.path.insert(0, str(FOLDER))  # the scripts import each other
import site_pages  # noqa: E402
import site_reference  # noqa: E402

build = script("build")
PLACES = {
    "README.md": "index.md",
    "docs/serving.md": "serving.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "tutorials/01.ipynb": "tutorials/01.md",
}


# --- links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "there", "here"),
    [
        ("README.md", "[a](docs/serving.md)", "[a](serving.md)"),
        ("README.md", "[a](docs/serving.md#in-the-weights)", "[a](serving.md#in-the-weights)"),
        ("docs/serving.md", "[`a` b](../README.md#set-up)", "[`a` b](index.md#set-up)"),
        ("docs/serving.md", "[a](#here) <https://x.org> [b](https://x.org/docs/serving.md)", None),
        ("benchmarks/README.md", "[a](../docs/serving.md)", "[a](../serving.md)"),
        ("tutorials/01.ipynb", "[a](../README.md), [b](01.ipynb)", "[a](../index.md), [b](01.md)"),
        ("docs/serving.md", "![p](../benchmarks/harness.py)", "![p](benchmarks/harness.py)"),
        ("benchmarks/README.md", "[of](harness.py) from [results](results).", "[of](harness.py) from results."),
        ("README.md", "```python\nx[0](docs/serving.md)\n```", None),
    ],
)  # fmt: skip
def test_links_fit_their_new_place(page: str, there: str, here: str | None) -> None:
    copied: list[str] = []
    assert site_pages.relinked(there, page, PLACES, copied.append) == (there if here is None else here)
    assert copied == (["benchmarks/harness.py"] if "harness.py" in there else [])


def test_what_lies_beside_a_page_is_left_as_it_is() -> None:
    text = "![x](01_1.png) [n](01.ipynb)"
    assert site_pages.relinked(text, "tutorials/01.ipynb", PLACES, print, beside=["01_1.png", "01.ipynb"]) == text


@pytest.mark.parametrize("target", ["docs/none.md", "../outside.md", "results"])
def test_a_link_that_leads_nowhere_is_refused(target: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"README\.md links to"):
        site_pages.relinked(f"[a]({target})", "README.md", PLACES, print)


# --- tutorials ----------------------------------------------------------------------------------------------


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": ["<Figure>"]}},
        {"output_type": "execute_result", "data": {"text/html": ["<b>bold</b>"], "text/plain": ["plain"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "\n", "Words."]},
        {"cell_type": "code", "source": ["print(1)\n", "2"], "outputs": outputs},
    ]
    path = tmp_path / "08_new.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    text, pictures = site_pages.tutorial(path)
    assert pictures == {"08_new_1.png": b"hi"} and site_pages.title_of(text) == "A title"
    order = ["# A title", "[08_new.ipynb](08_new.ipynb)", "Words.", "```python\nprint(1)\n2\n```"]
    order += ["one\ntwo\n```", "(08_new_1.png)", "<b>bold</b>"]
    found = [text.index(one) for one in order]
    assert found == sorted(found) and "<Figure>" not in text and "plain" not in text


def test_an_output_that_no_page_can_show_is_refused(tmp_path: Path) -> None:
    outputs = [{"output_type": "display_data", "data": {"application/x": "…"}}]
    cells = [{"cell_type": "code", "source": ["1"], "outputs": outputs}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with pytest.raises(ValueError, match="application/x"):
        site_pages.tutorial(tmp_path / "a.ipynb")


# --- the whole ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    pages = tmp_path_factory.mktemp("pages")
    return pages, build.stage(pages)


def places_of(menu: Any) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    else:
        for part in menu.values() if isinstance(menu, dict) else menu:
            yield from places_of(part)


def test_every_page_is_in_the_menu(staged: tuple[Path, list[Any]]) -> None:
    pages, menu = staged
    listed = list(places_of(menu))
    assert sorted(listed) == sorted(path.relative_to(pages).as_posix() for path in pages.rglob("*.md"))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert {f"tutorials/{path.stem}.md" for path in (ROOT / "tutorials").glob("*.ipynb")} <= set(listed)


def test_every_link_of_every_page_leads_to_a_file(staged: tuple[Path, list[Any]]) -> None:
    pages, _ = staged
    checked = 0
    for page in pages.rglob("*.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)", re.sub(r"`[^`\n]+`", "", prose)):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).is_file(), (page, target)
                checked += 1
    assert checked > 100


# --- reference ----------------------------------------------------------------------------------------------


def rooms_with_names() -> dict[str, list[str]]:
    """{module: its `__all__`} of the package and of all public subpackages."""
    found = {}
    for path in sorted((ROOT / "subspace_lab").rglob("__init__.py")):
        module = ".".join(path.parent.relative_to(ROOT).parts)
        if "._" not in module and (names := getattr(import_module(module), "__all__", None)):
            found[module] = list(names)
    return found


ENTRIES = {
    (module, name)
    for room in site_reference.ROOMS
    for module, names in site_reference.own(room).items()
    for name in names
}


def test_every_public_name_has_one_entry() -> None:
    public = rooms_with_names()
    assert {module.partition(".")[2] for module in public} - {""} <= set(site_reference.ROOMS)
    for module, names in public.items():
        for name in names:
            entry = (site_reference.home(module, name), name)
            assert entry in ENTRIES and "._" not in entry[0], f"{module}.{name} has no entry in the reference"
            assert getattr(import_module(entry[0]), name) is getattr(import_module(module), name)
    pages = [
        place
        for room in site_reference.ROOMS
        for place in [site_reference.page_of(room)] * sum(map(len, site_reference.own(room).values()))
    ]
    assert len(pages) == len(ENTRIES), "a name has entries on two pages"


def test_every_entry_is_on_its_page(staged: tuple[Path, list[Any]]) -> None:
    pages, _ = staged
    for room in site_reference.ROOMS:
        text = (pages / site_reference.page_of(room)).read_text(encoding="utf-8")
        for module, names in site_reference.own(room).items():
            assert f"::: {module}" in text
            for name in names:
                assert re.search(rf'"{name}"|`{name}`|\.{name}$', text, re.MULTILINE), (room, name)
    overview = (pages / "reference" / "index.md").read_text(encoding="utf-8")
    assert all(f"[`{name}`]" in overview for name in rooms_with_names()["subspace_lab"])


def test_what_pages_and_tutorials_import_has_an_entry() -> None:
    found = site_reference.imported()
    assert ("subspace_lab.das.sweeps", "sweep") in found and len(found) > 30
    assert ("subspace_lab.model.merging", "merge") in found  # by docs/serving.md, from a module without `__all__`
    assert set(found) <= ENTRIES


def test_what_is_left_out_of_the_reference_is_there() -> None:
    parts = [f"subspace_lab.{room}.{part}" for room, names in site_reference.ROOMS.items() for part in names]
    assert {name for part in parts for name in site_reference.defined(part)} >= site_reference.INTERNAL


def test_docstrings_are_prepared() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed: pip install 'subspace-lab[docs]'")
    prepared = script("docstrings").prepared
    text = "What.\n\n>>> a\nb\n\nArgs:\n    a, b: one\n        more.\n    c: two.\n\nRaises:\n    A, B: three.\n"
    assert prepared(text) == (
        "What.\n\n```pycon\n>>> a\nb\n```\n\nArgs:\n    a: one\n        more.\n"
        "    b: one\n        more.\n    c: two.\n\nRaises:\n    A, B: three.\n"
    )


# --- command line -------------------------------------------------------------------------------------------


def test_every_command_and_option_is_on_the_page_of_the_terminal() -> None:
    from subspace_lab.cli import app

    text = site_reference.commands()
    sections = dict(
        zip(*[iter(re.split(r"^## subspace-lab (\w+)$", text, flags=re.MULTILINE)[1:])] * 2, strict=True)
    )
    assert set(sections) == {command.name for command in app.registered_commands}
    assert "| `--twins` | `19` | How many randomly" in sections["check"]
    assert "| `--out` | required | " in sections["merge"] and "| `ADAPTER` | required | " in sections["merge"]
    assert "| `--bias`, `--no-bias` | `--bias` | " in sections["finetune"]
    assert "| `--seed` | `0` | " in sections["finetune"] and "| `--suggest` |  | " in sections["finetune"]
    for section in sections.values():
        assert section.count("\n| `") >= 2
