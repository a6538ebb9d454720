"""The arguments of a sweep, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from subspace_lab.core.sites import Site
from subspace_lab.das._places import name_of
from subspace_lab.das.fits import place_of
from subspace_lab.das.methods.method import Method
from subspace_lab.das.objectives import Metric, Towards
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect


def assignments_of(sites: Sequence[Site | Mapping[str, Site]], variables: list[str]) -> list[dict[str, Site]]:
    """Each place as {variable: site}, without duplicates."""
    found: list[dict[str, Site]] = []
    for one in sites:
        given = dict.fromkeys(variables, one) if isinstance(one, Site) else dict(one)
        if set(given) != set(variables):
            raise ValueError(f"A mapping names sites for {list(given)}; the pairs have the variables {variables}.")
        # The order decides which part belongs to which variable.
        assignment = {name: given[name] for name in variables}
        if assignment not in found:
            found.append(assignment)
    return found


def searches_of(
    backbone: Backbone,
    pairs: Pairs,
    sites: Sequence[Site | Mapping[str, Site]],
    methods: Sequence[Method],
    seeds: int | Sequence[int],
    metrics: Sequence[Metric],
) -> tuple[list[dict[str, Site]], list[Method], list[int], dict[Site, int]]:
    """The places, the methods with single settings, the seeds, and the width of each site.

    Raises:
        ValueError: nothing to search, the same thing twice, a method that does not fit a site, a receiver that no path
            reaches.
    """
    assignments = assignments_of(sites, pairs.variables)
    variants = [variant for method in methods for variant in method.variants()]
    asked = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not assignments or not variants or not asked or not metrics:
        raise ValueError(
            f"Nothing to search: {len(assignments)} sites, {len(variants)} methods, {len(asked)} seeds, "
            f"{len(metrics)} metrics."
        )
    named: dict[str, list[Any]] = {
        "methods": [method.label for method in variants],
        "metrics": [name_of(metric) for metric in metrics],
        "seeds": asked,
    }
    for what, names in named.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Given twice, so that results could not be distinguished: the {what} {twice}.")
    _check_distinct(backbone, assignments)
    widths = {site: _width(backbone, site, pairs.test) for one in assignments for site in one.values()}
    for assignment in assignments:
        for method in variants:
            method.check(assignment, widths)
            if method.path is not None:
                method.path.check(backbone, assignment.values())
    return assignments, variants, asked, widths


def _check_distinct(backbone: Backbone, assignments: Sequence[Mapping[str, Site]]) -> None:
    """ValueError where one site is asked for by two names, as layer 4 of five and layer −1."""
    seen: dict[Any, str] = {}
    for assignment in assignments:
        where = []
        for name, site in assignment.items():
            point = backbone.hook_point(site)
            where.append((name, point.path, point.side, site.component, site.positions, site.heads))
        first = seen.setdefault(tuple(where), place_of(assignment))
        if first != place_of(assignment):
            raise ValueError(
                f"The sites {first} and {place_of(assignment)} are the same one; leave one of them out."
            )


def _width(backbone: Backbone, site: Site, pairs: Counterfactuals) -> int:
    """The width of the states at a site: from the model's structure, or, if that is unknown, from a run of one pair."""
    width = backbone.hook_point(site).width
    if width is None:
        base = pairs.base.rows(torch.arange(1)).to(backbone.device)
        width = collect(backbone, base, [site])[site].shape[-1]
    return width


def check_types(
    backbone: Any, pairs: Any, sites: Any, methods: Any, seeds: Any, config: Any, loss: Any, metrics: Any
) -> None:
    """TypeError, with a message of one sentence, for an argument of the wrong type."""
    if not isinstance(backbone, Backbone):
        raise TypeError(f"The model must be given as Backbone(model), found {type(backbone).__name__}.")
    if not isinstance(pairs, Pairs):
        raise TypeError(
            f"Pairs in three splits are needed, found {type(pairs).__name__}: make them with Pairs(train=…, dev=…, "
            "test=…), Pairs.split(…), or a task's pairs(tokenizer)."
        )
    for name, given, kind in (("sites", sites, Site | Mapping), ("methods", methods, Method)):
        wanted = getattr(kind, "__name__", "Site")
        if isinstance(given, str | Site | Method | Mapping) or not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list of {wanted}s, found {given!r}; put it in brackets.")
        for one in given:
            if not isinstance(one, kind):
                hint = f"; write Site.parse({one!r})" if isinstance(one, str) and name == "sites" else ""
                hint = f"; write {one.__name__}()" if isinstance(one, type) else hint
                raise TypeError(f"{name} holds {one!r}, which is no {wanted}{hint}.")
            for place in one.values() if isinstance(one, Mapping) else ():
                if not isinstance(place, Site):
                    raise TypeError(f"sites holds {one!r}, in which {place!r} is no Site.")
    listed = isinstance(seeds, Sequence) and all(isinstance(seed, int) for seed in seeds)
    if isinstance(seeds, bool | str) or not (isinstance(seeds, int) or listed):
        raise TypeError(f"seeds must be a number of seeds or a list of seeds, whole numbers; found {seeds!r}.")
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"config must be a TrainingConfig, found {config!r}.")
    if not callable(loss) or not isinstance(metrics, Sequence) or not all(map(callable, metrics)):
        raise TypeError(
            f"loss must be a function and metrics a list of functions, found {loss!r} and {metrics!r}."
        )
    if classes := [one for one in (loss, *metrics) if isinstance(one, type)]:
        raise TypeError(
            f"{classes[0].__name__} is a class where a function is needed; write {classes[0].__name__}()."
        )
    _check_loss(loss, config.batch_size, len(pairs.test.answers))


def _check_loss(loss: Any, n: int, answers: int) -> None:
    """TypeError for a loss that is no function of logits and answers; it is tried on n made-up pairs."""
    needed = (
        "needed is a function of (pairs, answers) logits and (pairs,) expected answers, as numbers, that gives a "
        "differentiable value for each pair"
    )
    logits = torch.zeros(n, answers, requires_grad=True)
    towards_source = isinstance(loss, Towards) and loss.target == "source"
    expected = torch.zeros(n, answers) if towards_source else torch.zeros(n, dtype=torch.long)
    with torch.enable_grad():
        try:
            found = loss(logits, expected)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
            raise TypeError(
                f"The loss {name_of(loss)!r} fails on {n} made-up pairs ({error}); {needed}."
            ) from error
    if not isinstance(found, torch.Tensor) or found.shape != (n,):
        given = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise TypeError(f"The loss {name_of(loss)!r} gives {given} for {n} pairs; {needed}.")
    if not found.requires_grad:
        raise TypeError(f"The loss {name_of(loss)!r} gives numbers without a gradient; {needed}.")
