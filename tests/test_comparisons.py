"""Comparisons of subspaces: of a mapping, and of the fits of a sweep, each pair beside what chance gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_sweeps import SITES, WIDTH, made_fit, made_fits, pairs, swept

from subspace_lab.analysis.comparisons import Comparison, compare
from subspace_lab.analysis.geometry import haar_overlap, overlap
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, random_subspace
from subspace_lab.das.methods import DAS, PCA, FullVector, RandomSubspace


def three() -> dict[str, FixedSubspace]:
    return {"x": random_subspace(16, 4, 0), "y": random_subspace(16, 4, 1), "z": random_subspace(16, 2, 2)}


def test_comparison_is_a_frozen_value():
    subspaces = three()
    found = compare(subspaces, {"x": 5, "y": 6, "z": 7})
    assert isinstance(found, Comparison) and found.labels == ("x", "y", "z") and found.ranks == (4, 4, 2)
    for i, a in enumerate(subspaces.values()):
        for j, b in enumerate(subspaces.values()):
            assert found.matrix[i][j] == pytest.approx(overlap(a, b))
    assert set(found.chance) == {(4, 4), (2, 4), (2, 2)}
    assert found.chance_of(0, 2) == haar_overlap(16, 2, 4) and found.chance_of(0, 1) == haar_overlap(16, 4, 4)
    told = found.as_dict()
    assert told["labels"] == ["x", "y", "z"] and told["width"] == 16
    assert told["chance"][0]["ranks"] == [2, 2] and told["chance"][0]["mean"] == pytest.approx(2 / 16)
    with pytest.raises(AttributeError):
        found.labels = ()  # type: ignore[misc]


def test_within_chance_tells_a_copy_from_a_stranger():
    base = random_subspace(64, 4, 0)
    found = compare({"a": base, "copy": FixedSubspace(base.basis()), "stranger": random_subspace(64, 4, 9)})
    assert not found.within_chance(0, 1)
    assert found.within_chance(0, 2) and found.within_chance(2, 0)
    whole = compare({"a": random_subspace(6, 6, 0), "b": random_subspace(6, 6, 1)})
    assert whole.within_chance(0, 1)  # the whole stream overlaps the whole stream


def test_fits_from_one_start_are_not_compared_unawares():
    seeds = {"x": 5, "y": 6, "z": 5}
    with pytest.raises(ValueError, match=r"5: \['x', 'z'\].*same_start_allowed=True"):
        compare(three(), seeds)
    assert compare(three(), seeds, same_start_allowed=True) == compare(three())
    with pytest.raises(ValueError, match=r"No seed given for \['z'\]"):
        compare(three(), {"x": 1, "y": 2})


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="No subspaces"):
        compare({})
    with pytest.raises(ValueError, match="No subspaces"):
        compare(made_fits([]))
    with pytest.raises(ValueError, match="widths"):
        compare({"a": random_subspace(8, 2, 0), "b": random_subspace(9, 2, 0)})


# --- fits -----------------------------------------------------------------------------------------------------


def test_the_fits_of_a_sweep_are_compared_by_where_they_differ():
    """Labels hold what differs: places alone, or places, methods and seeds."""
    sites = [Site("block_output", layer, "last") for layer in (0, 1)]
    by_place = compare(made_fits([made_fit(site) for site in sites]))
    assert by_place.labels == tuple(map(str, sites))
    by_seed = compare(made_fits([made_fit(seed=seed) for seed in (3, 1)]))
    assert by_seed.labels == ("seed 3", "seed 1")
    everything = [
        made_fit(site, DAS(rank), seed, rank=rank) for site in sites for rank in (2, 4) for seed in (0, 1)
    ]
    found = compare(made_fits(everything))
    assert len(found.labels) == len(set(found.labels)) == 8 and found.ranks == (2, 2, 4, 4) * 2
    assert found.labels[0] == "block_output[0]@last, DAS 2, seed 0"
    for i, one in enumerate(everything):
        for j, other in enumerate(everything):
            assert found.matrix[i][j] == pytest.approx(overlap(one.subspace(), other.subspace()))
    assert set(found.chance) == {(2, 2), (2, 4), (4, 4)} and found.chance_of(0, 2) == haar_overlap(16, 2, 4)
    json.dumps(found.as_dict(), allow_nan=False)
    alone = compare(made_fits([made_fit()]))
    assert alone.labels == (str(SITES[0]),) and alone.matrix[0][0] == pytest.approx(1)


def test_trained_fits_are_compared_without_baselines_and_controls():
    fits = swept([DAS([2, 3]), PCA(2), RandomSubspace(2, draws=2), FullVector()], seeds=2)
    found = compare(fits)
    assert len(found.labels) == 8 and all("DAS" in label for label in found.labels)
    # Where nothing began at a random start there is nothing to leave out.
    closed = compare(fits.where(method=PCA))
    assert closed.labels == tuple(str(site) for site in SITES)
    assert len(compare(fits.where(method=RandomSubspace)).labels) == 4


def test_ranks_and_rates_of_one_seed_have_starts_of_their_own():
    fits = swept(DAS([2, 4], learning_rate=[0.01, 0.02]), SITES[:1])
    found = compare(fits)
    assert len(found.labels) == 4 and max(found.matrix[i][j] for i in range(4) for j in range(i)) < 0.9


def test_fits_in_a_mapping_know_their_starts():
    fits = {"one": made_fit(seed=0), "other": made_fit(seed=1)}
    assert compare(fits) == compare({name: fit.subspace() for name, fit in fits.items()})
    assert compare(fits).labels == ("one", "other")
    beside = compare({**fits, "random": random_subspace(16, 3, 99)})
    assert beside.labels[-1] == "random" and beside.matrix[0][:2] == compare(fits).matrix[0]
    again = replace(fits["one"], alignment=Alignment({"above": (SITES[0], random_subspace(16, 2, 8))}))
    with pytest.raises(ValueError, match=r"one start.*'one', 'again'.*same_start_allowed"):
        compare({**fits, "again": again})
    assert compare({**fits, "again": again}, same_start_allowed=True).ranks == (3, 3, 2)
    with pytest.raises(ValueError, match=r"No seed given for \['random'\]"):
        compare({**fits, "random": random_subspace(16, 3, 99)}, {})


def test_fits_from_a_given_start_share_it():
    start = random_orthonormal(WIDTH, 2, 0)
    fits = swept(DAS(2, start=start), SITES[:1], seeds=2)
    with pytest.raises(ValueError, match="Trained from one start"):
        compare(fits)
    assert len(compare(fits, same_start_allowed=True).labels) == 2


def test_fits_of_several_variables_are_compared_one_variable_at_a_time():
    fits = swept(DAS(2), pairs=pairs(("v", "w")))
    with pytest.raises(ValueError, match=r"\['v', 'w'\]"):
        compare(fits)
    found = compare({f"{fit.place} {name}": fit.subspace(name) for fit in fits for name in ("v", "w")})
    assert found.matrix[0][1] < 1e-6 < found.matrix[0][2]
