"""Runs over a data set of which only some logits are wanted.

Training and evaluation ask a model for the logits of a few answer tokens at a few positions. A *run* holds the
data set and answers `logits(rows, edits, sources)`. The plain run here computes everything anew;
`engine/frozen_past.py` has the one that computes nothing twice. They give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from subspace_lab.core.positions import locate
from subspace_lab.core.sites import Site
from subspace_lab.engine.fingerprint import Fingerprint, tensors_of
from subspace_lab.model.backbone import Backbone, Hook, frozen
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import Edits, Sources, edit_hooks, model_inputs
from subspace_lab.model.resolved_sites import ResolvedSite, resolve

LAST = (2**31,)  # sorts behind every block
# What only shapes the model's own loss and logits: a readout says which logits are wanted.
NEEDLESS = {"labels", "logits_to_keep", "num_items_in_batch"}


@dataclass(frozen=True)
class Readout:
    """Which logits are read.

    Attributes:
        index: (batch, reads) columns of the padded batch at which they are read; None takes the model's
            output as it is (a classifier, a plain module).
        valid: which of them are real; None: all.
        tokens: (answers,) the answer tokens; None: the whole vocabulary.
    """

    index: Tensor | None = None
    valid: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def at(cls, batch: Batch, positions: str = "last", tokens: Sequence[int] | Tensor | None = None) -> Readout:
        """Read at positions of the prompt: at the last, what the model says next.

        In a batch with tokens for a decoder of its own they are positions of those.
        """
        decoder = any(name.startswith("decoder_") for name in batch.inputs)
        real = batch.real_tokens("decoder" if decoder else "")
        if real is None:
            return cls(tokens=_ids(tokens))
        index, valid = locate(positions, real, None if decoder else batch.prompt_lengths, batch.columns)
        return cls(index, None if bool(valid.all()) else valid, _ids(tokens))

    @classmethod
    def before_labels(cls, labels: Tensor) -> tuple[Readout, Tensor]:
        """Read where a next-token loss reads: before each label that is not −100.

        Returns:
            (readout, targets): targets (batch, reads) with −100 where a row has fewer labels.
        """
        wanted = labels[:, 1:] != -100
        most = int(wanted.sum(1).max()) if wanted.numel() else 0
        if not most:
            raise ValueError("Every label is −100: nothing is left to learn from; is the answer missing?")
        index = torch.argsort((~wanted).to(torch.uint8), dim=1, stable=True)[:, :most]
        valid = wanted.gather(1, index)
        targets = labels[:, 1:].gather(1, index).masked_fill(~valid, -100)
        return cls(index, None if bool(valid.all()) else valid), targets

    def rows(self, rows: Tensor) -> Readout:
        """The readout of some rows."""
        cut = (None if t is None else t[rows.to(t.device)] for t in (self.index, self.valid))
        index, valid = cut
        return replace(self, index=index, valid=valid)


@runtime_checkable
class Engine(Protocol):
    """What training and evaluation need of a data set under a model."""

    def __len__(self) -> int: ...

    def logits(self, rows: Tensor, edits: Edits, sources: Sources | None = None) -> Tensor:
        """(rows, reads, answers), or the model's own output where the readout has no positions.

        `rows` are indices of the data set; `sources` are of these rows.
        """
        ...

    def describe(self) -> str:
        """One line: what is computed once and what anew."""
        ...


class PlainEngine:
    """Every batch from the first layer to the last."""

    def __init__(self, backbone: Backbone, batch: Batch, readout: Readout) -> None:
        if batch.inputs.get("past_key_values") is not None:
            raise ValueError("A cache among the inputs would be written by each run; give the whole rows instead.")
        self.backbone, self.batch, self.readout = backbone, batch, readout
        self._head = Head.of(backbone)
        self._resolved: dict[Site, ResolvedSite] = {}
        self._fingerprint: Fingerprint | None = None

    def __len__(self) -> int:
        return len(self.batch)

    def describe(self) -> str:
        """One line about what is computed."""
        return "plain run: every layer and position, every step"

    def logits(self, rows: Tensor, edits: Edits, sources: Sources | None = None) -> Tensor:
        part = self.batch.rows(rows)
        hooks = edit_hooks(self.backbone, part, edits, sources, resolved=self._resolved_in(edits, rows))
        return self.finish(model_inputs(self.backbone.model, part), hooks, self.readout.rows(rows))

    def finish(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        hooks: list[Hook],
        readout: Readout,
        parameters: nn.Module | None = None,
    ) -> Tensor:
        """Run and read; `parameters`: a module of the model's parameters alone, quicker to go through."""
        edited = self._head is not None and any(hook.path == self._head.path for hook in hooks)
        head = None if self._head is None or edited else head_hook(self.backbone, readout, self._head)
        if head is not None and isinstance(inputs, Mapping) and not NEEDLESS.isdisjoint(inputs):
            inputs = _without_needless(self.backbone.model, inputs)
        with frozen(self.backbone.model if parameters is None else parameters):
            output = self.backbone.run(inputs, [*hooks, *([] if head is None else [head])])
        return read(output, readout, by_head=head)

    def _resolved_in(self, sites: Iterable[Site], rows: Tensor) -> dict[Site, ResolvedSite]:
        """Where the sites are in some rows: found for the whole data set, so that sources are cut as it is."""
        if self._fingerprint is None or self._fingerprint.changed():
            self._fingerprint, self._resolved = Fingerprint(None, lambda: tensors_of(self.batch)), {}
        with torch.inference_mode(False):  # kept for later steps, which may need gradients
            for site in sites:
                if site not in self._resolved:
                    self._resolved[site] = resolve(self.backbone, self.batch, site)
            return {site: resolved_rows(self._resolved[site], rows) for site in sites}


def resolved_rows(whole: ResolvedSite, rows: Tensor) -> ResolvedSite:
    """A place in some rows of the batch that it was found in."""
    if whole.index is None:
        return whole
    index, valid = (None if t is None else t[rows.to(t.device)] for t in (whole.index, whole.valid))
    return replace(whole, index=index, valid=None if valid is None or bool(valid.all()) else valid)


def read(output: Any, readout: Readout, by_head: Hook | None) -> Tensor:
    """The logits that a readout asks for, out of what the model gave."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
    if by_head is None and readout.index is not None and logits.ndim == 3:
        index = readout.index.to(logits.device)
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
    if readout.tokens is not None and (by_head is None or by_head.side != "replace"):
        logits = logits[..., readout.tokens.to(logits.device)]
    return logits


@dataclass(frozen=True)
class Head:
    """The output embeddings of a model: their path, and whether rows of them can be multiplied alone."""

    path: str
    narrow: bool

    @classmethod
    def of(cls, backbone: Backbone) -> Head | None:
        path = backbone.head()
        if path is None:
            return None
        head = backbone.anatomy.modules[path]
        # `type(...) is` on purpose: a subclass (quantised, adapted) may multiply in another way.
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            return cls(path, False)
        # A bias that is added behind the head has the size of the vocabulary.
        added = (t for t in (*backbone.model.parameters(), *backbone.model.buffers()) if t is not head.bias)
        return cls(path, all(t.numel() != head.out_features for t in added))


def head_hook(backbone: Backbone, readout: Readout, head: Head | None = None) -> Hook | None:
    """Make the head compute the wanted rows alone: at a large vocabulary it is half of a short step.

    A plain linear head is multiplied by the answers' rows only; any other kind sees fewer positions.
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

    if readout.tokens is not None and head.narrow:
        return Hook(head.path, "replace", LAST, answers)
    return Hook(head.path, "input", LAST, positions)


def _ids(tokens: Sequence[int] | Tensor | None) -> Tensor | None:
    return None if tokens is None else torch.as_tensor(tokens, dtype=torch.long)


def _without_needless(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in inputs.items() if name not in NEEDLESS}
    config = getattr(model, "config", None)
    if "labels" in inputs and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        shift: Any = model.prepare_decoder_input_ids_from_labels  # as the model itself would
        kept["decoder_input_ids"] = shift(labels=inputs["labels"])
    return kept
