"""ReFT adapters with the verbs that users of PEFT know.

A `ReftModel` is a base model, frozen, and one adapter or several. It is an ordinary module: `transformers.Trainer`
trains it as it is, its `state_dict` holds the adapters alone, and `generate` edits the prompt and then decodes at
the base model's own speed.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.backbone import Backbone, Visit
from subspace_lab.core.batches import Batch
from subspace_lab.core.intervene import forward, generate
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.reft.adapter import Adapter, base_facts
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import prompt_lengths_of
from subspace_lab.reft.storage import local_folder, read_adapter, upload, write_adapter


class ReftModel(nn.Module):
    """A frozen base model with ReFT adapters; make it with `get_reft_model`.

    Attributes:
        base_model: the user's model. Its parameters ask for no gradient while it is wrapped; `unload` gives
            it back as it was.
        active_adapters: the adapters in force. Several at once need disjoint positions.
    """

    def __init__(self, model: nn.Module, config: ReftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        if isinstance(model, ReftModel):
            raise TypeError("This model has ReFT adapters already: use its `add_adapter`.")
        self.backbone = Backbone(model)
        self.base_model = model
        self.training = model.training  # or the edits' dropout would be on while the base model's is off
        self._asked = [p for p in model.parameters() if p.requires_grad]
        self.adapters = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.add_adapter(adapter_name, config)
        for p in self._asked:
            p.requires_grad_(False)
        self.set_adapter(adapter_name)

    # --- adapters ---------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: ReftConfig) -> None:
        """Add an untrained adapter, not yet active (ValueError for a name that is taken or has a dot)."""
        if adapter_name in self.adapters or hasattr(self.adapters, adapter_name) or "." in adapter_name:
            raise ValueError(f"Adapter name {adapter_name!r} is taken or has a dot; there are {self.names}.")
        name = getattr(self.config, "_name_or_path", "") or None
        if config.base_model_name_or_path is None and name is not None:
            config = replace(config, base_model_name_or_path=name)
        self.adapters[adapter_name] = Adapter(config, self.backbone).train(self.training).requires_grad_(False)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or several, the active and trainable ones."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.adapter(name)
        self.active_adapters = names
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in names)

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

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped."""
        for p in self._asked:
            p.requires_grad_(True)
        return self.base_model

    def edits(self) -> dict[Site, Intervention]:
        """{site: intervention} of the active adapters (ValueError if two share a site)."""
        merged: dict[Site, Intervention] = {}
        for name in self.active_adapters:
            for site, edit in self.adapter(name).by_site().items():
                if site in merged:
                    raise ValueError(f"Two active adapters edit {site}; their positions must be disjoint.")
                merged[site] = edit
        return merged

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
            write_adapter(self.adapter(name), Path(folder) if at_root else Path(folder, name), base, kind)

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
        adapter.requires_grad_(is_trainable)

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
    ) -> Any:
        """The base model's output with the active adapters in force.

        Args:
            labels: as the base model takes them. In a causal language model the tokens before the first label
                that is not −100 are the prompt, by which positions are counted.
            prompt_lengths: (batch,) the number of prompt tokens, instead.
            others: as the base model takes them; what it does not know it refuses.
        """
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
        if prompt_lengths is None and labels is not None and self._is_causal():
            prompt_lengths = prompt_lengths_of(labels, attention_mask)
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
        """The base model's `generate` with the prompt edited; see `core.intervene.generate`."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch = Batch({name: value for name, value in given.items() if value is not None})
        return generate(
            self.backbone, batch, self.edits(), every_token=every_token, also=self._visits(), **generation
        )

    def _visits(self) -> list[Visit]:
        return [v for name in self.active_adapters for v in self.adapter(name).visits(self.backbone)]

    def _is_causal(self) -> bool:
        config = getattr(self.base_model, "config", None)
        return hasattr(self.base_model, "generate") and not getattr(config, "is_encoder_decoder", False)

    def _check_checkpointing(self) -> None:
        if not getattr(self.base_model, "is_gradient_checkpointing", False) or not torch.is_grad_enabled():
            return
        inside = [s for s in self.edits() if not s.component.endswith(("block_output", "block_input"))]
        if inside and self.base_model.training:
            raise ValueError(
                f"Gradient checkpointing runs blocks twice and loses the gradient of edits inside them: {inside}. "
                "Edit block_output, or train without gradient checkpointing."
            )

    # --- what Trainer and PyTorch ask of a model --------------------------------------------------------

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return getattr(self.base_model, "config", None)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model averages its loss over the items that Trainer counts."""
        parameters = inspect.signature(self.base_model.forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute the base model's blocks in the backward pass."""
        base: Any = self.base_model
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        # A checkpointed block passes gradients on only if something that enters it asks for one.
        base.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        base: Any = self.base_model
        base.gradient_checkpointing_disable()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The adapters' numbers alone."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in [k for k in state if k.startswith(f"{prefix}base_model.")]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the adapters' numbers; every one of them must be there (RuntimeError otherwise)."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [k for k in result.missing_keys if not k.startswith("base_model.")]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"Missing {missing}, unexpected {result.unexpected_keys} in a ReFT state.")
        return type(result)([], [])

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, as PEFT does."""
        trainable, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || "
            f"trainable%: {100 * trainable / every:.4f}"
        )


def get_reft_model(model: nn.Module, config: ReftConfig, adapter_name: str = "default") -> ReftModel:
    """A model with a new, untrained adapter; its own parameters are frozen while it is wrapped.

    Raises:
        ValueError, IndexError: a layer, component, module or rank that the model has not.
    """
    return ReftModel(model, config, adapter_name)
