"""The searches of `subspace-lab search`, of the model and its twins, each in a folder in which it can be continued."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace_lab.cli.common import SMALL, say

RESULTS, MODEL, PICTURES = "results.json", "model", ("iia.png", "overlap.png")
REPORT = "report.html"
CHECK, VERDICT, VERDICT_PICTURE = "check", "verdict.json", "verdict.png"  # what `subspace-lab check` leaves
TWIN = re.compile(r"twin\d*")


@dataclass
class Searched:
    """The results of the searches.

    Attributes:
        model: the fits of the model; None if it was interrupted before the first of them.
        twins: the fits of the randomly initialised twins that were searched.
        interrupted: whether something is left to search.
        unsaved: {folder: why the fits could not be written into it}.
    """

    model: Any = None
    twins: list[Any] = field(default_factory=list)
    interrupted: bool = False
    unsaved: dict[str, OSError] = field(default_factory=dict)

    def run(self, folder: Path, search: Callable[[Path], Any]) -> Any:
        """Run one search. Returns its fits, after an interrupt those that are finished; None if there are none."""
        from subspace_lab.das.sweeps import SweepInterrupted, SweepUnsaved

        try:
            return search(folder)
        except SweepUnsaved as error:
            self.unsaved[folder.name] = error
            return error.fits
        except SweepInterrupted as stopped:
            self.interrupted = True
            return stopped.fits
        except KeyboardInterrupt:
            self.interrupted = True
            return None


def twin_folder(number: int) -> str:
    """The folder of a twin: twin, twin2, twin3, …"""
    return "twin" if number == 0 else f"twin{number + 1}"


def how_many_twins(twin: bool, twins: int) -> int:
    """The number of twins according to --twin, --no-twin and --twins."""
    if twins < 0:
        raise ValueError(f"--twins {twins}: needed is 0 or more.")
    return twins if twin else 0


def resumable(folder: Path) -> None:
    """FileExistsError if a folder contains what no search or check writes; says if there is no search to continue."""
    strangers = [
        path.name
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and path.name not in (RESULTS, MODEL, REPORT, *PICTURES, CHECK, VERDICT, VERDICT_PICTURE)
        and not TWIN.fullmatch(path.name)
    ]
    if strangers:
        raise FileExistsError(
            f"{folder} exists and contains {strangers[0]!r}, which no search writes: --resume needs the folder of a "
            "search, or a new one."
        )
    if not (folder / MODEL).exists():
        say(f"--resume: there is no search in {folder}; a new one begins.")


def fresh(folder: Path) -> None:
    """FileExistsError where a folder holds something; of a search it says how that goes on."""
    from subspace_lab.core.files import check_empty

    if (folder / RESULTS).is_file() or any(
        (folder / MODEL / name).is_file() for name in ("sweep.json", "fits.json")
    ):
        raise FileExistsError(
            f"{folder} exists and is not empty: it contains a search. --resume continues it, if the rest of the "
            "command is the same. Otherwise name a new folder, or remove it."
        )
    check_empty(folder)


def written(folder: Path) -> list[str]:
    """What a search has left in its folder."""
    names = [MODEL, *sorted(one.name for one in folder.iterdir() if TWIN.fullmatch(one.name)), *PICTURES, RESULTS]
    return [name for name in names if (folder / name).exists()]


def is_finished(folder: Path, twins: int) -> bool:
    """Whether the folder contains a finished search of the model and this many twins."""
    from subspace_lab.core.files import read_json

    names = [MODEL, *(twin_folder(i) for i in range(twins))]
    if not all((folder / name / "fits.json").is_file() for name in names) or not (folder / RESULTS).is_file():
        return False
    results = read_json(folder / RESULTS)
    saved = [results["model"], *(results.get("twins") or [results["twin"]])]
    saved = [one for one in saved if one is not None]
    return len(saved) == len(names) and not any("interrupted" in one["facts"] for one in saved)


@contextmanager
def workers_of(number: int, network: Any, memory: str | None, device: str) -> Iterator[dict[str, Any]]:
    """The options `executor` and `memory` for a search by several processes; 1 means only this process."""
    if number < 1:
        raise ValueError(f"--workers {number}: needed is 1 or more.")
    if number == 1:
        yield {"memory": memory}
        return
    import torch

    from subspace_lab.das.workers import local_workers
    from subspace_lab.engine.budget import budgets

    small = sum(p.numel() for p in network.parameters()) < SMALL
    share = min(budgets(memory, torch.device(device))) // number
    with local_workers(number, threads=1 if small else None) as executor:
        yield {"memory": share, "executor": executor}
