"""The checks of a claim, each a plain function of fits.

Nothing is trained here. `analysis/checking.py` makes the fits, `analysis/judging.py` draws the conclusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean

import torch
from torch import Tensor

from subspace_lab.analysis.illusions import IllusionReport
from subspace_lab.analysis.verdicts import Check
from subspace_lab.core.estimates import Clusters, Estimate, estimate, proportion
from subspace_lab.core.texts import counted
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import PCA, DifferenceOfMeans, FullVector, RandomSubspace

METRIC = "iia"
LEVEL = 0.05  # the level of p; the intervals have the confidence 1 − LEVEL
POWER = 0.8  # the usual choice (Cohen 1988): four out of five effects of this size are seen
# A subspace that holds the whole variable has an effect near 1. An effect of half of that must not be missed.
HALF = 0.5
# Five entities are all on one side of the floor by luck in 2 of 2⁵ cases, which is .06: six are needed.
FEWEST_CLUSTERS = 6
SMALLEST = 0.1  # the smallest effect for a claim; below it, nine of ten pairs that could change do not change
# A null that reaches half of the effect explains at least half of it.
AS_WELL = 0.5
# Searches that memorised 200 pairs had training effects of .2 and more, and held-out effects of 0.
MEMORISED = 0.2
# The answer has to stay in this share of the pairs whose answer the variable changes, while everything but the
# subspace is exchanged. Below it, the rest of the state carries the answer more often than not.
STAYS = 0.5


@dataclass(frozen=True)
class Evidence:
    """The fits that a verdict is made of.

    Attributes:
        fits: the fits of the model, over all sites.
        twins: the fits of each twin, at least of the chosen method at the chosen place with the same seeds.
        grid: the fits of twins that were searched at all sites of the model; they may also be among `twins`.
        here: fits of the model at the chosen place that `fits` does not have: random subspaces, baselines, more seeds.
        partial: {kind: fits of twins that keep a part of what was learned}.
        controls: fits of the model on pairs in which there is nothing to find; their task names the kind.
        planted: fits of a planted variable; None if none was searched for.
        stays: (test pairs,) complement_stays of the chosen fit, NaN where the answer does not change; None if the
            complement cannot be exchanged.
        training_floor: the floor of the training pairs; None if new pairs are drawn in each step.
        illusion: what the parts of the chosen subspace do alone; None if this was not tried.
        left_out: {check: why it was not done}.
    """

    fits: Fits
    twins: Sequence[Fits]
    grid: Sequence[Fits] = ()
    here: Fits | None = None
    partial: Mapping[str, Sequence[Fits]] = field(default_factory=dict)
    controls: Sequence[Fits] = ()
    planted: Fits | None = None
    stays: Tensor | None = None
    training_floor: float | None = None
    illusion: IllusionReport | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> Fit:
        return chosen_of(self.fits)


def chosen_of(fits: Fits) -> Fit:
    """The fit that the claim is about (ValueError if there is none, or if it has no IIA)."""
    if not fits or METRIC not in fits[0].scores.get("test", {}):
        there = list(fits[0].scores.get("test", {})) if fits else "no fits"
        raise ValueError(f"A verdict needs the metric {METRIC!r}; found: {there}. Sweep with metrics=(iia, …).")
    chosen = fits.best(METRIC)
    if chosen.method.control:
        raise ValueError(
            f"Only controls were searched ({', '.join(fits.methods)}); a verdict needs a method that is not a control."
        )
    if fits.floors["test"].highest >= 1:
        raise ValueError("The floor of the test pairs is 1: nothing can be above it, so nothing can be claimed.")
    return chosen


def twins_needed(level: float = LEVEL) -> int:
    """How many twins a p of this level needs."""
    return math.ceil(round(1 / level, 9)) - 1


def at_cell(fits: Fits, chosen: Fit) -> Fits:
    """All seeds of the chosen method at the chosen place; possibly none."""
    same = [fit for fit in fits if fit.place == chosen.place and fit.method.label == chosen.method.label]
    return Fits(tuple(same), fits.floors, facts=fits.facts, labels=fits.labels)


def effect(value: float, floor: float) -> float:
    """(value − floor) / (1 − floor): 0 at the floor, 1 if every pair has the answer of the causal model."""
    return (value - floor) / (1 - floor)


def check_number(twins: int, level: float | None) -> None:
    """ValueError if there are no twins, or fewer than a p of this level needs."""
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level={level!r}: needed is a p between 0 and 1, such as {LEVEL}.")
    if level is not None and twins < twins_needed(level):
        raise ValueError(
            f"p ≤ {level:g} was asked for, with {twins} twins: their lowest possible p is {1 / (twins + 1):.2g}, and "
            f"{twins_needed(level)} twins are needed. Without level=… the verdict is preliminary."
        )
    if not twins:
        raise ValueError("Without twins no verdict can be given: it is unknown what an untrained model gives.")


# --- the checks -------------------------------------------------------------------------------------------


def power(chosen: Fit, fits: Fits) -> Check:
    """Whether an effect of half of what is possible could be distinguished from the floor."""
    floor, n = fits.floors["test"].highest, chosen.iia.n
    # A repeated pair adds nothing, whatever else is known of the pairs.
    different = min(n, fits.facts.get("different test pairs", len(set(fits.labels.get("pair", range(n))))))
    wanted, z = floor + HALF * (1 - floor), NormalDist().inv_cdf
    spread = z(1 - LEVEL / 2) * math.sqrt(floor * (1 - floor)) + z(POWER) * math.sqrt(wanted * (1 - wanted))
    needed = math.ceil((spread / (wanted - floor)) ** 2)
    clusters = Clusters.of(fits.labels)
    worth = min(different, n / _design_effect(chosen, clusters))
    enough = worth >= needed
    repeated = f", {different} of them different," if different < n else ""
    because = f"{n} test pairs{repeated} count as {worth:.0f} independent ones; an effect of {HALF} needs {needed}"
    entities = len(set(fits.labels.get("entity", ())))
    if 0 < entities < FEWEST_CLUSTERS:
        enough = False
        because += (
            f"; they are about only {counted(entities, 'entity', 'entities')}, and {FEWEST_CLUSTERS} are needed"
        )
    return Check("power", worth, (float(needed),), None, enough, because)


def _design_effect(chosen: Fit, clusters: Clusters | None) -> float:
    """How many pairs that share an entity count as one independent pair, from the width of the IIA's interval."""
    values = chosen.pair_scores.get(METRIC)
    if clusters is None or values is None or len(values.unique()) < 2:
        return 1.0
    alone = proportion(values.bool())
    return max(1.0, ((chosen.iia.high - chosen.iia.low) / (alone.high - alone.low)) ** 2)


def held_out(chosen: Fit, floor: float) -> Check:
    found, iia = effect(chosen.iia.value, floor), chosen.iia
    passed = iia.low > floor and found >= SMALLEST
    because = f"IIA {iia} on {iia.n} held-out pairs, floor {floor:.2f}"
    if iia.low > floor and not passed:
        because += f"; an effect of {found:.2f} is less than {SMALLEST}"
    return Check("held-out effect", iia.value, (floor,), None, passed, because)


def training(chosen: Fit, floor: float | None, seen: Check) -> Check | None:
    """Whether the training pairs were memorised: they have an effect, and the held-out pairs have none."""
    if floor is None or floor >= 1 or METRIC not in chosen.scores.get("train", {}):
        return None
    iia = chosen.score(METRIC, "train")
    learned = iia.low > floor and effect(iia.value, floor) >= MEMORISED
    because = f"IIA {iia} on the training pairs, floor {floor:.2f}; IIA {chosen.iia} on the held-out pairs"
    return Check("training", iia.value, (floor,), None, bool(seen.passed) or not learned, because)


def memorisable(fits: Fits) -> Check | None:
    """How many test pairs are training pairs too; None if none is."""
    seen, n = fits.facts.get("test pairs in training", 0), fits.facts.get("pairs", {}).get("test")
    if not seen:
        return None
    because = f"{seen} of the {n} test pairs are training pairs too, so their score can be memorised"
    return Check("overlap of the splits", float(seen), (0.0,), None, None, because)


def selection(chosen: Fit) -> Check:
    dev = chosen.score(METRIC, "dev")
    because = f"IIA {dev} on the dev pairs, which chose the site; {chosen.iia} on the test pairs, which did not"
    return Check("selection", chosen.iia.value, (dev.value,), None, None, because)


def seeds(evidence: Evidence) -> Check | None:
    values = [fit.iia.value for fit in seeds_of(evidence)]
    if len(values) < 2:
        return Check("seeds", None, tuple(values), None, None, "only one seed: the spread over seeds is not known")
    because = f"IIA of {len(values)} seeds: {min(values):.2f} to {max(values):.2f}, mean {fmean(values):.2f}"
    return Check("seeds", evidence.chosen.iia.value, tuple(values), None, None, because)


def seeds_of(evidence: Evidence) -> Sequence[Fit]:
    here = at_cell(evidence.here, evidence.chosen) if evidence.here is not None else ()
    return here if len(here) else at_cell(evidence.fits, evidence.chosen)


def _best(fits: Fits) -> Fit | None:
    """The fit with the highest score on the dev pairs; None if there are no fits."""
    return max(fits, key=lambda fit: fit.score(METRIC, "dev").value, default=None)


def effect_of_best(fits: Fits, chosen: Fit) -> float | None:
    """The test effect of the chosen method at the chosen place in another search; None if it has no such fit."""
    best = _best(at_cell(fits, chosen))
    floor = fits.floors["test"].highest
    if best is None:
        return None
    return effect(best.iia.value, floor) if floor < 1 else 0.0


def twins(
    chosen: Fit, floor: float, observed: float, nulls: Sequence[float], level: float, preliminary: bool
) -> Check:
    n, most = len(nulls), max(nulls)
    p = (1 + sum(null >= observed for null in nulls)) / (n + 1)
    low = effect(chosen.iia.low, floor)
    # With few twins p cannot be small, so the whole interval has to be above all of them; with many, above their mean.
    passed = low > most if preliminary else p <= level and low > fmean(nulls)
    passed = passed and fmean(nulls) < AS_WELL * observed
    reach = (
        f"{n} twins have effects of at most {most:.2f}, mean {fmean(nulls):.2f}"
        if n > 1
        else (f"one twin has an effect of {most:.2f}")
    )
    because = (
        f"{reach}; the model has {observed:.2f} [{low:.2f}, {effect(chosen.iia.high, floor):.2f}]; p = {p:.2g}"
    )
    return Check("twins", observed, tuple(nulls), p, passed, because)


def grid(evidence: Evidence, observed: float) -> Check | None:
    """Each twin at the site that its own dev pairs choose, with the chosen method."""
    label = evidence.chosen.method.label
    nulls = []
    for twin in evidence.grid:
        own = Fits(tuple(fit for fit in twin if fit.method.label == label), twin.floors)
        if len(own):
            best, floor = own.best(METRIC), twin.floors["test"].highest
            nulls.append(effect(best.iia.value, floor) if floor < 1 else 0.0)
    if not nulls:
        return None
    p = (1 + sum(null >= observed for null in nulls)) / (len(nulls) + 1)
    who = "one twin" if len(nulls) == 1 else f"{len(nulls)} twins, each"
    because = f"{who} at its own best site: effect at most {max(nulls):.2f}; p = {p:.2g}"
    return Check("twins over the grid", observed, tuple(nulls), p, None, because)


def partial_twins(kind: str, twins: Sequence[Fits], chosen: Fit) -> Check:
    found = [one for one in (effect_of_best(twin, chosen) for twin in twins) if one is not None]
    listed = f"{', '.join(f'{one:.2f}' for one in found[:6])}{' …' if len(found) > 6 else ''}" if found else "none"
    return Check(f"twins, {kind}", None, tuple(found), None, None, f"effects of twins with {kind}: {listed}")


def control(control: Fits, chosen: Fit, observed: float) -> Check:
    """Pairs in which there is nothing to find: their effect must be at the floor, or well below the claim's."""
    task = str(control.facts.get("task", "")).rpartition(": ")[2] or "pairs"
    best, floor = _best(at_cell(control, chosen)), control.floors["test"].highest
    name = f"control: {task}"
    if best is None or floor >= 1:
        return Check(name, None, (), None, True, "the search found nothing on these pairs")
    found = effect(best.iia.value, floor)
    as_well = best.iia.low > floor and found >= AS_WELL * observed
    because = f"IIA {best.iia}, floor {floor:.2f}, on pairs in which there is nothing to find"
    if best.iia.low > floor:
        because += f"; an effect of {found:.2f}, the claim has {observed:.2f}"
    return Check(name, observed, (found,), None, not as_well, because)


def random_subspaces(evidence: Evidence, observed: float, floor: float, seen: Check) -> Check | None:
    chosen = evidence.chosen
    for fits in (evidence.here, evidence.fits):
        drawn = [
            fit.iia.value
            for fit in fits or ()
            if isinstance(fit.method, RandomSubspace) and fit.place == chosen.place and fit.rank == chosen.rank
        ]
        if drawn:
            nulls = tuple(effect(value, floor) for value in drawn)
            mean = fmean(drawn)
            because = f"IIA of {len(drawn)} draws of rank {chosen.rank}: mean {mean:.2f}, highest {max(drawn):.2f}"
            passed = fmean(nulls) < AS_WELL * observed if seen.passed else None
            return Check("random subspaces", observed, nulls, None, passed, because)
    return None


def complement(stays: Tensor | None, fits: Fits, seen: Check) -> Check | None:
    """How often the answer stays when only the complement is exchanged, in pairs where the variable changes it."""
    if stays is None or bool(stays.isnan().all()):
        return None
    found = estimate(stays, Clusters.of(fits.labels))
    because = (
        f"when only the complement is exchanged, {found} of {found.n} pairs that could change keep their answer"
    )
    return Check("complement", found.value, (STAYS,), None, found.value >= STAYS if seen.passed else None, because)


def baselines(evidence: Evidence) -> Check | None:
    """The difference from the best baseline (difference of means, principal components), pair by pair."""
    chosen = evidence.chosen
    found: list[Fit] = []
    for fits in (evidence.here, evidence.fits):
        found += [
            fit
            for fit in fits or ()
            if isinstance(fit.method, DifferenceOfMeans | PCA) and fit.place == chosen.place
        ]
    found = [fit for fit in found if fit.method.label != chosen.method.label]
    if not found or METRIC not in chosen.pair_scores:
        return None
    best = max(found, key=lambda fit: fit.score(METRIC, "dev").value)
    difference = _difference(chosen, best, evidence.fits)
    word = "better than" if difference.low > 0 else "worse than" if difference.high < 0 else "no better than"
    because = f"{word} {best.method.label}, the best baseline (IIA {best.iia}): {_in_words(difference)}"
    nulls = tuple(fit.iia.value for fit in found)
    return Check("baselines", chosen.iia.value, nulls, None, None, because)


def _difference(chosen: Fit, other: Fit, fits: Fits) -> Estimate:
    """The chosen fit's IIA less the other's, paired over the test pairs."""
    mine, theirs = (fit.pair_scores[METRIC].double() for fit in (chosen, other))
    return estimate(mine - theirs, Clusters.of(fits.labels))


def _in_words(difference: Estimate) -> str:
    return f"difference {difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def whole_state(fits: Fits, chosen: Fit) -> Check | None:
    """The difference from exchanging the whole state, pair by pair.

    The whole state carries every other variable too, and the answer where it is already there. So it fails in pairs
    that tell the variable from the answer; a subspace that does no better on these pairs may carry the answer.
    """
    there = [fit for fit in fits if isinstance(fit.method, FullVector) and fit.place == chosen.place]
    if not there or METRIC not in chosen.pair_scores or isinstance(chosen.method, FullVector):
        return None
    whole = there[0]
    difference = _difference(chosen, whole, fits)
    because = f"better than exchanging the whole state (IIA {whole.iia}): {_in_words(difference)}"
    if difference.low <= 0:
        because = (
            f"no {because}; so these pairs do not show whether the subspace carries this variable, or all that is "
            "there, such as the answer"
        )
    return Check("whole state", chosen.iia.value, (whole.iia.value,), None, None, because)


def illusion(report: IllusionReport | None) -> Check | None:
    """Whether the subspace reads and writes what the model does. It decides nothing: the site can still be right."""
    if report is None:
        return None
    both = report.part("both")
    advice = "; `purify` keeps only this part" if report.flagged else ""
    because = f"{report.because.rstrip('.')}; the part that varies and is read has IIA {both.iia} alone{advice}"
    said = "flagged: " if report.flagged else ""
    return Check("illusion", min(report.sensed.values()), (), None, None, said + because)


def planted_variable(planted: Fits | None) -> Check | None:
    if planted is None:
        return None
    best, floor = _best(planted), planted.floors["test"].highest
    if best is None or floor >= 1:
        return Check("planted variable", None, (), None, False, "the search for a planted variable found nothing")
    found = effect(best.iia.value, floor)
    passed = best.iia.low > floor and found >= HALF
    because = f"the same search for a planted variable reaches IIA {best.iia}, floor {floor:.2f}"
    return Check("planted variable", found, (HALF,), None, passed, because)


def changing(stays: Tensor, answer: Tensor, base_answer: Tensor) -> Tensor:
    """`stays` for the pairs whose answer the variable changes, NaN for the others."""
    return stays.float().where(answer.cpu() != base_answer.cpu(), torch.nan)
