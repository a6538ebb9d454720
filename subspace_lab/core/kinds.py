"""What can be saved says itself how: the common base of subspaces, values and interventions.

A *kind* is a class whose instances are saved in files and rebuilt from them. `core/checkpoints.py` knows no kind
by name: it asks each module for its `description`, and each class to `rebuild` itself. A kind of one's own needs
only its own file or notebook cell:

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

    `model.to(torch.bfloat16)` on a parent would round a basis to 8 bits, and QR has no half kernels on CPU.
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
        renamed: {name in older files: name of the parameter or buffer now}.
        vectors_along: {name of a tensor of basis vectors: the axis along which each of them is}.
    """

    made_of: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    vectors_along: ClassVar[Mapping[str, int]] = {}

    def description(self) -> dict[str, Any]:
        """What rebuilds the module besides its own tensors: the constructor's arguments, as JSON or as kinds."""
        return {}

    @classmethod
    def rebuild(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """A module of this description; its tensors are loaded afterwards."""
        return cls(**description)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for old, new in self.renamed.items():
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")
        self._check_numbers(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_numbers(self, state_dict: Any, prefix: str) -> None:
        """ValueError for numbers that no edit can have: NaN, infinite or whole ones, basis vectors of zeros."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, mine in own.items():
            given = state_dict.get(f"{prefix}{name}")
            if isinstance(given, Tensor) and mine.is_floating_point():
                finite(given, f"{prefix}{name}")
                axis = self.vectors_along.get(name.partition(".")[0])
                if axis is not None:
                    no_zero_vector(given, axis, f"{prefix}{name}")
