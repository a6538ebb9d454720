"""Fits on disk: fits.json for everything that is text or a number, subspaces.safetensors for the subspaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_fits(fits: Any, folder: Path) -> None:
    raise NotImplementedError


def read_fits(cls: Any, folder: Path, methods: Any) -> Any:
    raise NotImplementedError
