"""Figures with a title above and a caption below, and the terminal for printed results."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from subspace_lab.core.files import whole_file

DOTS_PER_INCH = 150
SHOWN_PER_INCH = 100  # in a notebook; fewer than in the file, so that a fine screen shows a sharp picture
INK, GREY, ACCENT = "#222222", "#6b6b6b", "#c8553d"
LINE = 0.165  # inches: the height of a caption's line
CHARACTERS_PER_INCH = 18  # of a caption's line
OWN_FORMULA = r"$\mathdefault"  # how matplotlib writes the numbers of an axis with powers
FRAME: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.12}


class Picture(Figure):
    """A figure that a notebook shows if it is a cell's last value: always in one size, with or without pyplot."""

    def draw(self, renderer: Any) -> None:
        """Draw the figure, with every text as it is written.

        Names and prompts may contain dollars, as in "from $3 to $5", which matplotlib would read as a formula.
        """
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(text.get_text().startswith(OWN_FORMULA))
        super().draw(renderer)

    def _ipython_display_(self) -> None:
        from IPython.display import Image, display

        into = BytesIO()
        self.savefig(into, format="png", **FRAME)
        width = self.get_size_inches()[0] * SHOWN_PER_INCH
        display(Image(into.getvalue(), width=round(width), alt=self.get_suptitle()))


def new_figure(size: tuple[float, float], title: str, *sentences: str) -> Figure:
    """A figure with its title above and its caption of sentences below; `size` does not include the caption."""
    width, height = max(size[0], 6.2), size[1]
    lines = [line for sentence in sentences for line in wrap(sentence, int(width * CHARACTERS_PER_INCH))]
    figure = Picture((width, height + LINE * len(lines)), DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, color=INK, weight="bold")
    # Written as the label of the common x axis, because the layout then makes room for it.
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color=GREY, linespacing=1.4)
    return figure


def whole_figure(ax: Axes) -> Figure:
    """The whole figure that contains `ax`, also if `ax` is in a subfigure."""
    whole = ax.figure.figure  # a subfigure's `figure` is the whole one; get_figure(root=True) came with 3.10
    assert isinstance(whole, Figure)
    return whole


def check_picture(path: str | Path | None) -> None:
    """Called before drawing.

    Raises:
        ValueError: a name that does not end in .png.
        FileNotFoundError: the folder does not exist.
    """
    if path is None:
        return
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r}: pictures are written as PNG; the name must end in '.png'.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {Path(path).parent}; make it first.")


def save_figure(figure: Figure, path: str | Path | None) -> None:
    """Write a PNG file; without a path nothing is written."""
    if path is not None:
        with whole_file(path) as provisional:
            figure.savefig(provisional, format="png", **FRAME)


def console() -> Console:
    """Standard output, 100 characters wide if it is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=100)
