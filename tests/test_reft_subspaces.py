"""What an edit of ReFT reads and writes, and its comparison with what DAS finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import fresh
from tiny_sweeps import SITES, WIDTH, made_fit, made_fits

from subspace_lab.analysis.comparisons import compare
from subspace_lab.analysis.geometry import containment, overlap
from subspace_lab.analysis.reft_subspaces import directions, reft_alignments
from subspace_lab.core.interventions import (
    Intervention,
    consreft,
    direft,
    interchange,
    lobireft,
    loreft,
    noreft,
    red,
)
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.das.methods import DAS
from subspace_lab.reft import ReftConfig, get_reft_model


def trained(make: Callable[..., Intervention], rank: int = 3, seed: int = 0, **options: Any) -> Intervention:
    """An edit with random numbers in the place of trained ones."""
    edit = make(WIDTH, rank, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in edit.value.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g))
    return edit


@pytest.mark.parametrize("make", [loreft, noreft, direft, consreft, lobireft])
def test_the_directions_make_the_edit(make: Callable[..., Intervention]) -> None:
    """Σ sᵢ uᵢ vᵢᵀ h is all of the change that depends on the state, and nothing leaves the written span."""
    edit = trained(make)
    found = directions(edit)
    h = torch.randn(20, WIDTH)
    change = (edit(h) - h - (edit(0 * h))).detach().double()  # without the constant part
    if found.read is None:
        assert make is lobireft and change.abs().max() < 1e-6 and found.strengths == (0.0,) * 3
    else:
        k = found.read.rank
        u, v = found.written.basis()[:k].double(), found.read.basis().double()
        expected = (h.double() @ v.T * torch.tensor(found.strengths[:k]).double()) @ u
        torch.testing.assert_close(change, expected, atol=1e-4, rtol=0)
    whole = (edit(h) - h).detach().double()
    inside = found.written.basis().double()
    torch.testing.assert_close(whole @ inside.T @ inside, whole, atol=1e-4, rtol=0)
    assert list(found.strengths) == sorted(found.strengths, reverse=True) and found.written.rank == 3


def test_of_loreft_it_writes_r_and_reads_the_rows_of_w_less_r() -> None:
    edit: Any = trained(loreft)
    found = directions(edit)
    assert overlap(found.written, edit.subspace) == pytest.approx(1, abs=1e-6)
    rows = torch.linalg.svd((edit.value.weight - edit.subspace.basis()).detach())[2][:3]
    assert found.read is not None
    assert overlap(found.read, rows) == pytest.approx(1, abs=1e-5)
    sizes = torch.linalg.svdvals((edit.value.weight - edit.subspace.basis()).detach())
    assert found.strengths == pytest.approx(sizes.tolist(), abs=1e-5)


def test_a_map_of_less_than_full_rank_reads_less() -> None:
    edit: Any = loreft(WIDTH, 3, seed=0)
    with torch.no_grad():
        edit.value.weight.add_(torch.outer(torch.tensor([1.0, 2.0, 0.0]), torch.randn(WIDTH)))
    found = directions(edit)
    assert found.read is not None
    assert found.read.rank == 1 and found.written.rank == 3 and found.strengths[1] < 1e-3
    assert containment(found.read, random_subspace(WIDTH, WIDTH, 0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("edit", [red(WIDTH), interchange(random_subspace(WIDTH, 2, 0)),
                                  loreft(WIDTH, 2, seed=0, activation="relu", start="paper")])  # fmt: skip
def test_what_has_no_directions_is_refused(edit: Intervention) -> None:
    with pytest.raises(TypeError, match="no directions that it reads"):
        directions(edit)


def test_an_adapter_goes_into_compare_beside_das() -> None:
    config = ReftConfig("LoReFT", rank=3, layers=[0, 1], positions="last")
    model = get_reft_model(fresh("llama"), config)
    edit: Any
    for edit in model.edits().values():
        with torch.no_grad():
            edit.value.weight.add_(torch.randn(edit.value.weight.shape))
    sides = reft_alignments(model, "above")
    assert list(sides) == ["written", "read"] and list(sides["read"]) == list(model.edits())
    for site, edit in model.edits().items():
        assert overlap(sides["written"][site].subspace(), edit.subspace) == pytest.approx(1, abs=1e-6)
    site = next(iter(sides["read"]))
    fits = made_fits([made_fit(site, DAS(3), seed, width=32, test=0.9) for seed in range(3)])
    given = {"DAS": fits, "LoReFT, written": sides["written"][site], "LoReFT, read": sides["read"][site]}
    found = compare(given, across="method", within="seed")
    # Each of three with each edit, and the edit's sides with each other; three pairs of seeds.
    assert found.across is not None
    assert found.within is not None
    assert found.across.pairs == 7 and found.within.pairs == 3
    assert found.labels == ("DAS, seed 0", "DAS, seed 1", "DAS, seed 2", "LoReFT, written", "LoReFT, read")
    across = compare({f"{i}": one for i, one in enumerate(sides["written"].values())}, across="layer")
    assert across.across is not None
    assert across.across.pairs == 1


def test_adapters_of_one_seed_share_their_start() -> None:
    """Each counts its layers from 0, so two adapters of one layer each begin in one subspace."""
    sides = []
    for layer in (0, 1):
        model = get_reft_model(fresh("llama"), ReftConfig("LoReFT", rank=3, layers=[layer], positions="last"))
        sides.append(next(iter(reft_alignments(model)["written"].values())))
    assert overlap(*(one.subspace() for one in sides)) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="Trained from one start"):
        compare({"a": sides[0], "b": sides[1]}, across="layer")


def test_no_edits_are_no_subspaces() -> None:
    with pytest.raises(ValueError, match="No edits"):
        reft_alignments({})
    assert set(reft_alignments({SITES[0]: lobireft(WIDTH, 2, seed=0)})["read"]) == set()
