"""Fits in a folder.

fits.json               facts, floors and failures; for every fit its method, scores, losses and seeds
subspaces.safetensors   the subspaces of all fits, and the score of every test pair

`fits.json` is written last. The other file contains its digest, so that files of different fits are not mixed up.

Until a sweep with a folder is finished, each place has the same two files (`das/_sweep_files.py`):

sweep.json              the settings of the sweep, with all its places
places/0007/            the fits of one place
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.checkpoints import Parts, Plan, check_format, read_tensors, write_described
from subspace_lab.core.estimates import Estimate
from subspace_lab.core.files import read_json, taken_folder, write_json
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.das import methods as known
from subspace_lab.das.methods.method import Learner, Method, Problem

Fits: TypeAlias = Any  # of das/fits.py, which imports this file

RECORDS, NUMBERS, ENTRY, FORMAT = "fits.json", "subspaces.safetensors", "subspace_lab.fits", 1
SWEEP, PLACES, SCREEN = "sweep.json", "places", "screen"


@dataclass(frozen=True)
class SavedMethod(Method):
    """A user's own method whose class is not known here. Its fits can be read, but not run again.

    Attributes:
        name, text: the name of the class, and the label of its fits.
        is_control: `control` of the method.
        settings: the saved fields of the method.
    """

    name: str = ""
    text: str = ""
    is_control: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return self.text

    @property
    def control(self) -> bool:  # type: ignore[override]
        return self.is_control

    def as_dict(self) -> dict[str, Any]:
        return {"method": self.name, **dict(self.settings)}

    def learner(self, problem: Problem) -> Learner:
        raise TypeError(f"{self.text} was saved by a class {self.name} that is not known here; it cannot be run.")


def write_fits(fits: Fits, folder: Path) -> None:
    """Write both files into a new or empty folder. All errors in the fits are raised before anything is written."""
    write = writer(fits)
    with taken_folder(folder) as folder:
        write(folder)


def writer(fits: Fits) -> Callable[[Path], None]:
    """A function that writes both files into an existing folder. All errors in the fits are raised by this call."""
    plan = Plan()
    tensors: dict[str, Tensor] = {}
    records = []
    for i, fit in enumerate(fits):
        spaces = {name: plan.name(subspace) for name, (_, subspace) in fit.alignment.variables.items()}
        for metric, values in fit.pair_scores.items():
            tensors[f"pairs.{i}.{metric}"] = values.detach().cpu().contiguous().clone()
        records.append(
            {
                "method": fit.method.as_dict(),
                "label": fit.method.label,
                "control": fit.method.control,
                "sites": {name: str(site) for name, site in fit.sites.items()},
                "subspaces": spaces,
                "facts": dict(fit.alignment.facts),
                "seed": fit.seed,
                "start": fit.start,
                "start_overlap": dict(fit.start_overlap),
                "scores": {s: {m: asdict(e) for m, e in of.items()} for s, of in fit.scores.items()},
                "losses": list(fit.losses),
            }
        )
    described = {
        "format": FORMAT,
        "facts": dict(fits.facts),
        "floors": {split: asdict(floors) for split, floors in fits.floors.items()},
        "failures": [asdict(failure) for failure in fits.failures],
        "screened": [asdict(one) for one in fits.screened],
        "labels": {name: list(of) for name, of in fits.labels.items()},
        "fits": records,
    }
    try:
        digest = _digest(described)
    except (TypeError, ValueError) as error:
        raise TypeError(f"These fits contain something that JSON cannot: {error}. Nothing was written.") from error
    plan.tensors |= tensors

    def write(folder: Path) -> None:
        write_described(folder / NUMBERS, ENTRY, {"format": FORMAT, "digest": digest, "parts": plan.parts}, plan)
        try:
            write_json(folder / RECORDS, described)
        except BaseException:
            (folder / NUMBERS).unlink(missing_ok=True)
            raise

    return write


def read_fits(folder: Path, methods: Sequence[type[Method]]) -> dict[str, Any]:
    """Read what `write_fits` wrote: the arguments of every `Fit`, `Floors` and `Failure`, and the facts.

    For an unfinished sweep these are the finished places; the facts then say how many these are.
    """
    if not (folder / RECORDS).is_file():
        if (folder / SWEEP).is_file():
            return _read_unfinished(folder, methods)
        raise FileNotFoundError(_no_fits(folder))
    found = read_json(folder / RECORDS)
    tensors, metadata = read_tensors(folder / NUMBERS)
    try:
        check_format(found, "fits")
        numbers = json.loads(metadata[ENTRY])
        if numbers["digest"] != _digest(found):
            raise ValueError(f"{RECORDS} and {NUMBERS} were not written together, or one was changed")
        scores = {name: tensors.pop(name) for name in list(tensors) if name.startswith("pairs.")}
        parts = Parts(numbers["parts"], tensors)
        fits = []
        for i, one in enumerate(found["fits"]):
            variables = {
                name: (Site.parse(site), parts.build(one["subspaces"][name], Subspace))
                for name, site in one["sites"].items()
            }
            prefix = f"pairs.{i}."
            fits.append(
                {
                    "method": _method(one, methods),
                    "alignment": Alignment(variables, one["facts"]),
                    "scores": {s: {m: Estimate(**e) for m, e in of.items()} for s, of in one["scores"].items()},
                    "losses": tuple(one["losses"]),
                    "pair_scores": {
                        name.removeprefix(prefix): v for name, v in scores.items() if name.startswith(prefix)
                    },
                    **{name: one[name] for name in ("seed", "start", "start_overlap")},
                }
            )
        parts.check_all_used()
        floors = {s: {name: Estimate(**e) for name, e in of.items()} for s, of in found["floors"].items()}
        failures = [dict(one) for one in found["failures"]]
        screened = [dict(one) for one in found.get("screened", [])]
        labels = {name: tuple(of) for name, of in found.get("labels", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} cannot be read as fits: {type(error).__name__}: {error}") from error
    return {
        "fits": fits,
        "floors": floors,
        "failures": failures,
        "facts": found["facts"],
        "labels": labels,
        "screened": screened,
    }


def finished_places(folder: Path) -> dict[int, Path]:
    """{number of a place: the folder of its fits}, for the places that a sweep has finished so far."""
    found = (path.parent for path in (folder / PLACES).glob(f"*/{RECORDS}"))
    return {int(one.name): one for one in sorted(found) if one.name.isdecimal()}


def _read_unfinished(folder: Path, methods: Sequence[type[Method]]) -> dict[str, Any]:
    places, sites = finished_places(folder), len(read_json(folder / SWEEP)["sites"])
    if not places:
        raise FileNotFoundError(
            f"The sweep in {folder} has finished none of its {sites} sites yet. Run the same sweep with this folder as "
            "`out` to continue it."
        )
    parts = [read_fits(path, methods) for path in places.values()]
    found = dict(parts[0])
    found |= {name: [one for part in parts for one in part[name]] for name in ("fits", "failures", "screened")}
    return found | {"facts": {**found["facts"], "interrupted": searched(len(places), sites)}}


def searched(done: int, sites: int) -> str:
    """How much of a sweep is done, as text for facts and messages."""
    return f"{done} of {sites} sites were searched"


def _method(one: Mapping[str, Any], own: Sequence[type[Method]]) -> Method:
    settings = dict(one["method"])
    name = settings.pop("method")
    kinds = {kind.__name__: kind for kind in [*vars(known).values(), *own] if isinstance(kind, type)}
    kind = kinds.get(name)
    if kind is None or not issubclass(kind, Method):
        return SavedMethod(name, one["label"], one["control"], tuple(settings.items()))
    names = {f.name for f in fields(kind) if f.compare}
    later = {f.name for f in fields(kind) if f.compare and f.default is not MISSING}  # older files may lack them
    if not names - later <= set(settings) <= names:
        raise ValueError(f"{name} was saved with the settings {sorted(settings)}; here it has {sorted(names)}")
    return kind(**settings)


def _digest(described: Mapping[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _no_fits(folder: Path) -> str:
    if (folder / "results.json").is_file() and (folder / NUMBERS).is_file():
        return (
            f"{folder} contains a search of version 0.1, which this version cannot read as fits. Its subspaces can be "
            f"read by load_subspaces('{folder / NUMBERS}'); for the rest, run the search again."
        )
    inside = folder / "model"
    hint = f" Did you mean {inside}?" if (inside / RECORDS).is_file() else ""
    return f"There is no {RECORDS} in {folder}: it is not a folder of Fits.save.{hint}"
