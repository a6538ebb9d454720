"""What an odd input of `robustness.py` is that is a call, not a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One odd input.

    Attributes:
        name: of the case.
        kind: a number or letter for the kind of input it is.
        run: is given a scratch folder; its result is true where the input is fine and came to what is known.
        refused: (type, text in the message) of the exception that it must raise; None where the input is fine.
    """

    name: str
    kind: str
    run: Callable[[Path], Any]
    refused: tuple[type[Exception], str] | None = None
