"""Saving several files: if one fails, the others are still saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Saves:
    """What was saved into a folder that was empty before, and what could not be saved.

    Attributes:
        folder: the folder.
        written: the names of the files and folders that were written completely.
        errors: {name: its error} of those that could not be written; nothing of them is left in the folder.
    """

    folder: Path
    written: list[str] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)

    def save(self, names: str | Sequence[str], write: Callable[[], Any]) -> None:
        """Write these files or folders, all of them or none; an error is stored for `finish`."""
        names = [names] if isinstance(names, str) else list(names)
        try:
            write()
        except Exception as error:  # of any kind: the files after it are still worth saving
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                with suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
            self.errors |= dict.fromkeys(names, error)
        else:
            self.written += names

    def finish(self) -> None:
        """Raise the stored error: an OSError that names what was saved and what was not; any other error as it was."""
        for error in self.errors.values():
            if not isinstance(error, OSError):
                raise error
        if self.errors:
            why = next(iter(self.errors.values()))
            reason = why.strerror or str(why) if isinstance(why, OSError) else str(why)
            saved = f"saved: {', '.join(self.written)}" if self.written else "nothing was saved"
            raise OSError(
                f"In {self.folder} these could not be saved: {', '.join(self.errors)} ({reason}); {saved}."
            )

    def line(self) -> str:
        """A line that says what was written, and where."""
        return f"Written to {self.folder}: {', '.join(self.written)}." if self.written else "Nothing was written."
