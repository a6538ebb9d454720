"""Offloaded weights: accelerate keeps them in host memory or on disk, and loads them for each run.

It puts a hook on a module (`_hf_hook`) that loads the weights before the module runs and removes them afterwards.
Between runs the weights are on "meta", a device without memory. So use the functions here to get the numbers of the
weights, and call the module itself to get a product with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def align_hooks(module: nn.Module) -> list[Any]:
    """The hooks with which accelerate acts before and after a module runs."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are loaded only for each run."""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in align_hooks(module))


def is_unloaded(model: nn.Module) -> bool:
    """Whether the weights are on "meta" and nothing loads them: such a model has sizes, but cannot be run."""
    first = next(model.parameters(), None)
    return first is not None and first.is_meta and not is_offloaded(model)


def running_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs (the CPU for a model without parameters).

    Raises:
        ValueError: weights on "meta" that nothing loads.
    """
    first = next(model.parameters(), None)
    if first is None:
        return torch.device("cpu")
    if not first.is_meta:
        return first.device
    for module in model.modules():
        for hook in align_hooks(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    raise ValueError(
        f"The weights of this {type(model).__name__} are on 'meta', a device without memory, and nothing loads them "
        "for a run: load them first."
    )


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters by name, each once; offloaded ones from where they are stored."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in parameters.items():
        if parameter.is_meta and tied.get(name) in parameters:
            continue  # offloading separates tied weights; this weight is given under its other name
        path, _, own = name.rpartition(".")
        kept = _kept(modules[path], own) if parameter.is_meta else None
        yield name, parameter if kept is None else kept


def in_host_memory(model: nn.Module) -> list[Tensor]:
    """The offloaded weights that are in memory, without those on disk."""
    found = []
    for module in model.modules():
        for hook in align_hooks(module):
            if getattr(hook, "offload", False):
                for name in (*module._parameters, *module._buffers):
                    store, key = _store(hook.weights_map, name)
                    value = store.get(key) if isinstance(store, dict) else None
                    if isinstance(value, Tensor):
                        found.append(value)
    return found


def _kept(module: nn.Module, name: str) -> Tensor | None:
    for hook in align_hooks(module):
        try:
            return hook.weights_map[name]
        except (AttributeError, TypeError, KeyError):  # this hook keeps no weights, or not this one
            continue
    return None


def _store(weights: Any, key: str) -> tuple[Any, str]:
    """The store that finally contains the weight of this name, and its key there."""
    while hasattr(weights, "prefix"):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    return getattr(weights, "state_dict", weights), key
