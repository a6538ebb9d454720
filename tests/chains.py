"""Small plain chains of maps with counterfactual pairs, where what passes from site to site is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH, ANSWERS, PAIRS = 10, 6, 40
FIRST, SECOND = Site("0.output"), Site("1.output")
START = Site("0.input")


def turn() -> Tensor:
    """(width, width) orthogonal: what the second map does to a state, h → h Qᵀ."""
    return basis(WIDTH, 5)


def chain(second: nn.Module | None = None) -> Backbone:
    """first → second → answers; the second map is a rotation by default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ANSWERS)
    if second is None:
        second = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        with torch.no_grad():
            second.weight.copy_(turn())
    return Backbone(nn.Sequential(first, second, last).double().eval())


def chain_pairs(n: int = PAIRS, seed: int = 0) -> Counterfactuals:
    """Random vectors; the answers are nobody's."""
    g = torch.Generator().manual_seed(seed)
    base, source = torch.randn(2, n, WIDTH, generator=g, dtype=torch.float64)
    before, after = (torch.randint(0, ANSWERS, (n,), generator=g) for _ in range(2))
    letters = tuple("abcdefghij"[:ANSWERS])
    values = {"v": torch.randint(0, 3, (n,), generator=g)}
    return Counterfactuals(Batch.of(base), {"v": Batch.of(source)}, before, after, letters, values=values)


def at(site: Site, basis: Tensor) -> Alignment:
    return Alignment({"v": (site, FixedSubspace(basis))})


def basis(rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_orthonormal(WIDTH, rank, seed).double().T)[0].T
