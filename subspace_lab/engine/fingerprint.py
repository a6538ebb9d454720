"""Whether a model and a data set are unchanged since something was computed from them.

Comparing every number would cost as much as the run that was saved. Instead several cheap signs are compared: the
objects that the modules hold, torch's counters of in-place writes, addresses, hooks, plain attributes (an epsilon, a
scale, a replaced `forward`), and a sample of the numbers themselves. The sample is for writes that torch does not
count, through `.data` or numpy: it detects a write that changes most of a tensor, but may miss one that changes a
single number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.model.batches import Batch
from subspace_lab.model.offloading import in_host_memory, is_offloaded, running_device

_RANDOM = re.compile(r"drop|jitter|noise")
_ADAPTERS = (
    "_disable_adapters",
    "_active_adapter",
    "merged_adapters",
)  # of peft: they decide which weights are used
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEIGHTS_SAMPLED, DATA_SAMPLED, COMPARED = 64, 4096, 4096
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, *_FUNCTIONS)
# Attributes that no state depends on: how gradients are computed, and torch's own notes.
_NO_MATTER = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_is_full_backward_hook",
    "_is_hf_initialized",
)


class Fingerprint:
    """Records the state of a model and of some tensors; `changed()` says what is different now.

    Args:
        model: its modules, parameters, buffers, forward hooks, train modes and plain attributes, the numbers in its
            configuration and its active adapters are recorded; None for no model.
        data: a function that returns the tensors of the data. It is called at each comparison, so that replaced
            tensors are detected.
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
        self._values = self._settings_now()
        self._numbers = self._precision()
        self._hook_tables = [t for m in self._modules for t in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = self._hooks_now()
        self._without_forward = [vars(m) for m in self._modules if "forward" not in vars(m)]
        self._kinds = {id(kind): (kind, _forward(kind)) for kind in map(type, self._modules)}
        self._classes = [type(m) for m in self._modules]
        config = getattr(model, "config", None)
        configs = {id(c): c for m in self._modules if (c := getattr(m, "config", None)) is not None}
        watched = [(vars(m), _plain_names(m)) for m in self._modules]
        watched += [(vars(c), _numbers_in(c)) for c in (config, *configs.values()) if hasattr(c, "__dict__")]
        self._watch(watched)
        unique = {id(t): t for t in self._objects if isinstance(t, Tensor)}
        self._counted = [t for t in unique.values() if not t.is_inference()]
        self._placed = [t for t in unique.values() if type(t) in (Tensor, nn.Parameter) and not t.is_meta]
        self._versions = [t._version for t in self._counted]
        buffers = {id(b) for m in self._modules for b in m._buffers.values()}
        self._copies = {
            i: t.clone() for i, t in enumerate(self._counted) if id(t) in buffers and t.numel() <= COMPARED
        }
        self._addresses = [t.data_ptr() for t in self._placed]
        # The samples are views: as long as they exist, no new tensor can have an old one's address.
        of_data = {id(t) for t in data()}
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for t in self._placed:
            sample = _sample(t, DATA_SAMPLED if id(t) in of_data else WEIGHTS_SAMPLED)
            if sample is not None:
                groups[sample.dtype, sample.device].append(sample)
        self._samples = [(views, torch.cat(views)) for views in groups.values()]

    def changed(self) -> str | None:
        """What has changed since construction, in words; None if nothing has."""
        found = self._found()
        if len(found) != len(self._objects) or not all(map(is_, found, self._objects)):
            return "weights, modules or inputs were replaced"
        if self._written():
            return "weights or inputs were written"
        if [t.data_ptr() for t in self._placed] != self._addresses:
            return "weights or inputs were moved"
        if self._settings_now() != self._values or self._precision() != self._numbers:
            return "dropout, adapters or autocast were switched"
        if self._hooks_now() != self._hooks:
            return "forward hooks were added or removed"
        if (
            any("forward" in attributes for attributes in self._without_forward)
            or not all(map(is_, map(type, self._modules), self._classes))
            or any(_forward(kind) is not was for kind, was in self._kinds.values())
        ):
            return "a forward was replaced"
        if self._plain_now() != self._plain:
            return f"attributes of modules were set: {', '.join(self._different()) or 'some'}"
        if not all(torch.equal(torch.cat(views), sample) for views, sample in self._samples):
            return "weights or inputs were written"
        return None

    def settle(self) -> None:
        """Ignore the plain attributes that are different now, because a run of the model itself sets them."""
        changing = self._different()
        self._watch([(attributes, [n for n in names if n not in changing]) for attributes, names in self._watched])

    def _watch(self, watched: list[tuple[dict[str, Any], list[str]]]) -> None:
        self._watched = [(attributes, names) for attributes, names in watched if names]
        self._getters = [(itemgetter(*names), attributes) for attributes, names in self._watched]
        self._plain = self._plain_now()

    def _plain_now(self) -> list[Any]:
        try:
            return [get(attributes) for get, attributes in self._getters]
        except KeyError:  # an attribute was deleted
            return []

    def _different(self) -> list[str]:
        """The names of the attributes that have changed."""
        names = []
        for (attributes, own), was in zip(self._watched, self._plain, strict=True):
            values = (was,) if len(own) == 1 else was
            names += [n for n, v in zip(own, values, strict=True) if n not in attributes or attributes[n] != v]
        return list(dict.fromkeys(names))

    def _written(self) -> bool:
        """Whether a tensor was written. Writing the same numbers into a small buffer does not count."""
        versions = [t._version for t in self._counted]
        if versions == self._versions:
            return False
        changed = [i for i, (now, was) in enumerate(zip(versions, self._versions, strict=True)) if now != was]
        if any(i not in self._copies or not torch.equal(self._counted[i], self._copies[i]) for i in changed):
            return True
        self._versions = versions
        return False

    def _hooks_now(self) -> list[tuple[int, ...]]:
        """The numbers of all forward hooks, in order, without those of transformers, which only read."""
        return [
            (place, *(number for number, hook in table.items() if not _reads_alone(hook)))
            for place, table in enumerate(self._hook_tables)
            if table and not all(map(_reads_alone, table.values()))
        ]

    def _found(self) -> list[Any]:
        if not self._offloaded:
            return [*(value for table in self._tables for value in table.values()), *self._data()]
        # Offloaded parameters are new objects in each run; the tensors in `_kept`, from which they are filled, stay.
        held = (value for table in self._tables for value in table.values())
        held = (None if isinstance(value, Tensor) and value.is_meta else value for value in held)
        return [*held, *self._kept, *self._data()]

    def _settings_now(self) -> list[Any]:
        values = [variables.get(name) for variables, name in self._settings]
        return [list(v) if isinstance(v, list) else v for v in values]

    def _precision(self) -> tuple[bool, torch.dtype | None]:
        on = torch.is_autocast_enabled(self._autocast)
        return on, torch.get_autocast_dtype(self._autocast) if on else None


def _plain_names(module: nn.Module) -> list[str]:
    """The names of a module's attributes that are numbers, text or functions, with its train mode and `forward`."""
    return [
        name
        for name, value in vars(module).items()
        if name == "forward" or (type(value) in _PLAIN and name not in _NO_MATTER)
    ]


def _numbers_in(config: Any) -> list[str]:
    """The names of the settings of a configuration that a forward pass may use in its computation."""
    return [name for name, value in vars(config).items() if type(value) is float]


def _forward(kind: type) -> Any:
    return getattr(kind, "forward", None)


def _reads_alone(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def tensors_of(batch: Batch, *more: Tensor | None) -> list[Tensor]:
    """Every tensor of a batch, and the given further ones."""
    known = (*batch.inputs.values(), *batch.columns.values(), batch.positional, batch.prompt_lengths, *more)
    return [t for t in known if isinstance(t, Tensor)]


def why_not_frozen(model: nn.Module) -> str | None:
    """Why the model's states are not a function of each row alone; None if they are.

    Detected from the types of the modules and from the dropout rates among their attributes. Dropout that is active
    elsewhere is found by the numerical check.
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
    """A view of about `count` of a tensor's numbers as integers with the same bits, so that NaN equals itself."""
    dense = tensor.detach()
    if not dense.is_contiguous():
        strides = dense.stride()
        dense = dense.permute(sorted(range(dense.ndim), key=lambda axis: -strides[axis]))
    if dense.layout != torch.strided or not dense.is_contiguous() or dense.element_size() not in _BITS:
        return None
    return dense.view(-1).view(_BITS[dense.element_size()])[:: max(1, dense.numel() // count)]
