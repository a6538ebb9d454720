"""ReFT adapters with the verbs that users of PEFT know.

A `ReftModel` is a base model, frozen, and one adapter or several. It is an ordinary module: `transformers.Trainer`
trains it as it is, its `state_dict` holds the adapters alone, and `generate` edits the prompt and then decodes at
the base model's own speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import forward, generate, setting
from subspace_lab.reft.adapter import base_facts
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import padding_mask, prompt_lengths_of, refuse_packed
from subspace_lab.reft.fused_head import label_output
from subspace_lab.reft.host import Host
from subspace_lab.reft.past import AnswersPast
from subspace_lab.reft.storage import local_folder, read_adapter, upload, write_adapter


class ReftModel(Host):
    """A frozen base model with ReFT adapters; make it with `get_reft_model`.

    Attributes:
        base_model: the user's model. Its parameters ask for no gradient while it is wrapped; `unload` gives
            it back as it was.
        active_adapters: the adapters in force. Several at once need disjoint positions.
    """

    _past: AnswersPast | None = None

    # --- on disk and on the Hub ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, adapter_name: str | None = None) -> None:
        """Write one adapter into a folder, or all of them.

        Of several, "default" goes into the folder itself and each other one into a folder of its name inside.
        """
        names = self.names if adapter_name is None else [adapter_name]
        base, kind = base_facts(self.base_model), type(self.base_model).__name__
        for name in names:
            at_root = name == "default" or len(names) == 1
            into = Path(folder) if at_root else Path(folder, name)
            write_adapter(self.adapter(name), into, base, kind, self.model_tags)

    def load_adapter(
        self, folder: str | Path, adapter_name: str, is_trainable: bool = False, revision: str | None = None
    ) -> None:
        """Read an adapter, from a folder or from the Hub, under a name; it is not active yet.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown format or key, a base model that the adapter was not made for, or numbers
                that do not fit the configuration.
        """
        config, state = read_adapter(local_folder(folder, revision), base_facts(self.base_model))
        self.add_adapter(adapter_name, config)
        self._fill(adapter_name, state, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
    ) -> ReftModel:
        """The base model with a saved adapter, active; the errors are those of `load_adapter`."""
        config, state = read_adapter(local_folder(folder, revision), base_facts(model))
        wrapped = cls(model, config, adapter_name)
        try:
            wrapped._fill(adapter_name, state, is_trainable)
        except ValueError:
            wrapped.unload()
            raise
        return wrapped

    def push_to_hub(self, name: str, private: bool = False, token: str | None = None) -> str:
        """Upload the adapters to the Hub; returns the address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), name, private=private, token=token)

    def _fill(self, adapter_name: str, state: Mapping[str, Tensor], is_trainable: bool) -> None:
        adapter = self.adapter(adapter_name)
        try:
            adapter.load_state_dict(state, strict=True)
        except RuntimeError as error:
            self.delete_adapter(adapter_name)
            raise ValueError(f"The saved numbers do not fit their configuration: {error}") from error
        adapter.asks_for_gradient(is_trainable)

    # --- running ----------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        """`forward`, as of every module; for TRL's trainers, which say so, the labels' log-probabilities."""
        output = super().__call__(*inputs, **named)
        return label_output(output.logits, named["labels"], output.loss) if fused_lm_head else output

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        row: Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """The base model's output with the active adapters in force.

        Args:
            labels: as the base model takes them. In a causal language model the tokens before the first label
                that is not −100 are the prompt, by which positions are counted.
            prompt_lengths: (batch,) the number of prompt tokens, instead.
            row: (batch,) which rows of the data set of `keep_past` these are; the rest is then known already.
            cache: the key-value cache; `past_key_values` is its older name. Either is passed on under the name
                that the base model has for it.
            others: as the base model takes them; what it does not know it refuses.
        """
        if row is not None:
            return self._from_past(row, num_items_in_batch)
        given = {
            name: value
            for name, value in {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "labels": labels,
                "position_ids": position_ids,
                "token_type_ids": token_type_ids,
                "inputs_embeds": inputs_embeds,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "past_key_values": past_key_values,
                "cache": cache,
                "use_cache": use_cache,
                "output_hidden_states": output_hidden_states,
                "return_dict": return_dict,
                "logits_to_keep": logits_to_keep,
                "num_items_in_batch": num_items_in_batch,
            }.items()
            if value is not None
        }
        if prompt_lengths is None and self._is_causal():
            if labels is not None:
                refuse_packed(position_ids, attention_mask)
                prompt_lengths = prompt_lengths_of(labels, attention_mask)
            elif self.training and torch.is_grad_enabled() and self.active_adapters:
                raise ValueError(
                    "Training needs labels or prompt_lengths: they tell the prompt, by which positions are "
                    "counted, from the answer. Trainer takes the labels away for label smoothing and for a loss "
                    "of one's own; PromptCollator(tokenizer, prompt_lengths=True) gives the lengths."
                )
        self._check_checkpointing()
        batch = Batch(given, prompt_lengths)
        return forward(self.backbone, batch, self.edits(), train_base=True, also=self.hooks())

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        every_token: bool = False,
        **generation: Any,
    ) -> Any:
        """The base model's `generate` with the prompt edited; see `model.intervene.generate`.

        In a chat that goes on, with the `cache` (or, by its older name, the `past_key_values`) of an earlier
        generation, the prompt is the whole conversation up to now: positions count all its real tokens, and those
        of them that are in the cache stay as they were cached, edited in their own turn or not.

        Args:
            attention_mask: without it padding is told by the pad token, as `generate` itself does it.
            every_token: edit each generated token as well.
            generation: keyword arguments of the base model's `generate`, which checks them.
        """
        if setting(self.base_model, generation, "prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size: the prompt is edited in one pass over it, not in chunks.")
        if attention_mask is None and input_ids is not None:
            attention_mask = padding_mask(input_ids, self.base_model, generation)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch = Batch({name: value for name, value in given.items() if value is not None})
        return generate(
            self.backbone, batch, self.edits(), every_token=every_token, also=self.hooks(), **generation
        )

    def keep_past(self, rows: Dataset, *, memory: int | str | None = None) -> Dataset:
        """Compute once what training on these rows need not compute again (`engine/frozen_past.py`).

        Args:
            rows: tokenised prompts and answers, as `reft.data.tokenise` gives them.
            memory: budget of what is kept.

        Returns:
            The data set with a column `row`, by which `forward` finds what was kept: train on it, with plain
            `Trainer` too, and with `PromptCollator` or any collator that lets an integer column through. Until
            `forget_past` the base model stays in eval mode: what it drops at random is no past to keep.

        Raises:
            ValueError: no active adapter, or one with `modules_to_save`, whose past is not frozen.
        """
        edits = self.edits()
        if not edits or self.hooks():
            raise ValueError(
                "The past is kept for active adapters without modules_to_save: what those change is not frozen."
            )
        self.base_model.eval()
        self._past = AnswersPast(self.backbone, list(rows), edits, memory=memory)
        return rows.add_column("row", list(range(len(rows))))

    def forget_past(self) -> None:
        """Free what `keep_past` kept."""
        self._past = None

    def train(self, mode: bool = True) -> ReftModel:
        """Train mode of edits and base model; the base model stays in eval mode while a past is kept."""
        super().train(mode)
        if self._past is not None:
            self.base_model.eval()
        return self

    def _from_past(self, row: Tensor, items: Tensor | int | None) -> CausalLMOutput:
        if self._past is None:
            raise ValueError("Rows are given by number, but no past is kept: call keep_past first.")
        loss, logits = self._past.loss(row, self.edits(), items)
        return CausalLMOutput(loss=loss, logits=logits)

    def _is_causal(self) -> bool:
        config = getattr(self.base_model, "config", None)
        return hasattr(self.base_model, "generate") and not getattr(config, "is_encoder_decoder", False)

    def _check_checkpointing(self) -> None:
        base = self.base_model
        if not base.training or not torch.is_grad_enabled():
            return
        if not self.is_gradient_checkpointing:
            return
        inside = [str(s) for s in self.edits() if not s.component.endswith(("block_output", "block_input"))]
        blocks = [f"{block}." for stack in self.backbone.anatomy.stacks.values() for block in stack]
        inside += [v.path for v in self.hooks() if v.path.startswith(tuple(blocks))]
        if inside:
            raise ValueError(
                "Gradient checkpointing runs blocks twice and loses the gradient of what is trained inside them: "
                f"{inside}. Edit block_output, or train without gradient checkpointing."
            )


def get_reft_model(
    model: nn.Module,
    config: ReftConfig,
    adapter_name: str = "default",
    subspaces: Mapping[Site, Subspace] | None = None,
) -> ReftModel:
    """A model with a new, untrained adapter; its own parameters are frozen while it is wrapped.

    Args:
        subspaces: one for each of the adapter's sites, to start in: those that a search found, say.

    Raises:
        ValueError, IndexError: a layer, component, module or rank that the model has not.
    """
    return ReftModel(model, config, adapter_name, subspaces)


def as_reft(
    model: nn.Module,
    subspaces: Mapping[Site, Subspace],
    config: ReftConfig | None = None,
    adapter_name: str = "default",
) -> ReftModel:
    """A model with an adapter that starts in subspaces that were found, by a search say.

    Args:
        subspaces: at one component and the same positions of each layer.
        config: of everything that the subspaces do not say; `basis="fixed"` keeps them as they are.

    Raises:
        ValueError: subspaces that no one adapter can have.
    """
    config = config or ReftConfig()
    sites = list(subspaces)
    same = {(s.component, s.positions, s.heads, subspaces[s].rank) for s in sites}
    layers = [s.layer for s in sites if s.layer is not None]
    if len(same) != 1 or len(layers) != len(sites) or sites[0].heads is not None:
        raise ValueError(
            f"Subspaces at {sites}, of ranks {[s.rank for s in subspaces.values()]}: an adapter has one "
            "component, one set of positions and one rank in all its layers, and no single heads."
        )
    component, positions, _, rank = same.pop()
    config = replace(config, component=component, positions=positions, rank=rank, layers=layers, tied="all")
    return ReftModel(model, config, adapter_name, subspaces)
