"""The result of a sweep: fits, one for each method, place and seed, with their scores, floors and failures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Clusters, Estimate, estimate
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.das._fits_files import read_fits, write_fits
from subspace_lab.das._fits_table import answered_in_words, html, notes_of, table_of, text
from subspace_lab.das.methods.method import Method
from subspace_lab.das.screens import Screened

__all__ = ["Failure", "Fit", "Fits", "Floors", "Mean", "answered_in_words", "notes_of", "place_of", "table_of"]


@dataclass(frozen=True)
class Fit:
    """The result of one method at one place with one seed.

    Attributes:
        method: the method with its settings.
        alignment: {variable: (site, subspace)}.
        seed: one of the seeds of the sweep; for a random subspace the number of its draw.
        start: identifies the random start; None if nothing was drawn at random.
        scores: {split: {metric: estimate}}; a split on which it was not scored is missing.
        losses: the training loss at each step; empty if nothing was trained.
        start_overlap: {variable: tr(P P₀) / k with its random start}, 1 if training did not move the subspace.
        pair_scores: {metric: (test pairs,) the score of each pair}.
    """

    method: Method
    alignment: Alignment
    seed: int
    start: int | str | None
    scores: Mapping[str, Mapping[str, Estimate]]
    losses: tuple[float, ...] = field(default=(), repr=False)
    start_overlap: Mapping[str, float] = field(default_factory=dict)
    pair_scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sites(self) -> dict[str, Site]:
        """{variable: its site}."""
        return {name: site for name, (site, _) in self.alignment.variables.items()}

    @property
    def site(self) -> Site:
        """The site of all variables. ValueError if they have different sites."""
        found = self.alignment.sites
        if len(found) != 1:
            raise ValueError(f"This fit has the sites {list(found)}; `sites` has the site of each variable.")
        return found[0]

    @property
    def place(self) -> str:
        """Its sites as text: one site for all variables, or "variable: site" for each."""
        return place_of(self.sites)

    @property
    def rank(self) -> int:
        """Dimensions of each variable's subspace (the largest, if they differ)."""
        return max(subspace.rank for _, subspace in self.alignment.variables.values())

    def subspace(self, variable: str | None = None) -> Subspace:
        """The subspace of a variable; the name can be left out if there is only one variable."""
        return self.alignment.subspace(variable)

    def score(self, metric: str = "iia", split: str = "test") -> Estimate:
        """One score. KeyError if it does not exist; the message names those that do."""
        found = self.scores.get(split, {})
        if metric not in found:
            raise KeyError(
                f"No {metric!r} on the {split} split of {self.method.label} at {self.place}; there are "
                f"{ {name: list(of) for name, of in self.scores.items()} }."
            )
        return found[metric]

    @property
    def iia(self) -> Estimate:
        """Interchange intervention accuracy on the test split."""
        return self.score("iia")

    @property
    def loss(self) -> float | None:
        """The mean training loss over the last tenth of the steps; None if nothing was trained."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return statistics.fmean(tail) if tail else None

    def record(self) -> dict[str, Any]:
        """The fit as one flat record, for a data frame or JSON."""
        sites = set(self.sites.values())
        only = next(iter(sites)) if len(sites) == 1 else None
        flat: dict[str, Any] = {
            **self.method.as_dict(),
            "label": self.method.label,
            "site": self.place,
            "component": None if only is None else only.component,
            "layer": None if only is None else only.layer,
            "positions": None if only is None else only.positions,
            "variables": ",".join(self.alignment.variables),
            "rank": self.rank,
            "seed": self.seed,
            "start": self.start,
            "loss": self.loss,
            "start_overlap": statistics.fmean(self.start_overlap.values()) if self.start_overlap else None,
        }
        for split, scores in self.scores.items():
            for metric, score in scores.items():
                name = f"{metric}_{split}"
                flat |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return flat


@dataclass(frozen=True)
class Floors:
    """The scores that a split gives without any subspace. They belong to the split, not to a method.

    Attributes:
        accuracy: the model's accuracy on the bases, before any intervention.
        no_intervention: share of pairs in which the model gives the expected answer without an intervention.
        constant: share of pairs in which the most frequent expected answer is right.
    """

    accuracy: Estimate
    no_intervention: Estimate
    constant: Estimate

    @property
    def highest(self) -> float:
        """The higher of the two floors. An IIA that is not above it shows nothing."""
        return max(self.no_intervention.value, self.constant.value)


@dataclass(frozen=True)
class Mean:
    """The fits of one method at one place, over their seeds.

    Attributes:
        method, place: the method and place of all of these fits.
        fits: one for each seed.
        value: the mean score over the seeds.
        spread: the standard deviation of the score over the seeds; None if there is one seed.
        low, high: the lowest and the highest score over the seeds.
    """

    method: Method
    place: str
    fits: tuple[Fit, ...] = field(repr=False)
    value: float
    spread: float | None
    low: float
    high: float

    def __repr__(self) -> str:
        return f"{self.method.label} at {self.place}: {self}"

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.fits)

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.spread is None else f"{self.value:.2f} ± {self.spread:.2f}"


@dataclass(frozen=True)
class Failure:
    """A search that gave no result: its method, place and seed, and the reason."""

    method: str
    place: str
    seed: int
    reason: str


@dataclass(frozen=True, eq=False)
class Fits(Sequence[Fit]):
    """The fits of a sweep: a sequence that can be filtered, averaged, shown as a table, and saved.

    Attributes:
        fits: ordered by site, then by method, then by seed.
        floors: {split: its scores without any subspace}.
        failures: searches without a result.
        facts: how the fits were computed: task, model, data fingerprint, training settings, versions, engine.
        labels: {name: a text for each test pair}: its "kind", the variables "exchanged" if there are several, and the
            labels of the pairs, such as "entity" and "template".
        screened: cells that were skipped because a screen left out their site.
    """

    fits: tuple[Fit, ...]
    floors: Mapping[str, Floors]
    failures: tuple[Failure, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    screened: tuple[Screened, ...] = ()

    def __len__(self) -> int:
        return len(self.fits)

    @overload
    def __getitem__(self, index: int) -> Fit: ...
    @overload
    def __getitem__(self, index: slice) -> Fits: ...
    def __getitem__(self, index: int | slice) -> Fit | Fits:
        if isinstance(index, slice):
            return replace(self, fits=self.fits[index])
        return self.fits[index]

    def __iter__(self) -> Iterator[Fit]:
        return iter(self.fits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fits):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    # --- choosing -----------------------------------------------------------------------------------------

    def where(
        self,
        *,
        method: str | Method | type[Method] | None = None,
        rank: int | None = None,
        seed: int | None = None,
        site: Site | str | None = None,
        layer: int | None = None,
        positions: str | int | None = None,
        learning_rate: float | None = None,
    ) -> Fits:
        """The fits for which all conditions hold, and the screened cells of the same methods.

        Args:
            method: the name ("DAS"), the label ("DAS 4"), the class, or the value.
            site: a `Site`, or its text.
            layer, positions: of the fit's site; if its variables have several sites, of at least one of them.

        Raises:
            ValueError: a condition that no fit meets, so that a misspelt name does not give an empty result.
        """
        found: list[Fit] = list(self.fits)
        screened = self.screened
        if method is not None:
            found = [fit for fit in found if _is_method(fit.method, method)]
            if not found and self.fits:
                raise ValueError(f"No fit of method {method!r}; there are {self.methods}.")
            labels = {fit.method.label for fit in found}
            screened = tuple(one for one in screened if one.method in labels)
        if site is not None and found:
            found = [fit for fit in found if site in (fit.place, *fit.sites.values()) or str(site) == fit.place]
            if not found:
                raise ValueError(f"No fit at {site}; there are {self.places}.")
        positions = None if positions is None else str(positions)
        tests: list[tuple[str, Any, Callable[[Fit], Sequence[Any]]]] = [
            ("rank", rank, lambda fit: [fit.rank]),
            ("seed", seed, lambda fit: [fit.seed]),
            ("layer", layer, lambda fit: [site.layer for site in fit.sites.values()]),
            ("positions", positions, lambda fit: [site.positions for site in fit.sites.values()]),
            ("learning_rate", learning_rate, lambda fit: [getattr(fit.method, "learning_rate", None)]),
        ]
        for name, wanted, of in tests:
            if wanted is not None and found:
                there = list(dict.fromkeys(value for fit in found for value in of(fit)))
                found = [fit for fit in found if wanted in of(fit)]
                if not found:
                    raise ValueError(f"No fit with {name}={wanted!r}; there are {there}.")
        return replace(self, fits=tuple(found), screened=screened)

    @property
    def methods(self) -> list[str]:
        """The labels of the methods, in the order of the fits."""
        return list(dict.fromkeys(fit.method.label for fit in self.fits))

    @property
    def places(self) -> list[str]:
        """The places that were searched, in the order of the fits."""
        return list(dict.fromkeys(fit.place for fit in self.fits))

    @property
    def variables(self) -> list[str]:
        return list(dict.fromkeys(name for fit in self.fits for name in fit.alignment.variables))

    @property
    def metric(self) -> str:
        """The metric that tables show and that `best` uses by default: the first metric of the sweep."""
        asked = self.facts.get("metrics") or [name for fit in self.fits for name in fit.scores.get("test", {})]
        return asked[0] if asked else "iia"

    def best(self, metric: str | None = None) -> Fit:
        """The fit chosen on the dev split; the result to report is its score on the test split.

        First the place and the method with the highest mean over seeds are chosen, then the best of their seeds.
        Controls take no part, unless there are no other fits.

        Args:
            metric: the metric by which it is chosen, by default `self.metric`.

        Raises:
            ValueError: no fits, or fits without a dev score.
        """
        metric = metric or self.metric
        candidates = [fit for fit in self.fits if not fit.method.control] or list(self.fits)
        if not candidates:
            raise ValueError("There are no fits, so there is none to choose.")
        if lacking := [fit for fit in candidates if metric not in fit.scores.get("dev", {})]:
            there = list(lacking[0].scores.get("dev", {}))
            found = f"their scores on dev are {there}" if there else "they have no scores on dev"
            raise ValueError(f"The fits cannot be chosen by metric={metric!r}: {found}.")
        means = replace(self, fits=tuple(candidates)).mean(metric=metric, split="dev")
        chosen = max(means, key=lambda mean: mean.value)
        return max(chosen.fits, key=lambda fit: fit.score(metric, "dev").value)

    def mean(self, over: str = "seed", *, metric: str | None = None, split: str = "test") -> list[Mean]:
        """For each method and place the mean score over seeds, with its spread (never the maximum over seeds).

        Args:
            metric: the metric that is averaged, by default `self.metric`.

        Raises:
            ValueError: `over` is not "seed".
            KeyError: a metric that was not scored on this split.
        """
        if over != "seed":
            raise ValueError(f"mean(over={over!r}): possible is 'seed'. For anything else, filter with `where`.")
        metric = metric or self.metric
        groups: dict[tuple[str, str], list[Fit]] = {}
        for fit in self.fits:
            groups.setdefault((fit.place, fit.method.label), []).append(fit)
        means = []
        for (place, _), fits in groups.items():
            values = [fit.score(metric, split).value for fit in fits]
            spread = statistics.stdev(values) if len(values) > 1 else None
            mean = statistics.fmean(values)
            means.append(Mean(fits[0].method, place, tuple(fits), mean, spread, min(values), max(values)))
        return means

    def by_kind(self, metric: str | None = None, by: str = "kind") -> list[dict[str, Any]]:
        """The test score of each fit for each kind of pair, as flat records: `pandas.DataFrame(fits.by_kind())`.

        A single number can hide that an edit is right wherever the answer stays and wrong wherever it changes.

        Args:
            metric: by default `self.metric`. Kinds for which all its values are NaN are left out.
            by: the name of the label that defines the kinds.

        Raises:
            KeyError: no label of that name, or no scores of that metric for single pairs.
        """
        metric = metric or self.metric
        if by not in self.labels:
            raise KeyError(f"The test pairs have no label {by!r}; they have {list(self.labels)}.")
        clusters, labels = Clusters.of(self.labels), self.labels[by]
        rows = {kind: torch.tensor([one == kind for one in labels]) for kind in dict.fromkeys(labels)}
        lines = []
        for fit in self.fits:
            if metric not in fit.pair_scores:
                raise KeyError(f"No {metric!r} by pair of {fit.method.label}; there are {list(fit.pair_scores)}.")
            for kind, there in rows.items():
                values = fit.pair_scores[metric][there]
                if bool(values.isnan().all()):
                    continue
                found = estimate(values, None if clusters is None else clusters.where(there))
                about = {"label": fit.method.label, "site": fit.place, "rank": fit.rank, "seed": fit.seed}
                lines.append({**about, by: kind, "metric": metric, **asdict(found)})
        return lines

    # --- output -------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Each fit as one flat record: `pandas.DataFrame(fits.records())`."""
        return [fit.record() for fit in self.fits]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON, without the subspaces themselves."""
        return {
            "facts": dict(self.facts),
            "floors": {split: asdict(floors) for split, floors in self.floors.items()},
            "fits": self.records(),
            "failures": [asdict(failure) for failure in self.failures],
            **({"screened": [asdict(one) for one in self.screened]} if self.screened else {}),
        }

    def __repr__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return html(self)

    # --- files --------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write all fits into a new or empty folder: fits.json and subspaces.safetensors.

        Raises:
            FileExistsError: the folder is not empty.
            TypeError: a fit that could not be read again; nothing is written then.
        """
        write_fits(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, methods: Sequence[type[Method]] = ()) -> Fits:
        """Read the fits that `save` wrote; they are equal bit by bit.

        Args:
            methods: your own method classes, if the sweep used some; those of the package are known.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: files that are broken, do not belong together, or have another format.
        """
        found = read_fits(Path(folder), methods)
        return cls(
            fits=tuple(Fit(**one) for one in found["fits"]),
            floors={split: Floors(**of) for split, of in found["floors"].items()},
            failures=tuple(Failure(**one) for one in found["failures"]),
            screened=tuple(Screened(**one) for one in found["screened"]),
            facts=found["facts"],
            labels=found["labels"],
        )


def place_of(sites: Mapping[str, Site]) -> str:
    """The sites of variables as text: one site for all variables, or "variable: site" for each."""
    distinct = list(dict.fromkeys(sites.values()))
    return str(distinct[0]) if len(distinct) == 1 else ", ".join(f"{name}: {site}" for name, site in sites.items())


def _is_method(method: Method, wanted: str | Method | type[Method]) -> bool:
    if isinstance(wanted, str):
        return wanted.lower() in (type(method).__name__.lower(), method.label.lower())
    return isinstance(method, wanted) if isinstance(wanted, type) else method == wanted
