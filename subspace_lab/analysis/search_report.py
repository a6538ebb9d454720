"""What `subspace-lab search` writes: its files, and the table on the terminal.

results.json         "settings"; "model" and "twin" (null if none was searched): floors and every fit with its
                     scores; "twins" if there are several; "comparison": the overlaps of the trained subspaces and of
                     random ones; "verdict" (null if there is none)
model/, twin/        every fit with its subspaces, for `Fits.load`; further twins in twin2/, twin3/
iia.png, overlap.png pictures from `analysis/plots`; the second only if two subspaces can differ
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspace_lab.analysis.comparisons import Comparison
from subspace_lab.analysis.plots.canvas import console
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.plots.matrices import overlap_heatmap
from subspace_lab.analysis.saves import Saves
from subspace_lab.analysis.verdicts import Verdict
from subspace_lab.core.files import write_json
from subspace_lab.core.texts import printable
from subspace_lab.das.fits import Fits, notes_of, table_of


def save_search(
    folder: Path,
    settings: Mapping[str, Any],
    fits: Fits,
    twins: Sequence[Fits],
    comparison: Comparison,
    verdict: Verdict | str,
    unsaved: Mapping[str, OSError],
) -> Saves:
    """Write the files of a search, except its fits, which are in the folder already.

    `results.json` comes last. If one file cannot be written, the others still are: see `Saves`.

    Args:
        folder: an existing folder.
        settings: how the search was made, as JSON.
        fits, twins: the fits of the model, and of its randomly initialised twins if there are any.
        comparison: the comparison of the fits' subspaces.
        verdict: the verdict on the fit that the dev pairs chose, or the reason why there is none.
        unsaved: {folder of fits: why they could not be written}.
    """
    saves = Saves(folder, errors=dict(unsaved))
    names = ["model", "twin", *(f"twin{i}" for i in range(2, len(twins) + 1))]
    saves.written += [name for name in names[: len(twins) + 1] if name not in unsaved]
    saves.save("iia.png", lambda: iia_heatmap(fits, _whole(twins, fits), folder / "iia.png"))
    if _can_differ(comparison):
        saves.save("overlap.png", lambda: overlap_heatmap(comparison, folder / "overlap.png"))
    results = {
        "settings": dict(settings),
        "model": fits.as_dict(),
        "twin": twins[0].as_dict() if twins else None,
        **({"twins": [one.as_dict() for one in twins]} if len(twins) > 1 else {}),
        "comparison": comparison.as_dict(),
        "verdict": verdict.as_dict() if isinstance(verdict, Verdict) else None,
    }
    saves.save("results.json", lambda: write_json(folder / "results.json", results))
    return saves


def print_search(
    settings: Mapping[str, Any],
    fits: Fits,
    twins: Sequence[Fits],
    comparison: Comparison,
    verdict: Verdict | str,
    saves: Saves,
) -> None:
    """Print the table, below it what one has to know to read it, and at the end the verdict."""
    terminal = console()
    title = printable(
        f"{settings['task']}: {settings['component']} searched for the variable '{settings['variable']}'"
    )
    best, whole = fits.best().method, _whole(twins, fits)
    several = len(twins) > 1
    more: dict[str, Fits | dict[str, str]] = {}
    if whole is not None:
        column = whole.where(method=best)
        more = (
            {f"twins (×{len(twins)}): {best.label}": _ranges(column)}
            if several
            else {f"twin: {best.label}": column}
        )
    terminal.print(table_of(fits, title=title, more=more))
    for line in [*notes_of(fits), *_remarks(fits, twins, comparison), saves.line()]:
        terminal.print(printable(line.replace("balance=False keeps", "--no-balance keeps")), markup=False)
    terminal.print(printable(f"\n{_last_paragraph(verdict, saves)}"), markup=False)


def _last_paragraph(verdict: Verdict | str, saves: Saves) -> str:
    if isinstance(verdict, str):
        return f"No verdict. {verdict}"
    more = (
        f" `subspace-lab check {shlex.quote(str(saves.folder))}` compares it with 19 twins."
        if verdict.preliminary
        else ""
    )
    return f"{verdict}{more}"


def _can_differ(comparison: Comparison) -> bool:
    """Whether there are two subspaces that can differ: subspaces that are the whole space are all the same."""
    return len(comparison.labels) > 1 and min(comparison.ranks) < comparison.width


def _ranges(twins: Fits) -> dict[str, str]:
    """{place: the mean over the twins, with the lowest and the highest}."""
    return {m.place: f"{m.value:.2f} ({m.low:.2f} to {m.high:.2f})" for m in twins.mean(metric=twins.metric)}


def _whole(twins: Sequence[Fits], fits: Fits) -> Fits | None:
    """The fits of all twins that were searched at all sites of the model; an interrupted search is left out."""
    whole = [twin for twin in twins if twin.places == fits.places]
    if not whole:
        return None
    order = {place: i for i, place in enumerate(fits.places)}
    together = sorted((fit for twin in whole for fit in twin), key=lambda fit: order[fit.place])
    return replace(whole[0], fits=tuple(together))


def _remarks(fits: Fits, twins: Sequence[Fits], comparison: Comparison) -> list[str]:
    n = len(comparison.labels)
    remarks = []
    for number, twin in enumerate(twins):
        if "interrupted" in twin.facts:
            remarks.append(f"Interrupted while searching the twin: {twin.facts['interrupted']}.")
        if number == 0:
            floors = twin.floors["test"]
            remarks.append(
                f"The randomly initialised twin answers {floors.accuracy} of the bases correctly; without an "
                f"intervention it gives {floors.no_intervention.value:.2f} of the expected answers."
            )
    if len(twins) > 1:
        remarks.append(f"Column of the twins: the mean of {len(twins)}, in brackets the lowest and the highest.")
    if n > 1:
        remarks.append(f"Overlap of the trained subspaces: {comparison.sentence}")
    return [*remarks, f"Engine: {fits.facts.get('engine')}."]
