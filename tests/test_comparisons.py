"""Comparisons of subspaces: of a mapping, and of the fits of a sweep, each pair beside what chance gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny_sweeps import QUICK, SITES, WIDTH, made_fit, made_fits, pairs, swept, tiny

from subspace_lab.analysis.comparisons import Comparison, compare, spectra
from subspace_lab.analysis.geometry import (
    chordal,
    containment,
    geodesic,
    haar_angles,
    haar_overlap,
    overlap,
    principal_angles,
)
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, random_subspace
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, RandomSubspace
from subspace_lab.das.sweeps import sweep
from subspace_lab.model.backbone import Backbone


def three() -> dict[str, FixedSubspace]:
    return {"x": random_subspace(16, 4, 0), "y": random_subspace(16, 4, 1), "z": random_subspace(16, 2, 2)}


def test_comparison_is_a_frozen_value() -> None:
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


def test_within_chance_tells_a_copy_from_a_stranger() -> None:
    base = random_subspace(64, 4, 0)
    found = compare({"a": base, "copy": FixedSubspace(base.basis()), "stranger": random_subspace(64, 4, 9)})
    assert not found.within_chance(0, 1)
    assert found.within_chance(0, 2) and found.within_chance(2, 0)
    whole = compare({"a": random_subspace(6, 6, 0), "b": random_subspace(6, 6, 1)})
    assert whole.within_chance(0, 1)  # the whole stream overlaps the whole stream


def test_fits_from_one_start_are_not_compared_unawares() -> None:
    seeds = {"x": 5, "y": 6, "z": 5}
    with pytest.raises(ValueError, match=r": x and z\..*same_start=True"):
        compare(three(), seeds)
    assert compare(three(), seeds, same_start=True) == compare(three())
    with pytest.warns(DeprecationWarning, match="same_start_allowed is now called same_start"):
        assert compare(three(), seeds, same_start_allowed=True) == compare(three())
    with pytest.raises(ValueError, match=r"No seed given for \['z'\]"):
        compare(three(), {"x": 1, "y": 2})


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="No subspaces"):
        compare({})
    with pytest.raises(ValueError, match="No subspaces"):
        compare(made_fits([]))
    with pytest.raises(ValueError, match="widths"):
        compare({"a": random_subspace(8, 2, 0), "b": random_subspace(9, 2, 0)})


# --- fits -----------------------------------------------------------------------------------------------------


def test_the_fits_of_a_sweep_are_compared_by_where_they_differ() -> None:
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


def test_trained_fits_are_compared_without_baselines_and_controls() -> None:
    fits = swept([DAS([2, 3]), PCA(2), RandomSubspace(2, draws=2), FullVector()], seeds=2)
    found = compare(fits)
    assert len(found.labels) == 8 and all("DAS" in label for label in found.labels)
    # Where nothing began at a random start there is nothing to leave out.
    closed = compare(fits.where(method=PCA))
    assert closed.labels == tuple(str(site) for site in SITES)
    assert len(compare(fits.where(method=RandomSubspace)).labels) == 4


def test_ranks_and_rates_of_one_seed_have_starts_of_their_own() -> None:
    fits = swept(DAS([2, 4], learning_rate=[0.01, 0.02]), SITES[:1])
    found = compare(fits)
    assert len(found.labels) == 4 and max(found.matrix[i][j] for i in range(4) for j in range(i)) < 0.9


def test_fits_in_a_mapping_know_their_starts() -> None:
    fits = {"one": made_fit(seed=0), "other": made_fit(seed=1)}
    assert compare(fits) == compare({name: fit.subspace() for name, fit in fits.items()})
    assert compare(fits).labels == ("one", "other")
    beside = compare({**fits, "random": random_subspace(16, 3, 99)})
    assert beside.labels[-1] == "random" and beside.matrix[0][:2] == compare(fits).matrix[0]
    again = replace(fits["one"], alignment=Alignment({"above": (SITES[0], random_subspace(16, 2, 8))}))
    with pytest.raises(ValueError, match=r"one start.*: one and again\..*same_start"):
        compare({**fits, "again": again})
    assert compare({**fits, "again": again}, same_start=True).ranks == (3, 3, 2)
    with pytest.raises(ValueError, match=r"No seed given for \['random'\]"):
        compare({**fits, "random": random_subspace(16, 3, 99)}, {})


def test_fits_from_a_given_start_share_it() -> None:
    start = random_orthonormal(WIDTH, 2, 0)
    fits = swept(DAS(2, start=start), SITES[:1], seeds=2)
    with pytest.raises(ValueError, match="Trained from one start"):
        compare(fits)
    assert len(compare(fits, same_start=True).labels) == 2


def test_fits_of_several_variables_are_compared_by_variable() -> None:
    fits = swept(DAS(2), pairs=pairs(("v", "w")), seeds=2)
    found = compare(fits, across="seed", min_effect=None)
    assert len(found.labels) == 8 and found.labels[1] == "block_output[0]@2, seed 0, w"
    assert found.matrix[0][1] < 1e-6  # parts of one basis
    assert found.across is not None
    assert found.across.pairs == 4  # each variable with itself, at two sites
    alone = compare(fits, variable="w")
    assert alone.labels[0] == "block_output[0]@2, seed 0"
    assert alone.matrix[0][1] == pytest.approx(overlap(fits[0].subspace("w"), fits[1].subspace("w")))
    with pytest.raises(ValueError, match=r"variable='x'.*\['v', 'w'\]"):
        compare(fits, variable="x")
    with pytest.raises(ValueError, match="Trained from one start"):
        compare({"a": fits[0], "b": replace(fits[1], start=fits[0].start)})


def test_the_start_of_an_adapter_that_is_not_told_is_none() -> None:
    told = {"method": "LoReFT", "start": "random", "seed": 0}
    given = {str(i): Alignment({"v": (SITES[0], random_subspace(8, 2, i))}, told) for i in range(2)}
    assert compare(given).labels == ("0", "1")


# --- across and within ------------------------------------------------------------------------------------------

LAYERS = [Site("block_output", layer, position) for layer in (0, 1, 2) for position in ("amount", "last")]


def grid(test: float = 0.9, seeds: int = 2, sites: list[Site] = LAYERS, **changes: Any) -> Fits:
    """DAS of two seeds at three layers and two positions."""
    fits = [made_fit(site, DAS(3), seed, test=test) for site in sites for seed in range(seeds)]
    return made_fits(fits, **changes)


def near(start: torch.Tensor, share: float, seed: int) -> FixedSubspace:
    """A subspace beside another one: the nearer, the smaller the share of noise."""
    noise = random_orthonormal(start.shape[1], start.shape[0], seed)
    return FixedSubspace(torch.linalg.qr((start + share * noise).T)[0].T)


def test_layers_are_compared_with_layers_at_one_position_and_seeds_with_seeds_at_one_site() -> None:
    found = compare(grid(), across="layer", within="seed")
    # What is compared stands together: first all of one position.
    fits = [grid().where(site=label.split(",")[0], seed=int(label[-1]))[0] for label in found.labels]
    assert [fit.site.positions for fit in fits] == ["amount"] * 6 + ["last"] * 6
    position = [fit.site.positions for fit in fits]
    layer = [fit.site.layer for fit in fits]
    values: dict[str, list[Any]] = {"across": [], "within": []}
    for i in range(len(fits)):
        for j in range(i):
            if position[i] == position[j]:
                values["within" if layer[i] == layer[j] else "across"].append(found.matrix[i][j])
    assert len(values["across"]) == 2 * 3 * 4 and len(values["within"]) == 6
    assert found.across is not None
    assert found.across.mean == pytest.approx(fmean(values["across"])) and found.across.pairs == 24
    assert found.within is not None
    assert found.within.mean == pytest.approx(fmean(values["within"])) and found.within.fits == 12
    assert sorted(found.across.values) == pytest.approx(sorted(values["across"]))
    assert found.null == haar_overlap(16, 3, 3) and found.facets == ("layer", "seed")


def test_the_interval_is_that_of_a_jackknife_over_fits() -> None:
    found = compare(grid(sites=LAYERS[::2]), across="layer")
    n, pairs = 6, [(i, j) for i in range(6) for j in range(i) if i // 2 != j // 2]
    without = [fmean(found.matrix[i][j] for i, j in pairs if k not in (i, j)) for k in range(n)]
    error = math.sqrt((n - 1) / n * sum((one - fmean(without)) ** 2 for one in without))
    assert found.across is not None
    assert found.across.high is not None and found.across.low is not None
    assert found.across.high - found.across.mean == pytest.approx(1.96 * error)
    assert found.across.mean - found.across.low == pytest.approx(1.96 * error)
    alone = compare(grid(seeds=1, sites=LAYERS[:3:2]), across="layer").across
    assert alone is not None
    assert alone.pairs == 1 and alone.low is None and "[" not in str(alone)


def test_the_interval_covers_the_mean_of_other_starts() -> None:
    """Fits scattered around one subspace: of 30 searches the interval holds the true mean in most."""
    centre = random_orthonormal(24, 3, 0)

    def found(first: int) -> Comparison:
        spans = {str(i): near(centre, 1.0, first + i) for i in range(8)}
        fits = {
            name: replace(
                made_fit(LAYERS[0], seed=i), alignment=Alignment({"v": (LAYERS[0], span)}), start=first + i
            )
            for i, (name, span) in enumerate(spans.items())
        }
        return compare(fits, across="seed")

    drawn = [found(100 * k).across for k in range(30)]
    truth = fmean(one.mean for one in drawn)  # type: ignore[union-attr]
    inside = sum(one.low <= truth <= one.high for one in drawn)  # type: ignore[union-attr, operator]
    assert inside >= 24  # rather too wide than too narrow


def test_the_interval_of_shares_stays_among_them() -> None:
    one = [made_fit(LAYERS[0], DAS(3), seed, test=0.9) for seed in range(3)]
    same = replace(one[1], alignment=one[0].alignment)
    found = compare(made_fits([one[0], same, one[2]]), across="seed").across
    assert found is not None
    assert (found.low, found.high) == (0, 1) and 0.3 < found.mean < 0.6  # of the values 1, x and x
    far = compare(made_fits([one[0], same, one[2]]), across="seed", measure=chordal).across
    assert far is not None
    assert far.high is not None
    assert far.high > 1


def test_methods_and_models_are_compared_at_one_site() -> None:
    fits = made_fits(
        [
            made_fit(site, DAS(rank), seed, rank=rank, test=0.9)
            for site in LAYERS[:2]
            for rank in (2, 3)
            for seed in (0, 1)
        ]
    )
    found = compare(fits, across="method", within="seed")
    assert found.across is not None
    assert found.within is not None
    assert found.across.pairs == 2 * 4 and found.within.pairs == 4
    assert found.null is not None
    assert found.null.mean == haar_overlap(16, 2, 3).mean
    # Only the seeds differ: the starts of another model's search have to be others, too.
    ours = grid(sites=LAYERS[:2], facts={"task": "prices", "model": {"weights": "aa"}})
    theirs = made_fits(
        [made_fit(site, DAS(3), seed, test=0.9) for site in LAYERS[:2] for seed in (5, 6)],
        facts={"task": "prices", "model": {"weights": "bb"}},
    )
    models = compare({"ours": ours, "theirs": theirs}, across="model", within="seed")
    assert models.across is not None
    assert models.within is not None
    assert models.across.pairs == 2 * 4 and models.within.pairs == 4
    assert models.labels[0] == "ours, block_output[0]@amount, seed 0"


def test_subspaces_that_are_near_are_said_to_be() -> None:
    """Seeds near each other at each site, layers far apart: the sentence says so; and the other way round."""
    fits = []
    for layer in range(3):
        centre = random_orthonormal(32, 3, 50 + layer)
        for seed in range(3):
            site = Site("block_output", layer, "last")
            one = made_fit(site, DAS(3), seed, test=0.9)
            fits.append(replace(one, alignment=Alignment({"v": (site, near(centre, 0.3, 10 * layer + seed))})))
    found = compare(made_fits(fits), across="layer", within="seed")
    assert found.within is not None
    assert found.across is not None
    assert found.within.mean > 0.8 and found.across.mean < 0.2
    assert "lower than that of two seeds at one site and not distinguishable from chance" in found.sentence
    assert f"across layers is {found.across}" in found.sentence and "not counted" not in found.sentence
    seeds = compare(made_fits(fits[:3]), across="seed")
    assert "above chance" in seeds.sentence and seeds.within is None
    assert repr(found).endswith(found.sentence)


def test_fits_at_their_floor_do_not_count() -> None:
    at_floor = [made_fit(site, DAS(3), seed, test=0.4) for site in LAYERS[4:] for seed in (0, 1)]  # 0.37 to 0.42
    fits = made_fits([*grid(sites=LAYERS[:4]), *at_floor])
    found = compare(fits, across="layer", within="seed")
    assert found.counts == ((True,) * 4 + (False,) * 2) * 2 and found.masked == 4
    assert found.across is not None
    assert found.within is not None
    assert found.across.pairs == 2 * 4 and found.within.pairs == 4
    assert "4 of 12 fits are at their floor and are not counted" in found.sentence
    kept = compare(grid(sites=LAYERS[:4]), across="layer", within="seed")
    assert found.across == kept.across and found.within == kept.within
    # An interval that reaches down to the floor is not above it; .39 is above a floor of .38.
    edge = made_fit(LAYERS[0], DAS(3), 0, test=0.41)
    assert compare(made_fits([edge])).counts == (False,)
    assert compare(made_fits([made_fit(LAYERS[0], DAS(3), 0, test=0.42)])).counts == (True,)
    # The whole matrix is there whatever counts, and a count of pairs leaves them out too.
    assert len(found.matrix) == 12 and compare(fits).sentence.split(" pairs")[0].endswith("of 28")


def test_an_effect_can_be_asked_for() -> None:
    fits = grid(test=0.6)  # interval from 0.57, floor 0.38
    assert compare(fits, min_effect=0.3).masked == 0 and compare(fits, min_effect=0.31).masked == 12
    with pytest.raises(ValueError, match="All 12 fits are at their floor"):
        compare(fits, across="layer", min_effect=0.31)
    with pytest.raises(ValueError, match="min_effect=1"):
        compare(fits, min_effect=1)


def test_floors_come_along_with_a_fit_of_its_own() -> None:
    """A fit outside its `Fits` knows its floors by its evidence."""
    evidence = {"controls": {"no intervention": {"iia": 0.3}, "best constant answer": {"iia": 0.95}}}
    one = made_fit(LAYERS[0], test=0.9)
    proven = replace(one, alignment=Alignment(one.alignment.variables, evidence))
    assert compare({"plain": one, "proven": replace(proven, start=1)}).counts == (True, False)


@pytest.mark.parametrize("measure", [containment, chordal, geodesic])
def test_any_function_of_two_subspaces_is_a_measure(measure: Callable[..., float]) -> None:
    fits = made_fits(
        [made_fit(site, DAS(rank), 0, rank=rank, test=0.9) for site in LAYERS[:4:2] for rank in (2, 5)]
    )
    found = compare(fits, across="layer", measure=measure)
    assert found.measure == measure.__name__ and found.distance == (measure is not containment)
    for i, one in enumerate(fits):
        for j, other in enumerate(fits):
            assert found.matrix[i][j] == pytest.approx(measure(one.subspace(), other.subspace()))
    assert found.symmetric == (measure is not containment)
    if measure is containment:
        assert found.chance_of(0, 1).mean == pytest.approx(5 / 16, abs=0.03)
        assert found.chance_of(1, 0).mean == pytest.approx(2 / 16, abs=0.03)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert found.across is not None
    assert told["measure"] == measure.__name__ and told["across"]["mean"] == pytest.approx(found.across.mean)


def test_of_a_distance_near_is_small() -> None:
    base = random_subspace(64, 4, 0)
    spans = {"a": base, "copy": FixedSubspace(base.basis()), "stranger": random_subspace(64, 4, 9)}
    assert compare(spans, measure=chordal).sentence.startswith("1 of 3 pairs have a smaller chordal")
    assert compare(spans).sentence.startswith("1 of 3 pairs have a higher overlap")


# --- nulls ------------------------------------------------------------------------------------------------------


def test_fits_that_know_nothing_are_a_null_over_the_same_kind_of_pairs() -> None:
    fits, other = grid(), grid(sites=[site.at("last") for site in LAYERS[::2]])
    found = compare(fits, across="layer", within="seed", null=other)
    expected = compare(other, across="layer").across
    assert expected is not None
    assert found.nulls["the null"].mean == pytest.approx(expected.mean) and found.nulls["the null"].draws == 12
    assert "that of the null" in found.sentence and "the 12 pairs of the null" in found.sentence
    named = compare(fits, across="layer", null={"twins": [other, grid(seeds=1)], "again": other})
    assert list(named.nulls) == ["twins", "again"]
    # Of two twins only fits of one twin are compared with each other: 12 and 6 pairs.
    assert named.nulls["twins"].draws == 12 + 6
    # Across seeds there may be one site: then two seeds of the null at one site.
    assert compare(grid(), across="seed", null=other).nulls["the null"].draws == 3


@pytest.mark.parametrize(("seeds", "few"), [(2, True), (5, False)])
def test_a_null_of_few_pairs_gives_no_band_and_no_conclusion(seeds: int, few: bool) -> None:
    """One site of two seeds is one pair, of five seeds ten; at two sites of five seeds there are twenty."""
    null = grid(sites=LAYERS[:2], seeds=seeds)
    found = compare(grid(), across="seed", null={"a twin": null})
    drawn = found.nulls["a twin"]
    assert drawn.few is few and drawn.draws == {2: 2, 5: 20}[seeds]
    assert ("(too few for a conclusion)" in found.sentence) is few
    assert (f"all {drawn.draws} pairs" in found.sentence) is few
    if few:
        alone = compare(null, across="seed")
        assert alone.across is not None
        assert (drawn.low, drawn.high) == pytest.approx((min(alone.across.values), max(alone.across.values)))
    one = compare(grid(), across="seed", null={"a twin": grid(sites=LAYERS[:1])})
    assert "(one pair)" in one.sentence and "the 1 pair of a twin" in one.sentence


def test_subspaces_that_are_the_whole_space_are_at_chance() -> None:
    """Their overlap is 1 up to rounding, and that of random ones is 1: neither is above the other."""
    whole = [made_fit(site, DAS(16), seed, rank=16) for site in LAYERS[::2] for seed in (0, 1)]
    assert "not distinguishable from chance" in compare(made_fits(whole), across="layer").sentence


def test_twins_share_starts_with_the_model_and_are_a_null_all_the_same() -> None:
    twin = Backbone(reinitialised(tiny().model, 3))
    options: dict[str, Any] = {"config": QUICK, "min_accuracy": None, "quiet": True, "seeds": 2}
    fits = swept(DAS(2), seeds=2)
    on_twin = sweep(twin, pairs(), SITES, [DAS(2)], **options)
    assert {fit.start for fit in fits} == {fit.start for fit in on_twin}
    found = compare(fits, across="seed", null={"twin": on_twin}, min_effect=None)
    assert found.nulls["twin"].draws == 2
    with pytest.raises(ValueError, match="two models too"):
        compare({"model": fits, "twin": on_twin}, across="model")


def test_pairs_of_a_null_that_share_a_start_are_left_out() -> None:
    shared = [replace(fit, start=7) for fit in grid(sites=LAYERS[:1], seeds=3)]
    apart = made_fit(LAYERS[0], DAS(3), 9)
    assert compare(grid(), across="seed", null=made_fits([*shared, apart])).nulls["the null"].draws == 3
    with pytest.raises(ValueError, match="no two fits that could be compared"):
        compare(grid(), across="seed", null=made_fits(shared))


# --- the artefact of one start ----------------------------------------------------------------------------------


def test_searches_from_one_start_meet_on_a_model_that_knows_nothing_and_are_refused() -> None:
    """Two layers of a random model, random answers: from one start the subspaces overlap, from two they do not."""
    sites = [Site("block_output", layer, "last") for layer in (0, 1)]
    start = random_orthonormal(WIDTH, 2, 0)
    shared = swept(DAS(2, start=start), sites)
    with pytest.raises(ValueError, match="Trained from one start"):
        compare(shared, across="layer")
    artefact = compare(shared, across="layer", same_start=True, min_effect=None)
    free = compare(swept(DAS(2), sites, seeds=3), across="layer", min_effect=None)
    assert artefact.across is not None
    assert free.across is not None
    assert artefact.across.mean > 0.5 > 2 * free.across.mean
    assert free.null is not None
    assert artefact.across.mean > free.null.high


# --- spectra ----------------------------------------------------------------------------------------------------


def test_spectra_are_the_mean_angles_of_the_same_pairs() -> None:
    fits = grid(sites=LAYERS[:4:2])
    found = spectra(fits, across="layer", within="seed")
    pairs_across = [(0, 2), (0, 3), (1, 2), (1, 3)]
    angles = torch.stack([principal_angles(fits[i].subspace(), fits[j].subspace()) for i, j in pairs_across])
    assert list(found.angles) == ["across layers (4 pairs)", "two seeds at one site (2 pairs)"]
    assert found.angles["across layers (4 pairs)"] == pytest.approx(angles.mean(0).tolist())
    assert found.null == haar_angles(16, 3, 3)
    mixed = made_fits([made_fit(site, DAS(rank), rank=rank, test=0.9) for site in LAYERS[:4:2] for rank in (2, 3)])
    with pytest.raises(ValueError, match=r"ranks \[2, 3\]"):
        spectra(mixed, across="layer")
    with pytest.raises(ValueError, match="Trained from one start"):
        spectra(made_fits([replace(fit, start=1) for fit in fits]), across="layer")


# --- what cannot be asked ---------------------------------------------------------------------------------------


def test_a_question_without_an_answer_is_refused_with_what_there_is() -> None:
    fits = grid()
    wrong: Any
    for wrong, message in [
        ({"across": "rank"}, "across='rank': possible are layer, seed, method, model"),
        ({"across": "layer", "within": "layer"}, "within='layer': possible are 'seed' and None"),
        ({"across": "seed", "within": "seed"}, "yardstick"),
        ({"within": "seed"}, "yardstick"),
        ({"across": "method"}, r"across='method' needs two fits.*the methods here are \['DAS 3'\]"),
        ({"across": "model"}, "needs {model: fits} of two models"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(fits, **wrong)
    with pytest.raises(ValueError, match=r"within='seed' needs two fits.*the seeds here are \['0'\]"):
        compare(grid(seeds=1), across="layer", within="seed")
    with pytest.raises(ValueError, match=r"across='layer'.*the layers here are \['0'\]"):
        compare(fits.where(layer=0), across="layer")
    half = made_fits([*grid(sites=LAYERS[:1]), *(made_fit(LAYERS[2], DAS(3), s, test=0.3) for s in (0, 1))])
    with pytest.raises(ValueError, match="in none of them are both fits above"):
        compare(half, across="layer")


def test_results_that_do_not_belong_together_are_refused() -> None:
    def of(task: str = "prices", weights: str = "aa", **changes: Any) -> Fits:
        return grid(facts={"task": task, "model": {"weights": weights}}, **changes)

    with pytest.raises(ValueError, match=r"different tasks.*'colours'"):
        compare({"a": of(), "b": of("colours")})
    with pytest.raises(ValueError, match=r"2 models.*across='model'"):
        compare({"a": of(), "b": of(weights="bb")})
    with pytest.raises(ValueError, match="one model twice"):
        compare({"a": of(), "b": of()}, across="model")
    lone = made_fit()
    known = replace(lone, alignment=Alignment(lone.alignment.variables, {"task": "colours"}))
    with pytest.raises(ValueError, match="different tasks"):
        compare({"a": of(), "b": known})
    with pytest.raises(TypeError, match="b is a int"):
        compare({"a": random_subspace(8, 2, 0), "b": 3})
    with pytest.raises(ValueError, match=r"Several subspaces have the labels"):
        compare({"a": [lone, replace(lone, start=5)]})
