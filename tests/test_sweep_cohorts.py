"""Places that train side by side are what they are alone, also where a cohort was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import counterfactuals, pairs, swept

from subspace_lab.core.sites import Site
from subspace_lab.das import _places
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, RandomSubspace
from subspace_lab.das.prepared_pairs import fit as fit_together
from subspace_lab.das.sweeps import SweepInterrupted
from subspace_lab.engine.frozen_past import FrozenPast

ONES = [Site("block_output", layer, "last") for layer in range(3)] + [Site("block_output", 0, "2")]
METHODS = [DAS(2), PCA(2), RandomSubspace(2, draws=2)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At how many places each training was, in their order."""
    found: list[int] = []

    def counted(learners: Any, *rest: Any) -> Any:
        found.append(len({tuple(learner.edits) for learner in learners}))
        return fit_together(learners, *rest)

    monkeypatch.setattr(_places, "fit", counted)
    return found


def alone(monkeypatch: pytest.MonkeyPatch) -> Fits:
    with monkeypatch.context() as patched:
        patched.setattr(FrozenPast, "cohorts", lambda self, sets, rows: [[i] for i in range(len(sets))])
        return swept(METHODS, ONES)


def test_places_train_side_by_side_as_if_alone(trained: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    together = swept(METHODS, ONES)
    assert sum(trained) == 4 and max(trained) > 1
    trained.clear()
    apart = alone(monkeypatch)
    assert trained == [1] * 4
    assert [(f.place, f.method, f.seed) for f in together] == [(f.place, f.method, f.seed) for f in apart]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.subspace().basis(), other.subspace().basis(), rtol=0, atol=1e-4)
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


def test_fresh_pairs_train_a_place_at_a_time(trained: list[int]) -> None:
    swept(DAS(1), ONES[:2], pairs=pairs(train=counterfactuals))
    assert trained == [1, 1]


def test_a_cohort_that_was_interrupted_ends_as_an_undisturbed_one(
    tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first place was kept, the others were not: they are trained again, with it beside them."""
    whole = swept(METHODS, ONES)
    scored, calls = _places.Places._scored, []

    def stopping(self: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(_places.Places, "_scored", stopping)
        with pytest.raises(SweepInterrupted, match="1 of 4 sites"):
            swept(METHODS, ONES, out=tmp_path)
    trained.clear()
    resumed = swept(METHODS, ONES, out=tmp_path)
    assert max(trained) > 1
    assert len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert one.record() == other.record()
        assert torch.equal(one.subspace().basis(), other.subspace().basis())
