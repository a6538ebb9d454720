"""The tensors inside values such as models, pairs and methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of modules, dataclasses, mappings and lists."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, nn.Module):
        yield from (one for one in (*value.parameters(), *value.buffers()) if not one.is_meta)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name))
