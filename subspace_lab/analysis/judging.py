"""From the checks of a claim to its verdict: the decision table of `analysis/verdicts.py`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from subspace_lab.analysis import evidence as of
from subspace_lab.analysis.evidence import LEVEL, Evidence, effect
from subspace_lab.analysis.verdicts import Check, Claim, Verdict
from subspace_lab.core.texts import two_decimals
from subspace_lab.das.fits import Fits


def judge(evidence: Evidence, level: float | None = None) -> Verdict:
    """The verdict of some evidence.

    Args:
        level: the p that is required. By default .05 if there are enough twins; otherwise the verdict is
            preliminary.

    Raises:
        ValueError: there are no twins or too few for the level, the fits have no IIA, or they allow no claim.
    """
    chosen, fits = evidence.chosen, evidence.fits
    floor = fits.floors["test"].highest
    nulls = [of.effect_of_best(twin, chosen) for twin in evidence.twins]
    of_twins = [one for one in nulls if one is not None]
    of.check_number(len(of_twins), level)
    preliminary = len(of_twins) < of.twins_needed(LEVEL if level is None else level)
    observed = effect(chosen.iia.value, floor)
    ranked = of.effect_of_best(Fits(tuple(of.seeds_of(evidence)), fits.floors), chosen)
    assert ranked is not None
    mean = fmean(of_twins)
    power, seen = of.power(chosen, fits), of.held_out(chosen, floor)
    twins = of.twins(chosen, floor, ranked, of_twins, LEVEL if level is None else level, preliminary)
    grid = of.grid(evidence, observed)
    training = of.training(chosen, evidence.training_floor, seen)
    planted = of.planted_variable(evidence.planted)
    controls = [of.control(one, chosen, observed) for one in evidence.controls]
    random = of.random_subspaces(evidence, observed, floor, seen)
    complement = of.complement(evidence.stays, fits, seen)
    partial = [of.partial_twins(kind, kept, chosen) for kind, kept in evidence.partial.items()]
    made = [power, seen, training, planted, twins, grid, *partial, *controls, random, complement]
    made += [
        of.memorisable(fits),
        of.illusion(evidence.illusion),
        of.baselines(evidence),
        of.whole_state(fits, chosen),
        of.selection(chosen),
        of.seeds(evidence),
    ]
    checks = [one for one in made if one is not None]
    checks += [Check(name, None, (), None, None, f"not done: {why}") for name, why in evidence.left_out.items()]
    conclusion = _conclude(
        power=power,
        seen=seen,
        training=training,
        planted=planted,
        nulls=[twins, *controls],
        specific=[random, complement],
    )
    low, high = (effect(value, floor) - mean for value in (chosen.iia.low, chosen.iia.high))
    model = fits.facts.get("model", {})
    claim = Claim(
        variable=", ".join(chosen.alignment.variables),
        place=chosen.place,
        method=chosen.method.label,
        iia=chosen.iia,
        floor=floor,
        pairs={name: fits.facts.get("pairs", {}).get(name) for name in ("train", "test")},
        model=model.get("name") or model.get("class"),
        task=fits.facts.get("task", ""),
    )
    assert twins.p is not None
    return Verdict(
        claim=claim,
        checks=tuple(checks),
        conclusion=conclusion,
        reason=_reason(conclusion, claim, checks, twins) + _cautions(conclusion, evidence, checks),
        effect=observed - mean,
        interval=(low, high),
        p=twins.p,
        grid_p=None if grid is None else grid.p,
        preliminary=preliminary,
    )


# --- the decision -------------------------------------------------------------------------------------------


def _conclude(
    *,
    power: Check,
    seen: Check,
    training: Check | None,
    planted: Check | None,
    nulls: Sequence[Check],
    specific: Sequence[Check | None],
) -> str:
    """The table of `analysis/verdicts.py`, line by line."""
    if not power.passed:
        return "underpowered"
    if not seen.passed:
        if training is not None and training.passed is False:
            return "memorised"
        return "underpowered" if planted is not None and not planted.passed else "not found"
    if not all(one.passed for one in nulls):
        return "expressive"
    if any(one is not None and one.passed is False for one in specific):
        return "non-specific"
    return "supported"


# --- in words -----------------------------------------------------------------------------------------------


def _reason(conclusion: str, claim: Claim, checks: Sequence[Check], twins: Check) -> str:
    by_name = {one.name: one for one in checks}
    found = (
        f"At {claim.place}, {claim.method} has an IIA of {claim.iia} on {claim.iia.n} held-out pairs; the floor is "
        f"{claim.floor:.2f}."
    )

    def failed(*starts: str) -> str:
        against = [one for one in checks if one.passed is False and one.name.startswith(starts)]
        return "; ".join(f"{one.name}: {one.because}" for one in against)

    if conclusion == "memorised":
        return f"{found} The fit memorised its training pairs: {by_name['training'].because}."
    if conclusion == "expressive":
        return f"{found} But the same search also works where there is nothing to find ({failed('twins', 'control')})."
    if conclusion == "non-specific":
        return f"{found} But the effect is not specific to this subspace ({failed('random', 'complement')})."
    if conclusion == "underpowered":
        return f"{found} This does not allow a conclusion ({failed('power', 'planted')})."
    if conclusion == "not found":
        would = by_name.get("planted variable", by_name["power"])
        return f"{found} No effect was found, but one could have been found ({would.name}: {would.because})."
    return f"{found} {_compared(checks, twins)}"


def _cautions(conclusion: str, evidence: Evidence, checks: Sequence[Check]) -> str:
    """What decides nothing, but has to be known with the conclusion."""
    said = [one.because for one in checks if one.name == "overlap of the splits"]
    if conclusion == "supported" and evidence.illusion is not None and evidence.illusion.flagged:
        said += [f"illusion {one.because}" for one in checks if one.name == "illusion"]
    return "".join(f" Caution: {one}." for one in said)


def _compared(checks: Sequence[Check], twins: Check) -> str:
    """The effect of a supported claim beside the effects of its twins and controls, in short."""
    n, most = len(twins.null), max(twins.null)
    who = (
        f"{n} twins reach at most {two_decimals(most)} (p = {twins.p:.2g})"
        if n > 1
        else f"a twin reaches {two_decimals(most)}"
    )
    others = []
    for one in checks:
        if one.name.startswith("control") and one.null:
            others.append(f"{one.name.partition(': ')[2]} {two_decimals(one.null[0])}")
        elif one.name == "random subspaces":
            others.append(f"random subspaces {two_decimals(fmean(one.null))}")
    beside = f", {', '.join(others)}" if others else ""
    return f"The effect is {twins.observed:.2f} (0: the floor, 1: the causal model); {who}{beside}."
