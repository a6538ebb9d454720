"""ReFT adapters with the methods that users of PEFT know.

A `ReftModel` is a frozen base model with one or more adapters. It is an ordinary module: `transformers.Trainer` trains
it, its `state_dict` contains only the adapters, and `generate` edits the prompt and then decodes at the speed of the
base model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from subspace_lab.core import hub
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import instance
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.backbone import Hook
from subspace_lab.model.merging import Merged
from subspace_lab.reft._adapters import Adapter, Adapters, alignment_of, base_facts
from subspace_lab.reft._past import AnswersPast
from subspace_lab.reft._running import Running
from subspace_lab.reft._wrapper import Wrapper
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import tokenised
from subspace_lab.reft.merging import merge_adapters
from subspace_lab.reft.storage import as_tensor, from_tensor, read_adapter, write_adapter


class ReftModel(Running):
    """A frozen base model with ReFT adapters; create it with `get_reft_model`.

    Attributes:
        base_model: the user's model. Its parameters require no gradient while it is wrapped; `unload` returns the model
            as it was before.
        adapters: {name: adapter}.
        active_adapters: the names of the adapters that edit. Several active adapters need disjoint positions.
        merged_adapters: the names of the adapters that are merged into the base model's weights.
    """

    _past: AnswersPast | None = None
    _merged: Merged | None = None

    def __init__(
        self,
        model: nn.Module,
        config_or_alignment: ReftConfig | Alignment,
        adapter_name: str = "default",
        *,
        config: ReftConfig | None = None,
    ) -> None:
        if isinstance(model, Wrapper):
            raise TypeError("This model has ReFT adapters already: use its `add_adapter`.")
        instance(model, nn.Module, "model", "the base model itself")
        super().__init__(model)
        self.adapters = Adapters()
        self.active_adapters: list[str] = []
        self.add_adapter(adapter_name, config_or_alignment, config=config)
        for p in self._trainable_before:
            p.requires_grad_(False)
        self.set_adapter(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        config_or_alignment: ReftConfig | Alignment,
        *,
        config: ReftConfig | None = None,
    ) -> None:
        """Add an untrained adapter, which is not active yet. The arguments are those of `get_reft_model`.

        Raises:
            TypeError: neither a configuration nor an alignment.
            ValueError: a name that is taken or contains a dot; also as in `get_reft_model`.
        """
        self.adapters.add(adapter_name, config_or_alignment, config, self.backbone).train(self.training)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one or more adapters the active and trainable ones. ValueError if two of them share a site."""
        self._expect_unmerged("set_adapter")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.adapters.edits(names)
        self.active_adapters = names
        for name in self.names:
            self.adapter(name).asks_for_gradient(name in names)

    def train_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Use only these parts of a basis in parts, and train only them from now on; the other parts do not change."""
        self._with_parts(adapter_name).train_parts([parts] if isinstance(parts, str) else parts)

    def use_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Use only these parts of a basis in parts."""
        self._with_parts(adapter_name).use_parts([parts] if isinstance(parts, str) else parts)

    def _with_parts(self, name: str | None) -> Adapter:
        self._expect_unmerged("parts")
        return self.adapters.with_parts(self.active_adapters if name is None else [name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. ValueError while it is merged."""
        if adapter_name in self.merged_adapters:
            self._expect_unmerged("delete_adapter")
        self.adapter(adapter_name)
        del self.adapters[adapter_name]
        self.active_adapters = [n for n in self.active_adapters if n != adapter_name]

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name; ValueError if there is none."""
        return self.adapters.find(name)

    @property
    def names(self) -> list[str]:
        """The names of all adapters, active or not."""
        return list(self.adapters)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model behaves like the base model. ValueError while adapters are merged."""
        self._expect_unmerged("disable_adapter")
        active, self.active_adapters = self.active_adapters, []
        try:
            yield
        finally:
            self.active_adapters = active

    def edits(self) -> dict[Site, Intervention]:
        """{site: intervention} of the active adapters that are not merged."""
        return self.adapters.edits(self.running_adapters)

    def fold(self) -> dict[Site, Intervention]:
        """The active adapters' edits as plain matrices, for serving: h + Dᵀ(M h + v), with M = W − R for LoReFT.

        Edits that are not affine in h (with an activation other than linear) or whose matrices would be d × d (RED)
        are copied. `model.intervene.forward` and `generate` can run the result.
        """
        return {site: edit.folded() for site, edit in self.edits().items()}

    # --- merging into the weights -------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Merge adapters into the base model's weights, by default the active ones; `unmerge_adapter` undoes it.

        An edit of all tokens at a projection (`mlp_output`, `attention_output`, `value_output`, `head_output`,
        `mlp_activation`) equals this projection with other weights, see `model/merging.py`. In language models the
        adapters need `every_token=True`, since weights also act at generated tokens; in classifiers and encoders they
        need positions="all". Modules in modules_to_save replace those of the base model.

        Raises:
            ValueError: an adapter that cannot be merged, with the reason, see `model.merging.merge`; adapters that are
                already merged; another active adapter at the same projection; a name without an adapter.
        """
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [given] if isinstance(given, str) else list(given)
        if self._merged is not None:
            raise ValueError(
                f"The adapters {list(self.merged_adapters)} are in the weights already"
                f"{': call `unmerge_adapter()` first.' if self._merged.is_kept else ' for good.'}"
            )
        if not names:
            raise ValueError("No adapter is active, so nothing would be merged.")
        self.forget_past()
        others = [name for name in self.active_adapters if name not in names]
        chosen = {name: self.adapter(name) for name in names}
        self._merged = merge_adapters(self.backbone, chosen, list(self.adapters.edits(others)))
        self.merged_adapters = names

    def unmerge_adapter(self) -> None:
        """Restore the base model's weights before `merge_adapter`, bit for bit. ValueError if nothing is merged."""
        if self._merged is None:
            raise ValueError("No adapter is merged.")
        self._merged.undo()
        self._merged, self.merged_adapters = None, []

    def merge_and_unload(self, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
        """Merge adapters and return the base model: the same object, a plain transformers model again.

        Save it with its own `save_pretrained`; loading and running it does not need this package. The arguments and
        errors are those of `merge_adapter`. The former weights are not kept.
        """
        self.merge_adapter(adapter_names)
        assert self._merged is not None
        model = super().unload()
        self._merged.keep_nothing()
        return model

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped; after `merge_and_unload` the merged model."""
        if self._merged is not None and self._merged.is_kept:
            self.unmerge_adapter()
        return super().unload()

    def _expect_unmerged(self, what: str) -> None:
        if self.merged_adapters:
            raise ValueError(
                f"{what}: the adapters {list(self.merged_adapters)} are in the weights; unmerge first."
            )

    # --- what is edited -------------------------------------------------------------------------------------

    def subspace(self, site: Site | str) -> Subspace:
        """The subspace that the active adapters edit at a site, with a basis that does not train.

        Raises:
            ValueError: no active adapter edits this site.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        edits = self.edits()
        if site not in edits:
            raise ValueError(f"No active adapter edits {site}; edited are {list(map(str, edits))}.")
        return edits[site].edited()

    def alignment(self) -> Alignment:
        """The subspaces that the active adapters edit, as {variable: (site, subspace)}; inverse of `get_reft_model`.

        The variables are named after the alignment from which the adapter started, or after the parts of its basis, or
        after their site. The facts contain the method, the base model, the configurations, and that alignment's facts.

        Raises:
            ValueError: no adapter is active.
        """
        adapters = {name: self.adapter(name) for name in self.active_adapters}
        if not adapters:
            raise ValueError("No adapter is active, so nothing is edited.")
        return alignment_of(adapters, self.base_model)

    def hooks(self) -> list[Hook]:
        """The modules of the active adapters that replace modules of the base model."""
        return [v for name in self.running_adapters for v in self.adapter(name).hooks(self.backbone)]

    # --- on disk and on the Hub ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, adapter_name: str | None = None) -> None:
        """Write one adapter, or all adapters, into a folder.

        With several adapters, "default" is written into the folder itself, and each other one into a subfolder with
        its name.
        """
        self.name_unsaved()
        names = self.names if adapter_name is None else [adapter_name]
        base, kind = base_facts(self.base_model), type(self.base_model).__name__
        for name in names:
            at_root = name == "default" or len(names) == 1
            into = Path(folder) if at_root else Path(folder, name)
            write_adapter(self.adapter(name), into, base, kind, self.model_tags)

    def load_adapter(
        self, folder: str | Path, adapter_name: str, is_trainable: bool = False, revision: str | None = None
    ) -> None:
        """Read an adapter from a folder or from the Hub, under a name; it is not active yet.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown format or key, a base model that the adapter was not made for, or tensors that do
                not fit the configuration.
        """
        folder = hub.local_folder(folder, "an adapter", revision)
        saved = read_adapter(folder, base_facts(self.base_model), adapter_name)
        self.add_adapter(adapter_name, saved.config)
        self.adapters.fill(adapter_name, saved, is_trainable)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
    ) -> ReftModel:
        """The base model with a saved adapter, active. Errors as in `load_adapter`.

        The folder was written by `save_pretrained`, or by `transformers.Trainer` or a trainer of TRL: a checkpoint, or
        the result of `trainer.save_model`. If it contains several adapters, the one with this name is read.
        """
        saved = read_adapter(hub.local_folder(folder, "an adapter", revision), base_facts(model), adapter_name)
        wrapped = cls(model, saved.config, adapter_name)
        try:
            wrapped.adapters.fill(adapter_name, saved, is_trainable)
        except ValueError:
            wrapped.unload()
            raise
        return wrapped

    def push_to_hub(self, name: str, private: bool = False, token: str | None = None) -> str:
        """Upload the adapters to the Hub; returns the address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(Path(folder), name, private=private, token=token)

    def get_extra_state(self) -> Tensor:
        """The configurations of the adapters, as a part of `state_dict`, so that a file of the state can be read
        again."""
        return as_tensor({name: self.adapter(name) for name in self.names}, base_facts(self.base_model))

    def set_extra_state(self, state: Any) -> None:
        """ValueError if the state belongs to adapters with another configuration, which shapes alone do not show."""
        for name, (config, _) in from_tensor(state, "The state").items():
            if name in self.names:
                self.adapter(name).expect_same_function(config, self.backbone)

    # --- running ----------------------------------------------------------------------------------------

    def keep_past(self, examples: Dataset, *, memory: int | str | None = None) -> Dataset:
        """Compute once what comes before the first edit of these examples (`engine/frozen_past.py`).

        Until `forget_past` the base model stays in eval mode, because dropout would make its states random.

        Args:
            examples: tokenised prompts and answers, as `reft.data.tokenise` returns them.
            memory: the memory budget.

        Returns:
            The examples with a column `row`, by which `forward` finds the stored states. Train on them, with plain
            `Trainer` too, with `PromptCollator` or any collator that passes on an integer column.

        Raises:
            ValueError: no active adapter, or one with `modules_to_save`, which change what comes before the edit.
        """
        instance(examples, Dataset, "examples", "tokenise(rows, tokenizer) makes one")
        edits = self.edits()
        if not edits or self.hooks():
            raise ValueError(
                "keep_past needs active adapters without modules_to_save, which would change the states that it stores."
            )
        listed = tokenised(examples)
        self.expect_columns(listed)
        self.base_model.eval()
        whole = self.edits_every_token()
        self._past = AnswersPast(self.backbone, listed, edits, every_token=whole, memory=memory)
        return examples.add_column("row", list(range(len(examples))))

    def forget_past(self) -> None:
        """Free the memory of `keep_past`; from now on everything is computed in each call."""
        self._past = None

    def train(self, mode: bool = True) -> ReftModel:
        """Set the train mode of edits and base model; after `keep_past` the base model stays in eval mode."""
        super().train(mode)
        if self._past is not None:
            self.base_model.eval()
        return self

    def _past_loss(self, row: Tensor, items: Tensor | int | None) -> CausalLMOutput:
        if self._past is None:
            raise ValueError(
                "A batch has the column 'row' of keep_past, which was not called on this model: call it first."
            )
        loss, logits = self._past.loss(row, self.edits(), items)
        return CausalLMOutput(loss=loss, logits=logits)


def get_reft_model(
    model: nn.Module,
    config_or_alignment: ReftConfig | Alignment,
    adapter_name: str = "default",
    *,
    config: ReftConfig | None = None,
) -> ReftModel:
    """A model with a new, untrained adapter. The model's own parameters are frozen while it is wrapped.

    Args:
        model: the base model.
        config_or_alignment: the configuration of the adapter; or an alignment, in whose subspaces the adapter starts.
            Several variables at one site become the parts of one basis (`ReftModel.train_parts`).
        adapter_name: a name for the adapter.
        config: for an alignment, all settings that it does not contain; by default LoReFT. `basis="fixed"` keeps the
            subspaces as they are and trains only what is written into them. Component, layers, positions, rank and
            parts are those of the alignment.

    Raises:
        TypeError: a model, configuration or alignment of the wrong type.
        ValueError, IndexError: a layer, component, module, rank or width that the model does not have; an alignment
            that a single adapter cannot have.
    """
    return ReftModel(model, config_or_alignment, adapter_name, config=config)
