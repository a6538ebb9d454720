"""Adapters on disk and on the Hub, in PEFT's layout.

adapter_config.json         everything that changes the function, and what the adapter is for
adapter_model.safetensors   the numbers: raw bases, W, b, saved modules; nothing of size d × d
README.md                   a model card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from subspace_lab.core.checkpoints import read_json, save_tensors, write_json, write_text
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.model import Adapter, ReftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1

CARD = """---
base_model: {base}
library_name: subspace-lab
tags:
- reft
---

# {method} adapter

A representation-finetuning adapter for `{base}`, made with subspace_lab {version}.

- method: {method}, rank {rank}, layers {layers}, positions `{positions}` (tied: {tied}), at `{component}`
- trainable parameters: {parameters:,}

```python
from transformers import AutoModelForCausalLM
from subspace_lab.reft import ReftModel, from_pretrained

model = from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/adapter")
```
"""


def save_pretrained(model: ReftModel, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write one adapter, or all: "default" (or the one named) into the folder, others into folders inside it."""
    folder = Path(folder)
    if adapter_name is not None:
        _save(model, model.adapter(adapter_name), folder)
        return
    for name in model.names:
        _save(model, model.adapter(name), folder if name == "default" or len(model.names) == 1 else folder / name)


def _save(model: ReftModel, adapter: Adapter, folder: Path) -> None:
    from importlib.metadata import version

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    facts = adapter.config.as_dict()
    save_tensors(folder / WEIGHTS, state)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "REFT",
            "format": FORMAT,
            "subspace_lab": version("subspace-lab"),
            **facts,
            "base": base_facts(model),
        },
    )
    card = {**facts, "base": facts["base_model_name_or_path"] or "unknown", "version": version("subspace-lab")}
    parameters = sum(p.numel() for p in adapter.edits.parameters())
    card = {k: v for k, v in card.items() if k in CARD}
    write_text(folder / "README.md", CARD.format(**card, parameters=parameters))


def load_adapter(model: ReftModel, folder: str | Path, adapter_name: str, *, is_trainable: bool = False) -> None:
    """Read an adapter into a model under a name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown format or key, a base model that the adapter was not made for, or numbers
            that do not fit the configuration.
    """
    folder = Path(folder)
    config = read_config(folder, model)
    model.add_adapter(adapter_name, config)
    try:
        state = load_file(folder / WEIGHTS)
        model.adapter(adapter_name).load_state_dict(state, strict=True)
    except (RuntimeError, SafetensorError) as error:
        model.delete_adapter(adapter_name)
        raise ValueError(f"{folder / WEIGHTS} does not fit its configuration: {error}") from error
    model.adapter(adapter_name).requires_grad_(is_trainable)


def from_pretrained(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> ReftModel:
    """The base model with a saved adapter, from a folder or from the Hub; see `load_adapter` for the errors."""
    folder = local_folder(folder)
    raw = dict(read_json(folder / CONFIG)) if (folder / CONFIG).exists() else {}
    wrapped = ReftModel(model, _config(raw, folder), adapter_name)
    wrapped.delete_adapter(adapter_name)
    load_adapter(wrapped, folder, adapter_name, is_trainable=is_trainable)
    wrapped.active_adapters = [adapter_name]
    wrapped.train(model.training)
    return wrapped


def local_folder(name: str | Path) -> Path:
    """A folder that is there, or the Hub's copy of that name."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name)))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a folder nor an adapter on the Hub: {error}") from error


def push_to_hub(model: ReftModel, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the adapters to the Hub; returns the address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return str(api.upload_folder(repo_id=name, folder_path=folder))


def read_config(folder: Path, model: ReftModel) -> ReftConfig:
    """The configuration in a folder, checked against the base model."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is no whole adapter: {name} is missing.")
    raw = dict(read_json(folder / CONFIG))
    config = _config(raw, folder)
    made_for, here = raw.get("base", {}), base_facts(model)
    different = {k: (made_for[k], here[k]) for k in here if k in made_for and made_for[k] != here[k]}
    if different:
        raise ValueError(
            f"{folder} was made for another base model: "
            + ", ".join(f"{k} {a!r}, here {b!r}" for k, (a, b) in different.items())
        )
    return config


def _config(raw: dict[str, Any], folder: Path) -> ReftConfig:
    if not raw:
        raise FileNotFoundError(f"{folder} is no whole adapter: {CONFIG} is missing.")
    if raw.get("peft_type") != "REFT" or raw.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is of type {raw.get('peft_type')!r}, format {raw.get('format')!r}; this version "
            f"reads 'REFT', {FORMAT}."
        )
    known = {k: v for k, v in raw.items() if k not in ("peft_type", "format", "subspace_lab", "base")}
    return ReftConfig.from_dict(known)


def base_facts(model: ReftModel) -> dict[str, Any]:
    """What an adapter must find again in its base model."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "model_type": getattr(config, "model_type", type(model.base_model).__name__),
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        "vocab_size": getattr(text, "vocab_size", None),
    }
