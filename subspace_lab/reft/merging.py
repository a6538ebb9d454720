"""Merges adapters into the weights of their base model.

`model/merging.py` has the algebra and the requirements for a single edit. An adapter adds two things: whether it edits
every token, and the modules of the base model that were trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.families import HookPoint
from subspace_lab.model.merging import Merged, merge, overlap, refuse_edit, refuse_merge, refuse_model
from subspace_lab.reft._adapters import Adapter
from subspace_lab.reft.config import ReftConfig


def merge_adapters(backbone: Backbone, adapters: Mapping[str, Adapter], others: Sequence[Site] = ()) -> Merged:
    """Merge adapters into the weights of their base model.

    Args:
        adapters: {name: adapter}, without a site in common.
        others: sites that will still be edited in each run.

    Returns:
        The merge; its `undo` restores the weights.

    Raises:
        ValueError: an adapter that edits only the prompt; another edit at its projection; a projection inside a module
            of modules_to_save; the errors of `model.merging.merge`.
    """
    merged = merge(backbone, _edits(backbone, adapters, others))
    try:
        for adapter in adapters.values():
            _put_in_place(backbone, adapter, merged)
    except BaseException:
        merged.undo()
        raise
    return merged


def refuse_adapter(backbone: Backbone, adapter: Adapter) -> None:
    """The errors of `merge_adapters`, for an adapter that is not merged now."""
    refuse_merge(backbone, _edits(backbone, {"default": adapter}, ()))


def _edits(
    backbone: Backbone, adapters: Mapping[str, Adapter], others: Sequence[Site]
) -> dict[Site, Intervention]:
    """{site: intervention} of adapters. Errors as in `merge_adapters`."""
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
    return edits


def refuse_config(config: ReftConfig) -> None:
    """ValueError for an adapter that cannot be merged into any model, as far as its configuration shows."""
    if config.component.endswith(("block_input", "block_output")):
        raise ValueError(
            f"An adapter at {config.component} cannot be merged into weights: the residual stream is the sum of the "
            "outputs of several modules. Edits can be merged at mlp_output, attention_output, value_output, "
            "head_output and mlp_activation; use this adapter with `generate`."
        )
    layer = 0 if isinstance(config.layers, str) else config.layers[0]
    for group in config.groups():
        refuse_edit(Site(config.component, layer, group), config.intervention(max(config.rank, 1), 0).eval())


def _refuse_prompts(name: str, adapter: Adapter, site: Site, point: HookPoint, model: nn.Module) -> None:
    """ValueError if an adapter edits only prompts and the model also generates tokens."""
    writes = hasattr(model, "generate") and point.stack != "encoder"
    if site.positions == "all" and writes and not adapter.config.every_token:
        raise ValueError(
            f"The adapter {name!r} cannot be merged into weights: it edits only the prompt, while weights also act at "
            "answers and generated tokens. Train with ReftConfig(positions='all', every_token=True), or use it "
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
    """ValueError if something else replaces the adapter's projection or edits its output."""
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
                f"The adapter {name!r} cannot be merged into weights: its edit at {site} changes {point.path}, "
                f"and {held[0]} is one of the modules_to_save of {owner!r}."
            )


def _put_in_place(backbone: Backbone, adapter: Adapter, merged: Merged) -> None:
    """Copy the tensors of the modules that were trained with the adapter into the base model."""
    for hook in adapter.hooks(backbone):
        module, trained = backbone.anatomy.modules[hook.path], adapter.saved_at(hook.path)
        assert trained is not None
        for own, new in zip(_numbers(module), _numbers(trained), strict=True):
            merged.put(own, new)


def _numbers(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers; tied ones appear once."""
    return [*module.parameters(), *module.buffers()]
