"""Interventions: what is written into a subspace.

Every intervention here has the same formula,

    h ↦ h + Dᵀ(m ⊙ (z − c·D h))    D ∈ R^{k×d}, c ∈ {0, 1}, m = 1 unless stated otherwise

where D is the basis of a subspace (`core/subspaces.py`) and z a *value* (`core/values.py`). With c = 1 the coordinates
become z, which is a write; with c = 0 z is added to them. The methods of the literature:

    method        D             z                    c   learned     source
    interchange   orthonormal   R h_source           1   R           Geiger et al. 2023 (2303.02536), DAS
    Boundless     orthonormal   R h_source           1   R, m        Wu et al. 2023 (2305.08809), m of core/masks.py
    LoReFT        orthonormal   σ(W h + b)           1   R, W, b     Wu et al. 2024 (2404.03592), eq. 2
    NoReFT        free          σ(W h + b)           1   D, W, b     pyreft
    DiReFT        free          σ(W h + b)           0   D, W, b     Wu et al. 2024, eq. 3
    ConsReFT      orthonormal   b                    1   R, b        pyreft
    LobiReFT      orthonormal   b                    0   R, b        pyreft
    RED           identity      s ⊙ h + b            1   s, b        Wu et al. 2024 (2402.15179)
    steer         any           α                    0   -           activation addition
    set, zero,    any           α, 0, mean           1   -           ablations
    mean

An intervention is an ordinary module: call `edit(h)` or `edit(h, source)` on any tensor whose last axis is the stream.
It never writes into its arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import instance
from subspace_lab.core.kinds import Kind
from subspace_lab.core.parts import joined
from subspace_lab.core.subspaces import Axes, FixedSubspace, FreeDirections, LearnedSubspace, Subspace
from subspace_lab.core.values import ACTIVATIONS, Affine, Constant, Diagonal, FromSource, Source, Value

Start = Literal["identity", "paper"]


class Intervention(Kind):
    """h ↦ h + Dᵀ(z − c·D h): a subspace, a value, and whether it is written (c = 1) or added (c = 0).

    Args:
        subspace: D.
        value: z.
        write: c = 1 if True.
        dropout: probability with which a coordinate of the *change* is dropped in training. (Other libraries drop
            coordinates of the edited state itself, which also damages the stream outside of the subspace.)

    Raises:
        TypeError: the subspace or the value has the wrong type.
        ValueError: a dropout outside of 0 ≤ p < 1.
    """

    made_of = ("subspace", "value")

    def __init__(self, subspace: Subspace, value: Value, *, write: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        instance(subspace, Subspace, "The subspace", "FixedSubspace(basis) makes one of a matrix")
        instance(value, Value, "The value")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: possible is 0 ≤ p < 1.")
        self.subspace, self.value, self.write = subspace, value, write
        self.dropout = nn.Dropout(dropout)

    @property
    def width(self) -> int:
        """d, the width of the stream."""
        return self.subspace.width

    @property
    def needs_source(self) -> bool:
        """Whether it needs the states of a source."""
        return self.value.needs_source

    @property
    def is_affine(self) -> bool:
        """Whether the edit, without dropout, is one affine map A h + c of every state, without a source."""
        return self.subspace.linear and self.value.is_affine and not self.needs_source

    def forward(self, h: Float[Tensor, "*batch width"], source: Source = None) -> Float[Tensor, "*batch width"]:
        """The edited states, in the dtype of h.

        Raises:
            ValueError: the width of h is not that of the subspace, or the source does not fit.
        """
        if not isinstance(h, Tensor):
            instance(h, Tensor, "h")
        if h.shape[-1] != self.width:
            raise ValueError(f"States of width {h.shape[-1]} for a subspace of width {self.width}.")
        # Autocast would compute the products in half precision.
        with torch.autocast(h.device.type, enabled=False):
            return self.value.edit(self.subspace, h, source, self.write, self.dropout)

    def asks_for_gradient(self, asks: bool) -> None:
        """Switch the training of the edit on or off; of a basis in parts only the trained parts are affected.

        These are the parts named in `train_parts`; if the basis is fixed, they are the parts in use.
        """
        self.requires_grad_(asks)
        if asks:
            self.subspace.freeze_resting_parts()
            self.value.freeze_resting_parts(self.subspace.moving)

    def edited(self) -> Subspace:
        """The subspace that is edited now, with a basis that does not train.

        For a basis in parts this is the subspace of the parts in use; for directions that are not orthonormal, their
        span.
        """
        chosen = self.value.coordinates(self.subspace.rank)
        if len(chosen) == self.subspace.rank:
            return self.subspace.frozen()
        return self.subspace.picked(chosen)

    def folded(self) -> Intervention:
        """The same edit as h + Dᵀ(M h + v) with fixed D, M and v; a copy of the edit if it is not affine in h.

        For LoReFT M = W − R.
        """
        with torch.no_grad():
            found = self.value.affine(self.subspace, self.write)
            if found is None:
                return copy.deepcopy(self).requires_grad_(False).eval()
            chosen = self.value.coordinates(self.subspace.rank)
            basis, matrix, shift = (t[chosen] for t in (self.subspace.basis(), *found))
        value = Affine(basis.shape[1], basis.shape[0]).to(basis.device, basis.dtype)
        value.load_state_dict({"weight": matrix, "bias": shift})
        directions = FreeDirections(basis.shape[1], basis.shape[0], start=basis)
        return Intervention(directions, value, write=False).requires_grad_(False).eval()

    def description(self) -> dict[str, Any]:
        return {
            "subspace": self.subspace,
            "value": self.value,
            "write": self.write,
            "dropout": self.dropout.p,
        }


def interchange(subspace: Subspace | Mapping[str, Subspace]) -> Intervention:
    """Distributed interchange intervention: h + Rᵀ(R h_source − R h) (Geiger et al. 2023, def. 3.1).

    With a mapping {variable: subspace} each variable takes its coordinates from its own source; call the result with
    `source={variable: states}`. A variable that is missing there keeps the base's coordinates. Learned subspaces must
    be parts of one basis, made by `Subspace.partition`; subspaces that a search found are joined into one basis.

    Raises:
        TypeError: something that is not a subspace.
        ValueError: variables whose subspaces are not orthogonal, or are learned but not parts of one basis (see
            `core.parts.joined`).
    """
    if isinstance(subspace, Mapping):
        parts = joined(subspace)
        whole = next(iter(parts.values())).whole
        return Intervention(whole, FromSource({name: (part.start, part.stop) for name, part in parts.items()}))
    return Intervention(subspace, FromSource())


def full_vector(width: int) -> Intervention:
    """The interchange of the whole state: h_source. It exchanges all variables that the state holds, not only one."""
    return interchange(Axes(width))


def loreft(
    width: int | Subspace,
    rank: int | None = None,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
    bias: bool = True,
) -> Intervention:
    """LoReFT: h + Rᵀ(W h + b − R h), 2dk + k parameters (Wu et al. 2024, eq. 2).

    Args:
        width: d, or a subspace to edit in (for example the result of a search), which has its own rank.
        rank: k.
        seed: seed of the random R, and of the random W of start="paper".
        start: "identity": W = R and b = 0, so that training starts from the unchanged model. "paper": W is drawn as in
            `nn.Linear`.
        activation: σ. With any activation but "linear", no W and b make the edit the identity, so use start="paper".
        dropout: as in `Intervention`.
        bias: whether there is a b. Without b the edit can also be merged into a projection without bias.

    Raises:
        TypeError: a width that is neither a whole number nor a subspace.
        ValueError: no rank, a rank larger than the width, or an activation or start that is not possible.
    """
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _expect_rank(rank), seed=seed)
    return _with_map(subspace, start, activation, dropout, seed, write=True, bias=bias)


def noreft(
    width: int,
    rank: int,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
    bias: bool = True,
) -> Intervention:
    """NoReFT: h + Dᵀ(W h + b − D h) with D free, 2dk + k parameters (pyreft)."""
    directions = FreeDirections(width, rank, seed=seed)
    return _with_map(directions, start, activation, dropout, seed, write=True, bias=bias)


def direft(
    width: int,
    rank: int,
    *,
    seed: int | None = None,
    start: Start = "identity",
    activation: str = "linear",
    dropout: float = 0.0,
    bias: bool = True,
) -> Intervention:
    """DiReFT: h + Dᵀ(W h + b) with D free, 2dk + k parameters (Wu et al. 2024, eq. 3).

    pyreft calls this `NodireftIntervention`. With `start="identity"` W = 0.
    """
    directions = FreeDirections(width, rank, seed=seed)
    return _with_map(directions, start, activation, dropout, seed, write=False, bias=bias)


def consreft(
    width: int | Subspace, rank: int | None = None, *, seed: int | None = None, dropout: float = 0.0
) -> Intervention:
    """ConsReFT: h + Rᵀ(b − R h), dk + k parameters (pyreft). Starts at b = 0."""
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _expect_rank(rank), seed=seed)
    return Intervention(subspace, Constant(torch.zeros(subspace.rank), learned=True), dropout=dropout)


def lobireft(
    width: int | Subspace, rank: int | None = None, *, seed: int | None = None, dropout: float = 0.0
) -> Intervention:
    """LobiReFT: h + Rᵀ b, dk + k parameters (pyreft). Starts at b = 0, the identity."""
    subspace = width if isinstance(width, Subspace) else LearnedSubspace(width, _expect_rank(rank), seed=seed)
    value = Constant(torch.zeros(subspace.rank), learned=True)
    return Intervention(subspace, value, write=False, dropout=dropout)


def red(width: int, *, dropout: float = 0.0, bias: bool = True) -> Intervention:
    """RED: s ⊙ h + b, 2d parameters (Wu et al. 2024, arXiv 2402.15179). Starts as the identity.

    Without b it is s ⊙ h, as in (IA)³ (Liu et al. 2022, arXiv 2205.05638).
    """
    return Intervention(Axes(width), Diagonal(width, bias), dropout=dropout)


def steer(subspace: Subspace, amount: Float[Tensor, "*batch rank"] | float) -> Intervention:
    """Activation addition in a subspace: h + Rᵀ α (Turner et al. 2023, arXiv 2308.10248).

    Args:
        subspace: R.
        amount: α, one number for all coordinates, (rank,), or (batch, rank).
    """
    return Intervention(subspace, Constant(_coordinates(subspace, amount), learned=False), write=False)


def set_to(subspace: Subspace, z: Float[Tensor, "*batch rank"] | float) -> Intervention:
    """The coordinates become z: h + Rᵀ(z − R h), with z as `amount` of `steer`."""
    return Intervention(subspace, Constant(_coordinates(subspace, z), learned=False))


def zero_ablation(subspace: Subspace) -> Intervention:
    """The coordinates become 0: h − RᵀR h."""
    return set_to(subspace, 0.0)


def mean_ablation(subspace: Subspace, states: Float[Tensor, "*batch width"]) -> Intervention:
    """The coordinates become their mean over all of `states` (…, width): h + Rᵀ(R mean − R h).

    Entries that are all NaN are left out: `collect` gives them where a row has fewer positions than others.
    """
    with torch.no_grad():
        states = states.reshape(-1, states.shape[-1])
        mean = subspace.read(states[~states.isnan().all(-1)]).mean(0)
    return set_to(subspace, mean)


def steering_vector(vector: Float[Tensor, " width"]) -> tuple[FixedSubspace, Tensor]:
    """A vector of the stream as (its direction, its length), so that `steer(*steering_vector(v))` adds v.

    Raises:
        ValueError: a vector of length 0.
    """
    length = vector.norm()
    if not length > 0:
        raise ValueError("A steering vector of length 0 has no direction.")
    return FixedSubspace((vector / length)[None]), length[None]


def _with_map(
    subspace: Subspace,
    start: Start,
    activation: str,
    dropout: float,
    seed: int | None,
    *,
    write: bool,
    bias: bool = True,
) -> Intervention:
    value = Affine(subspace.width, subspace.rank, activation, seed, bias)
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


def _expect_rank(rank: int | None) -> int:
    if rank is None:
        raise ValueError("A rank is needed where a width is given; a subspace has its own rank.")
    return rank


def _coordinates(subspace: Subspace, z: Tensor | float) -> Tensor:
    z = torch.as_tensor(z, dtype=torch.float32) if not isinstance(z, Tensor) else z
    if z.ndim == 0:
        return z.expand(subspace.rank)
    if z.shape[-1] != subspace.rank:
        raise ValueError(f"Coordinates of shape {tuple(z.shape)} for a subspace of rank {subspace.rank}.")
    return z
