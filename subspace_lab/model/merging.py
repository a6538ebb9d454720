"""Merges edits into weights: an affine edit of all tokens at a projection equals a projection with other weights.

The edit A h + c at the output or input of a linear map y = W x + b gives the linear map

    W' = A W        b' = A b + c                   at its output (`mlp_output`, `attention_output`, `value_output`, …)
    W' = W A        b' = b + W c                   at its input (`head_output`, `mlp_activation`)

with A = I + Dᵀ M and c = Dᵀ v in the notation of `core/interventions.py`, M = W − R for LoReFT. Where a site is some
of the projection's columns (single heads, the values of a fused projection), A and c apply only to these columns.
The merged model computes the same function, does not need this package and is as fast as the model was. Every edit
that is not one affine map of every token's state at one projection is refused, with the reason.
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
    """Edits that were merged into the weights of a model.

    Attributes:
        edits: {site: intervention}, the merged edits.
        settings: the settings of the model's configuration that were switched on for the biases that the edits need.
    """

    edits: Mapping[Site, Intervention]
    settings: tuple[str, ...] = ()
    _model: Any = None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _added: list[Any] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the former weights are kept, so that the merge can be undone."""
        return self._model is not None

    def undo(self) -> None:
        """Restore the model's former weights, bit for bit, and its configuration.

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
        for module in self._added:  # trainable if the projection is
            if module.bias is not None:
                module.bias.requires_grad_(module.weight.requires_grad)
        self._model, self._kept, self._added = None, [], []

    def put(self, tensor: Tensor, new: Tensor) -> None:
        """Write new values into a tensor of the model and keep a copy of the former ones.

        Raises:
            ValueError: values that are too large for the dtype of the tensor.
        """
        self._kept.append((tensor, tensor.detach().clone()))
        with torch.no_grad():
            tensor.copy_(new)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The merged weights are not finite in {tensor.dtype}: load the model in float32.")


def merge(backbone: Backbone, edits: Mapping[Site, Intervention]) -> Merged:
    """Merge edits of all tokens into the weights of the model.

    Afterwards the model gives the same outputs as with the edits, up to rounding (computed in float64), at every token
    that is not padding. It is the same object with the same methods, such as `save_pretrained`. Everything is checked
    before a weight is changed.

    Args:
        backbone: the backbone of the model.
        edits: {site: intervention}: LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT, RED, steering or ablation.

    Returns:
        The merge; its `undo` restores the weights.

    Raises:
        TypeError: a model instead of a backbone; edits that are not {site: intervention}.
        ValueError: an edit that cannot be merged, or weights that cannot take one: positions other than "all"; an edit
            that is not affine (an activation, a source, one value for each example); dropout in train mode; a site
            that is not the input or output of one linear map; weights that are shared, quantised, offloaded or
            wrapped; two edits of the same columns; an edit with b at a projection without bias, if no setting adds it.
        IndexError: a layer that the model does not have.
    """
    with torch.inference_mode(False):
        placed, settings, places = _checked(backbone, edits)
        modules: dict[str, Any] = {path: backbone.anatomy.modules[path] for path in placed}
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


def refuse_merge(backbone: Backbone, edits: Mapping[Site, Intervention]) -> None:
    """The errors of `merge`, for edits that are not merged now."""
    with torch.inference_mode(False):
        _checked(backbone, edits)


def _checked(
    backbone: Backbone, edits: Mapping[Site, Intervention]
) -> tuple[dict[str, list[Placed]], tuple[str, ...], list[str]]:
    """The edits of each projection, the settings to switch on, and the modules that get a bias."""
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
                    f"{site} and another edit act on the same dimensions at {point.path}; merge only one of them."
                )
        placed.setdefault(point.path, []).append((point, edit))
    _refuse_shared(backbone.model, list(placed))
    lacking = [path for path, some in placed.items() if _lacks_bias(backbone.anatomy.modules[path], some)]
    return placed, *_settings_for(backbone.model, lacking)


def refuse_model(model: nn.Module) -> None:
    """ValueError for a model whose weights are not plain floating-point numbers in memory."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"This {type(model).__name__} is quantised: merged weights would be rounded to a few bits. Load the model "
            "without quantisation and merge there, or use the edits with `generate`."
        )
    if is_offloaded(model) or is_unloaded(model):
        raise ValueError(
            f"The weights of this {type(model).__name__} are not in memory between runs (offloaded, or on 'meta'), and "
            "cannot be changed: load the whole model, for example on the CPU."
        )


def refuse_edit(site: Site, edit: Intervention) -> None:
    """ValueError for an edit that is not an affine map of every token's state."""
    why = None
    if site.positions != "all":
        why = f"it acts at the positions {site.positions!r}, weights at all tokens; use it with `generate`"
    elif edit.needs_source:
        why = "it needs a source, which weights do not have"
    elif not edit.is_affine:
        why = (
            "it is not one affine map of the state (another activation than 'linear', a value for each example, or a "
            "value whose class does not set `is_affine`); use it with `generate`"
        )
    elif edit.dropout.p and edit.training:
        why = (
            f"it is in train mode and drops coordinates at random (dropout={edit.dropout.p}): call `eval()` first"
        )
    if why is not None:
        raise ValueError(f"{site} cannot be merged into weights: {why}.")


def overlap(one: HookPoint, other: HookPoint) -> bool:
    """Whether two hook points share dimensions of one stream."""
    if (one.path, one.side) != (other.path, other.side):
        return False
    return one.columns is None or other.columns is None or bool({*one.columns} & {*other.columns})


def _refuse_place(backbone: Backbone, site: Site, edit: Intervention, point: HookPoint) -> None:
    """ValueError for a site that is not at a plain linear map."""
    from transformers.pytorch_utils import Conv1D

    module: Any = backbone.anatomy.modules[point.path]
    kind, why = type(module), None
    if kind not in (nn.Linear, Conv1D):
        why = (
            f"{point.path or 'the model'} is a {kind.__module__}.{kind.__name__}, not a plain linear map. Edits can be "
            "merged at mlp_output, attention_output, value_output, head_output and mlp_activation; use other edits "
            "with `generate`"
        )
    elif not backbone.is_plain(point.path) or not module.weight.is_floating_point():
        why = f"something wraps or hooks {point.path}, or its weights are not plain numbers (quantised, offloaded)"
    elif edit.width != point.width:
        why = f"it has width {point.width}, the intervention was made for {edit.width}"
    if why is not None:
        raise ValueError(f"{site} cannot be merged into weights: {why}.")


def _refuse_shared(model: nn.Module, paths: Sequence[str]) -> None:
    """ValueError if the model uses a projection, or its weights, in another place as well."""
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
                    "Untie the two in the model first, or use the edit with `generate`."
                )


def _settings_for(model: nn.Module, lacking: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The settings that give these modules a bias, and all modules that get one from these settings.

    A second model is built from the changed configuration on the device "meta", and its parameters are compared: a
    saved model is loaded with these parameters.
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
            f"The edits have a b, but {missing[0]} of a {type(model).__name__} has no bias that could take it, and no "
            "setting adds one: train without b, ReftConfig(bias=False). Such edits do not need a bias."
        )
    return tuple(settings), places


def _lacks_bias(module: Any, edits: Sequence[Placed]) -> bool:
    """Whether the merged map has a bias (c is not 0) but the module has none."""
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
    """W A for an edit A h + c: the gradient of the edited states, weighted by W, with respect to h."""
    with torch.enable_grad():
        states = torch.zeros_like(weight, requires_grad=True)
        return torch.autograd.grad(edit(states), states, weight)[0]


def _outputs(module: Any) -> int:
    return int(module.weight.shape[0 if type(module) is nn.Linear else 1])


def _text_config(model: Any, config: Any = None) -> Any:
    config = getattr(model, "config", None) if config is None else config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
