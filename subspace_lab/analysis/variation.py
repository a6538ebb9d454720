"""What varies at a site between bases and sources, and what the answers depend on there.

An interchange reads coordinates of a state and writes them back. The directions that it reads have to vary there by
themselves, and later layers have to read the directions that it writes. A direction that does only one of the two is
not a variable of the model (Makelov et al. 2023, arXiv 2311.17030).

    varies    the principal components of h_source − h, up to nearly all of their variance
    read      the row space of the answers' gradients G = E[JᵀJ], where J = ∂ logits / ∂ h minus its mean over the
              answers, since the mean does not change which answer is chosen
    both      the row space of the same gradients inside what varies: first the variation, then the gradient in it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.sites import Site
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import Assignment, PreparedPairs, one_read
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect
from subspace_lab.model.sources import all_rows

VARIES, READ = 0.999, 0.99  # shares of the variance and of the squared gradient that are kept
EXAMPLES, CHUNK = 256, 64  # pairs whose gradients are taken, and how many in one run
PROBES = 16  # gradients for each state, at most: one for each answer, or for random signs with more answers
ALONG = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Gradients are taken between the base's state and the source's: at these shares of the way, in turn. A model that
looks its answers up, as in a table, can be flat at the states that it knows, and have all its gradient between them."""


@dataclass(frozen=True, eq=False)
class Variation:
    """What varies and what is read at one variable's site, measured on pairs that are not used for scores.

    Attributes:
        site: the site.
        bases, sources: states of the pairs that have both; each position of a pair is one state.
        gradients: gradients of the answers' logits at some states.
        differences: h_source − h of the pairs whose gradients were taken.
        varies, read, both: orthonormal bases of the three spaces above.
        weights: if the site is the input of a projection, the row space of its weights; None otherwise, and None if
            it is the whole space.
    """

    site: Site
    bases: Float[Tensor, "state width"]
    sources: Float[Tensor, "state width"]
    gradients: Float[Tensor, "example probe width"]
    differences: Float[Tensor, "example width"]
    varies: Float[Tensor, "varying width"]
    read: Float[Tensor, "reading width"]
    both: Float[Tensor, "common width"]
    weights: Float[Tensor, "row width"] | None = None

    def effects(self, *projections: Float[Tensor, "_ width"]) -> Float[Tensor, "example probe"]:
        """J Pₙ … P₁ d: to first order, how the logits change if the difference d goes through some projections."""
        moved = self.differences
        for basis in projections:
            moved = (moved @ basis.T) @ basis
        return torch.einsum("epw,ew->ep", self.gradients, moved)


def variations(
    backbone: Backbone,
    pairs: Pairs | Counterfactuals,
    assignment: Assignment,
    *,
    varies: float = VARIES,
    read: float = READ,
    examples: int = EXAMPLES,
) -> dict[str, Variation]:
    """{variable: what varies and what is read at its site}.

    The gradients are those of the plain forward pass, at states on the straight line from base to source.

    Args:
        backbone: the model.
        pairs: the training pairs are used (if each step draws new pairs, those of the first steps); or the
            counterfactuals themselves.
        assignment: {variable: its site}.
        varies, read: the share of the variance, and of the squared gradients, that the spaces hold.
        examples: the largest number of pairs whose gradients are taken.

    Raises:
        ValueError: a share that is not above 0 and at most 1, no example, sources that do not differ from their
            bases, or answers that do not depend on the states there.
    """
    instance(pairs, (Pairs, Counterfactuals), "pairs")
    for name, share in (("varies", varies), ("read", read)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}={share}: it has to be a share above 0 and at most 1.")
    if whole_number(examples, "examples") < 1:
        raise ValueError(f"examples={examples}: gradients of at least 1 pair are needed.")
    found: dict[str, Variation] = {}
    prepared = [
        PreparedPairs.of(backbone, data, [{name: site} for name, site in assignment.items()])
        for data in _training(pairs, examples)
    ]
    for name, site in assignment.items():
        states = [_states(backbone, one, name, site) for one in prepared]
        bases, sources = (torch.cat([pair[i] for pair in states]) for i in range(2))
        there = ~(bases.isnan() | sources.isnan()).any(-1)
        bases, sources = bases[there], sources[there]
        rows = _spread(len(prepared[0]), examples)
        gradients, differences = _gradients(prepared[0], name, site, rows)
        same = f"The sources of {name!r} have the same states as their bases at {site}"
        directions = _main(sources - bases, varies, same)
        flat = gradients.flatten(0, 1)
        nothing = f"The answers depend on nothing at {site}"
        inside = _main(flat @ directions.T, read, f"{nothing} that varies with {name!r}") @ directions
        found[name] = Variation(
            site,
            bases,
            sources,
            gradients,
            differences,
            directions,
            _main(flat, read, nothing),
            inside,
            _read_by_weights(backbone, site),
        )
    return found


def _training(pairs: Pairs | Counterfactuals, examples: int) -> list[Counterfactuals]:
    if isinstance(pairs, Counterfactuals):
        return [pairs]
    if not callable(pairs.train):
        return [pairs.train]
    drawn: list[Counterfactuals] = []
    while sum(map(len, drawn)) < max(examples, 1000):
        drawn.append(pairs.train(len(drawn)))
    return drawn


def _states(backbone: Backbone, prepared: PreparedPairs, name: str, site: Site) -> tuple[Tensor, Tensor]:
    """The states of bases and of a variable's sources in float64, (pairs × positions, width) each."""
    parts = [collect(backbone, prepared.data.base.rows(rows), [site])[site] for rows in _chunks(len(prepared))]
    base, source = all_rows(parts), prepared.states[name][site]
    if base.ndim == 3 and base.shape[1] != source.shape[1]:
        raise ValueError(
            f"{site}: bases have {base.shape[1]} positions and sources {source.shape[1]}, so their states cannot be "
            "matched."
        )
    return tuple(one.flatten(0, -2).double().cpu() for one in (base, source))  # type: ignore[return-value]


def _gradients(prepared: PreparedPairs, name: str, site: Site, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(examples, probes, width) gradients of the answers' logits, and (examples, width) the pairs' differences."""
    answers = len(prepared.data.answers)
    if answers <= PROBES:
        probes = torch.eye(answers)
    else:
        signs = torch.randint(0, 2, (PROBES, answers), generator=torch.Generator().manual_seed(0))
        probes = (signs * 2.0 - 1) / PROBES**0.5
    probes = probes - probes.mean(1, keepdim=True)
    gradients, differences = [], []
    for some in rows.split(CHUNK):
        along = torch.tensor([ALONG[i % len(ALONG)] for i in some.tolist()])
        sources = prepared.states[name][site][some.to(prepared.states[name][site].device)]
        at = _Between(along)
        with torch.enable_grad():
            logits = one_read(prepared.engine.logits(some, {site: at}, {site: sources}, prepared.unmatched))
            of_probes = [
                torch.autograd.grad((logits @ z.to(logits)).sum(), at.states, retain_graph=True)[0] for z in probes
            ]
        of_pair = torch.stack(of_probes).unflatten(1, (len(some), -1)).sum(2)  # over each pair's answers
        gradients.append(of_pair.movedim(0, -2).flatten(0, -3).double().cpu())
        differences.append(at.differences.unflatten(0, (len(some), -1))[:, 0].flatten(0, -2).double().cpu())
    return torch.cat(gradients), torch.cat(differences)


class _Between(nn.Module):
    """Replaces the base's states by states between base and source, and stores them for their gradients."""

    def __init__(self, along: Tensor) -> None:
        super().__init__()
        self.along = along

    def forward(self, h: Tensor, source: Tensor) -> Tensor:
        share = self.along.to(h).repeat_interleave(len(h) // len(self.along))
        self.differences = source.to(h.dtype) - h.detach()
        moved = h.detach() + share.view(-1, *[1] * (h.ndim - 1)) * self.differences
        self.states = moved.detach().requires_grad_()
        return self.states


def _main(rows: Tensor, share: float, nothing: str) -> Tensor:
    """The first right singular vectors of a matrix, up to a share of its squared norm (ValueError if it is zero)."""
    _, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
    squares = sizes.square()
    if not float(squares.sum()) > 0:
        raise ValueError(f"{nothing}: there is nothing to measure.")
    kept = int((squares.cumsum(0) < share * squares.sum() * (1 - 1e-12)).sum()) + 1
    # Directions that only come from rounding are left out.
    return right[: min(kept, int((sizes > 1e-6 * sizes[0]).sum()))]


def _read_by_weights(backbone: Backbone, site: Site) -> Tensor | None:
    """The row space of the plain projection that has the site as its input; None if there is none, or if it is all."""
    point = backbone.hook_point(site)
    weight = getattr(backbone.anatomy.modules[point.path], "weight", None)
    if point.side != "input" or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        return None
    if not weight.is_floating_point():
        return None
    module = backbone.anatomy.modules[point.path]
    matrix = weight.detach().double().cpu()
    matrix = matrix if isinstance(module, nn.Linear) else matrix.T  # GPT-2's projections are stored the other way
    if point.columns is not None:
        matrix = matrix[:, list(point.columns)]
    if point.width is not None and matrix.shape[1] != point.width:
        return None
    rows = _main(matrix, 1.0, f"The weights that read {site} are zero")
    return rows if len(rows) < matrix.shape[1] else None


def _spread(n: int, most: int) -> Tensor:
    """The indices of at most `most` of n rows, evenly spaced."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


def _chunks(n: int) -> Sequence[Tensor]:
    return torch.arange(n).split(CHUNK)
