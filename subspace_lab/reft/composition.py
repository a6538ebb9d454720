"""One basis in named parts, each trained on its own data, used together or apart.

Source: Wu et al. 2024 (arXiv 2404.03592), appendix G. The parts of R are orthogonal to each other, so what one
writes no other reads, and used together they are one edit of the rank of their sum,

    h + Σ_p R_pᵀ(W_p h + b_p − R_p h).

While some parts train, the others rest: their rows stay the same to the bit, and the rows in training are kept
orthonormal to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.interventions import Affine, Constant, Intervention, Source, Value
from subspace_lab.core.subspaces import FreeDirections, Subspace, check_rank, exactly, random_orthonormal


class PartedBasis(Subspace):
    """An orthonormal basis whose rows belong to parts; `basis` gives the rows of those in force.

    Args:
        width: d.
        sizes: {part: its number of rows}; together at most d.
        seed: of the random start.
    """

    def __init__(self, width: int, sizes: Mapping[str, int], seed: int | None = None) -> None:
        super().__init__()
        check_rank(sum(sizes.values()), width)
        rows = random_orthonormal(width, sum(sizes.values()), seed).split(list(sizes.values()))
        self.raw = nn.ParameterDict(
            {n: part.T.clone(memory_format=torch.contiguous_format) for n, part in zip(sizes, rows, strict=True)}
        )
        self.width = width
        self.moving = tuple(sizes)
        self.use(list(sizes))

    def use(self, names: Sequence[str]) -> None:
        """Put these parts in force."""
        self.in_force = tuple(n for n in self.raw if n in names)
        self.rank = sum(self.raw[n].shape[1] for n in self.in_force)

    def train_parts(self, names: Sequence[str]) -> None:
        """From now on these parts move and the others rest."""
        wanted = tuple(n for n in self.raw if n in names)
        if wanted == self.moving:
            return
        with torch.no_grad():
            for name, rows in self.rows().items():
                self.raw[name].copy_(rows.T)
        self.moving = wanted

    def rows(self) -> dict[str, Tensor]:
        """{part: its rows}, of all parts."""
        found = {n: self.raw[n].detach().T for n in self.raw if n not in self.moving}
        raw = torch.cat([self.raw[n] for n in self.moving], 1)
        with exactly(raw.device):
            for resting in found.values():
                raw = raw - resting.T @ (resting @ raw)
            q, t = torch.linalg.qr(raw)
            q = q * torch.where(t.diagonal() < 0, -1.0, 1.0)
        return found | dict(zip(self.moving, q.T.split([self.raw[n].shape[1] for n in self.moving]), strict=True))

    def basis(self) -> Float[Tensor, "rank width"]:
        rows = self.rows()
        return torch.cat([rows[n] for n in self.in_force])

    # Which parts move is saved, because it tells which of the raw matrices are orthonormal as they stand.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}moving"] = torch.tensor([n in self.moving for n in self.raw])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        moving = state_dict.pop(f"{prefix}moving", None)
        if moving is None:
            rest[2].append(f"{prefix}moving")  # the missing keys
        else:
            self.moving = tuple(n for n, moves in zip(self.raw, moving.tolist(), strict=True) if moves)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PartedValue(Value):
    """What each part in force writes into its own rows."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        super().__init__()
        self.values = nn.ModuleDict(values)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        assert isinstance(subspace, PartedBasis)
        rows = subspace.rows()
        changes = [
            self.values[n].change(_Rows(rows[n]), h, source, write)  # type: ignore[operator]
            for n in subspace.in_force
        ]
        return torch.cat(changes, -1)


class _Rows(Subspace):
    """Rows that another subspace worked out."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rank, self.width = rows.shape
        self._rows = rows

    def basis(self) -> Float[Tensor, "rank width"]:
        return self._rows


def compose(
    width: int,
    sizes: Mapping[str, int],
    make: Callable[[Subspace, int], Intervention],
    *,
    seed: int | None = None,
    dropout: float = 0.0,
) -> Intervention:
    """An intervention in parts; `make` makes the i-th one from its subspace and i."""
    basis = PartedBasis(width, sizes, seed)
    parts = {name: make(_Rows(rows.detach()), i) for i, (name, rows) in enumerate(basis.rows().items())}
    write = all(part.write for part in parts.values())
    return Intervention(
        basis, PartedValue({name: part.value for name, part in parts.items()}), write=write, dropout=dropout
    )


def of_parts(edit: Intervention) -> PartedBasis | None:
    """The basis in parts of an intervention, None where it has none."""
    return edit.subspace if isinstance(edit.subspace, PartedBasis) else None


def folded(edit: Intervention) -> Intervention:
    """The edit as h + Dᵀ(M h + v) with fixed D, M and v; a copy where it is not affine."""
    found = _plain(edit)
    if found is None:
        return copy.deepcopy(edit).requires_grad_(False).eval()
    rows, matrix, shift = found
    value = Affine(rows.shape[1], rows.shape[0]).to(rows.device)
    value.load_state_dict({"weight": matrix, "bias": shift})
    directions = FreeDirections(rows.shape[1], rows.shape[0], start=rows).to(rows.device)
    return Intervention(directions, value, write=False).requires_grad_(False).eval()


def _plain(edit: Intervention) -> tuple[Tensor, Tensor, Tensor] | None:
    """(D, M, v) with the edit h + Dᵀ(M h + v); None for one that is not affine.

    D, M: (rank, width), v: (rank,). For LoReFT M = W − R.
    """
    rows = edit.subspace.basis().detach()
    if isinstance(edit.value, PartedValue) and isinstance(edit.subspace, PartedBasis):
        values = [edit.value.values[n] for n in edit.subspace.in_force]
    else:
        values = [edit.value]
    maps, shifts = [], []
    for value in values:
        if isinstance(value, Affine) and value.activation == "linear":
            maps.append(value.weight.detach())
            shifts.append(value.bias.detach())
        elif isinstance(value, Constant):
            maps.append(torch.zeros(value.z.shape[-1], rows.shape[1], device=rows.device))
            shifts.append(value.z.detach())
        else:
            return None
    joined = torch.cat(maps)
    return rows, joined - rows if edit.write else joined, torch.cat(shifts)
