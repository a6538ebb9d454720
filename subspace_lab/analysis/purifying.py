"""The part of a subspace that is a variable of the model: it varies by itself, and the answers depend on it."""

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

WITHIN = 0.005  # the score on dev pairs that may be lost in order to have fewer dimensions
AS_GOOD = 0.01  # the score on dev pairs that the purified subspace may lose against the original one


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

    1. Project the subspace on what varies between sources and bases, and make it orthonormal again.
    2. Project the result on what the answers' gradient reads within that variation, and make it orthonormal again.
       The order matters: a dormant direction can have the larger gradient, but it does not vary.
    3. In both results, drop directions of which less than a tenth is left. Turn the others so that the first one
       moves the answers most. Keep as few as possible: the score on the dev pairs may be at most .005 below the best.
    4. Take the result of step 2 if its score on the dev pairs is at most .01 below that of the subspace; otherwise
       take the result of step 1, by the same rule; otherwise leave the subspace as it was. Step 2 scores lower if the
       answer depends on the sum of two variables: each is then read only along the sum, and exchanging the sum
       exchanges both.

    At the end, variables that share a site are made orthogonal to each other, with the smallest possible rotation.
    Training pairs show what varies and what is read, dev pairs decide; test pairs are not used.

    Args:
        backbone: the model.
        pairs: the pairs that the alignment was fitted on.
        alignment: linear subspaces.
        varies, read, examples: as for `variations`.

    Returns:
        An alignment of the same variables at the same sites. Its facts say under "purified" what was done. The scores
        of the original alignment are recorded there too, since they are not scores of the new one.

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
    records: dict[str, dict[str, Any]] = {}
    for name, one in known.items():
        varying[name], cosines = projected(given[name], one.varies)
        both[name], again = projected(varying[name], one.both)
        records[name] = {
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
        kept = {name: {"kept": ranks[name]} for name in turned}
        if score >= before - AS_GOOD:
            chosen, took, after = {name: basis[: ranks[name]] for name, basis in turned.items()}, taken, score
            records = {name: one | kept[name] for name, one in records.items()}
            break
    facts = {key: value for key, value in alignment.facts.items() if key not in ("scores", "dev_scores")}
    facts["purified"] = {
        "took": took,
        "variables": records,
        "iia on dev": {"before": before, "after": after, "n": len(prepared)},
        "scores before": alignment.facts.get("scores"),
    }
    subspaces = apart(assignment, chosen)
    return Alignment({name: (site, subspaces[name]) for name, site in assignment.items()}, facts)


def _turned(basis: Float[Tensor, "rank width"], known: Variation) -> Float[Tensor, "rank width"]:
    """Another basis of the same span, in descending order of the answers' gradient along it."""
    right = torch.linalg.svd(known.gradients.flatten(0, 1) @ basis.T, full_matrices=True)[2]
    return right @ basis


def _fewest(
    prepared: PreparedPairs, assignment: Assignment, left: Mapping[str, Tensor]
) -> tuple[dict[str, int], float]:
    """How many directions of each variable to keep, and their IIA; chosen on these pairs, one variable at a time."""
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
