"""Build the documentation site, with every warning as an error.

    pip install -c constraints.txt -e ".[docs]" && python docs/site/build.py [--out site]

The pages are the Markdown files of the repository, as a code host shows them, the tutorials with their stored outputs
(nothing is executed), and a reference made from the docstrings. They are copied into a temporary folder, with links
that fit their new places, and MkDocs builds them there with the settings in `mkdocs.yml`. A link to any other file of
the repository leads to a copy of it. The site fetches nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from site_pages import ROOT, notebooks, relinked, title_of, tutorial
from site_reference import ROOMS, commands, overview, page_of, reference

HERE = Path(__file__).resolve().parent
# The package is read as it is here. MkDocs 1.6 and Material 9.8 are pinned; their notice is about later versions.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
# Page of the repository → page of the site, with its title, in the order of the menu.
HOME = {"README.md": ("index.md", "Home")}
GUIDE = {
    "docs/how_it_works.md": ("how_it_works.md", "How it works"),
    "docs/searching.md": ("searching.md", "Searching"),
    "docs/scaling.md": ("scaling.md", "Long sweeps"),
    "docs/finetuning.md": ("finetuning.md", "Fine-tuning"),
    "docs/training.md": ("training.md", "Training"),
    "docs/serving.md": ("serving.md", "Serving"),
    "docs/errors.md": ("errors.md", "When something fails"),
}
BENCHMARKS = {"benchmarks/README.md": ("benchmarks/index.md", "Benchmarks")}
PROJECT = {
    "CHANGELOG.md": ("changelog.md", "Changelog"),
    "CONTRIBUTING.md": ("contributing.md", "Contributing"),
}


def stage(pages: Path) -> list[Any]:
    """Write all pages of the site and what they link to into a folder. Returns the menu."""
    written = {**HOME, **GUIDE, **BENCHMARKS, **PROJECT}
    places = {page: place for page, (place, _) in written.items()}
    places |= {f"tutorials/{path.name}": f"tutorials/{path.stem}.md" for path in notebooks()}

    def copy(path: str) -> None:
        (pages / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, pages / path)

    def write(place: str, text: str) -> None:
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        (pages / place).write_text(text, encoding="utf-8")

    for page, (place, _) in written.items():
        text = relinked((ROOT / page).read_text(encoding="utf-8"), page, places, copy)
        text = text.replace(
            "<details>", "<details markdown>"
        )  # else what is inside would be shown as it is written
        if page in HOME:
            text = f"---\nhide:\n  - navigation\n---\n{text}"
        elif place == "errors.md":  # long messages are shown in several lines
            text = f'<div class="messages" markdown>\n\n{text}\n</div>\n'
        write(place, text)
    titles: dict[str, str] = {}
    for path in notebooks():
        page = f"tutorials/{path.name}"
        copy(page)
        text, pictures = tutorial(path)
        for name, content in pictures.items():
            (pages / "tutorials" / name).write_bytes(content)
        titles[places[page]] = title_of(text)
        write(places[page], relinked(text, page, places, copy, beside=[path.name, *pictures]))
    write("reference/index.md", overview())
    write("reference/commands.md", commands())
    for room in ROOMS:
        write(page_of(room), reference(room))
    write("assets/site.css", (HERE / "site.css").read_text(encoding="utf-8"))
    return [
        *menu(HOME.values()),
        {"Guide": menu(GUIDE.values())},
        {"Tutorials": [{title: place} for place, title in titles.items()]},
        *menu(BENCHMARKS.values()),
        {
            "Reference": [
                "reference/index.md",
                {"Command line": "reference/commands.md"},
                *[{room: page_of(room)} for room in ROOMS],
            ]
        },
        {"Project": menu(PROJECT.values())},
    ]


def menu(pages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{title: place} for place, title in pages]


def build(out: Path) -> int:
    """The exit code of MkDocs: 0 if there was no warning."""
    with tempfile.TemporaryDirectory() as folder:
        pages, settings = Path(folder) / "pages", Path(folder) / "mkdocs.yml"
        pages.mkdir()
        staged = {"INHERIT": str(HERE / "mkdocs.yml"), "docs_dir": str(pages), "nav": stage(pages)}
        shutil.copyfile(HERE / "docstrings.py", Path(folder) / "docstrings.py")
        settings.write_text(json.dumps(staged), encoding="utf-8")  # YAML holds JSON
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            str(settings),
            "-d",
            str(out.resolve()),
        ]
        return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, **ENVIRONMENT}).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="the folder of the site; default: site")
    return build(parser.parse_args(arguments).out)


if __name__ == "__main__":
    sys.exit(main())
