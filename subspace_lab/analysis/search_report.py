"""What `subspace-lab search` leaves: its files, and the table that a person reads.

results.json         "settings"; "model" and "twin" (null where none was searched): floors and every fit with its
                     scores; "comparison": the overlaps of the trained subspaces with what chance gives
model/, twin/        every fit with its subspaces, for `Fits.load`
iia.png, overlap.png `analysis/plots`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace_lab.analysis.comparisons import Comparison, compare
from subspace_lab.analysis.plots.canvas import console
from subspace_lab.analysis.plots.heatmaps import iia_heatmap, overlap_heatmap
from subspace_lab.core.files import write_json
from subspace_lab.das.fits import Fits, notes_of, table_of

FILES = ("results.json", "model", "iia.png", "overlap.png")


def save_search(folder: Path, settings: Mapping[str, Any], fits: Fits, twin: Fits | None) -> Comparison:
    """Write all files of a search, and compare the subspaces of its sites.

    `results.json` comes last, so where it is the others are.

    Args:
        folder: an existing one.
        settings: how the search was made, as JSON.
        fits, twin: of the model, and of its randomly initialised twin if that was searched.
    """
    comparison = compare(fits)
    fits.save(folder / "model")
    if twin is not None:
        twin.save(folder / "twin")
    iia_heatmap(fits, twin, folder / "iia.png")
    overlap_heatmap(comparison, folder / "overlap.png")
    results = {
        "settings": dict(settings),
        "model": fits.as_dict(),
        "twin": None if twin is None else twin.as_dict(),
        "comparison": comparison.as_dict(),
    }
    write_json(folder / "results.json", results)
    return comparison


def print_search(
    folder: Path, settings: Mapping[str, Any], fits: Fits, twin: Fits | None, comparison: Comparison
) -> None:
    """The table on standard output, and under it what has to be known to read it."""
    terminal = console()
    title = f"{settings['task']}: {settings['variable']} in {settings['component']}"
    more = {} if twin is None else {f"twin: {fits.best().method.label}": twin.where(method=fits.best().method)}
    terminal.print(table_of(fits, title=title, more=more))
    for line in [*notes_of(fits), *_remarks(fits, twin, comparison)]:
        terminal.print(line, markup=False)
    files = [*FILES, *(["twin"] if twin is not None else [])]
    terminal.print(f"Written to {folder}: {', '.join(files)}.", markup=False)


def _remarks(fits: Fits, twin: Fits | None, comparison: Comparison) -> list[str]:
    best, n = fits.best(), len(comparison.labels)
    remarks = []
    if twin is not None:
        floors = twin.floors["test"]
        remarks.append(
            f"The randomly initialised twin answers {floors.accuracy} of the bases right; without intervention it "
            f"gives {floors.no_intervention.value:.2f} of the expected answers."
        )
    if best.iia.low <= fits.floors["test"].highest:
        remarks.append(
            "The site that dev chose is not above the floors: nothing was found, the pictures show noise."
        )
    if n > 1:
        remarks.append(f"Overlap of the trained subspaces: {comparison.summary()}")
    return [*remarks, f"Engine: {fits.facts.get('engine')}."]
