"""The two ways to run the places of a sweep: one after the other in this process, or on an executor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from subspace_lab.das._executing import Parcel, Work, distribute
from subspace_lab.das._places import Places
from subspace_lab.das._progress import progress
from subspace_lab.das._sweep_files import (
    SweepFiles,
    read_screen_score,
    screen_places,
    search_places,
    write_screen_score,
)
from subspace_lab.das.fits import Fits, place_of
from subspace_lab.das.screens import Screen


@dataclass
class Run(ABC):
    """A running sweep.

    Attributes:
        found: {number of a place: its fits}, those of an earlier run and those found in this one.
    """

    places: Places
    found: dict[int, Fits]
    label: str
    quiet: bool

    @abstractmethod
    def screen_scores(self, numbers: Sequence[int], turn: int, share: float) -> dict[int, float]:
        """{number of a place: its score} in a round of the screen, trained with a share of the steps."""

    @abstractmethod
    def search(self, cohorts: Sequence[Sequence[int]]) -> None:
        """Search those places of some cohorts that are not in `found` yet, and add them to it."""

    def go(self, screen: Screen | None) -> None:
        """Screen the places, then search those that are not in `found` yet."""
        if screen is not None:
            self._screen(screen)
        every = range(len(self.places.assignments))
        cohorts = [*([n] for n in self.places.left_out)]
        cohorts += self.places.cohorts([n for n in every if n not in self.places.left_out])
        self.search([cohort for cohort in cohorts if not set(cohort) <= set(self.found)])

    def _missing(self, numbers: Sequence[int], share: float, known: Container[int]) -> list[list[int]]:
        """The cohorts of a round of the screen in which at least one score is still unknown."""
        cohorts = self.places.screen_cohorts(numbers, share)
        return [cohort for cohort in cohorts if any(number not in known for number in cohort)]

    def _round(self, turn: int) -> str:
        return f"{self.label.strip()} screen {turn + 1}"

    def _screen(self, screen: Screen) -> None:
        left = list(range(len(self.places.assignments)))
        before: dict[int, float] = {}
        for turn, share in enumerate(screen.steps):
            found = self.screen_scores(left, turn, share)
            scores = before = {number: max(found[number], before.get(number, found[number])) for number in left}
            kept, best = screen.kept(scores), max(scores.values())
            steps = self.places.config.steps
            for number in set(left) - set(kept):
                reason = (
                    f"left out in round {turn + 1} of the screen, after {max(1, round(share * steps))} of {steps} "
                    f"steps; the best site had {best:.2f}"
                )
                self.places.left_out[number] = scores[number], reason
            left = kept


@dataclass
class InTurn(Run):
    """Runs the places in this process, one after the other.

    Attributes:
        files: the folder in which results are saved; None if they are not saved.
    """

    files: SweepFiles | None = None

    def screen_scores(self, numbers: Sequence[int], turn: int, share: float) -> dict[int, float]:
        scores = {} if self.files is None else _known(self.files.folder, numbers, turn)
        cohorts = self._missing(numbers, share, scores)
        with progress(self._round(turn), sum(map(len, cohorts)), 1, quiet=self.quiet) as shown:
            for cohort in cohorts:
                shown.begin(place_of(self.places.assignments[cohort[0]]))
                found = self.places.screen_scores_of(cohort, turn, share)
                scores |= found
                for number, score in found.items():
                    if self.files is not None:
                        write_screen_score(self.files.folder, turn, number, score)
                    shown.end()
        return scores

    def search(self, cohorts: Sequence[Sequence[int]]) -> None:
        cohort_of = {number: cohort for cohort in cohorts for number in cohort}
        left = sorted(number for number in cohort_of if number not in self.found)
        with progress(self.label, len(left), self.places.config.steps, quiet=self.quiet) as shown:
            for number in left:
                shown.begin(place_of(self.places.assignments[number]))
                self.found[number] = self.places.fits_at(number, cohort_of[number], shown.step)
                if self.files is not None:
                    self.files.keep(number, self.found[number])
                shown.end()


@dataclass
class OnExecutor(Run):
    """Runs the places on an executor; its workers write their results into a folder."""

    executor: Executor
    files: SweepFiles
    parcel: Parcel

    @classmethod
    @contextmanager
    def of(
        cls,
        executor: Executor,
        places: Places,
        found: dict[int, Fits],
        label: str,
        quiet: bool,
        files: SweepFiles | None,
    ) -> Iterator[OnExecutor]:
        """Without `files` a temporary folder is used, which is removed when the block ends."""
        with ExitStack() as stack:
            if files is None:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                files = SweepFiles.temporary(folder, places.methods)
            parcel = stack.enter_context(Parcel.of(places, files.folder))
            yield cls(places, found, label, quiet, executor, files, parcel)

    def screen_scores(self, numbers: Sequence[int], turn: int, share: float) -> dict[int, float]:
        cohorts = self._missing(numbers, share, _known(self.files.folder, numbers, turn))
        works: dict[int, Work] = {
            cohort[0]: partial(screen_places, cohort=cohort, turn=turn, share=share) for cohort in cohorts
        }
        lengths = {cohort[0]: len(cohort) for cohort in cohorts}
        with progress(self._round(turn), sum(lengths.values()), 1, quiet=self.quiet) as shown:

            def finished(first: int) -> None:
                for _ in range(lengths[first]):
                    shown.end()

            distribute(self.executor, self.parcel, works, finished)
        return _known(self.files.folder, numbers, turn)

    def search(self, cohorts: Sequence[Sequence[int]]) -> None:
        left = {cohort[0]: [number for number in cohort if number not in self.found] for cohort in cohorts}
        works: dict[int, Work] = {
            cohort[0]: partial(
                search_places, cohort=cohort, wanted=left[cohort[0]], left_out=self.places.left_out.get(cohort[0])
            )
            for cohort in cohorts
        }
        places = sum(map(len, left.values()))
        with progress(self.label, places, self.places.config.steps, quiet=self.quiet) as shown:

            def finished(first: int) -> None:
                for number in left[first]:
                    self.found[number] = self.files.read_place(number)
                    shown.end()

            distribute(self.executor, self.parcel, works, finished)


def _known(folder: Path, numbers: Sequence[int], turn: int) -> dict[int, float]:
    scores = {number: read_screen_score(folder, turn, number) for number in numbers}
    return {number: score for number, score in scores.items() if score is not None}
