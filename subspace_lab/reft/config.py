"""What a ReFT adapter is: a frozen value that says everything that changes its function."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from subspace_lab.core import interventions as iv
from subspace_lab.core.interventions import ACTIVATIONS, Intervention
from subspace_lab.core.positions import normalise
from subspace_lab.core.sites import COMPONENTS

METHODS = ("LoReFT", "NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "RED")
MAPPED = ("LoReFT", "NoReFT", "DiReFT")  # the methods with z = σ(W h + b), which have a start and an activation

_END = re.compile(r"([fl])(\d+)")


@dataclass(frozen=True)
class ReftConfig:
    """A ReFT adapter: at which layers and positions which intervention is learned.

    The formulas stand in `core/interventions.py`.

    Attributes:
        method: LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT or RED; case does not matter.
        rank: dimensions of each intervention (RED has none and ignores it).
        layers: "all", or the blocks, counted from 0, negative from the end.
        positions: of the prompt, see `core/positions.py`. "f7+l7" is the paper's for reasoning, "all" suits
            encoders that are pooled over all tokens.
        tied: which positions of a layer share one intervention: "all"; "group", one for the prefix and one for
            the suffix (what the paper's code calls untied); "position", one each (what its text says).
        component: where in the block, "block_output" in the paper.
        dropout: probability with which a coordinate of the change is dropped in training.
        activation: σ, of LoReFT, NoReFT and DiReFT.
        start: "identity" starts training from the model as it is; "paper" has W as `nn.Linear` starts it.
        modules_to_save: submodules of the base model that are trained along and saved, such as a classifier.
        base_model_name_or_path, revision: of the model that the adapter is for.
        seed: of the random bases.
    """

    method: str = "LoReFT"
    rank: int = 4
    layers: str | Sequence[int] = "all"
    positions: str = "f3+l3"
    tied: Literal["all", "group", "position"] = "all"
    component: str = "block_output"
    dropout: float = 0.0
    activation: str = "linear"
    start: Literal["identity", "paper"] = "identity"
    modules_to_save: str | Sequence[str] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = {m.lower(): m for m in METHODS}
        if str(self.method).lower() not in known:
            raise ValueError(f"method={self.method!r}; possible are {', '.join(METHODS)}.")
        _set(self, "method", known[self.method.lower()])
        _set(self, "positions", normalise(self.positions))
        _set(self, "modules_to_save", _names(self.modules_to_save))
        if self.layers != "all":
            chosen = () if isinstance(self.layers, str) else tuple(self.layers)
            if not chosen or len(set(chosen)) < len(chosen) or not all(type(x) is int for x in chosen):
                raise ValueError(f"layers={self.layers!r}; possible are 'all' or distinct integers.")
            _set(self, "layers", chosen)
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; possible is 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; possible is 0 ≤ p < 1.")
        if self.component.rpartition(".")[2] not in COMPONENTS:
            raise ValueError(f"component={self.component!r}; possible are {', '.join(COMPONENTS)}.")
        if self.activation not in ACTIVATIONS or (self.activation != "linear" and self.method not in MAPPED):
            raise ValueError(
                f"activation={self.activation!r} of {self.method}; possible are {sorted(ACTIVATIONS)}, "
                f"other than linear with {', '.join(MAPPED)}."
            )
        if self.start not in ("identity", "paper"):
            raise ValueError(f"start={self.start!r}; possible are 'identity' and 'paper'.")
        if self.activation != "linear" and self.start == "identity" and self.method != "DiReFT":
            raise ValueError(
                f"With activation {self.activation!r} {self.method} cannot start as the identity: start='paper'."
            )
        if self.tied not in ("all", "group", "position"):
            raise ValueError(f"tied={self.tied!r}; possible are 'all', 'group' and 'position'.")
        self.groups()  # refuses what cannot be split

    def groups(self) -> tuple[str, ...]:
        """The sets of positions that have an intervention of their own."""
        terms = self.positions.split("+")
        if self.tied == "all" or (len(terms) == 1 and self.tied == "group"):
            return (self.positions,)
        ends = {m[1]: int(m[2]) for t in terms if (m := _END.fullmatch(t))}
        if len(ends) < len(terms):
            raise ValueError(
                f"tied={self.tied!r} splits a prefix and a suffix, as in 'f3+l3'; positions are "
                f"{self.positions!r}."
            )
        # Each side keeps in mind the room that the other needs in short prompts.
        partner = {side: "".join(f"({o}{n})" for o, n in ends.items() if o != side) for side in ends}
        if self.tied == "group":
            return tuple(f"{side}{n}{partner[side]}" for side, n in ends.items())
        return tuple(f"{side}{n}[{i}]{partner[side]}" for side, n in ends.items() for i in range(n))

    def intervention(self, width: int, seed: int) -> Intervention:
        """One intervention of this adapter, untrained."""
        match self.method:
            case "LoReFT" | "NoReFT" | "DiReFT":
                make = {"LoReFT": iv.loreft, "NoReFT": iv.noreft, "DiReFT": iv.direft}[self.method]
                return make(
                    width,
                    self.rank,
                    seed=seed,
                    start=self.start,
                    activation=self.activation,
                    dropout=self.dropout,
                )
            case "ConsReFT":
                return iv.consreft(width, self.rank, seed=seed, dropout=self.dropout)
            case "LobiReFT":
                return iv.lobireft(width, self.rank, seed=seed, dropout=self.dropout)
            case _:
                return iv.red(width, dropout=self.dropout)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ReftConfig:
        """The configuration that was written (ValueError for keys that this version does not know)."""
        known = {f.name for f in fields(cls)}
        strange = sorted(set(found) - known)
        if strange:
            raise ValueError(f"Unknown keys {strange} in a ReFT configuration; known are {sorted(known)}.")
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"A ReFT configuration with a value of another type: {error}") from error


def _set(config: ReftConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
