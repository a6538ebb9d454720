"""Steering in llama.cpp's format: a GGUF file with one vector for each layer, which is added to the layer's output.

    general.architecture      "controlvector"
    controlvector.model_hint  the `model_type` in the model's configuration
    direction.3               (width,) float32, added to block_output[3] of every token

The format has no vector for block 0, and no edits except additions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.arguments import by_site
from subspace_lab.core.files import whole_file
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes
from subspace_lab.core.values import Constant
from subspace_lab.model.backbone import Backbone, expect_backbone
from subspace_lab.reft.model import ReftModel

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(\d+)")


def save_control_vector(
    path: str | Path, edits: ReftModel | Mapping[Site, Intervention], backbone: Backbone | None = None
) -> None:
    """Write edits that add one vector to the block output of every token as a GGUF control vector.

    Such edits are `steer`, and LobiReFT adapters at block_output with positions="all" and `every_token=True`.

    Args:
        edits: {site: intervention}, or a model with its active adapters.
        backbone: the backbone of the edited model; not needed for a `ReftModel`.

    Raises:
        TypeError: edits of another type; a model instead of a backbone.
        ValueError: an edit that is not such an addition, or is at block 0; no edits.
        ImportError: the package gguf is missing.
    """
    gguf = _gguf()
    if isinstance(edits, ReftModel):
        if not edits.edits_every_token():
            raise ValueError(
                "A control vector acts at every token, but the active adapters edit only the prompt: train with "
                "ReftConfig(positions='all', every_token=True)."
            )
        backbone, edits = edits.backbone, edits.edits()
    expect_backbone(backbone)
    assert backbone is not None
    by_site(edits, "edits", Intervention, Site)
    vectors = {_layer(backbone, site): _vector(site, edit) for site, edit in edits.items()}
    if len(vectors) < len(edits) or not vectors:
        raise ValueError(
            f"{len(edits)} edits of {len(vectors)} layers; a control vector needs one edit for each layer."
        )
    with whole_file(path) as provisional:
        writer = gguf.GGUFWriter(provisional, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(getattr(backbone.model.config, "model_type", "")))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_control_vector(path: str | Path) -> dict[Site, Intervention]:
    """The edits of a GGUF control vector, also of one from another tool: {block_output of a layer: h + its vector}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not GGUF, or not a control vector.
        ImportError: the package gguf is missing.
    """
    gguf = _gguf()
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        kind = None if field is None else field.contents()
        found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    except Exception as error:  # the reader has no exception types of its own
        raise ValueError(f"{path} is no whole GGUF file: {error}") from error
    layers = {name: DIRECTION.fullmatch(name) for name in found}
    fits = all(layers.values()) and all(t.ndim == 1 and t.dtype == torch.float32 for t in found.values())
    if kind != ARCHITECTURE or not found or not fits:
        raise ValueError(
            f"{path} is of the kind {kind!r} with the tensors {sorted(found)[:4]}: this is not a control vector."
        )
    return {
        Site("block_output", int(layers[name][1])): Intervention(  # type: ignore[index]
            Axes(len(vector)), Constant(vector, learned=False), write=False
        )
        for name, vector in found.items()
    }


def _layer(backbone: Backbone, site: Site) -> int:
    """The layer of a site. ValueError if a control vector cannot be added there."""
    if site.component != "block_output" or site.positions != "all" or site.layer is None:
        raise ValueError(f"{site}: a control vector can only be added to the block_output of all tokens.")
    backbone.hook_point(site)
    layer = site.layer % backbone.depth
    if layer == 0:
        raise ValueError(f"{site}: a GGUF control vector has no vector for block 0; begin at block 1.")
    return layer


def _vector(site: Site, edit: Intervention) -> Tensor:
    """The vector that an edit adds to every state."""
    found = edit.value.affine(edit.subspace, edit.write) if edit.is_affine else None
    if found is None or bool(found[0].any()):
        raise ValueError(
            f"{site}: the edit does more than add one vector to every state, as `steer` and LobiReFT do. "
            "Merge it into weights if possible, or use it with `generate`."
        )
    if edit.dropout.p and edit.training:
        raise ValueError(
            f"{site}: the edit drops coordinates at random (dropout={edit.dropout.p}): call `eval()` first."
        )
    with torch.no_grad():
        return edit.subspace.embed(found[1]).to("cpu", torch.float32)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Control vectors need the package gguf: pip install 'subspace-lab[gguf]'.") from error
    return gguf
