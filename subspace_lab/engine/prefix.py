"""What is computed once: states, keys and values, and the states of blocks without attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

BlockStates = dict[tuple[int, str, int], Tensor]
"""{(block, kind, number): (rows, …)} of blocks that have a state instead of keys and values."""
KeysAndValues = Mapping[tuple[int, str], Tensor]
"""{(block, "keys" or "values"): (rows, heads, tokens, head width)}"""


@dataclass(frozen=True)
class Group:
    """Keys and values of the same shape.

    Attributes:
        labels: (block, "keys" or "values") of each.
        tensor: (labels, rows, tokens, heads, head width).
    """

    labels: list[tuple[int, str]]
    tensor: Tensor


@dataclass(frozen=True)
class Prefix:
    """What a pass over some rows stored.

    Attributes:
        states: {boundary: (rows, tokens, width)} states at the input of the block with this number.
        groups: keys and values of the earlier tokens.
        recurrent: for each start, the states of blocks without attention after the tokens before it.
    """

    states: dict[int, Tensor]
    groups: list[Group] = field(default_factory=list)
    recurrent: list[BlockStates] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Everything that is stored."""
        recurrent = (t for states in self.recurrent for t in states.values())
        return [*self.states.values(), *(group.tensor for group in self.groups), *recurrent]

    def nbytes(self) -> int:
        """Its size in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def room_for(self, rows: int, device: torch.device, pinned: bool) -> Prefix:
        """An uninitialised prefix for more rows, optionally in pinned host memory."""

        def room(like: Tensor, axis: int) -> Tensor:
            shape = (*like.shape[:axis], rows, *like.shape[axis + 1 :])
            return torch.empty(shape, dtype=like.dtype, device=device, pin_memory=pinned)

        states = {boundary: room(t, 0) for boundary, t in self.states.items()}
        groups = [Group(g.labels, room(g.tensor, 1)) for g in self.groups]
        recurrent = [{name: room(t, 0) for name, t in found.items()} for found in self.recurrent]
        return Prefix(states, groups, recurrent)

    def put(self, start: int, part: Prefix) -> None:
        """Copy a prefix of some rows into this one, from row `start` on."""
        for boundary, t in part.states.items():
            self.states[boundary][start : start + len(t)].copy_(t)
        for into, group in zip(self.groups, part.groups, strict=True):
            into.tensor[:, start : start + group.tensor.shape[1]].copy_(group.tensor)
        for into_states, found in zip(self.recurrent, part.recurrent, strict=True):
            for name, t in found.items():
                into_states[name][start : start + len(t)].copy_(t)

    def keys_and_values(self, at: Tensor, tokens: Tensor, boundary: int, device: torch.device) -> KeysAndValues:
        """Keys and values of the `tokens` (rows, tokens) of rows `at`, in the blocks from a boundary on."""
        return dict(chain.from_iterable(_of_group(group, at, tokens, boundary, device) for group in self.groups))


def grouped(found: KeysAndValues, columns: Tensor) -> list[Group]:
    """Keys and values at some (rows, tokens) columns, grouped by shape, in the order of the blocks."""
    shapes: dict[Any, list[tuple[int, str]]] = {}
    for label, t in found.items():
        shapes.setdefault((t.shape, t.dtype, t.device), []).append(label)
    groups = []
    for labels in shapes.values():
        index = columns.to(found[labels[0]].device)[:, :, None, None]
        chosen = [found[label].transpose(1, 2).take_along_dim(index, 1) for label in labels]
        groups.append(Group(labels, torch.stack(chosen)))
    return groups


def gather_tokens(stored: Tensor, at: Tensor, tokens: Tensor, axis: int) -> Tensor:
    """The `tokens` (rows, tokens) of rows `at`. The tensor's axis of rows is followed by its axis of tokens.

    One look-up of whole tokens is several times faster than an index for each axis.
    """
    index = (at[:, None] * stored.shape[axis + 1] + tokens).flatten().to(stored.device)
    return stored.flatten(axis, axis + 1).index_select(axis, index).unflatten(axis, tokens.shape)


def _of_group(
    group: Group, at: Tensor, tokens: Tensor, boundary: int, device: torch.device
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    for label, stored in zip(group.labels, group.tensor.unbind(0), strict=True):
        if label[0] >= boundary:
            # Block by block: memory for all blocks at once is returned to the system by the allocator after each step,
            # and requesting it again takes several times as long as the copying.
            chosen = gather_tokens(stored, at, tokens, 0).to(device, non_blocking=True)
            yield label, chosen.transpose(1, 2)
