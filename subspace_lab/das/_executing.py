"""The places of a sweep on an executor: other processes, or machines that see the same files.

A task is small: the model's and the data's tensors go through one file, which each worker reads once, and the fits
come back as the files of their place. What is left of the model and the data is sent with each task by the
executor's own means.
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
AHEAD = 2  # tasks that wait for each worker: enough that none idles, few enough that an end comes soon

Work = Callable[[Places, Path], None]
"""What is done in a worker: it leaves its result in files under the folder."""

_here: dict[str, Places] = {}  # of sweeps of this process: threads and forked workers find them here
_read: dict[str, Places] = {}  # the latest that came through a file
_one_at_a_time = threading.RLock()  # a model is not run by two threads at once


@dataclass(frozen=True)
class Parcel:
    """A sweep as it is sent to a worker.

    Attributes:
        name: by which a worker knows what it has read already.
        folder: of the tensors' file and of the results; workers see it under the same path.
        content: the sweep, with a `_Hole` in the place of every tensor.
    """

    name: str
    folder: Path
    content: dict[str, Any]

    @classmethod
    @contextmanager
    def of(cls, places: Places, folder: Path) -> Iterator[Parcel]:
        """Write the tensors; the file is gone when the block ends."""
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
        """The sweep, as it was read from the file, or as this process has it."""
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
    """What stands for a tensor; copied, it becomes that tensor, the same one each time.

    Attributes:
        name: of the tensor in the file.
        device: where it was.
        gradient: of a parameter, whether it asks for one; None for a tensor that is no parameter.
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
    """Run in a worker."""
    with _one_at_a_time:
        work(parcel.unpacked(), parcel.folder)


def distribute(
    executor: Executor, parcel: Parcel, works: Mapping[int, Work], finished: Callable[[int], None]
) -> None:
    """Run works on an executor; `finished` is called with the number of each that has ended.

    Raises:
        RuntimeError: a worker died, or the works cannot be sent; what was finished is kept.
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
        if kind == "KilledWorker":  # of Dask, after several workers
            raise RuntimeError(_died(error)) from error
        if kind == "PicklingError" or "pickle" in str(error):
            raise TypeError(
                f"This sweep cannot be sent to other processes: {error}. Losses, metrics, methods and functions that "
                "draw pairs have to be defined at the top level of a module."
            ) from error
        raise


def _died(error: BaseException) -> str:
    return (
        f"A worker died ({str(error) or type(error).__name__}): was it killed, for example since memory ran out? "
        "What was finished before is kept where the sweep has an `out` folder: the same call goes on from there."
    )
