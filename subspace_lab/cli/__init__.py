"""The command line: `subspace-lab search`, `check`, `compare`, `finetune`, `merge` and `report`, one file each.

Only the libraries of the command line are imported at the top of these files. torch, and everything that needs it, is
imported when a command runs, so that `--help` answers at once. Results go to standard output; progress and errors go to
standard error. An error is one line, printed before any long work, with exit code 2.
"""

from __future__ import annotations

import typer

from subspace_lab.cli.check import check as _check
from subspace_lab.cli.compare import compare as _compare
from subspace_lab.cli.finetune import finetune as _finetune
from subspace_lab.cli.merge import merge as _merge
from subspace_lab.cli.report import report as _report
from subspace_lab.cli.search import search as _search

app = typer.Typer(
    help="Where in a model does a variable live, does it do anything there, and can it be edited?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # it joins the lines of a paragraph
)
app.command("search")(_search)
app.command("check")(_check)
app.command("compare")(_compare)
app.command("finetune")(_finetune)
app.command("merge")(_merge)
app.command("report")(_report)


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="subspace-lab")
