"""Which logits are read, and runs that compute few others.

Training and evaluation need the logits of a few answer tokens at a few positions. With a large vocabulary the output
embeddings (the head) take half of the time of a short step, so they are only computed where logits are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.positions import expect_some, locate, normalise
from subspace_lab.model.backbone import Backbone, Hook, frozen
from subspace_lab.model.batches import Batch

BEHIND_BLOCKS = (2**31,)
"""The order of a hook that acts after every block."""
LOSS_INPUTS = {"labels", "logits_to_keep", "num_items_in_batch"}
"""Inputs that only change the model's own loss and logits; a readout replaces them."""


@dataclass(frozen=True)
class Readout:
    """Which logits are read.

    Attributes:
        index: (batch, reads) columns of the padded batch at which they are read; None for the model's output as it is
            (a classifier, a plain module).
        valid: (batch, reads) False where a row has fewer reads; None if all rows have the same number.
        tokens: (answers,) the answer tokens; None for the whole vocabulary.
    """

    index: Tensor | None = None
    valid: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def at(cls, batch: Batch, positions: str = "last", tokens: Sequence[int] | Tensor | None = None) -> Readout:
        """Read at positions of the prompt; at the last one the logits are those of the next token.

        In a batch with separate tokens for a decoder, the positions are positions of these tokens.

        Raises:
            TypeError: positions that are not text, tokens that are not whole numbers.
            ValueError, KeyError: positions that cannot be parsed, or that name a column the batch does not have.
        """
        if not isinstance(positions, str):
            raise TypeError(f"positions={positions!r}: text is needed, such as 'last', '-2' or 'f1+l2'.")
        answers = _token_ids(tokens)
        decoder = any(name.startswith("decoder_") for name in batch.inputs)
        real = batch.real_tokens("decoder" if decoder else "")
        if real is None:
            return cls(tokens=answers)
        lengths = None if decoder else batch.prompt_lengths
        index, valid = locate(normalise(positions), real, lengths, batch.columns)
        expect_some(positions, valid, real.sum(1) if lengths is None else lengths)
        return cls(index, None if bool(valid.all()) else valid, answers)

    @classmethod
    def before_labels(cls, labels: Tensor) -> tuple[Readout, Tensor]:
        """Read where a next-token loss reads: before each label that is not −100.

        Returns:
            (readout, targets): targets (batch, reads), with −100 where a row has fewer labels.

        Raises:
            ValueError: all labels are −100.
        """
        wanted = labels[:, 1:] != -100
        most = int(wanted.sum(1).max()) if wanted.numel() else 0
        if not most:
            raise ValueError("Every label is −100: nothing is left to learn from; is the answer missing?")
        index = torch.argsort((~wanted).to(torch.uint8), dim=1, stable=True)[:, :most]
        valid = wanted.gather(1, index)
        targets = labels[:, 1:].gather(1, index).masked_fill(~valid, -100)
        return cls(index, None if bool(valid.all()) else valid), targets

    def over_vocabulary(self) -> Readout:
        """The same reads, for all tokens of the vocabulary instead of the answers."""
        return replace(self, tokens=None)

    def rows(self, rows: Tensor) -> Readout:
        """The readout of some rows."""
        index, valid = (None if t is None else t[rows.to(t.device)] for t in (self.index, self.valid))
        return replace(self, index=index, valid=valid)


@dataclass(frozen=True)
class Head:
    """The output embeddings of a model.

    Attributes:
        path: the path of the module.
        narrow: whether the logits of some tokens are a product with only these tokens' weights, if nothing replaces
            or wraps the module.
    """

    path: str
    narrow: bool

    @classmethod
    def of(cls, backbone: Backbone) -> Head | None:
        """The model's head; None if it has none."""
        path = backbone.head()
        if path is None:
            return None
        head = backbone.anatomy.modules[path]
        # `type(...) is` on purpose: a subclass (quantised, adapted) may compute its product in another way.
        if type(head) is not nn.Linear:
            return cls(path, False)
        # A bias that is added after the head would have the size of the vocabulary.
        added = (t for t in (*backbone.model.parameters(), *backbone.model.buffers()) if t is not head.bias)
        return cls(path, all(t.numel() != head.out_features for t in added))


def head_hook(backbone: Backbone, readout: Readout, head: Head | None = None) -> Hook | None:
    """A hook by which the head computes only the logits to read; None if the model or the readout has no such choice.

    A plain linear head uses only the answers' weights. Any other head is called with fewer positions.
    """
    if readout.index is None:
        return None
    head = head or Head.of(backbone)
    if head is None:
        return None
    module = backbone.anatomy.modules[head.path]

    def positions(hidden: Tensor) -> Tensor:
        assert readout.index is not None
        index = readout.index.to(hidden.device)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def answers(hidden: Tensor) -> Tensor:
        assert readout.tokens is not None and isinstance(module, nn.Linear)
        tokens = readout.tokens.to(hidden.device)
        bias = None if module.bias is None else module.bias[tokens]
        return nn.functional.linear(positions(hidden), module.weight[tokens], bias)

    # Checked in each run, because hooks can be added and removed.
    if readout.tokens is not None and head.narrow and backbone.is_plain(head.path):
        return Hook(head.path, "replace", BEHIND_BLOCKS, answers)
    return Hook(head.path, "input", BEHIND_BLOCKS, positions)


class LogitReader:
    """Runs a model with hooks, and reads the logits of a readout."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._head = Head.of(backbone)

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        hooks: list[Hook],
        readout: Readout,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> Tensor:
        """(rows, reads, answers) logits, with gradients to the hooks' parameters but not to the model's.

        Args:
            inputs: the model's inputs, by name or by position.
            hooks: the edits, and any other hooks.
            readout: the readout of the rows that are run.
            parameters: the model's parameters, if known: a list is faster to iterate than the model.
        """
        edited = self._head is not None and any(hook.path == self._head.path for hook in hooks)
        head = None if self._head is None or edited else head_hook(self._backbone, readout, self._head)
        if head is not None and isinstance(inputs, Mapping) and not LOSS_INPUTS.isdisjoint(inputs):
            inputs = _without_loss_inputs(self._backbone.model, inputs)
        with frozen(self._backbone.model if parameters is None else parameters):
            output = self._backbone.run(inputs, [*hooks, *([] if head is None else [head])])
        return _read(output, readout, by_head=head)


def expect_rows(rows: Any) -> None:
    """TypeError unless `rows` is a one-dimensional tensor of whole numbers."""
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        found = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(
            f"Rows are a tensor of indices with one axis, such as torch.tensor([0, 3]); found {found}."
        )


def _read(output: Any, readout: Readout, by_head: Hook | None) -> Tensor:
    """The logits of a readout from the model's output; the head may have computed only these already."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
    if by_head is None and readout.index is not None and logits.ndim == 3:
        index = readout.index.to(logits.device)
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
    if readout.tokens is not None and (by_head is None or by_head.side != "replace"):
        logits = logits[..., readout.tokens.to(logits.device)]
    return logits


def _token_ids(tokens: Sequence[int] | Tensor | None) -> Tensor | None:
    if tokens is None:
        return None
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
        raise TypeError(f"tokens={tokens!r}: a list of token ids is needed, whole numbers.")
    return ids.long()


def _without_loss_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}
    config = getattr(model, "config", None)
    if "labels" in inputs and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        shift: Any = model.prepare_decoder_input_ids_from_labels  # as the model itself does
        rest["decoder_input_ids"] = shift(labels=inputs["labels"])
    return rest
