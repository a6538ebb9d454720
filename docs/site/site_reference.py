"""The reference: a page a room, made of the docstrings of its public names, and one of the terminal.

The package is read as text, so that nothing of it runs; only the commands are asked for their help.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from site_pages import ROOT, shown_code

PACKAGE = "subspace_lab"
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


@cache
def imported() -> list[tuple[str, str]]:
    """(module, name) of what the code that pages show imports from the package; the module as in `home`."""
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


def commands() -> str:
    """The page of the terminal: the help of each command."""
    import typer

    from subspace_lab.cli import app

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", str(group.help), ""]
    for name, command in group.commands.items():
        lines += [f"## subspace-lab {name}", "", inspect.cleandoc(command.help), ""]
        lines += ["| option | default | |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(cells(one))} |" for one in command.params if not getattr(one, "hidden", False)]
        lines.append("")
    return "\n".join(lines)


def cells(parameter: Any) -> list[str]:
    """What a table says of an argument or an option: its spelling, its default, its help."""
    spelled = [parameter.name.upper()] if parameter.param_type_name == "argument" else [*parameter.opts]
    spelled += parameter.secondary_opts
    shown_instead = getattr(parameter, "show_default", None)
    if parameter.required:
        default = "required"
    elif isinstance(shown_instead, str):
        default = shown_instead.replace(",", ", ").replace(",  ", ", ")
    elif isinstance(parameter.default, bool):  # a switch with two names has both, else it is off by default
        named = parameter.opts if parameter.default else parameter.secondary_opts
        default = f"`{named[0]}`" if named and parameter.secondary_opts else ""
    else:
        default = "" if parameter.default is None else f"`{parameter.default}`"
    texts = (", ".join(f"`{one}`" for one in spelled), default, parameter.help or "")
    return [text.replace("|", "\\|") for text in texts]
