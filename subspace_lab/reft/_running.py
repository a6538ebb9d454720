"""Calls of a model with adapters: `forward`, `generate`, and their use by other libraries.

How adapters are made, named and saved is in `reft/model.py`, not here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.arguments import instance
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.engine.training import expect_gradients
from subspace_lab.model.backbone import Hook
from subspace_lab.model.batches import SENSES, Batch
from subspace_lab.model.intervene import forward, generate
from subspace_lab.reft._adapters import Adapter
from subspace_lab.reft._prompts import (
    Lengths,
    expect_lengths,
    lengths_from_labels,
    lengths_inside,
    refuse_packed_call,
    warn_of_whole_examples,
)
from subspace_lab.reft._wrapper import Wrapper, innermost
from subspace_lab.reft.data import padding_mask

MAIN = (
    "input_ids",
    "inputs_embeds",
    *SENSES,
)  # the first of these that is given has the examples as its first axis
RowEdits = list[tuple[Tensor, dict[Site, Intervention]]]
NO_ADAPTER = "__base__"  # in `adapter_names`: the base model without edits (PEFT's name)


class Running(Wrapper):
    """A base model that runs with the edits of some adapters."""

    active_adapters: list[str]
    merged_adapters: Sequence[str] = ()
    _outer_lengths: Lengths | str | None = None  # prompt lengths given by `prompt_lengths` around a call
    _labelled: dict[str, Tensor] | None = None  # the labels of a call by TRL's forward
    _warned: bool = False

    @property
    def running_adapters(self) -> list[str]:
        """The names of the active adapters that are not merged: their edits are applied in each run."""
        return [name for name in self.active_adapters if name not in self.merged_adapters]

    @abstractmethod
    def edits(self) -> dict[Site, Intervention]:
        """{site: intervention} of the active adapters."""

    @abstractmethod
    def hooks(self) -> list[Hook]:
        """The modules of the active adapters that replace modules of the base model."""

    @abstractmethod
    def adapter(self, name: str) -> Adapter:
        """The adapter of this name; ValueError if there is none."""

    @abstractmethod
    def _past_loss(self, row: Tensor, items: Tensor | int | None) -> Any:
        """The output for examples whose past is stored."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call `forward`, even if TRL's `add_fused_lm_head` has replaced it.

        TRL's forward calls `base_model` for the last hidden states and multiplies them by the output embeddings itself.
        During such a call `base_model` is a function that computes these states with the edits. So temperature, scale,
        chunks and every further output are TRL's own.
        """
        if not named.get("fused_lm_head") or "forward" not in self.__dict__:
            return super().__call__(*inputs, **named)
        self._labelled = {k: named[k] for k in ("labels", "shift_labels") if named.get(k) is not None}
        try:
            return super().__call__(*inputs, **named)
        finally:
            self._labelled = None

    def __getattr__(self, name: str) -> Any:
        if name == "base_model" and self.__dict__.get("_labelled") is not None:
            return self._last_states
        return super().__getattr__(name)

    def _last_states(self, *inputs: Any, **named: Any) -> Any:
        """The output of the base model without its head, with the edits and with the labels of the call."""
        labels, self._labelled = self._labelled or {}, None
        model = innermost(self.base_model)
        inner = getattr(model, "base_model", model)
        path = next((p for p, m in self.backbone.anatomy.modules.items() if m is inner), "")
        if inner is model or not path:
            raise TypeError(f"fused_lm_head: {type(model).__name__} has no body apart from its head.")
        hooks = [hook for hook in self.hooks() if hook.path.startswith(f"{path}.")]
        return self._run(self.named(inputs, {**named, **labels}), named.pop("prompt_lengths", None), inner, hooks)

    def forward(
        self,
        *inputs: Any,
        prompt_lengths: Lengths | str | None = None,
        adapter_names: Sequence[str] | None = None,
        row: Tensor | None = None,
        **named: Any,
    ) -> Any:
        """The base model's output with the edits of the active adapters.

        In a causal language model the tokens before the first label that is not −100 are the prompt. Positions are
        counted in the prompt. Adapters with `every_token` edit all tokens, of prompt and answer.

        Args:
            inputs, named: the arguments of the base model; unknown arguments are refused. The key-value cache may be
                called `cache` or, by its older name, `past_key_values`.
            prompt_lengths: (batch,) the number of prompt tokens, if there are no labels, or anything else that the
                method `prompt_lengths` takes, such as "all"; use that method for calls that other libraries make.
            adapter_names: for each example the adapter that edits it, active or not; "__base__" for none.
            row: (batch,) the numbers of examples that `keep_past` prepared; nothing else is needed then.

        Raises:
            TypeError: an argument that the base model does not have; prompt lengths of another type.
            ValueError: labels or lengths from which the end of the prompt is not clear; several answers in one example
                whose prompts would be edited at different positions; a name without an adapter; adapters that edit
                every token together with adapters that edit only the prompt.
        """
        if row is not None:
            return self._past_loss(row, named.get("num_items_in_batch"))
        given = self.named(inputs, named)
        if adapter_names is None:
            return self._run(given, prompt_lengths, None, self.hooks())
        groups = self._groups(adapter_names, given)
        return self._run(given, prompt_lengths, None, [], groups, adapter_names)

    def _run(
        self,
        given: dict[str, Any],
        lengths: Lengths | str | None,
        call: nn.Module | None,
        hooks: Sequence[Hook],
        groups: RowEdits | None = None,
        names: Sequence[str] | None = None,
    ) -> Any:
        edits = self.edits() if groups is None else {}
        sites = [*edits, *(site for _, some in groups or () for site in some)]
        whole = self.edits_every_token(names)
        ends = None if whole else self._lengths(given, lengths, [site.positions for site in sites])
        self.check_checkpointing(sites, hooks)
        if self.training and torch.is_grad_enabled():
            expect_gradients(self.backbone)
        if call is not None:
            given = {k: v for k, v in given.items() if k not in ("labels", "shift_labels")}
        batch = Batch(given, ends)
        output = forward(self.backbone, batch, edits, train_base=True, also=hooks, groups=groups or (), call=call)
        if given.get("fused_lm_head") and not hasattr(output, "log_probs"):
            raise TypeError(
                "fused_lm_head belongs to TRL: call its `add_fused_lm_head(model)` first, as its trainers do."
            )
        return output

    def _lengths(
        self, given: dict[str, Any], lengths: Lengths | str | None, positions: Sequence[str]
    ) -> Tensor | None:
        if isinstance(lengths, Tensor) and lengths.ndim:
            return lengths.flatten()
        if lengths is not None:
            return lengths_inside(expect_lengths(lengths), given)
        if self._outer_lengths is not None and {"input_ids", "inputs_embeds"} & set(given):
            return lengths_inside(self._outer_lengths, given)
        if not self.is_causal():
            return None
        if positions:
            refuse_packed_call(given)
        lengths = lengths_from_labels(given, positions)
        if lengths is not None or not positions:
            return lengths
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "Training needs labels or prompt_lengths, which say where the prompt ends: positions are counted in "
                "the prompt. Trainer removes the labels for label smoothing and for a custom loss; "
                "PromptCollator(tokenizer, prompt_lengths=True) gives the lengths."
            )
        if not self._warned:
            self._warned = True
            warn_of_whole_examples(positions)
        return None

    def edits_every_token(self, names: Sequence[str] | None = None) -> bool:
        """Whether adapters (by default the active ones) also edit answers and generated tokens.

        Raises:
            ValueError: some of them do and others do not, so that one prompt length is not enough.
        """
        chosen = self.running_adapters if names is None else [n for n in dict.fromkeys(names) if n != NO_ADAPTER]
        settings = {name: self.adapter(name).config.every_token for name in chosen}
        if len(set(settings.values())) > 1 and hasattr(self.base_model, "generate"):
            raise ValueError(
                "Adapters that edit every token and adapters that edit only the prompt are in one call: every_token is "
                f"{settings}. Call the model once for each kind, or train all with the same every_token."
            )
        return any(settings.values())

    @contextmanager
    def prompt_lengths(self, lengths: Lengths | str) -> Iterator[None]:
        """Set where the prompts end, for calls inside the block that do not say it themselves.

        Use it for evaluation harnesses and trainers that call the model without labels. For lm-evaluation-harness,
        `reft.harness` does this.

        Args:
            lengths: one number for every example; (batch,) numbers, for calls of one batch; a function that gets the
                call's `input_ids` (or `inputs_embeds`) and returns such numbers; or "all", if calls contain only
                prompts. They have priority over labels, and the argument of a call has priority over them.

        Raises:
            TypeError: anything else.
            ValueError: in a call with another number of examples.
        """
        before, self._outer_lengths = self._outer_lengths, expect_lengths(lengths)
        try:
            yield
        finally:
            self._outer_lengths = before

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        every_token: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        **generation: Any,
    ) -> Any:
        """The base model's `generate` with an edited prompt; see `model.intervene.generate`.

        To continue a chat, give the `cache` (or, by its older name, the `past_key_values`) of an earlier generation.
        The prompt is then the whole conversation so far; tokens that are already in the cache are not edited again.

        Args:
            inputs: the model's main input, usually token ids; by name `input_ids` (`input_features` and so on).
            attention_mask: without it pad tokens count as padding, as in `generate` itself.
            every_token: edit each generated token as well. By default the adapters' configurations decide.
            adapter_names: for each example the adapter that edits it, active or not; "__base__" for none.
            generation: keyword arguments of the base model's `generate`, which checks them.

        Raises:
            ValueError: as in `model.intervene.generate`, for generation modes in which prompt tokens cannot be
                recognised; a name without an adapter.
        """
        known = self.takes()
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        given |= {k: generation.pop(k) for k in [*generation] if k in known and isinstance(generation[k], Tensor)}
        if inputs is not None:
            main = getattr(self.base_model, "main_input_name", "input_ids")
            if given.get(main) is not None:
                raise ValueError(f"inputs and {main} are the same argument; give one.")
            given[main] = inputs
        for name, value in given.items():
            instance(value, (Tensor, type(None)), name, "tokenizer(prompt, return_tensors='pt')['input_ids']")
        if all(value is None for value in given.values()):
            raise ValueError("generate needs a prompt: generate(**tokenizer(prompt, return_tensors='pt')).")
        if given["attention_mask"] is None and given["input_ids"] is not None:
            given["attention_mask"] = padding_mask(given["input_ids"], self.base_model, generation)
        batch = Batch({name: value for name, value in given.items() if value is not None})
        groups = None if adapter_names is None else self._groups(adapter_names, batch.inputs)
        if every_token is None:
            every_token = self.edits_every_token(adapter_names)
        return generate(
            self.backbone,
            batch,
            self.edits() if groups is None else {},
            every_token=every_token,
            also=self.hooks() if groups is None else (),
            groups=groups or (),
            **generation,
        )

    def _groups(
        self, adapter_names: Sequence[str], given: Mapping[str, Any]
    ) -> list[tuple[Tensor, dict[Site, Intervention]]]:
        """The edits of a batch whose examples have different adapters: (the examples' numbers, their edits)."""
        instance(adapter_names, (list, tuple), "adapter_names", "a list with a name for each example")
        if self.merged_adapters:
            raise ValueError(
                f"adapter_names: the adapters {list(self.merged_adapters)} are in the weights and edit every "
                "example: call `unmerge_adapter()` first."
            )
        tensors = [v for name in MAIN for v in [given.get(name)] if isinstance(v, Tensor)]
        if not tensors or len(tensors[0]) != len(adapter_names) or (tensors[0].ndim == 3 and "input_ids" in given):
            raise ValueError(
                f"adapter_names: {len(adapter_names)} names for {len(tensors[0]) if tensors else 'no'} examples; one "
                "name for each is needed (and no choices within an example)."
            )
        groups: RowEdits = []
        for name in dict.fromkeys(adapter_names):
            if name == NO_ADAPTER:
                continue
            if len(self.adapter(name).saved):
                raise ValueError(
                    f"adapter_names: {name!r} has modules_to_save, which replace whole modules of the base model for "
                    "every example; run its examples alone."
                )
            chosen = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=self.device)
            groups.append((chosen, self.adapter(name).by_site()))
        return groups

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings in use: an active adapter's trained copy, if there is one."""
        base: Any = self.base_model
        return self._replacement_of(base.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embeddings in use: an active adapter's trained copy, if there is one."""
        base: Any = self.base_model
        return self._replacement_of(base.get_output_embeddings())

    def _replacement_of(self, module: Any) -> Any:
        path = next((p for p, m in self.backbone.anatomy.modules.items() if m is module), None)
        found = [self.adapter(name).saved_at(path) for name in self.running_adapters if path is not None]
        return next((m for m in found if m is not None), module)
