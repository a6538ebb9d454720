"""The house rules that a program can read from the source.

Each check is a function from a package's folder to its list of violations. It is held against this package,
and against small trees with one planted fault each, so that a check that has gone blind shows.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "subspace_lab"
ROOT = Path(__file__).resolve().parents[1]

# Which room may know which; a file knows its own room. The door is the package's `__init__.py`.
ROOMS = {
    "core": set(),
    "model": {"core"},
    "engine": {"model", "core"},
    "das": {"engine", "model", "core"},
    "reft": {"engine", "model", "core"},
    "tasks": {"das", "engine", "model", "core"},
    "analysis": {"das", "reft", "engine", "model", "core"},
    "door": {"analysis", "tasks", "das", "reft", "engine", "model", "core"},
    "cli": {"door", "analysis", "tasks", "das", "reft", "engine", "model", "core"},
    "__main__": {"cli", "door", "analysis", "tasks", "das", "reft", "engine", "model", "core"},
}
NNSIGHT_HOME = f"{PACKAGE}.model.backbone"
# Running.forward holds its keywords against the base model's signature.
MAY_TAKE_ANY_KEYWORD = {"generate", "__call__", "Running.forward"}
LONGEST_FILE = 500  # a smell to heed: one object stays one class
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HEAVY = ("nnsight", "matplotlib", "transformers.modeling_utils", "transformers.trainer")

Check = Callable[[Path], list[str]]


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name → file, for every Python file of a package."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parsed(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for name, path in modules(folder).items():
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: str) -> str:
    parts = module.split(".")
    return "door" if len(parts) == 1 else parts[1]


def imports(name: str, tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere: at its top, in a function, for types, by `import_module`.

    `from a import b` counts as `a.b` where that is a module of the package, else as `a`.
    """
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known or is_room(inner) else base)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(target)), *_]:
                    found.add(package + target if target.startswith(".") else target)
    return found


def is_room(module: str) -> bool:
    parts = module.split(".")
    return len(parts) == 2 and parts[0] == PACKAGE and parts[1] in ROOMS


def called(call: ast.Call) -> str:
    """Last name of what is called: `load` for `torch.load(...)` and for `load(...)`."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def of_package(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == PACKAGE}


# --- the checks ---------------------------------------------------------------------------------------------


def wrong_arrows(folder: Path) -> list[str]:
    known, wrong = modules(folder), []
    for name, tree in parsed(folder):
        room = room_of(name)
        if room not in ROOMS:
            wrong.append(f"{name}: {room!r} is no room of the house {sorted(ROOMS)}")
            continue
        for target in sorted(of_package(imports(name, tree, known))):
            if room_of(target) not in ROOMS[room] | {room}:
                wrong.append(f"{name} imports {target}: {room} may know {sorted(ROOMS[room]) or 'no other room'}")
    return wrong


def cycles(folder: Path) -> list[str]:
    known = modules(folder)
    graph = {name: imports(name, tree, known) & known.keys() - {name} for name, tree in parsed(folder)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["import cycle: " + " → ".join(reversed(error.args[1]))]
    return []


def nnsight_outside_its_home(folder: Path) -> list[str]:
    known = modules(folder)
    return [
        f"{name} imports nnsight: only {NNSIGHT_HOME} may"
        for name, tree in parsed(folder)
        if name != NNSIGHT_HOME and any(i.split(".")[0] == "nnsight" for i in imports(name, tree, known))
    ]


def heavy_door(folder: Path) -> list[str]:
    """What `import subspace_lab` pulls in and should not: nnsight patches torch, the others take seconds."""
    program = (
        f"import sys; sys.path.insert(0, {str(folder.parent)!r}); import {PACKAGE}; "
        f"print(*[m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [f"import {PACKAGE} imports {module}" for module in done.stdout.split()]


def long_files(folder: Path) -> list[str]:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(folder).items()}
    return [f"{name} has {n} lines, at most {LONGEST_FILE}" for name, n in lengths.items() if n > LONGEST_FILE]


def swallowed_keywords(folder: Path) -> list[str]:
    """Public functions and methods that take any keyword: a misspelt option would be ignored in silence."""

    def hook(body: list[ast.stmt], where: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from hook(node.body, f"{where}.{node.name}")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
                private = node.name.startswith("_") and not node.name.endswith("__")
                names = {node.name, f"{where.rpartition('.')[2]}.{node.name}"}
                if not private and not names & MAY_TAKE_ANY_KEYWORD:
                    yield f"{where}.{node.name} takes **{node.args.kwarg.arg}: name its options"
            elif isinstance(node, ast.If | ast.Try | ast.With):
                yield from hook([*node.body, *getattr(node, "orelse", [])], where)

    return [fault for name, tree in parsed(folder) for fault in hook(tree.body, name)]


def unpickling(folder: Path) -> list[str]:
    known, wrong = modules(folder), []
    for name, tree in parsed(folder):
        wrong += [
            f"{name} imports {target}: nothing here pickles"
            for target in imports(name, tree, known)
            if target.split(".")[0] in PICKLERS
        ]
        torch_load_by_name = any(
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and any(a.name == "load" for a in node.names)
            for node in ast.walk(tree)
        )
        if torch_load_by_name:
            wrong.append(f"{name} imports load from torch: write torch.load(..., weights_only=True)")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            if function == "torch.load" and options.get("weights_only") != "True":
                wrong.append(f"{name}:{call.lineno} torch.load without weights_only=True")
            if called(call) == "read_pickle" or options.get("allow_pickle", "False") != "False":
                wrong.append(f"{name}:{call.lineno} {function} unpickles")
    return wrong


CHECKS: list[Check] = [
    wrong_arrows,
    cycles,
    nnsight_outside_its_home,
    heavy_door,
    long_files,
    swallowed_keywords,
    unpickling,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_keeps_the_rules(check: Check) -> None:
    assert modules(ROOT / PACKAGE), "no package to check"
    assert check(ROOT / PACKAGE) == []


# --- the checks see: one planted fault each, and lawful neighbours of the faults ----------------------------

FAULTS: list[tuple[Check, dict[str, str], str]] = [
    (
        wrong_arrows,
        {"core/sites.py": "from subspace_lab.das import search"},
        "core.sites imports subspace_lab.das",
    ),
    (wrong_arrows, {"core/sites.py": "from subspace_lab import das"}, "imports subspace_lab.das"),
    (
        wrong_arrows,
        {"core/sites.py": "def f():\n    import subspace_lab.tasks.ioi"},
        "imports subspace_lab.tasks",
    ),
    (wrong_arrows, {"das/sweeps.py": "from ..reft import config"}, "das.sweeps imports subspace_lab.reft"),
    (wrong_arrows, {"reft/__init__.py": "from ..das.sweeps import sweep"}, "reft imports subspace_lab.das"),
    (
        wrong_arrows,
        {"analysis/plots/canvas.py": "from subspace_lab.tasks.ioi import x"},
        "analysis.plots.canvas imports",
    ),
    (wrong_arrows, {"tasks/ioi.py": "from subspace_lab import Site"}, "tasks.ioi imports subspace_lab:"),
    (
        wrong_arrows,
        {"__init__.py": "from subspace_lab.cli import main"},
        "subspace_lab imports subspace_lab.cli",
    ),
    (
        wrong_arrows,
        {"core/x.py": "import importlib\nimportlib.import_module('subspace_lab.das')"},
        "core.x imports subspace_lab.das",
    ),
    (
        wrong_arrows,
        {"das/methods/das.py": "from ...analysis import compare"},
        "das.methods.das imports subspace_lab.analysis",
    ),
    (wrong_arrows, {"utils/x.py": ""}, "'utils' is no room"),
    (
        cycles,
        {"core/a.py": "from . import b", "core/b.py": "from subspace_lab.core.a import x"},
        "import cycle",
    ),
    (
        cycles,
        {
            "das/fits.py": "from subspace_lab.das._fits_table import text",
            "das/_fits_table.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .fits import Fits",
        },
        "import cycle",
    ),
    (
        cycles,
        {"core/__init__.py": "from .a import x", "core/a.py": "from subspace_lab.core import y"},
        "cycle",
    ),
    (
        nnsight_outside_its_home,
        {"model/intervene.py": "from nnsight.intervention import x"},
        "model.intervene imports",
    ),
    (nnsight_outside_its_home, {"das/search.py": "def f():\n    import nnsight"}, "das.search imports"),
    (
        heavy_door,
        {"__init__.py": "from .model import backbone", "model/backbone.py": "import nnsight"},
        "nnsight",
    ),
    (long_files, {"core/a.py": "x = 1\n" * (LONGEST_FILE + 1)}, "501 lines"),
    (swallowed_keywords, {"core/a.py": "def fit(x, **kwargs): ..."}, "fit takes **kwargs"),
    (
        swallowed_keywords,
        {"core/a.py": "class A:\n    def __init__(self, **rest): ..."},
        "__init__ takes **rest",
    ),
    (unpickling, {"core/a.py": "import pickle"}, "imports pickle"),
    (unpickling, {"core/a.py": "def f():\n    from dill import loads"}, "imports dill"),
    (unpickling, {"core/a.py": "import torch\ntorch.load('x')"}, "weights_only"),
    (unpickling, {"core/a.py": "import torch\ntorch.load('x', weights_only=False)"}, "weights_only"),
    (unpickling, {"core/a.py": "from torch import load"}, "load from torch"),
    (unpickling, {"core/a.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}, "unpickles"),
]

LAWFUL = {
    "__init__.py": "from .core.sites import Site\nfrom .das import search",
    "__main__.py": "from subspace_lab.cli import main",
    "cli/__init__.py": "import subspace_lab\nfrom subspace_lab.tasks import ioi\nfrom ..analysis import plots",
    "core/__init__.py": "",
    "core/sites.py": "class Site: ...",
    "model/backbone.py": """
        from .sites import Site
        def wrap():
            import nnsight
        class Backbone:
            def generate(self, **options): ...
            def _forward(self, **options): ...
        """,
    "core/checkpoints.py": "import torch\ntorch.load('x', weights_only=True)",
    "das/__init__.py": "",
    "das/search.py": "from ..core import sites\nfrom ..core.sites import Site",
    "das/methods/__init__.py": "",
    "das/methods/das.py": "from ...core.sites import Site\nfrom subspace_lab.das.search import Site",
    "tasks/ioi.py": "from subspace_lab.das.search import Site",
    "analysis/plots/__init__.py": "",
    "analysis/plots/canvas.py": "def draw():\n    import matplotlib",
}


def plant(folder: Path, files: dict[str, str]) -> Path:
    """A package of these files beside stand-ins for the heavy libraries."""
    for heavy in {name.split(".")[0] for name in HEAVY} | {"torch"}:
        (folder / heavy).mkdir()
        (folder / heavy / "__init__.py").write_text("load = lambda path, weights_only: None")
    package = folder / PACKAGE
    package.mkdir()
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(textwrap.dedent(text))
    return package


@pytest.mark.parametrize(("check", "files", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_planted_fault_is_seen(check: Check, files: dict[str, str], message: str, tmp_path: Path) -> None:
    faults = check(plant(tmp_path, files))
    assert len(faults) == 1 and message in faults[0], faults


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lawful_code_passes(check: Check, tmp_path: Path) -> None:
    assert check(plant(tmp_path, LAWFUL)) == []


# --- shapes -------------------------------------------------------------------------------------------------


def test_shape_checks_are_on() -> None:
    """The import hook of conftest.py reaches the package, or every shape in a signature is decoration."""
    rooms = sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py"))
    room = __import__(f"{PACKAGE}.{rooms[0]}", fromlist=["*"])
    assert room.__spec__ is not None
    assert type(room.__spec__.loader).__module__.startswith("jaxtyping"), room.__spec__
