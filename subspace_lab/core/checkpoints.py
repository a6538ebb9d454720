"""Edits and subspaces on disk: safetensors for numbers, JSON in its metadata for all else that makes the function.

One file holds what belongs together, and is written aside and renamed: a killed process leaves the old file or the
new one, never half of one nor numbers beside another save's description. Nothing here unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subspace_lab.core.files import save_tensors
from subspace_lab.core.interventions import Affine, Constant, Diagonal, FromSource, Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    Part,
    Subspace,
)

FORMAT = 1
_KINDS: tuple[type[nn.Module], ...] = (
    *(Intervention, LearnedSubspace, Part, FreeDirections, FixedSubspace, Axes),
    *(FromSource, Affine, Constant, Diagonal),
)
KINDS = {kind.__name__: kind for kind in _KINDS}


def save_edits(
    path: str | Path, edits: Mapping[Site, Intervention], facts: Mapping[str, Any] | None = None
) -> None:
    """Write edits into one safetensors file.

    What several of them share (an intervention, a subspace, the basis that parts are of) is stored once and
    shared again when loaded.

    Args:
        facts: what else should be known of them (model, data, seed), as JSON.

    Raises:
        TypeError: an edit that is not made of this package's own kinds, so that it could not be rebuilt; facts
            that are no JSON.
    """
    plan = _Plan()
    rows = [{"site": str(site), "edit": plan.name(edit)} for site, edit in edits.items()]
    described = {"format": FORMAT, "edits": rows, "parts": plan.parts, "facts": dict(facts or {})}
    metadata = {"subspace_lab.edits": json.dumps(described, ensure_ascii=False, allow_nan=False)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(Path(path), plan.tensors, metadata)


def load_edits(path: str | Path) -> dict[Site, Intervention]:
    """The edits that `save_edits` wrote, bit for bit; what trained trains again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is broken, holds no edits, or was written in another format.
    """
    tensors, metadata = _load(path)
    if "subspace_lab.edits" not in metadata:
        raise ValueError(f"{path} holds no edits: it was not written by save_edits.")
    try:
        found = json.loads(metadata["subspace_lab.edits"])
        if found["format"] != FORMAT:
            raise ValueError(f"edits of format {found['format']!r}; this version reads {FORMAT}")
        parts = _Parts(found["parts"], tensors)
        edits = {Site.parse(row["site"]): parts.intervention(row["edit"]) for row in found["edits"]}
        if tensors:
            raise ValueError(f"the numbers {sorted(tensors)} belong to nothing that is described")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return edits


class _Plan:
    """Names, descriptions and numbers of modules, each once however often it is met."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}  # id of a tensor → whose it is

    def name(self, module: nn.Module) -> str:
        if module not in self._names:
            described = self._describe(module)
            self._names[module] = name = f"{len(self._names)}"
            parameters = dict(module.named_parameters(recurse=False))
            own = {**parameters, **dict(module.named_buffers(recurse=False))}
            for t in own.values():
                if self._owners.setdefault(id(t), name) != name:
                    raise TypeError(
                        f"Two {type(module).__name__}s hold one and the same tensor, which would come back as "
                        "two: let the edits share the module instead."
                    )
            trains = [k for k, p in parameters.items() if p.requires_grad]
            self.parts[name] = {"kind": type(module).__name__, **described, "trains": trains}
            self.tensors |= {f"{name}.{k}": t.detach().cpu().contiguous() for k, t in own.items()}
        return self._names[module]

    def _describe(self, module: nn.Module) -> dict[str, Any]:
        kind = type(module).__name__
        if KINDS.get(kind) is not type(module):  # a subclass may compute something else
            raise TypeError(f"{kind} cannot be saved, since it could not be rebuilt; these can: {list(KINDS)}.")
        match module:
            case Intervention():
                parts = {"subspace": self.name(module.subspace), "value": self.name(module.value)}
                return {**parts, "write": module.write, "dropout": module.dropout.p}
            case LearnedSubspace():
                return {"width": module.width, "rank": module.rank, "orthonormalise": module.orthonormalise}
            case Part():
                return {"whole": self.name(module.whole), "start": module.start, "stop": module.stop}
            case FreeDirections():
                return {"width": module.width, "rank": module.rank}
            case Axes():
                return {"width": module.width}
            case FromSource():
                return {"parts": module.parts}
            case Affine():
                rank, width = module.weight.shape
                return {"width": width, "rank": rank, "activation": module.activation}
            case Constant():
                return {"learned": isinstance(module.z, nn.Parameter)}
            case Diagonal():
                return {"width": module.scale.numel()}
        return {}


class _Parts:
    """Modules by name, built when first asked for; takes their numbers out of `tensors`."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], tensors: dict[str, Tensor]) -> None:
        self._rows, self._tensors = rows, tensors
        self._built: dict[str, Any] = {}

    def intervention(self, name: str) -> Intervention:
        found = self.module(name)
        if not isinstance(found, Intervention):
            raise ValueError(f"part {name} is a {type(found).__name__}, no intervention")
        return found

    def module(self, name: str) -> Any:
        if name not in self._built:
            row = self._rows[name]
            numbers = {k: self._tensors.pop(f"{name}.{k}") for k in self._of(name)}
            module = self._empty(row, numbers)
            own = {k for k, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
            if own != set(numbers):
                raise ValueError(f"a {row['kind']} has {sorted(own)}, the file {sorted(numbers)}")
            module.load_state_dict(numbers, strict=False, assign=True)  # strictly its own, as was just seen
            for k, p in module.named_parameters(recurse=False):
                p.requires_grad_(k in row["trains"])
            self._built[name] = module
        return self._built[name]

    def _of(self, name: str) -> list[str]:
        return [k.partition(".")[2] for k in self._tensors if k.partition(".")[0] == name]

    def _empty(self, row: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> nn.Module:
        match row["kind"]:
            case "Intervention":
                subspace, value = self.module(row["subspace"]), self.module(row["value"])
                return Intervention(subspace, value, write=row["write"], dropout=row["dropout"])
            case "LearnedSubspace":
                return LearnedSubspace(row["width"], row["rank"], seed=0, orthonormalise=row["orthonormalise"])
            case "FreeDirections":
                return FreeDirections(row["width"], row["rank"], seed=0)
            case "FixedSubspace":
                return FixedSubspace(numbers["rows"])
            case "Axes":
                return Axes(row["width"], numbers["indices"].tolist())
            case "Part":
                return Part(self.module(row["whole"]), row["start"], row["stop"])
            case "FromSource":
                parts = row["parts"]
                return FromSource(None if parts is None else {k: (a, b) for k, (a, b) in parts.items()})
            case "Affine":
                return Affine(row["width"], row["rank"], row["activation"])
            case "Constant":
                return Constant(numbers["z"], learned=row["learned"])
            case "Diagonal":
                return Diagonal(row["width"])
            case kind:
                raise ValueError(f"{kind!r} is no kind that this version knows")


def save_subspaces(
    path: str | Path, subspaces: Mapping[str, Subspace], facts: Mapping[str, str] | None = None
) -> None:
    """One safetensors file: {name: R of shape (rank, width)}, with facts as its metadata."""
    # Copies: parts are views of one basis, and safetensors refuses tensors that share memory.
    tensors = {name: s.basis().detach().cpu().contiguous().clone() for name, s in subspaces.items()}
    save_tensors(Path(path), tensors, facts)


def load_subspaces(path: str | Path) -> dict[str, FixedSubspace]:
    """The subspaces that `save_subspaces` wrote (FileNotFoundError, ValueError for a file that has none)."""
    tensors, _ = _load(path)
    try:
        return {name: FixedSubspace(rows) for name, rows in tensors.items()}
    except ValueError as error:
        raise ValueError(f"{path} holds no subspaces: {error}") from error


def _load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; ValueError with its name where it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            # Copies, since where a number lies in the file can decide how a product of it is rounded.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
