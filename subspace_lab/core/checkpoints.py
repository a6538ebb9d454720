"""Edits and subspaces in files: tensors as safetensors; everything else that defines the function is JSON metadata.

One file contains what belongs together. No kind of subspace or value is named here: each describes and rebuilds itself
(`core/kinds.py`). Nothing is unpickled. A file cannot choose which code is imported, except among the modules of this
package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subspace_lab.core.arguments import by_site, instance
from subspace_lab.core.files import save_tensors
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.kinds import Kind
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, Subspace

FORMAT = 1
EDITS, ALIGNMENT = (
    "subspace_lab.edits",
    "subspace_lab.alignment",
)  # the entry of the metadata that describes a file
PACKAGE = __name__.partition(".")[0]


def save_edits(
    path: str | Path, edits: Mapping[Site, Intervention], facts: Mapping[str, Any] | None = None
) -> None:
    """Write edits into one safetensors file.

    If several of them share something (an intervention, a subspace, the basis of several parts), it is stored once and
    is shared again after loading.

    Args:
        edits: {site: intervention}.
        facts: further facts about them (model, data, seed), as JSON.

    Raises:
        TypeError: edits that are not {site: intervention}; an edit whose class could not be rebuilt; facts that are not
            JSON.
    """
    by_site(edits, "edits", Intervention, Site)
    plan = Plan()
    described = {
        "format": FORMAT,
        "edits": [{"site": str(site), "edit": plan.name(edit)} for site, edit in edits.items()],
        "parts": plan.parts,
        "facts": dict(facts or {}),
    }
    write_described(path, EDITS, described, plan)


def load_edits(path: str | Path, kinds: Sequence[type[Kind]] = ()) -> dict[Site, Intervention]:
    """The edits that `save_edits` wrote, equal bit by bit; parameters that were trainable are trainable again.

    Args:
        kinds: your own classes of subspaces, values or interventions that the edits contain. They are needed if the
            module that defined them when they were saved is not imported, or no longer has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is broken, contains no edits, contains a kind that is not known here, or has a newer
            format.
    """
    tensors, metadata = read_tensors(path)
    if EDITS not in metadata:
        holds = "an alignment: read it with Alignment.load" if ALIGNMENT in metadata else "no edits of save_edits"
        raise ValueError(f"{path} holds {holds}.")
    try:
        found = json.loads(metadata[EDITS])
        check_format(found, "edits")
        parts = Parts(found["parts"], tensors, kinds)
        edits = {Site.parse(one["site"]): parts.build(one["edit"], Intervention) for one in found["edits"]}
        parts.check_all_used()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return edits


def save_subspaces(
    path: str | Path, subspaces: Mapping[str, Subspace], facts: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file, {name: R of shape (rank, width)}, with facts as its metadata.

    These are plain bases for other programs; use `Alignment.save` to save results with their sites and evidence.
    """
    for name, subspace in subspaces.items():
        instance(subspace, Subspace, f"The subspace of {name!r}", "FixedSubspace(basis) makes one of a matrix")
    # Copies, because parts are views of one basis, and safetensors refuses tensors that share memory.
    tensors = {name: s.basis().detach().cpu().contiguous().clone() for name, s in subspaces.items()}
    save_tensors(Path(path), tensors, facts)


def load_subspaces(path: str | Path) -> dict[str, FixedSubspace]:
    """The subspaces that `save_subspaces` wrote. FileNotFoundError; ValueError for a file without subspaces."""
    tensors, metadata = read_tensors(path)
    for entry, reader in ((EDITS, "load_edits"), (ALIGNMENT, "Alignment.load")):
        if entry in metadata:
            raise ValueError(f"{path} holds no subspaces of save_subspaces: read it with {reader}.")
    try:
        return {name: FixedSubspace(basis) for name, basis in tensors.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no subspaces: {error}") from error

    # --- the contents of both kinds of files ----------------------------------------------------------------------


def write_described(path: str | Path, entry: str, described: Mapping[str, Any], plan: Plan) -> None:
    """Write a plan's tensors, with the description as one entry of the metadata."""
    text = json.dumps(described, ensure_ascii=False, allow_nan=False)
    plan.check(json.loads(text)["parts"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(Path(path), plan.tensors, {entry: text})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. ValueError, with the name of the file, if it is not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            # Copies, because the place of a tensor in the file can influence how products of it are rounded.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_format(found: Mapping[str, Any], what: str) -> None:
    """ValueError for a file of another format."""
    if found["format"] != FORMAT:
        raise ValueError(
            f"{what} of format {found['format']!r}; this version reads {FORMAT}: install a newer subspace_lab"
        )


class Plan:
    """Names, descriptions and tensors of modules; each is stored once, however often it is used."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}  # {id of a tensor: the name of its module}

    def name(self, module: nn.Module) -> str:
        """The module's name in the file; it is described when it is first used."""
        if module not in self._names:
            described = self._described(module)
            self._names[module] = name = f"{len(self._names)}"
            own = _own(module)
            for t in own.values():
                if self._owners.setdefault(id(t), name) != name:
                    raise TypeError(
                        f"Two {type(module).__name__}s hold one and the same tensor, which would come back as "
                        "two: let the edits share the module instead."
                    )
            trains = [k for k, t in own.items() if isinstance(t, nn.Parameter) and t.requires_grad]
            kind = {"kind": type(module).__name__, "module": type(module).__module__}
            self.parts[name] = {**kind, **described, "trains": trains}
            self.tensors |= {f"{name}.{k}": t.detach().cpu().contiguous() for k, t in own.items()}
        return self._names[module]

    def check(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """TypeError, before anything is written, for a user's own kind that its description cannot rebuild."""
        own = [kind for kind in map(type, self._names) if not _of_package(kind.__module__)]
        trial = Parts(parts, dict(self.tensors), own)
        for module, name in self._names.items():
            if type(module) in own:
                try:
                    trial.build(name, Kind)
                except Exception as error:  # a user's class may raise anything
                    raise TypeError(
                        f"{type(module).__name__} cannot be saved, since its description {parts[name]} does not "
                        f"rebuild it: {type(error).__name__}: {error}"
                    ) from error

    def _described(self, module: nn.Module) -> dict[str, Any]:
        if not isinstance(module, Kind):
            raise TypeError(f"{type(module).__name__} cannot be saved: it is no subspace, value or intervention.")
        kind = type(module)
        made = next(i for i, c in enumerate(kind.__mro__) if "__init__" in c.__dict__)
        described = next(i for i, c in enumerate(kind.__mro__) if "description" in c.__dict__)
        if made < described:
            raise TypeError(
                f"{kind.__name__} cannot be saved: it has an __init__ of its own, so it needs a `description` of "
                "its own too, with the arguments of that __init__."
            )
        description = module.description()
        for entry in kind.made_of:
            inside = description[entry]
            several = isinstance(inside, Mapping)
            description[entry] = {k: self.name(m) for k, m in inside.items()} if several else self.name(inside)
        return description


class Parts:
    """Modules by name; each is built when it is first needed.

    Args:
        described: {name: description} of the modules.
        tensors: {"name.tensor": tensor}; those of built modules are removed.
        kinds: the user's own classes, which have priority over all others.
    """

    def __init__(
        self,
        described: Mapping[str, Mapping[str, Any]],
        tensors: dict[str, Tensor],
        kinds: Iterable[type[Kind]] = (),
    ) -> None:
        self._described, self._tensors, self._kinds = described, tensors, list(kinds)
        self._built: dict[str, Any] = {}

    def build(self, name: str, wanted: type[Any]) -> Any:
        """The module of this name. ValueError if it is not of the wanted kind."""
        if name not in self._built:
            self._built[name] = self._module(name)
        found = self._built[name]
        if not isinstance(found, wanted):
            raise ValueError(f"part {name} is a {type(found).__name__}; needed is a {wanted.__name__}")
        return found

    def check_all_used(self) -> None:
        """ValueError for tensors that belong to no module."""
        if self._tensors:
            raise ValueError(f"the tensors {sorted(self._tensors)} belong to nothing that is described")

    def _module(self, name: str) -> Kind:
        described = dict(self._described[name])
        label, home, trains = described.pop("kind"), described.pop("module", PACKAGE), described.pop("trains")
        kind = find_kind(label, home, self._kinds)
        for entry in kind.made_of:
            inside = described[entry]
            several = isinstance(inside, Mapping)
            described[entry] = (
                {k: self.build(n, Kind) for k, n in inside.items()} if several else self.build(inside, Kind)
            )
        names = [key for key in self._tensors if key.partition(".")[0] == name]
        numbers = {key.partition(".")[2]: self._tensors.pop(key) for key in names}
        numbers = {kind.renamed.get(key, key): value for key, value in numbers.items()}
        module = kind.rebuild(described, numbers)
        own = _own(module)
        if set(own) != set(numbers):
            raise ValueError(f"a {label} has {sorted(own)}, the file {sorted(numbers)}")
        module.load_state_dict(numbers, strict=False, assign=True)  # the names were compared just before
        for key, tensor in _own(module).items():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(key in trains)
        return module


def find_kind(name: str, module: str, kinds: Iterable[type[Kind]] = ()) -> type[Kind]:
    """The class of a saved module: one of `kinds`, of this package, or of a module that is already imported.

    Raises:
        ValueError: no such class is known here.
    """
    for kind in kinds:
        if kind.__name__ == name:
            return kind
    if _of_package(module):
        if _exists(module):
            import_module(module)
        found = [kind for kind in _subclasses(Kind) if kind.__name__ == name and _of_package(kind.__module__)]
        if found:
            return found[0]
        raise ValueError(f"{name!r} is not a kind that this version knows: install a newer subspace_lab")
    own = getattr(sys.modules.get(module), name, None)
    if isinstance(own, type) and issubclass(own, Kind):
        return own
    raise ValueError(
        f"{name!r} is a class of the module {module!r}, which is not imported or does not have it: import that "
        f"module first, or pass the class, as in load_edits(path, kinds=[{name}])"
    )


def _exists(module: str) -> bool:
    """Whether a module of this name exists; it may have been moved or renamed since a file was written."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _of_package(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _subclasses(kind: type[Kind]) -> list[type[Kind]]:
    return [kind, *(found for direct in kind.__subclasses__() for found in _subclasses(direct))]


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers, without those of kinds inside of it."""
    inside = tuple(f"{name}." for name, child in module.named_modules() if name and isinstance(child, Kind))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
