"""Lines on standard error about what runs more slowly than it could: each said once in a process."""

from __future__ import annotations

import sys

_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a line on standard error, unless the same one was printed before."""
    if text not in _said:
        _said.add(text)
        print(f"subspace_lab: {text}", file=sys.stderr)
