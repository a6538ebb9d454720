"""Many sites of a model at once: its layers, positions and heads."""

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
    """Every layer at every position, and each head by itself: what a sweep searches, or what path patching holds.

    They are in the order of layers, then heads, then positions, and all of them exist in the model.

    Args:
        backbone: of the model.
        component: as of `Site`; one that is the path of a submodule has no layers and no heads.
        layers: "all", or those that are meant; negative ones count from the end.
        positions: as of `Site`, one of them, or a list of several: ["f1", "last"] is two sites, "f1+last" is one.
        heads: "all" or some of them, each a site of its own; None takes all heads together, as one site. Of keys and
            values there may be fewer than of queries.

    Raises:
        TypeError: a model in the place of a backbone; a component that is no text; layers or heads that are no whole
            numbers.
        ValueError: a component, or a head, that the model has not; nothing at all.
        IndexError: a layer that it has not.
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
        Site(component, 0)  # an unknown component before the model's stacks are looked at
        depth = anatomy.depth(component.rpartition(".")[0])
        numbers = [
            number % depth if -depth <= number < 0 else number for number in _numbers("layers", layers, depth)
        ]
    specs = [positions] if isinstance(positions, str | int | slice) else list(positions)
    found: list[Site] = []
    for layer in numbers:
        alone: list[int | None] = [None]
        if heads is not None:
            whole = Site(component, layer, "all", 0)  # its head 0 is checked to be one
            alone = [*_numbers("heads", heads, anatomy.head_count(whole))]
        found += [Site(component, layer, spec, head) for head in alone for spec in specs]
    if not found:
        raise ValueError(f"No sites: layers={layers!r}, positions={positions!r}, heads={heads!r}.")
    for site in found:
        backbone.hook_point(site)
    return list(dict.fromkeys(found))


def _numbers(name: str, given: Literal["all"] | int | Iterable[int], count: int) -> list[int]:
    """Those that are given, or all."""
    if isinstance(given, str):
        if given != "all":
            raise ValueError(f"{name}={given!r}: possible are 'all', a number, or several.")
        return list(range(count))
    several = given if isinstance(given, Iterable) else [given]
    return [whole_number(one, f"one of {name}") for one in several]
