"""The searches of `subspace-lab search`: the model's and its twins', each in a folder where it can go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace_lab.cli.common import SMALL

RESULTS, MODEL, PICTURES = "results.json", "model", ("iia.png", "overlap.png")
REPORT = "report.html"
CHECK, VERDICT, VERDICT_PICTURE = "check", "verdict.json", "verdict.png"  # what `subspace-lab check` leaves
TWIN = re.compile(r"twin\d*")


@dataclass
class Searched:
    """What was found.

    Attributes:
        model: None where nothing was found before an interrupt.
        twins: of the randomly initialised twins that were searched.
        interrupted: whether there is more to search.
        unsaved: {folder: why the fits could not be written into it}.
    """

    model: Any = None
    twins: list[Any] = field(default_factory=list)
    interrupted: bool = False
    unsaved: dict[str, OSError] = field(default_factory=dict)

    def run(self, folder: Path, search: Callable[[Path], Any]) -> Any:
        """The fits of one search, as far as they came; None where none did."""
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
    """twin, twin2, twin3: as many as are searched."""
    return "twin" if number == 0 else f"twin{number + 1}"


def how_many_twins(twin: bool, twins: int) -> int:
    """--twin, --no-twin and --twins as one number."""
    if twins < 0:
        raise ValueError(f"--twins {twins}: needed is 0 or more.")
    return twins if twin else 0


def resumable(folder: Path) -> None:
    """FileExistsError where a folder holds what no search leaves, and no check of one."""
    strangers = [
        path.name
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and path.name not in (RESULTS, MODEL, REPORT, *PICTURES, CHECK, VERDICT, VERDICT_PICTURE)
        and not TWIN.fullmatch(path.name)
    ]
    if strangers:
        raise FileExistsError(
            f"{folder} exists and holds {strangers[0]!r}, which no search leaves: --resume needs the folder of a "
            "search, or a new one."
        )


def is_finished(folder: Path, twins: int) -> bool:
    """Whether a search of the model and so many twins has left all that it leaves."""
    from subspace_lab.core.files import read_json

    names = [MODEL, *(twin_folder(i) for i in range(twins))]
    if not all((folder / name / "fits.json").is_file() for name in names) or not (folder / RESULTS).is_file():
        return False
    results = read_json(folder / RESULTS)
    told = [results["model"], *(results.get("twins") or [results["twin"]])]
    told = [one for one in told if one is not None]
    return len(told) == len(names) and not any("interrupted" in one["facts"] for one in told)


@contextmanager
def workers_of(number: int, network: Any, memory: str | None, device: str) -> Iterator[dict[str, Any]]:
    """The options `executor` and `memory` of a search by so many processes; one is this process."""
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
