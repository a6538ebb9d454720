"""Counterfactual pairs prepared at the sites of the subspaces that are compared, and the states there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspace_lab.analysis.compared import Compared, Group, read
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import check_rank, random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, pca
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect
from subspace_lab.model.sources import Unmatched, all_rows, missing_entries

ROWS = 64  # bases in one forward pass

Looks = PreparedPairs | Mapping[str, PreparedPairs]
"""Pairs prepared with a model; if several models are compared, {model: the same pairs prepared with it}."""


def prepared(
    backbone: Backbone,
    data: Counterfactuals,
    results: Group | Mapping[str, Any],
    *,
    memory: int | str | None = None,
    unmatched: Unmatched = "refuse",
) -> PreparedPairs:
    """Pairs prepared at every site of some results: one pass over bases and sources for all measures.

    Args:
        backbone, data: the model and its pairs, usually of the test split; of the training split for
            `DriftCorrected`.
        results: the results of this model that will be compared.
        memory, unmatched: as for `sweep`.

    Raises:
        ValueError: subspaces without a site, or of a variable that the pairs do not have.
    """
    assignments = [{variable_in(data, item): site_of(item)} for item in read(results)]
    distinct = [one for i, one in enumerate(assignments) if one not in assignments[:i]]
    return PreparedPairs.of(backbone, data, distinct, memory=memory, unmatched=unmatched)


def principal_null(
    pairs: PreparedPairs, results: Group | Mapping[str, Any], within: int, *, sets: int = 2, seed: int = 0
) -> list[Alignment]:
    """Random subspaces inside the span of the `within` largest principal components of the states at each site.

    This null is stronger than random subspaces of the whole stream: any training on states leans towards the
    directions in which the states vary most. Use: `compare(fits, null={"top 16": principal_null(look, fits, 16)})`.

    Args:
        pairs: the states of their sources are used.
        results: each gets a random subspace of its own rank at its own site.
        within: how many principal components.
        sets, seed: how many random subspaces for each result, and the seed of the first.

    Raises:
        ValueError: fewer components than a rank needs.
    """
    found, spans = [], dict[tuple[str, Site], Tensor]()
    items = read(results)
    for number in range(sets):
        for i, item in enumerate(items):
            key = variable_at(pairs, item)
            if key not in spans:
                spans[key] = pca(states_at_sources(pairs, *key)[0], within).basis()
            check_rank(item.subspace.rank, within)
            mix = random_orthonormal(within, item.subspace.rank, seed + len(items) * number + i).double()
            facts = {"method": item.method, "seed": number}
            found.append(Alignment({key[0]: (key[1], FixedSubspace(mix @ spans[key]))}, facts))
    return found


def states_at_sources(pairs: PreparedPairs, variable: str, site: Site) -> tuple[Tensor, Tensor]:
    """(examples, width) states of the sources at a site, and the pair of each; every position is one example."""
    return _flat(pairs.states[variable][site])


def differences_at(pairs: PreparedPairs, variable: str, site: Site) -> Tensor:
    """(examples, width) differences source − base at a site; every position is one example."""
    base = pairs.data.base
    parts = [collect(pairs.backbone, base.rows(some), [site]) for some in torch.arange(len(base)).split(ROWS)]
    own = all_rows([part[site] for part in parts])
    source = pairs.states[variable][site].to(own)
    if source.shape != own.shape:
        raise ValueError(
            f"{site}: sources {tuple(source.shape)} and bases {tuple(own.shape)} have different positions."
        )
    return _flat(source - own)[0]


def _flat(states: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(states))
    missing = missing_entries(states) if states.ndim == 3 else None
    rows = rows.repeat_interleave(states.shape[1]) if states.ndim == 3 else rows
    flat = states.flatten(0, -2).detach().double().cpu()
    if missing is None:
        return flat, rows
    there = ~missing.flatten().cpu()
    return flat[there], rows[there]


def look_of(pairs: Looks, model: str) -> PreparedPairs:
    """The pairs prepared with a model (ValueError if there are none; the message names the possible models)."""
    if isinstance(pairs, PreparedPairs):
        return pairs
    if model not in pairs:
        raise ValueError(f"No pairs for the model {model!r}; there are pairs for {list(pairs)}.")
    return pairs[model]


def variable_at(pairs: PreparedPairs, item: Compared) -> tuple[str, Site]:
    """The variable of the pairs that a subspace exchanges, and its site."""
    return variable_in(pairs.data, item), site_of(item)


def variable_in(data: Counterfactuals, item: Compared) -> str:
    """The subspace's own variable, or the only one of the pairs, since an edit of ReFT has no variable."""
    names = list(data.sources)
    if item.variable in names or len(names) == 1:
        return item.variable if item.variable in names else names[0]
    raise ValueError(f"{item.label}: the pairs have the variables {names}, none of which is {item.variable!r}.")


def site_of(item: Compared) -> Site:
    if item.site is None:
        raise ValueError(f"{item.label} is a subspace without a site; give a fit or an alignment.")
    return item.site
