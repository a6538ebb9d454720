"""Interventions trained side by side: each comes out as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das.methods import DAS, Learner
from subspace_lab.das.objectives import cross_entropy
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs, fit, from_pool
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.stacking import Stack, rows_of, split
from subspace_lab.engine.training import TrainingConfig, train, train_together
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH, ROWS, LENGTH = 32, 40, 9


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return Backbone(GPT2LMHeadModel(config).eval())


def pairs(seed: int) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 50, (ROWS, LENGTH), generator=g) for _ in range(2)]
    base, source = (Batch({"input_ids": i, "attention_mask": torch.ones_like(i)}) for i in ids)
    answer = torch.randint(0, 2, (ROWS,), generator=g)
    return Counterfactuals(base, {"v": source}, answer, answer, ("a", "b"), torch.tensor([7, 9]))


def test_shares_are_edited_by_their_own_intervention() -> None:
    edits = [loreft(WIDTH, k, seed=k, start="paper") for k in (1, 3)]
    h = torch.randn(6, 2, WIDTH)
    assert torch.equal(Stack(edits)(h), torch.cat([edits[0](h[:3]), edits[1](h[3:])]))
    swaps = [interchange(LearnedSubspace(WIDTH, k, seed=k)) for k in (1, 3)]
    source = torch.randn(6, 2, WIDTH)
    whole = Stack(swaps)(h, source)
    assert torch.equal(whole[3:], swaps[1](h[3:], source[3:]))
    assert not torch.equal(whole[:3], swaps[1](h[:3], source[:3]))


def test_sources_of_several_variables_are_split_by_rows() -> None:
    source = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    assert [part["b"].tolist() for part in split(source, 2)] == [[10, 11], [12, 13]]
    assert rows_of(source, torch.tensor([3, 0]))["a"].tolist() == [3, 0]


@pytest.mark.parametrize("rows", [5, 7])
def test_rows_that_do_not_divide_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows do not divide into 2"):
        Stack([loreft(WIDTH, 1, seed=0)] * 2)(torch.randn(rows, WIDTH))
    with pytest.raises(ValueError, match="at least one"):
        Stack([])


def test_together_equals_alone(backbone: Backbone) -> None:
    site = Site("block_output", 1, "last")
    place = {"v": site}
    ready = PreparedPairs.of(backbone, pairs(0), [place])
    cells = [(1, 0, 1e-2), (4, 0, 1e-2), (4, 1, 3e-2), (2, 2, 1e-3)]
    configs = [TrainingConfig(steps=12, batch_size=16, seed=s, learning_rate=rate) for _, s, rate in cells]

    def learners() -> list[Learner]:
        return [
            Learner({"v": (site, LearnedSubspace(WIDTH, k, seed=10 + i))}, 10 + i)
            for i, (k, _, _) in enumerate(cells)
        ]

    def train_all(some: list[Learner], of: list[TrainingConfig]) -> list[list[float]]:
        return fit(some, [from_pool(ready, place, c) for c in of], of, cross_entropy)

    together = learners()
    losses = train_all(together, configs)
    for i, alone in enumerate(learners()):
        start = alone.subspaces["v"][1].basis().detach().clone()
        (own,) = train_all([alone], [configs[i]])
        torch.testing.assert_close(torch.tensor(losses[i]), torch.tensor(own), rtol=1e-5, atol=1e-6)
        found = alone.subspaces["v"][1].basis()
        torch.testing.assert_close(together[i].subspaces["v"][1].basis(), found, rtol=0, atol=2e-4)
        # The control: training went further than the tolerance.
        assert (found - start).abs().max() > 2e-3


def test_a_sweep_over_ranks_seeds_and_rates_finds_what_single_ones_find(backbone: Backbone) -> None:
    sites = [Site("block_output", layer, "last") for layer in (0, 1)]
    given = Pairs(pairs(0), pairs(2), pairs(1))
    common: dict[str, Any] = {
        "config": TrainingConfig(steps=6, batch_size=16),
        "min_accuracy": None,
        "quiet": True,
    }
    whole = sweep(backbone, given, sites, [DAS([1, 3], learning_rate=[1e-2, 5e-2])], seeds=[0, 5], **common)
    assert len(whole) == 2 * 2 * 2 * 2
    for found in whole[::3]:
        (alone,) = sweep(backbone, given, [found.site], [found.method], seeds=[found.seed], **common)
        assert alone.loss == pytest.approx(found.loss, rel=1e-4)
        torch.testing.assert_close(alone.subspace().basis(), found.subspace().basis(), rtol=0, atol=1e-3)


def test_one_module_is_clipped_and_decayed_by_its_own_configuration() -> None:
    def linear() -> nn.Linear:
        torch.manual_seed(3)
        return nn.Linear(4, 4)

    x = torch.randn(8, 4)
    configs = [
        TrainingConfig(steps=5, max_gradient_norm=1e-3),
        TrainingConfig(steps=5, weight_decay=0.5, learning_rate=0.1),
    ]
    modules = [linear(), linear()]
    train_together(modules, lambda _: torch.stack([m(x).square().mean() for m in modules]), configs)
    for module, config in zip(modules, configs, strict=True):
        alone = linear()
        train([alone], lambda _, alone=alone: alone(x).square().mean(), config)  # type: ignore[misc]
        assert torch.equal(alone.weight, module.weight)


def test_unequal_steps_are_refused() -> None:
    modules = [nn.Linear(1, 1), nn.Linear(1, 1)]
    with pytest.raises(ValueError, match="equal steps"):
        train_together(modules, lambda _: torch.zeros(2), [TrainingConfig(steps=1), TrainingConfig(steps=2)])
