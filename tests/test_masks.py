"""Masks over coordinates: soft, hard, and what an exchange with them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab.core.checkpoints import load_edits, save_edits
from subspace_lab.core.interventions import Intervention, full_vector, interchange
from subspace_lab.core.masks import Boundaries, Gates, Mask, Masked
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, LearnedSubspace

WIDTH = 12


def states(seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 5, 2, WIDTH, generator=g, dtype=torch.double))


def rotated(rank: int = WIDTH) -> LearnedSubspace:
    return LearnedSubspace(WIDTH, rank, seed=1).double()


def boundaries(shares: list[float], temperature: float, rank: int = WIDTH) -> Boundaries:
    found = Boundaries(rank, len(shares), temperature).double()
    found.shares.data = torch.tensor(shares, dtype=torch.double)
    return found


def gates(logits: list[list[float]], temperature: float) -> Gates:
    found = Gates(len(logits[0]), len(logits), temperature).double()
    found.logits.data = torch.tensor(logits, dtype=torch.double)
    return found


def test_boundaries_are_their_formula() -> None:
    mask = boundaries([0.25, 0.5], 0.7)()
    i = torch.arange(WIDTH, dtype=torch.double) + 0.5
    for row, (left, right) in zip(mask, [(0.0, 3.0), (3.0, 9.0)], strict=True):
        torch.testing.assert_close(row, 1 / (1 + ((left - i) / 0.7).exp()) / (1 + ((i - right) / 0.7).exp()))


def test_gates_are_a_sigmoid_and_together_at_most_one() -> None:
    logits = torch.linspace(-2, 2, WIDTH, dtype=torch.double)
    torch.testing.assert_close(gates([logits.tolist()], 0.5)()[0], torch.sigmoid(logits / 0.5))
    several = gates([logits.tolist(), logits.flip(0).tolist()], 0.3)()
    assert (several.sum(0) < 1).all() and several.sum(0).max() > 0.9


@pytest.mark.parametrize("mask", [
    boundaries([0.3, 0.4], 1e-3),
    gates([[1.0, -1, 2, -3] * 3, [-1.0, 1, 3, -1] * 3], 1e-3),
])  # fmt: skip
def test_a_cold_mask_is_hard_and_exchanges_the_chosen_subspaces(mask: Mask) -> None:
    """In float64 as DAS does it, with the basis vectors that the mask chose."""
    chosen = mask.chosen()
    hard = torch.stack([torch.isin(torch.arange(WIDTH), torch.tensor(own)).double() for own in chosen])
    torch.testing.assert_close(mask(), hard, rtol=0, atol=1e-12)
    h, one, other = states()
    whole = rotated()
    soft = Intervention(whole, Masked(mask, ["v", "w"]))
    found = soft(h, {"v": one, "w": other})
    rows = {name: whole.picked(own) for name, own in zip("vw", chosen, strict=True)}
    expected = interchange(rows).double()(h, {"v": one, "w": other})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # One variable left out stays the base's.
    torch.testing.assert_close(
        soft(h, {"w": other}), interchange(rows["w"]).double()(h, other), rtol=0, atol=1e-10
    )


def test_an_exchange_by_a_soft_mask_is_its_formula() -> None:
    h, source, _ = states()
    whole, mask = rotated(7), boundaries([0.5], 1.3, rank=7)
    r, m = whole.basis(), mask()[0]
    expected = h + ((source @ r.T - h @ r.T) * m) @ r
    torch.testing.assert_close(Intervention(whole, Masked(mask))(h, source), expected)
    assert 0.05 < m.min() < m.max() < 0.95
    out = Intervention(whole, Masked(mask))(h, source)
    rows = torch.autograd.grad(out.square().sum(), [whole.raw, mask.shares])
    assert all(gradient.abs().max() > 0 for gradient in rows)


@pytest.mark.parametrize("whole", [Axes(WIDTH), FixedSubspace(rotated().basis().detach())])
def test_all_gates_open_are_the_full_vector_and_all_closed_no_edit(whole: Axes | FixedSubspace) -> None:
    h, source, _ = states()
    opened = Intervention(whole, Masked(gates([[9.0] * WIDTH], 0.1)))
    torch.testing.assert_close(opened(h, source), full_vector(WIDTH)(h, source), rtol=0, atol=1e-10)
    closed = Intervention(whole, Masked(gates([[-9.0] * WIDTH], 0.1)))
    torch.testing.assert_close(closed(h, source), h, rtol=0, atol=1e-10)


def test_each_variable_has_at_least_one_coordinate_and_none_is_shared() -> None:
    for shares in ([0.001, 0.002, 0.003], [0.9, 0.05, 0.05], [0.3, 0.6, 0.9]):
        mask = boundaries(shares, 1.0)
        mask.keep_possible()
        assert mask.shares.sum() <= 1 + 1e-9 and mask.shares.min() >= 1 / WIDTH - 1e-9
        chosen = mask.chosen()
        flat = [i for own in chosen for i in own]
        assert flat == list(range(len(flat))) and len(flat) <= WIDTH and all(chosen)
    assert boundaries([1.0], 1.0).chosen() == [list(range(WIDTH))]
    assert boundaries([3.4 / WIDTH], 1.0).chosen() == [[0, 1, 2]]
    # Gates without an open one take their best, and of two that want the same one goes without it.
    assert gates([[-3.0, -1, -2]], 1.0).chosen() == [[1]]
    assert gates([[2.0, -1, -5], [1.0, -4, -3]], 1.0).chosen() == [[0], [2]]
    assert gates([[2.0, -1, 1], [-9.0, -9, -9]], 1.0).chosen() == [[0, 2], [1]]
    assert gates([[3.0, 2.0], [2.0, 1.0]], 1.0).chosen() in ([[0], [1]], [[1], [0]])


def test_keeping_possible_shares_changes_none_that_are_possible() -> None:
    mask = boundaries([0.2, 0.5], 1.0)
    mask.keep_possible()
    torch.testing.assert_close(mask.shares.data, torch.tensor([0.2, 0.5], dtype=torch.double), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [Boundaries(WIDTH, 2, 0.4, 0.6), Gates(WIDTH, 2, 0.4)])
def test_masks_are_saved_and_loaded_to_the_bit(mask: Mask, tmp_path: Path) -> None:
    with torch.no_grad():
        for p in mask.parameters():
            p.add_(0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))
    site, edit = (
        Site("block_output", 0, "last"),
        Intervention(LearnedSubspace(WIDTH, WIDTH, seed=1), Masked(mask, ["v", "w"])),
    )
    save_edits(tmp_path / "edits", {site: edit})
    again: Any = load_edits(tmp_path / "edits")[site]
    h, one, other = (part.float() for part in states())
    given = {"v": one, "w": other}
    assert torch.equal(again(h, given), edit(h, given)) and torch.equal(again.value.mask(), mask())
    assert again.value.mask.chosen() == mask.chosen() and next(again.value.mask.parameters()).requires_grad


def test_what_a_mask_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="3 variables share 2 coordinates"):
        Gates(2, 3)
    with pytest.raises(ValueError, match="temperature=0"):
        Boundaries(4, 1, 0.0)
    with pytest.raises(ValueError, match=r"start=1\.5"):
        Boundaries(4, 1, 1.0, 1.5)
    with pytest.raises(ValueError, match="2 variables and the names"):
        Masked(Gates(4, 2))
    edit = Intervention(rotated(3), Masked(gates([[0.0] * 4], 1.0)))
    h, source, _ = states()
    with pytest.raises(ValueError, match="mask over 4 coordinates for a subspace of rank 3"):
        edit(h, source)
    one = Intervention(rotated(4), Masked(gates([[0.0] * 4], 1.0)))
    with pytest.raises(ValueError, match="one tensor"):
        one(h, {"v": source})
    with pytest.raises(ValueError, match="positions and width must agree"):
        one(h, source[:1])
    two = Intervention(rotated(4), Masked(gates([[0.0] * 4] * 2, 1.0), ["v", "w"]))
    with pytest.raises(ValueError, match=r"variables \['v', 'w'\].*found \['u'\]"):
        two(h, {"u": source})
