"""Edits that become weights: what an affine edit of all tokens does at a projection, another projection does as well.

An edit A h + c of what a linear map gives, y = W x + b, is the linear map

    W' = A W        b' = A b + c                   at its output (`mlp_output`, `attention_output`, `value_output`, …)
    W' = W A        b' = b + W c                   at its input (`head_output`, `mlp_activation`)

with A = I + Dᵀ M and c = Dᵀ v in the words of `core/interventions.py`, M = W − R for LoReFT. Where a site is some
columns of the projection (single heads, the values of a fused one) A and c are about these alone. It is exact, so
what is merged needs nothing of this package, and runs at the speed of the model. It is exact nowhere else: what is
not one affine map of every token's state at one projection is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import by_site
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone, expect_backbone
from subspace_lab.model.families import HookPoint
from subspace_lab.model.offloading import is_offloaded, is_unloaded

# Settings of transformers' configurations that give projections a bias.
BIAS_SETTINGS = ("mlp_bias", "attention_bias", "use_bias")
Placed = tuple[HookPoint, Intervention]


@dataclass
class Merged:
    """Edits that are in the weights of a model.

    Attributes:
        edits: {site: intervention}, those that were merged.
        settings: of the model's configuration that were switched on, so that it has the biases that the edits need.
    """

    edits: Mapping[Site, Intervention]
    settings: tuple[str, ...] = ()
    _model: Any = None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _added: list[Any] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the former weights are kept, so that it can be undone."""
        return self._model is not None

    def undo(self) -> None:
        """Give the model the weights that it had, to the bit, and the configuration.

        Raises:
            ValueError: `keep_nothing` was called.
        """
        if self._model is None:
            raise ValueError("No copies of the former weights are kept, so they cannot be given back.")
        with torch.no_grad():
            for tensor, former in reversed(self._kept):
                tensor.copy_(former)
        for module in self._added:
            module.bias = None
        for name in self.settings:
            setattr(_text_config(self._model), name, False)
        self.keep_nothing()

    def keep_nothing(self) -> None:
        """Free the copies of the former weights; the edits stay in the weights for good."""
        for module in self._added:  # trains, or not, as the projection does
            if module.bias is not None:
                module.bias.requires_grad_(module.weight.requires_grad)
        self._model, self._kept, self._added = None, [], []

    def put(self, tensor: Tensor, new: Tensor) -> None:
        """Write new numbers into a tensor of the model, and keep a copy of the former ones.

        Raises:
            ValueError: numbers that are too large for the dtype of the tensor.
        """
        self._kept.append((tensor, tensor.detach().clone()))
        with torch.no_grad():
            tensor.copy_(new)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The merged weights are not finite in {tensor.dtype}: load the model in float32.")


def merge(backbone: Backbone, edits: Mapping[Site, Intervention]) -> Merged:
    """Put edits of all tokens into the weights of the model.

    Afterwards the model runs as with the edits at every token that is no padding, in float64 but for rounding; it is
    the same object, with `save_pretrained` and all else. Everything is checked before a weight is changed.

    Args:
        backbone: of the model.
        edits: {site: intervention}, of LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT, RED, steering or ablation.

    Returns:
        What was merged, whose `undo` takes it out again.

    Raises:
        TypeError: a model in the place of a backbone; edits that are not {site: intervention}.
        ValueError: an edit that no weights stand for, or not these: other positions than "all"; one that is not
            affine (an activation, a source, one value for each example); dropout in train mode; a site that is
            not the input or output of one linear map; weights that are shared, quantised, offloaded or wrapped; two
            edits of the same columns; a projection without a bias where the edit has one and no setting gives it.
        IndexError: a layer that the model has not.
    """
    expect_backbone(backbone)
    by_site(edits, "edits", Intervention, Site)
    refuse_model(backbone.model)
    placed: dict[str, list[Placed]] = {}
    for site, edit in edits.items():
        refuse_edit(site, edit)
        point = backbone.hook_point(site)
        _refuse_place(backbone, site, edit, point)
        for other, _ in placed.get(point.path, []):
            if overlap(point, other):
                raise ValueError(
                    f"{site} and another edit act on the same numbers of {point.path}; merge one of them."
                )
        placed.setdefault(point.path, []).append((point, edit))
    _refuse_shared(backbone.model, list(placed))
    modules: dict[str, Any] = {path: backbone.anatomy.modules[path] for path in placed}
    with torch.inference_mode(False):
        lacking = [path for path, some in placed.items() if _lacks_bias(modules[path], some)]
        settings, places = _settings_for(backbone.model, lacking)
        merged = Merged(dict(edits), settings, backbone.model)
        try:
            for path in places:
                module: Any = backbone.anatomy.modules[path]
                weight = module.weight
                zeros = torch.zeros(_outputs(module), dtype=weight.dtype, device=weight.device)
                module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
                merged._added.append(module)
            for name in settings:
                setattr(_text_config(backbone.model), name, True)
            for path, some in placed.items():
                _merge_into(modules[path], some, merged)
        except BaseException:
            merged.undo()
            raise
    return merged


def refuse_model(model: nn.Module) -> None:
    """ValueError for a model whose weights are no plain numbers in memory."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"This {type(model).__name__} is quantised: what is merged would be rounded to a few bits. Load the model "
            "without quantisation and merge into that, or serve the edits with `generate`."
        )
    if is_offloaded(model) or is_unloaded(model):
        raise ValueError(
            f"The weights of this {type(model).__name__} are not in memory between runs (offloaded, or on 'meta'), and "
            "cannot be changed: load the whole model, on the CPU say."
        )


def refuse_edit(site: Site, edit: Intervention) -> None:
    """ValueError for an edit that is no affine map of every token's state."""
    why = None
    if site.positions != "all":
        why = f"it acts at the positions {site.positions!r}, weights at all tokens; serve it with `generate`"
    elif edit.needs_source:
        why = "it needs a source, which weights do not have"
    elif not edit.is_affine:
        why = (
            "it is not one affine map of the state (another activation than 'linear', a value for each example, or a "
            "value whose class does not say `is_affine`); serve it with `generate`"
        )
    elif edit.dropout.p and edit.training:
        why = (
            f"it is in train mode and drops coordinates at random (dropout={edit.dropout.p}): call `eval()` first"
        )
    if why is not None:
        raise ValueError(f"{site} cannot be merged into weights: {why}.")


def overlap(one: HookPoint, other: HookPoint) -> bool:
    """Whether two hook points are of the same numbers of one stream."""
    if (one.path, one.side) != (other.path, other.side):
        return False
    return one.columns is None or other.columns is None or bool({*one.columns} & {*other.columns})


def _refuse_place(backbone: Backbone, site: Site, edit: Intervention, point: HookPoint) -> None:
    """ValueError where a site is not at a linear map with weights of its own."""
    from transformers.pytorch_utils import Conv1D

    module: Any = backbone.anatomy.modules[point.path]
    kind, why = type(module), None
    if kind not in (nn.Linear, Conv1D):
        why = (
            f"{point.path or 'the model'} is a {kind.__name__}, not a linear map whose weights could take it. That can "
            "be done at mlp_output, attention_output, value_output, head_output and mlp_activation; serve other edits "
            "with `generate`"
        )
    elif not backbone.is_plain(point.path) or not module.weight.is_floating_point():
        why = f"something wraps or hooks {point.path}, or its weights are no plain numbers (quantised, offloaded)"
    elif edit.width != point.width:
        why = f"it has width {point.width}, the intervention was made for {edit.width}"
    if why is not None:
        raise ValueError(f"{site} cannot be merged into weights: {why}.")


def _refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """ValueError where a projection has weights, or is a module, that the model uses in another place as well."""
    places: list[tuple[str, int, int, torch.device]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            start, size = parameter.data_ptr(), parameter.numel() * parameter.element_size()
            places.append((path, start, start + size, parameter.device))
    for path, start, end, device in [place for place in places if place[0] in paths]:
        for other, first, last, where in places:
            if other != path and where == device and first < end and start < last:
                raise ValueError(
                    f"{path} shares its weights with {other}, which would be edited too: the edit cannot be merged. "
                    "Untie the two in the model first, or serve the edit with `generate`."
                )


def _settings_for(model: nn.Module, lacking: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """By which settings the model has a bias at these modules, and all modules that get one by them.

    A model is built anew from the changed configuration, without memory: what it has more is what is loaded.
    """
    if not lacking:
        return (), []
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    settings: list[str] = []
    places: list[str] = []
    for setting in BIAS_SETTINGS:
        if getattr(_text_config(model), setting, None) is not False or not hasattr(type(model), "_from_config"):
            continue
        config = copy.deepcopy(model.config)
        setattr(_text_config(None, config), setting, True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = type(model)._from_config(config)  # type: ignore[attr-defined]
        found = {name for name, _ in built.named_parameters(remove_duplicate=False)}
        more = [name.removesuffix(".bias") for name in sorted(found - names) if name.endswith(".bias")]
        only_biases = names <= found and len(more) == len(found - names)
        if only_biases and {*more} & {*lacking} and all(type(model.get_submodule(p)) is nn.Linear for p in more):
            settings.append(setting)
            places += more
    missing = sorted({*lacking} - {*places})
    if missing:
        raise ValueError(
            f"The edits have a b, and {missing[0]} of a {type(model).__name__} has no bias that could take it, nor a "
            "setting that gives it one: train without b, ReftConfig(bias=False), which merges everywhere."
        )
    return tuple(settings), places


def _lacks_bias(module: Any, edits: Sequence[Placed]) -> bool:
    """Whether the merged map has a bias and the module has none: c is not 0."""
    with torch.no_grad():
        zeros = (module.weight.new_zeros(1, edit.width) for _, edit in edits)
        return module.bias is None and any(
            bool(edit(state).any()) for state, (_, edit) in zip(zeros, edits, strict=True)
        )


def _merge_into(module: Any, edits: Sequence[Placed], merged: Merged) -> None:
    weight, bias = _computed(module, edits)
    merged.put(module.weight, weight if type(module) is nn.Linear else weight.T)
    if module.bias is not None:
        merged.put(module.bias, bias)


def _computed(module: Any, edits: Sequence[Placed]) -> tuple[Tensor, Tensor]:
    """(weight (outputs, inputs), bias) of a projection with the edits at its input and output, in float64."""
    with torch.no_grad():
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if module.weight.device.type == "mps" else module.weight.device
        weight = module.weight.detach().to(device, torch.float64)
        weight = (weight if type(module) is nn.Linear else weight.T).clone()
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(weight)
        for point, edit in edits:
            edit = copy.deepcopy(edit).to(device) if device != module.weight.device else edit
            width = weight.shape[0 if point.side == "output" else 1]
            columns = torch.tensor(range(width) if point.columns is None else point.columns, device=device)
            shift = edit(weight.new_zeros(1, len(columns)))[0]  # c
            if point.side == "output":
                bias = bias.index_copy(0, columns, edit(bias[columns][None])[0])
                weight = weight.index_copy(0, columns, (edit(weight[columns].T) - shift).T)
            else:
                bias = bias + weight[:, columns] @ shift
                weight = weight.index_copy(1, columns, _from_the_right(weight[:, columns], edit))
    return weight, bias


def _from_the_right(weight: Tensor, edit: Intervention) -> Tensor:
    """W A of an edit A h + c: the gradient of W-weighted edited states, since each of them is A h + c."""
    with torch.enable_grad():
        states = torch.zeros_like(weight, requires_grad=True)
        return torch.autograd.grad(edit(states), states, weight)[0]


def _outputs(module: Any) -> int:
    return int(module.weight.shape[0 if type(module) is nn.Linear else 1])


def _text_config(model: Any, config: Any = None) -> Any:
    config = getattr(model, "config", None) if config is None else config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
