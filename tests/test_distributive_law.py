"""The distributive law: two algorithms with one answer, told apart by what they expect of an interchange."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from subspace_lab.das.methods import DAS
from subspace_lab.das.ranking import rank_hypotheses
from subspace_lab.das.sweeps import sweep
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.distributive_law import (
    HYPOTHESES,
    counterfactuals,
    rivals,
    sample,
    setting,
    train_network,
)
from subspace_lab.tasks.hierarchical_equality import SEARCH_TRAINING, hidden


def equalities(row: list[float]) -> tuple[bool, bool, bool]:
    return row[0:4] == row[4:8], row[8:12] == row[12:16], row[16:20] == row[20:24]


def test_labels_are_those_of_the_formula_and_balanced() -> None:
    inputs, labels = sample(4000, 0)
    assert inputs.shape == (4000, 24) and inputs.abs().max() <= 0.5 and int(labels.sum()) == 2000
    seen: dict[int, set[Any]] = {0: set(), 1: set()}
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        left, middle, right = case = equalities(row)
        assert label == ((left and middle) or (middle and right))
        seen[label].add(case)
    assert len(seen[0]) == 5 and len(seen[1]) == 3
    assert torch.equal(sample(10, 1)[0], sample(10, 1)[0]) and not torch.equal(sample(10, 1)[0], sample(10, 2)[0])


def test_both_algorithms_give_every_input_the_same_answer() -> None:
    inputs, labels = sample(2000, 3)
    for hypothesis in HYPOTHESES:
        assert torch.equal(hypothesis.causal_model.run(setting(inputs))["label"].long(), labels)


def test_expected_answers_are_those_of_each_algorithm() -> None:
    """A batch in one pass, against each pair by itself with Python's own booleans."""
    both = counterfactuals(800, 0)
    first, second = both["And-Or-And"], both["And-Or"]
    assert second.base.positional is not None
    assert first.base.positional is not None
    assert torch.equal(first.base.positional, second.base.positional)
    sources = [[data.sources[v].positional for v in data.sources] for data in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*sources, strict=True))
    alone = set()
    for i, base in enumerate(first.base.positional.tolist()):
        one, other = (source[i].tolist() for source in sources[0])  # type: ignore[index]
        alone.add((one == base, other == base))
        (l1, m1, _), (l2, m2, r2), (_, m, _) = equalities(one), equalities(other), equalities(base)
        assert int(first.answer[i]) == ((l1 and m1) or (m2 and r2))
        assert int(second.answer[i]) == (m1 and (l2 or r2))
        left, _, right = equalities(base)
        assert int(first.base_answer[i]) == int(second.base_answer[i]) == (m and (left or right))
    assert alone == {(True, False), (False, True), (False, False)}


def test_combinations_of_answers_are_equally_frequent() -> None:
    both = counterfactuals(2000, 1)
    codes = both["And-Or"].base_answer + 2 * both["And-Or"].answer + 4 * both["And-Or-And"].answer
    counts = torch.bincount(codes, minlength=8)
    assert counts.min() >= 200 and counts.max() <= 300
    differ = (both["And-Or"].answer != both["And-Or-And"].answer).double().mean()
    assert abs(differ - 0.5) < 0.03


def test_training_pairs_are_fresh_and_held_out_ones_are_not() -> None:
    pairs = rivals(64, 0, dev=32, test=48)
    one, other = pairs["And-Or"], pairs["And-Or-And"]
    assert callable(one.train)
    assert callable(other.train)
    assert torch.equal(one.train(3).base.positional, other.train(3).base.positional)  # type: ignore[arg-type]
    assert torch.equal(one.train(3).base.positional, one.train(3).base.positional)  # type: ignore[arg-type]
    assert not torch.equal(one.train(3).base.positional, one.train(4).base.positional)  # type: ignore[arg-type]
    assert [len(one.dev), len(one.test), len(one.train(0))] == [32, 48, 64]
    assert one.fingerprint() == rivals(64, 0, dev=32, test=48)["And-Or"].fingerprint()
    assert one.fingerprint() != rivals(64, 1, dev=32, test=48)["And-Or"].fingerprint()


def test_a_trained_network_is_searched_for_both() -> None:
    """What the two reach is measured by benchmarks/distributive_law.py; here that the search runs and says so."""
    network, accuracy = train_network(0)
    assert accuracy.value >= 0.99
    pairs, config = rivals(512, 0, dev=256, test=1024), replace(SEARCH_TRAINING, steps=60)
    lab = Backbone(network)
    fits = {
        name: sweep(lab, of, [hidden(1)], [DAS(8)], config=config, min_accuracy=None, quiet=True)
        for name, of in pairs.items()
    }
    found = rank_hypotheses(pairs, fits)
    assert found.n == 1024 and abs(found.agreement["And-Or"]["And-Or-And"] - 0.5) < 0.05
    assert found.best.differing.value > 0.6 and found.best.differing.low > found.best.floor
    with pytest.raises(RuntimeError, match="learned the distributive law"):
        train_network(0, replace(config, steps=2), min_accuracy=0.99)
