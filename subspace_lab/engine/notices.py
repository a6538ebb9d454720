"""Notices on standard error about runs that are slower than they could be; each is printed once per process."""

from __future__ import annotations

import sys

_printed: set[str] = set()


def say_once(text: str) -> None:
    """Print a line on standard error, unless this process has printed it before."""
    if text not in _printed:
        _printed.add(text)
        print(f"subspace_lab: {text}", file=sys.stderr)
