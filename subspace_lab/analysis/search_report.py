"""What a search leaves: its files, and the table that a person reads.

results.json            "settings"; "model" and "twin" (null where none was searched): accuracy, floors, and for
                        each site the scores with their intervals; "comparison": the overlaps of the subspaces
                        with what chance gives
subspaces.safetensors   {"site/variable": R of shape (rank, width)}, for `core.checkpoints.load_subspaces`
iia.png, overlap.png    `analysis/plots.py`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from subspace_lab.analysis.canvas import console
from subspace_lab.analysis.geometry import Comparison, compare
from subspace_lab.analysis.plots import iia_heatmap, overlap_heatmap
from subspace_lab.core.checkpoints import save_subspaces
from subspace_lab.core.files import write_json
from subspace_lab.das.search import SearchResult

FILES = ("results.json", "subspaces.safetensors", "iia.png", "overlap.png")


def save_search(
    folder: Path, settings: Mapping[str, Any], found: SearchResult, twin: SearchResult | None
) -> Comparison:
    """Write all files of a search for one variable, and compare the subspaces of its sites.

    Each file is written aside and renamed; `results.json` comes last, so where it is the others are.

    Args:
        folder: an existing one.
        settings: how the search was made, as JSON; "model", "task", "variable" and "seed" go into the
            metadata of the subspaces too.
        found, twin: of the model, and of its randomly initialised twin if that was searched.
    """
    variable = settings["variable"]
    by_site = {str(one.site): one for one in found.found}
    comparison = compare(by_site)
    facts = {name: str(settings[name]) for name in ("model", "task", "variable", "seed")}
    save_subspaces(
        folder / "subspaces.safetensors",
        {f"{site}/{variable}": one.subspace(variable) for site, one in by_site.items()},
        facts,
    )
    iia_heatmap(found, twin, folder / "iia.png", task=settings["task"])
    overlap_heatmap(comparison, folder / "overlap.png")
    results = {
        "settings": dict(settings),
        "model": found.as_dict(),
        "twin": None if twin is None else twin.as_dict(),
        "comparison": comparison.as_dict(),
    }
    write_json(folder / "results.json", results)
    return comparison


def print_search(
    folder: Path,
    settings: Mapping[str, Any],
    found: SearchResult,
    twin: SearchResult | None,
    comparison: Comparison,
) -> None:
    """The table on standard output, and under it what has to be known to read it."""
    terminal = console()
    terminal.print(_table(settings, found, twin))
    for line in _remarks(found, twin, comparison):
        terminal.print(line, markup=False)
    terminal.print(f"Written to {folder}: {', '.join(FILES)}.", markup=False)


def _table(settings: Mapping[str, Any], found: SearchResult, twin: SearchResult | None) -> Table:
    best = found.best
    asked = f"{settings['task']}: {settings['variable']} in {settings['component']}"
    table = Table(
        title=f"{asked}, rank {best.rank}, {best.iia.n} held-out pairs",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("layer", "position", "IIA [95 %]", "training", "full vector", "random"):
        table.add_column(column, justify="left" if column in ("layer", "position") else "right")
    if twin is not None:
        table.add_column("twin [95 %]", justify="right")
    for i, one in enumerate(found.found):
        cells = ["" if one.site.layer is None else str(one.site.layer), one.site.positions, str(one.iia)]
        cells += [f"{e.value:.2f}" if e else "" for e in (one.train_iia, one.full_vector, one.random_subspace)]
        if twin is not None:
            cells.append(str(twin.found[i].iia))
        table.add_row(*cells, style="bold" if one is best else None)
    return table


def _remarks(found: SearchResult, twin: SearchResult | None, comparison: Comparison) -> list[str]:
    best, n, chance = found.best, len(found.found), comparison.chance_of(0, 0)
    floor = "" if twin is None else f", the twin {twin.no_intervention.value:.2f}"
    accuracy = "" if twin is None else f", the twin {twin.accuracy}"
    above = sum(comparison.matrix[i][j] > chance.high for i in range(n) for j in range(i))
    remarks = [
        f"Floors on these pairs: no intervention {found.no_intervention.value:.2f}{floor}; best constant answer "
        f"{found.constant.value:.2f}.",
        f"Before any intervention the model answers {found.accuracy} of the bases right{accuracy}.",
    ]
    if best.iia.low <= max(found.no_intervention.value, found.constant.value):
        remarks.append("No site lies above the floors: nothing was found, and the pictures show noise.")
    if n > 1:
        remarks += [
            f"Best: {best.site}, {best.iia}. The best of {n} is selected on these pairs and so looks better than "
            "it is: confirm it on other seeds before it is a finding.",
            f"Overlap of the sites' subspaces: {above} of {n * (n - 1) // 2} pairs lie above the 95 % band of "
            f"random ones, {chance.low:.3f} to {chance.high:.3f} (mean {chance.mean:.3f}).",
        ]
    return [*remarks, f"Engine: {found.engine}."]
