"""Adapters on disk and on the Hub, in PEFT's layout.

adapter_config.json         everything that changes the function; the base model; the alignment it started from
adapter_model.safetensors   the tensors: raw bases, W, b, saved modules; nothing of size d × d
README.md                   a model card

The first two belong together: the metadata of the tensors contains a digest of the configuration. An interrupted save
leaves either the old pair, or the new tensors with the new configuration under its provisional name; both can be read.

Files of `Trainer` can be read too: model.safetensors contains the state of the whole `ReftModel`. One of its entries,
a module's extra state in PyTorch's sense, contains the configurations of all adapters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from subspace_lab.core.files import expect_stored, package_version, read_json, save_tensors, write_json, write_text
from subspace_lab.reft._adapters import Adapter, SavedAdapter, differences
from subspace_lab.reft.config import ReftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NEXT = f".{CONFIG}.next"
CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")  # the files that Trainer writes
EXTRA = "_extra_state"  # PyTorch's name
FORMAT = 1
# Fields that earlier versions did not have, and the values that these versions used. With these values the fields are
# left out of the digest, so that it equals that of the earlier versions.
LATER = {"every_token": False, "bias": True, "heads": ()}

CARD = """---
base_model: {base}
library_name: subspace-lab
tags:
- reft{tags}
---

# {method} adapter

A representation-finetuning adapter for `{base}`, made with subspace_lab {version}.

- method: {method}, rank {rank}, layers {layers}{heads}, positions `{positions}` (tied: {tied}), at `{component}`
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
    refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    facts = adapter.config.as_dict()
    write_json(folder / NEXT, described(adapter, base))
    save_tensors(folder / WEIGHTS, state, {"config": digest(adapter.config)})
    os.replace(folder / NEXT, folder / CONFIG)
    card = {
        **{k: facts[k] for k in ("method", "rank", "layers", "positions", "tied", "component")},
        "heads": f", heads {dict(facts['heads'])}" if facts["heads"] else "",
        "base": facts["base_model_name_or_path"] or "unknown",
        "version": package_version(),
        "model": model,
        "tags": "".join(f"\n- {tag}" for tag in tags),
        "parameters": sum(p.numel() for p in adapter.edits.parameters()),
    }
    write_text(folder / "README.md", CARD.format(**card))


def refuse_others(folder: Path) -> None:
    """FileExistsError for a folder that holds a model, or an adapter of another library.

    transformers takes a folder with an adapter_config.json for an adapter, and could no longer load the model in it.
    """
    if not folder.is_dir():
        return
    if (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds a model, which could not be loaded any more with an {CONFIG} beside it: name another "
            "folder."
        )
    try:
        kind = read_json(folder / CONFIG).get("peft_type") if (folder / CONFIG).exists() else "REFT"
    except (ValueError, AttributeError):
        return  # a broken file of ours may be written anew
    if kind != "REFT":
        raise FileExistsError(f"{folder} holds a {kind} adapter, which would be overwritten: name another folder.")


def described(adapter: Adapter, base: dict[str, Any]) -> dict[str, Any]:
    """The JSON that is written for an adapter beside its tensors."""
    facts = {"peft_type": "REFT", "format": FORMAT, "subspace_lab": package_version(), **adapter.config.as_dict()}
    return {**facts, "base": base, **({"alignment": adapter.origin} if adapter.origin else {})}


def as_tensor(adapters: Mapping[str, Adapter], base: dict[str, Any]) -> Tensor:
    """The JSON of some adapters as a tensor of its bytes, because a file of tensors can contain nothing else."""
    text = json.dumps({name: described(adapter, base) for name, adapter in adapters.items()}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def from_tensor(state: Any, where: Path | str) -> dict[str, tuple[ReftConfig, dict[str, Any]]]:
    """{adapter: (its configuration, all of its JSON)} from the result of `as_tensor`.

    Raises:
        ValueError: anything else.
    """
    try:
        found = json.loads(bytes(state.cpu().tolist()).decode())
        raw = {str(name): dict(facts) for name, facts in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: its {EXTRA} is not the configurations of ReFT adapters: {error}") from error
    return {name: (_config(facts, f"{where}, {name}"), facts) for name, facts in raw.items()}


def read_adapter(folder: Path, base: dict[str, Any], name: str = "default") -> SavedAdapter:
    """A saved adapter, for a base model with these facts.

    Args:
        name: the adapter to read if `Trainer` wrote a model with several. A single adapter is read whatever its name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown format or key, files that are broken or do not belong together, or a base model for which
            the adapter was not made.
    """
    checkpoint = next((folder / c for c in CHECKPOINTS if (folder / c).exists()), None)
    if checkpoint is not None and not (folder / WEIGHTS).exists():
        return _from_checkpoint(checkpoint, base, name)
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
    if checkpoint is not None:
        _refuse_two(state, _from_checkpoint(checkpoint, base, name).state, folder / WEIGHTS, checkpoint)
    return SavedAdapter(config, state, raw.get("alignment", {}))


def _from_checkpoint(path: Path, base: dict[str, Any], name: str) -> SavedAdapter:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:  # safetensors and torch raise many types of errors
        raise ValueError(f"{path} is not a whole file of tensors: {str(error).splitlines()[0]}") from error
    expect_stored(path, state)
    if EXTRA not in state:
        raise ValueError(
            f"{path} holds no ReFT adapter, or was written by an earlier version, which did not save the "
            "configuration: then create the model with its configuration and use `load_state_dict`."
        )
    found = from_tensor(state[EXTRA], path)
    if name not in found and len(found) != 1:
        raise ValueError(f"{path} holds the adapters {sorted(found)}; name one of them, not {name!r}.")
    name = name if name in found else next(iter(found))
    config, raw = found[name]
    different = differences(raw.get("base", {}), base)
    if different:
        raise ValueError(f"{path} was made for another base model: {different}.")
    prefix = f"adapters.{name}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return SavedAdapter(config, own, raw.get("alignment", {}))


def _refuse_two(one: Mapping[str, Tensor], other: Mapping[str, Tensor], first: Path, second: Path) -> None:
    """ValueError if a folder was saved into in two ways and contains different tensors."""
    if one.keys() != other.keys() or not all(torch.equal(one[k], other[k].to(one[k].dtype)) for k in one):
        raise ValueError(f"{first} and {second.name} beside it hold different adapters: remove one of the two.")


def digest(config: ReftConfig) -> str:
    """A digest of the configuration without the name of the base model, which may be changed in a file."""
    facts = {k: v for k, v in config.as_dict().items() if k not in ("base_model_name_or_path", "revision")}
    facts = {k: v for k, v in facts.items() if k not in LATER or v != LATER[k]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _written_with(folder: Path) -> str | None:
    """The digest of the configuration with which the tensors were saved."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get("config")


def _finish(folder: Path) -> None:
    """Complete a save that was interrupted between its files, before the next save overwrites them."""
    if not (folder / NEXT).exists():
        return
    try:
        belongs = _written_with(folder) == digest(_config(read_json(folder / NEXT), folder / NEXT))
    except (OSError, ValueError, SafetensorError):
        return
    if belongs:
        os.replace(folder / NEXT, folder / CONFIG)


def _config(raw: Any, path: Path | str) -> ReftConfig:
    if not isinstance(raw, dict) or raw.get("peft_type") != "REFT" or raw.get("format") != FORMAT:
        found = raw if isinstance(raw, dict) else {}
        raise ValueError(
            f"{path} is of type {found.get('peft_type')!r}, format {found.get('format')!r}; this version "
            f"reads 'REFT', {FORMAT}."
        )
    for name in ("base", "alignment"):
        if not isinstance(raw.get(name, {}), dict):
            raise ValueError(f"{path}: {name!r} is {raw[name]!r}; needed is an object of facts.")
    known = {k: v for k, v in raw.items() if k not in ("peft_type", "format", "subspace_lab", "base", "alignment")}
    try:
        return ReftConfig.from_dict(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
