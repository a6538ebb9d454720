"""Subspaces: the laws of a lens, the factorisation and its gradient, its cache, and the ready-made spans."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies._internal.strategies import SearchStrategy
from torch import Tensor, nn

from subspace_lab.core import orthonormal
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    Part,
    difference_of_means,
    pca,
    random_subspace,
)

KINDS = ("qr", "polar")
PRECISIONS = ("fp32", "fp64", "bf16 stream")


def learned(
    width: int, rank: int, seed: int = 0, kind: Literal["qr", "polar"] = "qr", moved: bool = True
) -> LearnedSubspace:
    """A subspace, by default away from its start, so that its raw matrix is not orthonormal."""
    made = LearnedSubspace(width, rank, seed=seed, orthonormalise=kind)
    if moved:
        with torch.no_grad():
            made.raw.add_(torch.randn(made.raw.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return made


def projector(basis: Tensor) -> Tensor:
    return basis.T.double() @ basis.double()


def counting(monkeypatch: pytest.MonkeyPatch, name: str = "thin_qr") -> list[Any]:
    """How often the factorisation is evaluated from here on."""
    calls: Any = []
    true = getattr(orthonormal, name)
    monkeypatch.setattr(orthonormal, name, lambda a: calls.append(a.shape) or true(a))
    return calls


# --- the laws of a lens -------------------------------------------------------------------------------------

SHAPES = st.integers(1, 12).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d)))


def cases(kinds: list[Callable[..., Any]]) -> SearchStrategy[Any]:
    """(subspace, stream dtype, tolerance, seed)"""

    def make(drawn: Any) -> tuple[Any, torch.dtype, float, Any]:
        (width, rank), seed, precision, kind = drawn
        made = kind(width, rank, seed)
        if precision == "fp64":
            return made.double(), torch.float64, 1e-11, seed
        made = made.float()
        if precision == "bf16 stream":
            return made, torch.bfloat16, 0.05, seed
        return made, torch.float32, 2e-5, seed

    return st.tuples(SHAPES, st.integers(0, 1000), st.sampled_from(PRECISIONS), st.sampled_from(kinds)).map(make)


KINDS_OF_LENSES = [
    lambda d, k, seed: learned(d, k, seed, "qr"),
    lambda d, k, seed: learned(d, k, seed, "polar"),
    lambda d, k, seed: learned(d, k, seed).double().frozen(),
    lambda d, k, seed: Axes(d, torch.randperm(d, generator=torch.Generator().manual_seed(seed))[:k].tolist()),
    lambda d, k, seed: learned(d, d, seed).partition({"rest": d - k, "part": k} if k < d else {"part": k})["part"],
]


@settings(max_examples=150)
@given(cases(KINDS_OF_LENSES))
def test_laws_of_a_lens(case: Any) -> None:
    subspace, dtype, tolerance, seed = case
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, 3, subspace.width, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, other = torch.randn(2, 2, 3, subspace.rank, generator=generator).to(wide)
    written = subspace.write(h, z)
    assert written.dtype == h.dtype and subspace.read(h).dtype == wide
    # read after write, write after read, and the second write wins
    torch.testing.assert_close(subspace.read(written), z, rtol=tolerance, atol=tolerance)
    assert torch.equal(subspace.write(h, subspace.read(h)), h)
    torch.testing.assert_close(
        subspace.write(written, other), subspace.write(h, other), rtol=2 * tolerance, atol=2 * tolerance
    )
    # The complement: what a projector made in float64 takes away from both must be the same.
    outside = torch.eye(subspace.width, dtype=torch.float64) - projector(subspace.basis().detach())
    torch.testing.assert_close(
        written.double() @ outside, h.double() @ outside, rtol=2 * tolerance, atol=2 * tolerance
    )
    # embed and swap in terms of the verbs
    torch.testing.assert_close(subspace.read(subspace.embed(z)), z, rtol=tolerance, atol=tolerance)
    source = torch.randn(2, 3, subspace.width, generator=generator).to(dtype)
    expected = subspace.write(h, subspace.read(source))
    torch.testing.assert_close(subspace.swap(h, source), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(subspace.swap(h, h), h)


def test_free_directions_are_no_lens_and_the_test_above_would_see_it() -> None:
    directions = FreeDirections(6, 2, start=torch.tensor([[2.0, 0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0, 0]]))
    h, z = torch.randn(6), torch.randn(2)
    written = directions.write(h, z)
    expected = h + (z - h @ directions.directions.T) @ directions.directions
    torch.testing.assert_close(written, expected)
    assert (directions.read(written) - z).abs().max() > 0.1
    # With orthonormal rows they are one.
    directions = FreeDirections(6, 2, seed=0)
    torch.testing.assert_close(directions.read(directions.write(h, z)), z)


def test_bf16_stream_keeps_its_bits_outside() -> None:
    """Written as h + change, not as a product of the whole state: axes outside the span do not move."""
    basis = torch.zeros(2, 8)
    basis[0, :2], basis[1, 2] = torch.tensor([0.6, 0.8]), 1.0
    h = torch.randn(5, 8).bfloat16()
    for subspace in (FixedSubspace(basis), LearnedSubspace(8, 2, start=basis)):
        written = subspace.write(h, torch.randn(5, 2))
        assert torch.equal(written[:, 3:], h[:, 3:]) and not torch.equal(written[:, :3], h[:, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_write_forgets_the_state(kind: Literal["qr", "polar"]) -> None:
    subspace = learned(6, 6, kind=kind)
    z = torch.randn(4, 6)
    torch.testing.assert_close(subspace.write(torch.randn(4, 6), z), subspace.embed(z), atol=1e-5, rtol=1e-5)


def test_verbs_keep_their_precision_under_autocast() -> None:
    """Autocast would take the products, and the basis itself, to bfloat16."""
    h, z = torch.randn(5, 16), torch.randn(5, 4)
    for kind in KINDS:
        plain, cast, direct = (learned(16, 4, kind=kind) for _ in range(3))  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(direct.basis(), plain.basis())
            assert (h @ h.T).dtype == torch.bfloat16  # the control: autocast is on
            read, written = cast.read(h), cast.write(h, z)
            embedded, swapped = cast.embed(z), cast.swap(h, h.flip(0))
        assert torch.equal(cast.basis(), plain.basis())
        assert torch.equal(read, plain.read(h)) and torch.equal(written, plain.write(h, z))
        assert torch.equal(embedded, plain.embed(z)) and torch.equal(swapped, plain.swap(h, h.flip(0)))


# --- the basis ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "rank"), [(1, 1), (5, 5), (64, 8), (300, 16)])
def test_orthonormal_start_comes_back(kind: Literal["qr", "polar"], width: int, rank: int) -> None:
    start = random_orthonormal(width, rank, 3)
    subspace = LearnedSubspace(width, rank, start=start, orthonormalise=kind)
    torch.testing.assert_close(subspace.basis(), start, atol=3e-6, rtol=0)
    flipped = LearnedSubspace(width, rank, start=-start, orthonormalise=kind)
    torch.testing.assert_close(flipped.basis(), -start, atol=3e-6, rtol=0)


def test_starts_differ_by_seed_and_repeat_by_seed() -> None:
    one, same, other = (LearnedSubspace(32, 4, seed=seed).basis() for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=0.1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_basis_stays_orthonormal_follows_the_steps_and_is_made_once_a_step(
    kind: Literal["qr", "polar"], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch, "thin_qr" if kind == "qr" else "polar")
    target = random_orthonormal(24, 3, 7)
    subspace = LearnedSubspace(24, 3, seed=0, orthonormalise=kind)
    stepping = OPTIMIZERS[optimizer](subspace.parameters())
    calls.clear()
    before, losses = subspace.basis().detach().clone(), []
    for _ in range(40):
        stepping.zero_grad()
        h = torch.randn(8, 24)
        read, again = subspace.read(h), subspace.write(h, subspace.read(h))  # three uses of one basis
        loss = (read - h @ target.T).square().mean() + 0 * again.sum()
        loss.backward()
        stepping.step()
        losses.append(loss.item())
    assert len(calls) == 40
    basis = subspace.basis().detach()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), atol=1e-5, rtol=0)
    assert (basis - before).abs().max() > 0.1 and losses[-1] < 0.2 * losses[0]
    # What the cache holds is what the raw matrix says now.
    fresh = LearnedSubspace(24, 3, seed=5, orthonormalise=kind)
    fresh.load_state_dict(subspace.state_dict())
    assert torch.equal(fresh.basis(), basis)


def test_one_evaluation_serves_all_uses_until_the_raw_matrix_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    subspace = learned(8, 2)
    calls = counting(monkeypatch)
    first, second = subspace.partition({"a": 1, "b": 1}).values()
    for _ in range(3):
        subspace.basis(), first.read(torch.randn(8)), second.embed(torch.randn(1))
    with torch.no_grad():
        subspace.basis()
    assert len(calls) == 1
    subspace.raw.data.add_(0)  # the control: a change that is seen, whatever its size
    with torch.no_grad():
        subspace.raw.add_(0)
    subspace.basis()
    assert len(calls) == 2


def in_place(subspace: LearnedSubspace) -> None:
    with torch.no_grad():
        subspace.raw.copy_(torch.randn(subspace.raw.shape))


def a_step(name: str) -> Callable[..., Any]:
    def change(subspace: Any) -> None:
        stepping = OPTIMIZERS[name](subspace.parameters())
        subspace.read(torch.randn(8)).sum().backward()
        stepping.step()

    return change


def assigned(subspace: Any) -> None:
    # Twice, so that the second matrix may come to lie where the first one was.
    for _ in range(2):
        subspace.load_state_dict({"raw": torch.randn(subspace.raw.shape)}, assign=True)
        subspace.load_state_dict({"raw": torch.randn(subspace.raw.shape)}, assign=True)


CHANGES = {
    "in place": in_place,
    "load_state_dict": lambda s: s.load_state_dict({"raw": torch.randn(s.raw.shape)}),
    "load_state_dict, assigned": assigned,
    "double": lambda s: s.double(),
    "to": lambda s: s.to(torch.float64),
    "new parameter": lambda s: setattr(s, "raw", nn.Parameter(torch.randn(s.raw.shape))),
    **{f"step of {name}": a_step(name) for name in OPTIMIZERS},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_cache_follows_every_change(change: str, kind: Literal["qr", "polar"]) -> None:
    subspace = learned(8, 2, kind=kind)
    old = subspace.basis().detach().clone()
    CHANGES[change](subspace)
    new = subspace.basis().detach()
    factor = orthonormal.thin_qr if kind == "qr" else orthonormal.polar
    assert torch.equal(new, factor(subspace.raw.detach())[0].T)
    assert new.dtype == subspace.raw.dtype
    if change not in ("double", "to"):
        assert (new - old).abs().max() > 1e-3


def test_cache_tells_apart_matrices_that_lie_at_one_address() -> None:
    """As under functional_call in a loop: one matrix is freed, the next is put where it was."""
    subspace = learned(256, 16)
    for _ in range(20):
        raw = torch.randn(256, 16)
        found = torch.func.functional_call(_Basis(subspace), {"subspace.raw": raw}, ())
        torch.testing.assert_close(found.detach(), orthonormal.thin_qr(raw)[0].T)
        del raw, found


class _Basis(nn.Module):
    def __init__(self, subspace: LearnedSubspace) -> None:
        super().__init__()
        self.subspace = subspace

    def forward(self) -> Tensor:
        return self.subspace.basis()


def test_no_square_matrix_is_kept() -> None:
    subspace = learned(512, 4)
    subspace.basis()
    assert subspace._factor._held is not None
    _, q, factor, raw = subspace._factor._held
    kept = [*subspace.parameters(), *subspace.buffers(), q, factor, *raw]
    assert 512 * 4 <= sum(t.numel() for t in kept) <= 3 * 512 * 4 + 16
    assert sum(t.numel() for t in subspace.state_dict().values()) == 512 * 4
    full = Axes(512)
    assert sum(t.numel() for t in full.state_dict().values()) == 512


# --- the gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "rank"), [(5, 1), (5, 3), (4, 4)])
def test_gradient_agrees_with_differences(kind: Literal["qr", "polar"], width: int, rank: int) -> None:
    factor = orthonormal.thin_qr if kind == "qr" else orthonormal.polar
    mixing = torch.randn(rank, width, dtype=torch.float64)

    def basis(raw: Tensor) -> Tensor:
        with torch.no_grad():
            q, triangular = factor(raw)
        return orthonormal.Orthonormal.apply(raw, q, triangular, kind).T * mixing

    raw = torch.randn(width, rank, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis, (raw,))
    if (width, rank) == (5, 3):  # the control: a wrong formula does not pass
        wrong = orthonormal.Orthonormal.backward

        def scaled(ctx: Any, grad: Tensor) -> tuple[Any, None, None, None]:
            given = wrong(ctx, grad)
            return (given[0] + 0.01 * grad, *given[1:])

        orthonormal.Orthonormal.backward, kept = staticmethod(scaled), wrong  # type: ignore[method-assign]
        try:
            assert not torch.autograd.gradcheck(basis, (raw,), raise_exception=False)
        finally:
            orthonormal.Orthonormal.backward = staticmethod(kept)  # type: ignore[method-assign]


def autograd_qr(raw: Tensor) -> Tensor:
    q, t = torch.linalg.qr(raw)
    return (q * t.diagonal().sign()).T


def autograd_polar(raw: Tensor) -> Tensor:
    # A (AᵀA)^{-1/2} by Newton's iteration, a way to the polar factor that shares nothing with an SVD
    gram = raw.T @ raw
    scale = gram.diagonal().sum()
    y, z, eye = gram / scale, torch.eye(len(gram), dtype=raw.dtype), torch.eye(len(gram), dtype=raw.dtype)
    for _ in range(60):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return (raw @ z / scale.sqrt()).T


@pytest.mark.parametrize(("kind", "oracle"), [("qr", autograd_qr), ("polar", autograd_polar)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_gradient_agrees_with_autograd(
    kind: Literal["qr", "polar"], oracle: Callable[..., Any], rank: int
) -> None:
    subspace = learned(9, rank, kind=kind).double()
    h, z = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, rank, dtype=torch.float64)
    weights = torch.randn(7, 9, dtype=torch.float64)
    (subspace.write(h, z) * weights).sum().backward()
    raw = subspace.raw.detach().clone().requires_grad_()
    basis = oracle(raw)
    torch.testing.assert_close(subspace.basis().detach(), basis.detach(), rtol=1e-9, atol=1e-9)
    ((h + (z - h @ basis.T) @ basis) * weights).sum().backward()
    torch.testing.assert_close(subspace.raw.grad, raw.grad, rtol=1e-8, atol=1e-8)
    assert raw.grad is not None
    assert raw.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind: Literal["qr", "polar"]) -> None:
    """Several backward passes share one evaluation."""
    subspace = learned(10, 3, kind=kind).double()
    h = torch.randn(8, 10, dtype=torch.float64)

    def loss(states: Tensor) -> Tensor:
        return (subspace.write(states, subspace.read(states).tanh()) ** 3).sum()

    loss(h).backward()
    assert subspace.raw.grad is not None
    whole = subspace.raw.grad.clone()
    subspace.zero_grad()
    parts = [loss(part) for part in h.split(3)]  # all graphs built first, then run
    for part in parts:
        part.backward()
    torch.testing.assert_close(subspace.raw.grad, whole)
    subspace.zero_grad()
    for part in h.split(3):
        loss(part).backward()
    torch.testing.assert_close(subspace.raw.grad, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_after_a_step_uses_the_basis_of_its_forward(kind: Literal["qr", "polar"]) -> None:
    """The graph keeps the factor it was built with, also when the raw matrix has moved on meanwhile."""
    subspace = learned(6, 2, kind=kind).double()
    h = torch.randn(3, 6, dtype=torch.float64)
    (subspace.read(h) ** 3).sum().backward()
    assert subspace.raw.grad is not None
    expected = subspace.raw.grad.clone()
    subspace.zero_grad()
    loss = (subspace.read(h) ** 3).sum()
    with torch.no_grad():
        subspace.raw.add_(1.0)
    subspace.basis()
    loss.backward()
    torch.testing.assert_close(subspace.raw.grad, expected)


# --- copies, casts and files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_bit_equal_and_go_their_own_way(kind: Literal["qr", "polar"]) -> None:
    subspace = learned(20, 4, kind=kind)
    basis = subspace.basis().detach().clone()
    twin = copy.deepcopy(subspace)
    loaded = LearnedSubspace(20, 4, seed=9, orthonormalise=kind)
    loaded.load_state_dict({name: tensor.clone() for name, tensor in subspace.state_dict().items()})
    for other in (twin, loaded):
        assert torch.equal(other.basis(), basis) and torch.equal(other.raw, subspace.raw)
        in_place(other)
        assert not torch.equal(other.basis(), basis) and torch.equal(subspace.basis(), basis)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parents_leave_the_basis_alone(dtype: torch.dtype) -> None:
    parent: Any = nn.Sequential(
        nn.Linear(4, 4), learned(20, 4), random_subspace(20, 3, 0), FreeDirections(20, 2, seed=0)
    )
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    parent[1].basis()
    parent.to(dtype)
    assert parent[0].weight.dtype == dtype  # the control
    for name, tensor in parent.state_dict().items():
        if not name.startswith("0."):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    parent.double()
    assert parent[1].basis().dtype == torch.float64
    parent.to(dtype)
    assert parent[1].raw.dtype == torch.float64


def test_half_precision_start_is_kept_in_float32() -> None:
    start = torch.eye(3, 8).bfloat16()
    for made in (
        LearnedSubspace(8, 3, start=start),
        FixedSubspace(start),
        FreeDirections(8, 3, start=start),
    ):
        assert made.basis().dtype == torch.float32
        torch.testing.assert_close(made.basis().detach(), torch.eye(3, 8))


def test_start_is_copied() -> None:
    start = random_orthonormal(8, 2, 0)
    made = [LearnedSubspace(8, 2, start=start), FixedSubspace(start), FreeDirections(8, 2, start=start)]
    start.zero_()
    for subspace in made:
        assert subspace.basis().abs().max() > 0.1


def test_frozen_is_a_value() -> None:
    subspace = learned(8, 2)
    frozen = subspace.frozen()
    assert torch.equal(frozen.basis(), subspace.basis()) and not list(frozen.parameters())
    in_place(subspace)
    assert not torch.allclose(frozen.basis(), subspace.basis())


# --- parts --------------------------------------------------------------------------------------------------


def test_parts_are_orthogonal_slices_that_train_the_whole() -> None:
    whole = learned(10, 6)
    parts = whole.partition({"a": 2, "b": 3})
    a, b = parts["a"], parts["b"]
    assert isinstance(a, Part) and (a.rank, b.rank, a.width) == (2, 3, 10)
    assert torch.equal(torch.cat([a.basis(), b.basis()]), whole.basis()[:5])
    torch.testing.assert_close(a.basis() @ b.basis().T, torch.zeros(2, 3), atol=1e-6, rtol=0)
    h, z = torch.randn(4, 10), torch.randn(4, 2)
    torch.testing.assert_close(b.read(a.write(h, z)), b.read(h), atol=1e-5, rtol=1e-5)
    a.read(h).sum().backward()
    assert whole.raw.grad is not None
    assert whole.raw.grad.abs().max() > 0 and [p is whole.raw for p in a.parameters()] == [True]
    inner = a.partition({"c": 1})["c"]
    assert torch.equal(inner.basis(), whole.basis()[:1])


@pytest.mark.parametrize("sizes", [{"a": 4, "b": 3}, {"a": 0, "b": 2}, {"a": -1}])
def test_impossible_partitions_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"asked of a basis of rank 6"):
        learned(10, 6).partition(sizes)
    assert set(learned(10, 6).partition({"a": 4, "b": 2})) == {"a", "b"}


# --- ready-made subspaces -----------------------------------------------------------------------------------


def test_pca_is_centred_and_not_standardised() -> None:
    """The first axis has the largest mean, the second the largest spread, the third the next; correlations
    would prefer the last two, which are copies of each other."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 5, generator=generator)
    states = noise * torch.tensor([0.3, 3.0, 2.0, 0.5, 0.0])
    states[:, 4] = states[:, 3]
    states[:, 0] += 50
    found = pca(states, 2)
    torch.testing.assert_close(
        projector(found.basis()),
        torch.diag(torch.tensor([0.0, 1, 1, 0, 0], dtype=torch.float64)),
        atol=0.1,
        rtol=0,
    )
    assert found.basis()[0, 1].abs() > 0.9  # the largest first
    # Against the eigenvectors of the covariance
    h = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    vectors = torch.linalg.eigh(torch.cov(h.T.double())).eigenvectors
    torch.testing.assert_close(
        projector(pca(h, 3).basis()), vectors[:, -3:] @ vectors[:, -3:].T, atol=1e-5, rtol=0
    )


def test_difference_of_means() -> None:
    states = torch.randn(300, 8)
    labels = torch.arange(300) % 3
    states[labels == 1, 2] += 5
    states[labels == 2] += torch.tensor([0.0, 0, 0, 4, 4, 0, 0, 0])
    means = [sum(h for h, c in zip(states, labels, strict=True) if c == k) / 100 for k in range(3)]
    two = difference_of_means(states[labels < 2], labels[labels < 2])
    gap = means[1] - means[0]
    assert two.rank == 1
    torch.testing.assert_close(two.basis()[0], gap / gap.norm(), atol=1e-5, rtol=1e-4)
    three = difference_of_means(states, labels)
    assert three.rank == 2
    for gap in (means[1] - means[0], means[2] - means[0], means[2] - means[1]):
        torch.testing.assert_close(three.embed(three.read(gap)), gap, atol=1e-4, rtol=1e-4)
    # Any labels serve, in any order.
    renamed = torch.tensor([7, -2, 3])[labels]
    torch.testing.assert_close(
        projector(difference_of_means(states, renamed).basis()), projector(three.basis()), atol=1e-5, rtol=0
    )


def test_axes_are_neurons() -> None:
    h, z = torch.randn(3, 6), torch.randn(3, 2)
    axes = Axes(6, [4, 1])
    assert torch.equal(axes.basis(), torch.eye(6)[[4, 1]]) and (axes.rank, axes.width) == (2, 6)
    assert torch.equal(axes.read(h), h[:, [4, 1]])
    written = axes.write(h, z)
    expected = h.clone()
    expected[:, 4], expected[:, 1] = z[:, 0], z[:, 1]
    assert torch.equal(written, expected)
    general = FixedSubspace(torch.eye(6)[[4, 1]])
    torch.testing.assert_close(axes.embed(z), general.embed(z))
    torch.testing.assert_close(general.write(h, z), expected)
    half, source = h.bfloat16(), torch.randn(3, 6).bfloat16()
    assert torch.equal(Axes(6).swap(half, source), source)
    assert torch.equal(Axes(6, [2]).swap(half, source)[:, 2], source[:, 2])


def test_random_subspaces_follow_the_haar_measure() -> None:
    """E tr(P₁P₂) = k₁k₂/d, and its variance is known (so four standard errors are); a span drawn too close to
    the axes, or with a preferred sign, would fail on the mean of the basis or of the squared entries."""
    d, k1, k2, draws = 12, 3, 4, 400
    overlaps, entries = [], []
    for seed in range(draws):
        one, other = random_subspace(d, k1, seed).basis(), random_subspace(d, k2, 10_000 + seed).basis()
        overlaps.append((one @ other.T).square().sum().item())
        entries.append(one)
    variance = 2 * k1 * k2 * (d - k1) * (d - k2) / (d**2 * (d - 1) * (d + 2))
    found = torch.tensor(overlaps)
    assert abs(found.mean().item() - k1 * k2 / d) < 4 * (variance / draws) ** 0.5
    assert found.var().item() == pytest.approx(variance, rel=0.4)
    # every entry of a Haar basis: mean 0, second moment 1/d (whose own variance is below 2/d²)
    stacked = torch.stack(entries)
    assert stacked.mean(0).abs().max() < 5 * (1 / d / draws) ** 0.5
    assert (stacked.square().mean(0) - 1 / d).abs().max() < 5 * (2 / d**2 / draws) ** 0.5
    # The control: unsigned QR leaves a bias, the first entries being all of one sign.
    unsigned = torch.stack([torch.linalg.qr(torch.randn(d, k1))[0].T for _ in range(draws)])
    assert unsigned.mean(0).abs().max() > 5 * (1 / d / draws) ** 0.5


def test_random_subspace_is_what_its_seed_says() -> None:
    assert torch.equal(random_subspace(9, 2, 4).basis(), random_subspace(9, 2, 4).basis())
    assert not torch.allclose(random_subspace(9, 2, 4).basis(), random_subspace(9, 2, 5).basis())
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(random_orthonormal(9, 2, generator), random_orthonormal(9, 2, 4))
    before = torch.get_rng_state()
    LearnedSubspace(9, 2, seed=0)
    random_subspace(9, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


# --- what is refused ----------------------------------------------------------------------------------------

SKEW = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedSubspace(4, 5), r"rank 5 .*width 4: possible are 1 to 4"),
        (lambda: LearnedSubspace(4, 0), r"rank 0 .*possible are 1 to 4"),
        (lambda: FreeDirections(4, 5), r"rank 5"),
        (lambda: random_subspace(4, 0, 0), r"rank 0"),
        (lambda: random_orthonormal(4, 9), r"rank 9"),
        (lambda: LearnedSubspace(3, 2, start=SKEW), r"not orthonormal: \|R Rᵀ − I\| is 0\.5"),
        (lambda: LearnedSubspace(3, 2, start=2 * torch.eye(2, 3)), r"not orthonormal"),
        (lambda: LearnedSubspace(3, 2, start=torch.full((2, 3), torch.nan)), r"6 of 6 numbers are NaN"),
        (lambda: LearnedSubspace(3, 2, start=torch.eye(3, 2)), r"shape \(3, 2\) for a subspace .* \(2, 3\)"),
        (lambda: LearnedSubspace(3, 2, start=torch.eye(1, 3)), r"shape \(1, 3\)"),
        (lambda: FreeDirections(3, 2, start=torch.eye(3, 2)), r"shape \(3, 2\) .* \(2, 3\)"),
        (lambda: FixedSubspace(SKEW), r"not orthonormal"),
        (lambda: FixedSubspace(torch.eye(3, 2)), r"rank 3 .*width 2"),
        (lambda: pca(torch.randn(4, 6), 4), r"4 principal components asked of 4 states: at most 3"),
        (lambda: pca(torch.randn(9, 3), 4), r"rank 4"),
        (lambda: difference_of_means(torch.randn(4, 3), torch.ones(4)), r"1 class"),
        (
            lambda: difference_of_means(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])),
            r"means of the 2 classes do not span 1",
        ),
        (
            lambda: difference_of_means(
                torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]]), torch.tensor([0, 1, 2, 2])
            ),
            r"do not span 2",
        ),
        (lambda: Axes(4, [4]), r"\[4\] of a stream of width 4: possible are distinct indices from 0 to 3"),
        (lambda: Axes(4, [-1]), r"\[-1\]"),
        (lambda: Axes(4, [1, 1]), r"distinct"),
        (lambda: Axes(4, []), r"\[\]"),
    ],
)
def test_what_is_no_subspace_is_refused(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_more_classes_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="do not span 3"):
        difference_of_means(torch.randn(8, 2), torch.arange(8) % 4)
