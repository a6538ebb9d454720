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

from subspace_lab.analysis.comparisons import Comparison
from subspace_lab.analysis.plots.canvas import console
from subspace_lab.analysis.plots.heatmaps import iia_heatmap, overlap_heatmap
from subspace_lab.analysis.saves import Saves
from subspace_lab.core.files import write_json
from subspace_lab.core.texts import printable
from subspace_lab.das.fits import Fits, notes_of, table_of


def save_search(
    folder: Path, settings: Mapping[str, Any], fits: Fits, twin: Fits | None, comparison: Comparison
) -> Saves:
    """Write all files of a search.

    `results.json` comes last. A file that cannot be written costs only itself: see `Saves`.

    Args:
        folder: an existing one.
        settings: how the search was made, as JSON.
        fits, twin: of the model, and of its randomly initialised twin if that was searched.
        comparison: of the fits' subspaces.
    """
    saves = Saves(folder)
    saves.save("model", lambda: fits.save(folder / "model"))
    if twin is not None:
        saves.save("twin", lambda: twin.save(folder / "twin"))
    saves.save("iia.png", lambda: iia_heatmap(fits, _whole(twin, fits), folder / "iia.png"))
    saves.save("overlap.png", lambda: overlap_heatmap(comparison, folder / "overlap.png"))
    results = {
        "settings": dict(settings),
        "model": fits.as_dict(),
        "twin": None if twin is None else twin.as_dict(),
        "comparison": comparison.as_dict(),
    }
    saves.save("results.json", lambda: write_json(folder / "results.json", results))
    return saves


def print_search(
    settings: Mapping[str, Any], fits: Fits, twin: Fits | None, comparison: Comparison, saves: Saves
) -> None:
    """The table on standard output, and under it what has to be known to read it."""
    terminal = console()
    title = printable(f"{settings['task']}: {settings['variable']} in {settings['component']}")
    best, whole = fits.best().method, _whole(twin, fits)
    more = {} if whole is None else {f"twin: {best.label}": whole.where(method=best)}
    terminal.print(table_of(fits, title=title, more=more))
    for line in [*notes_of(fits), *_remarks(fits, twin, comparison), saves.line()]:
        terminal.print(printable(line), markup=False)


def _whole(twin: Fits | None, fits: Fits) -> Fits | None:
    """The twin, if it was searched wherever the model was: an interrupt may have ended it before."""
    return twin if twin is not None and twin.places == fits.places else None


def _remarks(fits: Fits, twin: Fits | None, comparison: Comparison) -> list[str]:
    best, n = fits.best(), len(comparison.labels)
    remarks = []
    if twin is not None:
        if "interrupted" in twin.facts:
            remarks.append(f"Interrupted: of the twin {twin.facts['interrupted']}.")
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
