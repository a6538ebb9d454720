"""The folder of a sweep. Every place is written as soon as it is finished, so that a kill loses at most one place.

sweep.json              the recipe: all settings, sites in their order, model and data
places/0007/            the fits of a finished place, as `Fits.save` writes them
screen/0-0007.json      the score of a place in a round of the screen
fits.json, subspaces.safetensors   all fits, once the last place is finished; `places` is removed then

The fits of one place train together, so a place is either finished or not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace_lab.core.files import check_empty, read_json, taken_folder, write_json
from subspace_lab.das._fits_files import PLACES, RECORDS, SCREEN, SWEEP, finished_places, writer
from subspace_lab.das._places import Places
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods.method import Method

FORMAT = 1
SHORT = 60  # characters of a value that is told whole
MOST_TOLD = 3  # settings of one kind that differ, in a message


class SweepUnsaved(OSError):
    """All places of a sweep are finished, but the fits could not be saved.

    Attributes:
        fits: all fits.
    """

    def __init__(self, fits: Fits, folder: Path, why: OSError) -> None:
        super().__init__(why.errno, why.strerror or str(why), str(folder))
        self.fits = fits


@dataclass
class SweepFiles:
    """The folder of one sweep, locked by this process.

    Attributes:
        folder: an existing folder.
        kinds: the classes of the sweep's methods, which are needed to read its fits again.
        unsaved: why a place could not be written; it is kept in memory, and written at the end.
    """

    folder: Path
    kinds: Sequence[type[Method]]
    unsaved: OSError | None = field(default=None, init=False)

    @classmethod
    @contextmanager
    def taken(
        cls, folder: str | Path, recipe: Mapping[str, Any], methods: Sequence[Method], say: Callable[[str], None]
    ) -> Iterator[SweepFiles]:
        """The folder of the sweep with this recipe: new, empty, or the folder in which this sweep was begun.

        Raises:
            TypeError: a recipe that cannot be written as JSON.
            FileExistsError: the folder contains something else.
            ValueError: the folder of another sweep; the message says what differs.
            BlockingIOError: another process is using the folder.
        """
        try:
            recipe = json.loads(json.dumps({"format": FORMAT, **recipe}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The sweep has a setting that JSON does not hold: {error}. It cannot be saved."
            ) from error

        def check(path: Path) -> None:
            if (path / SWEEP).is_file():
                _check_same(path, read_json(path / SWEEP), recipe)
            else:
                check_empty(path)

        with taken_folder(folder, say, check) as path:
            files = cls(path, list(dict.fromkeys(type(method) for method in methods)))
            if not (path / SWEEP).is_file():
                write_json(path / SWEEP, recipe)
            try:
                yield files
            finally:
                files._leave()

    @classmethod
    def temporary(cls, folder: Path, methods: Sequence[Method]) -> SweepFiles:
        """A folder through which workers return their fits."""
        return cls(folder, list(dict.fromkeys(type(method) for method in methods)))

    @property
    def whole(self) -> bool:
        """Whether the sweep is finished and saved."""
        return (self.folder / RECORDS).is_file()

    def read(self) -> Fits:
        """The fits of a finished sweep."""
        for name in (PLACES, SCREEN):  # left behind if the process was killed during `finish`
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return Fits.load(self.folder, self.kinds)

    def finished(self) -> dict[int, Fits]:
        """{number of a place: its fits}, of those that were finished before.

        Raises:
            ValueError: files that are broken; the message says what to do about it.
        """
        return {number: self.read_place(number) for number in finished_places(self.folder)}

    def read_place(self, number: int) -> Fits:
        """Read the fits of a finished place."""
        path = path_of(self.folder, number)
        try:
            return Fits.load(path, self.kinds)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error} Remove {path}, and this site is searched again.") from error

    def keep(self, number: int, fits: Fits) -> None:
        """Write the fits of a place that has just been finished; if the disk is full they stay in memory."""
        try:
            write_place(self.folder, number, fits)
        except OSError as error:
            self.unsaved = error

    def finish(self, fits: Fits) -> None:
        """Write all fits, and remove the folders of the places. SweepUnsaved if they cannot be written."""
        try:
            writer(fits)(self.folder)
        except OSError as error:
            raise SweepUnsaved(fits, self.folder, error) from error
        shutil.rmtree(self.folder / PLACES)
        shutil.rmtree(self.folder / SCREEN, ignore_errors=True)

    def _leave(self) -> None:
        """Leave no files of a sweep that has not finished anything."""
        if not self.whole and not finished_places(self.folder) and not (self.folder / SCREEN).is_dir():
            shutil.rmtree(self.folder / PLACES, ignore_errors=True)
            with suppress(OSError):
                (self.folder / SWEEP).unlink(missing_ok=True)


def path_of(folder: Path, number: int) -> Path:
    """The folder for the fits of a place."""
    return folder / PLACES / f"{number:04}"


def write_place(folder: Path, number: int, fits: Fits) -> None:
    """Write the fits of one place into its own folder. `fits.json` is there only if they are complete."""
    write = writer(fits)
    path_of(folder, number).mkdir(parents=True, exist_ok=True)
    write(path_of(folder, number))


def search_places(
    places: Places,
    folder: Path,
    *,
    cohort: Sequence[int],
    wanted: Sequence[int],
    left_out: tuple[float, str] | None,
) -> None:
    """Search a cohort and write the fits of the wanted places. A place left out by a screen is a cohort of its own."""
    if left_out is not None:
        places.left_out[cohort[0]] = left_out
    for number in wanted:
        write_place(folder, number, places.fits_at(number, cohort))


def screen_places(places: Places, folder: Path, *, cohort: Sequence[int], turn: int, share: float) -> None:
    """Score the places of a cohort in a round of the screen and write the scores."""
    for number, score in places.screen_scores_of(cohort, turn, share).items():
        write_screen_score(folder, turn, number, score)


def write_screen_score(folder: Path, turn: int, number: int, score: float) -> None:
    """Write the score of a place in a round of the screen."""
    (folder / SCREEN).mkdir(exist_ok=True)
    write_json(_score_path(folder, turn, number), score)


def read_screen_score(folder: Path, turn: int, number: int) -> float | None:
    """The score of a place in a round of the screen; None if it is not known yet."""
    path = _score_path(folder, turn, number)
    return float(read_json(path)) if path.is_file() else None


def _score_path(folder: Path, turn: int, number: int) -> Path:
    return folder / SCREEN / f"{turn}-{number:04}.json"


def _check_same(folder: Path, there: Any, asked: Mapping[str, Any]) -> None:
    """ValueError if a folder belongs to another sweep; the message says what differs."""
    if not isinstance(there, dict) or there.get("format") != FORMAT:
        raise ValueError(
            f"{folder / SWEEP} is no recipe of a sweep that this version can read. Choose a new folder."
        )
    differing = [
        f"{name}: {_differ(name, there.get(name), asked[name])}"
        for name in asked
        if there.get(name) != asked[name]
    ]
    if differing:
        raise ValueError(f"{folder} is the folder of another sweep ({'; '.join(differing)}). Choose a new folder.")


def _differ(name: str, there: Any, asked: Any) -> str:
    """In short how two values of one setting differ."""
    if name == "data":
        return "the pairs are others"
    if isinstance(there, dict) and isinstance(asked, dict):
        changed = [key for key in dict.fromkeys([*there, *asked]) if there.get(key) != asked.get(key)]
        told = [
            "the model's weights are others"
            if (name, key) == ("model", "weights")
            else f"{key} {_short(there.get(key))} there, {_short(asked.get(key))} asked"
            for key in changed
        ]
        return ", ".join(told[:MOST_TOLD]) + (
            f", and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
        )
    plain = not any(isinstance(one, dict) for value in (there, asked) if isinstance(value, list) for one in value)
    short = plain and max(len(json.dumps(value)) for value in (there, asked)) <= SHORT
    if short or not isinstance(there, list) or not isinstance(asked, list):
        return f"{_short(there)} there, {_short(asked)} asked"
    if len(there) == len(asked):
        one, other = next((a, b) for a, b in zip(there, asked, strict=True) if a != b)
        same_kind = isinstance(one, dict) and isinstance(other, dict) and one.get("method") == other.get("method")
        which = f"of {one['method']} " if same_kind and len(there) > 1 else ""
        return which + _differ("", one, other) if same_kind else f"{_short(one)} there, {_short(other)} asked"
    lacking, more = ([one for one in a if one not in b] for a, b in ((there, asked), (asked, there)))
    told = [f"{len(there)} there, {len(asked)} asked"]
    told += [f"not asked {_short(lacking[0])}"] if lacking else []
    told += [f"not there {_short(more[0])}"] if more else []
    return ", ".join(told)


def _short(value: Any) -> str:
    """A value as a person would write it; a method by its name and rank."""
    if isinstance(value, dict) and "method" in value:
        return " ".join(str(value[key]) for key in ("method", "rank") if value.get(key) is not None)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHORT else f"{text[:SHORT]}…"
