"""Methods that learn which coordinates are a variable's, and DAS by kinds of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import problem
from tiny_sweeps import PAIRS, QUICK, SITES, WIDTH, counterfactuals, pairs, swapped, swept, tiny
from torch import Tensor, nn

from subspace_lab.cli.loading import Source, load_causal, load_tokenizer
from subspace_lab.core.estimates import proportion
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, MDAS, PCA, BoundlessDAS, FullVector, Mask, Method
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import Drawn, PreparedPairs, from_pool
from subspace_lab.das.prepared_pairs import fit as train_learners
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.tasks import load_task

SITE = SITES[1]
TWO = ("v", "w")
METHODS = [BoundlessDAS(vectors=12), Mask(), Mask("pca"), Mask(features=random_orthonormal(WIDTH, 6, 2))]


# --- a variable that is planted -----------------------------------------------------------------------------

DIMENSIONS, HELD = 16, 2


def planted(rotation: Tensor) -> tuple[Backbone, Pairs]:
    """A network whose first layer rotates its input, and whose answer is the sign of one input times another's."""

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotate = nn.Linear(DIMENSIONS, DIMENSIONS, bias=False)
            self.rotate.weight.data = rotation

        def forward(self, x: Tensor) -> Tensor:
            z = self.rotate(x) @ rotation
            score = z[:, 0] + z[:, 1]
            return torch.stack([score, -score], 1)

    def drawn(n: int, seed: int) -> Counterfactuals:
        base, source = torch.randn(2, n, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
        before, after = (((x[:, 0] + x[:, 1]) < 0).long() for x in (base, source))
        return Counterfactuals(Batch.of(base), {"v": Batch.of(source)}, before, after, ("+", "-"))

    return Backbone(Planted()), Pairs(drawn(400, 0), drawn(150, 1), drawn(300, 2))


PLACE = Site("rotate.output", None, "all")
PLANTED = TrainingConfig(steps=150, batch_size=64, learning_rate=0.05)


def test_boundless_das_finds_a_planted_direction_and_that_it_is_one() -> None:
    """The rest of the space carries noise alone, and the penalty asks for few vectors."""
    rotation = random_orthonormal(DIMENSIONS, DIMENSIONS, 3)
    backbone, data = planted(rotation)
    fits = sweep(backbone, data, [PLACE], [BoundlessDAS(), DAS(1)], config=PLANTED, quiet=True)
    direction = (rotation[:, 0] + rotation[:, 1]) / 2**0.5
    found, das = fits
    assert found.rank <= 3 and found.iia.value >= das.iia.value - 0.02 > 0.9
    assert (found.subspace().basis() @ direction).norm() > 0.98


def test_a_mask_finds_the_neurons_that_are_planted() -> None:
    backbone, data = planted(torch.eye(DIMENSIONS))
    fit = sweep(backbone, data, [PLACE], [Mask(penalty=0.05)], config=PLANTED, quiet=True)[0]
    subspace = fit.subspace()
    assert isinstance(subspace, Axes) and sorted(subspace.indices.tolist()) == [0, 1] and fit.iia.value == 1
    features = random_orthonormal(DIMENSIONS, DIMENSIONS, 3)
    backbone, data = planted(features.T.contiguous())
    fit = sweep(backbone, data, [PLACE], [Mask(features=features, penalty=0.05)], config=PLANTED, quiet=True)[0]
    torch.testing.assert_close(fit.subspace().basis(), features[:2])
    assert fit.iia.value > 0.99


# --- what is scored is what is given back -------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits() -> Fits:
    return swept([*METHODS, DAS(2), FullVector()], SITES)


def test_scores_are_of_the_hard_subspaces(fits: Fits) -> None:
    assert not fits.failures
    for fit in fits:
        logits = swapped(fit, pairs().test)
        assert fit.iia == proportion(logits.argmax(-1) == pairs().test.answer), fit
        assert 1 <= fit.rank <= WIDTH
        if fit.method in METHODS:
            assert len(fit.losses) == QUICK.steps and len(set(fit.losses)) > 1


def test_several_in_one_run_are_what_each_is_alone(fits: Fits) -> None:
    for method in METHODS:
        alone = swept(method, SITES[:1])[0]
        together = fits.where(method=method, site=SITES[0])[0]
        torch.testing.assert_close(alone.subspace().basis(), together.subspace().basis(), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(alone.losses), torch.tensor(together.losses), rtol=0, atol=1e-4)


def test_they_are_saved_and_read_again(fits: Fits, tmp_path: Path) -> None:
    fits.save(tmp_path / "fits")
    for one, other in zip(fits, Fits.load(tmp_path / "fits"), strict=True):
        assert one.method == other.method and one.method.label == other.method.label
        assert torch.equal(one.subspace().basis(), other.subspace().basis())
        assert type(one.subspace()) is type(other.subspace())
    assert [method.label for method in METHODS] == [
        "BoundlessDAS vectors=12",
        "Mask",
        "Mask axes=pca",
        "Mask axes=features",
    ]


@pytest.mark.parametrize("sites", [[SITE], [{"v": SITES[0], "w": SITES[1]}]])
def test_several_variables_have_parts_of_one_basis(sites: Any) -> None:
    found = swept([BoundlessDAS(), Mask(), Mask("pca")], sites, pairs=pairs(TWO))
    assert len(found) == 3 and not found.failures
    for fit in found:
        logits = swapped(fit, pairs(TWO).test)
        assert fit.iia == proportion(logits.argmax(-1) == pairs(TWO).test.answer)
        if len(fit.alignment.sites) == 1:
            one, other = (fit.subspace(name).basis() for name in TWO)
            assert (one @ other.T).abs().max() < 1e-5


def test_a_seed_draws_the_basis_and_the_temperature_falls() -> None:
    given = problem({"v": SITE}, width=9)
    learner = BoundlessDAS().learner(given)
    edit: Any
    (edit,) = learner.edits.values()
    first: Tensor = edit.subspace.basis()
    assert torch.equal(first, BoundlessDAS().learner(given).edits[SITE].subspace.basis())  # type: ignore[union-attr, operator]
    other = BoundlessDAS().learner(replace(given, seed=6)).edits[SITE].subspace.basis()  # type: ignore[union-attr, operator]
    assert not torch.allclose(first, other) and learner.start == 5
    seen = []
    for progress in (0.0, 0.5, 1.0):
        learner.advance(progress)
        seen.append(edit.value.mask.temperature)
    assert seen == pytest.approx([50 * 9 / 4096, (50 * 9 / 4096 * 0.1) ** 0.5, 0.1])
    groups = learner.parameter_groups()
    assert [group.learning_rate for group in groups] == [None, 3e-2] and [len(g.parameters) for g in groups] == [
        1,
        1,
    ]
    assert learner.penalty().item() == pytest.approx(0.5)  # type: ignore[union-attr]
    assert Mask(penalty=0.5).learner(given).penalty().item() == pytest.approx(0.5 * 9 / 2)  # type: ignore[union-attr]


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: BoundlessDAS(vectors=0), "above 0"),
        (lambda: BoundlessDAS(penalty=-1.0), "0 or more"),
        (lambda: BoundlessDAS(first_temperature=0.01), "needed is 0 < the last ≤ the first"),
        (lambda: BoundlessDAS(boundary_start=1.5), "up to 1"),
        (lambda: Mask("axes"), "'neurons', 'pca', 'features'"),
        (lambda: Mask([]), r"Mask\(axes=\[\]\)"),
        (lambda: Mask(last_temperature=2.0), "the last ≤ the first"),
        (lambda: MDAS(2, cause=0, isolate=0), "above 0"),
        (lambda: MDAS(2, isolate=-1.0), "0 or more"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(method: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        method()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (BoundlessDAS(vectors=WIDTH + 1), f"{WIDTH + 1} basis vectors for 2.*possible are 2 to {WIDTH}"),
        (BoundlessDAS(vectors=1), "1 basis vectors for 2 variable"),
        (Mask("features"), "no features are given"),
        (Mask(features=torch.eye(WIDTH)[:1]), "1 feature.* for 2 variables"),
        (Mask(features=torch.eye(5)), r"shape \(5, 5\).*width 32"),
        (
            Mask(features=torch.randn(WIDTH + 4, WIDTH)),
            "36 features in states of width 32 cannot be orthonormal.*Dictionary",
        ),
        (Mask(features=torch.ones(3, WIDTH)), "the features overlap"),
        (MDAS(17), "rank 17 for 2"),
    ],
)
def test_what_does_not_fit_the_site_is_refused_before_the_work(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swept(method, [SITE], pairs=pairs(TWO))


@dataclass(frozen=True)
class Broken(BoundlessDAS):
    """Its penalty is NaN from the fourth step on."""

    def learner(self, problem: Any) -> Any:
        learner = super().learner(problem)
        advance, progress = learner.advance, [0.0]

        def to(now: float) -> None:
            progress[0] = now
            advance(now)

        learner.advance = to  # type: ignore[method-assign, assignment]
        learner.penalty = lambda: torch.tensor(torch.nan if progress[0] > 0.3 else 0.0)  # type: ignore[method-assign]
        return learner


def test_a_loss_that_is_no_number_ends_its_own_fit_alone() -> None:
    found = swept([BoundlessDAS(), Broken(), Mask()], [SITE])
    assert [f.method for f in found.failures] == ["Broken"] and "The loss is [nan] at step 3" in found.failures[
        0
    ].reason
    for method in (BoundlessDAS(), Mask()):
        alone = swept(method, [SITE])[0]
        again = found.where(method=type(method))[0]
        assert alone.losses == again.losses and alone.scores == again.scores
        assert torch.equal(alone.subspace().basis(), again.subspace().basis())


# --- DAS by kinds of pairs ----------------------------------------------------------------------------------

KINDS = tuple(("cause", "isolate", "isolate", "other")[i % 4] for i in range(PAIRS))
WHOLE = TrainingConfig(steps=6, batch_size=PAIRS, learning_rate=0.05, warmup=0.0, schedule="constant")


def of_kinds(rows: Tensor | None = None) -> Counterfactuals:
    data = replace(counterfactuals(0), labels={"kind": KINDS})
    return data if rows is None else data.rows(rows)


def trained(method: Method, data: Counterfactuals) -> tuple[Tensor, list[float]]:
    """By steps on all pairs at once."""
    prepared = PreparedPairs.of(tiny(), data, [{"v": SITE}])
    kinds = tuple(dict.fromkeys(data.kinds))
    learner = method.learner(replace(problem({"v": SITE}, width=WIDTH), kinds=kinds))
    config = replace(WHOLE, batch_size=len(data))
    loss = nn.CrossEntropyLoss(reduction="none")
    losses = train_learners([learner], [from_pool(prepared, {"v": SITE}, config)], [config], loss)
    return learner.alignment().subspace().basis(), losses[0]


def test_a_kind_without_a_weight_is_not_trained_on() -> None:
    rows = {kind: torch.tensor([i for i, one in enumerate(KINDS) if one == kind]) for kind in set(KINDS)}
    for method, kind in ((MDAS(2, isolate=0.0), "cause"), (MDAS(2, cause=0.0), "isolate")):
        one, losses = trained(method, of_kinds())
        other, expected = trained(DAS(2), of_kinds(rows[kind]))
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    plain, _ = trained(DAS(2), of_kinds())
    assert (plain - one).abs().max() > 0.02


def test_the_loss_is_the_weighted_mean_of_the_kinds() -> None:
    def first(method: Method, rows: Tensor | None = None) -> float:
        return trained(method, of_kinds(rows))[1][0]

    cause, isolate = first(MDAS(2, isolate=0.0)), first(MDAS(2, cause=0.0))
    assert first(MDAS(2)) == pytest.approx((cause + isolate) / 2, rel=1e-4)
    assert first(MDAS(2, cause=3.0)) == pytest.approx((3 * cause + isolate) / 4, rel=1e-4)
    assert abs(cause - isolate) > 0.05


def test_a_step_without_a_pair_that_counts_changes_nothing() -> None:
    prepared = PreparedPairs.of(tiny(), of_kinds(), [{"v": SITE}])
    others = torch.tensor([3, 7])
    assert Drawn(prepared, others, {}).weights({"cause": 1.0}).tolist() == [0.0, 0.0]
    assert Drawn(prepared, others, {}).weights(None).tolist() == [0.5, 0.5]
    some = Drawn(prepared, torch.tensor([0, 1, 2, 3]), {}).weights({"cause": 2.0, "isolate": 1.0})
    assert some.tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 0])


def test_kinds_that_are_missing_are_a_failure_with_its_reason() -> None:
    alike = replace(counterfactuals(0), labels={"kind": ("cause",) * PAIRS})
    found = swept([MDAS(2), MDAS(2, isolate=0.0), PCA(2)], [SITE], pairs=pairs(train=alike))
    assert [(f.method, f.reason) for f in found.failures] == [
        (
            "MDAS 2",
            "MDAS 2 needs training pairs of the kind 'isolate' or 'stays'; the kinds here are ['cause'].",
        )
    ]
    assert [fit.method.label for fit in found] == ["MDAS 2 isolate=0.0", "PCA 2"]
    assert not swept(MDAS(2), [SITE], pairs=pairs(train=counterfactuals)).failures


# --- the decoder that comes along ---------------------------------------------------------------------------


def test_boundless_das_ends_within_two_points_of_the_best_fixed_rank() -> None:
    """On price tagging, means over two seeds; the rank that it chooses is one of many possible."""
    source = Source(None, trust_remote_code=False)
    tokenizer, model = load_tokenizer(source), load_causal(source, "cpu", "auto")
    data = load_task("price_tagging").pairs(tokenizer, train=400, dev=40, test=400)
    config = TrainingConfig(steps=60, learning_rate=0.05)
    place = Site("block_output", 1, "last")
    fits = sweep(
        Backbone(model), data, [place], [DAS([1, 4, 8]), BoundlessDAS()], seeds=2, config=config, quiet=True
    )
    *fixed, boundless = fits.mean()
    assert boundless.value >= max(mean.value for mean in fixed) - 0.02
    assert all(1 <= fit.rank < model.config.hidden_size / 2 for fit in boundless.fits)
