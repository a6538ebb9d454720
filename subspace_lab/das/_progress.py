"""The progress of a sweep: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from subspace_lab.engine.training import progress_bar

EVERY = 10.0  # seconds between two lines of a log, at least


class Progress:
    """Receives the events of a running sweep.

    Args:
        label: name of the sweep.
        places: number of places that are still to be searched.
        steps: training steps of each place.
    """

    def __init__(self, label: str, places: int, steps: int) -> None:
        self.label, self.places, self.steps, self.done = label, places, steps, 0

    def begin(self, place: str) -> None:
        """The search of a place begins."""

    def step(self) -> None:
        """One training step at this place is done."""

    def end(self) -> None:
        """A place is finished."""
        self.done += 1


class _Bar(Progress):
    def __init__(self, label: str, places: int, steps: int, quiet: bool) -> None:
        super().__init__(label, places, steps)
        self.bar = progress_bar(quiet=quiet)
        self.task = self.bar.add_task(label, total=places * steps)

    def begin(self, place: str) -> None:
        self.bar.update(self.task, description=f"{self.label} {place}")

    def step(self) -> None:
        self.bar.advance(self.task)

    def end(self) -> None:
        super().end()
        self.bar.update(self.task, completed=self.done * self.steps)


class _Lines(Progress):
    """At most one line every ten seconds, and one line at the end."""

    def __init__(self, label: str, places: int, steps: int) -> None:
        super().__init__(label, places, steps)
        self.began = self.said = time.monotonic()

    def end(self) -> None:
        super().end()
        now = time.monotonic()
        if now - self.said < EVERY and self.done < self.places:
            return
        self.said = now
        took = now - self.began
        left = took / self.done * (self.places - self.done)
        about = "" if self.done == self.places else f", about {duration(left)} left"
        print(
            f"{self.label.strip()}: {self.done} of {self.places} sites, {duration(took)}{about}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def progress(label: str, places: int, steps: int, *, quiet: bool) -> Iterator[Progress]:
    """A bar with the remaining time if standard error is a terminal, otherwise lines with the remaining time."""
    if not quiet and not sys.stderr.isatty():
        yield _Lines(label, places, steps)
        return
    shown = _Bar(label, places, steps, quiet)
    with shown.bar:
        yield shown


def duration(seconds: float) -> str:
    """A duration as text: 40 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
