"""`subspace-lab report`: one HTML file that says what a search found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from subspace_lab.cli.common import refusing, say
from subspace_lab.cli.loading import SHIPPED
from subspace_lab.cli.searching import REPORT

LEFT_OUT = ("batch_size", "out")  # settings that are no options, or that differ in each call
OFF = ("twin",)  # options that are on unless they are switched off


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `subspace-lab search` or `Fits.save` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default=f"{REPORT} in the folder")
    ] = None,
) -> None:
    """Write a report of a search: one HTML file, with its pictures inside.

    It holds the question, the verdict if there is one, the data, the scores, pictures, controls, and the command that
    runs the search again. Opening it needs no network.
    """
    with refusing():
        from subspace_lab.analysis.report import read_run, save_report

        run = read_run(folder)
        where = folder / REPORT if out is None else out
        save_report(run, where, command_of(run.settings) if run.settings else None)
    say(f"Written to {where}.")


def command_of(settings: Mapping[str, Any]) -> str:
    """The command that runs a search again, with all its settings."""
    words = ["subspace-lab", "search"]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name in LEFT_OUT or value is None or (name == "model" and value == SHIPPED):
            continue
        if isinstance(value, bool):
            words += [] if value == (name in OFF) else [option if value else f"--no-{option[2:]}"]
        else:
            words += [option, str(value)]
    return " ".join(map(shlex.quote, words))
