"""Adapters of other libraries: what they have in common, and those of adapters (1.3).

adapters keeps one file, in which every orthonormal basis is d × d; nothing of that size is carried over. It does
not tell DiReFT from NoReFT, and edits positions twice in prompts shorter than p + s, where edits here follow the
paper. What is read is the same function Φ(h). Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from subspace_lab.core.files import read_json
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.subspaces import FreeDirections, LearnedSubspace
from subspace_lab.core.values import Affine, Constant
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.model import ReftModel

ACTIVATIONS = {None: "linear", "linear": "linear", "relu": "relu", "gelu": "gelu", "tanh": "tanh"} | {
    "sigmoid": "sigmoid",
    "swish": "silu",
    "silu": "silu",
}
KEY = re.compile(r"(.*)\.(\d+)\.reft_layer\.refts\.[^.]+\.units\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Numbers:
    """Of one edit: D (rank, width), W (rank, width) where it has one, and b (rank,)."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor


def from_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    method: str | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> ReftModel:
    """The base model with the ReFT adapter that adapters' `save_adapter` wrote, its head included.

    Args:
        method: "NoReFT" or "DiReFT" where the projection is not orthonormal: the files do not tell.

    Raises:
        FileNotFoundError, ValueError: as `from_pyreft`.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} is no folder of adapters': adapter_config.json is missing.")
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
            raise ValueError(f"{folder}: {key!r} is not of a ReFT layer.")
        units.setdefault((part[1], int(part[2]), int(part[3])), {})[part[4]] = value
    stacks = {path for path, _, _ in units}
    if len(stacks) != 1:
        raise ValueError(f"{folder} edits the blocks of {sorted(stacks)}; an adapter here has one stack.")
    # It makes a unit for each side also where a side has no positions.
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
    given = state.get("projection.weight")
    rows = orthogonal(state, "projection.parametrizations.weight") if given is None else given
    return Numbers(rows.float(), state["learned_source.weight"].float(), state["learned_source.bias"].float())


# --- what both libraries share -----------------------------------------------------------------------------


def orthogonal(state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The matrix of torch's `parametrizations.orthogonal`: Householder reflectors below a diagonal of signs."""
    raw, base = state[f"{prefix}.original"].float(), state.get(f"{prefix}.0.base")
    tall = raw if raw.shape[0] >= raw.shape[1] else raw.T
    below = tall.tril(-1)
    if tall.shape[0] == tall.shape[1]:
        q = torch.linalg.matrix_exp(below - below.T)
    else:
        q = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0))) * tall.diagonal().int()
    q = q if base is None else base.float() @ q
    return q if tall is raw else q.T


def configured(
    found: Mapping[tuple[int, int], Numbers], method: str, positions: str, *, component: str, activation: str
) -> ReftConfig:
    layers, groups = sorted({layer for layer, _ in found}), sorted({group for _, group in found})
    ranks = {len(n.rows) for n in found.values()}
    if len(found) != len(layers) * len(groups) or len(groups) > 2 or len(ranks) != 1:
        raise ValueError(
            f"Interventions at (layer, group) {sorted(found)} of ranks {sorted(ranks)}; an adapter here has one "
            "rank, and one or two groups in every layer."
        )
    config = ReftConfig(
        method,
        rank=ranks.pop(),
        layers=layers,
        positions=positions,
        tied="all" if len(groups) == 1 else "group",
        component=component,
        activation=activation,
        start="identity" if activation == "linear" else "paper",
    )
    if len(config.groups()) != len(groups):
        raise ValueError(
            f"positions={positions!r} are no prefix and suffix, and there are interventions for both."
        )
    return config


def filled(
    model: nn.Module,
    config: ReftConfig,
    found: Mapping[tuple[int, int], Numbers],
    heads: Mapping[str, Tensor],
    name: str,
    is_trainable: bool,
) -> ReftModel:
    own = model.state_dict()
    strange = [k for k, v in heads.items() if k not in own or own[k].shape != v.shape]
    if strange:
        raise ValueError(f"The model has no parameters {strange} of these shapes, which were trained along.")
    # A head that was only saved along is the model's own.
    changed = {k: v for k, v in heads.items() if not torch.equal(own[k].cpu().float(), v.cpu().float())}
    modules = sorted({k.rpartition(".")[0] for k in changed})
    wrapped = ReftModel(model, replace(config, modules_to_save=modules), name)
    adapter = wrapped.adapter(name)
    try:
        with torch.no_grad():
            for site, edit in adapter.by_site().items():
                group = config.groups().index(site.positions)
                assert site.layer is not None
                _fill(edit, found[site.layer, group])
            for path in modules:
                inside = {k.rpartition(".")[2]: v for k, v in changed.items() if k.rpartition(".")[0] == path}
                adapter.saved[path.replace(".", "/")].load_state_dict(inside, strict=False)
    except ValueError:
        wrapped.unload()
        raise
    adapter.asks_for_gradient(is_trainable)
    return wrapped


def _fill(edit: Intervention, numbers: Numbers) -> None:
    rows, subspace, value = numbers.rows, edit.subspace, edit.value
    if tuple(rows.shape) != (subspace.rank, subspace.width):
        raise ValueError(f"Made for a width of {rows.shape[1]}; this model has {subspace.width}.")
    if isinstance(subspace, LearnedSubspace):
        error = (rows @ rows.T - torch.eye(len(rows))).abs().max()
        if not error < 2e-2:  # what a basis loses when it is kept in bfloat16
            raise ValueError(f"The rows of the basis are not orthonormal: |R Rᵀ − I| is {error:.2g}.")
        subspace.raw.copy_(rows.T)
    else:
        assert isinstance(subspace, FreeDirections)
        subspace.directions.copy_(rows)
    if isinstance(value, Affine):
        assert numbers.weight is not None
        value.weight.copy_(numbers.weight)
        value.bias.copy_(numbers.bias)
    else:
        assert isinstance(value, Constant)
        value.z.copy_(numbers.bias)


def _either(folder: Path, safe: str, plain: str, optional: bool = False) -> dict[str, Tensor]:
    if (folder / safe).exists():
        return load_file(folder / safe)
    if optional and not (folder / plain).exists():
        return {}
    return plain_tensors(folder / plain)


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """A file of torch's that holds tensors by name and nothing that runs."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own kinds of error are many, and none says which file it was
        raise ValueError(f"{path} is no file of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds {type(found).__name__}, no tensors by name.")
    return dict(found)
