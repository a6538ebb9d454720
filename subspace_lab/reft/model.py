"""ReFT adapters with the verbs that users of PEFT know.

A `ReftModel` is a base model, frozen, and one adapter or several. It is an ordinary module: `transformers.Trainer`
trains it as it is, its `state_dict` holds the adapters alone, and `generate` edits the prompt and then decodes at
the base model's own speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from subspace_lab.core.backbone import Visit
from subspace_lab.core.batches import Batch
from subspace_lab.core.intervene import forward, generate
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.reft.adapter import Adapter, base_facts
from subspace_lab.reft.composition import folded
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import padding_mask, prompt_lengths_of
from subspace_lab.reft.facade import Facade
from subspace_lab.reft.past import AnswersPast
from subspace_lab.reft.storage import local_folder, read_adapter, upload, write_adapter


class ReftModel(Facade):
    """A frozen base model with ReFT adapters; make it with `get_reft_model`.

    Attributes:
        base_model: the user's model. Its parameters ask for no gradient while it is wrapped; `unload` gives
            it back as it was.
        active_adapters: the adapters in force. Several at once need disjoint positions.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ReftConfig,
        adapter_name: str = "default",
        subspaces: Mapping[Site, Subspace] | None = None,
    ) -> None:
        if isinstance(model, ReftModel):
            raise TypeError("This model has ReFT adapters already: use its `add_adapter`.")
        super().__init__(model)
        self.adapters = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self._past: AnswersPast | None = None
        self.add_adapter(adapter_name, config, subspaces)
        for p in self._asked:
            p.requires_grad_(False)
        self.set_adapter(adapter_name)

    # --- adapters ---------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, config: ReftConfig, subspaces: Mapping[Site, Subspace] | None = None
    ) -> None:
        """Add an untrained adapter, not yet active (ValueError for a name that is taken or has a dot).

        Args:
            subspaces: one for each of its sites, to start in (or to stay in, with `basis="fixed"`).
        """
        if adapter_name in self.adapters or hasattr(self.adapters, adapter_name) or "." in adapter_name:
            raise ValueError(f"Adapter name {adapter_name!r} is taken or has a dot; there are {self.names}.")
        name = getattr(self.config, "_name_or_path", "") or None
        if config.base_model_name_or_path is None and name is not None:
            config = replace(config, base_model_name_or_path=name)
        adapter = Adapter(config, self.backbone, subspaces).train(self.training)
        adapter.asks_for_gradient(False)
        self.adapters[adapter_name] = adapter

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or several, the active and trainable ones (ValueError if two share a site)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._merged(names)
        self.active_adapters = names
        for name in self.names:
            self.adapter(name).asks_for_gradient(name in names)

    def train_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Of a basis in parts, put some in force and train them alone; the other parts rest as they are."""
        self._in_parts(adapter_name).train_parts([parts] if isinstance(parts, str) else parts)

    def use_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Of a basis in parts, put some in force."""
        self._in_parts(adapter_name).use_parts([parts] if isinstance(parts, str) else parts)

    def _in_parts(self, name: str | None) -> Adapter:
        found = [self.adapter(n) for n in (self.active_adapters if name is None else [name])]
        found = [adapter for adapter in found if adapter.config.parts]
        if len(found) != 1:
            raise ValueError(f"{len(found)} of the adapters {name or self.active_adapters} have parts; name one.")
        return found[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.adapter(adapter_name)
        del self.adapters[adapter_name]
        self.active_adapters = [n for n in self.active_adapters if n != adapter_name]

    def adapter(self, name: str) -> Adapter:
        """One adapter (ValueError where there is none of that name)."""
        if name not in self.adapters:
            raise ValueError(f"No adapter {name!r}; there are {self.names}.")
        return self.adapters[name]  # type: ignore[return-value]

    @property
    def names(self) -> list[str]:
        """Of all adapters, active or not."""
        return list(self.adapters)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model."""
        active, self.active_adapters = self.active_adapters, []
        try:
            yield
        finally:
            self.active_adapters = active

    def edits(self) -> dict[Site, Intervention]:
        """{site: intervention} of the active adapters."""
        return self._merged(self.active_adapters)

    def _merged(self, names: Sequence[str]) -> dict[Site, Intervention]:
        merged: dict[Site, Intervention] = {}
        for name in names:
            for site, edit in self.adapter(name).by_site().items():
                if site in merged:
                    raise ValueError(f"Two of the adapters {names} edit {site}; their positions must be disjoint.")
                merged[site] = edit
        return merged

    def fold(self) -> dict[Site, Intervention]:
        """The active adapters' edits in plain matrices, to serve from: h + Dᵀ(M h + v), M = W − R for LoReFT.

        What is not affine (RED, an activation other than linear) is a copy. `core.intervene` runs them.
        """
        return {site: folded(edit) for site, edit in self.edits().items()}

    def merge_and_unload(self) -> nn.Module:
        """Refused: no weights do what an edit does."""
        raise TypeError(
            "A ReFT edit cannot be merged into the weights: it changes the hidden states of some positions of the "
            "prompt, and weights treat all positions, also those that are generated, alike. `fold()` gives the "
            "edits as plain matrices, `unload()` the base model."
        )

    def subspace(self, site: Site | str) -> Subspace:
        """The subspace that the active adapters edit at a site, for DAS and for analysis."""
        site = Site.parse(site) if isinstance(site, str) else site
        edits = self.edits()
        if site not in edits:
            raise ValueError(f"No active adapter edits {site}; edited are {list(map(str, edits))}.")
        return edits[site].subspace.frozen()

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
    ) -> Any:
        """The base model's output with the active adapters in force.

        Args:
            labels: as the base model takes them. In a causal language model the tokens before the first label
                that is not −100 are the prompt, by which positions are counted.
            prompt_lengths: (batch,) the number of prompt tokens, instead.
            row: (batch,) which rows of the data set of `keep_past` these are; the rest is then known already.
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
                prompt_lengths = prompt_lengths_of(labels, attention_mask)
            elif self.training and torch.is_grad_enabled() and self.active_adapters:
                raise ValueError(
                    "Training needs labels or prompt_lengths: they tell the prompt, by which positions are "
                    "counted, from the answer. Trainer takes the labels away for label smoothing and for a loss "
                    "of one's own; PromptCollator(tokenizer, prompt_lengths=True) gives the lengths."
                )
        self._check_checkpointing()
        batch = Batch(given, prompt_lengths)
        return forward(self.backbone, batch, self.edits(), train_base=True, also=self._visits())

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        every_token: bool = False,
        **generation: Any,
    ) -> Any:
        """The base model's `generate` with the prompt edited; see `core.intervene.generate`.

        Args:
            attention_mask: without it padding is told by the pad token, as `generate` itself does it.
            every_token: edit each generated token as well.
            generation: keyword arguments of the base model's `generate`, which checks them.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = padding_mask(input_ids, self.base_model, generation)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch = Batch({name: value for name, value in given.items() if value is not None})
        return generate(
            self.backbone, batch, self.edits(), every_token=every_token, also=self._visits(), **generation
        )

    def keep_past(self, rows: Dataset, *, memory: int | str | None = None) -> Dataset:
        """Compute once what training on these rows need not compute again (`core/frozen_past.py`).

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
        if not edits or self._visits():
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

    def _visits(self) -> list[Visit]:
        return [v for name in self.active_adapters for v in self.adapter(name).visits(self.backbone)]

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
        inside += [v.path for v in self._visits() if v.path.startswith(tuple(blocks))]
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
