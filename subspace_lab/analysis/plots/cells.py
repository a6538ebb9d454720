"""The cells, colours and axes of every picture of a grid or a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from subspace_lab.analysis.plots.canvas import INK

# The colours differ in lightness alone, so they can be read in grey print and without seeing red and green.
COLOURS = LinearSegmentedColormap.from_list(
    "subspace_lab", ["#f4f2ec", "#cfdcdc", "#8fb3bd", "#4f82a0", "#2b557e", "#1b2f52"]
)
MOST_NUMBERS = 16  # with more rows or columns than this, numbers in the cells could not be read


def frame(axis: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(-0.5, len(rows) - 0.5)
    if max(map(len, columns)) > 10:
        axis.set_xticks(
            range(len(columns)), columns, fontsize=8.5, rotation=40, ha="right", rotation_mode="anchor"
        )
    else:
        axis.set_xticks(range(len(columns)), columns, fontsize=8.5)
    axis.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)


def cell(axis: Axes, column: int, row: int, colour: tuple[float, ...]) -> None:
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2))


def write(axis: Axes, x: float, y: float, text: str, colour: str, size: float) -> None:
    axis.text(x, y, text, color=colour, fontsize=size, ha="center", va="center")


def ink(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is easier to read on a colour (by its luma, Rec. 601)."""
    red, green, blue, *_ = colour
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def finish(bar: Colorbar, label: str) -> None:
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, length=2, colors=INK)
    bar.outline.set_visible(False)
