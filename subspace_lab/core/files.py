"""Files that are whole or not there.

Everything that this package saves is first written under a provisional name in the same folder and then renamed. A
process that is killed, or a disk that is full, leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a provisional path to write to, and rename it to `path` when the block ends without an error.

    The file has the permissions of any new file in that folder, whatever writes it. If the block raises, the
    provisional file is removed and `path` stays what it was.

    >>> with whole_file("scores.txt") as provisional:
    ...     provisional.write_text("0.93")
    """
    path = Path(path)
    provisional = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        provisional.touch()
        mode = provisional.stat().st_mode
        yield provisional
        provisional.chmod(mode)  # safetensors lets only the owner read, also where others share the folder
        os.replace(provisional, path)
    finally:
        provisional.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with text as its metadata."""
    with whole_file(path) as provisional:
        save_file(dict(tensors), provisional, metadata={"format": "pt", **(metadata or {})})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (ValueError for NaN and infinity, which JSON does not have)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole_file(path) as provisional:
        provisional.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file (ValueError that names the file if it is not JSON)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def package_version() -> str:
    """The version of this package, "unknown" for a source tree that was not installed."""
    try:
        return version("subspace-lab")
    except PackageNotFoundError:
        return "unknown"


def output_folder(path: str | Path) -> Path:
    """A folder for results, made if it does not exist.

    Raises:
        FileExistsError: it holds something already; results are never mixed or overwritten.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: it may hold other results. Name a new folder, or remove it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
