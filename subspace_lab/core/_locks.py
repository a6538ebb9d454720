"""One writer for a folder: a lock that ends with its process.

The lock is a hidden file that says which process took it. If the system has `flock`, the lock is that of `flock`: the
system releases it however the process ends, and the file's text is only used in messages. Otherwise (Windows, file
systems without locks) the existence of the file is the lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".subspace_lab.lock"


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an existing folder while the block runs.

    Args:
        say: called with a sentence if the lock was left behind by a process that no longer runs.

    Raises:
        BlockingIOError: another process holds the lock; the message says which.
        OSError: nothing can be written into this folder.
    """
    path = folder / LOCK
    handle = _open(path)
    try:
        left = _holder(handle)
        if left:
            cleared = _clear(folder, left)
            removed = f" with {cleared} unfinished files" if cleared else ""
            say(
                f"{folder} was left by process {left.get('pid')}, which began {left.get('since')} and ended without "
                f"finishing; its lock is removed{removed}."
            )
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
        yield
    finally:
        # Removed while it is locked: a process that waits for the lock checks that its file still exists.
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _open(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle, path)
        except BaseException:
            os.close(handle)
            raise
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # the process that held the lock removed the file between the two calls


def _take(handle: int, path: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise _taken(path, _holder(handle)) from None
        else:
            return
    if found := _holder(handle):  # pragma: no cover: only without flock
        raise _taken(path, found, remove=True)


def _taken(path: Path, holder: dict[str, Any], remove: bool = False) -> BlockingIOError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"
    more = f" If that process is gone, remove {path}." if remove else ""
    return BlockingIOError(
        f"{path.parent} is being written to by {who}, since {holder.get('since', 'just now')}: "
        f"name another folder, or wait for its end.{more}"
    )


def _holder(handle: int) -> dict[str, Any]:
    """What the lock's file says about its process, as far as it can be read."""
    text = os.pread(handle, 4096, 0).decode("utf-8", "replace")
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = {"pid": "unknown"}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now}


def _clear(folder: Path, left: dict[str, Any]) -> int:
    """Remove unfinished files of a process that no longer runs, and folders that are then empty; how many files."""
    pid, cleared = left.get("pid"), 0
    if not isinstance(pid, int):
        return 0
    for path in sorted(folder.rglob("*"), reverse=True):  # contents before their folder
        if path.is_file() and path.name.startswith(".") and path.suffix == f".{pid}":
            path.unlink()
            cleared += 1
        elif path.name == LOCK and path.parent != folder and f'"pid": {pid},' in path.read_text(errors="replace"):
            path.unlink()
        elif path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
    return cleared
