"""What a sweep is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subspace_lab.core.sites import Site
from subspace_lab.das.methods.method import Method
from subspace_lab.das.pairs import Pairs
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone


def assignments_of(sites: Sequence[Site | Mapping[str, Site]], variables: list[str]) -> list[dict[str, Site]]:
    """Each place as {variable: site}, each once."""
    found: list[dict[str, Site]] = []
    for one in sites:
        given = dict.fromkeys(variables, one) if isinstance(one, Site) else dict(one)
        if set(given) != set(variables):
            raise ValueError(f"A place names sites for {list(given)}; the pairs have the variables {variables}.")
        assignment = {name: given[name] for name in variables}  # their order decides which part is whose
        if assignment not in found:
            found.append(assignment)
    return found


def check_kinds(backbone: Any, pairs: Any) -> None:
    """TypeError unless these are a backbone and pairs in three splits."""
    if not isinstance(backbone, Backbone):
        raise TypeError(f"The model is given as Backbone(model), found {type(backbone).__name__}.")
    if not isinstance(pairs, Pairs):
        raise TypeError(
            f"Pairs in three splits are needed, found {type(pairs).__name__}: make them with Pairs(train=…, dev=…, "
            "test=…), Pairs.split(…), or a task's pairs(tokenizer)."
        )


def check_types(
    backbone: Any, pairs: Any, sites: Any, methods: Any, seeds: Any, config: Any, loss: Any, metrics: Any
) -> None:
    """TypeError, in one sentence, for an argument of another kind."""
    check_kinds(backbone, pairs)
    for name, given, kind in (("sites", sites, Site | Mapping), ("methods", methods, Method)):
        wanted = getattr(kind, "__name__", "Site")
        if isinstance(given, str | Site | Method | Mapping) or not isinstance(given, Sequence):
            raise TypeError(f"{name} is a list of {wanted}s, found {given!r}; put it in brackets.")
        for one in given:
            if not isinstance(one, kind):
                hint = f"; write Site.parse({one!r})" if isinstance(one, str) and name == "sites" else ""
                hint = f"; write {one.__name__}()" if isinstance(one, type) else hint
                raise TypeError(f"{name} holds {one!r}, which is no {wanted}{hint}.")
            for place in one.values() if isinstance(one, Mapping) else ():
                if not isinstance(place, Site):
                    raise TypeError(f"sites holds {one!r}, where {place!r} is no Site.")
    listed = isinstance(seeds, Sequence) and all(isinstance(seed, int) for seed in seeds)
    if isinstance(seeds, bool | str) or not (isinstance(seeds, int) or listed):
        raise TypeError(f"seeds is a number of seeds or a list of them, whole numbers; found {seeds!r}.")
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"config is a TrainingConfig, found {config!r}.")
    if not callable(loss) or not isinstance(metrics, Sequence) or not all(map(callable, metrics)):
        raise TypeError(f"loss is a function and metrics a list of functions, found {loss!r} and {metrics!r}.")
