"""The search: what it recovers, the numbers it puts beside a score, and what it refuses.

The oracle is a plain torch hook on a tiny GPT-2. Its pairs are random: what is asked here is whether numbers are
what they are said to be, not whether they are high (see test_equality.py and test_stories.py for that).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from subspace_lab.core.interventions import interchange
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das import prepared_pairs as pairs_module
from subspace_lab.das.encoding import Counterfactuals
from subspace_lab.das.metrics import proportion
from subspace_lab.das.search import SearchResult, search, site_seed
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.training import TrainingConfig, train
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH, ROWS, LENGTH = 32, 60, 7
ANSWERS = torch.arange(7, 19)  # many, so that a swap changes which is the highest
LETTERS = tuple("abcdefghijkl")
SITES = [Site("block_output", 0, "2"), Site("block_output", 1, "last")]
QUICK = TrainingConfig(steps=8, batch_size=16, learning_rate=0.05)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_embd=WIDTH,
        n_layer=3,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,  # so that a swap changes answers
    )
    return Backbone(GPT2LMHeadModel(config).eval())


def batch_of(ids: Tensor) -> Batch:
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def random_pairs(seed: int, variables: tuple[str, ...] = ("v",)) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    base, *sources = (
        batch_of(torch.randint(1, 50, (ROWS, LENGTH), generator=g)) for _ in range(1 + len(variables))
    )
    before, after = (torch.randint(0, 12, (ROWS,), generator=g) for _ in range(2))
    return Counterfactuals(base, dict(zip(variables, sources, strict=True)), before, after, LETTERS, ANSWERS)


def searched(backbone: Backbone, **changes: Any) -> SearchResult:
    options: dict[str, Any] = {"rank": 4, "config": QUICK, "min_accuracy": None, "quiet": True, **changes}
    training, test = options.pop("training", random_pairs(0)), options.pop("test", random_pairs(1))
    return search(backbone, training, test, options.pop("sites", SITES), **options)


@pytest.fixture(scope="module")
def result(backbone: Backbone) -> SearchResult:
    return searched(backbone)


# --- the oracle ---------------------------------------------------------------------------------------------


def position(site: Site) -> int:
    return -1 if site.positions == "last" else int(site.positions)


def states_by_hook(model: nn.Module, ids: Tensor, site: Site) -> Tensor:
    kept: list[Tensor] = []
    block = model.transformer.h[site.layer]
    handle = block.register_forward_hook(lambda _, __, output: kept.append(_stream(output)[:, position(site)]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return kept[0]


def answers_by_hook(model: nn.Module, ids: Tensor, site: Site, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The answers with the states at the site replaced by edit(states)."""

    def swap(_: Any, __: Any, output: Any) -> Any:
        stream = _stream(output).clone()
        stream[:, position(site)] = edit(stream[:, position(site)])
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    handle = model.transformer.h[site.layer].register_forward_hook(swap)
    with torch.no_grad():
        logits = model(ids).logits[:, -1, ANSWERS]
    handle.remove()
    return logits.argmax(-1)


def swapped(model: nn.Module, base: Tensor, source: Tensor, site: Site, rows: Tensor | None = None) -> Tensor:
    """The answers after h + RᵀR(h_source − h), or after the whole state was swapped."""
    states = states_by_hook(model, source, site)
    return answers_by_hook(
        model, base, site, lambda h: states if rows is None else h + (states - h) @ rows.T @ rows
    )


def _stream(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def ids_of(batch: Batch) -> Tensor:
    return batch.inputs["input_ids"]


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
        return *(z @ q + noise * torch.randn(n, width, generator=g) for z in (base, source)), target

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


# --- the numbers beside a score -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(len(SITES)))
def test_scores_are_those_of_a_hand_written_swap(backbone: Backbone, result: SearchResult, which: int) -> None:
    found, site, data = result.found[which], SITES[which], random_pairs(1)
    assert found.site == site
    base, source = ids_of(data.base), ids_of(data.sources["v"])
    rows = found.subspaces["v"].basis()
    whole = swapped(backbone.model, base, source, site)
    part = swapped(backbone.model, base, source, site, rows)
    assert found.full_vector == proportion(whole == data.answer)
    assert found.iia == proportion(part == data.answer)
    # The control: the three are different answers.
    unedited = answers_by_hook(backbone.model, base, site, lambda h: h)
    for one, other in ((whole, part), (whole, unedited), (part, unedited)):
        assert (one != other).float().mean() > 0.05
    training = random_pairs(0)
    given = swapped(backbone.model, ids_of(training.base), ids_of(training.sources["v"]), site, rows)
    assert found.train_iia == proportion(given == training.answer)


def test_floors_are_counted_as_they_are_defined(backbone: Backbone) -> None:
    with torch.no_grad():
        given = backbone.model(ids_of(random_pairs(1).base)).logits[:, -1, ANSWERS].argmax(-1)
    number = torch.arange(ROWS)
    data = random_pairs(1)
    before = torch.where(number < 45, given, (given + 1) % 12)  # right on 45 of 60
    after = torch.where(number < 12, given, torch.full_like(given, 2))
    data = replace(data, base_answer=before, answer=after)
    found = searched(backbone, test=data, sites=SITES[:1])
    assert found.accuracy == proportion(number < 45)
    assert found.no_intervention == proportion(given == after)
    assert found.constant == proportion(after == 2)
    assert 12 <= int((given == after).sum()) < 45 and int((after == 2).sum()) >= 48


def test_a_random_subspace_is_the_mean_of_several_with_the_width_of_one(
    backbone: Backbone, result: SearchResult
) -> None:
    for found in result.found:
        assert found.random_subspace.n == ROWS
        assert found.random_subspace.low <= found.random_subspace.value <= found.random_subspace.high
        several = found.random_subspace.value * ROWS * 5
        assert several == pytest.approx(round(several), abs=1e-6)
    # It is no part of the fit: the same for any seed and training, another for another rank.
    again = searched(backbone, seed=3, config=TrainingConfig(steps=1, batch_size=4))
    assert [f.random_subspace for f in again.found] == [f.random_subspace for f in result.found]


def test_swapping_everything_is_the_full_vector(backbone: Backbone) -> None:
    found = searched(backbone, rank=WIDTH, sites=SITES[1:]).found[0]
    assert found.iia == found.full_vector
    assert found.random_subspace.value == found.iia.value
    assert found.start_overlap == pytest.approx(1, abs=1e-4)


def test_a_fit_tells_how_far_it_went(backbone: Backbone) -> None:
    still = searched(backbone, learning_rates=[1e-9]).found[0]
    assert still.start_overlap == pytest.approx(1, abs=1e-5)
    moved = searched(backbone, learning_rates=[0.3]).found[0]
    assert moved.start_overlap < 0.9 and moved.loss < still.loss
    start = random_orthonormal(WIDTH, 4, site_seed(0, SITES[0]))
    overlap = (moved.subspaces["v"].basis() @ start.T).square().sum() / 4
    assert moved.start_overlap == pytest.approx(float(overlap), abs=1e-5)


def test_the_best_has_the_highest_score(result: SearchResult) -> None:
    assert result.best.iia.value == max(f.iia.value for f in result.found)


def test_what_was_found_at_a_site(backbone: Backbone, result: SearchResult) -> None:
    for found in result.found:
        assert result.at(found.site) is found and found.start == site_seed(0, found.site)
    with pytest.raises(KeyError, match=r"block_output\[0\]@3 has 0 results; searched were"):
        result.at(Site("block_output", 0, 3))
    several = searched(backbone, seed=[0, 1], sites=SITES[:1])
    with pytest.raises(KeyError, match="has 2 results"):
        several.at(SITES[0])


def test_a_program_can_read_the_result(result: SearchResult) -> None:
    told = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert [row["site"] for row in told["found"]] == [str(site) for site in SITES]
    first, found = told["found"][0], result.found[0]
    assert first["iia"] == {"value": found.iia.value, "low": found.iia.low, "high": found.iia.high, "n": ROWS}
    assert (first["rank"], first["seed"], first["variables"]) == (4, 0, ["v"])
    assert first["learning_rate"] == QUICK.learning_rate and first["loss"] == found.loss
    assert told["constant"]["value"] == result.constant.value and told["engine"] == result.engine
    assert "subspaces" not in first and found.subspaces  # saved apart, and not lost by looking


# --- seeds --------------------------------------------------------------------------------------------------


def test_a_search_is_its_seed(backbone: Backbone, result: SearchResult) -> None:
    torch.manual_seed(999)  # the global generator is not asked
    again, other = searched(backbone), searched(backbone, seed=1)
    assert again.as_dict() == result.as_dict()
    for a, b, c in zip(result.found, again.found, other.found, strict=True):
        assert torch.equal(a.subspaces["v"].basis(), b.subspaces["v"].basis())
        assert (a.subspaces["v"].basis() @ c.subspaces["v"].basis().T).square().sum() / 4 < 0.5


def test_every_site_starts_on_its_own(backbone: Backbone) -> None:
    sites = [Site("block_output", layer, at) for layer in (0, 1) for at in ("2", "last")]
    still = searched(backbone, sites=sites, learning_rates=[1e-9], config=TrainingConfig(steps=1, batch_size=4))
    rows = [found.subspaces["v"].basis() for found in still.found]
    for site, basis in zip(sites, rows, strict=True):
        torch.testing.assert_close(basis, random_orthonormal(WIDTH, 4, site_seed(0, site)), rtol=0, atol=1e-5)
    overlaps = [float((a @ b.T).square().sum() / 4) for i, a in enumerate(rows) for b in rows[:i]]
    assert max(overlaps) < 0.4  # chance is 4/32; shared starts would give 1


def test_a_site_does_not_depend_on_its_neighbours(backbone: Backbone, result: SearchResult) -> None:
    (alone,) = searched(backbone, sites=SITES[1:]).found
    together = result.found[1]
    torch.testing.assert_close(alone.subspaces["v"].basis(), together.subspaces["v"].basis(), rtol=0, atol=1e-4)
    assert alone.loss == pytest.approx(together.loss, rel=1e-4)


def test_a_site_named_twice_is_searched_once(backbone: Backbone, result: SearchResult) -> None:
    again = searched(backbone, sites=[*SITES, SITES[0], Site.parse(str(SITES[1]))])
    assert [f.as_dict() for f in again.found] == [f.as_dict() for f in result.found]


# --- engines and streams ------------------------------------------------------------------------------------


def test_the_frozen_past_finds_what_the_plain_run_finds(
    backbone: Backbone, result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pairs_module,
        "FrozenPast",
        lambda backbone, batch, sites, readout, **_: PlainEngine(backbone, batch, readout),
    )
    plain = searched(backbone)
    assert plain.engine.startswith("plain run") and result.engine.startswith("frozen past by keys and values")
    assert (plain.accuracy, plain.no_intervention) == (result.accuracy, result.no_intervention)
    for a, b in zip(plain.found, result.found, strict=True):
        assert (a.iia, a.train_iia, a.full_vector) == (b.iia, b.train_iia, b.full_vector)
        assert a.random_subspace == b.random_subspace
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        torch.testing.assert_close(a.subspaces["v"].basis(), b.subspaces["v"].basis(), rtol=0, atol=1e-3)


def test_a_stream_is_asked_once_a_step_and_cannot_be_memorised(backbone: Backbone) -> None:
    asked: list[int] = []

    def stream(step: int) -> Counterfactuals:
        asked.append(step)
        return random_pairs(100 + step)

    found = searched(backbone, training=stream, rank=[2, 4], sites=SITES).found
    assert asked == [*range(QUICK.steps)] * len(SITES)
    assert all(f.train_iia is None for f in found)
    # The same pairs every time are a pool that is drawn whole.
    pool = searched(backbone, config=TrainingConfig(steps=8, batch_size=ROWS, learning_rate=0.05)).found[0]
    always = searched(backbone, training=lambda _: random_pairs(0)).found[0]
    assert always.loss == pytest.approx(pool.loss, rel=1e-4)


def test_the_model_is_left_as_it_was(backbone: Backbone) -> None:
    model = backbone.model
    model.train(False)
    model.transformer.h[1].train(True)
    model.lm_head.weight.requires_grad_(False)
    try:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        searched(backbone)
        with pytest.raises(RuntimeError, match="stop here"):
            searched(backbone, training=_failing)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval().requires_grad_(True)


def _failing(step: int) -> Counterfactuals:
    if step == 2:
        raise RuntimeError("stop here")
    return random_pairs(step)


# --- several variables --------------------------------------------------------------------------------------


def test_two_variables_are_swapped_side_by_side(backbone: Backbone) -> None:
    data, site = random_pairs(1, ("v", "w")), SITES[1]
    training = random_pairs(0, ("v", "w"))
    (found,) = searched(backbone, training=training, test=data, sites=[site]).found
    assert set(found.subspaces) == {"v", "w"} and found.full_vector is None and found.rank == 4
    v, w = found.subspaces["v"].basis(), found.subspaces["w"].basis()
    assert v.shape == w.shape == (4, WIDTH) and (v @ w.T).abs().max() < 1e-5
    base = ids_of(data.base)
    of_v, of_w = (states_by_hook(backbone.model, ids_of(data.sources[n]), site) for n in ("v", "w"))

    def answers(to_v: Tensor, to_w: Tensor) -> Tensor:
        return answers_by_hook(
            backbone.model, base, site, lambda h: h + (to_v - h) @ v.T @ v + (to_w - h) @ w.T @ w
        )

    assert found.iia == proportion(answers(of_v, of_w) == data.answer)
    # Which source goes where is seen: expect what the one order gives, and only that order scores 1.
    for to_v, to_w, right in ((of_v, of_w, True), (of_w, of_v, False)):
        expected = replace(data, answer=answers(to_v, to_w))
        (again,) = searched(backbone, training=training, test=expected, sites=[site]).found
        assert (again.iia.value == 1) == right


def test_a_variable_whose_source_is_the_base_changes_nothing(backbone: Backbone) -> None:
    data = random_pairs(1, ("v", "w"))
    with torch.no_grad():
        given = backbone.model(ids_of(data.base)).logits[:, -1, ANSWERS].argmax(-1)
    same = Counterfactuals(data.base, {"v": data.base, "w": data.base}, given, given, data.answers, data.tokens)
    result = searched(backbone, training=random_pairs(0, ("v", "w")), test=same)
    for found in result.found:
        assert found.iia.value == 1 and found.random_subspace.value == 1
    assert result.no_intervention.value == 1
    # The control: with its own source one of them does change answers.
    other = Counterfactuals(
        data.base, {"v": data.base, "w": data.sources["w"]}, given, given, data.answers, ANSWERS
    )
    assert searched(backbone, training=random_pairs(0, ("v", "w")), test=other, rank=16).found[1].iia.value < 1


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, "Nothing to search: 0 sites"),
        ({"rank": []}, "1 sites?, 0 ranks|2 sites?, 0 ranks"),
        ({"seed": []}, "Nothing to search"),
        ({"learning_rates": []}, "Nothing to search"),
        ({"rank": 33}, r"block_output\[0\]@2 has width 32; rank \[33\] for 1 variable.*at most 32"),
        ({"rank": 0}, r"rank \[0\]"),
        ({"rank": [4, 40]}, r"rank \[40\]"),
        ({"rank": 17, "training": random_pairs(0, ("v", "w")), "test": random_pairs(1, ("v", "w"))}, "at most 16"),
        ({"min_accuracy": 0.9}, "of 60 bases as the causal model does, less than 0.9.*min_accuracy=None"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_work(
    backbone: Backbone, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("a fit was begun")

    monkeypatch.setattr("subspace_lab.das.search.fit", worked)
    with pytest.raises(ValueError, match=message):
        searched(backbone, **changes)


def test_a_site_that_does_not_exist_is_named(backbone: Backbone) -> None:
    with pytest.raises(IndexError, match="9"):
        searched(backbone, sites=[Site("block_output", 9, "last")])
    with pytest.raises(KeyError, match="subject"):
        searched(backbone, sites=[Site("block_output", 0, "subject")])


def test_a_model_that_solves_the_task_is_not_refused(backbone: Backbone) -> None:
    data = random_pairs(1)
    with torch.no_grad():
        given = backbone.model(ids_of(data.base)).logits[:, -1, ANSWERS].argmax(-1)
    solved = replace(data, base_answer=given)
    assert searched(backbone, test=solved, min_accuracy=1.0, sites=SITES[:1]).accuracy.value == 1
