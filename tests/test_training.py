"""The one training loop: what it touches, how fast it goes, what it does when something is wrong."""

from __future__ import annotations

import math
from itertools import islice
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from subspace_lab.core.interventions import Intervention, interchange, loreft, steer
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace, random_subspace
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig, progress_bar, shuffled_rows, train
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH = 8
SITE = Site("0.output")


class Scalar(nn.Module):
    """One number, and how far it went at every step."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))


# --- what is touched ----------------------------------------------------------------------------------------


def test_gradients_reach_the_edits_alone() -> None:
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    base[0].weight.grad = sentinel = torch.full((WIDTH, WIDTH), 7.0)
    base[2].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    inputs, rows = torch.randn(20, WIDTH), torch.arange(20)
    run = PlainEngine(Backbone(base), Batch.of(inputs), Readout())
    edits = {"LoReFT": loreft(WIDTH, 2, seed=0), "DAS": interchange(LearnedSubspace(WIDTH, 2, seed=0))}
    for edit in edits.values():
        start = {k: v.clone() for k, v in edit.state_dict().items()}
        sources = {SITE: torch.randn(20, WIDTH)} if edit.needs_source else None
        target = torch.randint(3, (20,))

        def loss_of(
            _: int,
            edit: Intervention = edit,
            sources: dict[Site, Tensor] | None = sources,
            target: Tensor = target,
        ) -> Tensor:
            return nn.functional.cross_entropy(run.logits(rows, {SITE: edit}, sources), target)

        losses = train([edit], loss_of, TrainingConfig(steps=20, learning_rate=0.05))
        assert losses[-1] < losses[0]
        assert all(not torch.equal(start[k], v) for k, v in edit.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert base[0].weight.grad is sentinel and (sentinel == 7).all()
    assert all(p.grad is None for p in base.parameters() if p is not base[0].weight)
    assert [p.requires_grad for p in base.parameters()] == flags


def test_a_parameter_that_the_loss_does_not_use_or_that_is_frozen_stays() -> None:
    used, unused, frozen = Scalar(), Scalar(1.0), Scalar(2.0)
    frozen.requires_grad_(False)
    config = TrainingConfig(steps=5, weight_decay=0.5)
    train([used, unused, frozen], lambda _: used.w + 0 * frozen.w, config)
    assert used.w < 0 and unused.w == 1 and frozen.w == 2


def test_whatever_else_asks_for_gradients_gets_none() -> None:
    trained, other, marked = Scalar(1.0), Scalar(2.0), Scalar(3.0)
    marked.w.grad = torch.tensor(7.0, dtype=torch.float64)
    train([trained], lambda _: trained.w * other.w * marked.w, TrainingConfig(steps=3))
    assert trained.w < 1
    assert other.w.grad is None and marked.w.grad == 7


# --- the rate -----------------------------------------------------------------------------------------------


def test_the_schedule_rises_and_falls_in_straight_lines() -> None:
    rates = [TrainingConfig(steps=20, warmup=0.25).rate(step) for step in range(20)]
    assert rates == pytest.approx([*(i / 5 for i in range(1, 6)), *(i / 15 for i in range(15, 0, -1))])
    constant = TrainingConfig(steps=20, warmup=0.25, schedule="constant")
    assert [constant.rate(step) for step in range(20)] == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)
    falling = TrainingConfig(steps=4, warmup=0.0)
    assert [falling.rate(step) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert TrainingConfig(steps=1).rate(0) == 1  # one step is a step, not the zero of a warm-up


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_steps_have_the_length_of_the_schedule(schedule: Literal["linear", "constant"]) -> None:
    """Under a constant gradient Adam moves by exactly its rate."""
    config = TrainingConfig(steps=12, learning_rate=0.3, warmup=0.25, schedule=schedule)
    module, seen = Scalar(), []
    train([module], lambda _: module.w.clone(), config, on_step=lambda *_: seen.append(module.w.item()))
    moved = [b - a for a, b in zip([0.0, *seen], seen, strict=False)]
    assert moved == pytest.approx([-0.3 * config.rate(step) for step in range(12)], rel=1e-5)


def test_losses_are_returned_and_told_step_by_step() -> None:
    module, told = Scalar(1.0), []
    config = TrainingConfig(steps=6, learning_rate=0.1)
    losses = train([module], lambda step: module.w.square() + step, config, on_step=lambda *a: told.append(a))
    assert told == list(enumerate(losses)) and len(losses) == 6
    assert losses[0] == 1.0 and losses[1] < 2.0


def test_long_gradients_are_shortened() -> None:
    """Adam hides a factor, but not a change of it: after a huge gradient the next ones count for nothing."""

    def distance(longest: float | None) -> float:
        module = Scalar()
        config = TrainingConfig(
            steps=3, learning_rate=0.1, warmup=0.0, schedule="constant", max_gradient_norm=longest
        )
        train([module], lambda step: module.w * (1e6 if step == 0 else 1.0), config)
        return -module.w.item()

    assert distance(1.0) == pytest.approx(0.3, rel=1e-4)
    assert distance(None) < 0.29


# --- order of the rows --------------------------------------------------------------------------------------


def test_every_epoch_is_a_fresh_permutation_with_its_short_batch() -> None:
    order = shuffled_rows(10, TrainingConfig(batch_size=4, seed=3))
    epochs = [[batch.tolist() for batch in islice(order, 3)] for _ in range(4)]
    assert all([len(batch) for batch in epoch] == [4, 4, 2] for epoch in epochs)
    flat = [[row for batch in epoch for row in batch] for epoch in epochs]
    assert all(sorted(rows) == list(range(10)) for rows in flat)
    assert len({tuple(rows) for rows in flat}) == 4
    assert next(shuffled_rows(3, TrainingConfig(batch_size=8))).sort().values.tolist() == [0, 1, 2]


def test_the_order_is_its_seed_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()

    def first(seed: int) -> list[int]:
        return next(shuffled_rows(50, TrainingConfig(batch_size=50, seed=seed))).tolist()

    assert first(0) == first(0) != first(1)
    assert torch.equal(state, torch.get_rng_state())


# --- modes and failures -------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("failure", [None, "not finite", "interrupted"])
def test_modes_are_restored_also_after_failures(failure: str | None) -> None:
    edit = loreft(WIDTH, 2, seed=0, dropout=0.5)
    edit.eval()
    edit.value.train()  # mixed on purpose: each module has its own mode back
    modes = [m.training for m in edit.modules()]
    during = []

    def loss_of(step: int) -> Tensor:
        during.append([m.training for m in edit.modules()])
        if step == 2 and failure == "interrupted":
            raise Interrupted
        scale = math.nan if step == 2 and failure == "not finite" else 1.0
        return scale * edit(torch.ones(4, WIDTH)).square().mean()

    config = TrainingConfig(steps=4)
    if failure is None:
        train([edit], loss_of, config)
    else:
        with pytest.raises(FloatingPointError if failure == "not finite" else Interrupted):
            train([edit], loss_of, config)
    assert [m.training for m in edit.modules()] == modes
    assert all(all(d) for d in during)  # dropout was on while it trained


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(bad: float) -> None:
    module, seen = Scalar(1.0), []

    def loss_of(step: int) -> Tensor:
        return module.w * (bad if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match=r"at step 3 of 10"):
        train([module], loss_of, TrainingConfig(steps=10), on_step=lambda *_: seen.append(module.w.item()))
    assert len(seen) == 3 and module.w.item() == seen[-1] and math.isfinite(seen[-1])


def test_nothing_to_train_is_said() -> None:
    fixed = steer(random_subspace(WIDTH, 2, 0), 1.0)
    frozen = loreft(WIDTH, 2, seed=0).requires_grad_(False)
    for edit in (fixed, frozen):
        with pytest.raises(ValueError, match="Nothing to train"):
            train([edit], lambda _: torch.zeros(()), TrainingConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm=0.0"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm=-1.0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_an_unknown_schedule_is_refused() -> None:
    config = TrainingConfig()
    object.__setattr__(config, "schedule", "cosine")  # in the tests its annotation is checked before it
    with pytest.raises(ValueError, match="schedule='cosine'"):
        config.__post_init__()


# --- the bar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [True, False])
def test_the_bar_is_on_standard_error_or_nowhere(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("searching", total=3)
        bar.advance(task, 3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("searching" in shown.err) == (not quiet)


def test_only_true_from_on_step_ends_the_training() -> None:
    """What a callback happens to return, such as a count, does not."""
    for returned, made in ((True, 3), (7, 5), ("", 5), (None, 5)):
        module = nn.Linear(1, 1)
        losses = train(
            [module],
            lambda _, module=module: module.weight.square().sum(),  # type: ignore[misc]
            TrainingConfig(steps=5),
            on_step=lambda step, _, returned=returned: returned if step == 2 else None,  # type: ignore[misc]
        )
        assert len(losses) == made, returned
