"""Shared parts of the commands: error messages, interrupts, and common options."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

SMALL = 10_000_000  # models with fewer parameters run fastest on one thread
DTYPES = ("float32", "bfloat16", "float16")
INTERRUPTED = 130  # the exit code after Ctrl-C that shells expect

DeviceOption = Annotated[
    str | None, typer.Option(help="As torch names it.", show_default="cuda if there is one, else cpu")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Of the model: float32, bfloat16, float16.", show_default="the checkpoint's")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def say(text: object) -> None:
    """Print one line on standard error."""
    from subspace_lab.core.texts import printable

    typer.echo(f"subspace-lab: {printable(' '.join(str(text).split()))}", err=True)


@contextmanager
def refusing(spelled: Mapping[str, str] | None = None) -> Iterator[None]:
    """Print an error as one line, and exit with code 2.

    Args:
        spelled: {name in the library: name on the command line}, to be replaced in messages.
    """
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        OSError,
        ArithmeticError,
        MemoryError,
        NotImplementedError,
    ) as error:
        # The text of a KeyError is the repr of its message.
        line = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        for inside, here in (spelled or {}).items():
            line = line.replace(inside, here)
        say(line or type(error).__name__)
        raise typer.Exit(2) from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM acts like Ctrl-C; an interrupt that is not handled elsewhere exits with code 130."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if ours else None
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted: nothing was saved.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are delayed until the block ends; the list contains those that came."""
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        typer.echo("subspace-lab: interrupted while saving: it ends once all is saved.", err=True)

    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def threads(network: Any) -> Iterator[None]:
    """One thread for a small model, unless the user has set the number of threads.

    The matrix products of a small model are too small to divide. Threads that waited for each other on busy cores made
    the search eight times slower.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in network.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str | None) -> str:
    """The device from the option; by default a GPU if there is one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way; meta cannot return numbers
        why = "it holds no numbers" if device.startswith("meta") else str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {device}: {why}") from None
    return device


def check_dtype(dtype: str | None) -> str:
    """The dtype from the option, for transformers; by default that of the checkpoint."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: possible are {', '.join(DTYPES)}.")
    return dtype or "auto"


def check_numbers(positions: str) -> None:
    """ValueError for positions with more digits than any prompt could have tokens."""
    if found := re.search(r"\d{10,}", positions):
        raise ValueError(f"--positions {positions}: no prompt has {found[0]} tokens; possible are 9 digits.")


def layer_numbers(text: str, depth: int) -> list[int]:
    """The layers of a model of this depth that 'all', '0,2' or '1-3' means."""
    return list(range(depth)) if text == "all" else numbers_below(depth, text, "--layers", "layer")


def numbers_below(count: int, text: str, option: str, what: str) -> list[int]:
    """The numbers from 0 to count − 1 that '0,2' or '1-3' means."""
    chosen: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, -1)
        if not first <= last < count:
            raise ValueError(
                f"{option} {text}: {part!r} is no {what} or range of this model, which has {what}s 0 to "
                f"{count - 1}; write 'all', '0,2' or '1-3'."
            )
        chosen += range(first, last + 1)
    return list(dict.fromkeys(chosen))
