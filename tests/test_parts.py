"""Parts of one basis: what trains and what stays, gradients, values by part, and slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab.core import orthonormal
from subspace_lab.core.interventions import Intervention, interchange, red
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.parts import PartedSubspace
from subspace_lab.core.subspaces import Axes, FixedSubspace, FreeDirections, LearnedSubspace, random_subspace
from subspace_lab.core.values import Affine, ByPart, Constant, Diagonal, FromSource

SIZES = {"one": 2, "two": 3, "three": 1}
WIDTH = 9


def parted(moving: tuple[str, ...], seed: int = 0) -> PartedSubspace:
    """A basis whose moving parts are off their start, so that they are not orthonormal as they are."""
    made = PartedSubspace(WIDTH, SIZES, seed=seed, moving=moving).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name in moving:
            made.raw[name].add_(0.5 * torch.randn(made.raw[name].shape, generator=generator, dtype=torch.float64))
    return made


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("moving", [("one",), ("two", "three"), ("one", "two", "three")], ids=str)
def test_the_basis_and_its_gradient_are_those_of_a_projection_and_a_qr(moving: tuple[str, ...]) -> None:
    basis, weight = parted(moving), states(6, WIDTH, seed=5)
    resting = torch.cat([basis.raw[n].detach().T for n in SIZES if n not in moving] or [torch.zeros(0, WIDTH)])
    raw = {name: basis.raw[name].detach().clone().requires_grad_(True) for name in moving}
    stacked = torch.cat(list(raw.values()), 1)
    q, t = torch.linalg.qr(stacked - resting.T.double() @ (resting.double() @ stacked))
    blocks = dict(zip(moving, (q * t.diagonal().sign()).T.split([SIZES[n] for n in moving]), strict=True))
    expected = torch.cat([blocks.get(n, basis.raw[n].detach().T) for n in SIZES])
    torch.testing.assert_close(basis.basis(), expected)
    # The start was drawn in float32, so the vectors that stay are orthonormal to that.
    torch.testing.assert_close(expected @ expected.T, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    (basis.basis() * weight).sum().backward()
    (expected * weight).sum().backward()
    for name in SIZES:
        if name in moving:
            torch.testing.assert_close(basis.raw[name].grad, raw[name].grad)
        else:
            assert basis.raw[name].grad is None
            assert torch.equal(basis.part(name).basis(), basis.raw[name].T)  # to the bit


def test_one_factorisation_serves_all_uses_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Any
    calls, true = [], orthonormal.thin_qr
    monkeypatch.setattr(orthonormal, "thin_qr", lambda a: calls.append(1) or true(a))
    values = {name: Affine(WIDTH, size, seed=0) for name, size in SIZES.items()}
    edit = Intervention(PartedSubspace(WIDTH, SIZES, start=random_orthonormal(WIDTH, 6, 0)), ByPart(values, SIZES))
    optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
    calls.clear()
    for _ in range(5):
        optimizer.zero_grad()
        (edit(torch.randn(4, WIDTH)) + edit(torch.randn(4, WIDTH))).square().sum().backward()
        optimizer.step()
    assert len(calls) == 5
    # What moves is a state of its own: the same numbers with another part moving are another basis.
    basis = parted(("one", "two", "three"))
    before = basis.basis().detach()
    basis.moving = ("two",)
    assert not torch.allclose(basis.basis(), before)


def test_a_copy_goes_its_own_way() -> None:
    basis = parted(("two",))
    twin = copy.deepcopy(basis)
    assert torch.equal(twin.basis(), basis.basis()) and twin.moving == ("two",)
    twin.train_parts(["one"])
    torch.testing.assert_close(twin.basis(), basis.basis())  # another part trains from here; nothing moved yet
    assert basis.moving == ("two",)
    with pytest.raises(ValueError, match=r"Parts \['four'\] asked for; there are \['one', 'two', 'three'\]"):
        twin.train_parts(["four"])
    with pytest.raises(ValueError, match=r"a LearnedSubspace has none"):
        LearnedSubspace(WIDTH, 2, seed=0).train_parts(["one"])
    with pytest.raises(KeyError):
        twin.part("four")


def test_slices_of_slices() -> None:
    for whole in (
        random_subspace(WIDTH, 7, 0),
        LearnedSubspace(WIDTH, 7, seed=0),
        Axes(WIDTH, [8, 1, 3, 5, 0, 2, 7]),
    ):
        outer = whole.partition({"skipped": 2, "outer": 4})["outer"]
        inner = outer.partition({"skipped": 1, "inner": 2})["inner"]
        expected = whole.basis()[3:5]
        assert torch.equal(inner.basis(), expected) and torch.equal(inner.frozen().basis(), expected)
        assert torch.equal(inner.sliced(1, 2).basis(), expected[1:]) and inner.frozen().rank == 2
        assert type(inner.frozen()) is (Axes if isinstance(whole, Axes) else FixedSubspace)


def test_the_span_of_free_directions() -> None:
    free = FreeDirections(WIDTH, 3, start=random_orthonormal(WIDTH, 3, 0))
    torch.testing.assert_close(free.frozen().basis(), free.basis().detach())  # orthonormal ones are themselves
    with torch.no_grad():
        free.directions.mul_(4).add_(0.3)
    span, directions = free.frozen().basis(), free.directions.detach()
    torch.testing.assert_close(directions @ span.T @ span, directions, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        free.directions[2] = free.directions[0] - free.directions[1]
    with pytest.raises(ValueError, match="The 3 directions span a subspace of a smaller rank"):
        free.frozen()


def test_values_by_part_take_sources_of_their_own() -> None:
    """A part that is swapped beside a part that is set: only the first needs a source, and takes its own."""
    basis, sizes = random_subspace(WIDTH, 4, 0).double(), {"swapped": 1, "set": 2, "also swapped": 1}
    values = {"swapped": FromSource(), "set": Constant(torch.tensor([1.0, -1.0]), False)}
    values["also swapped"] = FromSource()
    edit = Intervention(basis, ByPart(values, sizes)).double()
    assert edit.needs_source
    assert not Intervention(basis, ByPart({"set": values["set"]}, {"set": 2})).needs_source
    h, one, other = states(5, WIDTH), states(5, WIDTH, seed=1), states(5, WIDTH, seed=2)
    r = basis.basis()
    found = edit(h, {"swapped": one, "also swapped": other}) @ r.T
    expected = torch.cat([one @ r[:1].T, torch.tensor([[1.0, -1.0]] * 5, dtype=torch.float64), other @ r[3:].T], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # a basis drawn in float32
    edit.value.use_parts(["set"])
    torch.testing.assert_close((edit(h) @ r.T)[:, [0, 3]], (h @ r.T)[:, [0, 3]], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"Parts \['none'\] asked for"):
        edit.value.use_parts(["none"])
    with pytest.raises(ValueError, match="a FromSource has none"):
        interchange(basis).value.use_parts(["one"])
    with pytest.raises(ValueError, match="Values for the parts"):
        ByPart(values, {"swapped": 4})


@pytest.mark.parametrize("write", [True, False])
def test_a_diagonal_writes_or_adds(write: bool) -> None:
    """h + Rᵀ(s ⊙ R h + b − c·R h), over the whole stream and in a subspace."""
    for subspace in (Axes(WIDTH), random_subspace(WIDTH, 3, 0), Axes(WIDTH, [4, 1])):
        edit: Any = Intervention(subspace, Diagonal(subspace.rank), write=write).double()
        with torch.no_grad():
            edit.value.scale.copy_(states(subspace.rank))
            edit.value.bias.copy_(states(subspace.rank, seed=1))
        h, r = states(5, WIDTH, seed=2), subspace.basis().double()
        z = edit.value.scale * (h @ r.T) + edit.value.bias
        torch.testing.assert_close(edit(h), h + (z - write * h @ r.T) @ r)
    assert torch.equal(red(WIDTH)(h.float()), h.float())


def test_what_is_affine_is_folded_and_what_is_not_is_copied() -> None:
    h = torch.randn(4, WIDTH)
    by_example = Intervention(random_subspace(WIDTH, 2, 0), Constant(torch.randn(4, 2), learned=False))
    folded = by_example.folded()
    assert type(folded.value) is Constant and torch.equal(folded(h), by_example(h))
    values = {"a": Affine(WIDTH, 1, seed=0), "b": Affine(WIDTH, 2, "relu", seed=0)}
    mixed = Intervention(random_subspace(WIDTH, 3, 0), ByPart(values, {"a": 1, "b": 2}))
    assert type(mixed.folded().value) is ByPart
    double = Intervention(random_subspace(WIDTH, 2, 0), Affine(WIDTH, 2, seed=0)).double()
    assert double.folded().subspace.basis().dtype == torch.float64
    torch.testing.assert_close(double.folded()(h.double()), double(h.double()))
