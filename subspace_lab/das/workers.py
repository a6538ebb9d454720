"""Worker processes on this machine for a sweep."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from subspace_lab.core.arguments import whole_number


@contextmanager
def local_workers(workers: int, *, threads: int | None = None) -> Iterator[Executor]:
    """Processes for `sweep(..., executor=…)`.

    They are started as new processes, not forked from this one. Each reads the script again that was started, so in a
    script the call must be below `if __name__ == "__main__":`. On a machine with one GPU they share it.

    Args:
        workers: the number of processes.
        threads: threads of each process; by default the processor's cores are divided among them.

    Raises:
        TypeError, ValueError: not a whole number of 1 or more.
    """
    threads = max(1, (os.cpu_count() or 1) // max(1, workers)) if threads is None else threads
    for name, number in (("workers", workers), ("threads", threads)):
        whole_number(number, name)
        if number < 1:
            raise ValueError(f"{name}={number}: needed is 1 or more.")
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=fresh, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent ends: a killed parent cannot do that, and the worker would run on uselessly."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
