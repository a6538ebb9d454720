"""Sites: ⟨component, layer, positions⟩, a place in a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import total_ordering

from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.positions import normalise

COMPONENTS = (
    "block_input",
    "query_output",
    "key_output",
    "value_output",
    "head_output",
    "attention_output",
    "mlp_activation",
    "mlp_output",
    "block_output",
)
"""The components of a transformer block, in the order in which a block computes them.

block_input, block_output: the residual stream before and after the block. query_output, key_output, value_output: the
projections, before rotary embedding and head norms. head_output: the concatenated results of the heads, z, which are
the input of the attention's output projection. attention_output, mlp_output: the results of the output projections.
mlp_activation: the hidden units, which are the input of the MLP's output projection.
"""

HEADED = ("query_output", "key_output", "value_output", "head_output")

_PATTERN = re.compile(
    r"(?P<component>[^\s\[\]()@]+?)(?:\[(?P<layer>-?\d+)\])?(?:\.heads\((?P<heads>[\d,]+)\))?(?:@(?P<positions>.+))?"
)


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a model, as a small value: it can be printed, compared, hashed, and parsed from its text.

    Args:
        component: one of `COMPONENTS`; in a model with two stacks with the stack before it ("encoder.block_output",
            "decoder.head_output"); or, in any module, the path of a submodule followed by ".input" or ".output"
            ("layers.0.output").
        layer: the block, counted from 0, or negative from the end; None for a submodule's path.
        positions: see `core/positions.py`; "all" by default. Also an int, a slice or a sequence of ints.
        heads: the heads to use, for a component that has heads; all by default.

    >>> Site("block_output", 3, "last")
    block_output[3]@last
    """

    component: str
    layer: int | None = None
    positions: str = "all"
    heads: tuple[int, ...] | None = None

    def __init__(
        self,
        component: str,
        layer: int | None = None,
        positions: str | int | slice | Sequence[int] = "all",
        heads: int | Sequence[int] | None = None,
    ) -> None:
        instance(component, str, f"component={component!r}", f"one of {', '.join(COMPONENTS)}")
        layer = None if layer is None else whole_number(layer, "layer")
        name = component.rsplit(".", 1)[-1]
        by_path = component.endswith((".input", ".output"))
        if name not in COMPONENTS and not by_path:
            raise ValueError(
                f"Unknown component {component!r}. Possible: {', '.join(COMPONENTS)}, each with 'encoder.' or "
                "'decoder.' before it if the model has both; or the path of a submodule followed by "
                "'.input' or '.output'."
            )
        if by_path and layer is not None:
            raise ValueError(f"{component!r} names a submodule by its path; layer={layer} has no meaning.")
        if not by_path and layer is None:
            raise ValueError(f"{component!r} needs a layer.")
        if heads is not None:
            if isinstance(heads, str):
                raise TypeError(f"heads={heads!r}; needed are indices from 0, such as (0, 3).")
            several = heads if isinstance(heads, Iterable) else (heads,)
            heads = tuple(whole_number(head, "a head") for head in several)
            if name not in HEADED or by_path:
                raise ValueError(f"{component!r} has no heads; components with heads: {', '.join(HEADED)}.")
            if not heads or len(set(heads)) < len(heads) or min(heads) < 0:
                raise ValueError(f"heads={heads}: needed are distinct indices from 0.")
        object.__setattr__(self, "component", component)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "positions", normalise(positions))
        object.__setattr__(self, "heads", heads)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"[{self.layer}]"
        heads = "" if self.heads is None else f".heads({','.join(map(str, self.heads))})"
        return f"{self.component}{layer}{heads}@{self.positions}"

    __repr__ = __str__

    def __lt__(self, other: Site) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return self._key() < other._key()

    def _key(self) -> tuple[str, int, str, tuple[int, ...]]:
        return self.component, self.layer or 0, self.positions, self.heads or ()

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that prints as `text` (ValueError otherwise)."""
        instance(text, str, repr(text), "the text of a site, such as 'block_output[3]@last'")
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a site; a site looks like 'block_output[3]@last'.")
        layer, heads = found["layer"], found["heads"]
        return cls(
            found["component"],
            None if layer is None else int(layer),
            found["positions"] or "all",
            None if heads is None else [int(h) for h in heads.split(",")],
        )

    def at(self, positions: str | int | slice | Sequence[int]) -> Site:
        """The same component at other positions."""
        return Site(self.component, self.layer, positions, self.heads)
