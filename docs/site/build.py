"""Build the documentation site, with every warning as an error.

    pip install -c constraints.txt -e ".[docs]" && python docs/site/build.py [--out site]

The pages are the Markdown files of the repository, as a code host shows them, the tutorials with their stored outputs
(nothing is executed), and a reference made from the docstrings. They are copied into a temporary folder, with links
that fit their new places, and MkDocs builds them there with the settings in `mkdocs.yml`. A link to any other file of
the repository leads to a copy of it. The site fetches nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import base64
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "subspace_lab"
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
# Room of the package → those of its modules of which all names have an entry, although no `__all__` lists them.
ROOMS: dict[str, tuple[str, ...]] = {
    "core": (
        "sites",
        "positions",
        "subspaces",
        "interventions",
        "alignments",
        "parts",
        "masks",
        "values",
        "dictionaries",
        "nonlinear",
        "estimates",
        "checkpoints",
    ),
    "model": ("backbone", "batches", "intervene", "site_lists", "merging"),
    "engine": (),
    "das": (),
    "das.methods": (),
    "das.loaders": (),
    "reft": (),
    "tasks": ("planted", "compiled"),
    "analysis": (),
    "analysis.plots": (),
}
ORDERED = ("core", "model")  # in the order above; the others by the names of their modules
# Public functions of those modules that only other modules of the package call.
INTERNAL = {
    "check_format",
    "expect_backbone",
    "expect_some",
    "find_kind",
    "frozen",
    "joined",
    "locate",
    "match",
    "model_inputs",
    "names",
    "normalise",
    "prompt_columns",
    "read_tensors",
    "refuse_edit",
    "refuse_merge",
    "refuse_model",
    "select",
    "spans",
    "write_described",
}


# --- links --------------------------------------------------------------------------------------------------


def relinked(
    text: str, page: str, places: dict[str, str], copy: Callable[[str], None], beside: Iterable[str] = ()
) -> str:
    """A page's text with links that fit its new place.

    Args:
        page: the path of the page in the repository.
        places: path in the repository → path in the site, of all pages.
        copy: called with the path of each other file that is linked; it gets the same path in the site.
        beside: names of files that lie beside the page in the site, and not in the repository.

    Raises:
        FileNotFoundError: a link to a file that does not exist.
    """
    here = posixpath.dirname(places[page])

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target) or target in beside:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path not in places:
            if not (ROOT / path).exists() or path.startswith(".."):
                raise FileNotFoundError(f"{page} links to {match[2]}, which does not exist.")
            if (ROOT / path).is_dir():  # a site has no page of a folder
                return match[1][1:-2]
            copy(path)
        return f"{match[1]}{posixpath.relpath(places.get(path, path), here or '.')}{hash_}{anchor})"

    # A link's text may hold code spans, so only fenced blocks are left out here.
    fenced = re.split(r"(^```.*?^```[ ]*$)", text, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\]\()([^()\s]+)\)"
    return "".join(part if i % 2 else re.sub(pattern, link, part) for i, part in enumerate(fenced))


# --- tutorials ----------------------------------------------------------------------------------------------


def tutorial(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs, as Markdown and {name: content} of its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    texts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            texts.append(source)
        elif cell["cell_type"] == "code":
            texts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                kind, content = _shown(output)
                if kind == "image/png":
                    name = f"{path.stem}_{len(pictures) + 1}.png"
                    pictures[name] = base64.b64decode(content)
                    texts.append(f"![what the cell above draws]({name})")
                elif kind == "text/plain":
                    texts.append(f"```{{ .text .output }}\n{content.rstrip()}\n```")
                else:
                    texts.append(f'<div class="output" markdown>\n\n{content.strip()}\n\n</div>')
    first = texts[0].partition("\n")
    origin = f"*This page is the notebook [{path.name}]({path.name}) with its stored outputs.*"
    return "\n\n".join([first[0], origin, first[2].strip(), *texts[1:]]) + "\n", pictures


def _shown(output: dict[str, Any]) -> tuple[str, str]:
    """The kind and the content of what a code host shows of an output."""
    if output["output_type"] == "stream":
        return "text/plain", "".join(output["text"])
    for kind in ("image/png", "text/markdown", "text/html", "text/plain"):
        if kind in output["data"]:
            return kind, "".join(output["data"][kind])
    raise ValueError(f"An output of the kinds {sorted(output['data'])} cannot be shown.")


def title_of(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert found, text[:100]
    return found[1]


# --- reference ----------------------------------------------------------------------------------------------


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def listed(module: str) -> list[str]:
    """The `__all__` of a module."""
    for node in parsed(module).body:
        if isinstance(node, ast.Assign) and any(getattr(one, "id", "") == "__all__" for one in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def defined(module: str) -> dict[str, ast.AST]:
    """{name: node} of what a module defines itself at its top level."""
    found: dict[str, ast.AST] = {}
    for node in parsed(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {one.id: node for one in targets if isinstance(one, ast.Name)}
    return found


def chain(module: str, name: str) -> list[str]:
    """The modules through which `module` offers a name, the last one being that which defines it.

    Raises:
        AttributeError: `module` does not offer it.
    """
    if name in defined(module):
        return [module]
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return [module, *chain(str(node.module), alias.name)]
    raise AttributeError(f"{module} has no {name}.")


def home(module: str, name: str) -> str:
    """The module from which a name that `module` offers is best imported: the last one that is not private."""
    return [one for one in chain(module, name) if not one.rpartition(".")[2].startswith("_")][-1]


def node_of(module: str, name: str) -> ast.AST:
    """The definition of a name that a module offers."""
    return defined(chain(module, name)[-1])[name]


def shown_code() -> Iterator[str]:
    """The Python blocks of the pages, and the cells of the tutorials."""
    for page in [*HOME, *GUIDE]:
        yield from re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    for path in notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


@cache
def imported() -> list[tuple[str, str]]:
    """(module, name) of what the code that is shown imports from the package; the module as in `home`."""
    found = []
    for code in shown_code():
        # Lines that only a notebook understands begin with a mark.
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.MULTILINE))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                names = [alias.name for alias in node.names]
                modules = [name for name in names if source_of(f"{node.module}.{name}").exists()]
                found += [(home(str(node.module), name), name) for name in names if name not in modules]
    return sorted(set(found))


def room_of(module: str) -> str:
    """The innermost room in which a module is."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{PACKAGE}.{room}.")), key=len)


def public(room: str) -> list[tuple[str, str]]:
    """(module, name) of each name that a room offers: those in its `__all__`, in ROOMS, or in code that is shown."""
    module = f"{PACKAGE}.{room}"
    found = [(home(module, name), name) for name in listed(module)]
    for part in ROOMS[room]:
        there = f"{module}.{part}"
        found += [
            (there, name)
            for name, node in defined(there).items()
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and name[0] != "_" and name not in INTERNAL
        ]
    found += [one for one in imported() if room_of(one[0]) == room]
    return list(dict.fromkeys(found if room in ORDERED else sorted(found)))


def own(room: str) -> dict[str, list[str]]:
    """{module: names} of the names of a room that have their entry on this room's page, and not in another room's."""
    # Of some modules only the docstring is of interest.
    found: dict[str, list[str]] = {f"{PACKAGE}.{room}.{part}": [] for part in ROOMS[room] if room in ORDERED}
    for module, name in public(room):
        if room_of(module) == room:
            found.setdefault(module, []).append(name)
    return found


def page_of(room: str) -> str:
    return f"reference/{room.replace('.', '_')}.md"


def entry(module: str, name: str) -> str:
    """The line of a list that leads to an entry."""
    node = node_of(module, name)
    said = (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""
    first = " ".join(said.partition("\n\n")[0].split())
    about = f": {first}" if first else ""
    return f"- [`{name}`][{module}.{name}]{about}"


def shown(path: str, **options: Any) -> list[str]:
    """The lines that show the docstring of a module or of a name."""
    lines = [f"      {name}: {json.dumps(value)}" for name, value in options.items()]
    return ["", f"::: {path}", *(["    options:", *lines] if lines else [])]


def reference(room: str) -> str:
    """The page of a room: what it is, the names that it offers, and their docstrings by module."""
    module = f"{PACKAGE}.{room}"
    here = own(room)
    elsewhere = [(where, name) for where, name in public(room) if name not in here.get(where, [])]
    lines = [f"# {module}", *shown(module, members=False, show_root_heading=False, show_root_toc_entry=False)]
    for where, names in here.items():
        documented = [name for name in names if isinstance(node_of(where, name), ast.ClassDef | ast.FunctionDef)]
        if where == module:
            lines += [line for name in documented for line in shown(f"{where}.{name}")]
        else:
            lines += shown(where, members=documented)
        # Constants have no docstring of their own.
        lines += ["", *[f"- `{name}`" for name in names if name not in documented]]
    if elsewhere:
        lines += ["", "## Also offered here", "", *[entry(where, name) for where, name in elsewhere]]
    return "\n".join(lines) + "\n"


def overview() -> str:
    """The first page of the reference: the names of the package itself, and its rooms."""
    lines = [
        "# Reference",
        "",
        f"The names below are imported from `{PACKAGE}` itself, and are enough for most experiments. The pages of the "
        "rooms have everything else.",
        "",
        *[entry(home(PACKAGE, name), name) for name in listed(PACKAGE)],
        "",
        "## Rooms",
        "",
    ]
    for room in ROOMS:
        said = ast.get_docstring(parsed(f"{PACKAGE}.{room}")) or ""
        first = " ".join(said.partition("\n\n")[0].split())
        lines.append(f"- [`{PACKAGE}.{room}`]({page_of(room).partition('/')[2]}): {first}")
    return "\n".join(lines) + "\n"


# --- the site -----------------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


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
    for room in ROOMS:
        write(page_of(room), reference(room))
    write("assets/site.css", (HERE / "site.css").read_text(encoding="utf-8"))
    return [
        *menu(HOME.values()),
        {"Guide": menu(GUIDE.values())},
        {"Tutorials": [{title: place} for place, title in titles.items()]},
        *menu(BENCHMARKS.values()),
        {"Reference": ["reference/index.md", *[{room: page_of(room)} for room in ROOMS]]},
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
