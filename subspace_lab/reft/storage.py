"""Adapters on disk and on the Hub, in PEFT's layout.

adapter_config.json         everything that changes the function; the base model; the alignment it started from
adapter_model.safetensors   the numbers: raw bases, W, b, saved modules; nothing of size d × d
README.md                   a model card

The first two belong together: the metadata of the numbers has a digest of the configuration. A save that is
interrupted leaves the old pair, or the new numbers with the new configuration under its provisional name; both can
be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from subspace_lab.core.files import package_version, read_json, save_tensors, write_json, write_text
from subspace_lab.reft._adapters import Adapter, SavedAdapter, differences
from subspace_lab.reft.config import ReftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEXT = f".{CONFIG}.next"
FORMAT = 1

CARD = """---
base_model: {base}
library_name: subspace-lab
tags:
- reft{tags}
---

# {method} adapter

A representation-finetuning adapter for `{base}`, made with subspace_lab {version}.

- method: {method}, rank {rank}, layers {layers}, positions `{positions}` (tied: {tied}), at `{component}`
- parameters of its interventions: {parameters:,}

```python
from transformers import {model}
from subspace_lab.reft import ReftModel

model = ReftModel.from_pretrained({model}.from_pretrained("{base}"), "path/to/this/adapter")
```
"""


def write_adapter(
    adapter: Adapter, folder: Path, base: dict[str, Any], model: str, tags: Sequence[str] = ()
) -> None:
    """Write an adapter into a folder.

    Args:
        base: the facts of its base model, from `base_facts`.
        model: the class of the base model, for the card.
        tags: further tags, for the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    facts = adapter.config.as_dict()
    described = {"peft_type": "REFT", "format": FORMAT, "subspace_lab": package_version(), **facts, "base": base}
    if adapter.origin:
        described["alignment"] = adapter.origin
    write_json(folder / NEXT, described)
    save_tensors(folder / WEIGHTS, state, {"config": digest(adapter.config)})
    os.replace(folder / NEXT, folder / CONFIG)
    card = {
        **{k: facts[k] for k in ("method", "rank", "layers", "positions", "tied", "component")},
        "base": facts["base_model_name_or_path"] or "unknown",
        "version": package_version(),
        "model": model,
        "tags": "".join(f"\n- {tag}" for tag in tags),
        "parameters": sum(p.numel() for p in adapter.edits.parameters()),
    }
    write_text(folder / "README.md", CARD.format(**card))


def read_adapter(folder: Path, base: dict[str, Any]) -> SavedAdapter:
    """A saved adapter, for a base model with these facts.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown format or key, files that are broken or do not belong together, or a base model
            that the adapter was not made for.
    """
    if not (folder / WEIGHTS).exists() or not any((folder / c).exists() for c in (CONFIG, NEXT)):
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
        raise FileNotFoundError(f"{folder} is not a whole adapter: {' and '.join(missing)} missing.")
    try:
        written_with = _written_with(folder)
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    for name in (CONFIG, NEXT):
        if not (folder / name).exists():
            continue
        raw = read_json(folder / name)
        config = _config(raw, folder / name)
        if digest(config) == written_with:
            break
    else:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration that {WEIGHTS} was saved with: one of them was changed."
        )
    different = differences(raw.get("base", {}), base)
    if different:
        raise ValueError(f"{folder} was made for another base model: {different}.")
    return SavedAdapter(config, state, raw.get("alignment", {}))


def digest(config: ReftConfig) -> str:
    """A digest of the configuration, which no file may change, except for the name of the base model."""
    facts = {k: v for k, v in config.as_dict().items() if k not in ("base_model_name_or_path", "revision")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _written_with(folder: Path) -> str | None:
    """The digest of the configuration that the numbers were saved with."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get("config")


def _finish(folder: Path) -> None:
    """Complete a save that was interrupted between its files, before the next save overwrites what it needs."""
    if not (folder / NEXT).exists():
        return
    try:
        belongs = _written_with(folder) == digest(_config(read_json(folder / NEXT), folder / NEXT))
    except (OSError, ValueError, SafetensorError):
        return
    if belongs:
        os.replace(folder / NEXT, folder / CONFIG)


def _config(raw: Any, path: Path) -> ReftConfig:
    if not isinstance(raw, dict) or raw.get("peft_type") != "REFT" or raw.get("format") != FORMAT:
        found = raw if isinstance(raw, dict) else {}
        raise ValueError(
            f"{path} is of type {found.get('peft_type')!r}, format {found.get('format')!r}; this version "
            f"reads 'REFT', {FORMAT}."
        )
    known = {k: v for k, v in raw.items() if k not in ("peft_type", "format", "subspace_lab", "base", "alignment")}
    try:
        return ReftConfig.from_dict(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
