"""Blocks that keep a state instead of keys: state-space layers, convolutions, linear attention.

Keys of earlier tokens serve every edit, whatever token it begins at. A state sums up the tokens before one place.
So it is kept once for each place, "start", at which edits of the data set begin: after a pass over what is before.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from subspace_lab.engine.kept import Schedule, States
from subspace_lab.engine.plain import LAST
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.families import attends


class Recurrent:
    """The states of a model's blocks without attention.

    Args:
        backbone, chain: of the model, and its blocks in order.
        schedule: of the data set.
        starts: (rows,) each: the first token that runs, for every set of edits that is served.
    """

    def __init__(self, backbone: Backbone, chain: list[str], schedule: Schedule, starts: Iterable[Tensor]) -> None:
        self._backbone, self._schedule = backbone, schedule
        self.blocks = tuple(without_attention(backbone, chain))
        self.starts: list[Tensor] = []
        for start in starts:
            if self.number(start) is None:
                self.starts.append(start)

    def number(self, start: Tensor) -> int | None:
        """Which of the starts this is; None where it is none of them."""
        return next((i for i, known in enumerate(self.starts) if torch.equal(known, start)), None)

    def cache(self) -> Any:
        """An empty cache, with room for states where blocks keep any and for all keys elsewhere."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        empty: Any = DynamicCache(config=_text_config(self._backbone))
        empty.layers = [
            _kind()(layer.number_of_states) if i in self.blocks else DynamicLayer()
            for i, layer in enumerate(empty.layers)
        ]
        return empty

    def after(self, rows: Tensor, start: Tensor) -> States:
        """What is left behind by the tokens of some rows before a start: {(block, kind, number): (rows, …)}."""
        if not int(start.max()):
            return {}
        ids, positions, real = self._before(rows, start)
        device, filled = self._backbone.device, self.cache()
        for layer in (filled.layers[i] for i in self.blocks):
            layer.keeping = True
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": real.long()}
        head = self._backbone.head()
        assert head is not None
        with torch.no_grad():
            given = {name: tensor.to(device) for name, tensor in inputs.items()}
            stop = Hook(head, "input", LAST, lambda hidden: None)
            self._backbone.run({**given, "past_key_values": filled, "use_cache": True}, [stop], stop=True)
        # A row without any token before its start leaves what padding left: nothing.
        none = (start[rows] == 0).to(device)
        return {
            (i, kind, number): t.masked_fill(none.view(-1, *[1] * (t.ndim - 1)), 0)
            for i in self.blocks
            for kind, states in (
                ("conv", filled.layers[i].conv_states),
                ("recurrent", filled.layers[i].recurrent_states),
            )
            for number, t in states.items()
            if t is not None
        }

    def put(self, filled: Any, states: States, at: Tensor) -> Any:
        """A cache of earlier keys, with the states of rows `at` as well."""
        fresh = self.cache()
        layers = filled.layers or fresh.layers
        device = self._backbone.device
        for i in self.blocks:
            layers[i] = fresh.layers[i]
        for (i, kind, number), kept in states.items():
            layer = layers[i]
            given = kept.index_select(0, at.to(kept.device)).to(device, non_blocking=True)
            getattr(layer, f"{kind}_states")[number] = given
            getattr(layer, f"is_{kind}_states_initialized")[number] = True
            layer.has_previous_state[number] = True
            layer.dtype, layer.device = given.dtype, given.device
        filled.layers = layers
        return filled

    def _before(self, rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids, positions and mask of the tokens before a start, pushed right so that all end together."""
        tokens, first = self._schedule.tokens, start[rows]
        longest = max(1, int(first.max()))
        number = torch.arange(longest) - (longest - first)[:, None]
        inside = number.clamp_min(0)
        ids, positions = (t[rows].gather(1, inside) for t in (tokens.ids, tokens.position_ids))
        return ids, positions, number >= 0


def without_attention(backbone: Backbone, chain: list[str]) -> list[int]:
    """The numbers of a chain's blocks that hold no attention."""
    modules = backbone.anatomy.modules
    return [i for i, path in enumerate(chain) if not attends(modules[path])]


def unknown_states(backbone: Backbone, chain: list[str]) -> bool:
    """Whether some of the blocks without attention keep their states elsewhere than in the model's cache."""
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin

    layers = DynamicCache(config=_text_config(backbone)).layers
    held = [i for i, layer in enumerate(layers) if not isinstance(layer, CacheLayerMixin)]
    return len(layers) != len(chain) or held != without_attention(backbone, chain)


def _text_config(backbone: Backbone) -> Any:
    config: Any = backbone.model.config
    return config.get_text_config(decoder=True)


@cache
def _kind() -> type:
    from transformers.cache_utils import LinearAttentionLayer

    class FrozenStates(LinearAttentionLayer):
        """Gives the states that it holds; keeps new ones only while the data set is read.

        In training every step begins from the same states, and what a gradient goes through must not be written
        over.
        """

        keeping = False

        def update_conv_state(  # type: ignore[override]
            self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None
        ) -> Tensor:
            if self.keeping:
                return super().update_conv_state(conv_states, state_idx, conv_kernel_size)
            if not self.has_previous_state[state_idx]:
                return conv_states
            before: Any = self.conv_states[state_idx]
            return torch.cat([before, conv_states], -1)

        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:  # type: ignore[override]
            return (
                super().update_recurrent_state(recurrent_states, state_idx) if self.keeping else recurrent_states
            )

    return FrozenStates
