"""A frozen base model and what is trained with it, as PyTorch, `transformers.Trainer` and PEFT's users see it.

Nothing here knows what is trained: `ReftModel` adds the adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.reft._label_log_probs import label_output


class Wrapper(nn.Module):
    """A module around a base model, whose `state_dict` leaves the base model out.

    Attributes:
        base_model: the user's model. Its parameters ask for no gradient while it is wrapped.
        model_tags: tags for the model card.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = Backbone(model)
        self.base_model = model
        self.training = model.training  # or the edits' dropout would be on while the base model's is off
        self._asked = [p for p in model.parameters() if p.requires_grad]
        self.model_tags: list[str] = []

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped."""
        if self.is_gradient_checkpointing:
            self.gradient_checkpointing_disable()
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

    def _get_name(self) -> str:
        # By this name, and by `loss_type`, Trainer decides whether labels are shifted.
        return self.base_model._get_name()

    @property
    def loss_type(self) -> Any:
        """The base model's kind of loss."""
        return getattr(self.base_model, "loss_type", None)

    def is_causal(self) -> bool:
        """Whether the base model is a causal language model, whose labels show where the prompt ends."""
        return hasattr(self.base_model, "generate") and not getattr(self.config, "is_encoder_decoder", False)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model averages its loss over the number of items that Trainer gives it.

        Language models do. A classification head may take the number and not use it; the loss of a training that
        accumulates gradients would then be too large by the number of its micro-batches.
        """
        base: Any = self.base_model
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
        return takes_any and self.loss_type == "ForCausalLM"

    @property
    def generation_config(self) -> Any:
        """The base model's defaults of `generate`."""
        base: Any = self.base_model
        return base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        base: Any = self.base_model
        base.generation_config = value

    def add_model_tags(self, tags: str | Sequence[str]) -> None:
        """Tags for the model card."""
        self.model_tags += [tags] if isinstance(tags, str) else list(tags)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether some block of the base model is recomputed in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base_model.modules())

    def __call__(self, *inputs: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        """`forward`; for TRL's trainers, which set `fused_lm_head`, the labels' log-probabilities."""
        output = super().__call__(*inputs, **named)
        return label_output(output.logits, named["labels"], output.loss) if fused_lm_head else output

    def check_checkpointing(self, edits: Iterable[Site], hooks: Iterable[Hook]) -> None:
        """ValueError where gradient checkpointing would lose the gradient of something that is trained."""
        base = self.base_model
        if not (base.training and torch.is_grad_enabled() and self.is_gradient_checkpointing):
            return
        inside = [str(s) for s in edits if not s.component.endswith(("block_output", "block_input"))]
        blocks = [f"{block}." for stack in self.backbone.anatomy.stacks.values() for block in stack]
        inside += [hook.path for hook in hooks if hook.path.startswith(tuple(blocks))]
        if inside:
            raise ValueError(
                "Gradient checkpointing runs blocks twice and loses the gradient of what is trained inside them: "
                f"{inside}. Edit block_output, or train without gradient checkpointing."
            )

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the base model's blocks in the backward pass; the arguments are its own."""
        base: Any = self.base_model
        more = {"every_n_layers": every_n_layers} if every_n_layers != 1 else {}
        more |= {"offload": offload} if offload else {}
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **more)
        # A checkpointed block passes gradients on only if something that enters it asks for one. The base model
        # may have added the hook for that itself; of two hooks it would remove only one.
        base.disable_input_require_grads()
        base.enable_input_require_grads()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable`, by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the base model's activations again."""
        base: Any = self.base_model
        newer = getattr(base, "activation_checkpointing_disable", None)
        (newer or base.gradient_checkpointing_disable)()
        base.disable_input_require_grads()

    activation_checkpointing_disable = gradient_checkpointing_disable

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The numbers of what is trained, without those of the base model."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in [k for k in state if k.startswith(f"{prefix}base_model.")]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gives; RuntimeError where a number is missing or too many."""
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
