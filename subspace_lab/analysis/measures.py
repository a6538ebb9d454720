"""Measures between subspaces, and their values for unrelated subspaces (the nulls)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from subspace_lab.analysis.compared import Compared, cells_of, unlabelled
from subspace_lab.analysis.geometry import Chance, haar_overlap, overlap
from subspace_lab.core.subspaces import Subspace, random_subspace

NULL_PAIRS = 200  # pairs of random subspaces, for a measure without a closed form
NULL_SETS = 3  # sets of random subspaces, for a measure that runs the model


@runtime_checkable
class Measure(Protocol):
    """A measure that uses more than the spans of the subspaces, such as their sites and models.

    Attributes:
        label: its name in sentences and pictures.
    """

    @property
    def label(self) -> str: ...

    def matrix(self, items: Sequence[Compared]) -> Sequence[Sequence[float]]:
        """The measure of each subspace (first index) with each subspace (second index)."""
        ...


OfTwo = Callable[[Subspace, Subspace], float]
"""A measure of two spans, such as the functions of `analysis/geometry.py`."""


def name_of(measure: OfTwo | Measure) -> str:
    """The name of a measure in results."""
    if isinstance(measure, Measure):
        return measure.label
    return str(getattr(measure, "__name__", type(measure).__name__)).replace("_", " ")


def measured(measure: OfTwo | Measure, items: Sequence[Compared]) -> tuple[tuple[float, ...], ...]:
    """The measure of each subspace with each (ValueError if the states have different widths)."""
    if isinstance(measure, Measure):
        return tuple(tuple(map(float, row)) for row in measure.matrix(items))
    widths = {item.label: item.subspace.width for item in items}
    if len(set(widths.values())) > 1:
        raise ValueError(f"Subspaces of states of different widths have no {name_of(measure)}: {widths}.")
    return tuple(tuple(float(measure(a.subspace, b.subspace)) for b in items) for a in items)


def chance_by_ranks(
    measure: OfTwo | Measure, every: Sequence[Compared], across: str | None
) -> dict[tuple[int, int], Chance]:
    """The values for independent random (Haar) subspaces of the same ranks, by pair of ranks.

    For a measure that runs the model, random subspaces replace all subspaces that count, at the same sites. The values
    are those of the pairs that are compared.
    """
    items = [item for item in every if item.counts] or every
    ranks, width = sorted({item.subspace.rank for item in every}), every[0].subspace.width
    pairs = [(a, b) for a in ranks for b in ranks]
    if measure is overlap:
        return {(a, b): haar_overlap(width, a, b) for a, b in pairs if a <= b}
    if not isinstance(measure, Measure):
        return {(a, b): _drawn(measure, width, a, b) for a, b in pairs}
    cells = cells_of(items, across) or [(i, j) for i in range(len(items)) for j in range(i)]
    values: dict[tuple[int, int], list[float]] = {}
    for number in range(NULL_SETS):
        drawn = [
            replace(item, subspace=random_subspace(item.subspace.width, item.subspace.rank, 7919 * number + i))
            for i, item in enumerate(items)
        ]
        matrix = measured(measure, drawn)
        for i, j in [*cells, *((j, i) for i, j in cells)]:
            values.setdefault((items[i].subspace.rank, items[j].subspace.rank), []).append(matrix[i][j])
    # A pair of ranks that is not compared takes the values of all pairs; for a single subspace there are none at all.
    pooled = [value for of in values.values() for value in of] or [1.0]
    return {pair: Chance.of(values.get(pair, pooled)) for pair in pairs}


def chance_over(own: Sequence[Chance]) -> Chance:
    """Chance over several pairs: the mean; if the ranks differ, the lowest and the highest limit of their bands."""
    if len(set(own)) == 1:
        return own[0]
    return Chance(
        fmean(one.mean for one in own),
        min(one.low for one in own),
        max(one.high for one in own),
        min(one.draws for one in own),
    )


def null_over(measure: OfTwo | Measure, given: Any, across: str | None, variable: str | None) -> Chance:
    """The values for results that are unrelated to the variable, over the same kind of pairs.

    If they have no such pair (one method, one model), pairs of two seeds at one site are taken. Pairs that were
    trained from the same start are left out.

    Raises:
        ValueError: no such pairs.
    """
    items = unlabelled(given, variable=variable)
    pairs = cells_of(items, across) or cells_of(items, "seed")
    cells = [(i, j) for i, j in pairs if items[i].start is None or items[i].start != items[j].start]
    if not cells:
        raise ValueError(
            f"The null has no two fits that could be compared in the same way; it has {len(items)} subspaces of the "
            f"layers {sorted({str(item.facet('layer')) for item in items})} and seeds "
            f"{sorted({str(item.seed) for item in items})}."
        )
    matrix = measured(measure, items)
    return Chance.of([(matrix[i][j] + matrix[j][i]) / 2 for i, j in cells])


def _drawn(measure: OfTwo, width: int, a: int, b: int) -> Chance:
    return Chance.of(
        [
            float(measure(random_subspace(width, a, 2 * i), random_subspace(width, b, 2 * i + 1)))
            for i in range(NULL_PAIRS)
        ]
    )
