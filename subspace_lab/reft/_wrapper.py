"""A frozen base model and what is trained with it, with the interface of PyTorch, `transformers.Trainer` and PEFT.

Nothing here knows what is trained: `ReftModel` adds the adapters. Attributes that a wrapper does not have are taken
from the base model, as in PEFT: `dtype`, `get_input_embeddings`, `prepare_inputs_for_generation` and so on. Modules
that are reached in this way are the base model's own modules, which run without edits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Unpack, get_args, get_origin

import torch
from torch import nn
from transformers.utils.generic import TransformersKwargs

from subspace_lab.core.sites import Site
from subspace_lab.engine.notices import say_once
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.cache_argument import NAMES as CACHE_NAMES

OWN = (
    "prompt_lengths",
    "adapter_names",
    "row",
)  # arguments of a wrapper's forward that the base model does not have
LOOSE = (  # arguments that language models accept although their signature does not name them
    "return_dict",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "num_items_in_batch",
    "shift_labels",
    "fused_lm_head",
    *CACHE_NAMES,
)
_RUNS = "would run the base model without edits; use `generate`, or `unload()` for the base model itself."
UNEDITED = {
    "generate_batch": _RUNS,
    "init_continuous_batching": _RUNS,
    "continuous_batching_context_manager": _RUNS,
    "resize_token_embeddings": "replaces modules that the adapters know: resize the base model before it is wrapped.",
}


class Wrapper(nn.Module):
    """A module around a base model; its `state_dict` does not contain the base model.

    Attributes:
        base_model: the user's model. Its parameters require no gradient while it is wrapped.
        model_tags: tags for the model card.
    """

    # Trainer refuses to train a quantised model unless this is set; here something other than its weights is trained.
    _hf_peft_config_loaded = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__class__ = of_base(type(self), type(innermost(model)))  # type: ignore[arg-type]
        self.backbone = Backbone(model)
        self.base_model = model
        self.training = model.training  # otherwise the edits' dropout could be on while the base model's is off
        self._trainable_before = [p for p in model.parameters() if p.requires_grad]
        self.model_tags: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Attributes that neither this class nor PyTorch's modules have are those of the base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_model")
            # If a property of this class fails, the base model's attribute of that name must not be returned instead.
            # Private attributes that other libraries keep in the base model (such as accelerate's `_hf_hook`) are not
            # attributes of the wrapper either.
            ours = any(name in kind.__dict__ for kind in type(self).__mro__)
            if base is None or ours or (name.startswith("_") and not hasattr(type(base), name)):
                raise
        if name in UNEDITED:
            raise AttributeError(f"{name} {UNEDITED[name]}")
        try:
            return getattr(base, name)
        except AttributeError:
            raise AttributeError(
                f"Neither {type(self).__qualname__} nor its base model has an attribute {name!r}."
            ) from None

    def trained_base_parameters(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the base model's parameters that require gradients again, such as those of a LoRA."""
        return {name: p for name, p in self.base_model.named_parameters() if p.requires_grad}

    def name_unsaved(self) -> None:
        """Say once which trained parameters are not part of what is saved."""
        own = self.trained_base_parameters()
        if own:
            say_once(
                f"{len(own)} parameters of the base model require gradients ({next(iter(own))}, …): they are trained "
                "with the adapter but not saved with it. Save them by the base model's own save_pretrained."
            )

    def get_base_model(self) -> nn.Module:
        """The base model, which stays wrapped; `unload` returns it as it was before."""
        return self.base_model

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped."""
        if self.is_gradient_checkpointing:
            self.gradient_checkpointing_disable()
        for p in self._trainable_before:
            p.requires_grad_(True)
        return self.base_model

    @property
    def config(self) -> Any:
        """The base model's configuration; None if it has none."""
        return getattr(self.base_model, "config", None)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def _get_name(self) -> str:
        # Trainer uses this name, and `loss_type`, to decide whether labels are shifted.
        return self.base_model._get_name()

    @property
    def loss_type(self) -> Any:
        """The base model's kind of loss."""
        return getattr(self.base_model, "loss_type", None)

    def is_causal(self) -> bool:
        """Whether the base model is a causal language model, in which labels show where the prompt ends."""
        return hasattr(self.base_model, "generate") and not getattr(self.config, "is_encoder_decoder", False)

    def takes(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the base model's forward."""
        return dict(list(inspect.signature(type(innermost(self.base_model)).forward).parameters.items())[1:])

    def named(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the base model's names, without those that are None.

        Raises:
            TypeError: an argument that the base model does not have, or that it would accept and ignore.
        """
        parameters = self.takes()
        places = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(inputs) > len(places):
            raise TypeError(f"{len(inputs)} positional inputs for a model that takes {places}.")
        twice = [n for n in places[: len(inputs)] if n in named]
        unknown = self._unknown(named)
        if twice or unknown:
            what = f"{twice} given twice" if twice else f"no {unknown} is known"
            raise TypeError(f"{what}: {self._get_name()} takes {[n for n in parameters if n != 'kwargs']}.")
        given = {**dict(zip(places, inputs, strict=False)), **named}
        return {name: value for name, value in given.items() if value is not None}

    def _unknown(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are no argument of the base model."""
        parameters = self.takes()
        further = _further_names(type(innermost(self.base_model)), parameters)
        return [] if further is None else [n for n in names if n not in parameters and n not in further]

    def expect_columns(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """ValueError for examples of answers if the base model does not write answers, or does not take a column."""
        if not self.is_causal():
            raise ValueError(
                f"{self._get_name()} is no causal language model, and writes no answers after prompts: train it with "
                "transformers.Trainer."
            )
        unknown = self._unknown(name for name in examples[0] if name not in OWN)
        if unknown:
            raise ValueError(
                f"The examples have the columns {unknown}, which {self._get_name()} does not take: remove them."
            )

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model divides its loss by the number of items that Trainer passes.

        Language models do. A classification head may accept this number but not use it. When gradients are accumulated,
        the loss would then be too large by a factor of the number of micro-batches.
        """
        base: Any = self.base_model
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.forward).parameters.values())
        return takes_any and self.loss_type == "ForCausalLM"

    @property
    def generation_config(self) -> Any:
        """The base model's defaults for `generate`."""
        base: Any = self.base_model
        return base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        base: Any = self.base_model
        base.generation_config = value

    def add_model_tags(self, tags: str | Sequence[str]) -> None:
        """Add tags for the model card."""
        self.model_tags += [tags] if isinstance(tags, str) else list(tags)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether some block of the base model is recomputed in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base_model.modules())

    def check_checkpointing(self, edits: Iterable[Site], hooks: Iterable[Hook]) -> None:
        """ValueError if gradient checkpointing would lose the gradient of something that is trained."""
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
        """Recompute the base model's blocks in the backward pass; the arguments are those of the base model."""
        base: Any = self.base_model
        more = {"every_n_layers": every_n_layers} if every_n_layers != 1 else {}
        more |= {"offload": offload} if offload else {}
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **more)
        # A checkpointed block passes gradients on only if one of its inputs requires a gradient. The base model may
        # already have added the hook for that; it removes only one hook, so remove its hook first.
        base.disable_input_require_grads()
        base.enable_input_require_grads()

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Store the base model's activations again, instead of recomputing them."""
        base: Any = self.base_model
        newer = getattr(base, "activation_checkpointing_disable", None)
        (newer or base.gradient_checkpointing_disable)()
        base.disable_input_require_grads()

    activation_checkpointing_disable = gradient_checkpointing_disable

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The tensors of what is trained, without those of the base model."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in [k for k in state if k.startswith(f"{prefix}base_model.")]:
            del state[key]
        self.name_unsaved()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the result of `state_dict`; RuntimeError if a tensor is missing or unexpected."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        # States from earlier versions have no `_extra_state`.
        missing = [k for k in result.missing_keys if not k.startswith("base_model.") and k != "_extra_state"]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"Missing {missing}, unexpected {result.unexpected_keys} in a ReFT state.")
        return type(result)([], [])

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of base model and adapters."""
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding)] if exclude_embeddings else []
        left_out = {id(p) for table in tables for p in table.parameters()}
        chosen = [
            p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable)
        ]
        return sum(p.numel() for p in chosen)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The size in bytes of the parameters and, optionally, buffers of base model and adapters."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in PEFT's format."""
        trainable, every = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || "
            f"trainable%: {100 * trainable / every:.4f}"
        )


def innermost(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of PEFT or of this package."""
    find = getattr(model, "get_base_model", None)
    return model if find is None else find()


@cache
def of_base(kind: type, base: type) -> type:
    """The wrapper class for base models of one class.

    `Trainer` looks at the class of a model, not at the model, to find out which of its arguments are labels and whether
    it returns a loss. It uses the signature of `forward` to find out which columns of the data the model accepts. So
    there is one wrapper class for each class of base models; its `forward` has the base model's signature and our
    arguments.
    """

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        return kind.forward(self, *inputs, **named)  # type: ignore[attr-defined]

    try:
        theirs = list(inspect.signature(base.forward).parameters.values())  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # not written in Python
        return kind
    own = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in OWN]
    own = [p for p in own if p.name not in {t.name for t in theirs}]
    rest = [p for p in theirs if p.kind is p.VAR_KEYWORD]
    before = [p for p in theirs if p.kind is not p.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature([*before, *own, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__  # type: ignore[attr-defined]
    # Pipelines and Trainer use the class's name; people see the qualified name.
    shown = {"__module__": kind.__module__, "__qualname__": f"{kind.__qualname__}[{base.__name__}]"}
    return type(base.__name__, (kind,), {**shown, "__doc__": kind.__doc__, "forward": forward})


def _further_names(base: type, parameters: Mapping[str, inspect.Parameter]) -> tuple[str, ...] | None:
    """The arguments that a forward accepts without naming them; None if unknown, so that any argument is possible.

    Models of transformers pass further keyword arguments on without checking, so that a misspelt one has no effect.
    """
    rest = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return CACHE_NAMES
    annotated = get_args(rest.annotation)[0].__annotations__ if get_origin(rest.annotation) is Unpack else ()
    if not annotated and base.__module__.partition(".")[0] != "transformers":
        return None
    return (*LOOSE, *TransformersKwargs.__annotations__, *annotated)
