"""Edits and subspaces on disk: safetensors for numbers, JSON for everything else that changes the function.

Files are written aside and renamed, so a killed process leaves the old file or the new one, never half of one.
Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_lab.core.interventions import (
    Affine,
    Constant,
    Diagonal,
    FromSource,
    Intervention,
    Value,
)
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    Part,
    Subspace,
    random_orthonormal,
)

FORMAT = 1


def save_edits(
    folder: str | Path, edits: Mapping[Site, Intervention], facts: Mapping[str, Any] | None = None
) -> None:
    """Write `edits.safetensors` and `edits.json` into a folder.

    An intervention shared by several sites is stored once and shared again when loaded.

    Args:
        facts: what else should be known of them (model, data, seed), as JSON.

    Raises:
        TypeError: an edit that is no `Intervention` of this package, so that it could not be rebuilt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    for site, edit in edits.items():
        if type(edit) is not Intervention:
            raise TypeError(f"{site}: {type(edit).__name__} cannot be saved; only an Intervention can.")
        name = names.setdefault(id(edit), f"edit{len(names)}")
        described.append({"site": str(site), "name": name, **describe(edit)})
        tensors |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in edit.state_dict().items()}
    save_tensors(folder / "edits.safetensors", tensors)
    write_json(folder / "edits.json", {"format": FORMAT, "edits": described, "facts": dict(facts or {})})


def load_edits(folder: str | Path) -> dict[Site, Intervention]:
    """The edits that `save_edits` wrote, bit for bit.

    Raises:
        FileNotFoundError, ValueError: a file is missing, of another format, or does not fit the other.
    """
    folder = Path(folder)
    found = read_json(folder / "edits.json")
    if found.get("format") != FORMAT:
        raise ValueError(f"{folder}: edits of format {found.get('format')!r}; this version reads {FORMAT}.")
    tensors = load_file(folder / "edits.safetensors")
    edits: dict[Site, Intervention] = {}
    built: dict[str, Intervention] = {}
    for row in found["edits"]:
        name = row["name"]
        if name not in built:
            state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            built[name] = rebuild(row, state)
        edits[Site.parse(row["site"])] = built[name]
    return edits


def describe(edit: Intervention) -> dict[str, Any]:
    """Everything but the numbers that makes an intervention what it is."""
    return {
        "subspace": _describe_subspace(edit.subspace),
        "value": _describe_value(edit.value),
        "write": edit.write,
        "dropout": edit.dropout.p,
    }


def rebuild(row: Mapping[str, Any], state: Mapping[str, Tensor]) -> Intervention:
    """The intervention that was described, with its numbers (ValueError where they do not fit)."""
    subspace = _rebuild_subspace(row["subspace"])
    value = _rebuild_value(row["value"], subspace, state)
    edit = Intervention(subspace, value, write=row["write"], dropout=row["dropout"])
    try:
        edit.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The numbers do not fit the description {dict(row)}: {error}") from error
    return edit.requires_grad_(True) if any(True for _ in edit.parameters()) else edit


def _describe_subspace(subspace: Subspace) -> dict[str, Any]:
    plain = {"kind": type(subspace).__name__, "width": subspace.width, "rank": subspace.rank}
    if isinstance(subspace, LearnedSubspace):
        return {**plain, "orthonormalise": subspace.orthonormalise}
    if isinstance(subspace, Part):
        return {
            **plain,
            "whole": _describe_subspace(subspace.whole),
            "start": subspace.start,
            "stop": subspace.stop,
        }
    if isinstance(subspace, FixedSubspace | FreeDirections | Axes):
        return plain
    raise TypeError(f"{type(subspace).__name__} is not a subspace that can be saved.")


def _rebuild_subspace(row: Mapping[str, Any]) -> Subspace:
    width, rank = row["width"], row["rank"]
    match row["kind"]:
        case "LearnedSubspace":
            return LearnedSubspace(width, rank, seed=0, orthonormalise=row["orthonormalise"])
        case "FreeDirections":
            return FreeDirections(width, rank, seed=0)
        case "FixedSubspace":
            return FixedSubspace(random_orthonormal(width, rank, 0))
        case "Axes":
            return Axes(width, range(rank))
        case "Part":
            return Part(_rebuild_subspace(row["whole"]), row["start"], row["stop"])
        case kind:
            raise ValueError(f"{kind!r} is no kind of subspace that this version knows.")


def _describe_value(value: Value) -> dict[str, Any]:
    plain: dict[str, Any] = {"kind": type(value).__name__}
    if isinstance(value, FromSource):
        return {**plain, "parts": value.parts}
    if isinstance(value, Affine):
        return {**plain, "activation": value.activation}
    if isinstance(value, Constant):
        return {**plain, "learned": isinstance(value.z, torch.nn.Parameter)}
    if isinstance(value, Diagonal):
        return plain
    raise TypeError(f"{type(value).__name__} is not a value that can be saved.")


def _rebuild_value(row: Mapping[str, Any], subspace: Subspace, state: Mapping[str, Tensor]) -> Value:
    match row["kind"]:
        case "FromSource":
            parts = row["parts"]
            return FromSource(parts and {name: (a, b) for name, (a, b) in parts.items()})
        case "Affine":
            return Affine(subspace.width, subspace.rank, row["activation"])
        case "Constant":
            return Constant(state["value.z"], learned=row["learned"])
        case "Diagonal":
            return Diagonal(subspace.width)
        case kind:
            raise ValueError(f"{kind!r} is no kind of value that this version knows.")


def save_subspaces(
    path: str | Path, subspaces: Mapping[str, Subspace], facts: Mapping[str, str] | None = None
) -> None:
    """One safetensors file: {name: R of shape (rank, width)}, with facts as its metadata."""
    tensors = {name: s.basis().detach().cpu().contiguous() for name, s in subspaces.items()}
    save_tensors(Path(path), tensors, facts)


def load_subspaces(path: str | Path) -> dict[str, FixedSubspace]:
    """The subspaces that `save_subspaces` wrote."""
    return {name: FixedSubspace(rows) for name, rows in load_file(path).items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written aside and renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), aside, metadata={"format": "pt", **(metadata or {})})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, written aside and renamed; NaN is refused, since it is no JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, written aside and renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """A JSON file; ValueError with its name where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def output_folder(path: str | Path) -> Path:
    """A folder for results, made if it is not there.

    Raises:
        FileExistsError: it holds something already; results are never mixed or overwritten.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: it may hold other results. Name a new folder, or remove it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
