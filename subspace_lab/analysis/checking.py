"""`check`: a claim is compared with its controls. Each is the same search with another model or other pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.analysis.controls import control_labels
from subspace_lab.analysis.evidence import Evidence, at_cell, changing, check_number, chosen_of
from subspace_lab.analysis.illusions import illusion
from subspace_lab.analysis.judging import judge
from subspace_lab.analysis.planting import plant
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.analysis.verdicts import Verdict
from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.sites import Site
from subspace_lab.das.answered import answers_given, only_answered
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import PCA, DifferenceOfMeans, Method, RandomSubspace
from subspace_lab.das.objectives import Loss, complement_stays, cross_entropy
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.identity import model_facts
from subspace_lab.model.sources import Unmatched

TWINS = 19  # as many as p = .05 needs
TRAINING_PAIRS = 400  # as many training pairs as a sweep scores
FULL, SHARED = "a full vector has no complement", "variables that share a site have no complement"


def check(
    backbone: Backbone,
    pairs: Pairs,
    fits: Fits,
    *,
    twins: int | Iterable[nn.Module] = TWINS,
    searched: Sequence[Fits] = (),
    partial: Mapping[str, Iterable[nn.Module]] | None = None,
    controls: Sequence[Pairs] | None = None,
    seeds: int | Sequence[int] | None = None,
    seed: int = 0,
    level: float | None = None,
    power: bool = True,
    parts: bool = True,
    loss: Loss = cross_entropy,
    memory: int | str | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Verdict:
    """Compare what a sweep found with its controls: the verdict on `fits.best()`, with all checks.

    The chosen method is searched again with the same settings, only at the chosen place: on each twin, on pairs in
    which there is nothing to find, and, if no effect is seen, on a planted variable. Baselines and random subspaces
    are taken from `fits`; those that are missing are fitted. `analysis/verdicts.py` says how the conclusion is drawn.

    Args:
        backbone, pairs: those of the sweep. If the sweep left out pairs that the model answers wrong, these pairs
            may still contain them.
        fits: the fits of the sweep; method, rank, training, seeds and site are taken from them.
        twins: how many randomly initialised twins (`reinitialised(model, seed)` and the next seeds), or the twins
            themselves. They are made and searched one after the other.
        searched: sweeps of twins over the whole grid, if there are any, for the p over the grid.
        partial: {kind: twins that keep a part of what was learned}, such as {"embeddings kept":
            [embeddings_kept(model, 0)]}: their effects are reported and decide nothing.
        controls: pairs in which there is nothing to find, by default `control_labels(pairs, seed)`.
        seeds: seeds of the searches, by default those of the sweep. With other seeds the model is searched again
            at the place.
        seed: seed of the first twin, of the control labels and of the planted variable.
        level: the p that is required; refused if there are too few twins. By default .05 with 19 twins or more, and
            a preliminary verdict with fewer.
        power: if no effect is seen, search for a planted variable.
        parts: if an effect is seen, try the parts of the subspace alone (`illusion`); this is reported and decides
            nothing.
        loss: the loss of the sweep.
        memory: budget of the frozen past, as in `sweep`.
        out: a folder in which each search is saved, so that the same call goes on where it ended.
        quiet: print no progress.

    Raises:
        TypeError: an argument of another type.
        ValueError: no twins, or too few for the level; the pairs, the model or the loss are not those of the fits;
            fits without IIA, or only of controls. All this before anything runs. And two twins with the same weights,
            when the second one comes.
        FileExistsError, BlockingIOError, OSError: as `sweep`, about `out`.
    """
    instance(backbone, Backbone, "backbone", "Backbone(model) makes one")
    instance(pairs, Pairs, "pairs", "a task's pairs(tokenizer), or Pairs(train=…, dev=…, test=…)")
    instance(fits, Fits, "fits", "sweep(…) gives them")
    whole_number(seed, "seed")
    number = whole_number(twins, "twins") if isinstance(twins, int) else None
    if number is not None:
        check_number(number, level)
    chosen = chosen_of(fits)
    pairs = _same_pairs(backbone, pairs, fits)
    again = Again.of(fits, chosen, seeds, loss, memory, None if out is None else Path(out), quiet)
    _expect_same_model(backbone, fits)
    controls = [control_labels(pairs, seed)] if controls is None else list(controls)

    here = again.missing(backbone, pairs, fits)
    stays, why = complement_of(backbone, pairs, chosen, again.unmatched)
    models = _reinitialised(backbone.model, number, seed) if number is not None else twins
    assert not isinstance(models, int)
    weights = model_facts(backbone.model)["weights"]
    of_twins = [
        again.at_place(model, pairs, f"twin {i + 1}") for i, model in enumerate(_different(models, weights))
    ]
    check_number(len(of_twins), level)
    kept = {
        kind: [again.at_place(model, pairs, f"{kind} {i + 1}") for i, model in enumerate(made)]
        for kind, made in (partial or {}).items()
    }
    evidence = Evidence(
        fits=fits,
        twins=of_twins,
        grid=searched,
        here=here,
        partial=kept,
        controls=[again.run(backbone, one, [chosen.method], f"control {i + 1}") for i, one in enumerate(controls)],
        stays=stays,
        training_floor=training_floor(backbone, pairs),
        left_out={} if why is None else {"complement": why},
    )
    verdict = judge(evidence, level)
    if power and verdict.conclusion == "not found":
        verdict = judge(again.with_power(evidence, backbone.model, pairs, seed), level)
    if parts and verdict.check("held-out effect").passed:
        verdict = judge(_with_parts(evidence, backbone, pairs), level)
    return verdict


def _with_parts(evidence: Evidence, backbone: Backbone, pairs: Pairs) -> Evidence:
    """The evidence with what the parts of the chosen subspace do alone, or why this was not tried."""
    try:
        return replace(evidence, illusion=illusion(backbone, pairs, evidence.chosen))
    except (TypeError, ValueError) as error:
        return replace(evidence, left_out={**evidence.left_out, "illusion": " ".join(str(error).split())})


def of_search(backbone: Backbone, pairs: Pairs, fits: Fits, twins: Sequence[Fits]) -> Verdict:
    """The verdict from a search of a model and of its twins, without another search.

    The model only runs over the pairs for the complement and for the floor of the training pairs.

    Args:
        twins: fits of twins that were searched at the same places. A twin whose search was interrupted before the
            chosen place is left out.

    Raises:
        ValueError: no twins; fits without IIA, or only of controls.
    """
    chosen = chosen_of(fits)
    there = [twin for twin in twins if len(at_cell(twin, chosen))]
    if twins and not there:
        raise ValueError(
            f"{chosen.method.label} was searched at {chosen.place} in none of {len(twins)} twins; `check` does this."
        )
    check_number(len(there), None)
    stays, why = complement_of(backbone, pairs, chosen, fits.facts.get("unmatched", "refuse"))
    evidence = Evidence(
        fits=fits,
        twins=there,
        grid=[twin for twin in there if twin.places == fits.places],
        stays=stays,
        training_floor=training_floor(backbone, pairs),
        left_out={} if why is None else {"complement": why},
    )
    return judge(evidence)


@dataclass(frozen=True)
class Again:
    """The search of the chosen method at the chosen place, to be repeated with any model and pairs.

    Attributes:
        chosen: the fit that the claim is about.
        place: its site, or {variable: site}.
        seeds, config, loss, unmatched, memory: as in the sweep.
        out: a folder for the searches; None saves nothing.
    """

    chosen: Fit
    place: Site | Mapping[str, Site]
    seeds: Sequence[int]
    config: TrainingConfig
    loss: Loss
    unmatched: Unmatched
    memory: int | str | None
    out: Path | None
    quiet: bool

    @classmethod
    def of(
        cls,
        fits: Fits,
        chosen: Fit,
        seeds: int | Sequence[int] | None,
        loss: Loss,
        memory: int | str | None,
        out: Path | None,
        quiet: bool,
    ) -> Again:
        """With the settings recorded in the fits (ValueError if the loss is another one)."""
        recorded = fits.facts.get("loss")
        if recorded is not None and recorded != getattr(loss, "__name__", type(loss).__name__):
            raise ValueError(f"The sweep's loss was {recorded!r}: give the same one as loss=….")
        asked = fits.facts.get("seeds", [chosen.seed]) if seeds is None else seeds
        sites = chosen.sites
        place: Site | Mapping[str, Site] = chosen.site if len(set(sites.values())) == 1 else sites
        return cls(
            chosen,
            place,
            list(range(asked)) if isinstance(asked, int) else list(asked),
            TrainingConfig(**fits.facts.get("training", {})),
            loss,
            fits.facts.get("unmatched", "refuse"),
            memory,
            out,
            quiet,
        )

    def run(self, backbone: Backbone, pairs: Pairs, methods: Sequence[Method], name: str) -> Fits:
        """A sweep of this one place, with the seeds and settings of the fits."""
        return sweep(
            backbone,
            pairs,
            [self.place],
            methods,
            seeds=self.seeds,
            config=self.config,
            loss=self.loss,
            min_accuracy=None,
            memory=self.memory,
            unmatched=self.unmatched,
            out=None if self.out is None else self.out / name.replace(" ", "_"),
            quiet=self.quiet,
            label=name,
        )

    def at_place(self, model: nn.Module, pairs: Pairs, name: str) -> Fits:
        """The chosen method on another model."""
        return self.run(Backbone(model), pairs, [self.chosen.method], name)

    def missing(self, backbone: Backbone, pairs: Pairs, fits: Fits) -> Fits | None:
        """Fits of the model at the place that a verdict needs and `fits` does not have; None if it has all."""
        there = {fit.method.label for fit in fits if fit.place == self.chosen.place}
        widths = {site: subspace.width for site, subspace in self.chosen.alignment.variables.values()}
        methods: list[Method] = []
        if not set(self.chosen.method.seeds(self.seeds)) <= {fit.seed for fit in at_cell(fits, self.chosen)}:
            methods.append(self.chosen.method)
        for one in (DifferenceOfMeans(), PCA(self.chosen.rank), RandomSubspace(self.chosen.rank)):
            if one.label not in there:
                with suppress(ValueError):  # variables that share a site, with subspaces of different ranks
                    one.check(self.chosen.sites, widths)
                    methods.append(one)
        return self.run(backbone, pairs, methods, "model") if methods else None

    def with_power(self, evidence: Evidence, model: nn.Module, pairs: Pairs, seed: int) -> Evidence:
        """The evidence with the search for a planted variable."""
        try:
            if not isinstance(self.place, Site):
                raise ValueError("a variable can only be planted at one site.")
            planted = plant(reinitialised(model, seed), pairs, self.place, seed)
        except ValueError as error:
            return replace(evidence, left_out={**evidence.left_out, "planted variable": str(error)})
        inside = replace(self, place=planted.site, seeds=list(self.seeds)[:1])
        return replace(evidence, planted=inside.at_place(planted.model, planted.pairs, "planted"))


def complement_of(
    backbone: Backbone, pairs: Pairs, chosen: Fit, unmatched: Unmatched = "refuse"
) -> tuple[Tensor | None, str | None]:
    """(`Evidence.stays` of a fit on the test pairs, None), or (None, why there is none)."""
    sites, test = chosen.sites, pairs.test
    if len(set(sites.values())) < len(sites):
        return None, SHARED
    if all(subspace.rank == subspace.width for _, subspace in chosen.alignment.variables.values()):
        return None, FULL
    path = chosen.method.path
    prepared = PreparedPairs.of(
        backbone, test, [sites], frozen=False, unmatched=unmatched, paths=[] if path is None else [path]
    )
    edits = {site: edit.to(backbone.device) for site, edit in chosen.alignment.edits().items()}
    (outcome,) = prepared.outcomes(sites, [edits], None, path)
    return changing(complement_stays(outcome), test.answer, test.base_answer), None


def training_floor(backbone: Backbone, pairs: Pairs) -> float | None:
    """The floor of the training pairs that are scored; None if new pairs are drawn in each step."""
    if not isinstance(pairs.train, Counterfactuals):
        return None
    some = pairs.train.rows(torch.arange(min(len(pairs.train), TRAINING_PAIRS)))
    answer = some.answer.cpu()
    without = (answers_given(backbone, some, some.base) == answer).double().mean()
    return max(float(without), int(torch.bincount(answer).max()) / len(answer))


def _reinitialised(model: nn.Module, number: int, seed: int) -> Iterator[nn.Module]:
    """Twins of one seed after the other, without the model itself: it may have been drawn from one of these seeds."""
    own = model_facts(model)["weights"]
    drawn = (reinitialised(model, of) for of in count(seed))
    return islice((twin for twin in drawn if model_facts(twin)["weights"] != own), number)


def _different(models: Iterable[nn.Module], weights: str) -> Iterator[nn.Module]:
    """The twins, one by one (ValueError for one that is the model, or comes twice: it would make p too small)."""
    seen = {weights: "the model itself"}
    for i, model in enumerate(models, 1):
        found = model_facts(model)["weights"]
        if found in seen:
            raise ValueError(
                f"Twin {i} has the weights of {seen[found]} (digest {found}): twins have to be different."
            )
        seen[found] = f"twin {i}"
        yield model


def _same_pairs(backbone: Backbone, pairs: Pairs, fits: Fits) -> Pairs:
    """The pairs that the fits were made with (ValueError if these are others)."""
    recorded: Any = fits.facts.get("data")
    if recorded is None or recorded == pairs.fingerprint():
        return pairs
    if fits.facts.get("answered") and not pairs.answered:
        with suppress(ValueError):
            answered = only_answered(backbone, pairs)
            if recorded == answered.fingerprint():
                return answered
    raise ValueError(
        f"These pairs (fingerprint {pairs.fingerprint()}) are not the pairs of the fits ({recorded}): a verdict needs "
        "the same pairs."
    )


def _expect_same_model(backbone: Backbone, fits: Fits) -> None:
    recorded = fits.facts.get("model", {}).get("weights")
    found = model_facts(backbone.model)["weights"]
    if recorded is not None and recorded != found:
        raise ValueError(
            f"This model (weights {found}) is not the model of the fits ({recorded}): a verdict needs the same model."
        )
