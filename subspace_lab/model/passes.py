"""Checks the settings of a generation: its first pass must be over the prompt, the others over new tokens.

A generation consists of many forward passes, and edits are assigned to them by their order: the prompt is edited in the
first pass, new tokens in the later ones. Some settings of `generate` make other passes over the same modules. These
passes would be mistaken for the expected ones, so such settings are refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def setting(model: nn.Module, generation: Mapping[str, Any], name: str) -> Any:
    """A setting of `generate`: from its keywords, from the configuration among them, or from the model's own one."""
    configs = (generation.get("generation_config"), getattr(model, "generation_config", None))
    values = (generation.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def check_passes(
    model: nn.Module, generation: Mapping[str, Any], every_token: bool, use_cache: bool, kept: int
) -> None:
    """Refuse settings with which the passes are not first over the prompt and then over new tokens.

    Args:
        kept: how many tokens of the prompt are already in a cache.

    Raises:
        ValueError: an assistant that runs the model's own layers; a prompt in chunks; guidance by a second run, unless
            edits are made in the first pass only; Whisper's detection of the language.
    """
    if setting(model, generation, "prefill_chunk_size") is not None:
        raise ValueError("prefill_chunk_size: the prompt is edited in one pass over it, not in chunks.")
    if setting(model, generation, "assistant_early_exit") is not None:
        raise ValueError(
            "assistant_early_exit guesses tokens with the model's own first layers, and these passes cannot be "
            "distinguished from the edited model's: use prompt_lookup_num_tokens, or another model as assistant_model."
        )
    assistant = generation.get("assistant_model")
    if isinstance(assistant, nn.Module) and _shared(model, assistant):
        raise ValueError(
            "assistant_model is, or has parts of, the model that is edited, and its passes cannot be distinguished "
            "from the edited model's: load it a second time, or use prompt_lookup_num_tokens."
        )
    lookup = setting(model, generation, "prompt_lookup_num_tokens")
    if kept and (assistant is not None or lookup is not None):
        # transformers 5.24 then gives other tokens even without an edit.
        raise ValueError(
            f"Assisted generation runs the whole prompt, also the {kept} tokens that are in the cache already: "
            "continue from a cache without assistant_model and prompt_lookup_num_tokens, or give the conversation "
            "without a cache."
        )
    guidance = setting(model, generation, "guidance_scale")
    if guidance not in (None, 1, 1.0) and (every_token or not use_cache):
        raise ValueError(
            f"guidance_scale={guidance} runs the model a second time for every token, without the prompt. Edits are "
            "then made in the prompt's first pass only, so use the cache, and not every_token."
        )
    detects = getattr(model, "detect_language", None) is not None and _multilingual(model, generation)
    if detects and setting(model, generation, "language") is None:
        raise ValueError(
            "Whisper runs once more to detect the language, and that pass would be mistaken for the prompt's: name the "
            "language, as in language='en'."
        )


def _shared(model: nn.Module, other: nn.Module) -> bool:
    own = {id(module) for module in model.modules()}
    return any(id(module) in own for module in other.modules())


def _multilingual(model: nn.Module, generation: Mapping[str, Any]) -> bool:
    return bool(setting(model, generation, "is_multilingual"))
