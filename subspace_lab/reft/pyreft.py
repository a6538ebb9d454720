"""Reads and writes pyreft's (0.1) folders: `config.json`, and one `intkey_….bin` for each site.

They contain neither the positions, which pyreft's users pass in every call, nor activation and dropout. The function
Φ(h) is the same. In prompts shorter than p + s the positions here follow the paper, while pyreft leaves some out.
Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.files import read_json, whole_file, write_json
from subspace_lab.core.interventions import Intervention
from subspace_lab.reft._other_libraries import (
    Numbers,
    configured,
    expect_fractions,
    filled,
    orthogonal,
    plain_tensors,
)
from subspace_lab.reft.model import ReftModel

# pyreft's classes. Its DireftIntervention keeps R orthonormal, which the paper has under no name; its
# NodireftIntervention is the paper's DiReFT. One formula with a free D covers both.
METHODS = {
    "LoreftIntervention": "LoReFT",
    "NoreftIntervention": "NoReFT",
    "ConsreftIntervention": "ConsReFT",
    "LobireftIntervention": "LobiReFT",
    "DireftIntervention": "DiReFT",
    "NodireftIntervention": "DiReFT",
}
WRITTEN = {
    "LoReFT": "Loreft",
    "NoReFT": "Noreft",
    "ConsReFT": "Consreft",
    "LobiReFT": "Lobireft",
    "DiReFT": "Nodireft",
}
COMPONENTS = {  # pyvene's names → ours
    "block_input": "block_input",
    "block_output": "block_output",
    "mlp_activation": "mlp_activation",
    "mlp_output": "mlp_output",
    "attention_value_output": "head_output",
    "attention_output": "attention_output",
}
PATHS = {"input": "block_input", "output": "block_output", "mlp_output": "mlp_output"}
KEY = re.compile(r"layer_(\d+)_comp_(\w+?)_unit_pos_nunit_\d+#(\d+)")
PATH = re.compile(r"comp_.*\[(\d+)\]_(\w+?)_unit_pos_nunit_\d+#(\d+)")


def from_pyreft(
    model: nn.Module,
    folder: str | Path,
    positions: str,
    *,
    activation: str = "linear",
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> ReftModel:
    """The base model with the interventions that `pyreft.ReftModel.save` wrote.

    Args:
        positions: the positions at which they were trained; pyreft does not save them. If a layer is named twice, the
            first intervention is for the prefix and the second for the suffix, so use positions like "f7+l7".
        activation: their activation (`act_fn`), which pyreft does not save either.

    Raises:
        FileNotFoundError, ValueError: no such folder; a class, component or tensor without counterpart here; or a file
            with more than tensors.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is not a folder of pyreft: config.json is missing.")
    facts = read_json(folder / "config.json")
    kinds = {str(k) for k in facts.get("intervention_types", [])}
    kind = re.fullmatch(r"<class 'pyreft\.(?:\w+\.)*(\w+)'>", next(iter(kinds), ""))
    if len(kinds) != 1 or kind is None or kind[1] not in METHODS:
        raise ValueError(
            f"{folder} has interventions of {sorted(kinds)}; possible is one of {', '.join(METHODS)}."
        )
    found: dict[tuple[int, int], Numbers] = {}
    components = set()
    for key in facts["sorted_keys"]:
        layer, component, group = _site(str(key))
        components.add(component)
        state = plain_tensors(folder / f"intkey_{key}.bin")
        try:
            found[layer, group] = _numbers(state, kind[1], activation)
        except KeyError as error:
            raise ValueError(f"{folder}: intkey_{key}.bin has no {error}; it has {sorted(state)}.") from error
    if len(components) != 1:
        raise ValueError(f"{folder} edits several components, {sorted(components)}; an adapter here has one.")
    config = configured(found, METHODS[kind[1]], positions, component=components.pop(), activation=activation)
    heads = folder / "pytorch_model.bin"
    return filled(model, config, found, plain_tensors(heads) if heads.exists() else {}, adapter_name, is_trainable)


def to_pyreft(model: ReftModel, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write an adapter in pyreft's layout.

    The layout cannot contain positions, activation and dropout. If a layer has one intervention for the prefix and one
    for the suffix, the layer is named twice, the prefix first.

    Raises:
        ValueError: an adapter that this layout cannot contain.
    """
    names = model.active_adapters if adapter_name is None else [adapter_name]
    if len(names) != 1:
        raise ValueError(f"{len(names)} adapters are active; name one.")
    adapter = model.adapter(names[0])
    config = adapter.config
    component = next((theirs for theirs, ours in COMPONENTS.items() if ours == config.component), None)
    if config.method not in WRITTEN or config.tied == "position" or config.parts or config.activation != "linear":
        raise ValueError(
            f"pyreft's layout cannot hold {config.method} with tied={config.tied!r}, parts {config.parts} and "
            f"activation {config.activation!r}; it holds {', '.join(WRITTEN)}, linear and without parts."
        )
    if component is None:
        raise ValueError(f"pyreft has no component {config.component!r}; it has {', '.join(COMPONENTS.values())}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = len(config.groups())
    kind = WRITTEN[config.method]
    # First all prefixes, then all suffixes.
    ordered = sorted(enumerate(adapter.by_site().items()), key=lambda item: item[0] % groups)
    keys = [f"layer_{s.layer}_comp_{component}_unit_pos_nunit_1#{i % groups}" for i, (s, _) in ordered]
    for key, (_, (_, edit)) in zip(keys, ordered, strict=True):
        _save(folder / f"intkey_{key}.bin", _state(edit, config.method))
    if adapter.saved:
        heads = {
            f"{k.replace('/', '.')}.{n}": v for k, m in adapter.saved.items() for n, v in m.state_dict().items()
        }
        _save(folder / "pytorch_model.bin", heads)
    write_json(
        folder / "config.json",
        {
            "intervention_constant_sources": [True] * len(keys),
            "intervention_dimensions": [edit.width for _, (_, edit) in ordered],
            "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(keys),
            "mode": "parallel",
            "representations": [[s.layer, component, "pos", 1, config.rank, *[None] * 9] for _, (s, _) in ordered],
            "sorted_keys": keys,
        },
    )


def _site(key: str) -> tuple[int, str, int]:
    """(layer, component, group) of an intervention's key."""
    named, path = KEY.fullmatch(key), PATH.fullmatch(key)
    if named and named[2] in COMPONENTS:
        return int(named[1]), COMPONENTS[named[2]], int(named[3])
    if path and path[2] in PATHS:
        return int(path[1]), PATHS[path[2]], int(path[3])
    raise ValueError(
        f"{key!r} is not a site that is known here; known components of pyreft are {', '.join(COMPONENTS)}."
    )


def _numbers(state: Mapping[str, Tensor], kind: str, activation: str) -> Numbers:
    expect_fractions(state)
    if kind in ("NoreftIntervention", "NodireftIntervention"):
        bias, shift = state["learned_source.bias"].float(), state.get("proj_layer.bias")
        if shift is not None and kind == "NoreftIntervention":  # the other class never uses it
            if activation != "linear" and bool(shift.any()):
                raise ValueError(
                    "NoReFT with add_bias and an activation, σ(W h + b) − (D h + c), cannot be represented here."
                )
            bias = bias - shift.float()
        return Numbers(state["proj_layer.weight"].float(), state["learned_source.weight"].float(), bias)
    rotate = state.get("rotate_layer")
    basis = (orthogonal(state, "rotate_layer.parametrizations.weight") if rotate is None else rotate).float().T
    if kind in ("ConsreftIntervention", "LobireftIntervention"):
        return Numbers(basis, None, state["learned_source"].float())
    prefix = "" if kind == "LoreftIntervention" else "learned_source."
    return Numbers(basis, state[f"{prefix}weight"].float(), state[f"{prefix}bias"].float())


def _state(edit: Intervention, method: str) -> dict[str, Tensor]:
    basis = edit.subspace.basis().detach().cpu()
    value = {name: tensor.detach().cpu() for name, tensor in edit.value.state_dict().items()}
    size = {name: torch.tensor(edit.width) for name in ("embed_dim", "interchange_dim")}
    if "z" in value:
        holder = nn.Module()
        holder.weight = nn.Parameter(basis.T.contiguous())
        nn.utils.parametrizations.orthogonal(holder)
        holder.weight = basis.T.contiguous()
        turned = {f"rotate_layer.{k}": v for k, v in holder.state_dict().items()}
        return {"learned_source": value["z"], **size, **turned}
    value.setdefault("bias", torch.zeros(len(basis)))  # pyreft's maps always have one
    if method == "LoReFT":
        return {**value, "rotate_layer": basis.T.contiguous()}
    return {**{f"learned_source.{k}": v for k, v in value.items()}, "proj_layer.weight": basis, **size}


def _save(path: Path, state: Mapping[str, Any]) -> None:
    with whole_file(path) as provisional:
        torch.save(dict(state), provisional)
