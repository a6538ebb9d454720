"""The decision table, line by line, on fits that are made up; and verdicts as values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import SITES, made_fit

from subspace_lab.analysis.evidence import (
    AS_WELL,
    FEWEST_CLUSTERS,
    MEMORISED,
    SMALLEST,
    STAYS,
    Evidence,
    changing,
    effect,
    twins_needed,
)
from subspace_lab.analysis.illusions import IllusionReport, Part
from subspace_lab.analysis.judging import judge
from subspace_lab.analysis.plots.verdicts import verdict_plot
from subspace_lab.analysis.verdicts import CONCLUSIONS, Verdict
from subspace_lab.core.estimates import Estimate
from subspace_lab.das.fits import Fits, Floors
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, RandomSubspace

FLOOR, N = 0.5, 400
HERE, ELSEWHERE = SITES


def score(value: float, n: int = N, half: float = 0.03) -> Estimate:
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), n)


def floors(value: float = FLOOR) -> dict[str, Floors]:
    one = Floors(score(1.0), score(value), score(value - 0.1))
    return {"dev": one, "test": one}


def fit(test: float, site: Any = HERE, method: Any = None, *, dev: float | None = None, train: float = 0.9, n: int = N,
        half: float = 0.03, seed: int = 0, rank: int = 3) -> Any:  # fmt: skip
    scores = {"dev": {"iia": score(test if dev is None else dev)}, "test": {"iia": score(test, n, half)},
              "train": {"iia": score(train)}}  # fmt: skip
    right = torch.zeros(n).index_fill(0, torch.arange(round(test * n)), 1.0)
    return made_fit(site, method or DAS(3), seed, rank=rank, scores=scores, pair_scores={"iia": right})


def of(*fits: Any, floor: float = FLOOR, **facts: Any) -> Fits:
    told = {"task": "prices", "model": {"name": "m", "class": "M"}, "pairs": {"train": 100, "dev": 50, "test": N}}
    return Fits(tuple(fits), floors(floor), facts={**told, **facts})


def twin(test: float, floor: float = FLOOR, site: Any = HERE) -> Fits:
    return of(fit(test, site), floor=floor)


def evidence(value: float = 0.9, nulls: Any = (0.5,) * 19, **changes: Any) -> Evidence:
    return Evidence(of(fit(value)), [twin(null) for null in nulls], training_floor=FLOOR, **changes)


def control(value: float, task: str = "prices: control labels") -> Fits:
    return replace(of(fit(value)), facts={"task": task})


def conclusion(found: Evidence) -> str:
    return judge(found).conclusion


# --- the table ----------------------------------------------------------------------------------------------


def test_a_claim_with_clean_controls_is_supported() -> None:
    found = judge(evidence(0.9, controls=[control(0.5)], stays=torch.ones(N)), level=0.05)
    assert found.supported and not found.preliminary and found.p == 1 / 20 and found.grid_p is None
    assert found.effect == pytest.approx(0.8) and found.interval == pytest.approx((0.74, 0.86))
    assert str(found).startswith(
        "Verdict: supported. At block_output[0]@2, DAS 3 has an IIA of 0.90 [0.87, 0.93] on 400 held-out"
    )
    assert "19 twins" in str(found) and "(p = 0.05)" in str(found) and "control labels 0.00" in str(found)


def test_the_effect_is_less_the_twins_mean_each_above_its_own_floor() -> None:
    twins = [twin(0.6), twin(0.7, floor=0.6)] + [twin(0.5)] * 17
    found = judge(replace(evidence(), twins=twins))
    assert found.check("twins").null == pytest.approx((0.2, 0.25, *[0.0] * 17))
    assert found.effect == pytest.approx(0.8 - 0.45 / 19)
    assert effect(0.75, 0.5) == 0.5 and effect(0.5, 0.5) == 0


def test_too_few_pairs_come_before_everything_else() -> None:
    ten = replace(evidence(), fits=of(fit(1.0, n=10, half=0.2)))
    assert conclusion(ten) == "underpowered" and "10 test pairs" in judge(ten).reason
    low = replace(evidence(), fits=of(fit(0.5, n=10, half=0.2, train=1.0)))
    assert conclusion(low) == "underpowered"
    # The number that a test with a normal approximation asks for: ((1.96 · ½ + .84 · √3/4) / ¼)².
    assert judge(ten).check("power").null == (29,)
    assert conclusion(replace(evidence(), fits=of(fit(1.0, n=29, half=0.06)))) == "supported"


def test_pairs_of_few_entities_are_few() -> None:
    for entities, expected in ((FEWEST_CLUSTERS - 1, "underpowered"), (FEWEST_CLUSTERS, "supported")):
        labels = {"entity": tuple(str(i % entities) for i in range(N))}
        found = judge(replace(evidence(), fits=replace(of(fit(0.9)), labels=labels)))
        assert found.conclusion == expected and ("entities" in found.check("power").because) is (
            expected != "supported"
        )


def test_equal_pairs_count_once() -> None:
    for different, expected in ((20, "underpowered"), (40, "supported")):
        labels = {"pair": tuple(str(i % different) for i in range(N))}
        assert conclusion(replace(evidence(), fits=replace(of(fit(1.0)), labels=labels))) == expected


def test_equal_pairs_count_once_where_entities_are_known_too() -> None:
    """Entities are the clusters of the interval; which pairs are equal is then told by a fact alone."""
    labels = {"entity": tuple(str(i % 50) for i in range(N))}
    for different, expected in ((20, "underpowered"), (40, "supported")):
        repeated = replace(of(fit(1.0), **{"different test pairs": different}), labels=labels)
        found = judge(replace(evidence(), fits=repeated))
        assert found.conclusion == expected and found.check("power").observed == different
        assert f"400 test pairs, {different} of them different" in found.check("power").because


def test_equal_pairs_are_not_held_against_a_fit_twice() -> None:
    """40 different pairs, ten times each: the wide interval says the same as their number."""
    labels = {"pair": tuple(str(i % 40) for i in range(N))}
    wide = fit(0.9, half=10**0.5 * 0.0295)
    worth = judge(replace(evidence(), fits=replace(of(wide), labels=labels))).check("power").observed
    assert worth == pytest.approx(40, rel=0.05)


def test_one_entity_is_one() -> None:
    labels = {"entity": ("Lily",) * N}
    because = judge(replace(evidence(), fits=replace(of(fit(0.9)), labels=labels))).check("power").because
    assert "about only 1 entity," in because and "; but" not in because


def flagged(is_flagged: bool) -> IllusionReport:
    both = Part("both", {"v": 1}, {"v": 0.5}, score(0.5))
    return IllusionReport(
        str(HERE), {"v": 3}, score(0.9), None, (both,), {"v": 0.9}, {"v": 0.9},
        {}, {}, is_flagged, "Without what never varies the IIA falls by 0.40.",
    )  # fmt: skip


def test_what_speaks_against_a_supported_claim_stands_in_its_sentence() -> None:
    found = judge(evidence(illusion=flagged(True)))
    assert found.supported and "Caution: illusion flagged: Without what never varies" in found.reason
    assert "Caution" not in judge(evidence(illusion=flagged(False))).reason
    leaking = judge(replace(evidence(), fits=of(fit(0.9), **{"test pairs in training": 12})))
    assert "Caution: 12 of the 400 test pairs are training pairs too" in leaking.reason
    assert leaking.check("overlap of the splits").passed is None
    assert "Caution" not in judge(evidence()).reason


def test_pairs_that_share_entities_are_worth_fewer() -> None:
    """An interval twice as wide as that of independent pairs is that of a quarter of them."""
    labels = {"entity": tuple(str(i % 50) for i in range(N))}
    wide = fit(0.9, half=2 * 0.0295)
    worth = judge(replace(evidence(), fits=replace(of(wide), labels=labels))).check("power").observed
    assert worth == pytest.approx(N / 4, rel=0.05)
    assert judge(replace(evidence(), fits=of(wide))).check("power").observed == N


def test_nothing_held_out_and_much_in_training_is_memorised() -> None:
    assert conclusion(replace(evidence(), fits=of(fit(0.5, train=0.8)))) == "memorised"
    little = FLOOR + (1 - FLOOR) * MEMORISED - 0.01
    assert conclusion(replace(evidence(), fits=of(fit(0.5, train=little)))) == "not found"
    # What the training pairs reach counts above their own floor.
    assert conclusion(replace(evidence(), fits=of(fit(0.5, train=0.8)), training_floor=0.79)) == "not found"
    assert conclusion(replace(evidence(), fits=of(fit(0.9, train=1.0)))) == "supported"


def test_nothing_seen_depends_on_whether_a_planted_variable_is() -> None:
    nothing = replace(evidence(), fits=of(fit(0.5, train=0.5)))
    assert conclusion(nothing) == "not found"
    assert conclusion(replace(nothing, planted=of(fit(0.9)))) == "not found"
    for planted in (of(fit(0.7)), of()):
        found = judge(replace(nothing, planted=planted))
        assert found.conclusion == "underpowered" and "planted variable" in found.reason
    assert conclusion(replace(nothing, fits=of(fit(0.5, train=0.9)), planted=of(fit(0.6)))) == "memorised"


def test_a_small_effect_is_none() -> None:
    for value, expected in (
        (FLOOR + SMALLEST / 2 - 0.01, "not found"),
        (FLOOR + SMALLEST / 2 + 0.01, "supported"),
    ):
        assert conclusion(replace(evidence(), fits=of(fit(value, half=0.01, train=0.5)))) == expected
    assert conclusion(replace(evidence(), fits=of(fit(0.6, half=0.11, train=0.5)))) == "not found"


def test_twins_that_do_as_well_make_it_expressive() -> None:
    assert conclusion(evidence(0.9, (0.5,) * 18 + (0.9,))) == "expressive"  # one of 19: p = .1
    found = judge(evidence(0.9, (0.5,) * 18 + (0.89,)))
    assert found.supported and found.p == 0.05
    assert judge(evidence(0.9, (0.95,) * 19)).p == 1.0
    assert conclusion(evidence(0.9, (0.88,) * 19)) == "expressive"  # above all of them, and its interval is not
    half = FLOOR + (1 - FLOOR) * 0.8 * AS_WELL
    assert conclusion(evidence(0.9, (half + 0.01,) * 19)) == "expressive"
    assert conclusion(evidence(0.9, (half - 0.01,) * 19)) == "supported"


def test_few_twins_have_to_stay_below_the_interval() -> None:
    found = judge(evidence(0.9, (0.69,)))
    assert found.conclusion == "supported" and found.preliminary and found.p == 0.5
    assert conclusion(evidence(0.9, (0.86, 0.5, 0.5))) == "supported"
    assert str(found).startswith("Verdict: supported (preliminary). ")
    assert conclusion(evidence(0.9, (0.71,))) == "expressive"
    assert conclusion(evidence(0.9, (0.5, 0.5, 0.88))) == "expressive"


def test_arbitrary_labels_that_do_as_well_make_it_expressive() -> None:
    half = FLOOR + (1 - FLOOR) * 0.8 * AS_WELL
    assert conclusion(evidence(controls=[control(half + 0.01)])) == "expressive"
    assert conclusion(evidence(controls=[control(half - 0.01)])) == "supported"
    several = evidence(controls=[control(0.5), control(0.9, "prices: shuffled answers")])
    assert conclusion(several) == "expressive" and "shuffled answers" in judge(several).reason
    assert conclusion(evidence(controls=[of()])) == "supported"  # the search found nothing on these pairs


def test_random_subspaces_that_do_as_well_make_it_non_specific() -> None:
    def with_random(value: float, rank: int = 3) -> Evidence:
        drawn = [fit(value, method=RandomSubspace(rank), seed=seed, rank=rank) for seed in range(2)]
        return replace(evidence(), fits=of(fit(0.9), *drawn))

    assert conclusion(with_random(0.9)) == "non-specific" and conclusion(with_random(0.5)) == "supported"
    assert conclusion(with_random(0.9, rank=8)) == "supported"  # of another rank they say nothing


def test_an_answer_that_the_complement_changes_too_is_non_specific() -> None:
    stays = torch.zeros(N).index_fill(0, torch.arange(int(N * STAYS)), 1.0)
    assert conclusion(evidence(stays=stays)) == "supported"
    stays[0] = 0
    assert conclusion(evidence(stays=stays)) == "non-specific"
    assert conclusion(evidence(stays=torch.full((N,), torch.nan))) == "supported"  # no pair changes
    assert conclusion(evidence(left_out={"complement": "it has none"})) == "supported"


def test_only_pairs_that_change_tell_of_the_complement() -> None:
    stays = changing(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]))
    assert stays.isnan().tolist() == [True, False, False] and stays[1:].tolist() == [0, 1]


def test_the_order_of_the_table() -> None:
    """Everything speaks against the claim: each conclusion hides those below it."""
    random = fit(0.9, method=RandomSubspace(3))
    all_wrong = Evidence(
        of(fit(0.9, n=10, half=0.2), random), [twin(0.95)] * 19, controls=[control(0.9)], stays=torch.zeros(10),
        training_floor=FLOOR,
    )  # fmt: skip
    assert conclusion(all_wrong) == "underpowered"
    enough = replace(all_wrong, fits=of(fit(0.9), random), stays=torch.zeros(N))
    assert conclusion(replace(enough, fits=of(fit(0.5), random))) == "memorised"
    assert conclusion(enough) == "expressive"
    assert conclusion(replace(enough, twins=[twin(0.5)] * 19)) == "expressive"
    assert conclusion(replace(enough, twins=[twin(0.5)] * 19, controls=[])) == "non-specific"


# --- what is told and decides nothing -----------------------------------------------------------------------


def test_baselines_seeds_selection_grid_and_partial_twins_are_told() -> None:
    seeds = [fit(value, seed=i, dev=dev) for i, (value, dev) in enumerate([(0.9, 0.95), (0.7, 0.7)])]
    baselines = [fit(0.95, method=DifferenceOfMeans(), dev=0.8), fit(0.5, method=PCA(3))]
    grid = [of(fit(0.5), fit(0.99, ELSEWHERE))] * 18 + [of(fit(0.5), fit(0.6, ELSEWHERE, dev=0.99))]
    found = judge(
        replace(evidence(), fits=of(*seeds, *baselines), grid=grid, partial={"embeddings kept": [twin(0.99)]})
    )
    assert found.supported and found.claim.iia.value == 0.9
    assert found.check("baselines").because.startswith("worse than DifferenceOfMeans")
    assert found.check("seeds").null == (0.9, 0.7) and found.check("selection").null == (0.95,)
    assert found.grid_p == 19 / 20 and found.check("twins over the grid").passed is None
    assert found.check("twins, embeddings kept").null == pytest.approx((0.98,))
    assert "block_output[0]@2" in found.claim.place and found.claim.pairs == {"train": 100, "test": N}


def test_a_control_at_its_floor_has_no_sign() -> None:
    random = [fit(value, method=RandomSubspace(3, draws=2), seed=i) for i, value in enumerate((0.5, 0.498))]
    assert "random subspaces 0.00." in judge(replace(evidence(), fits=of(fit(0.9), *random))).reason


def test_a_subspace_may_carry_what_the_whole_state_carries() -> None:
    for value, whole, said in (
        (0.9, 0.6, "better than exchanging"),
        (0.7, 0.7, "no better"),
        (0.7, 0.8, "no better"),
    ):
        fits = of(fit(value), fit(0.99, ELSEWHERE, FullVector()), fit(whole, method=FullVector()))
        found = judge(replace(evidence(), fits=fits))
        one = found.check("whole state")
        assert one.because.startswith(said) and one.null == (whole,) and one.passed is None and found.supported
        assert f"difference {value - whole:+.2f}" in one.because and ("answer" in one.because) == (value <= whole)
    only_elsewhere = of(fit(0.9), fit(0.99, ELSEWHERE, FullVector()))
    with pytest.raises(KeyError):
        judge(replace(evidence(), fits=only_elsewhere)).check("whole state")


def test_a_twin_is_represented_by_the_seed_that_its_dev_pairs_choose() -> None:
    both = of(fit(0.6, seed=0, dev=0.9), fit(0.99, seed=1, dev=0.5))
    assert judge(replace(evidence(), twins=[both] * 19)).check("twins").null == pytest.approx((0.2,) * 19)


def test_twins_without_the_chosen_cell_are_left_out() -> None:
    found = judge(replace(evidence(), twins=[twin(0.5)] * 3 + [twin(0.99, site=ELSEWHERE)]))
    assert found.preliminary and len(found.check("twins").null) == 3


# --- what is refused ----------------------------------------------------------------------------------------


def test_twins_are_counted_before_a_p_is_promised() -> None:
    assert twins_needed(0.05) == 19 and twins_needed(0.01) == 99 and twins_needed(1 / 3) == 2
    for number in (1, 18):
        with pytest.raises(
            ValueError, match=rf"p ≤ 0\.05 was asked for, with {number} twins.*19 twins are needed"
        ):
            judge(evidence(nulls=(0.5,) * number), level=0.05)
    assert judge(evidence(nulls=(0.5,) * 9), level=0.1).preliminary is False
    with pytest.raises(ValueError, match="Without twins no verdict"):
        judge(evidence(nulls=()))
    with pytest.raises(ValueError, match="level=0"):
        judge(evidence(), level=0)


def test_fits_of_which_no_verdict_can_be_given() -> None:
    odds = made_fit(HERE, scores={"dev": {"log_odds": score(2.0)}, "test": {"log_odds": score(2.0)}})
    for fits, why in (
        (of(), "no fits"),
        (of(odds), "log_odds"),
        (of(fit(0.9, method=FullVector())), "Only controls"),
        (of(fit(1.0), floor=1.0), "floor of the test pairs is 1"),
    ):
        with pytest.raises(ValueError, match=why):
            judge(replace(evidence(), fits=fits))


# --- a verdict as a value -----------------------------------------------------------------------------------


def test_a_verdict_is_read_again_as_it_was(tmp_path: Path) -> None:
    found = judge(evidence(controls=[control(0.5)], stays=torch.ones(N)))
    found.save(tmp_path / "verdict.json")
    assert Verdict.load(tmp_path / "verdict.json") == found
    told = json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"))
    assert told["conclusion"] == "supported" and Verdict.from_dict(found.as_dict()) == found
    broken: Any
    for broken in ({**told, "conclusion": "great"}, {**told, "format": 9}, {"format": 1}, {**told, "more": 1}, []):
        (tmp_path / "broken.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ValueError, match="cannot be read as a verdict"):
            Verdict.load(tmp_path / "broken.json")


def test_a_verdict_shows_itself() -> None:
    found = judge(evidence(0.9, (0.5,) * 18 + (0.9,)))
    lines = repr(found).splitlines()
    assert lines[0] == str(found) and len(lines) == 1 + len(found.checks)
    assert any(line.startswith("  failed  twins: ") for line in lines)
    assert "<b>Verdict: expressive." in found._repr_html_() and found._repr_html_().count("<tr>") == len(
        found.checks
    )
    with pytest.raises(KeyError, match="No check 'luck'"):
        found.check("luck")
    assert {"supported", "not found"} < set(CONCLUSIONS)


def test_the_picture_has_a_point_for_each_twin(tmp_path: Path) -> None:
    nulls = tuple(0.5 + 0.01 * i for i in range(19))
    found = judge(evidence(0.9, nulls, controls=[control(0.5)]))
    figure: Any = verdict_plot(found, tmp_path / "verdict.png")
    for verdict, title in (
        (found, "Verdict: supported"),
        (judge(evidence(0.9, nulls[:2])), "Verdict: supported (preliminary)"),
    ):
        shown = verdict_plot(verdict, tmp_path / "title.png")
        assert title in [text.get_text() for text in shown.texts] and str(verdict).startswith(f"{title}. ")
    points = [tuple(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(x for (x,) in points) == pytest.approx(sorted([*(effect(null, FLOOR) for null in nulls), 0.0]))
    assert (tmp_path / "verdict.png").read_bytes().startswith(b"\x89PNG")
    own = figure.axes[0].figure.add_subplot()
    assert verdict_plot(found, ax=own) is figure and own.lines
