"""Distributed alignment search: find the subspace in which a causal variable is swapped.

Source: Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
representations" (arXiv 2303.02536). A basis R is trained, by gradient descent, so that the model answers after
the interchange h + RᵀR(h_source − h) as the causal model says. The score is the interchange intervention
accuracy (IIA): the share of held-out pairs for which it does.

An IIA says little alone. Beside each one stand, on the same pairs: the swap of the full vector, a random
subspace of the same rank, no intervention, the best constant answer, and the IIA on the training pairs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from subspace_lab.core.interventions import Intervention, full_vector, interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, LearnedSubspace, Subspace, random_subspace
from subspace_lab.das.encoding import Counterfactuals
from subspace_lab.das.metrics import Estimate, proportion
from subspace_lab.das.prepared_pairs import Draw, PreparedPairs, fit, from_pool, from_stream
from subspace_lab.engine.training import TrainingConfig, progress_bar
from subspace_lab.model.backbone import Backbone

Stream = Callable[[int], Counterfactuals]
RANDOM_SUBSPACES = 5


@dataclass(frozen=True)
class Found:
    """What a search found at one site.

    Attributes:
        site, rank, seed, learning_rate: where, how many dimensions (of each variable), from which random
            start, how it was trained.
        iia: on the held-out pairs.
        train_iia: on the training pairs (None when they were fresh at every step).
        full_vector: IIA of swapping the whole state (None where several variables share the site).
        random_subspace: mean IIA of random subspaces of the same rank.
        start_overlap: tr(P P₀)/k with the random start, near 1 where training went nowhere.
        loss: mean training loss over the last tenth of the steps.
        subspaces: {variable: the subspace}.
    """

    site: Site
    rank: int
    seed: int
    learning_rate: float
    iia: Estimate
    train_iia: Estimate | None
    full_vector: Estimate | None
    random_subspace: Estimate
    start_overlap: float
    loss: float
    subspaces: dict[str, FixedSubspace] = field(repr=False)

    @property
    def start(self) -> int:
        """The seed of the random basis that training started from: of this site alone, whatever the search's."""
        return site_seed(self.seed, self.site)

    def subspace(self, variable: str | None = None) -> FixedSubspace:
        """Of one variable, which needs no name where it is the only one (ValueError otherwise)."""
        names = list(self.subspaces) if variable is None else [variable]
        if len(names) != 1 or names[0] not in self.subspaces:
            raise ValueError(f"variable={variable!r}; this site has {list(self.subspaces)}.")
        return self.subspaces[names[0]]

    def as_reft(self, variable: str | None = None, *, free: bool = True) -> dict[Site, Intervention]:
        """LoReFT in what was found, as {site: intervention}; it starts as the identity.

        Args:
            variable: the one meant, where there are several.
            free: train the basis too, from here; else only what is written into it.
        """
        subspace: Subspace = self.subspace(variable)
        if free:
            subspace = LearnedSubspace(subspace.width, subspace.rank, start=subspace.basis())
        return {self.site: loreft(subspace)}

    def as_dict(self) -> dict[str, Any]:
        """What a program reads; the subspaces are saved apart."""
        plain = asdict(replace(self, subspaces={}))
        plain.pop("subspaces")
        return {**plain, "site": str(self.site), "variables": list(self.subspaces)}


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search over sites, and the floors that hold for all of them.

    Attributes:
        found: for each site, rank, seed and learning rate, in the order asked.
        accuracy: of the model on the bases, before any intervention.
        no_intervention: share of pairs whose expected answer the model gives without one.
        constant: share of pairs that the most frequent expected answer is right for.
        engine: what was computed once and what anew.
    """

    found: tuple[Found, ...]
    accuracy: Estimate
    no_intervention: Estimate
    constant: Estimate
    engine: str

    @property
    def best(self) -> Found:
        """The site with the highest held-out IIA (its score is selected, so optimistic)."""
        return max(self.found, key=lambda f: f.iia.value)

    def at(self, site: Site) -> Found:
        """What was found at a site (KeyError where it was not searched, or more than once)."""
        here = [found for found in self.found if found.site == site]
        if len(here) != 1:
            raise KeyError(f"{site} has {len(here)} results; searched were {[str(f.site) for f in self.found]}.")
        return here[0]

    def as_dict(self) -> dict[str, Any]:
        """What a program reads."""
        shared = {n: asdict(getattr(self, n)) for n in ("accuracy", "no_intervention", "constant")}
        return {**shared, "engine": self.engine, "found": [f.as_dict() for f in self.found]}


def search(
    backbone: Backbone,
    training: Counterfactuals | Stream,
    test: Counterfactuals,
    sites: Sequence[Site],
    *,
    rank: int | Sequence[int],
    config: TrainingConfig | None = None,
    seed: int | Sequence[int] = 0,
    learning_rates: Sequence[float] | None = None,
    min_accuracy: float | None = 0.9,
    memory: int | str | None = None,
    quiet: bool = False,
    label: str = "search",
) -> SearchResult:
    """Search each site for the variables of the counterfactuals.

    Several ranks, seeds and learning rates are searched all with all; those of one site train together, in one
    run over a stacked batch, each as if it were alone.

    Args:
        backbone: of the model.
        training: pairs to train on, or a function step → fresh pairs (then nothing can be memorised).
        test: held-out pairs, on which everything is scored.
        sites: each is searched on its own, from a random start of its own.
        rank: dimensions of each variable's subspace, one number or several. Several variables at a site
            partition one basis.
        config: of the training.
        seed: of the random starts and the order of the rows, one or several.
        learning_rates: instead of the configuration's one.
        min_accuracy: a model that answers the bases worse than this is refused; None asks for no accuracy.
        memory: budget of the frozen past, as in `FrozenPast`.
        quiet: show no progress bar.

    Raises:
        ValueError: no site, a rank above a site's width, or a model that fails the task.
    """
    config = config or TrainingConfig()
    ranks = [rank] if isinstance(rank, int) else list(rank)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    rates = [config.learning_rate] if learning_rates is None else list(learning_rates)
    cells = [(r, replace(config, seed=s, learning_rate=rate)) for r, s, rate in product(ranks, seeds, rates)]
    sites = list(dict.fromkeys(sites))
    variables = list(test.sources)
    if not sites or not cells:
        raise ValueError(
            f"Nothing to search: {len(sites)} sites, {len(ranks)} ranks, {len(seeds)} seeds, "
            f"{len(rates)} learning rates."
        )
    _check(backbone, sites, ranks, variables)
    held_out = PreparedPairs.of(backbone, test, sites, memory=memory)
    given = held_out.unedited()
    accuracy = proportion(given == test.base_answer.cpu())
    if min_accuracy is not None and accuracy.value < min_accuracy:
        raise ValueError(
            f"The model answers {accuracy} of {len(test)} bases as the causal model does, less than "
            f"{min_accuracy}: a variable of an algorithm that it does not follow is not worth a search. "
            "Ask for it all the same with min_accuracy=None."
        )
    fixed = None if callable(training) else PreparedPairs.of(backbone, training, sites, memory=memory)
    found: list[Found] = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(label, total=len(sites) * config.steps)
        for site in sites:
            bar.update(task, description=f"{label} {site}")
            if callable(training):
                # One for all cells, so that its pairs are made once.
                draws = [from_stream(backbone, training, site)] * len(cells)
            else:
                assert fixed is not None
                draws = [from_pool(fixed, site, c) for _, c in cells]
            found += _search_site(
                backbone, site, variables, cells, draws, fixed, held_out, lambda *_: bar.advance(task)
            )
    counts = torch.bincount(test.answer, minlength=len(test.answers))
    return SearchResult(
        found=tuple(found),
        accuracy=accuracy,
        no_intervention=proportion(given == test.answer.cpu()),
        constant=proportion(test.answer == counts.argmax()),
        engine=held_out.engine.describe(),
    )


def _check(backbone: Backbone, sites: list[Site], ranks: list[int], variables: list[str]) -> None:
    for site in sites:
        width = backbone.width(site)
        wrong = [r for r in ranks if not 1 <= r * len(variables) <= width]
        if wrong:
            raise ValueError(
                f"{site} has width {width}; rank {wrong} for {len(variables)} variable(s) is not possible there, "
                f"at most {width // len(variables)} is."
            )


def _search_site(
    backbone: Backbone,
    site: Site,
    variables: list[str],
    cells: list[tuple[int, TrainingConfig]],
    draws: list[Draw],
    fixed: PreparedPairs | None,
    held_out: PreparedPairs,
    on_step: Callable[[int, list[float]], None],
) -> list[Found]:
    """Train all cells of a site together, then try them and their controls on the held-out pairs."""
    width, device = backbone.width(site), backbone.device
    wholes = [
        LearnedSubspace(width, rank * len(variables), seed=site_seed(c.seed, site)).to(device) for rank, c in cells
    ]
    starts = [whole.frozen() for whole in wholes]
    edits = [_swap(whole, variables) for whole in wholes]
    losses = fit(edits, site, draws, [c for _, c in cells], on_step)
    several = len(variables) > 1
    scores = held_out.correct(site, edits)
    training_scores = None if fixed is None else fixed.correct(site, edits)
    ceiling = None if several else proportion(held_out.correct(site, [full_vector(width).to(device)])[0])
    chance: dict[int, Estimate] = {}
    for rank in {rank for rank, _ in cells}:
        chance[rank] = _chance(held_out, site, width, rank, variables, device)
    results = []
    for i, (rank, config) in enumerate(cells):
        tail = losses[i][-max(1, config.steps // 10) :]
        rows = wholes[i].basis().detach()
        results.append(
            Found(
                site=site,
                rank=rank,
                seed=config.seed,
                learning_rate=config.learning_rate,
                iia=proportion(scores[i]),
                train_iia=None if training_scores is None else proportion(training_scores[i]),
                full_vector=ceiling,
                random_subspace=chance[rank],
                start_overlap=float((rows @ starts[i].basis().T).square().sum() / len(rows)),
                loss=sum(tail) / len(tail),
                subspaces={
                    name: FixedSubspace(rows[j * rank : (j + 1) * rank].cpu()) for j, name in enumerate(variables)
                },
            )
        )
    return results


def site_seed(seed: int, what: object) -> int:
    """A seed of its own for each site: starts shared between sites would look like shared subspaces."""
    return zlib.crc32(f"{seed}:{what}".encode())


def _swap(whole: Subspace, variables: list[str]) -> Intervention:
    """The interchange of one variable, or of several that share a basis in equal parts."""
    if len(variables) == 1:
        return interchange(whole)
    return interchange(whole.partition(dict.fromkeys(variables, whole.rank // len(variables))))


def _chance(
    held_out: PreparedPairs, site: Site, width: int, rank: int, variables: list[str], device: torch.device
) -> Estimate:
    """The mean IIA of random subspaces; its n counts the pairs once, since the subspaces share them."""
    controls = [
        random_subspace(width, rank * len(variables), site_seed(i, f"{site} {rank} control")).to(device)
        for i in range(RANDOM_SUBSPACES)
    ]
    correct = held_out.correct(site, [_swap(c, variables) for c in controls])
    mean, width_of_one = proportion(correct), proportion(correct[0])
    half = (width_of_one.high - width_of_one.low) / 2
    return Estimate(mean.value, max(0.0, mean.value - half), min(1.0, mean.value + half), correct.shape[1])
