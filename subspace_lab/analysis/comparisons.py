"""How near the subspaces of several fits are: across layers, seeds, methods or models, beside what chance gives.

A number alone says nothing. Beside what differs stands the yardstick, two seeds at one site, since the data do not
identify the span even where the score is perfect; and the null, subspaces that know nothing of each other.
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
    """A measure of each subspace with each, its means across layers, seeds, methods or models, and what chance gives.

    >>> compare(fits.where(method="DAS"), across="layer", within="seed")
    >>> compare({"ours": fits, "trained anew": others}, across="model", within="seed", measure=Functional(looks))

    Compared across layers are fits of different layers that agree in everything else (position, method, variable,
    model) but the seed; so for seeds, methods and models. Fits whose IIA on test is not above the highest floor count
    in no mean.

    Args:
        fits: the fits of a sweep; or {label: fits, fit, alignment or subspace}, where the label is the method's of
            across="method" and the model's of across="model". Of a sweep those fits are compared that began at a
            random start (all, if none did); nonlinear maps have no subspace. Edits of ReFT: `reft_alignments`.
        seeds: {label: what tells its random start from the others}, of all or of none; of fits they are known.
        across: "layer", "seed", "method" or "model"; without it no means are taken.
        within: "seed", the yardstick: two seeds at one site.
        measure: `overlap`, any function of two subspaces, or one that runs the model (`analysis/similarity.py`).
        null: further nulls beside random subspaces: fits on control labels or on a randomly initialised twin, subspaces
            of the top principal components (`principal_null`); one, or {name: null}.
        same_start: compare also what was trained from one start.
        min_effect: of the IIA on test, as a share of the way from the floor to 1, that its interval must be above;
            None counts all fits, whatever they do.
        variable: the one that is compared, of fits with several; by default all are, each with itself.
        same_start_allowed: the former name of `same_start`.

    Raises:
        TypeError: something that holds no subspaces.
        ValueError: nothing to compare, different widths, tasks or models, a subspace without a seed, a variable that
            is not there, all fits at their floor, one seed where two are needed; or two subspaces from one start: a
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
            told = [item.label for item in items if item.start is not None]
            raise ValueError(f"No seed given for {unknown}; seeds are known of {told}.")
    if not same_start:
        check_starts(items)
    if across == "layer":  # so that what is compared stands together
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
        raise ValueError(f"within={within!r} is a yardstick beside across='layer', 'method' or 'model'.")


def _counted(items: Sequence[Compared], cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in cells if items[i].counts and items[j].counts]


def _check_cells(
    items: Sequence[Compared],
    cells: Mapping[str, list[tuple[int, int]]],
    across: str | None,
    within: str | None,
) -> None:
    """ValueError where a mean was asked for and there is no pair to take it over."""
    if across is not None and not any(item.counts for item in items):
        raise ValueError(
            f"All {len(items)} fits are at their floor: what they found does nothing, and how near it is means nothing."
        )
    for which, facet in (("across", across), ("within", within)):
        if facet is None or _counted(items, cells[which]):
            continue
        found = sorted({str(item.facet(facet)) for item in items})
        if cells[which]:
            raise ValueError(
                f"{which}={facet!r}: of the {len(cells[which])} pairs that differ in nothing else none is of two "
                "fits above their floor."
            )
        raise ValueError(
            f"{which}={facet!r} needs two fits that differ in their {facet} and otherwise agree; the {facet}s here are "
            f"{found}."
        )


def _level(
    matrix: Sequence[Sequence[float]], cells: Sequence[tuple[int, int]], both_ways: bool, shares: bool
) -> Level | None:
    """The mean over some cells, with the delete-one jackknife over the fits (Arvesen 1969).

    The interval of values that are shares or cosines does not leave what these can be.
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
        angles: {what pairs: the mean of each angle over them}.
        null: of independent random subspaces of the same ranks.
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
    """The principal angles behind an overlap: one direction shared, or all of them somewhat (`plots.angle_spectrum`).

    Args:
        all: as of `compare`, whose errors it raises.

    Raises:
        ValueError: subspaces of different ranks, whose angles cannot be counted alike.
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
            f"Subspaces of the ranks {ranks}: spectra of angles need one rank; choose with where(rank=…)."
        )
    names = {"across": f"across {across}s", "within": f"two {within}s at one site"}
    found = {}
    for which, of in cells.items():
        counted = _counted(items, of)
        if counted:
            angles = [principal_angles(items[i].subspace, items[j].subspace) for i, j in counted]
            found[f"{names[which]} ({len(counted)} pairs)"] = tuple(torch.stack(angles).mean(0).tolist())
    return Spectra(found, haar_angles(items[0].subspace.width, ranks[0], ranks[0]))
