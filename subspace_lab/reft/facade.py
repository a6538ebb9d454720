"""A frozen base model and what is trained with it, as PyTorch, `transformers.Trainer` and their like see it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from subspace_lab.core.backbone import Backbone


class Facade(nn.Module):
    """A module around a base model whose state is everything but the base model.

    Attributes:
        base_model: the user's model. Its parameters ask for no gradient while it is wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = Backbone(model)
        self.base_model = model
        self.training = model.training  # or the edits' dropout would be on while the base model's is off
        self._asked = [p for p in model.parameters() if p.requires_grad]

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped."""
        for p in self._asked:
            p.requires_grad_(True)
        return self.base_model

    @property
    def config(self) -> Any:
        """The base model's configuration, None where it has none."""
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
        """Keep the base model's activations again."""
        base: Any = self.base_model
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()

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
