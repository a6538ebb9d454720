"""Adapters that become weights: which of them can, and what else they replace.

The algebra, and what it asks of an edit, is `model/merging.py`. Here is what an adapter adds: whether it edits every
token, and the modules of the base model that were trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.families import HookPoint
from subspace_lab.model.merging import Merged, merge, overlap, refuse_edit, refuse_model
from subspace_lab.reft._adapters import Adapter
from subspace_lab.reft.config import ReftConfig


def merge_adapters(backbone: Backbone, adapters: Mapping[str, Adapter], others: Sequence[Site] = ()) -> Merged:
    """Put adapters into the weights of their base model.

    Args:
        adapters: {name: adapter}; no two edit the same place.
        others: sites that go on to be edited in each run.

    Returns:
        What was merged, whose `undo` takes it out again.

    Raises:
        ValueError: an adapter that edits the prompt alone, or another edit at its projection; a module that was
            trained along and holds the projection; otherwise as `model.merging.merge`.
    """
    refuse_model(backbone.model)
    edits: dict[Site, Intervention] = {}
    for name, adapter in adapters.items():
        for site, edit in adapter.by_site().items():
            point = backbone.hook_point(site)
            _refuse_prompts(name, adapter, site, point, backbone.model)
            _refuse_neighbours(backbone, name, site, point, adapters, others)
            if site in edits:
                raise ValueError(f"Two of the adapters {list(adapters)} edit {site}; merge one of them.")
            edits[site] = edit
    merged = merge(backbone, edits)
    try:
        for adapter in adapters.values():
            _put_in_place(backbone, adapter, merged)
    except BaseException:
        merged.undo()
        raise
    return merged


def refuse_config(config: ReftConfig) -> None:
    """ValueError for adapters that no model can take into its weights: what can be said before one is loaded."""
    for group in config.groups():
        refuse_edit(Site(config.component, 0, group), config.intervention(max(config.rank, 1), 0).eval())
    if config.component.endswith(("block_input", "block_output")):
        raise ValueError(
            f"An adapter at {config.component} cannot be merged into weights: the residual stream is the sum of what "
            "several modules give. That can be done at mlp_output, attention_output, value_output, head_output and "
            "mlp_activation; serve this one with `generate`."
        )


def _refuse_prompts(name: str, adapter: Adapter, site: Site, point: HookPoint, model: nn.Module) -> None:
    """ValueError where an adapter edits prompts alone and the model also writes."""
    writes = hasattr(model, "generate") and point.stack != "encoder"
    if site.positions == "all" and writes and not adapter.config.every_token:
        raise ValueError(
            f"The adapter {name!r} cannot be merged into weights: it edits the prompt alone, and weights act at "
            "answers and generated tokens too. Train with ReftConfig(positions='all', every_token=True), or serve it "
            "with `generate`, which edits the prompt once and then runs at the speed of the base model."
        )


def _refuse_neighbours(
    backbone: Backbone,
    name: str,
    site: Site,
    point: HookPoint,
    adapters: Mapping[str, Adapter],
    others: Sequence[Site],
) -> None:
    """ValueError where something else than the adapter replaces or edits what its projection gives."""
    near = [other for other in others if overlap(point, backbone.hook_point(other))]
    if near:
        raise ValueError(
            f"The adapter {name!r} cannot be merged into weights: another active adapter edits {near[0]}, the same "
            "projection. Merge both, or make it inactive."
        )
    for owner, adapter in adapters.items():
        held = [hook.path for hook in adapter.hooks(backbone) if f"{point.path}.".startswith(f"{hook.path}.")]
        if held:
            raise ValueError(
                f"The adapter {name!r} cannot be merged into weights: its edit at {site} is of {point.path}, and "
                f"modules_to_save of {owner!r} names {held[0]}."
            )


def _put_in_place(backbone: Backbone, adapter: Adapter, merged: Merged) -> None:
    """The numbers of the modules that were trained along, in the modules of the base model."""
    for hook in adapter.hooks(backbone):
        module, trained = backbone.anatomy.modules[hook.path], adapter.saved_at(hook.path)
        assert trained is not None
        for own, new in zip(_numbers(module), _numbers(trained), strict=True):
            merged.put(own, new)


def _numbers(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, tied ones once."""
    return [*module.parameters(), *module.buffers()]
