"""The configuration of a ReFT adapter: a frozen value with everything that changes the adapter's function."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspace_lab.core import interventions as iv
from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.parts import PartedSubspace, spans
from subspace_lab.core.positions import normalise, select
from subspace_lab.core.sites import COMPONENTS, Site
from subspace_lab.core.subspaces import FixedSubspace, LearnedSubspace, Part, Subspace, random_subspace
from subspace_lab.core.values import ACTIVATIONS, ByPart

METHODS = ("LoReFT", "NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "RED")
MAPPED = ("LoReFT", "NoReFT", "DiReFT")  # the methods with z = σ(W h + b), which have a start and an activation
ORTHONORMAL = ("LoReFT", "ConsReFT", "LobiReFT")  # the methods that edit in a subspace

MOST_GROUPS = 4096  # interventions in one layer, at most

_END = re.compile(r"([fl])(\d+)")


@dataclass(frozen=True)
class ReftConfig:
    """The configuration of a ReFT adapter: which intervention it learns, at which layers and positions.

    The formulas are in `core/interventions.py`.

    Attributes:
        method: LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT or RED, in upper or lower case.
        rank: dimensions of each intervention (RED has none and ignores it).
        layers: "all", or block numbers, counted from 0; negative numbers count from the end.
        positions: positions in the prompt, see `core/positions.py`. The paper uses "f7+l7" for reasoning tasks. "all"
            suits encoders that are pooled over all tokens.
        every_token: edit the tokens of answers too, in training and in generation; needs positions "all". Only such an
            edit can be merged into weights (`ReftModel.merge_and_unload`).
        tied: which positions of a layer share one intervention: "all"; "group", one for the prefix and one for the
            suffix (the paper's code calls this untied); "position", one for each position (as in the paper's text).
        component: where in the block, "block_output" in the paper.
        heads: {layer: its heads} or pairs, to edit single heads of a component that has heads, such as "head_output".
            The layers are then those of the heads.
        basis: "learned"; or "fixed": the subspace does not change during training, and only what is written into it
            is learned.
        parts: {name: number of basis vectors} or pairs, to split one basis into subspaces that can be trained and
            used separately (`ReftModel.train_parts`, `use_parts`); the numbers must add up to the rank.
        dropout: probability with which a coordinate of the change is dropped in training.
        activation: σ, for LoReFT, NoReFT and DiReFT.
        bias: whether there is a b, in these three methods and in RED. Without b an edit can also be merged into a
            projection of the model that has no bias.
        start: "identity": training starts from the unchanged model. "paper": W is initialised as by `nn.Linear`.
        modules_to_save: submodules of the base model that are trained with the edits and saved, such as a head.
        base_model_name_or_path, revision: the model for which the adapter is made.
        seed: seed of the random bases.
    """

    method: str = "LoReFT"
    rank: int = 4
    layers: str | Sequence[int] = "all"
    positions: str = "f3+l3"
    tied: Literal["all", "group", "position"] = "all"
    component: str = "block_output"
    basis: Literal["learned", "fixed"] = "learned"
    parts: Mapping[str, int] | Sequence[Sequence[str | int]] = ()
    dropout: float = 0.0
    activation: str = "linear"
    start: Literal["identity", "paper"] = "identity"
    modules_to_save: str | Sequence[str] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    seed: int = 0
    every_token: bool = False
    bias: bool = True
    heads: Mapping[int, Sequence[int]] | Sequence[Sequence[Any]] = ()

    def __post_init__(self) -> None:
        known = {m.lower(): m for m in METHODS}
        if str(self.method).lower() not in known:
            raise ValueError(f"method={self.method!r}; possible are {', '.join(METHODS)}.")
        _set(self, "method", known[self.method.lower()])
        _set(self, "positions", normalise(self.positions))
        _set(self, "modules_to_save", _names(self.modules_to_save))
        for name in ("base_model_name_or_path", "revision"):
            instance(getattr(self, name), (str, type(None)), name)
        if not isinstance(self.layers, str) or self.layers != "all":
            _set(self, "layers", _layers(self.layers))
        _set(self, "rank", whole_number(self.rank, "rank"))
        _set(self, "seed", whole_number(self.seed, "seed"))
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; possible is 1 or more.")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}; possible is 0 ≤ p < 1.")
        if str(self.component).rpartition(".")[2] not in COMPONENTS:
            raise ValueError(f"component={self.component!r}; possible are {', '.join(COMPONENTS)}.")
        self._check_heads()
        if self.activation not in list(ACTIVATIONS) or (self.activation != "linear" and self.method not in MAPPED):
            raise ValueError(
                f"activation={self.activation!r} of {self.method}; possible are {sorted(ACTIVATIONS)}, "
                f"other than linear with {', '.join(MAPPED)}."
            )
        for name in ("every_token", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; possible are True and False.")
        if self.every_token and self.positions != "all":
            raise ValueError(
                f"every_token=True edits all tokens, but positions={self.positions!r} only some of the prompt: write "
                "positions='all'."
            )
        if not self.bias and self.method not in (*MAPPED, "RED"):
            raise ValueError(
                f"bias=False leaves {self.method} nothing to write; possible with {', '.join(MAPPED)}, RED."
            )
        if self.start not in ("identity", "paper"):
            raise ValueError(f"start={self.start!r}; possible are 'identity' and 'paper'.")
        stays = self.method == "DiReFT" and not bool(ACTIVATIONS[self.activation](torch.zeros(())))
        if self.activation != "linear" and self.start == "identity" and not stays:
            raise ValueError(
                f"With activation {self.activation!r} {self.method} cannot start as the identity: use start='paper'."
            )
        if self.tied not in ("all", "group", "position"):
            raise ValueError(f"tied={self.tied!r}; possible are 'all', 'group' and 'position'.")
        if self.basis not in ("learned", "fixed"):
            raise ValueError(f"basis={self.basis!r}; possible are 'learned' and 'fixed'.")
        if self.basis == "fixed" and self.method not in ORTHONORMAL:
            raise ValueError(f"{self.method} has no orthonormal basis to fix; {', '.join(ORTHONORMAL)} have.")
        self._check_parts()
        if not any(int(m[2]) if (m := _END.fullmatch(t)) else True for t in self.positions.split("+")):
            raise ValueError(f"positions={self.positions!r} contain no position of any prompt.")
        self.groups()  # raises if the positions cannot be split

    def _check_heads(self) -> None:
        pairs = _pairs(self.heads, "heads", "layer: its heads")
        sites = [Site(self.component, layer, self.positions, of) for layer, of in pairs]  # raises for wrong heads
        _set(self, "heads", tuple((site.layer, site.heads) for site in sites))
        if not sites:
            return
        chosen = _layers([site.layer for site in sites])
        if self.layers not in ("all", chosen):
            raise ValueError(f"layers={self.layers}, but heads={self.heads} have others: leave out layers.")
        _set(self, "layers", chosen)

    def _check_parts(self) -> None:
        pairs = _pairs(self.parts, "parts", "name: number of basis vectors")
        _set(self, "parts", tuple((str(name), _size(size, name)) for name, size in pairs))
        if not self.parts:
            return
        sizes = self.sizes
        if self.method not in ORTHONORMAL:
            raise ValueError(f"{self.method} has no orthonormal basis to split; {', '.join(ORTHONORMAL)} have.")
        # A module in PyTorch's ModuleDict cannot have the name of one of its methods.
        wrong = [name for name in sizes if not name.isidentifier() or hasattr(nn.ModuleDict, name)]
        if wrong or len(sizes) < len(self.parts):
            raise ValueError(
                f"parts={self.parts}: names must be distinct identifiers, and not methods of torch.nn.ModuleDict."
            )
        if sum(sizes.values()) != self.rank or min(sizes.values()) < 1:
            raise ValueError(
                f"parts={self.parts} must have 1 or more basis vectors each and {self.rank} together, the rank."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """{part: number of its basis vectors}."""
        return {str(name): int(size) for name, size in self.parts}

    def groups(self) -> tuple[str, ...]:
        """The sets of positions of a layer; each has its own intervention."""
        terms = self.positions.split("+")
        if self.tied == "all" or (len(terms) == 1 and self.tied == "group"):
            return (self.positions,)
        ends = {m[1]: int(m[2]) for t in terms if (m := _END.fullmatch(t))}
        if len(ends) < len(terms):
            raise ValueError(
                f"tied={self.tied!r} splits a prefix and a suffix, such as 'f3+l3'; positions are "
                f"{self.positions!r}."
            )
        # Each side names the other one, so that it leaves room for it in short prompts.
        partner = {side: "".join(f"({o}{n})" for o, n in ends.items() if o != side) for side in ends}
        if self.tied == "group":
            return tuple(f"{side}{n}{partner[side]}" for side, n in ends.items() if n)
        if sum(ends.values()) > MOST_GROUPS:
            raise ValueError(
                f"tied='position' gives each of {sum(ends.values())} positions an intervention; possible are "
                f"{MOST_GROUPS} in a layer. Tied by 'group' or 'all', positions share an intervention."
            )
        return tuple(f"{side}{n}[{i}]{partner[side]}" for side, n in ends.items() for i in range(n))

    def expect_positions(self, lengths: Tensor) -> None:
        """IndexError or KeyError if a prompt of one of these lengths lacks a position that the adapter edits."""
        for group in self.groups():
            select(group, lengths, {})

    def intervention(self, width: int, seed: int, subspace: Subspace | None = None) -> Intervention:
        """One untrained intervention of this adapter.

        Args:
            width: the width of the stream.
            seed: seed of its random numbers.
            subspace: the subspace in which it starts, or stays if the basis is fixed; by default a random one.
        """
        if self.method == "RED":
            return iv.red(width, dropout=self.dropout, bias=self.bias)
        if self.method not in ORTHONORMAL:
            make = iv.noreft if self.method == "NoReFT" else iv.direft
            return make(width, self.rank, seed=seed, **self._mapped())  # type: ignore[arg-type]
        basis = self._basis(width, seed, subspace)
        if not self.parts:
            return self._inside(basis, seed)
        edits = {
            name: self._inside(Part(basis, *span), seed + 7919 * i)
            for i, (name, span) in enumerate(spans(self.sizes).items())
        }
        values = ByPart({name: edit.value for name, edit in edits.items()}, self.sizes)
        write = all(edit.write for edit in edits.values())
        return Intervention(basis, values, write=write, dropout=self.dropout)

    def _basis(self, width: int, seed: int, subspace: Subspace | None) -> Subspace:
        """The orthonormal basis of one intervention: learned or fixed, with or without parts."""
        start = None if subspace is None else subspace.basis().detach()
        if self.basis == "fixed":
            return random_subspace(width, self.rank, seed) if start is None else FixedSubspace(start)
        if self.parts:
            return PartedSubspace(width, self.sizes, seed=seed, start=start)
        return LearnedSubspace(width, self.rank, seed=seed, start=start)

    def _inside(self, subspace: Subspace, seed: int) -> Intervention:
        """This adapter's intervention in a subspace."""
        if self.method == "LoReFT":
            return iv.loreft(subspace, seed=seed, **self._mapped())  # type: ignore[arg-type]
        make = iv.consreft if self.method == "ConsReFT" else iv.lobireft
        return make(subspace, dropout=self.dropout)

    def _mapped(self) -> dict[str, object]:
        return {"start": self.start, "activation": self.activation, "dropout": self.dropout, "bias": self.bias}

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ReftConfig:
        """The configuration from `as_dict`. ValueError for keys that this version does not know."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(found) - known)
        if unknown:
            raise ValueError(f"Unknown keys {unknown} in a ReFT configuration; known are {sorted(known)}.")
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"A ReFT configuration has a value of the wrong type: {error}") from error


def _set(config: ReftConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _layers(layers: Any) -> tuple[int, ...]:
    try:
        chosen = () if isinstance(layers, str) else tuple(whole_number(layer, "layer") for layer in layers)
    except TypeError:
        chosen = ()
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={layers!r}; possible are 'all' or distinct integers.")
    return chosen


def _pairs(given: Any, name: str, what: str) -> Sequence[tuple[Any, Any]]:
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, Sequence) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise TypeError(f"{name}={given!r}; needed are {{{what}}} or pairs of these.")
    return [(one, other) for one, other in pairs]


def _size(size: Any, part: Any) -> int:
    return whole_number(size, f"the size of part {part!r}")


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"modules_to_save={names!r}; needed are names of submodules.")
    return tuple(given)
