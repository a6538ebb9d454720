"""Whether a model and a data set are still what they were when something was computed from them.

Comparing every number would cost as much as the run that was saved, so several cheap signs are compared instead:
which objects the modules hold, torch's counters of in-place writes, addresses, train modes, and a sample of the
numbers themselves. The sample is for writes that torch does not count, through `.data` or numpy: one that changes
most of a tensor is seen, one that changes a single number may not be.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.model.batches import Batch
from subspace_lab.model.offloading import in_host_memory, is_offloaded, running_device

_RANDOM = re.compile(r"drop|jitter|noise")
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters")  # of peft: which weights are in force
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEIGHTS_SAMPLED, DATA_SAMPLED = 64, 4096


class Fingerprint:
    """Remembers how a model and some tensors are; `changed()` says whether they are different now.

    Args:
        model: its modules, parameters, buffers, train modes, dropout rates and active adapters; None for none.
        data: called at each comparison for the tensors of the data, so that replaced ones are seen.
    """

    def __init__(self, model: nn.Module | None, data: Callable[[], Sequence[Tensor]]) -> None:
        self._data = data
        self._kept = [] if model is None else in_host_memory(model)
        self._modules = [] if model is None else list(model.modules())
        self._tables = [t for m in self._modules for t in (m._parameters, m._buffers, m._modules) if t]
        self._settings = [(vars(m), name) for m in self._modules for name in vars(m) if _is_setting(m, name)]
        self._offloaded = model is not None and is_offloaded(model)
        self._autocast = "cpu" if model is None else running_device(model).type
        self._objects = self._found()
        self._modes, self._values = [m.training for m in self._modules], self._settings_now()
        self._numbers = self._precision()
        unique = {id(t): t for t in self._objects if isinstance(t, Tensor)}
        self._counted = [t for t in unique.values() if not t.is_inference()]
        self._placed = [t for t in unique.values() if type(t) in (Tensor, nn.Parameter) and not t.is_meta]
        self._versions = [t._version for t in self._counted]
        self._addresses = [t.data_ptr() for t in self._placed]
        # The samples are views: as long as they live, no new tensor can take an old one's address.
        of_data = {id(t) for t in data()}
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for t in self._placed:
            sample = _sample(t, DATA_SAMPLED if id(t) in of_data else WEIGHTS_SAMPLED)
            if sample is not None:
                groups[sample.dtype, sample.device].append(sample)
        self._samples = [(views, torch.cat(views)) for views in groups.values()]

    def changed(self) -> bool:
        """Whether anything is different from what it was at construction."""
        found = self._found()
        return (
            len(found) != len(self._objects)
            or not all(map(is_, found, self._objects))
            or [m.training for m in self._modules] != self._modes
            or [t._version for t in self._counted] != self._versions
            or [t.data_ptr() for t in self._placed] != self._addresses
            or self._settings_now() != self._values
            or self._precision() != self._numbers
            or not all(torch.equal(torch.cat(views), sample) for views, sample in self._samples)
        )

    def _found(self) -> list[Any]:
        held = [value for table in self._tables for value in table.values()]
        if self._offloaded:  # such parameters are other objects after each run; what they are filled from stays
            held = [None if isinstance(value, Tensor) and value.is_meta else value for value in held]
            held += self._kept
        return [*held, *self._data()]

    def _settings_now(self) -> list[Any]:
        values = [variables.get(name) for variables, name in self._settings]
        return [list(v) if isinstance(v, list) else v for v in values]

    def _precision(self) -> tuple[bool, torch.dtype | None]:
        on = torch.is_autocast_enabled(self._autocast)
        return on, torch.get_autocast_dtype(self._autocast) if on else None


def tensors_of(batch: Batch, *more: Tensor | None) -> list[Tensor]:
    """Every tensor of a batch, and some more."""
    known = (*batch.inputs.values(), *batch.columns.values(), batch.positional, batch.prompt_lengths, *more)
    return [t for t in known if isinstance(t, Tensor)]


def why_not_frozen(model: nn.Module) -> str | None:
    """Why the model's states are not a function of each row alone; None where they are.

    Known from the kinds of the modules and the rates among their attributes; dropout that is active anywhere else
    shows in the numerical check.
    """
    for name, module in model.named_modules():
        if not module.training:
            continue
        where = name or type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return f"{where} normalises by the batch"
        rates = [rate for key, rate in vars(module).items() if _is_setting(module, key) and key not in _ADAPTERS]
        if isinstance(module, nn.RReLU) or any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return f"dropout is active in {where}"
    return None


def _is_setting(module: nn.Module, name: str) -> bool:
    if name == "p":
        return isinstance(module, nn.modules.dropout._DropoutNd)
    return name in _ADAPTERS or (_RANDOM.search(name) is not None and isinstance(vars(module)[name], float))


def _sample(tensor: Tensor, count: int) -> Tensor | None:
    """About `count` of a tensor's numbers as a view of them, bit by bit, so that NaN equals itself."""
    dense = tensor.detach()
    if not dense.is_contiguous():
        strides = dense.stride()
        dense = dense.permute(sorted(range(dense.ndim), key=lambda axis: -strides[axis]))
    if dense.layout != torch.strided or not dense.is_contiguous() or dense.element_size() not in _BITS:
        return None
    return dense.view(-1).view(_BITS[dense.element_size()])[:: max(1, dense.numel() // count)]
