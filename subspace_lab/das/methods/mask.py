"""A binary mask over given axes: neurons, principal components, or features.

Sources: De Cao et al. 2020 (arXiv 2004.14992) and Davies et al. 2023 (arXiv 2307.03637) for masks trained by gradient
descent; Mueller et al. 2025, "MIB" (arXiv 2504.13151) for the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from subspace_lab.core.dictionaries import Dictionary
from subspace_lab.core.masks import Gates
from subspace_lab.core.orthonormal import check_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, Subspace, pca
from subspace_lab.das.methods._masked import MaskedLearner, check_temperatures
from subspace_lab.das.methods.method import Learner, Method, Problem, check_rank_fits, check_setting

AXES = ("neurons", "pca", "features")


@dataclass(frozen=True)
class Mask(Method):
    """Learn which axes of a fixed basis hold the variable: h + Dᵀ(m ⊙ (D h_source − D h)), m = σ(a/T), a is trained.

    T falls during the training. At the end m becomes hard: an axis is chosen if a > 0. The result, which is scored
    and returned, is the subspace of the chosen axes (of the best one, if none is chosen). If several variables share
    a site, an axis belongs to at most one of them: m is then the softmax over their values of a and 0. Nothing is
    random.

    Attributes:
        axes: "neurons", the axes of the stream; "pca", the principal components of the sources' states in the
            training pairs; "features", the given features. A list runs once for each entry.
        features: (features, width) orthonormal directions, or the `Dictionary` of a sparse autoencoder. The features of
            a dictionary are encoded, exchanged and decoded; the part of the state that they do not explain stays the
            base's. The result is then not a subspace, so it has no overlap with others.
        penalty: weight of the sum of m in the loss, so that fewer axes are preferred.
        first_temperature, last_temperature: T at the start and at the end.
        learning_rate: learning rate of a, by default that of the sweep.
    """

    axes: str | Sequence[str] = "neurons"
    features: Tensor | Dictionary | None = field(default=None, compare=False, repr=False)
    penalty: float | Sequence[float] = 1e-4
    first_temperature: float = 1.0
    last_temperature: float = 0.01
    learning_rate: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "axes", "features")
        given = [self.axes] if isinstance(self.axes, str) else list(self.axes)
        if not given or not set(given) <= set(AXES):
            raise ValueError(f"Mask(axes={self.axes!r}): possible are {', '.join(map(repr, AXES))}.")
        check_setting(self, "penalty", float, least=0.0)
        if self.learning_rate is not None:
            check_setting(self, "learning_rate", float)
        for name in ("first_temperature", "last_temperature"):
            check_setting(self, name, float)
        check_temperatures(self, (self.first_temperature, self.last_temperature))

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return list(asked)  # a seed sets the order of the pairs

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        check_rank_fits(self, 1, sites, widths)
        if self.axes != "features":
            return
        if self.features is None:
            raise ValueError(f"{self.label}: no features are given; write Mask(features=directions).")
        if isinstance(self.features, Dictionary):
            self._check_dictionary(self.features, sites, widths)
            return
        for site in dict.fromkeys(sites.values()):
            if self.features.ndim != 2 or self.features.shape[1] != widths[site]:
                raise ValueError(
                    f"{self.label}: features of shape {tuple(self.features.shape)}; needed at {site} is (features, "
                    f"width) with width {widths[site]}."
                )
            n, count = len(self.features), sum(own == site for own in sites.values())
            if n < count:
                raise ValueError(
                    f"{self.label} at {site}: {n} feature(s) for {count} variables; each needs at least one."
                )
            if n > widths[site]:
                raise ValueError(
                    f"{self.label}: {n} features in states of width {widths[site]} cannot be orthonormal. For those "
                    "of a sparse autoencoder give Mask(features=Dictionary(encoder, decoder, …))."
                )
            try:
                check_orthonormal(self.features, (n, widths[site]))
            except ValueError as error:
                raise ValueError(
                    f"{self.label}: the features overlap ({error}); give an orthonormal basis of their span, or the "
                    "Dictionary of a sparse autoencoder."
                ) from error

    def _check_dictionary(
        self, features: Dictionary, sites: Mapping[str, Site], widths: Mapping[Site, int]
    ) -> None:
        for site in dict.fromkeys(sites.values()):
            if features.width != widths[site]:
                raise ValueError(
                    f"{self.label}: a dictionary of states of width {features.width}; at {site} they have width "
                    f"{widths[site]}."
                )
        if len(set(sites.values())) < len(sites):
            raise ValueError(
                f"{self.label} for {list(sites)} at {sorted(set(map(str, sites.values())))}: variables that share a "
                "site need parts of one basis, and a dictionary has none. Search one variable at a time."
            )

    def learner(self, problem: Problem) -> Learner:
        wholes = {site: self._basis(problem, site) for site in dict.fromkeys(problem.sites.values())}
        assert isinstance(self.penalty, int | float)
        assert self.learning_rate is None or isinstance(self.learning_rate, int | float)
        return MaskedLearner(
            problem,
            wholes,
            lambda rank, variables: Gates(rank, variables, self.first_temperature),
            temperatures=(self.first_temperature, self.last_temperature),
            penalty=_Sum(self.penalty),
            rates=(None, self.learning_rate),
        )

    def _basis(self, problem: Problem, site: Site) -> Subspace:
        if self.axes == "neurons":
            return Axes(problem.widths[site])
        if isinstance(self.features, Dictionary):
            return self.features.frozen()
        if self.features is not None:
            return FixedSubspace(self.features)
        states = problem.states(problem.at(site)[0])
        return pca(states, min(problem.widths[site], len(states) - 1))


@dataclass(frozen=True)
class _Sum:
    weight: float

    def __call__(self, mask: Gates) -> Tensor:
        return self.weight * mask().sum()
