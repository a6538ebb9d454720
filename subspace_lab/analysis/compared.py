"""What is compared: the subspaces of any result that holds some, each with its site, variable, method and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.das.fits import Fit, Fits

FACETS = ("layer", "seed", "method", "model")


@dataclass(frozen=True)
class Compared:
    """One of the subspaces that are compared.

    Attributes:
        label: its name in tables and pictures.
        subspace: what is compared.
        site: where it is; None if only the subspace is known.
        variable: the variable that it holds.
        method: the method that found it.
        seed: the seed of the method.
        start: identifies its random start; None if nothing was drawn.
        model: the name of its model, if several are compared.
        counts: whether it takes part in means; False if the score of its fit is at the floor.
    """

    label: str
    subspace: Subspace
    site: Site | None = None
    variable: str = ""
    method: str = ""
    seed: int | str | None = None
    start: int | str | None = None
    model: str = ""
    counts: bool = True

    def facet(self, name: str) -> Any:
        """Its layer, seed, method or model."""
        if name == "layer":
            return None if self.site is None else self.site.layer
        return getattr(self, name)

    def place(self) -> tuple[Any, ...]:
        """Its variable, and everything of its site except the layer."""
        site = self.site
        return (self.variable, *(() if site is None else (site.component, site.positions, site.heads)))


Group = (
    Fits | Fit | Alignment | Subspace | Sequence[Fits] | Sequence[Fit] | Sequence[Alignment] | Sequence[Subspace]
)
"""Results that hold subspaces."""


def read(
    given: Group | Mapping[str, Any],
    across: str | None = None,
    *,
    variable: str | None = None,
    min_effect: float | None = 0.0,
) -> list[Compared]:
    """The subspaces of some results. From a sweep: those with a random start, or all linear ones if none has one.

    Args:
        given: the results, or {name: results}. If methods are compared, the name is that of the method; if models
            are, that of the model.
        across: what is compared.
        variable: the variable to take if there are several; by default all.
        min_effect: a fit counts if the lower limit of its IIA on the test pairs is above
            floor + min_effect · (1 − floor); None counts all.

    Raises:
        TypeError: something that holds no subspaces.
        ValueError: no subspaces, results of different tasks or models, an unknown variable.
    """
    groups = _groups(given)
    _check_facts({name: _facts(one) for name, one in groups.items()}, across)
    found: list[Compared] = []
    for name, one in groups.items():
        items = _items(name, one, variable, min_effect)
        if across == "method" and name:
            items = [replace(item, method=name) for item in items]
        if across == "model":
            items = [replace(item, model=name) for item in items]
        found += _labelled(name, items)
    if not found:
        raise ValueError("No subspaces to compare.")
    labels = [item.label for item in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"Several subspaces have the labels {twice}: give each a name, as {{name: fit}}.")
    return found


def unlabelled(given: Group | Mapping[str, Any], *, variable: str | None = None) -> list[Compared]:
    """The subspaces of a null, of any models; each set of fits counts as a model of its own. Errors as `read`."""
    found = []
    for name, one in _groups(given).items():
        several = isinstance(one, Sequence) and not isinstance(one, Fits | str)
        for number, part in enumerate(one if several else [one]):
            model = f"{name}{number}" if isinstance(part, Fits) else name
            found += [replace(item, model=model) for item in _items(name, part, variable, None)]
    if not found:
        raise ValueError("The null has no subspaces.")
    return found


def cells_of(items: Sequence[Compared], facet: str | None) -> list[tuple[int, int]]:
    """The pairs (i, j), j < i, that differ in a facet and otherwise only in the seed; none without a facet."""
    if facet is None:
        return []
    same = [name for name in FACETS if name not in (facet, "seed")]
    return [
        (i, j)
        for i, one in enumerate(items)
        for j, other in enumerate(items[:i])
        if one.facet(facet) != other.facet(facet)
        and one.place() == other.place()
        and all(one.facet(name) == other.facet(name) for name in same)
    ]


def check_starts(items: Sequence[Compared]) -> None:
    """ValueError if two subspaces were trained from the same start."""
    by_start: dict[int | str, list[str]] = {}
    for item in items:
        if item.start is not None:
            by_start.setdefault(item.start, []).append(item.label)
    shared = [group for group in by_start.values() if len(group) > 1]
    if shared:
        some = "; ".join(" and ".join(dict.fromkeys(group)) for group in shared[:2])
        more = f"; and {len(shared) - 2} more groups" if len(shared) > 2 else ""
        raise ValueError(
            f"Trained from one start (the same seed, or the same start=…): {some}{more}. Such subspaces overlap "
            "because each stays near its start. Train them with different seeds (two models too), or compare them "
            "anyway with same_start=True."
        )


def _groups(given: Any) -> dict[str, Any]:
    return dict(given) if isinstance(given, Mapping) else {"": given}


def _items(name: str, one: Any, variable: str | None, min_effect: float | None) -> list[Compared]:
    if isinstance(one, Fits):
        floor = one.floors["test"].highest if "test" in one.floors else None
        return [item for fit in _chosen(one, variable) for item in _of_fit(fit, variable, min_effect, floor)]
    if isinstance(one, Fit):
        return _of_fit(one, variable, min_effect)
    if isinstance(one, Alignment):
        return _of_alignment(one, variable)
    if isinstance(one, Subspace):
        return [Compared(name, one)]
    if isinstance(one, Sequence) and not isinstance(one, str):
        return [item for part in one for item in _items(name, part, variable, min_effect)]
    raise TypeError(
        f"{name or 'What is compared'} is a {type(one).__name__}; needed are Fits, a fit, an alignment, a subspace, or "
        "a list of these."
    )


def _of_fit(
    fit: Fit, variable: str | None, min_effect: float | None, floor: float | None = None
) -> list[Compared]:
    controls = fit.alignment.facts.get("controls", {})
    known = [controls[name]["iia"] for name in ("no intervention", "best constant answer") if name in controls]
    floor = max(known, default=None) if floor is None else floor
    score = fit.scores.get("test", {}).get("iia")
    counts = True
    if score is not None and floor is not None and min_effect is not None:
        counts = score.low > floor + min_effect * (1 - floor)
    found = {"method": fit.method.label, "seed": fit.seed, "counts": counts}
    return [replace(item, **found) for item in _of_alignment(fit.alignment, variable, fit.start)]  # type: ignore[arg-type]


def _of_alignment(alignment: Alignment, variable: str | None, start: int | str | None = None) -> list[Compared]:
    """Each variable, or only the named one. The variables of one search are orthogonal parts of one random start."""
    facts, names = alignment.facts, list(alignment.variables) if variable is None else [variable]
    recorded = facts.get("start") if start is None else start
    # An adapter of ReFT says "random", which does not identify a start.
    known = recorded if isinstance(recorded, int | str) and recorded != "random" else None
    return [
        Compared(
            label=name,
            subspace=alignment.subspace(name),
            site=alignment.site(name),
            variable=name,
            method=str(facts.get("method", "")),
            seed=facts.get("seed"),
            start=known if known is None or len(alignment.variables) == 1 else f"{known} of {name}",
        )
        for name in names
    ]


def _chosen(fits: Fits, variable: str | None) -> list[Fit]:
    """The linear fits that were trained, or all linear fits if none was."""

    def linear(fit: Fit) -> bool:
        of = fit.alignment.variables
        return all(subspace.linear for name, (_, subspace) in of.items() if variable in (None, name))

    found = [fit for fit in fits if linear(fit)]
    return [fit for fit in found if fit.start is not None and not fit.method.control] or found


def _labelled(name: str, items: list[Compared]) -> list[Compared]:
    """The items with new labels: the name of the group, then the parts of the name that differ within the group."""
    parts = [
        (str(item.site) if item.site else item.label, item.method, f"seed {item.seed}", item.variable)
        for item in items
    ]
    differing = [k for k in range(4) if len({part[k] for part in parts}) > 1]
    differing = differing or ([] if name else [0])
    return [
        replace(item, label=", ".join([*([name] if name else []), *(part[k] for k in differing)]))
        for item, part in zip(items, parts, strict=True)
    ]


def _facts(one: Any) -> list[Mapping[str, Any]]:
    """Where results come from, as far as it is known: {"task", "variables", "weights"}."""
    if isinstance(one, Fits):
        model = one.facts.get("model") or {}
        return [
            {
                "task": one.facts.get("task"),
                "variables": one.facts.get("variables"),
                "weights": model.get("weights"),
            }
        ]
    if isinstance(one, Fit | Alignment):
        facts = one.facts if isinstance(one, Alignment) else one.alignment.facts
        model = facts.get("model_facts") or {}
        return [{"task": facts.get("task"), "weights": model.get("weights")}]
    if isinstance(one, Sequence) and not isinstance(one, str):
        return [facts for part in one for facts in _facts(part)]
    return []


def _check_facts(groups: Mapping[str, list[Mapping[str, Any]]], across: str | None) -> None:
    """ValueError for results of different tasks, and of different models unless models are compared."""
    for what, noun in (("task", "tasks"), ("variables", "variables")):
        found = {name: of[what] for name, facts in groups.items() for of in facts if of.get(what) is not None}
        recorded = [of[what] for facts in groups.values() for of in facts if of.get(what) is not None]
        if any(one != recorded[0] for one in recorded):
            raise ValueError(f"Results of different {noun} cannot be compared: {found}.")
    weights = {name: {of["weights"] for of in facts if of.get("weights")} for name, facts in groups.items()}
    every = set().union(*weights.values()) if weights else set()
    if across != "model" and len(every) > 1:
        raise ValueError(
            f"Results of {len(every)} models (weights {sorted(every)}): compare them as {{model: fits}} with "
            "across='model'."
        )
    if across == "model":
        if len(groups) < 2:
            raise ValueError("across='model' needs {model: fits} of two models or more; there is only one.")
        names = [name for name, of in weights.items() for _ in of]
        if len(every) < len(names):
            raise ValueError(f"{names} contain one model twice (the same weights): models that differ are needed.")
