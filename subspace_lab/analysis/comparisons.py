"""How similar the subspaces of several fits are, across layers, seeds, methods or models.

A similarity alone says little, so it is compared with two others. The yardstick is the similarity of two seeds at one
site: the data do not identify the span, even if the score is perfect. The null is the similarity of unrelated
subspaces.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from subspace_lab.analysis._comparison import ROUNDING, Comparison, Level
from subspace_lab.analysis.compared import FACETS, Compared, Group, cells_of, check_starts, read
from subspace_lab.analysis.geometry import (
    AngleBand,
    haar_angles,
    overlap,
    principal_angles,
)
from subspace_lab.analysis.measures import (
    Measure,
    OfTwo,
    chance_by_ranks,
    chance_over,
    measured,
    name_of,
    null_over,
)

__all__ = ["Comparison", "Level", "Spectra", "compare", "spectra"]


def compare(
    fits: Group | Mapping[str, Any],
    seeds: Mapping[str, int | str] | None = None,
    *,
    across: str | None = None,
    within: str | None = None,
    measure: OfTwo | Measure = overlap,
    null: Group | Mapping[str, Any] | None = None,
    same_start: bool = False,
    min_effect: float | None = 0.0,
    variable: str | None = None,
    same_start_allowed: bool | None = None,
) -> Comparison:
    """A measure for every pair of subspaces, its means across layers, seeds, methods or models, and its null.

    >>> compare(fits.where(method="DAS"), across="layer", within="seed")
    >>> compare({"ours": fits, "retrained": others}, across="model", within="seed", measure=Functional(looks))

    With across="layer", two fits are compared if their layers differ and everything else (position, method, variable,
    model) except the seed is the same; likewise for seeds, methods and models. Fits whose IIA on the test pairs is not
    above the highest floor count in no mean.

    Args:
        fits: the fits of a sweep; or {label: fits, fit, alignment or subspace}, where the label names the method with
            across="method", and the model with across="model". From a sweep, the fits with a random start are compared
            (all fits, if none has one). Nonlinear maps have no subspace. For edits of ReFT see `reft_alignments`.
        seeds: {label: seed or name of its random start}, for all subspaces or for none; fits know their start.
        across: "layer", "seed", "method" or "model"; without it no means are taken.
        within: "seed", the yardstick: two seeds at one site.
        measure: `overlap`, any function of two subspaces, or one that runs the model (`analysis/similarity.py`).
        null: nulls in addition to random subspaces: fits on control labels or on a randomly initialised twin, or
            subspaces of the top principal components (`principal_null`); one, or {name: null}.
        same_start: also compare subspaces that were trained from the same start.
        min_effect: a fit counts if the interval of its IIA on the test pairs is above this share of the way from the
            floor to 1; None counts all fits.
        variable: the variable that is compared if the fits have several; by default each is compared with itself.
        same_start_allowed: the former name of `same_start`.

    Raises:
        TypeError: something that holds no subspaces.
        ValueError: nothing to compare, different widths, tasks or models, a subspace without a seed, an unknown
            variable, all fits at their floor, one seed where two are needed; or two subspaces from the same start: a
            basis stays near its start, so they overlap whatever the model does.
    """
    if same_start_allowed is not None:
        warnings.warn("same_start_allowed is now called same_start.", DeprecationWarning, stacklevel=2)
        same_start = same_start or same_start_allowed
    _check_question(across, within, min_effect)
    items = read(fits, across, variable=variable, min_effect=min_effect)
    if seeds is not None:
        items = [replace(item, start=seeds.get(item.label, item.start)) for item in items]
        if unknown := [item.label for item in items if item.start is None]:
            known = [item.label for item in items if item.start is not None]
            raise ValueError(f"No seed given for {unknown}; seeds are known for {known}.")
    if not same_start:
        check_starts(items)
    if across == "layer":  # so that sites that are compared are next to each other
        places = list(dict.fromkeys(item.place() for item in items))
        items = sorted(items, key=lambda item: places.index(item.place()))
    cells = {"across": cells_of(items, across), "within": cells_of(items, within)}
    _check_cells(items, cells, across, within)
    matrix = measured(measure, items)
    found = Comparison(
        labels=tuple(item.label for item in items),
        ranks=tuple(item.subspace.rank for item in items),
        width=items[0].subspace.width,
        matrix=matrix,
        chance=chance_by_ranks(measure, items, across),
        measure=name_of(measure),
        counts=tuple(item.counts for item in items),
        facets=(across, within),
    )
    both_ways, shares = not found.symmetric, not found.distance
    counted = {which: _counted(items, of) for which, of in cells.items()}
    levels = {which: _level(matrix, of, both_ways, shares) for which, of in counted.items()}
    compared = [*counted["across"], *((j, i) for i, j in counted["across"] if both_ways)]
    other = {} if null is None else null if isinstance(null, Mapping) else {"the null": null}
    return replace(
        found,
        across=levels["across"],
        within=levels["within"],
        null=None if across is None else chance_over([found.chance_of(i, j) for i, j in compared]),
        nulls={called: null_over(measure, one, across, variable) for called, one in other.items()},
    )


# --- which pairs ------------------------------------------------------------------------------------------------


def _check_question(across: str | None, within: str | None, min_effect: float | None) -> None:
    if across is not None and across not in FACETS:
        raise ValueError(f"across={across!r}: possible are {', '.join(FACETS)}.")
    if within not in (None, "seed"):
        raise ValueError(f"within={within!r}: possible are 'seed' and None.")
    if min_effect is not None and not 0 <= min_effect < 1:
        raise ValueError(f"min_effect={min_effect}: needed is a share of the way from the floor to 1, or None.")
    if within is not None and across in (None, "seed"):
        raise ValueError(f"within={within!r} is a yardstick for across='layer', 'method' or 'model' only.")


def _counted(items: Sequence[Compared], cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in cells if items[i].counts and items[j].counts]


def _check_cells(
    items: Sequence[Compared],
    cells: Mapping[str, list[tuple[int, int]]],
    across: str | None,
    within: str | None,
) -> None:
    """ValueError if a mean was asked for and there is no pair for it."""
    if across is not None and not any(item.counts for item in items):
        raise ValueError(
            f"All {len(items)} fits are at their floor: their subspaces do nothing, so comparing them means nothing."
        )
    for which, facet in (("across", across), ("within", within)):
        if facet is None or _counted(items, cells[which]):
            continue
        found = sorted({str(item.facet(facet)) for item in items})
        if cells[which]:
            raise ValueError(
                f"{which}={facet!r}: {len(cells[which])} pairs of fits differ in nothing else, but in none of them are "
                "both fits above their floor."
            )
        raise ValueError(
            f"{which}={facet!r} needs two fits that differ in their {facet} and agree in everything else; the {facet}s "
            f"here are {found}, of {_some(items)}."
        )


def _some(items: Sequence[Compared], most: int = 4) -> str:
    """What was found, so that a reader sees in what the fits differ."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(f"{item.label} ({item.method or 'no method'})" for item in items[:most]) + more


def _level(
    matrix: Sequence[Sequence[float]], cells: Sequence[tuple[int, int]], both_ways: bool, shares: bool
) -> Level | None:
    """The mean over some cells, with the delete-one jackknife over the fits (Arvesen 1969).

    If the values are shares or cosines, the interval is cut at their lowest and highest possible value.
    """
    if not cells:
        return None
    values = {(i, j): (matrix[i][j] + matrix[j][i]) / 2 if both_ways else matrix[i][j] for i, j in cells}
    members = sorted({i for cell in cells for i in cell})
    mean, n = fmean(values.values()), len(members)
    without = [[v for cell, v in values.items() if one not in cell] for one in members]
    if not all(without):
        return Level(mean, None, None, n, tuple(values.values()))
    means = [fmean(rest) for rest in without]
    error = ((n - 1) / n * sum((one - fmean(means)) ** 2 for one in means)) ** 0.5
    low, high = mean - 1.96 * error, mean + 1.96 * error
    if shares and max(map(max, matrix)) <= 1 + ROUNDING:
        lowest = 0.0 if min(map(min, matrix)) >= 0 else -1.0
        low, high = max(low, min(lowest, mean)), min(high, max(1.0, mean))
    return Level(mean, low, high, n, tuple(values.values()))


@dataclass(frozen=True)
class Spectra:
    """The principal angles of the pairs that are compared, in radians, ascending.

    Attributes:
        angles: {name of the kind of pairs: the mean of each angle over these pairs}.
        null: the angles of independent random subspaces of the same ranks.
    """

    angles: Mapping[str, tuple[float, ...]]
    null: AngleBand


def spectra(
    fits: Group | Mapping[str, Any],
    *,
    across: str,
    within: str | None = None,
    same_start: bool = False,
    min_effect: float | None = 0.0,
    variable: str | None = None,
) -> Spectra:
    """The principal angles behind an overlap, drawn by `plots.angle_spectrum`.

    They show whether one direction is shared, or all directions a little. The arguments are those of `compare`.

    Raises:
        ValueError: subspaces of different ranks, which have different numbers of angles; and all errors of `compare`.
    """
    _check_question(across, within, min_effect)
    items = read(fits, across, variable=variable, min_effect=min_effect)
    if not same_start:
        check_starts(items)
    cells = {"across": cells_of(items, across), "within": cells_of(items, within)}
    _check_cells(items, cells, across, within)
    ranks = sorted({item.subspace.rank for item in items})
    if len(ranks) > 1:
        raise ValueError(
            f"Subspaces of the ranks {ranks}: spectra of angles need a single rank; choose it with where(rank=…)."
        )
    names = {"across": f"across {across}s", "within": f"two {within}s at one site"}
    found = {}
    for which, of in cells.items():
        counted = _counted(items, of)
        if counted:
            angles = [principal_angles(items[i].subspace, items[j].subspace) for i, j in counted]
            found[f"{names[which]} ({len(counted)} pairs)"] = tuple(torch.stack(angles).mean(0).tolist())
    return Spectra(found, haar_angles(items[0].subspace.width, ranks[0], ranks[0]))
