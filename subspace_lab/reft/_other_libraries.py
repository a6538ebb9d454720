"""Shared code for reading adapters of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from subspace_lab.core.files import expect_stored
from subspace_lab.core.interventions import Intervention
from subspace_lab.reft.config import ORTHONORMAL, ReftConfig
from subspace_lab.reft.model import ReftModel


@dataclass(frozen=True)
class Numbers:
    """The tensors of one edit: D (rank, width), W (rank, width) if it has one, and b (rank,)."""

    basis: Tensor
    weight: Tensor | None
    bias: Tensor


def expect_fractions(state: Mapping[str, Tensor]) -> None:
    """ValueError for matrices or vectors of whole numbers, which cannot be the result of training."""
    wrong = sorted(name for name, t in state.items() if t.ndim and not t.is_floating_point())
    if wrong:
        raise ValueError(f"{wrong} hold whole numbers; needed are floating ones.")


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
    """The configuration of an adapter with these tensors at each (layer, group of positions).

    Raises:
        ValueError: tensors that a single adapter of this package cannot have.
    """
    layers, groups = sorted({layer for layer, _ in found}), sorted({group for _, group in found})
    ranks = {len(n.basis) for n in found.values()}
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
            f"positions={positions!r} are not a prefix and a suffix, but there are interventions for both."
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
    """The base model with an active adapter of these tensors.

    Args:
        heads: {name: tensor} of the base model's own parameters that were saved with the adapter.

    Raises:
        ValueError: parameters that the model does not have, or a basis of another width.
    """
    own = model.state_dict()
    unknown = [k for k, v in heads.items() if k not in own or own[k].shape != v.shape]
    if unknown:
        raise ValueError(f"The model has no parameters {unknown} of the saved shapes.")
    # A head that was saved but not trained is equal to the model's own.
    changed = {k: v for k, v in heads.items() if not torch.equal(own[k].cpu().float(), v.cpu().float())}
    modules = sorted({k.rpartition(".")[0] for k in changed})
    wrapped = ReftModel(model, replace(config, modules_to_save=modules), name)
    adapter = wrapped.adapter(name)
    try:
        with torch.no_grad():
            for site, edit in adapter.by_site().items():
                group = config.groups().index(site.positions)
                assert site.layer is not None
                _fill(edit, found[site.layer, group], config.method in ORTHONORMAL)
            for path in modules:
                inside = {k.rpartition(".")[2]: v for k, v in changed.items() if k.rpartition(".")[0] == path}
                adapter.saved[path.replace(".", "/")].load_state_dict(inside, strict=False)
    except ValueError:
        wrapped.unload()
        raise
    adapter.asks_for_gradient(is_trainable)
    return wrapped


def _fill(edit: Intervention, numbers: Numbers, orthonormal: bool) -> None:
    basis, subspace = numbers.basis, edit.subspace
    if tuple(basis.shape) != (subspace.rank, subspace.width):
        raise ValueError(f"Made for a width of {basis.shape[1]}; this model has {subspace.width}.")
    if orthonormal:
        error = (basis @ basis.T - torch.eye(len(basis))).abs().max()
        if not error < 2e-2:  # allows the rounding of a basis that was saved in bfloat16
            raise ValueError(f"The basis vectors are not orthonormal: |R Rᵀ − I| is {error:.2g}.")
    subspace.set_basis(basis)
    weight = {} if numbers.weight is None else {"weight": numbers.weight}
    edit.value.load_state_dict({**weight, "bias" if weight else "z": numbers.bias})


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} from a file of `torch.save`; ValueError if it contains anything else."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors, and none names the file
        raise ValueError(f"{path} is not a file of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds {type(found).__name__}, not tensors by name.")
    expect_stored(path, found)
    return dict(found)
