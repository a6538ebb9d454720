"""The part of what was found that is a variable of the model: it varies by itself, and the answers depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from subspace_lab.analysis._subspace_parts import apart, bases_of, check_linear, projected, scores_of
from subspace_lab.analysis.variation import EXAMPLES, READ, VARIES, Variation, variations
from subspace_lab.core.alignments import Alignment
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.prepared_pairs import Assignment, PreparedPairs
from subspace_lab.model.backbone import Backbone

WITHIN = 0.005  # a purified subspace may score lower on dev by so much to have a dimension less
AS_GOOD = 0.01  # and lower than the subspace that it is of by so much


def purify(
    backbone: Backbone,
    pairs: Pairs,
    alignment: Alignment,
    *,
    varies: float = VARIES,
    read: float = READ,
    examples: int = EXAMPLES,
) -> Alignment:
    """The part of an alignment that varies by itself and that the answers depend on.

    1. The subspace is projected on what varies between sources and bases and made orthonormal again.
    2. The same with what the answers' gradient reads within that variation. In this order: a dormant way into the
       answer can have the larger gradient, and it does not vary.
    3. Of either, directions of which less than a tenth was left are dropped. The others are turned so that the first
       moves the answers most, and as few are kept as score within half a hundredth of the best on the dev pairs.
    4. The result of 2 is taken where it scores on the dev pairs as well as the subspace did, to a hundredth; else that
       of 1; else the subspace stays as it was. Step 2 loses where the answer depends on the sum of two variables:
       either is then read along the sum alone, and exchanging the sum exchanges both.

    Variables that share a site are at last turned to be orthogonal to each other, by as little as that takes. Training
    pairs are looked at, and dev pairs for the choices; test pairs are not.

    Args:
        backbone: of the model.
        pairs: by which the alignment was found.
        alignment: of linear subspaces.
        varies, read, examples: as of `variations`.

    Returns:
        An alignment of the same variables at the same sites. Its facts say under "purified" what was done; the scores
        of the alignment that was given are not its own and stand there too.

    Raises:
        TypeError: anything but an alignment and pairs.
        ValueError: variables that are not those of the pairs, nonlinear maps, or what `variations` refuses.
    """
    check_linear(pairs, alignment)
    assignment = {name: site for name, (site, _) in alignment.variables.items()}
    known = variations(backbone, pairs, assignment, varies=varies, read=read, examples=examples)
    given = bases_of(alignment)
    varying: dict[str, Tensor] = {}
    both: dict[str, Tensor] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, one in known.items():
        varying[name], cosines = projected(given[name], one.varies)
        both[name], again = projected(varying[name], one.both)
        told[name] = {
            "rank": len(given[name]),
            "varying": len(one.varies),
            "read within": len(one.both),
            "cosines with what varies": [round(x, 4) for x in cosines.tolist()],
            "cosines with what is read within": [round(x, 4) for x in again.tolist()],
        }
    prepared = PreparedPairs.of(backbone, pairs.dev, [assignment])
    (before,) = (float(values.mean()) for values in scores_of(prepared, assignment, [given]))
    chosen, took, after = given, "nothing", before
    for taken, of in (("varies and is read", both), ("varies", varying)):
        if not all(len(basis) for basis in of.values()):
            continue
        turned = {name: _turned(basis, known[name]) for name, basis in of.items()}
        ranks, score = _fewest(prepared, assignment, turned)
        told_of = {name: {"kept": ranks[name]} for name in turned}
        if score >= before - AS_GOOD:
            chosen, took, after = {name: basis[: ranks[name]] for name, basis in turned.items()}, taken, score
            told = {name: one | told_of[name] for name, one in told.items()}
            break
    facts = {key: value for key, value in alignment.facts.items() if key not in ("scores", "dev_scores")}
    facts["purified"] = {
        "took": took,
        "variables": told,
        "iia on dev": {"before": before, "after": after, "n": len(prepared)},
        "scores before": alignment.facts.get("scores"),
    }
    subspaces = apart(assignment, chosen)
    return Alignment({name: (site, subspaces[name]) for name, site in assignment.items()}, facts)


def _turned(basis: Float[Tensor, "rank width"], known: Variation) -> Float[Tensor, "rank width"]:
    """Another basis of the same span, that along which the answers' gradient is largest first."""
    right = torch.linalg.svd(known.gradients.flatten(0, 1) @ basis.T, full_matrices=True)[2]
    return right @ basis


def _fewest(
    prepared: PreparedPairs, assignment: Assignment, left: Mapping[str, Tensor]
) -> tuple[dict[str, int], float]:
    """How many directions of each variable are kept, chosen on these pairs one variable after the other; their IIA."""
    ranks = {name: len(basis) for name, basis in left.items()}
    score = 0.0
    for name in left:
        sets = [
            {other: basis[: k if other == name else ranks[other]] for other, basis in left.items()}
            for k in range(1, len(left[name]) + 1)
        ]
        means = [float(values.mean()) for values in scores_of(prepared, assignment, sets)]
        ranks[name] = next(k for k, value in enumerate(means, 1) if value >= max(means) - WITHIN)
        score = means[ranks[name] - 1]
    return ranks, score
