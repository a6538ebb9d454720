"""The versions that the checks install: constraints.txt and constraints-lowest.txt.

    python .ci/pins.py lowest        print, as constraints, the lowest version of each package that pyproject.toml
                                     allows; torch as constraints.txt pins it
    python .ci/pins.py write FILE    put the versions installed beside this Python into FILE, under its comment
    python .ci/pins.py compare FILE  print what is installed beside this Python in another version than FILE says

Only the standard library is needed, so that `lowest` can run before anything is installed.
"""

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "constraints.txt"
REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*([^;]*)")
LOWEST = re.compile(r"(?:>=|==)\s*([\w.]+)")
# Not pinned: the project itself, what an environment has before anything is installed, and pyreft, which comes
# without the versions that it asks for.
LEFT_OUT = {"subspace-lab", "pip", "setuptools", "wheel", "pyreft"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> dict[str, str]:
    """Name → range, for the dependencies that pyproject.toml names, of these extras (else all) too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras or optional for line in optional[extra])]
    found: dict[str, str] = {}
    for line in lines:
        name, bounds = REQUIREMENT.match(line).groups()  # type: ignore[union-attr]
        if found.setdefault(normal(name), bounds.strip()) != bounds.strip():
            raise ValueError(f"pyproject.toml gives {name} two ranges: {found[normal(name)]} and {bounds.strip()}")
    return found


def pins(path: Path) -> dict[str, str]:
    """Name → version, for the lines of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def lowest() -> dict[str, str]:
    """Name → lowest version, for what the package and its tests need."""
    found = {}
    for name, bounds in requirements("tests").items():
        bound = LOWEST.search(bounds)
        if not bound:
            raise ValueError(f"pyproject.toml names no lowest version of {name}: {bounds!r}")
        found[name] = bound[1]
    return found | {"torch": pins(PINNED)["torch"]}


def installed() -> dict[str, str]:
    """Name → version here; without a build's own mark, such as torch's `+cpu`."""
    found = {normal(d.metadata["Name"]): d.version.partition("+")[0] for d in distributions()}
    return {name: version for name, version in sorted(found.items()) if name not in LEFT_OUT}


def write(path: Path) -> None:
    here, named = installed(), requirements()
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    direct = [f"{name}=={version}" for name, version in here.items() if name in named]
    rest = [f"{name}=={version}" for name, version in here.items() if name not in named]
    sections = [*comment, "", *direct, "", "# What these bring along.", *rest, ""]
    path.write_text("\n".join(sections), encoding="utf-8")


def compare(path: Path) -> list[str]:
    here, said = installed(), pins(path)
    lines = [f"{name}: {said[name]} → {v}" for name, v in here.items() if name in said and said[name] != v]
    lines += [f"{name}: not pinned → {version}" for name, version in here.items() if name not in said]
    return lines


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lowest"]:
            print("\n".join(f"{name}=={version}" for name, version in lowest().items()))
        case ["write", file]:
            write(Path(file))
        case ["compare", file]:
            print("\n".join(compare(Path(file))) or f"nothing differs from {file}")
        case _:
            sys.exit(__doc__)
