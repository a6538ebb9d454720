"""Overlaps and principal angles against closed forms, and chance against its own draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_lab.analysis.geometry import (
    Chance,
    _haar_squared_cosines,
    _haar_traces,
    chordal,
    consensus,
    containment,
    geodesic,
    haar_angles,
    haar_largest_cosine,
    haar_overlap,
    overlap,
    principal_angles,
)
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.subspaces import Axes, FreeDirections, LearnedSubspace, random_subspace


def rotation(size: int, seed: int) -> Tensor:
    return random_orthonormal(size, size, seed)


def turned(angles: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Two bases with exactly these principal angles, in a frame that shows nothing of them."""
    k = len(angles)
    a, b = torch.zeros(2, k, width, dtype=torch.float64)
    for i, angle in enumerate(angles):
        a[i, i] = 1
        b[i, i], b[i, k + i] = angle.cos(), angle.sin()
    generator = torch.Generator().manual_seed(4)
    frame = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    mix = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=generator))[0]
    return a @ frame, mix @ b @ frame


def test_overlap_of_equal_orthogonal_and_nested_spans() -> None:
    a = random_subspace(12, 4, 0)
    assert overlap(a, a) == pytest.approx(1, abs=1e-12)
    assert overlap(Axes(12, [0, 1, 2]), Axes(12, [5, 7])) == 0
    assert overlap(Axes(12, [0, 1, 2]), Axes(12, [1])) == 1
    assert overlap(Axes(12, [0, 1, 2, 3]), Axes(12, [2, 3, 4, 5, 6])) == 0.5


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_overlap_belongs_to_the_spans(k1: int, k2: int, seed: int) -> None:
    """No matter which bases, in which order, and in which frame of the stream."""
    a, b = random_orthonormal(11, k1, seed), random_orthonormal(11, k2, seed + 1)
    expected = overlap(a, b)
    assert overlap(rotation(k1, seed + 2) @ a, rotation(k2, seed + 3) @ b) == pytest.approx(expected, abs=1e-6)
    assert overlap(b, a) == pytest.approx(expected, abs=1e-12)
    frame = rotation(11, seed + 4)
    assert overlap(a @ frame, b @ frame) == pytest.approx(expected, abs=1e-6)
    assert 0 <= expected <= 1 + 1e-12
    assert principal_angles(a, b).cos().square().mean() == pytest.approx(expected, abs=1e-9)


def test_overlap_is_the_formula_with_projectors() -> None:
    a, b = random_subspace(9, 2, 0), random_subspace(9, 5, 1)
    projectors = [s.basis().T @ s.basis() for s in (a, b)]
    assert overlap(a, b) == pytest.approx(float(torch.trace(projectors[0] @ projectors[1])) / 2, abs=1e-6)


@pytest.mark.parametrize(
    "angles", [[0.0, 0.3, 1.2], [1e-9, 1e-6, 1e-3], [math.pi / 2, math.pi / 2 - 1e-8, 0.5], [0.7]]
)
def test_principal_angles_are_those_put_in(angles: list[float]) -> None:
    put_in = torch.tensor(sorted(angles), dtype=torch.float64)
    a, b = turned(put_in, 9)
    torch.testing.assert_close(principal_angles(a, b), put_in, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(principal_angles(b, a), put_in, rtol=1e-6, atol=1e-14)


def test_principal_angles_of_different_ranks_and_learned_subspaces() -> None:
    a, b = LearnedSubspace(20, 3, seed=0), random_subspace(20, 6, 1)
    found = principal_angles(a, b)
    expected = torch.linalg.svdvals((a.basis() @ b.basis().T).double()).clamp(max=1).acos()
    assert found.shape == (3,) and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("d", "k1", "k2"), [(64, 8, 8), (64, 4, 16), (16, 10, 12), (12, 6, 6), (10, 9, 8), (5, 1, 1)]
)
def test_simulated_chance_has_the_moments_of_haar(d: int, k1: int, k2: int) -> None:
    small, large = sorted((k1, k2))
    traces = _haar_traces(d, large, small, 20_000, np.random.default_rng(1))
    variance = 2 * k1 * k2 * (d - k1) * (d - k2) / (d**2 * (d - 1) * (d + 2))
    error = math.sqrt(variance / 20_000)
    assert traces.mean() == pytest.approx(k1 * k2 / d, abs=4 * error)
    assert traces.std() == pytest.approx(math.sqrt(variance), rel=0.03)
    closed = haar_overlap(d, k1, k2)
    assert closed.mean == pytest.approx(k1 * k2 / d / small)
    assert closed.sd == pytest.approx(math.sqrt(variance) / small)
    drawn = np.array(
        [overlap(random_subspace(d, k1, 2 * i), random_subspace(d, k2, 2 * i + 1)) for i in range(400)]
    )
    # Of so many subspaces the mean is known to sd/20 and the standard deviation to 4 to 5 %.
    assert closed.sd is not None
    assert drawn.mean() == pytest.approx(closed.mean, abs=4 * closed.sd / 20)
    assert drawn.std() == pytest.approx(closed.sd, rel=0.2)


@pytest.mark.parametrize(("d", "k1", "k2"), [(64, 8, 8), (16, 10, 12), (8, 2, 5)])
def test_the_band_holds_95_percent_of_subspaces_drawn_anew(d: int, k1: int, k2: int) -> None:
    chance = haar_overlap(d, k1, k2)
    drawn = [overlap(random_subspace(d, k1, 2 * i), random_subspace(d, k2, 2 * i + 1)) for i in range(1000)]
    inside = sum(chance.low <= value <= chance.high for value in drawn) / 1000
    assert 0.925 <= inside <= 0.975  # 3.6 standard errors of 1000 draws, and those of the band itself
    assert chance.low < chance.mean < chance.high


def test_chance_is_a_value_of_its_seed() -> None:
    assert haar_overlap(32, 4, 6) == haar_overlap(32, 6, 4) == haar_overlap(32, 4, 6, seed=0)
    assert haar_overlap(32, 4, 6) != haar_overlap(32, 4, 6, seed=1)
    assert haar_overlap(32, 32, 6) == Chance(1.0, 1.0, 1.0, 2000, 0.0)
    assert haar_overlap(10**6, 16, 16).mean == pytest.approx(1.6e-5)  # no d × d matrix


def test_what_has_no_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="width 8 and 9"):
        overlap(random_subspace(8, 2, 0), random_subspace(9, 2, 0))
    skewed = FreeDirections(8, 2, start=torch.randn(2, 8))
    with pytest.raises(ValueError, match="not orthonormal"):
        principal_angles(skewed, random_subspace(8, 2, 0))
    with pytest.raises(ValueError, match="rank 9 asked"):
        haar_overlap(8, 9, 1)
    with pytest.raises(ValueError, match="100 or more"):
        haar_overlap(8, 2, 1, draws=10)


# --- containment and distances ----------------------------------------------------------------------------------


def test_containment_tells_the_part_from_the_whole() -> None:
    part, whole = Axes(12, [1, 2]), Axes(12, [0, 1, 2, 3, 4])
    assert containment(part, whole) == 1 and containment(whole, part) == pytest.approx(2 / 5)
    a, b = random_subspace(12, 3, 0), random_subspace(12, 5, 1)
    assert 3 * containment(a, b) == pytest.approx(5 * containment(b, a))  # both are the trace
    assert containment(a, b) == pytest.approx(overlap(a, b)) and containment(b, a) < overlap(a, b)


@pytest.mark.parametrize("angles", [[0.0, 0.3, 1.2], [1e-7, 2e-7], [math.pi / 2, math.pi / 2]])
def test_distances_are_those_of_the_angles(angles: list[float]) -> None:
    a, b = turned(torch.tensor(angles, dtype=torch.float64), 9)
    assert geodesic(a, b) == pytest.approx(math.hypot(*angles), rel=1e-6)
    assert chordal(a, b) == pytest.approx(math.hypot(*(math.sin(one) for one in angles)), rel=1e-6)
    difference = a.T @ a - b.T @ b
    assert chordal(a, b) == pytest.approx(float(difference.norm()) / math.sqrt(2), abs=1e-12)


def test_distances_of_a_span_inside_another_are_0() -> None:
    part, whole = Axes(12, [1, 2]), Axes(12, [0, 1, 2, 3, 4])
    assert chordal(part, whole) == geodesic(whole, part) == 0
    assert chordal(Axes(4, [0]), Axes(4, [1])) == 1 and geodesic(Axes(4, [0]), Axes(4, [1])) == pytest.approx(
        math.pi / 2
    )


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7])
def test_angles_are_those_of_scipy(size: float) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        a = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64, generator=g))[0]
        b = torch.linalg.qr(a + size * torch.randn(20, 4, dtype=torch.float64, generator=g))[0]
        expected = torch.tensor(sorted(linalg.subspace_angles(a.numpy(), b.numpy())))
        torch.testing.assert_close(principal_angles(a.T, b.T), expected, rtol=1e-6, atol=1e-14)


# --- the nulls of angles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "k1", "k2"), [(64, 4, 4), (32, 3, 9), (12, 8, 7), (10, 10, 4), (6, 5, 5)])
def test_the_cosines_that_are_drawn_are_those_of_subspaces(d: int, k1: int, k2: int) -> None:
    small, large = sorted((k1, k2))
    squares = _haar_squared_cosines(d, large, small, 4000, np.random.default_rng(2))
    assert squares.shape == (4000, small) and (np.diff(squares) <= 1e-12).all()
    direct = np.array(
        [
            principal_angles(random_subspace(d, k1, 2 * i), random_subspace(d, k2, 2 * i + 1))
            .cos()
            .square()
            .numpy()
            for i in range(400)
        ]
    )
    np.testing.assert_allclose(squares.mean(0), direct.mean(0), atol=0.05)
    np.testing.assert_allclose(squares.std(0), direct.std(0), atol=0.05)
    traces = _haar_traces(d, large, small, 4000, np.random.default_rng(2))
    np.testing.assert_allclose(squares.sum(1), traces, atol=1e-9)  # of one draw


@pytest.mark.parametrize(("d", "k", "expected"), [(64, 4, 0.385), (64, 16, 0.833), (768, 16, 0.264)])
def test_the_largest_cosine_of_random_subspaces_is_far_from_0(d: int, k: int, expected: float) -> None:
    found = haar_largest_cosine(d, k, k)
    assert found.mean == pytest.approx(expected, abs=0.01) and found.low < found.mean < found.high
    band = haar_angles(d, k, k)
    assert band.mean[0] == pytest.approx(math.acos(expected), abs=0.03) and list(band.mean) == sorted(band.mean)
    assert all(low < mean < high for low, mean, high in zip(band.low, band.mean, band.high, strict=True))


def test_spans_too_large_to_miss_each_other_share_directions() -> None:
    band = haar_angles(10, 7, 6)
    assert band.mean[:3] == (0.0, 0.0, 0.0) and band.mean[3] > 0.01
    assert haar_largest_cosine(10, 7, 6).mean == 1 == haar_largest_cosine(4, 4, 2).low


# --- consensus --------------------------------------------------------------------------------------------------


def test_the_consensus_finds_what_all_hold() -> None:
    """Four subspaces share two directions and have one of their own each."""
    frame = rotation(40, 3)
    spans = [frame[[0, 1, 2 + i]] for i in range(4)]
    found = consensus(spans)
    assert found.eigenvalues == pytest.approx((1, 1, 0.25), abs=1e-6) and found.n == 4
    assert found.dimensions == 2
    assert overlap(found.subspace(), frame[:2]) == pytest.approx(1, abs=1e-6)
    mean = sum(span.T @ span for span in spans) / 4
    assert isinstance(mean, Tensor)
    exact = torch.linalg.eigvalsh(mean.double()).flip(0)[:3]
    assert found.eigenvalues == pytest.approx(exact.tolist(), abs=1e-6)


def test_strangers_have_no_consensus() -> None:
    found = consensus([random_subspace(40, 3, i) for i in range(4)])
    assert found.dimensions <= 1 and found.null.low <= found.eigenvalues[0] <= 1.1 * found.null.high
    apart = consensus([Axes(40, [i]) for i in range(4)])
    assert apart.eigenvalues == pytest.approx((0.25,)) and apart.dimensions == 0
    with pytest.raises(ValueError, match="agree on no direction"):
        apart.subspace()


def test_a_consensus_needs_two_of_one_width() -> None:
    with pytest.raises(ValueError, match="at least two are needed"):
        consensus([random_subspace(8, 2, 0)])
    with pytest.raises(ValueError, match=r"widths \[8, 9\]"):
        consensus([random_subspace(8, 2, 0), random_subspace(9, 2, 0)])
    with pytest.raises(ValueError, match="no value"):
        Chance.of([])
