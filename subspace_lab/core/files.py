"""Writing files so that a file is either complete or not there.

Everything that this package saves is first written under a provisional name in the same folder, then renamed. If a
process is killed or the disk is full, either the old file or the new one is there, never a part of one. The content is
flushed to disk before the file is renamed, so that the same holds if the machine stops.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from subspace_lab.core._locks import LOCK, locked

PROVISIONAL = re.compile(r"\..+\.\d+")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a provisional path to write to, and rename it to `path` when the block ends without an error.

    The file gets the permissions of any new file in this folder, whatever writes it. If the block raises, the
    provisional file is removed and `path` is not changed.

    >>> with whole_file("scores.txt") as provisional:
    ...     provisional.write_text("0.93")
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.parent}, in which {path.name} is to be written: make it."
        )
    provisional = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        provisional.touch()
        mode = provisional.stat().st_mode
        yield provisional
        provisional.chmod(mode)  # safetensors allows only the owner to read, even in a shared folder
        with provisional.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(provisional, path)
    finally:
        provisional.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with text as its metadata. OSError if that fails, as with other files."""
    with whole_file(path) as provisional:
        try:
            save_file(dict(tensors), provisional, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path} could not be written: {error}") from error


def expect_stored(path: Path, tensors: Mapping[str, Any]) -> None:
    """ValueError if a tensor has more numbers than the file stores for it.

    `torch.save` stores an expanded tensor (with a stride of 0) as the few numbers that it repeats. So a small file
    could use any amount of memory as soon as the tensor is copied.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name!r} has the shape {tuple(value.shape)}, for which the file does not hold enough numbers."
            )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole_file(path) as provisional:
        provisional.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file. ValueError, with the name of the file, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and lists nested without end
        raise ValueError(f"{path} is not JSON: {error}") from error


def package_version() -> str:
    """The version of this package; "unknown" for a source tree that is not installed."""
    try:
        return version("subspace-lab")
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def taken_folder(
    path: str | Path,
    say: Callable[[str], None] = lambda _: None,
    check: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """A new or empty folder for results. No other process can take it while the block runs.

    Before any work, it is tested that something can be written there. If nothing is written into a folder that was
    created here, it is removed again, together with its new parent folders.

    Args:
        say: called with a sentence if the folder was left behind by a process that was killed.
        check: called when the folder is taken, instead of the check that it is empty. It should raise an error if the
            folder contains something that it should not.

    Raises:
        FileExistsError: the folder already contains something; results are never mixed or overwritten.
        BlockingIOError: another process is writing there.
        OSError: nothing can be written there; the message says where and why.
    """
    folder = Path(path)
    made: list[Path] = []
    with ExitStack() as stack:
        stack.callback(lambda: _remove_empty(made))
        try:
            made += [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
            if folder.exists() and not folder.is_dir():
                raise FileExistsError(f"{folder} is a file, and not empty: name a new folder.")
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, say))
        except (FileExistsError, BlockingIOError):
            raise
        except OSError as error:
            raise OSError(
                f"{folder} cannot be written to: {error.strerror or error}. Name another folder."
            ) from None
        (check or check_empty)(folder)
        yield folder


def _remove_empty(folders: Sequence[Path]) -> None:
    for one in folders:
        with suppress(OSError):
            one.rmdir()


def check_empty(folder: Path) -> None:
    """FileExistsError if a folder contains anything but the lock."""
    names = sorted(one.name for one in folder.iterdir() if one.name != LOCK)
    if not names:
        return
    if all(PROVISIONAL.fullmatch(name) for name in names):
        raise FileExistsError(
            f"{folder} contains unfinished files of a process that was killed ({', '.join(names[:3])}): remove them, "
            "or name a new folder."
        )
    raise FileExistsError(
        f"{folder} exists and is not empty: it may contain other results. Name a new folder, or remove it."
    )
