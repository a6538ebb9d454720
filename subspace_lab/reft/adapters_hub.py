"""Reads ReFT folders of the library adapters (1.3).

Its files do not say whether an adapter is DiReFT or NoReFT. They contain every orthonormal basis as a d × d matrix, of
which only the k basis vectors are used. In prompts shorter than p + s that library edits some positions twice; edits
here follow the paper. The function Φ(h) is the same. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from subspace_lab.core.files import read_json
from subspace_lab.reft._other_libraries import (
    Numbers,
    configured,
    expect_fractions,
    filled,
    orthogonal,
    plain_tensors,
)
from subspace_lab.reft.model import ReftModel

ACTIVATIONS = {None: "linear", "linear": "linear", "relu": "relu", "gelu": "gelu", "tanh": "tanh"} | {
    "sigmoid": "sigmoid",
    "swish": "silu",
    "silu": "silu",
}
KEY = re.compile(r"(.*)\.(\d+)\.reft_layer\.refts\.[^.]+\.units\.(\d+)\.(.+)")


def from_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    method: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> ReftModel:
    """The base model with a ReFT adapter written by `save_adapter` of adapters, with its head.

    Args:
        method: "NoReFT" or "DiReFT" if the projection is not orthonormal, because the files do not say which it is.

    Raises:
        FileNotFoundError, ValueError: as in `from_pyreft`.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} is not a folder of adapters: adapter_config.json is missing.")
    written = read_json(folder / "adapter_config.json")
    facts = written.get("config") if isinstance(written.get("config"), dict) else {}
    if facts.get("architecture") != "reft" or not facts.get("output_reft", True):
        raise ValueError(f"{folder} is no ReFT adapter of adapters' but {facts.get('architecture')!r}.")
    if method is None:
        method = "LoReFT" if facts["orthogonality"] else None
    if method not in ("LoReFT", "NoReFT", "DiReFT") or (method == "LoReFT") > facts["orthogonality"]:
        raise ValueError(
            f"method={method!r}: adapters writes the same files for NoReFT and DiReFT; say which of them this is."
        )
    p, s, tied = facts["prefix_positions"], facts["suffix_positions"], facts["tied_weights"]
    units: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    for key, value in _either(folder, "adapter.safetensors", "pytorch_adapter.bin").items():
        part = KEY.fullmatch(key)
        if part is None:
            raise ValueError(f"{folder}: {key!r} does not belong to a ReFT layer.")
        units.setdefault((part[1], int(part[2]), int(part[3])), {})[part[4]] = value
    stacks = {path for path, _, _ in units}
    if len(stacks) != 1:
        raise ValueError(f"{folder} edits the blocks of {sorted(stacks)}; an adapter here has one stack.")
    # The library makes a unit for each side, even if the side has no positions.
    used = [0] if tied else [side for side, count in enumerate((p, s)) if count]
    found = {
        (layer, used.index(unit)): _numbers(state) for (_, layer, unit), state in units.items() if unit in used
    }
    parts = stacks.pop().split(".")
    side = next((name for name in ("encoder", "decoder") if name in parts), "")
    component = (
        f"{side}.block_output" if side and getattr(model.config, "is_encoder_decoder", False) else "block_output"
    )
    if facts["non_linearity"] not in ACTIVATIONS:
        raise ValueError(f"non_linearity={facts['non_linearity']!r} has no counterpart here.")
    positions = "+".join(f"{end}{count}" for end, count in (("f", p), ("l", s)) if count)
    config = configured(
        found, method, positions, component=component, activation=ACTIVATIONS[facts["non_linearity"]]
    )
    heads = _either(folder, "model_head.safetensors", "pytorch_model_head.bin", optional=True)
    return filled(model, config, found, heads, adapter_name, is_trainable)


def _numbers(state: Mapping[str, Tensor]) -> Numbers:
    expect_fractions(state)
    given = state.get("projection.weight")
    basis = orthogonal(state, "projection.parametrizations.weight") if given is None else given
    return Numbers(basis.float(), state["learned_source.weight"].float(), state["learned_source.bias"].float())


def _either(folder: Path, safe: str, plain: str, optional: bool = False) -> dict[str, Tensor]:
    if (folder / safe).exists():
        return load_file(folder / safe)
    if optional and not (folder / plain).exists():
        return {}
    return plain_tensors(folder / plain)
