"""How a twin is made: build a model of the same structure, fill in its weights, and copy all other settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from subspace_lab.model.offloading import is_offloaded, named_weights, running_device


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Within the block, all random numbers come from this seed, on the CPU; the caller's random state is restored."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the accelerators, whose states are not restored.
        torch.default_generator.manual_seed(seed)
        yield


def built(model: nn.Module) -> nn.Module:
    """A transformers model from a copy of its configuration.

    If quantised weights were unpacked to floats, the twin has floats, also if the configuration still says quantised.
    """
    if packed := packed_weights(model):
        raise ValueError(
            f"{type(model).__name__} is quantised ({packed} is not a plain tensor of floats): no initialisation draws "
            "such weights. Load the model without quantisation and make its twin."
        )
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin: nn.Module = type(model)._from_config(config, dtype=model.dtype)  # type: ignore[attr-defined]
    if hasattr(model, "generation_config"):
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def is_built(model: nn.Module) -> bool:
    """Whether the twin of a model is built from a configuration; otherwise the model is copied."""
    return getattr(type(model), "_from_config", None) is not None


def copied(model: nn.Module) -> nn.Module:
    """A copy of a plain module, on the CPU."""
    if is_offloaded(model):
        raise ValueError(
            f"The weights of this {type(model).__name__} are offloaded, so a copy of it has none that could be drawn "
            "again: make the twin first, then offload both."
        )
    return copy.deepcopy(model).to("cpu")


def packed_weights(model: nn.Module) -> str | None:
    """The name of a weight that is not a plain tensor of floats; None if there is none."""
    for name, parameter in model.named_parameters():
        if (
            not parameter.is_floating_point()
            or type(parameter) is not nn.Parameter
            or type(parameter.data) is not Tensor
        ):
            return name
    return None


def finished(model: nn.Module, twin: nn.Module) -> nn.Module:
    """The twin with the dtypes, devices, train mode, gradient flags and offloading of the model."""
    check_same_outline(model, twin)
    offloaded = is_offloaded(model)
    with torch.no_grad():
        mine, theirs = tensors_of(twin), tensors_of(model)
        for name, tensor in mine.items():
            # The data is replaced and not the parameter, so tied weights stay tied.
            device = torch.device("cpu") if offloaded else theirs[name].device
            tensor.data = tensor.data.to(device, theirs[name].dtype)
            tensor.requires_grad_(theirs[name].requires_grad)
    for module, of_model in zip(twin.modules(), model.modules(), strict=True):
        module.training = of_model.training
    if offloaded and running_device(model).type != "cpu":
        from accelerate import cpu_offload

        cpu_offload(twin, running_device(model))
    return twin


def fill(model: nn.Module, twin: nn.Module, value: Callable[[str, Tensor], Tensor | None]) -> None:
    """Give a twin on the CPU new weights; a tensor with several names is set once.

    Args:
        value: (name, the model's weight) → the twin's new weight, or None to leave the twin's weight as it is.

    Raises:
        ValueError: a weight of the model that cannot be read.
    """
    theirs = dict(named_weights(model))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name not in theirs or theirs[name].is_meta:
                raise ValueError(
                    f"The weight {name} of this {type(model).__name__} is not in memory and cannot be read."
                )
            if (new := value(name, theirs[name].detach().to("cpu"))) is not None:
                parameter.data = new.to(theirs[name].dtype)


def check_same_outline(model: nn.Module, twin: nn.Module) -> None:
    """ValueError unless both have the same modules, shapes and ties."""
    asked, made = _outline(model), _outline(twin)
    if asked != made:
        names = sorted(n for n in asked.keys() | made.keys() if asked.get(n) != made.get(n))
        raise ValueError(
            f"The configuration of {type(model).__name__} does not describe it: a model built from it differs in "
            f"{names[:6]}{' and more' if len(names) > 6 else ''}."
        )
    if not is_offloaded(model) and _ties(model) != _ties(twin):  # offloading removes the ties
        raise ValueError(
            f"{type(model).__name__} shares weights in another way than a model built from its configuration: it has "
            f"the ties {_ties(model)}, the built model has {_ties(twin)}."
        )


def names_of(model: nn.Module) -> dict[int, set[str]]:
    """{id of a parameter: all names that it has}."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(name)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def _outline(model: nn.Module) -> dict[str, object]:
    """The class of every module and the shape of every tensor."""
    shapes: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    return {**{name: type(module) for name, module in model.named_modules()}, **shapes}


def _ties(model: nn.Module) -> list[tuple[str, ...]]:
    """The groups of names that belong to one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1)
