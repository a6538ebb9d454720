"""The places of a sweep on an executor: in other processes, or on machines that see the same files.

Tasks are small. The tensors of the model and of the data go through one file that each worker reads once, and the fits
come back as the files of their place. The executor itself sends the rest of the model and of the data with each task.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from subspace_lab.core.files import save_tensors
from subspace_lab.das._places import Places
from subspace_lab.das._tensors import tensors_in
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.offloading import is_offloaded

TENSORS = "tensors.safetensors"
AHEAD = 2  # tasks that wait for each worker: enough to keep it busy, few enough for a quick stop after an error

Work = Callable[[Places, Path], None]
"""The work of one task. It leaves its result in files under the folder."""

_here: dict[str, Places] = {}  # sweeps of this process: threads and forked workers find them here
_read: dict[str, Places] = {}  # the latest sweep that was read from a file
_one_at_a_time = threading.RLock()  # two threads must not run one model at the same time


@dataclass(frozen=True)
class Parcel:
    """A sweep as it is sent to a worker.

    Attributes:
        name: identifies the sweep, so that a worker reads it once only.
        folder: the folder of the tensors' file and of the results; all workers see it under this path.
        content: the sweep, with a `_Hole` in place of each tensor.
    """

    name: str
    folder: Path
    content: dict[str, Any]

    @classmethod
    @contextmanager
    def of(cls, places: Places, folder: Path) -> Iterator[Parcel]:
        """Write the tensors. The file is removed when the block ends."""
        model = places.backbone.model
        if is_offloaded(model):
            raise ValueError("The weights of this model are offloaded, so that it cannot be sent to workers.")
        content = {f.name: getattr(places, f.name) for f in fields(places)} | {"backbone": model}
        found = {id(one): one for one in tensors_in(content)}
        holes = {key: _Hole(str(i), str(one.device), _gradient(one)) for i, (key, one) in enumerate(found.items())}
        name = uuid.uuid4().hex
        path = folder / f"{name}.{TENSORS}"
        save_tensors(
            path, {holes[key].name: one.detach().cpu().contiguous().clone() for key, one in found.items()}
        )
        _here[name] = places
        try:
            yield cls(name, folder, copy.deepcopy(content, dict(holes)))
        finally:
            del _here[name]
            path.unlink(missing_ok=True)

    def unpacked(self) -> Places:
        """The sweep: from this process's memory if it is there, otherwise read from the file."""
        if self.name in _here:
            return _here[self.name]
        if self.name not in _read:
            path = self.folder / f"{self.name}.{TENSORS}"
            if not path.is_file():
                raise FileNotFoundError(
                    f"This worker does not see {path}: give the sweep an `out` folder that all workers see under one "
                    "path."
                )
            _read.clear()
            content = copy.deepcopy(self.content, {"tensors": load_file(path), "made": {}})  # type: ignore[dict-item]
            model = content.pop("backbone")
            _read[self.name] = Places(backbone=Backbone(model), **content)
        return _read[self.name]


@dataclass(frozen=True)
class _Hole:
    """A placeholder for a tensor. When it is copied, it becomes that tensor (the same object each time).

    Attributes:
        name: the tensor's name in the file.
        device: the device of the tensor.
        gradient: `requires_grad` of a parameter; None for a tensor that is not a parameter.
    """

    name: str
    device: str
    gradient: bool | None

    def __deepcopy__(self, memo: dict[Any, Any]) -> Tensor:
        made = memo["made"]
        if self.name not in made:
            tensor = memo["tensors"][self.name].to(self.device)
            made[self.name] = tensor if self.gradient is None else nn.Parameter(tensor, self.gradient)
        return made[self.name]


def _gradient(tensor: Tensor) -> bool | None:
    return tensor.requires_grad if isinstance(tensor, nn.Parameter) else None


def run_parcel(parcel: Parcel, work: Work) -> None:
    """Do one task, in a worker."""
    with _one_at_a_time:
        work(parcel.unpacked(), parcel.folder)


def distribute(
    executor: Executor, parcel: Parcel, works: Mapping[int, Work], finished: Callable[[int], None]
) -> None:
    """Run tasks on an executor; `finished` is called with the number of each task that has ended.

    Raises:
        RuntimeError: a worker died, or the tasks cannot be sent; finished results are kept.
    """
    waiting = list(works.items())
    most = AHEAD * (getattr(executor, "_max_workers", None) or max(1, len(waiting)))
    running: dict[Future[None], int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                number, work = waiting.pop(0)
                running[executor.submit(run_parcel, parcel, work)] = number
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda one: running[one]):
                number = running.pop(future)
                _result(future)
                finished(number)
    except BrokenExecutor as error:
        raise RuntimeError(_died(error)) from error
    finally:
        for future in running:
            future.cancel()
        wait(running)


def _result(future: Future[None]) -> None:
    try:
        future.result()
    except Exception as error:
        kind = type(error).__name__
        if kind == "KilledWorker":  # Dask raises this after several workers died
            raise RuntimeError(_died(error)) from error
        if kind == "PicklingError" or "pickle" in str(error):
            raise TypeError(
                f"This sweep cannot be sent to other processes: {error}. Losses, metrics, methods and functions that "
                "draw pairs must be defined at the top level of a module."
            ) from error
        raise


def _died(error: BaseException) -> str:
    return (
        f"A worker died ({str(error) or type(error).__name__}). In a script of your own, is the call below "
        "`if __name__ == '__main__':`? Each worker reads the script again, and without this line starts a sweep of its "
        "own. Otherwise, was the worker killed, for example because memory ran out? With an `out` folder all finished "
        "sites are kept: the same call goes on from there."
    )
