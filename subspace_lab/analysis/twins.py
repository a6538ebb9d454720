"""Controls: what the same analysis gives on a model that cannot have learned what is claimed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from subspace_lab.model.offloading import is_offloaded, running_device


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A randomly initialised twin: the same class and configuration, weights as if training had never begun.

    A search that succeeds on the twin has found what the architecture and the data give away, not what the
    model learned (Sutter et al. 2025, arXiv 2507.08802, section 4).

    A transformers model is built anew from a copy of its configuration, so that the architecture's own
    initialisation draws the weights. Of any other module a copy is made and `reset_parameters` is called on
    its submodules, children first, as their construction does. Either draws on the CPU from a generator of its
    own: one seed gives one twin on every device, and the caller's random state stays where it was.

    Tied weights, dtypes, devices, train mode and gradient flags are those of `model`, which is not touched. The
    twin of a model whose weights accelerate offloads is in host memory, and offloaded from there if `model` runs
    elsewhere.

    Args:
        model: any module; weights are drawn for all of it.
        seed: of the draw.

    Raises:
        ValueError: quantised weights, a configuration that does not describe the model (its shapes or its ties
            were changed by hand), or plain submodules with parameters and no `reset_parameters`.
    """
    from_config = getattr(type(model), "_from_config", None)
    offloaded = is_offloaded(model)
    if offloaded and from_config is None:
        raise ValueError(
            f"The weights of this {type(model).__name__} are offloaded, and a copy of it has none to draw anew: make "
            "the twin first, and offload both."
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that would seed the accelerators too, which are not forked.
        torch.default_generator.manual_seed(seed)
        twin = _reset(model) if from_config is None else _built(model)
    _check_same_shape(model, twin)
    with torch.no_grad():
        mine, theirs = _tensors(twin), _tensors(model)
        for name, tensor in mine.items():
            # In place of the data, not of the parameter: what is tied stays tied.
            device = torch.device("cpu") if offloaded else theirs[name].device
            tensor.data = tensor.data.to(device, theirs[name].dtype)
            tensor.requires_grad_(theirs[name].requires_grad)
    for module, of_model in zip(twin.modules(), model.modules(), strict=True):
        module.training = of_model.training
    if offloaded and running_device(model).type != "cpu":
        from accelerate import cpu_offload

        cpu_offload(twin, running_device(model))
    return twin


def _built(model: nn.Module) -> nn.Module:
    """A transformers model from a copy of its configuration."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is quantised: no initialisation draws such weights. Load the model without "
            "quantisation and make the twin of that."
        )
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, dtype=model.dtype)  # type: ignore[attr-defined]
    if hasattr(model, "generation_config"):
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def _reset(model: nn.Module) -> nn.Module:
    """A copy of a plain module with every parameter drawn again."""
    twin = copy.deepcopy(model).to("cpu")
    stuck = []
    # Children come after their parents in `named_modules`. Reversed, a parent has the last word, as in its
    # constructor.
    for name, module in reversed(list(twin.named_modules())):
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.MultiheadAttention):  # torch's own, but for the underscore
            reset = module._reset_parameters
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            stuck.append(f"{name or 'the module itself'} ({type(module).__name__})")
    if stuck:
        raise ValueError(
            f"{type(model).__name__} cannot be initialised anew: these submodules have parameters and no "
            f"reset_parameters(): {', '.join(reversed(stuck))}. Give them one that draws their parameters."
        )
    return twin


def _check_same_shape(model: nn.Module, twin: nn.Module) -> None:
    """ValueError unless both have the same modules, shapes and ties."""
    asked, built = _outline(model), _outline(twin)
    if asked != built:
        names = sorted(n for n in asked.keys() | built.keys() if asked.get(n) != built.get(n))
        raise ValueError(
            f"The configuration of {type(model).__name__} does not describe it: a model built from it differs at "
            f"{names[:6]}{' and more' if len(names) > 6 else ''}."
        )
    if not is_offloaded(model) and _ties(model) != _ties(twin):  # offloading cuts the ties
        raise ValueError(
            f"{type(model).__name__} shares weights in another way than a model built from its configuration: "
            f"{_ties(model)} against {_ties(twin)}."
        )


def _outline(model: nn.Module) -> dict[str, object]:
    """The class of every module and the shape of every tensor."""
    shapes: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    return {**{name: type(module) for name, module in model.named_modules()}, **shapes}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _ties(model: nn.Module) -> list[tuple[str, ...]]:
    """The groups of names that stand for one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _tensors(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1)
