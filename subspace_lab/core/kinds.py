"""The common base of subspaces, values and interventions: they describe how they are saved.

A *kind* is a class whose instances can be saved in files and rebuilt from them. `core/checkpoints.py` knows no kind by
name: it uses the `description` of each module, and the method `rebuild` of each class. Your own kind needs only its own
file or notebook cell:
    class Doubled(Value):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def change(self, subspace, h, source, write):
            return (self.factor - write) * subspace.read(h)

        def description(self):
            return {"factor": self.factor}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import finite, no_zero_vector


class FullPrecision(nn.Module):
    """A module whose parameters stay float32 (or float64) when it is cast to a half precision.

    `model.to(torch.bfloat16)` on a parent would round a basis to 8 bits, and there is no QR in half precision on CPUs.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


class Kind(FullPrecision):
    """A module that can be saved and rebuilt.

    Attributes:
        made_of: the entries of the description that are themselves kinds (or mappings {name: kind}).
        renamed: {name in older files: present name of the parameter or buffer}.
        vectors_along: {name of a tensor of basis vectors: the axis along which each vector lies}.
    """

    made_of: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    vectors_along: ClassVar[Mapping[str, int]] = {}

    def description(self) -> dict[str, Any]:
        """Everything but the tensors that is needed to rebuild the module: the constructor's arguments."""
        return {}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """A module with this description; its tensors are loaded afterwards."""
        return cls(**description)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for old, new in self.renamed.items():
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")
        self._check_numbers(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_numbers(self, state_dict: Any, prefix: str) -> None:
        """ValueError for tensors that no edit can have: NaN, infinity, whole numbers, basis vectors of zeros."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, mine in own.items():
            given = state_dict.get(f"{prefix}{name}")
            if isinstance(given, Tensor) and mine.is_floating_point():
                finite(given, f"{prefix}{name}")
                axis = self.vectors_along.get(name.partition(".")[0])
                if axis is not None:
                    no_zero_vector(given, axis, f"{prefix}{name}")
