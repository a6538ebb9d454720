"""Sweeps on executors: threads, processes that were forked or spawned, a Dask cluster. The numbers are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sweep_folders import METHODS, PLACES, WHOLE, kept, same
from tiny_sweeps import QUICK, SITES, counterfactuals, pairs, swept, tiny

from subspace_lab.das import _executing, _places
from subspace_lab.das._tensors import tensors_in
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA
from subspace_lab.das.objectives import cross_entropy
from subspace_lab.das.workers import local_workers


@pytest.fixture(scope="module")
def alone() -> Fits:
    return swept(METHODS, PLACES)


@contextmanager
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@contextmanager
def forked() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        yield pool


@contextmanager
def dask() -> Iterator[Executor]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, 1)
        yield client.get_executor()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: sums over several threads are rounded elsewhere. Forks want it too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [threads, forked, dask])
def test_an_executor_gives_the_same_numbers(kind: Any, alone: Fits, tmp_path: Path) -> None:
    with kind() as executor:
        there = swept(METHODS, PLACES, executor=executor, out=tmp_path)
        assert same(there, alone) and same(Fits.load(tmp_path), alone) and kept(tmp_path) == WHOLE
        assert same(swept(METHODS, PLACES, executor=executor), alone)  # through a folder that is gone then
    assert not _executing._here


def test_workers_of_this_machine_give_the_same_numbers(alone: Fits) -> None:
    """Spawned ones, of one pool for two sweeps; a stream of pairs; a failure; each model is read once a worker."""
    model = tiny().model
    with local_workers(2, threads=1) as executor:
        assert same(swept(METHODS, PLACES, executor=executor), alone)
        few = pairs(train=counterfactuals(0, n=20))
        assert same(
            swept(PCA([2, 21]), SITES, pairs=few, executor=executor), swept(PCA([2, 21]), SITES, pairs=few)
        )
        drawn = pairs(train=counterfactuals)
        assert same(swept(DAS(2), SITES, pairs=drawn, executor=executor), swept(DAS(2), SITES, pairs=drawn))
    assert tiny().model is model and not any(p.is_meta for p in model.parameters())


def test_what_cannot_be_sent_is_told() -> None:
    with local_workers(1, threads=1) as executor, pytest.raises(TypeError, match="top level of a module"):
        swept(DAS(2), SITES, loss=lambda logits, _: logits.sum(-1), executor=executor)


@dataclass(frozen=True)
class Deadly(DAS):
    """Kills its process at one site."""

    def learner(self, problem: Any) -> Any:
        if problem.sites["v"] == PLACES[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().learner(problem)


@dataclass(frozen=True)
class Broken(DAS):
    def learner(self, problem: Any) -> Any:
        raise ZeroDivisionError("as in any code")


def test_a_worker_that_dies_costs_its_own_place_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with forked() as executor, pytest.raises(RuntimeError, match=r"A worker died .*goes on from there"):
        swept(Deadly(1), [PLACES[0], PLACES[2]], executor=_OneByOne(executor), out=tmp_path)
    assert Fits.load(tmp_path, [Deadly]).places == [str(PLACES[0])]
    seen: Any = []
    at = _places.Places.at
    monkeypatch.setattr(
        _places.Places, "at", lambda self, where, step: seen.append(where) or at(self, where, step)
    )
    monkeypatch.setattr(Deadly, "learner", DAS.learner)
    assert len(swept(Deadly(1), [PLACES[0], PLACES[2]], out=tmp_path)) == 2
    assert seen == [{"v": PLACES[2]}]


class _OneByOne(Executor):
    """Starts a task when the one before it has ended."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, *args: Any, **options: Any) -> Any:
        future = self.inner.submit(*args, **options)
        future.exception()
        return future


def test_an_error_in_a_worker_is_that_error(tmp_path: Path) -> None:
    with forked() as executor, pytest.raises(ZeroDivisionError, match="as in any code"):
        swept(Broken(1), SITES, executor=executor, out=tmp_path / "out")
    assert kept(tmp_path) == set()


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    parcel = _executing.Parcel("name", tmp_path, {})
    with pytest.raises(FileNotFoundError, match=r"does not see .*an `out` folder that all workers see"):
        parcel.unpacked()


def test_a_parcel_holds_no_numbers_and_becomes_the_same_model(tmp_path: Path) -> None:
    places = _places.Places(tiny(), pairs(), [], [], [], QUICK, cross_entropy, [], {})
    with _executing.Parcel.of(places, tmp_path) as parcel:
        sent = parcel.content["backbone"]
        inside = [one for one in (*sent.parameters(), *sent.buffers()) if isinstance(one, torch.Tensor)]
        inside += tensors_in({k: v for k, v in parcel.content.items() if k != "backbone"})
        again = _executing.Parcel(parcel.name, tmp_path, parcel.content)
        _executing._here.clear()
        read = again.unpacked()
        _executing._here[parcel.name] = places
    assert inside == [] and not list(tmp_path.iterdir())
    model: Any
    model, before = read.backbone.model, tiny().model
    assert model is not before and model.lm_head.weight is model.transformer.wte.weight
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and type(one) is type(other) and one.requires_grad == other.requires_grad
    assert read.pairs.fingerprint() == places.pairs.fingerprint()


def test_workers_end_with_a_process_that_is_killed() -> None:
    program = (
        "import os, time\n"
        "from subspace_lab.das.workers import local_workers\n"
        "if __name__ == '__main__':\n"
        "    with local_workers(2) as pool:\n"
        "        print(*{pool.submit(os.getpid).result() for _ in range(8)}, flush=True)\n"
        "        pool.submit(time.sleep, 600)\n"
        "        time.sleep(600)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "killed.py"
        path.write_text(program, encoding="utf-8")
        process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert workers
        process.kill()
        process.wait()
        process.stdout.close()
        for _ in range(300):
            if not any(running(worker) for worker in workers):
                return
            time.sleep(0.1)
    pytest.fail(f"of the workers {workers} some go on")


def running(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
