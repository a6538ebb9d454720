"""Fits on disk: every cell comes back bit for bit, or nothing is written and the reason is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, random_subspace
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import (
    DAS,
    PCA,
    DifferenceOfMeans,
    FullVector,
    Learner,
    Method,
    Problem,
    RandomSubspace,
)
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH = 16
FILES = {"fits.json", "subspaces.safetensors"}


@dataclass(frozen=True)
class FirstAxes(Method):
    """A method of somebody's own: the first axes of the states."""

    rank: int | Sequence[int] = 2

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.rank, int)
        axes = Axes(problem.width("v"), range(self.rank))
        return Learner({"v": (problem.sites["v"], axes)})


def pairs_of(n: int, seed: int) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    base, source = (torch.randn(n, 8, generator=g) for _ in range(2))
    before, after = (torch.randint(0, 3, (n,), generator=g) for _ in range(2))
    return Counterfactuals(Batch.of(base), {"v": Batch.of(source)}, before, after, ("a", "b", "c"))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)]
    return nn.Sequential(*layers)


def swept(methods: Sequence[Method], **changes: object) -> Fits:
    pairs = Pairs(pairs_of(40, 0), pairs_of(30, 1), pairs_of(50, 2), task="made up")
    sites = [Site(f"{i}.output") for i in (0, 1, 2, 3)]
    options: dict[str, Any] = {
        "seeds": 3,
        "config": TrainingConfig(steps=3),
        "min_accuracy": None,
        "quiet": True,
        **changes,
    }
    return sweep(Backbone(network()), pairs, sites, methods, **options)


@pytest.fixture(scope="module")
def fits() -> Fits:
    ranks = [1, 2, 4]
    return swept([DAS(ranks), RandomSubspace(ranks, draws=3), DAS(ranks, learning_rate=0.1)])


def test_all_cells_come_back_bit_for_bit(fits: Fits, tmp_path: Path) -> None:
    assert len(fits) == 3 * 3 * 3 * 4
    fits.save(tmp_path / "sweep")
    again = Fits.load(tmp_path / "sweep")
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == FILES
    assert again == fits and repr(again) == repr(fits) and again.records() == fits.records()
    assert len({(f.method, f.place, f.seed) for f in again}) == 108
    for a, b in zip(fits, again, strict=True):
        assert (a.method, a.seed, a.start, a.scores, a.losses) == (b.method, b.seed, b.start, b.scores, b.losses)
        assert a.start_overlap == b.start_overlap and a.alignment.facts == b.alignment.facts
        assert torch.equal(a.subspace("v").basis(), b.subspace("v").basis())
        assert torch.equal(a.pair_scores["iia"], b.pair_scores["iia"])
        assert a.pair_scores["iia"].mean().item() == pytest.approx(a.iia.value)
    assert again.floors == fits.floors and again.facts == fits.facts


def test_every_method_and_kind_of_subspace_comes_back(tmp_path: Path) -> None:
    given = swept([DifferenceOfMeans(), PCA(2), FullVector(), FirstAxes(), DAS(2, orthonormalise="polar")])
    given.save(tmp_path)
    again = Fits.load(tmp_path, methods=[FirstAxes])
    assert again == given and [f.method for f in again] == [f.method for f in given]
    kinds = {type(f.subspace()) for f in again}
    assert kinds == {Axes, FixedSubspace}
    for a, b in zip(given, again, strict=True):
        assert type(a.subspace()) is type(b.subspace()) and torch.equal(a.subspace().basis(), b.subspace().basis())
    # No d × d matrix for a full vector.
    assert (tmp_path / "subspaces.safetensors").stat().st_size < 100_000


def test_a_method_whose_class_is_not_there_can_be_read_but_not_run(tmp_path: Path) -> None:
    given = swept([FirstAxes(3)])
    given.save(tmp_path)
    again = Fits.load(tmp_path)
    assert again.methods == ["FirstAxes 3"] and again.records() == given.records() and not again[0].method.control
    problem = Problem({}, {}, 0, torch.device("cpu"), lambda _: torch.zeros(1, 1), lambda _: torch.zeros(1).long())
    with pytest.raises(TypeError, match="FirstAxes 3 was saved by a class FirstAxes that is not known here"):
        again[0].method.learner(problem)


def test_several_variables_and_failures_come_back(tmp_path: Path) -> None:
    data = pairs_of(40, 0)
    two = {"v": data.sources["v"], "w": pairs_of(40, 5).sources["v"]}
    train, dev, test = (replace(data, sources=two) for _ in range(3))
    pairs = Pairs(train, dev, test)
    sites: list[Any] = [Site("1.output"), {"v": Site("1.output"), "w": Site("3.output")}]
    flat = replace(pairs.train, values={"v": torch.zeros(40, dtype=torch.long)})  # type: ignore[type-var]
    given = sweep(
        Backbone(network()), replace(pairs, train=flat), sites, [DAS(2), DifferenceOfMeans()],
        config=TrainingConfig(steps=2), min_accuracy=None, quiet=True,
    )  # fmt: skip
    assert len(given) == 2 and len(given.failures) == 2 and "1 class" in given.failures[0].reason
    given.save(tmp_path)
    again = Fits.load(tmp_path)
    assert again == given and again.failures == given.failures
    assert again[1].sites == sites[1]
    for a, b in zip(given, again, strict=True):
        for name in ("v", "w"):
            assert torch.equal(a.subspace(name).basis(), b.subspace(name).basis())
    assert len(again[0].alignment.edits()) == 1 and len(again[1].alignment.edits()) == 2


# --- refused ------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(fits: Fits, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        fits.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_json_does_not_hold_is_refused_before_anything_is_written(fits: Fits, tmp_path: Path) -> None:
    strange = replace(fits, facts={**fits.facts, "threshold": float("nan")})
    with pytest.raises(TypeError, match="Nothing was written"):
        strange.save(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_belong_together_are_refused(fits: Fits, tmp_path: Path) -> None:
    fits.save(tmp_path / "a")
    fits[:4].save(tmp_path / "b")
    (tmp_path / "a" / "fits.json").replace(tmp_path / "b" / "fits.json")
    with pytest.raises(ValueError, match="were not written together"):
        Fits.load(tmp_path / "b")


@pytest.mark.parametrize("break_it", ["cut", "no json", "list", "number changed", "no numbers"])
def test_broken_files_are_named(fits: Fits, tmp_path: Path, break_it: str) -> None:
    folder = tmp_path / "sweep"
    fits[:2].save(folder)
    records, numbers = folder / "fits.json", folder / "subspaces.safetensors"
    if break_it == "cut":
        numbers.write_bytes(numbers.read_bytes()[:200])
    elif break_it == "no json":
        records.write_text("{")
    elif break_it == "list":
        records.write_text("[1]")
    elif break_it == "number changed":
        found = json.loads(records.read_text())
        found["fits"][0]["scores"]["test"]["iia"]["value"] = 1.0
        records.write_text(json.dumps(found))
    else:
        numbers.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="sweep"):
        Fits.load(folder)


def test_other_folders_are_told_apart(fits: Fits, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no fits.json in .*nowhere"):
        Fits.load(tmp_path / "nowhere")
    fits[:1].save(tmp_path / "search" / "model")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*model"):
        Fits.load(tmp_path / "search")


def test_a_search_of_version_0_1_says_how_to_read_it(tmp_path: Path) -> None:
    from subspace_lab.core.checkpoints import load_subspaces, save_subspaces

    save_subspaces(tmp_path / "subspaces.safetensors", {"block_output[1]@last/v": random_subspace(8, 2, 0)})
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"version 0.1.*load_subspaces"):
        Fits.load(tmp_path)
    assert list(load_subspaces(tmp_path / "subspaces.safetensors")) == ["block_output[1]@last/v"]
