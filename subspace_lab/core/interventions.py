"""Interventions: what is written into a subspace.

Every intervention here is one formula,

    h ↦ h + Dᵀ(z − c·D h)          D ∈ R^{k×d}, c ∈ {0, 1}

with D the rows of a subspace (`core/subspaces.py`), z a *value*, and c telling a write (the coordinates
become z) from an addition (z is added to them). The methods of the literature are rows of this table:

    method        D             z                    c   learned     source
    interchange   orthonormal   R h_source           1   R           Geiger et al. 2023 (2303.02536), DAS
    LoReFT        orthonormal   σ(W h + b)           1   R, W, b     Wu et al. 2024 (2404.03592), eq. 2
    NoReFT        free          σ(W h + b)           1   D, W, b     pyreft
    DiReFT        free          σ(W h + b)           0   D, W, b     Wu et al. 2024, eq. 3
    ConsReFT      orthonormal   b                    1   R, b        pyreft
    LobiReFT      orthonormal   b                    0   R, b        pyreft
    RED           identity      s ⊙ h + b            1   s, b        Wu et al. 2024 (2402.15179)
    steer         any           α                    0   -           activation addition
    set, zero,    any           α, 0, mean           1   -           ablations
    mean

An intervention is an ordinary module: `edit(h)` or `edit(h, source)` on any tensor whose last axis is the
stream. It never writes into its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    FullPrecision,
    LearnedSubspace,
    Part,
    Subspace,
    wide,
)

Start = Literal["identity", "paper"]
Source = Tensor | Mapping[str, Tensor] | None

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Value(FullPrecision, ABC):
    """What z is. The change of the coordinates, z − c·D h, is what a leaf computes."""

    @abstractmethod
    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        """z − D h for a write, z for an addition; h in the precision of the computation."""


class FromSource(Value):
    """z = R h_source, or each part of one basis from a source of its own."""

    def __init__(self, parts: Mapping[str, tuple[int, int]] | None = None) -> None:
        super().__init__()
        self.parts = None if parts is None else dict(parts)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        if self.parts is None:
            if not isinstance(source, Tensor):
                raise ValueError("An interchange intervention needs the source's states, one tensor.")
            return self._difference(subspace.basis(), h, source, write)
        if not isinstance(source, Mapping) or not set(source) <= set(self.parts):
            found = sorted(source) if isinstance(source, Mapping) else type(source).__name__
            raise ValueError(
                f"This interchange has the variables {sorted(self.parts)} and needs a mapping from them to "
                f"the states of their sources; found {found}."
            )
        basis = subspace.basis()
        change = h.new_zeros(*h.shape[:-1], subspace.rank)
        columns = []
        for name, (start, stop) in self.parts.items():
            if name in source:  # a variable without a source keeps the base's coordinates
                columns.append(self._difference(basis[start:stop], h, source[name], write))
            else:
                columns.append(change[..., start:stop])
        rest = subspace.rank - sum(c.shape[-1] for c in columns)
        return torch.cat([*columns, change[..., :rest]], dim=-1)

    @staticmethod
    def _difference(basis: Tensor, h: Tensor, source: Tensor, write: bool) -> Tensor:
        if source.shape != h.shape:
            raise ValueError(
                f"The base gives states of shape {tuple(h.shape)}, the source {tuple(source.shape)}: batch, "
                "positions and width must agree."
            )
        source = source.to(h.dtype)
        # R(s − h), not R s − R h: half the work, and exactly zero where source and base agree.
        return (source - h if write else source) @ basis.to(h.dtype).T


class Affine(Value):
    """z = σ(W h + b)."""

    def __init__(self, width: int, rank: int, activation: str = "linear", seed: int | None = None) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: possible are {sorted(ACTIVATIONS)}.")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(rank, width))
        self.bias = nn.Parameter(torch.zeros(rank))
        # Far from the seed of a basis drawn with the same one, so that the two share no random numbers.
        generator = None if seed is None else torch.Generator().manual_seed(seed + 2**32)
        # nn.Linear's own, as the authors have it
        nn.init.kaiming_uniform_(self.weight, a=5**0.5, generator=generator)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        if self.activation == "linear":
            # (W − R) h + b is one product instead of two, and exactly b where W is R.
            weight = self.weight - subspace.basis() if write else self.weight
            return nn.functional.linear(h, weight.to(h.dtype), self.bias.to(h.dtype))
        z = nn.functional.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))
        z = ACTIVATIONS[self.activation](z)
        return z - h @ subspace.basis().to(h.dtype).T if write else z


class Constant(Value):
    """z = b, learned or given, the same for every example (or one a row of the batch)."""

    z: Tensor

    def __init__(self, z: Float[Tensor, "*batch rank"], learned: bool) -> None:
        super().__init__()
        z = wide(z.detach(), torch.zeros(())).clone()
        if learned:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        z, axes = self.z.to(h.dtype), self.z.shape[:-1]
        if len(axes) >= h.ndim or any(n not in (1, m) for n, m in zip(axes, h.shape, strict=False)):
            raise ValueError(
                f"Coordinates of shape {tuple(z.shape)} for states of shape {tuple(h.shape)}: what stands "
                "before the rank must be the first axes of the states."
            )
        z = z.reshape(*axes, *(1,) * (h.ndim - z.ndim), z.shape[-1])  # rows, not positions
        return z - subspace.read(h) if write else z.expand(*h.shape[:-1], z.shape[-1])


class Diagonal(Value):
    """z = s ⊙ h + b over the whole stream (RED)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def change(self, subspace: Subspace, h: Tensor, source: Source, write: bool) -> Tensor:
        return (self.scale - 1).to(h.dtype) * h + self.bias.to(h.dtype)


class Intervention(FullPrecision):
    """h ↦ h + Dᵀ(z − c·D h): a subspace, a value, and whether it is written (c = 1) or added (c = 0).

    Args:
        subspace: D.
        value: z.
        write: c = 1 if True.
        dropout: probability with which a coordinate of the *change* is dropped in training. (The peers drop
            coordinates of the edited state itself, which damages the stream outside the subspace.)
    """

    def __init__(self, subspace: Subspace, value: Value, *, write: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: possible is 0 ≤ p < 1.")
        self.subspace, self.value, self.write = subspace, value, write
        self.dropout = nn.Dropout(dropout)

    @property
    def width(self) -> int:
        return self.subspace.width

    @property
    def needs_source(self) -> bool:
        return isinstance(self.value, FromSource)

    def forward(self, h: Float[Tensor, "*batch width"], source: Source = None) -> Float[Tensor, "*batch width"]:
        """The edited states, in the dtype of h.

        Raises:
            ValueError: if the width of h is not the subspace's, or the source does not fit.
        """
        if h.shape[-1] != self.width:
            raise ValueError(f"States of width {h.shape[-1]} for a subspace of width {self.width}.")
        fits = isinstance(source, Tensor) and source.shape == h.shape
        if isinstance(self.subspace, Axes) and self.write and self.needs_source and fits:
            assert isinstance(source, Tensor)
            return self.subspace.swap(h, source)  # exact to the bit, where a difference would round
        # Autocast would take the products back to a half precision.
        with torch.autocast(h.device.type, enabled=False):
            change = self.value.change(self.subspace, self._exact(h), source, self.write)
            return h + self.subspace.embed(self.dropout(change)).to(h.dtype)

    def _exact(self, h: Tensor) -> Tensor:
        return h.to(torch.promote_types(h.dtype, torch.float32))


def interchange(subspace: Subspace | Mapping[str, Subspace]) -> Intervention:
    """Distributed interchange intervention: h + Rᵀ(R h_source − R h) (Geiger et al. 2023, def. 3.1).

    With a mapping {variable: part}, made by `Subspace.partition`, each variable takes its coordinates from a
    source of its own; call the result with `source={variable: states}`. A variable left out stays the base's.

    Raises:
        ValueError: if the parts do not share one basis.
    """
    if isinstance(subspace, Subspace):
        return Intervention(subspace, FromSource())
    parts = dict(subspace)
    wholes = {id(p.whole) for p in parts.values() if isinstance(p, Part)}
    if not parts or len(wholes) != 1 or not all(isinstance(p, Part) for p in parts.values()):
        raise ValueError(
            "Several variables at one site must be parts of one basis (so that they are orthogonal): "
            "make them with `subspace.partition({'a': 8, 'b': 8})`."
        )
    spans = {name: (p.start, p.stop) for name, p in parts.items() if isinstance(p, Part)}
    order = sorted(spans.items(), key=lambda item: item[1])
    edges = [edge for _, span in order for edge in span]
    if (
        edges[0] != 0
        or edges != sorted(edges)
        or any(a != b for a, b in zip(edges[1::2], edges[2::2], strict=False))
    ):
        raise ValueError(f"The parts must cover the first rows of their basis without gap or overlap: {order}.")
    whole = next(p.whole for p in parts.values() if isinstance(p, Part))
    return Intervention(whole, FromSource(dict(order)))


def full_vector(width: int) -> Intervention:
    """The interchange of the whole state, the ceiling beside every subspace: h_source."""
    return interchange(Axes(width))


def loreft(
    width: int | Subspace,
    rank: int | None = None,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
) -> Intervention:
    """LoReFT: h + Rᵀ(W h + b − R h), 2dk + k parameters (Wu et al. 2024, eq. 2).

    Args:
        width: d, or a subspace to edit in (a DAS result, say): then `rank` is its own.
        rank: k.
        seed: of the random R, and of the random W that "paper" starts from.
        start: "identity" has W = R, b = 0, so that training starts from the model as it is; "paper" has W as
            `nn.Linear` starts it.
    """
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _given(rank), seed=seed)
    return _with_map(subspace, start, activation, dropout, seed, write=True)


def noreft(
    width: int,
    rank: int,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
) -> Intervention:
    """NoReFT: h + Dᵀ(W h + b − D h) with D free, 2dk + k parameters (pyreft)."""
    directions = FreeDirections(width, rank, seed=seed)
    return _with_map(directions, start, activation, dropout, seed, write=True)


def direft(
    width: int,
    rank: int,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
) -> Intervention:
    """DiReFT: h + Dᵀ(W h + b) with D free, 2dk + k parameters (Wu et al. 2024, eq. 3).

    pyreft calls this `NodireftIntervention`. Its `start="identity"` has W = 0.
    """
    directions = FreeDirections(width, rank, seed=seed)
    return _with_map(directions, start, activation, dropout, seed, write=False)


def consreft(
    width: int | Subspace, rank: int | None = None, *, seed: int | None = None, dropout: float = 0.0
) -> Intervention:
    """ConsReFT: h + Rᵀ(b − R h), dk + k parameters (pyreft). Starts at b = 0."""
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _given(rank), seed=seed)
    return Intervention(subspace, Constant(torch.zeros(subspace.rank), learned=True), dropout=dropout)


def lobireft(
    width: int | Subspace, rank: int | None = None, *, seed: int | None = None, dropout: float = 0.0
) -> Intervention:
    """LobiReFT: h + Rᵀ b, dk + k parameters (pyreft). Starts at b = 0, the identity."""
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _given(rank), seed=seed)
    value = Constant(torch.zeros(subspace.rank), learned=True)
    return Intervention(subspace, value, write=False, dropout=dropout)


def red(width: int, *, dropout: float = 0.0) -> Intervention:
    """RED: s ⊙ h + b, 2d parameters (Wu et al. 2024, arXiv 2402.15179). Starts as the identity."""
    return Intervention(Axes(width), Diagonal(width), dropout=dropout)


def steer(subspace: Subspace, amount: Float[Tensor, "*batch rank"] | float) -> Intervention:
    """Activation addition in a subspace: h + Rᵀ α."""
    return Intervention(subspace, Constant(_coordinates(subspace, amount), learned=False), write=False)


def set_to(subspace: Subspace, z: Float[Tensor, "*batch rank"] | float) -> Intervention:
    """The coordinates become z: h + Rᵀ(z − R h)."""
    return Intervention(subspace, Constant(_coordinates(subspace, z), learned=False))


def zero_ablation(subspace: Subspace) -> Intervention:
    """The coordinates become 0: h − RᵀR h."""
    return set_to(subspace, 0.0)


def mean_ablation(subspace: Subspace, states: Float[Tensor, "*batch width"]) -> Intervention:
    """The coordinates become their mean over `states`: h + Rᵀ(R mean − R h)."""
    with torch.no_grad():
        mean = subspace.read(states).reshape(-1, subspace.rank).mean(0)
    return set_to(subspace, mean)


def steering_vector(vector: Float[Tensor, " width"]) -> tuple[FixedSubspace, Tensor]:
    """A vector of the stream as (its direction, its length): `steer(*steering_vector(v))` adds v."""
    length = vector.norm()
    if not length > 0:
        raise ValueError("A steering vector of length 0 has no direction.")
    return FixedSubspace((vector / length)[None]), length[None]


def _with_map(
    subspace: Subspace, start: Start, activation: str, dropout: float, seed: int | None, *, write: bool
) -> Intervention:
    value = Affine(subspace.width, subspace.rank, activation, seed)
    if start not in ("identity", "paper"):
        raise ValueError(f"start={start!r}: possible are 'identity' and 'paper'.")
    if start == "identity":
        if (write and activation != "linear") or bool(ACTIVATIONS[activation](torch.zeros(()))):
            raise ValueError(
                f"With activation {activation!r} no W, b make the edit the identity: use start='paper'."
            )
        with torch.no_grad():
            if write:
                value.weight.copy_(subspace.basis())
            else:
                value.weight.zero_()
    return Intervention(subspace, value, write=write, dropout=dropout)


def _given(rank: int | None) -> int:
    if rank is None:
        raise ValueError("A rank is needed where a width is given; only a ready subspace brings its own.")
    return rank


def _coordinates(subspace: Subspace, z: Tensor | float) -> Tensor:
    z = torch.as_tensor(z, dtype=torch.float32) if not isinstance(z, Tensor) else z
    if z.ndim == 0:
        return z.expand(subspace.rank)
    if z.shape[-1] != subspace.rank:
        raise ValueError(f"Coordinates of shape {tuple(z.shape)} for a subspace of rank {subspace.rank}.")
    return z
