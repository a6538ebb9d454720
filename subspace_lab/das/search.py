"""The short way to a search: one rank or several, with the baselines and controls that belong beside it.

Source: Geiger et al. 2023 (arXiv 2303.02536). The score is the interchange intervention accuracy (IIA): the share of
held-out pairs that the model answers as the causal model does, once the subspace's content comes from the source.

An IIA says little alone. The table shows, beside DAS: the difference of means and the principal components, which are
not trained and often as good; random subspaces of the same rank; and the swap of the full vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from subspace_lab.core.sites import Site
from subspace_lab.das._arguments import check_types, searches_of
from subspace_lab.das.answered import only_answered
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import Loss, Metric, cross_entropy, iia
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.screens import Screen
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.sources import Unmatched


def default_methods(rank: int | Sequence[int] = 1, *, shared_site: bool = False) -> list[Method]:
    """DAS, and what belongs beside it: difference of means, principal components, random subspaces, the full vector.

    Args:
        rank: of DAS, of the principal components and of the random subspaces.
        shared_site: whether several variables share a site, where none of them can have the full vector.
    """
    methods: list[Method] = [DAS(rank), DifferenceOfMeans(), PCA(rank), RandomSubspace(rank)]
    return methods if shared_site else [*methods, FullVector()]


def search(
    backbone: Backbone,
    pairs: Pairs,
    sites: Sequence[Site | Mapping[str, Site]],
    *,
    rank: int | Sequence[int] = 1,
    methods: Sequence[Method] | None = None,
    seeds: int | Sequence[int] = 1,
    config: TrainingConfig | None = None,
    loss: Loss = cross_entropy,
    metrics: Sequence[Metric] = (iia,),
    min_accuracy: float | None = 0.9,
    right_only: bool | None = None,
    memory: int | str | None = None,
    unmatched: Unmatched = "refuse",
    screen: Screen | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    quiet: bool = False,
    label: str = "search",
) -> Fits:
    """Search each site for the variables of the pairs, by DAS and the methods that belong beside it.

    `fits.best()` is the fit that the dev split chooses; its score on the test split is what it is worth.

    Args:
        rank: dimensions of each variable's subspace, one number or several.
        methods: instead of `default_methods(rank)`.
        seeds: how many, or which: of random starts and of the order of the pairs.
        right_only: count only pairs whose base and sources the model answers right (`only_answered`); by default
            wherever `min_accuracy` asks for a model that follows the algorithm. Training pairs that are drawn afresh
            all count.
        others: as of `sweep`, which this calls and whose errors it raises.
    """
    if methods is None:
        several = isinstance(pairs, Pairs) and len(pairs.variables) > 1
        apart = isinstance(sites, Sequence) and all(
            isinstance(one, Mapping) and len(set(one.values())) == len(one) for one in sites
        )
        methods = default_methods(rank, shared_site=several and not apart)
    if (min_accuracy is not None) if right_only is None else right_only:
        # What a sweep refuses is refused before the model runs over the pairs.
        check_types(backbone, pairs, sites, methods, seeds, config or TrainingConfig(), loss, metrics)
        searches_of(backbone, pairs, sites, methods, seeds, metrics)
        pairs = only_answered(backbone, pairs, min_accuracy=min_accuracy)
    return sweep(
        backbone,
        pairs,
        sites,
        methods,
        seeds=seeds,
        config=config,
        loss=loss,
        metrics=metrics,
        min_accuracy=min_accuracy,
        memory=memory,
        unmatched=unmatched,
        screen=screen,
        out=out,
        executor=executor,
        quiet=quiet,
        label=label,
    )
