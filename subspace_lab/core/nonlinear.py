"""A nonlinear map whose first coordinates can be read and written. It is not a subspace, but has the same two methods.

It is much weaker evidence than a subspace. With unrestricted maps an exchange reaches about 100 % on randomly
initialised language models, and over 80 % on random multilayer perceptrons (Sutter et al. 2025, "The non-linear
representation dilemma", arXiv 2507.08802): the map itself computes what the model does not. At least, show that a
randomly initialised twin of the model does not reach the same score.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import whole_number
from subspace_lab.core.orthonormal import check_rank, exactly, wide
from subspace_lab.core.subspaces import Subspace


class InvertibleMap(Subspace):
    """The first k coordinates of φ(h), with φ a reversible residual network (RevNet, Gomez et al. 2017).

    Each block leaves one half of the coordinates unchanged and adds a function of it to the other half:

        x₁ ← x₁ + F(x₂),   x₂ ← x₂ + G(x₁)

    so that φ⁻¹ subtracts the same functions in the opposite order, whatever F and G are. Here they are layers of
    `hidden` units that start as 0, so φ starts as the identity. The methods are those of a subspace,

        read(h)     = φ(h)₁…ₖ
        write(h, z) = φ⁻¹(z, φ(h)ₖ₊₁…)

    and obey the same laws. But there is no basis, and an exchange changes h in all directions.

    Args:
        width: d.
        rank: k.
        blocks: the number of blocks.
        hidden: units of each F and G, by default d.
        scale: the states are divided by this number first (for example by their root mean square), so that the units
            get numbers of about 1.
        seed: seed of the random weights.
    """

    linear: ClassVar[bool] = False
    scale: Tensor

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        blocks: int = 4,
        hidden: int | None = None,
        scale: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, width)
        self.width, self.rank = whole_number(width, "width"), whole_number(rank, "rank")
        self.blocks = whole_number(blocks, "blocks")
        self.hidden = self.width if hidden is None else whole_number(hidden, "hidden")
        if self.width < 2 or self.blocks < 1 or self.hidden < 1 or not 0 < scale < float("inf"):
            raise ValueError(
                f"width={width}, blocks={blocks}, hidden={hidden}, scale={scale}: needed are a width of 2 or more, at "
                "least one block and unit, and a scale above 0."
            )
        self.register_buffer("scale", torch.tensor(float(scale)))
        generator = None if seed is None else torch.Generator().manual_seed(whole_number(seed, "seed"))
        first = self.width // 2
        second = self.width - first
        self.to_first = nn.ModuleList(_units(second, self.hidden, first, generator) for _ in range(self.blocks))
        self.to_second = nn.ModuleList(_units(first, self.hidden, second, generator) for _ in range(self.blocks))

    def map(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """φ(h), in at least float32."""
        with exactly(h.device):
            one, other = self._halves(wide(h, self.scale) / self.scale)
            for f, g in zip(self.to_first, self.to_second, strict=True):
                one = one + f(other)
                other = other + g(one)
            return torch.cat([one, other], -1)

    def unmap(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """φ⁻¹(x)."""
        with exactly(x.device):
            one, other = self._halves(x)
            for f, g in zip(reversed(self.to_first), reversed(self.to_second), strict=True):
                other = other - g(one)
                one = one - f(other)
            return torch.cat([one, other], -1) * self.scale

    def read(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        return self.map(h)[..., : self.rank]

    def write(
        self, h: Float[Tensor, "*batch width"], z: Float[Tensor, "*batch rank"]
    ) -> Float[Tensor, "*batch width"]:
        kept = self.map(h)[..., self.rank :]
        written = torch.cat([z.to(kept.dtype).expand(*kept.shape[:-1], self.rank), kept], -1)
        return h + (self.unmap(written) - h).to(h.dtype)

    def swap(
        self, h: Float[Tensor, "*batch width"], source: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        return self.write(h, self.read(source))

    def basis(self) -> Float[Tensor, "rank width"]:
        raise TypeError(
            "A nonlinear map has no basis: it can be exchanged, read and written, but no other intervention, angle or "
            "overlap is defined for it."
        )

    def frozen(self) -> InvertibleMap:
        return copy.deepcopy(self).requires_grad_(False)

    def sliced(self, start: int, stop: int) -> Subspace:
        if (start, stop) != (0, self.rank):
            raise TypeError(f"Coordinates {start} to {stop - 1} of a nonlinear map are no part that stands alone.")
        return self.frozen()

    def description(self) -> dict[str, Any]:
        return {"width": self.width, "rank": self.rank, "blocks": self.blocks, "hidden": self.hidden}

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.width // 2
        return x[..., :first], x[..., first:]


def _units(inputs: int, hidden: int, outputs: int, generator: torch.Generator | None) -> nn.Sequential:
    """A layer of hidden units whose output starts at 0."""
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    with torch.no_grad():
        nn.init.normal_(first.weight, std=inputs**-0.5, generator=generator)
        for zeros in (first.bias, last.weight, last.bias):
            zeros.zero_()
    return nn.Sequential(first, nn.GELU(), last)
