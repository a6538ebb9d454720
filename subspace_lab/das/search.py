"""A search in one call: DAS with one rank or several, and the baselines and controls to compare it with.

Source: Geiger et al. 2023 (arXiv 2303.02536). The score is the interchange intervention accuracy (IIA): the share of
held-out pairs in which the model gives the answer of the causal model after the subspace was replaced by its content in
the source.

An IIA alone says little. Beside DAS the table therefore shows the difference of means and the principal components
(not trained, and often as good), random subspaces of the same rank, and the interchange of the full vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from subspace_lab.core.sites import Site
from subspace_lab.das._arguments import check_types, searches_of
from subspace_lab.das.answered import check_min_accuracy, only_answered
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
    """DAS and the methods to compare it with: difference of means, PCA, random subspaces, the full vector.

    Args:
        rank: rank of DAS, of PCA and of the random subspaces.
        shared_site: whether several variables share a site; the full vector is then left out, because it can
            belong to one variable only.
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
    """Search each site for the variables of the pairs, with DAS and the methods to compare it with.

    `fits.best()` is the fit chosen on the dev split; its score on the test split is the result to report.

    Args:
        rank: dimensions of each variable's subspace, one number or several.
        methods: the methods to run instead of `default_methods(rank)`.
        seeds: how many seeds, or which ones. A seed sets the random start and the order of the pairs.
        right_only: use only pairs whose base and sources the model answers right (`only_answered`). By default this
            is done if `min_accuracy` is set. Training pairs that are drawn at each step are all used.

    The other arguments are those of `sweep`, which this function calls; it raises the same errors.
    """
    check_min_accuracy(min_accuracy)
    if methods is None:
        several = isinstance(pairs, Pairs) and len(pairs.variables) > 1
        apart = isinstance(sites, Sequence) and all(
            isinstance(one, Mapping) and len(set(one.values())) == len(one) for one in sites
        )
        methods = default_methods(rank, shared_site=several and not apart)
    if (min_accuracy is not None) if right_only is None else right_only:
        # Errors of the sweep's arguments are raised before the model runs over the pairs.
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
