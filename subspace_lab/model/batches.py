"""A batch: the inputs of a model, and facts about its rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.model.cache_argument import NAMES, forward_name, given_cache, named_for, without_cache
from subspace_lab.model.families import TEXT

SENSES = ("input_features", "input_values", "pixel_values")  # inputs of sound and images, instead of tokens


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, with the facts about their rows that are needed to count positions.

    Attributes:
        inputs: keyword arguments of the model's forward; the first axis of every tensor is the rows. A key-value cache
            may be among them, under any of the names that transformers has used for it.
        prompt_lengths: (batch,) how many real tokens of each row belong to the prompt; None for all of them.
        columns: named positions, {name: (batch,) or (batch, several)}, counted from a row's first real token.
        positional: the single positional input of a plain module, instead of `inputs`.
    """

    inputs: Mapping[str, Any] = field(default_factory=dict)
    prompt_lengths: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    positional: Tensor | None = None

    @classmethod
    def of(cls, inputs: Batch | Mapping[str, Any] | Tensor) -> Batch:
        """A batch from a batch, a tokenizer's output, or one tensor.

        Raises:
            TypeError: anything else.
        """
        if isinstance(inputs, Batch):
            return inputs
        if isinstance(inputs, Tensor):
            return cls(positional=inputs)
        if not isinstance(inputs, Mapping):
            raise TypeError(
                "A batch must be a Batch, a mapping of a model's keyword arguments (a tokenizer's output) or a tensor; "
                f"found {type(inputs).__name__}. Tokenise texts first."
            )
        return cls(dict(inputs))

    def __len__(self) -> int:
        if self.positional is not None:
            return len(self.positional)
        for name, flat in (("input_ids", 2), ("inputs_embeds", 3)):
            if isinstance(self.inputs.get(name), Tensor):
                return len(_one_axis(self.inputs[name], flat))
        first = next((v for v in self.inputs.values() if isinstance(v, Tensor)), None)
        if first is None:
            raise ValueError(f"A batch without any tensor has no rows: its inputs are {sorted(self.inputs)}.")
        return len(first)

    def real_tokens(self, stack: str = "") -> Tensor | None:
        """(batch, sequence), True for tokens and False for padding; None if there are no tokens.

        A stack that is neither a language model nor its encoder or decoder (a stack for images, for example) has none.
        """
        if stack not in TEXT:
            return None
        if stack == "decoder":
            for name in ("decoder_attention_mask", "decoder_input_ids", "labels"):
                if isinstance(self.inputs.get(name), Tensor):
                    given = self.inputs[name]
                    return given.bool() if name.endswith("mask") else torch.ones_like(given, dtype=torch.bool)
            return None
        mask, ids = self.inputs.get("attention_mask"), self.inputs.get("input_ids")
        choices = isinstance(ids, Tensor) and ids.ndim == 3
        ids = self.inputs.get("inputs_embeds") if ids is None else ids
        if ids is None and any(isinstance(self.inputs.get(name), Tensor) for name in SENSES):
            return None  # then the mask is about frames or samples, several of which make one position
        if isinstance(mask, Tensor) and (mask.ndim == 2 or choices):
            return _one_axis(mask, 2).bool()
        if isinstance(ids, Tensor):
            ids = _one_axis(ids, 2) if choices else ids
            shape = ids.shape[:2] if not self.cached else (ids.shape[0], self.cached + ids.shape[1])
            return torch.ones(shape, dtype=torch.bool, device=ids.device)
        return None

    @property
    def cached(self) -> int:
        """The number of columns of the rows that are in a cache among the inputs; these do not run again."""
        cache = given_cache(self.inputs)
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0

    def continuing(self, cache: Any) -> Batch:
        """The batch as `generate` takes it with a cache: the ids, or the mask, also cover the tokens in the cache."""
        if cache is None:
            return self
        inputs = {**without_cache(self.inputs), NAMES[0]: cache}
        if "attention_mask" not in inputs and isinstance(inputs.get("input_ids"), Tensor):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return replace(self, inputs=inputs)

    def after_cache(self, index: Tensor, valid: Tensor, stack: str = "") -> tuple[Tensor, Tensor]:
        """Columns of the rows as columns of the stream, which begins after the columns in the cache."""
        cached = 0 if stack else self.cached
        return (index - cached).clamp_min(0), valid & (index >= cached)

    def rows(self, index: Tensor | slice) -> Batch:
        """Some rows, as a batch."""

        def cut(value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) else value

        return Batch(
            {name: cut(v) for name, v in self.inputs.items()},
            cut(self.prompt_lengths),
            {name: cut(v) for name, v in self.columns.items()},
            cut(self.positional),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs={name: move(v) for name, v in self.inputs.items()},
            prompt_lengths=move(self.prompt_lengths),
            columns={name: move(v) for name, v in self.columns.items()},
            positional=move(self.positional),
        )


def _one_axis(values: Tensor, ndim: int) -> Tensor:
    """Choices of examples, (batch, choices, …), as the rows that a model makes of them; rows are not changed."""
    return values.flatten(0, values.ndim - ndim) if values.ndim > ndim else values


def model_inputs(model: nn.Module, batch: Batch) -> Mapping[str, Any] | Sequence[Any]:
    """The arguments of the model's forward pass: by name, or a list with the single positional one.

    With a left-padded batch, a decoder counts its positions from the padding. `generate` corrects this, but a plain
    forward does not. So it is corrected here: position_ids are made from the attention mask, as in `generate`.
    """
    if batch.positional is not None:
        return [batch.positional]
    cache = given_cache(batch.inputs)
    inputs = dict(batch.inputs) if cache is None else named_for(forward_name(model), batch.inputs)
    mask = inputs.get("attention_mask")
    if (
        mask is None
        or mask.ndim != 2
        or "position_ids" in inputs
        or cache is not None
        or "position_ids" not in inspect.signature(model.forward).parameters
        or bool(mask[:, 0].all())
        or _counts_from_padding(model)
    ):
        return inputs
    inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return inputs


def _counts_from_padding(model: nn.Module) -> bool:
    """Whether the model computes positions from the padding token's index, as RoBERTa and similar models do."""
    return any(
        path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for path, module in model.named_modules()
    )
