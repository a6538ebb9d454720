"""The sweep: numbers that a plain torch hook confirms, cells that do not depend on each other, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_sweeps import (
    ANSWERS,
    LETTERS,
    PAIRS,
    QUICK,
    SITES,
    WIDTH,
    counterfactuals,
    failing_stream,
    ids_of,
    logits_by_hook,
    overlap_of,
    pairs,
    states_by_hook,
    swapped,
    swept,
    tiny,
    unedited,
)
from torch import Tensor, nn

from subspace_lab.core.estimates import bootstrap_mean, estimate, proportion
from subspace_lab.core.interventions import interchange
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das import _places
from subspace_lab.das._places import cell_seed
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import iia, log_odds, logit_difference, logit_margin
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import fit as fit_together
from subspace_lab.das.search import default_methods, search
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.training import TrainingConfig, train

METHODS: list[Method] = [DAS(4), DifferenceOfMeans(), PCA(3), RandomSubspace(4, draws=2), FullVector()]
ONE_STEP = TrainingConfig(steps=1, batch_size=4, learning_rate=1e-9)


@pytest.fixture(scope="module")
def fits() -> Fits:
    return swept(METHODS, metrics=(iia, logit_margin, log_odds))


def rows_of(fits: Iterable[Fit]) -> list[Tensor]:
    return [subspace.basis() for fit in fits for _, subspace in fit.alignment.variables.values()]


def cells(fits: Fits) -> list[tuple[str, str, int]]:
    return [(fit.place, fit.method.label, fit.seed) for fit in fits]


# --- recovery -----------------------------------------------------------------------------------------------


def largest_angle(found: Tensor, truth: Tensor) -> float:
    """In degrees, by the sine: a cosine near 1 has no digits left for small angles."""
    found, truth = (torch.linalg.qr(rows.double().T)[0].T for rows in (found, truth))
    return float(torch.rad2deg(torch.linalg.matrix_norm(found - found @ truth.T @ truth, 2).clamp(max=1).arcsin()))


@pytest.mark.parametrize(("rank", "seed"), [(4, 0), (4, 1), (1, 2), (7, 3)])
def test_a_planted_subspace_is_recovered(rank: int, seed: int) -> None:
    """h = Q z + noise, y = A z₁ + tanh(z₂) B with isometries A and B: swapping z₁ is the one best subspace."""
    width, noise = 16, 0.01
    g = torch.Generator().manual_seed(seed)
    q = random_orthonormal(width, width, g)
    a, b = random_orthonormal(24, rank, g), random_orthonormal(24, width - rank, g)

    def read_out(h: Tensor) -> Tensor:
        z = h @ q.T
        return z[:, :rank] @ a + z[:, rank:].tanh() @ b

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        base, source = (torch.randn(n, width, generator=g) for _ in range(2))
        target = source[:, :rank] @ a + base[:, rank:].tanh() @ b
        base, source = (z @ q + noise * torch.randn(n, width, generator=g) for z in (base, source))
        return base, source, target

    learned = LearnedSubspace(width, rank, seed=seed + 50)
    edit = interchange(learned)
    before = largest_angle(learned.basis().detach(), q[:rank])

    def loss_of(_: int) -> Tensor:
        base, source, target = draw(256)
        return nn.functional.mse_loss(read_out(edit(base, source)), target)

    losses = train([edit], loss_of, TrainingConfig(steps=500, learning_rate=0.03))
    assert before > 30  # the start was elsewhere
    assert largest_angle(learned.basis().detach(), q[:rank]) <= 0.1
    assert losses[-1] < 2 * noise**2


# --- the oracle ---------------------------------------------------------------------------------------------


def test_every_score_is_that_of_a_hand_written_swap(fits: Fits) -> None:
    """Of each method, on each split, with the interval of that very score."""
    given = pairs()
    assert len(fits) == len(SITES) * (1 + 1 + 1 + 2 + 1)
    answers = []
    for fit in fits:
        for split, data in (("test", given.test), ("dev", given.dev), ("train", given.train)):
            if split == "train" and fit.method.control:
                assert "train" not in fit.scores
                continue
            assert isinstance(data, Counterfactuals)
            logits = swapped(fit, data)
            assert fit.score("iia", split) == proportion(logits.argmax(-1) == data.answer), fit
            expected = logits.gather(1, data.answer[:, None])[:, 0]
            others = logits.scatter(1, data.answer[:, None], -torch.inf).amax(1)
            margins = expected - others
            found = fit.score("logit_margin", split)
            assert found.value == pytest.approx(margins.mean().item(), abs=2e-4)
            assert found.low < found.value < found.high
            before = unedited(data)
            odds = expected - logits.gather(1, data.base_answer[:, None])[:, 0]
            odds += (
                before.gather(1, data.base_answer[:, None])[:, 0] - before.gather(1, data.answer[:, None])[:, 0]
            )
            assert fit.score("log_odds", split).value == pytest.approx(odds.mean().item(), abs=2e-4)
            if split == "test":
                answers.append(logits.argmax(-1))
                torch.testing.assert_close(fit.pair_scores["logit_margin"], margins, rtol=0, atol=2e-3)
                assert fit.pair_scores["iia"].tolist() == (logits.argmax(-1) == data.answer).tolist()
    # The control: the methods do change answers, and not the same ones.
    before = unedited(given.test).argmax(-1)
    das, means, components, draw, _, whole = answers[: len(answers) // 2]
    for one, other in ((das, before), (whole, before), (draw, before), (das, whole), (means, components)):
        assert (one != other).float().mean() > 0.04


def test_every_fit_has_its_own_interval(fits: Fits) -> None:
    """No control has an interval of width 0, nor one of several draws taken together."""
    for fit in fits:
        found = fit.iia
        assert found == estimate(fit.pair_scores["iia"]) and found.n == PAIRS
        assert found.high - found.low > 0.1 and found.low < found.value < found.high
        assert fit.score("logit_margin") == bootstrap_mean(fit.pair_scores["logit_margin"])


def test_floors_are_counted_as_they_are_defined() -> None:
    given = unedited(counterfactuals(1)).argmax(-1)
    number = torch.arange(PAIRS)
    before = torch.where(number < 45, given, (given + 1) % 12)  # right on 45 of 60
    after = torch.where(number < 12, given, torch.full_like(given, 2))
    test = replace(counterfactuals(1), base_answer=before, answer=after)
    found = swept(PCA(2), SITES[:1], pairs=pairs(test=test)).floors
    assert found["test"].accuracy == proportion(number < 45)
    assert found["test"].no_intervention == proportion(given == after)
    assert found["test"].constant == proportion(after == 2)
    assert 12 <= int((given == after).sum()) < 45 and int((after == 2).sum()) >= 48
    assert found["test"].highest == (after == 2).float().mean()
    dev = counterfactuals(2)
    assert found["dev"].no_intervention == proportion(unedited(dev).argmax(-1) == dev.answer)
    assert found["dev"] != found["test"]


def test_a_fit_of_full_rank_is_the_full_vector() -> None:
    found = swept([DAS(WIDTH), RandomSubspace(WIDTH, draws=1), FullVector()], SITES[1:])
    assert found[0].iia == found[1].iia == found[2].iia
    assert found[0].start_overlap == {} and found[0].record()["start_overlap"] is None


# --- cells --------------------------------------------------------------------------------------------------


def test_cells_are_all_there_and_in_order() -> None:
    found = swept([DAS(rank=[1, 3]), PCA((2, 1)), RandomSubspace(2, draws=3)], config=ONE_STEP, seeds=[7, 3])
    labels = [("DAS 1", 7), ("DAS 1", 3), ("DAS 3", 7), ("DAS 3", 3), ("PCA 2", 0), ("PCA 1", 0)]
    labels += [("RandomSubspace 2", draw) for draw in range(3)]
    assert cells(found) == [(str(site), *one) for site in SITES for one in labels]
    assert not found.failures
    for fit in found:
        assert fit.rank == vars(fit.method)["rank"] == fit.subspace("v").rank and fit.subspace().width == WIDTH
        assert fit.losses == () or isinstance(fit.method, DAS)
        assert (len(fit.losses) == 1) == isinstance(fit.method, DAS)
        assert not any(p.requires_grad for p in fit.subspace().parameters())


def test_a_cell_is_what_it_is_alone(fits: Fits) -> None:
    """Neither neighbouring sites nor other methods, ranks or seeds change a fit."""
    for site in SITES:
        alone = swept([DAS(4)], [site], seeds=1)[0]
        together = fits.where(site=site, method=DAS)[0]
        torch.testing.assert_close(rows_of([alone]), rows_of([together]), rtol=0, atol=1e-4)
        assert alone.losses == pytest.approx(together.losses, rel=1e-4)
        several = swept([DAS([1, 4], learning_rate=[0.2, 0.05])], [site], seeds=[2, 0])
        same = several.where(rank=4, learning_rate=0.05, seed=0)[0]
        again = swept([DAS(4, learning_rate=0.05)], [site])[0]
        torch.testing.assert_close(rows_of([same]), rows_of([again]), rtol=0, atol=1e-4)
    closed = [m for m in METHODS if not isinstance(m, DAS)]
    for one, other in zip(swept(closed), [f for f in fits if not isinstance(f.method, DAS)], strict=True):
        assert torch.equal(one.subspace().basis(), other.subspace().basis()) and one.iia == other.iia


def test_a_sweep_is_its_seeds() -> None:
    methods: list[Method] = [DAS(4), DifferenceOfMeans(), RandomSubspace(2, draws=2)]
    torch.manual_seed(999)  # the global generator is not asked
    state = torch.get_rng_state()
    one, other = swept(methods, seeds=[0]), swept(methods, seeds=[1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = swept(methods, seeds=[0])
    assert one == again and one.as_dict() == again.as_dict() and one != other
    assert all(torch.equal(a, b) for a, b in zip(rows_of(one), rows_of(again), strict=True))
    for a, b in zip(one, other, strict=True):
        near = overlap_of(a.subspace().basis(), b.subspace().basis())
        assert near < 0.6 if isinstance(a.method, DAS) else near == pytest.approx(1, abs=1e-5)


def test_every_cell_starts_on_its_own() -> None:
    sites = [Site("block_output", layer, at) for layer in (0, 1) for at in ("2", "last")]
    still = swept(DAS(4, learning_rate=[1e-9, 2e-9]), sites, config=ONE_STEP, seeds=2)
    for fit in still:
        start = cell_seed(fit.seed, f"{fit.place} {fit.method.label}")
        assert fit.start == start
        expected = random_orthonormal(WIDTH, 4, start)
        torch.testing.assert_close(fit.subspace().basis(), expected, rtol=0, atol=1e-5)
    assert len({fit.start for fit in still}) == len(still) == 16
    rows = rows_of(still)
    overlaps = [overlap_of(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    assert max(overlaps) < 0.5  # chance is 4/32; shared starts would give 1


def test_the_order_of_the_pairs_is_the_seeds_and_not_the_methods() -> None:
    """Two learning rates of one seed see the same batches, so that they are compared on the same data."""
    seen: list[Tensor] = []

    def watched(logits: Tensor, answer: Tensor) -> Tensor:
        seen.append(answer.reshape(4, -1))
        return nn.functional.cross_entropy(logits, answer, reduction="none")

    swept(DAS(2, learning_rate=[0.1, 0.2]), SITES[:1], seeds=2, loss=watched, config=replace(QUICK, steps=2))
    assert len(seen) == 3
    for one_zero, one_one, two_zero, two_one in seen[1:]:  # the first call only tries the loss
        assert torch.equal(one_zero, two_zero) and torch.equal(one_one, two_one)
        assert not torch.equal(one_zero, one_one)


def test_a_place_named_twice_is_searched_once(fits: Fits) -> None:
    again = swept([DAS(4)], [*SITES, SITES[0], Site.parse(str(SITES[1])), {"v": SITES[0]}])
    assert cells(again) == cells(fits.where(method=DAS))


def test_more_fits_than_a_step_holds_are_trained_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    methods: list[Method] = [DAS(2, learning_rate=[0.01, 0.02, 0.05])]
    together = swept(methods, SITES[:1], seeds=2)
    sizes: Any = []
    monkeypatch.setattr(_places, "STACKED", 4 * QUICK.batch_size)
    monkeypatch.setattr(
        _places, "fit", lambda learners, *rest: sizes.append(len(learners)) or fit_together(learners, *rest)
    )
    grouped = swept(methods, SITES[:1], seeds=2)
    assert sizes == [4, 2] and cells(grouped) == cells(together)
    for one, other in zip(grouped, together, strict=True):
        torch.testing.assert_close(one.subspace().basis(), other.subspace().basis(), rtol=0, atol=1e-4)


# --- engines and streams ------------------------------------------------------------------------------------


def test_the_frozen_past_finds_what_the_plain_run_finds(fits: Fits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "subspace_lab.das.prepared_pairs.FrozenPast",
        lambda backbone, batch, sites, readout, **_: PlainEngine(backbone, batch, readout),
    )
    plain = swept(METHODS)
    assert plain.facts["engine"].startswith("plain run")
    assert fits.facts["engine"].startswith("frozen past by keys and values")
    assert plain.floors == fits.floors
    for one, other in zip(plain, fits, strict=True):
        assert [one.score("iia", s) for s in one.scores] == [other.score("iia", s) for s in other.scores]
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        torch.testing.assert_close(one.subspace().basis(), other.subspace().basis(), rtol=0, atol=1e-3)


def test_a_stream_is_asked_once_a_step_and_has_no_training_score() -> None:
    asked: list[int] = []

    def stream(step: int) -> Counterfactuals:
        asked.append(step)
        return counterfactuals(100 + step)

    found = swept(DAS([2, 4]), pairs=pairs(train=stream), seeds=2)
    assert asked == [*range(QUICK.steps)] * len(SITES)
    assert all(set(fit.scores) == {"dev", "test"} for fit in found)
    assert found.facts["pairs"] == {"train": None, "dev": PAIRS, "test": PAIRS}
    # The same pairs every time are a pool that is drawn whole.
    pool = swept(DAS(4), SITES[:1], config=replace(QUICK, batch_size=PAIRS))[0]
    always = swept(DAS(4), SITES[:1], pairs=pairs(train=lambda _: counterfactuals(0)))[0]
    assert always.losses == pytest.approx(pool.losses, rel=1e-4)


def test_methods_without_training_see_enough_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_places, "POOL", 150)
    asked: list[int] = []

    def stream(step: int) -> Counterfactuals:
        asked.append(step)
        return counterfactuals(100 + step)

    found = swept([PCA(3), DifferenceOfMeans()], SITES[1:], pairs=pairs(train=stream))
    assert asked == [0, 1, 2]
    parts = [counterfactuals(100 + step) for step in range(3)]
    states = torch.cat([states_by_hook(ids_of(p.sources["v"]), SITES[1]) for p in parts]).double()
    values = torch.cat([p.values["v"] for p in parts])
    centred = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:3]
    assert overlap_of(found[0].subspace().basis().double(), centred) == pytest.approx(1, abs=1e-5)
    means = torch.stack([states[values == value].mean(0) for value in range(3)])
    gaps = torch.linalg.qr((means[1:] - means[0]).T)[0].T
    assert overlap_of(found[1].subspace().basis().double(), gaps) == pytest.approx(1, abs=1e-5)


def test_training_is_scored_on_some_of_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_places, "TRAINING_SCORED", 40)
    found = swept(PCA(3), SITES[:1])[0]
    train = pairs().train
    assert isinstance(train, Counterfactuals)
    first = train.rows(torch.arange(40))
    assert found.score("iia", "train") == proportion(swapped(found, first).argmax(-1) == first.answer)


def test_the_model_is_left_as_it_was() -> None:
    model: Any = tiny().model
    model.transformer.h[1].train(True)
    model.lm_head.weight.requires_grad_(False)
    try:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        swept([DAS(4), PCA(2), FullVector()])
        with pytest.raises(RuntimeError, match="stop here"):
            swept(DAS(4), pairs=pairs(train=failing_stream))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval().requires_grad_(True)


# --- several variables --------------------------------------------------------------------------------------

TWO = ("v", "w")


@pytest.mark.parametrize(
    "place",
    [SITES[1], {"v": SITES[0], "w": SITES[1]}, {"w": SITES[0], "v": SITES[1]}],
    ids=["one", "two", "turned"],
)
def test_two_variables_are_swapped_side_by_side(place: Any) -> None:
    given = pairs(TWO)
    methods: list[Method] = [DAS(4), PCA(2), DifferenceOfMeans(), RandomSubspace(3, draws=1)]
    methods += [FullVector()] if isinstance(place, dict) else []
    found = swept(methods, [place], pairs=given)
    assert len(found) == len(methods) and not found.failures
    for fit in found:
        assert list(fit.sites) == list(TWO)
        v, w = (fit.subspace(name).basis() for name in TWO)
        if not isinstance(place, dict):
            assert (v @ w.T).abs().max() < 1e-5
        logits = swapped(fit, given.test)
        assert fit.iia == proportion(logits.argmax(-1) == given.test.answer)
    # Which source goes where is seen: expect what the one order gives, and only that order scores 1.
    das = found[0]
    turned = replace(given.test, sources={"v": given.test.sources["w"], "w": given.test.sources["v"]})
    for data, right in ((given.test, True), (turned, False)):
        expected = replace(given.test, answer=swapped(das, data).argmax(-1))
        again = swept(DAS(4), [place], pairs=pairs(TWO, test=expected))[0]
        assert (again.iia.value == 1) == right


def test_variables_at_two_sites_are_exchanged_at_once_and_trained_through_both() -> None:
    place = {"v": Site("block_output", 0, "2"), "w": Site("block_output", 1, "last")}
    given = pairs(TWO)
    fit = swept(DAS(3, learning_rate=0.2), [place], pairs=given)[0]
    assert fit.place == "v: block_output[0]@2, w: block_output[1]@last"
    assert all(overlap < 0.97 for overlap in fit.start_overlap.values()) and set(fit.start_overlap) == set(TWO)
    assert isinstance(fit.start, int)
    starts = [random_orthonormal(WIDTH, 3, fit.start + i) for i in range(2)]
    for name, start in zip(TWO, starts, strict=True):
        assert fit.start_overlap[name] == pytest.approx(overlap_of(fit.subspace(name).basis(), start), abs=1e-5)
    with pytest.raises(ValueError, match="has the sites"):
        _ = fit.site
    only_v = swapped(replace(fit, alignment=replace(fit.alignment, variables={"v": fit.alignment.variables["v"]})),
                     given.test)  # fmt: skip
    assert not torch.allclose(only_v, swapped(fit, given.test))


def test_a_variable_whose_source_is_the_base_changes_nothing() -> None:
    data = counterfactuals(1, TWO)
    given = unedited(data).argmax(-1)
    same = Counterfactuals(data.base, {"v": data.base, "w": data.base}, given, given, LETTERS, ANSWERS)
    found = swept([DAS(4), RandomSubspace(4, draws=1)], pairs=pairs(TWO, test=same))
    assert all(fit.iia.value == 1 for fit in found) and found.floors["test"].no_intervention.value == 1
    # The control: with its own source one of them does change answers.
    other = replace(same, sources={"v": data.base, "w": data.sources["w"]})
    assert swept(DAS(16), SITES[1:], pairs=pairs(TWO, test=other))[0].iia.value < 1


# --- losses and metrics -------------------------------------------------------------------------------------


def test_the_loss_that_is_given_is_the_one_minimised() -> None:
    data = replace(counterfactuals(0), answer=torch.full((PAIRS,), 3))
    options: dict[str, Any] = {"sites": SITES[1:], "config": replace(QUICK, steps=30, batch_size=PAIRS)}
    given = pairs(train=data)
    margin = swept(DAS(4), loss=logit_difference, pairs=given, **options)
    assert margin.facts["loss"] == "logit_difference"
    (fit,) = margin
    # At the first step the basis is its start, so the loss is that of a swap by hand.
    start = replace(fit, alignment=swept(DAS(4), SITES[1:], config=ONE_STEP, pairs=given)[0].alignment)
    logits = swapped(start, data)
    others = logits.scatter(1, data.answer[:, None], -torch.inf).amax(1)
    assert fit.losses[0] == pytest.approx((others - logits[:, 3]).mean().item(), abs=1e-3)
    assert fit.losses[-1] < fit.losses[0] - 0.1


def test_the_first_metric_is_the_one_that_is_shown_and_chosen_by() -> None:
    found = swept([PCA([1, 8]), RandomSubspace(2, draws=2)], metrics=[logit_margin, iia])
    assert found.metric == "logit_margin" and found.facts["metrics"] == ["logit_margin", "iia"]
    best = max(found.where(method=PCA), key=lambda fit: fit.score("logit_margin", "dev").value)
    assert found.best() is best
    assert found.mean()[0].value == pytest.approx(found[0].score("logit_margin").value)
    alone = swept([PCA(1), FullVector()], SITES[:1], metrics=[logit_margin])
    assert "logit_margin on 60 test pairs" in repr(alone) and "logit_margin" in alone._repr_html_()
    with pytest.raises(KeyError, match="No 'iia' on the test split"):
        _ = alone[0].iia


# --- evidence -----------------------------------------------------------------------------------------------


def test_an_alignment_carries_its_evidence(fits: Fits) -> None:
    beside = {mean.method.label: mean.value for mean in fits.mean() if mean.place == fits[0].place}
    facts = json.loads(json.dumps(dict(fits[0].alignment.facts), allow_nan=False))
    assert (facts["method"], facts["seed"], facts["start"]) == ("DAS 4", 0, fits[0].start)
    assert facts["scores"]["iia"]["value"] == fits[0].iia.value
    assert facts["dev_scores"]["iia"]["value"] == fits[0].score(split="dev").value
    assert facts["data"] == pairs().fingerprint() and facts["model_facts"]["class"] == "GPT2LMHeadModel"
    floors = fits.floors["test"]
    floor = {"no intervention": floors.no_intervention.value, "best constant answer": floors.constant.value}
    told = {name: of["iia"] for kind in ("controls", "baselines") for name, of in facts[kind].items()}
    assert told == {**{k: v for k, v in beside.items() if k != "DAS 4"}, **floor}
    assert {"FullVector", *floor} <= set(facts["controls"]) and "DifferenceOfMeans" in facts["baselines"]


def test_facts_are_the_recipe(fits: Fits) -> None:
    facts = json.loads(json.dumps(dict(fits.facts), allow_nan=False))
    assert facts["variables"] == ["v"] and facts["pairs"] == dict.fromkeys(("train", "dev", "test"), PAIRS)
    assert facts["training"]["steps"] == QUICK.steps and "seed" not in facts["training"]
    assert facts["seeds"] == [0] and facts["metrics"] == ["iia", "logit_margin", "log_odds"]
    assert facts["loss"] == "cross_entropy" and facts["versions"]["torch"] == torch.__version__


# --- the short way in ---------------------------------------------------------------------------------------


def test_a_search_is_the_sweep_of_the_default_methods() -> None:
    options: dict[str, Any] = {"config": QUICK, "min_accuracy": None, "quiet": True}
    found = search(tiny(), pairs(), SITES[:1], rank=[2, 3], seeds=[4], **options)
    by_hand = sweep(tiny(), pairs(), SITES[:1], default_methods([2, 3]), seeds=[4], **options)
    assert found == by_hand
    assert found.methods == [
        "DAS 2", "DAS 3", "DifferenceOfMeans", "PCA 2", "PCA 3", "RandomSubspace 2", "RandomSubspace 3", "FullVector",
    ]  # fmt: skip
    assert len(found.where(method="RandomSubspace 2")) == 5  # one draw is no control
    assert [fit.seed for fit in found.where(method=DAS)] == [4, 4]
    one = search(tiny(), pairs(), SITES[:1], seeds=[3], methods=[DAS(2)], **options)
    assert cells(one) == [(str(SITES[0]), "DAS 2", 3)]


def test_the_full_vector_is_left_out_where_variables_share_a_site() -> None:
    options: dict[str, Any] = {"config": ONE_STEP, "min_accuracy": None, "quiet": True}
    apart = {"v": SITES[0], "w": SITES[1]}
    sites: Any
    for sites, there in (([SITES[0]], False), ([apart], True), ([apart, SITES[1]], False)):
        found = search(tiny(), pairs(TWO), sites, **options)
        assert ("FullVector" in found.methods) == there and "PCA 1" in found.methods
    assert default_methods(3, shared_site=True) == default_methods(3)[:-1]


def test_logits_by_hook_are_the_models() -> None:
    """The oracle itself: an edit that changes nothing is the plain model."""
    data = counterfactuals(5)
    same = logits_by_hook(ids_of(data.base), {SITES[0]: lambda h: h.clone()})
    with torch.no_grad():
        plain = tiny().model(ids_of(data.base)).logits[:, -1, ANSWERS]
    torch.testing.assert_close(same, plain)
