"""Hierarchical equality: the task's facts, and that a search finds both equalities at layer 1 and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import subspace_lab
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect
from subspace_lab.tasks.hierarchical_equality import (
    BOTH_EQUALITIES,
    LAYERS,
    LEFT_EQUALITY,
    SEARCH_TRAINING,
    EqualityMLP,
    calibrated,
    counterfactuals,
    fresh,
    hidden,
    sample,
    train_network,
)

SEEDS = range(5)
SHORT = replace(SEARCH_TRAINING, steps=200)  # half of the benchmark's, which gains .01
HELD_OUT, HELD_OUT_SEED, DEV, DEV_SEED = 2048, 1_000_000, 64, 2_000_000


def truth(row: list[float]) -> tuple[bool, bool]:
    """(a = b, c = d) of one input, number by number."""
    return row[0:4] == row[4:8], row[8:12] == row[12:16]


def searched(network: EqualityMLP, seed: int, config: TrainingConfig = SHORT) -> Fits:
    dev, test = counterfactuals(DEV, DEV_SEED), counterfactuals(HELD_OUT, HELD_OUT_SEED)
    return sweep(
        Backbone(network),
        Pairs(fresh(config.batch_size, seed), dev, test),
        [hidden(layer) for layer in range(1, LAYERS + 1)],
        [DAS(8), RandomSubspace(8)],
        config=config,
        seeds=[seed],
        min_accuracy=None,
        quiet=True,
    )


def claim() -> dict[str, Any]:
    """Search every layer of five networks of each kind, with one setting for all.

    {kind: {"iia" and "random subspace": (networks, layers), "floor": (networks,)}}
    """
    kinds = {
        "trained": [train_network(seed)[0] for seed in SEEDS],
        "untrained": [EqualityMLP(seed) for seed in SEEDS],
        "calibrated": [calibrated(EqualityMLP(seed)) for seed in SEEDS],
    }
    told = {}
    for kind, networks in kinds.items():
        results = [searched(network, seed) for seed, network in zip(SEEDS, networks, strict=True)]
        told[kind] = {
            "accuracy": [r.floors["test"].accuracy.value for r in results],
            "iia": [[f.iia.value for f in r.where(method=DAS)] for r in results],
            "random subspace": [[m.value for m in r.where(method=RandomSubspace).mean()] for r in results],
            "floor": [r.floors["test"].highest for r in results],
        }
    return told


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """`claim()` in a process of its own, without the shape checks, which cost ten times the searches."""
    home = str(Path(subspace_lab.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the task -----------------------------------------------------------------------------------------------


def test_labels_are_right_and_the_four_cases_equally_frequent() -> None:
    inputs, labels = sample(1002, 0)
    assert inputs.shape == (1002, 16) and inputs.min() >= -0.5 and inputs.max() < 0.5
    assert inputs.min() < -0.49 and inputs.max() > 0.49
    cases = [truth(row) for row in inputs.tolist()]
    assert labels.tolist() == [int(left == right) for left, right in cases]
    counts = Counter(cases)
    assert len(counts) == 4 and set(counts.values()) == {250, 251}
    # A pair that is unequal is so in all of its numbers: nothing is copied but equal pairs.
    assert not any((row[0] == row[4]) != (row[:4] == row[4:8]) for row in inputs.tolist())
    # In random order: the first half is no other mixture.
    assert 0.4 < labels[:501].float().mean() < 0.6


def test_one_generator_goes_on_and_one_seed_repeats() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = sample(8, generator)[0], sample(8, generator)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, sample(8, 3)[0])


def test_subsets_are_exchanged_as_a_plain_loop_has_it() -> None:
    n = 3000
    pairs = counterfactuals(n, 5)
    assert pairs.base.positional is not None
    base = pairs.base.positional.tolist()
    left, right = (pairs.sources[name].positional.tolist() for name in BOTH_EQUALITIES)  # type: ignore[union-attr]
    subsets: dict[tuple[bool, bool], list[bool]] = {}
    for i in range(n):
        own, of_left, of_right = truth(base[i]), truth(left[i]), truth(right[i])
        assert pairs.base_answer[i] == (own[0] == own[1])
        assert pairs.answer[i] == (of_left[0] == of_right[1])
        moved = (left[i] != base[i], right[i] != base[i])
        subsets.setdefault(moved, []).append(bool(pairs.answer[i] != pairs.base_answer[i]))
    assert set(subsets) == {(True, False), (False, True), (True, True)}
    for changes in subsets.values():
        assert abs(len(changes) / n - 1 / 3) < 0.03
        assert abs(sum(changes) / len(changes) - 0.5) < 0.05
    # The sources are independent of each other and of the base.
    assert all(left[i] != right[i] for i in range(n))


def test_left_equality_takes_a_source_in_every_row() -> None:
    pairs = counterfactuals(2000, 6, LEFT_EQUALITY)
    assert set(pairs.sources) == {"left_equal"}
    assert pairs.base.positional is not None
    assert pairs.sources["left_equal"].positional is not None
    base, left = pairs.base.positional.tolist(), pairs.sources["left_equal"].positional.tolist()
    assert all(a != b for a, b in zip(base, left, strict=True))
    expected = [truth(s)[0] == truth(b)[1] for b, s in zip(base, left, strict=True)]
    assert pairs.answer.tolist() == [int(e) for e in expected]
    assert abs((pairs.answer != pairs.base_answer).float().mean() - 0.5) < 0.05


@pytest.mark.parametrize("variables", [(), ("label",), ("left_equal", "left_equal"), ("left_equal", "middle")])
def test_other_variables_are_refused(variables: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="possible are one or both of"):
        counterfactuals(4, 0, variables)


def test_each_step_has_its_own_pairs() -> None:
    stream = fresh(64, seed=0)
    assert torch.equal(stream(3).base.positional, stream(3).base.positional)  # type: ignore[arg-type]
    batches = [stream(step) for step in range(4)] + [fresh(64, seed=1)(0)]
    batches += [counterfactuals(64, seed) for seed in range(4)]
    rows = [tuple(row) for pairs in batches for row in pairs.base.positional.tolist()]  # type: ignore[union-attr]
    assert len(set(rows)) == len(rows) == 9 * 64


# --- the network --------------------------------------------------------------------------------------------


def test_sites_are_the_states_after_each_relu() -> None:
    network = EqualityMLP(0)
    inputs = sample(10, 0)[0]
    backbone = Backbone(network)
    states = collect(backbone, inputs, [hidden(layer) for layer in range(1, LAYERS + 1)])
    h: Any = inputs
    linear = list(network.layers.children())
    for layer in range(1, LAYERS + 1):
        h = torch.relu(h @ linear[layer - 1].weight.T + linear[layer - 1].bias)
        torch.testing.assert_close(states[hidden(layer)], h)
        assert backbone.width(hidden(layer)) == 16
    torch.testing.assert_close(network(inputs), h @ linear[3].weight.T + linear[3].bias)


def test_a_network_is_its_seed_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    other: Any
    same: Any
    one: Any
    one, same, other = EqualityMLP(1), EqualityMLP(1), EqualityMLP(2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.layers[0].weight, same.layers[0].weight)
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)


def test_networks_learn_the_task() -> None:
    network, told = train_network(0)
    inputs, labels = sample(20_000, 77)
    with torch.no_grad():
        accuracy, untrained = (
            float((n(inputs).argmax(-1) == labels).float().mean()) for n in (network, EqualityMLP(0))
        )
    assert accuracy >= 0.99 and abs(told.value - accuracy) < 0.003 and told.n == 20_000
    assert abs(untrained - 0.5) < 0.02


def test_a_network_that_did_not_learn_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Network 4 learned .* not to 0.99"):
        train_network(4, TrainingConfig(steps=20, batch_size=64))


def test_calibration_gives_both_answers_and_copies() -> None:
    network = EqualityMLP(0)
    inputs = sample(5000, 9)[0]
    with torch.no_grad():
        before = network(inputs)
        after = calibrated(network)(inputs)
        assert torch.equal(before, network(inputs))
    assert before.argmax(-1).unique().numel() == 1  # why the calibration is needed
    assert abs(after.argmax(-1).float().mean() - 0.5) < 0.03
    assert abs((after[:, 1] - after[:, 0]).std() - 2) < 0.1


# --- the claim ----------------------------------------------------------------------------------------------


def test_both_equalities_are_found_at_layer_1_of_trained_networks(figures: dict[str, Any]) -> None:
    """Mean held-out IIA over five networks, one setting for all: at least .80 at layer 1, lower above.

    Published: .842 ± .087, .614, .498 (Sutter et al. 2025); here, with the benchmark's steps, .88, .64, .50.
    """
    trained = figures["trained"]
    iia, floor = torch.tensor(trained["iia"]), torch.tensor(trained["random subspace"])
    assert iia.shape == (5, 3) and min(trained["accuracy"]) >= 0.99
    first, second, third = iia.mean(0).tolist()
    assert first >= 0.80, iia
    assert (iia[:, 0] > iia[:, 1]).all() and (iia[:, 0] > iia[:, 2]).all(), iia
    assert second < 0.75 and third < 0.55, iia
    # Not every subspace does it, nor the network by itself, nor a constant.
    assert (iia[:, 0] > floor[:, 0] + 0.15).all(), (iia, floor)
    assert max(trained["floor"]) < 0.55


@pytest.mark.parametrize("kind", ["untrained", "calibrated"])
def test_untrained_networks_have_neither_equality(figures: dict[str, Any], kind: str) -> None:
    """.50 ± .02 at every layer; calibrated, the networks could have scored otherwise."""
    iia = torch.tensor(figures[kind]["iia"])
    assert iia.shape == (5, 3)
    assert ((iia.mean(0) - 0.5).abs() <= 0.02).all(), iia
    assert iia.max() < 0.56, iia


def test_the_same_seeds_give_the_same_result() -> None:
    config = TrainingConfig(steps=30, batch_size=128, learning_rate=1e-2)
    short = TrainingConfig(steps=10, learning_rate=0.1, batch_size=64)

    def run(seed: int) -> Fits:
        return searched(train_network(seed, config, min_accuracy=0.0)[0], seed, short)

    one, same, other = run(0), run(0), run(1)
    assert one.as_dict() == same.as_dict()
    for a, b in zip(one, same, strict=True):
        for name in BOTH_EQUALITIES:
            assert torch.equal(a.subspace(name).basis(), b.subspace(name).basis())
    assert one.as_dict() != other.as_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(claim()))
