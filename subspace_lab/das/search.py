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
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.backbone import Backbone
from subspace_lab.core.frozen_past import FrozenPast
from subspace_lab.core.intervene import collect
from subspace_lab.core.interventions import Intervention, full_vector, interchange
from subspace_lab.core.runs import PlainRun, Run
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, LearnedSubspace, random_subspace
from subspace_lab.core.training import TrainingConfig, progress_bar, shuffled_rows, train
from subspace_lab.das.encoding import Counterfactuals
from subspace_lab.das.metrics import Estimate, proportion

Stream = Callable[[int], Counterfactuals]
RANDOM_SUBSPACES = 5


@dataclass(frozen=True)
class Found:
    """What a search found at one site.

    Attributes:
        site, rank, seed: where, how many dimensions (of each variable), from which random start.
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
    iia: Estimate
    train_iia: Estimate | None
    full_vector: Estimate | None
    random_subspace: Estimate
    start_overlap: float
    loss: float
    subspaces: dict[str, FixedSubspace] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What a program reads; the subspaces are saved apart."""
        plain = asdict(replace(self, subspaces={}))
        plain.pop("subspaces")
        return {**plain, "site": str(self.site), "variables": list(self.subspaces)}


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search over sites, and the floors that hold for all of them.

    Attributes:
        found: one a site, in the order asked.
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
    rank: int,
    config: TrainingConfig | None = None,
    seed: int = 0,
    min_accuracy: float | None = 0.9,
    memory: int | str | None = None,
    quiet: bool = False,
    label: str = "search",
) -> SearchResult:
    """Search each site for the variables of the counterfactuals.

    Args:
        backbone: of the model.
        training: pairs to train on, or a function step → fresh pairs (then nothing can be memorised).
        test: held-out pairs, on which everything is scored.
        sites: each is searched on its own, from a random start of its own.
        rank: dimensions of each variable's subspace. Several variables at a site partition one basis.
        config: of the training.
        seed: of the random starts and the order of the rows.
        min_accuracy: a model that answers the bases worse than this is refused; None asks for no accuracy.
        memory: budget of the frozen past, as in `FrozenPast`.
        quiet: show no progress bar.

    Raises:
        ValueError: no site, a rank above a site's width, or a model that fails the task.
    """
    config = replace(config or TrainingConfig(), seed=seed)
    sites = list(dict.fromkeys(sites))
    if not sites:
        raise ValueError("No site to search.")
    variables = list(test.sources)
    for site in sites:
        width = backbone.width(site)
        if not 1 <= rank * len(variables) <= width:
            raise ValueError(
                f"{site} has width {width}; rank {rank} for {len(variables)} variable(s) is not possible there."
            )
    held_out = _Pairs.of(backbone, test, sites, memory)
    accuracy, unchanged = _before(held_out)
    if min_accuracy is not None and accuracy.value < min_accuracy:
        raise ValueError(
            f"The model answers {accuracy} of {len(test)} bases as the causal model does, less than "
            f"{min_accuracy}: a variable of an algorithm that it does not follow is not worth a search. "
            "Ask for it all the same with min_accuracy=None."
        )
    fixed = None if callable(training) else _Pairs.of(backbone, training, sites, memory)
    found = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(label, total=len(sites) * config.steps)
        for site in sites:
            bar.update(task, description=f"{label} {site}")
            draw = _drawn(fixed, site, config) if fixed else _streamed(backbone, training, site)  # type: ignore[arg-type]
            found.append(
                _search_one(
                    backbone, site, variables, draw, fixed, held_out, rank, config, seed,
                    lambda *_: bar.advance(task),
                )
            )  # fmt: skip
    counts = torch.bincount(test.answer, minlength=len(test.answers))
    constant = proportion(test.answer == counts.argmax())
    engine = held_out.run.describe() if isinstance(held_out.run, FrozenPast) else "plain run"
    return SearchResult(tuple(found), accuracy, unchanged, constant, engine)


def fit(
    edit: Intervention,
    site: Site,
    draw: Callable[[int], tuple[Run, Tensor, Any, Tensor]],
    config: TrainingConfig,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train one interchange intervention: cross-entropy between the answers' logits and the expected answers.

    Args:
        draw: step → (run, rows, source states of these rows, expected answers).
    """

    def loss_of(step: int) -> Tensor:
        run, rows, states, answer = draw(step)
        logits = run.logits(rows, {site: edit}, {site: states})
        return nn.functional.cross_entropy(_answers(logits), answer.to(logits.device))

    return train([edit], loss_of, config, on_step=on_step)


def answers_given(run: Run, edits: dict[Site, Intervention], sources: dict[Site, Any], rows: int) -> Tensor:
    """The answers that the model gives with the edits in force, for every pair: indices into the answers."""
    given = []
    with torch.no_grad():
        for part in torch.arange(len(run)).split(rows):
            states = {site: _part(s, part) for site, s in sources.items()}
            given.append(_answers(run.logits(part, edits, states)).argmax(-1).cpu())
    return torch.cat(given)


@dataclass(frozen=True)
class _Pairs:
    """Pairs ready for every site: a run over the bases and the states of the sources."""

    run: Run
    states: dict[Site, Any]
    data: Counterfactuals
    chunk: int = 64

    @classmethod
    def of(
        cls, backbone: Backbone, data: Counterfactuals, sites: Sequence[Site], memory: int | str | None
    ) -> _Pairs:
        data = data.to(backbone.device)
        run = FrozenPast(backbone, data.base, sites, data.readout, memory=memory)
        return cls(run, source_states(backbone, data, sites), data)

    def iia(self, site: Site, edit: Intervention, states: Any = None) -> Tensor:
        states = self.states[site] if states is None else states
        given = answers_given(self.run, {site: edit}, {site: states}, self.chunk)
        return given == self.data.answer.cpu()


def source_states(
    backbone: Backbone, data: Counterfactuals, sites: Sequence[Site], chunk: int = 64
) -> dict[Site, Any]:
    """{site: states of the sources}, or {site: {variable: states}} where there are several variables.

    One run over the sources serves all sites; it ends after the last of them.
    """
    by_variable = {}
    for name, source in data.sources.items():
        parts = [collect(backbone, source.rows(r), sites) for r in torch.arange(len(data)).split(chunk)]
        by_variable[name] = {site: _joined([p[site] for p in parts], site) for site in sites}
    if len(by_variable) == 1:
        return dict(next(iter(by_variable.values())))
    return {site: {name: states[site] for name, states in by_variable.items()} for site in sites}


def _search_one(
    backbone: Backbone,
    site: Site,
    variables: list[str],
    draw: Callable[[int], tuple[Run, Tensor, Any, Tensor]],
    fixed: _Pairs | None,
    held_out: _Pairs,
    rank: int,
    config: TrainingConfig,
    seed: int,
    on_step: Callable[[int, float], None],
) -> Found:
    width = backbone.width(site)
    own = site_seed(seed, site)
    whole = LearnedSubspace(width, rank * len(variables), seed=own).to(backbone.device)
    start = whole.frozen()
    edit = interchange(whole if len(variables) == 1 else whole.partition(dict.fromkeys(variables, rank)))
    losses = fit(edit, site, draw, config, on_step)
    tail = losses[-max(1, len(losses) // 10) :]
    several = len(variables) > 1
    chance = []
    for i in range(RANDOM_SUBSPACES):
        control = random_subspace(width, whole.rank, site_seed(own, f"control {i}")).to(backbone.device)
        parts = control.partition(dict.fromkeys(variables, rank)) if several else control
        chance.append(held_out.iia(site, interchange(parts)))
    overlap = (whole.basis().detach() @ start.basis().T).square().sum() / whole.rank
    frozen = whole.frozen().cpu()
    return Found(
        site=site,
        rank=rank,
        seed=seed,
        iia=proportion(held_out.iia(site, edit)),
        train_iia=None if fixed is None else proportion(fixed.iia(site, edit)),
        full_vector=None if several else proportion(held_out.iia(site, full_vector(width).to(backbone.device))),
        random_subspace=_mean_share(chance),
        start_overlap=float(overlap),
        loss=sum(tail) / len(tail),
        subspaces={
            name: FixedSubspace(frozen.rows[i * rank : (i + 1) * rank]) for i, name in enumerate(variables)
        },
    )


def site_seed(seed: int, what: object) -> int:
    """A seed of its own for each site: starts shared between sites would look like shared subspaces."""
    return zlib.crc32(f"{seed}:{what}".encode())


def _drawn(pairs: _Pairs, site: Site, config: TrainingConfig) -> Callable[[int], tuple[Run, Tensor, Any, Tensor]]:
    order = shuffled_rows(len(pairs.data), config)

    def draw(_: int) -> tuple[Run, Tensor, Any, Tensor]:
        rows = next(order)
        return (
            pairs.run,
            rows,
            _part(pairs.states[site], rows),
            pairs.data.answer[rows.to(pairs.data.answer.device)],
        )

    return draw


def _streamed(backbone: Backbone, stream: Stream, site: Site) -> Callable[[int], tuple[Run, Tensor, Any, Tensor]]:
    def draw(step: int) -> tuple[Run, Tensor, Any, Tensor]:
        data = stream(step).to(backbone.device)
        run = PlainRun(backbone, data.base, data.readout)
        return (
            run,
            torch.arange(len(data)),
            source_states(backbone, data, [site], len(data))[site],
            data.answer,
        )

    return draw


def _before(pairs: _Pairs) -> tuple[Estimate, Estimate]:
    """Of the model as it is: accuracy on the bases, and IIA without an intervention."""
    given = answers_given(pairs.run, {}, {}, pairs.chunk)
    return proportion(given == pairs.data.base_answer.cpu()), proportion(given == pairs.data.answer.cpu())


def _mean_share(shares: list[Tensor]) -> Estimate:
    """The mean of several controls; its n counts the pairs once, since the controls share them."""
    pooled = proportion(torch.cat(shares))
    width = proportion(shares[0])
    half = (width.high - width.low) / 2
    return Estimate(pooled.value, max(0.0, pooled.value - half), min(1.0, pooled.value + half), width.n)


def _answers(logits: Tensor) -> Tensor:
    """(rows, answers), read at one position."""
    return logits[:, 0] if logits.ndim == 3 else logits


def _part(states: Any, rows: Tensor) -> Any:
    if isinstance(states, dict):
        return {name: s[rows.to(s.device)] for name, s in states.items()}
    return states[rows.to(states.device)]


def _joined(parts: list[Tensor], site: Site) -> Tensor:
    if len({p.shape[1:] for p in parts}) > 1:
        raise ValueError(
            f"{site}: the sources have different numbers of positions; an interchange needs as many in every row."
        )
    return torch.cat(parts)
