"""Lists of sites of a model: all its layers, positions and heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone, expect_backbone

PositionSpec = str | int | slice | Sequence[int]


def list_sites(
    backbone: Backbone,
    component: str = "block_output",
    *,
    layers: Literal["all"] | int | Iterable[int] = "all",
    positions: str | int | slice | Sequence[PositionSpec] = "all",
    heads: Literal["all"] | int | Iterable[int] | None = None,
) -> list[Site]:
    """Every layer at every position, and optionally each head separately, for a sweep or for `hold` of path patching.

    The sites are ordered by layer, then by head, then by position. All of them exist in the model.

    Args:
        backbone: the model.
        component: as in `Site`. A component that is the path of a submodule has no layers and no heads.
        layers: "all", or the numbers of some layers; negative numbers count from the end.
        positions: one position, as in `Site`, or a list of several: ["f1", "last"] gives two sites, "f1+last" one.
        heads: "all" or some of them, each as a separate site. None takes all heads together as one site. There may be
            fewer heads of keys and values than of queries.

    Raises:
        TypeError: a model instead of a backbone; a component that is not text; layers or heads that are not whole
            numbers.
        ValueError: a component or a head that the model does not have; no sites at all.
        IndexError: a layer that the model does not have.
    """
    expect_backbone(backbone)
    instance(component, str, f"component={component!r}", "such as 'block_output'")
    instance(
        positions, (str, int, slice, Sequence), f"positions={positions!r}", "such as 'last' or ['f1', 'last']"
    )
    anatomy = backbone.anatomy
    if component.endswith((".input", ".output")):
        if layers != "all" or heads is not None:
            raise ValueError(f"{component!r} names a submodule by its path, which has no layers and no heads.")
        numbers: list[int | None] = [None]
    else:
        Site(component, 0)  # raises for an unknown component before the model's stacks are searched
        depth = anatomy.depth(component.rpartition(".")[0])
        numbers = [
            number % depth if -depth <= number < 0 else number for number in _numbers("layers", layers, depth)
        ]
    specs = [positions] if isinstance(positions, str | int | slice) else list(positions)
    found: list[Site] = []
    for layer in numbers:
        alone: list[int | None] = [None]
        if heads is not None:
            whole = Site(component, layer, "all", 0)  # this checks that there is a head 0
            alone = [*_numbers("heads", heads, anatomy.head_count(whole))]
        found += [Site(component, layer, spec, head) for head in alone for spec in specs]
    if not found:
        raise ValueError(f"No sites: layers={layers!r}, positions={positions!r}, heads={heads!r}.")
    for site in found:
        backbone.hook_point(site)
    return list(dict.fromkeys(found))


def _numbers(name: str, given: Literal["all"] | int | Iterable[int], count: int) -> list[int]:
    """The given numbers, or all."""
    if isinstance(given, str):
        if given != "all":
            raise ValueError(f"{name}={given!r}: possible are 'all', a number, or several.")
        return list(range(count))
    several = given if isinstance(given, Iterable) else [given]
    return [whole_number(one, f"one of {name}") for one in several]
