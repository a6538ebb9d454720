"""Everything that depends on how transformers lays out its caches.

A cache has a layer for each block of the model. For a block with attention the layer holds the keys and values of the
tokens so far, (rows, heads, tokens, head width). For a block without attention it holds a state of fixed size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.engine.prefix import BlockStates, KeysAndValues

SIDES = ("keys", "values")
KINDS = ("conv", "recurrent")


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def empty_cache(model: nn.Module, state_blocks: Collection[int]) -> Any:
    """A cache that stores the keys of all tokens, also in layers with a sliding window.

    Args:
        state_blocks: numbers of the blocks with a state; their layers are `FrozenStates`.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not state_blocks:
        # Made without a configuration, it has no sliding windows.
        return DynamicCache()
    made: Any = DynamicCache(config=text_config(model))
    made.layers = [
        _frozen_states()(layer.number_of_states) if i in state_blocks else DynamicLayer()
        for i, layer in enumerate(made.layers)
    ]
    return made


def keys_and_values_in(filled: Any, blocks: Iterable[int]) -> KeysAndValues:
    """The keys and values of some blocks of a cache."""
    return {(i, side): getattr(filled.layers[i], side) for i in blocks for side in SIDES}


def filled_cache(found: KeysAndValues, depth: int, rows: int, tokens: int, device: torch.device) -> Any:
    """A cache of so many earlier tokens, as if the model had just read them.

    Args:
        found: keys and values, with room after those of the earlier tokens for the tokens that will run. Blocks without
        them are not run, so their layer only needs the right length.
        depth: how many blocks the model has.
    """
    from transformers import DynamicCache

    made = DynamicCache()
    if not tokens:
        return made
    nothing = torch.zeros(1, device=device).expand(rows, 1, tokens, 1)
    skipped = _with_room()(nothing, nothing, tokens)
    made.layers = [
        _with_room()(found[i, "keys"], found[i, "values"], tokens) if (i, "keys") in found else skipped
        for i in range(depth)
    ]
    return made


def record_states(made: Any, blocks: Iterable[int]) -> None:
    """Make the layers of some blocks store the states of the next run."""
    for i in blocks:
        made.layers[i].recording = True


def states_in(filled: Any, blocks: Iterable[int]) -> BlockStates:
    """The states of some blocks of a cache."""
    return {
        (i, kind, number): state
        for i in blocks
        for kind in KINDS
        for number, state in getattr(filled.layers[i], f"{kind}_states").items()
        if state is not None
    }


def put_states(filled: Any, model: nn.Module, states: BlockStates, blocks: Collection[int]) -> Any:
    """A cache of earlier keys and values, extended by the states of some blocks."""
    fresh = empty_cache(model, blocks)
    layers = filled.layers or fresh.layers
    for i in blocks:
        layers[i] = fresh.layers[i]
    for (i, kind, number), state in states.items():
        layer = layers[i]
        getattr(layer, f"{kind}_states")[number] = state
        getattr(layer, f"is_{kind}_states_initialized")[number] = True
        layer.has_previous_state[number] = True
        layer.dtype, layer.device = state.dtype, state.device
    filled.layers = layers
    return filled


def unserved_blocks(model: nn.Module, depth: int) -> str | None:
    """Which blocks have a layer in the cache that holds neither keys only nor a state only, in words; None if none."""
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

    layers = DynamicCache(config=text_config(model)).layers[:depth]
    kinds = [(isinstance(layer, CacheLayerMixin), isinstance(layer, LinearAttentionLayer)) for layer in layers]
    both = [i for i, kind in enumerate(kinds) if all(kind)]
    neither = [i for i, kind in enumerate(kinds) if not any(kind)]
    if both:
        return f"blocks {both} have attention and a state side by side, in one layer of the cache"
    return f"blocks {neither} have neither attention nor a state, and no layer of the cache" if neither else None


def caches_all_states(model: nn.Module, depth: int, state_blocks: Sequence[int]) -> bool:
    """Whether a cache of this model holds a state for each of these blocks, and keys and values for all others.

    Args:
        depth: how many blocks the model has. A model may have been shortened; its cache then has more layers.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin

    layers = DynamicCache(config=text_config(model)).layers[:depth]
    with_state = [i for i, layer in enumerate(layers) if not isinstance(layer, CacheLayerMixin)]
    return with_state == list(state_blocks)


class _Behind(torch.autograd.Function):
    """Writes new tokens after the earlier ones into memory reserved for them; `torch.cat` would copy both."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, whole: Tensor) -> Tensor:
        ctx.count = new.shape[-2]
        whole[..., -ctx.count :, :].copy_(new)
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][..., -ctx.count :, :], None


@cache
def _with_room() -> type:
    """The class below, which is created when transformers is first needed."""
    from transformers.cache_utils import DynamicLayer

    class WithRoom(DynamicLayer):
        """A layer with the earlier tokens, and room for the tokens of a single run."""

        def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
            super().__init__()
            self._whole: tuple[Tensor, Tensor] | None = (keys, values)
            self.keys, self.values = keys[..., :tokens, :], values[..., :tokens, :]
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any
        ) -> tuple[Tensor, Tensor]:
            whole, self._whole = self._whole, None
            new = (key_states, value_states)
            if whole is None or not all(
                one.shape[-2] + self.get_seq_length() == into.shape[-2] and one.dtype == into.dtype
                for one, into in zip(new, whole, strict=True)
            ):
                return super().update(key_states, value_states, *args, **named)
            self.keys, self.values = (_Behind.apply(one, into) for one, into in zip(new, whole, strict=True))
            return self.keys, self.values

    return WithRoom


@cache
def _frozen_states() -> type:
    """The class below, created when transformers is first needed."""
    from transformers.cache_utils import LinearAttentionLayer

    class FrozenStates(LinearAttentionLayer):
        """A layer that returns its states, and stores new ones only while it is recording.

        In training every step begins from the same states, and a tensor that a gradient needs must not be overwritten.
        """

        recording = False

        def update_conv_state(  # type: ignore[override]
            self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
        ) -> Tensor:
            if self.recording:
                return super().update_conv_state(conv_states, state_idx, conv_kernel_size)
            if not self.has_previous_state[state_idx]:
                return conv_states
            before: Any = self.conv_states[state_idx]
            return torch.cat([before, conv_states], -1)

        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:  # type: ignore[override]
            if self.recording:
                return super().update_recurrent_state(recurrent_states, state_idx)
            return recurrent_states

    return FrozenStates
