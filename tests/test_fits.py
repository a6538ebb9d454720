"""Fits: filtered, chosen on dev, averaged over seeds, tabulated; and a sweep of 108 cells of which none is lost."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from typing import Any

import pandas
import pytest
import torch
from tiny_sweeps import (
    QUICK,
    SITES,
    WIDTH,
    counterfactuals,
    ids_of,
    logits_by_hook,
    made_fit,
    made_fits,
    overlap_of,
    pairs,
    score,
    states_by_hook,
    swept,
)

from subspace_lab.analysis.comparisons import compare
from subspace_lab.analysis.plots import iia_heatmap, overlap_heatmap
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate, proportion
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.das.fits import Failure, Fit, Fits, Floors, notes_of, table_of
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import iia, logit_margin

FIRST, SECOND = SITES


def grid(scores: dict[tuple[Site, Method, int], tuple[float, float]], **changes: Any) -> Fits:
    """Fits with these (dev, test) scores."""
    made = [made_fit(s, m, seed, dev=dev, test=test) for (s, m, seed), (dev, test) in scores.items()]
    return made_fits(made, **changes)


SEVERAL = grid(
    {
        (FIRST, DAS(1), 0): (0.50, 0.60),
        (FIRST, DAS(1), 1): (0.70, 0.80),
        (FIRST, DAS(4, 0.1), 0): (0.60, 0.65),
        (FIRST, DAS(4, 0.1), 1): (0.62, 0.35),
        (FIRST, PCA(4), 0): (0.40, 0.97),
        (FIRST, RandomSubspace(1), 0): (0.99, 0.99),
        (FIRST, RandomSubspace(1), 1): (0.99, 0.98),
        (SECOND, DAS(1), 0): (0.55, 0.58),
        (SECOND, DAS(1), 1): (0.55, 0.52),
        (SECOND, DAS(4, 0.1), 0): (0.61, 0.47),
        (SECOND, DAS(4, 0.1), 1): (0.64, 0.45),
        (SECOND, PCA(4), 0): (0.41, 0.43),
        (SECOND, FullVector(), 0): (0.90, 0.91),
    }
)


def cells(fits: Fits) -> list[tuple[str, str, int]]:
    return [(fit.place, fit.method.label, fit.seed) for fit in fits]


# --- looking up ---------------------------------------------------------------------------------------------


def test_fits_are_a_sequence() -> None:
    assert len(SEVERAL) == 13 and list(SEVERAL)[3] is SEVERAL[3] is SEVERAL.fits[3] and SEVERAL[-1].seed == 0
    part = SEVERAL[2:5]
    assert isinstance(part, Fits) and part.fits == SEVERAL.fits[2:5] and part.floors is SEVERAL.floors
    assert SEVERAL[0] in SEVERAL and not made_fits([])
    assert SEVERAL.methods == ["DAS 1", "DAS 4 learning_rate=0.1", "PCA 4", "RandomSubspace 1", "FullVector"]
    assert SEVERAL.places == [str(FIRST), str(SECOND)] and SEVERAL.variables == ["above"]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"method": "DAS"}, [0, 1, 2, 3, 7, 8, 9, 10]),
        ({"method": "das"}, [0, 1, 2, 3, 7, 8, 9, 10]),
        ({"method": DAS}, [0, 1, 2, 3, 7, 8, 9, 10]),
        ({"method": "DAS 1"}, [0, 1, 7, 8]),
        ({"method": DAS(4, 0.1)}, [2, 3, 9, 10]),
        ({"site": FIRST, "method": PCA}, [4]),
        ({"site": str(SECOND)}, [7, 8, 9, 10, 11, 12]),
        ({"rank": 4}, [2, 3, 4, 9, 10, 11]),
        ({"seed": 1}, [1, 3, 6, 8, 10]),
        ({"seed": 0, "rank": 1, "method": DAS}, [0, 7]),
        ({"layer": 0}, range(7)),
        ({"layer": 1, "positions": "last"}, range(7, 13)),
        ({"positions": 2, "method": "RandomSubspace"}, [5, 6]),
        ({"learning_rate": 0.1}, [2, 3, 9, 10]),
        ({}, range(13)),
    ],
)
def test_where_keeps_what_fulfils_every_condition(conditions: dict[str, Any], expected: Any) -> None:
    fits = grid({(f.site, f.method, f.seed): (0.1, 0.2) for f in SEVERAL})
    ranks = {"DAS 1": 1, "DAS 4 learning_rate=0.1": 4, "PCA 4": 4, "RandomSubspace 1": 1, "FullVector": 16}
    fits = replace(
        fits, fits=tuple(made_fit(f.site, f.method, f.seed, rank=ranks[f.method.label]) for f in SEVERAL)
    )
    found = fits.where(**conditions)
    assert cells(found) == [cells(fits)[i] for i in expected]
    assert found.floors is fits.floors and found.facts is fits.facts


def test_a_misspelt_name_is_no_empty_result() -> None:
    with pytest.raises(ValueError, match=r"No fit of method 'DASS'; there are \['DAS 1', .*'FullVector'\]"):
        SEVERAL.where(method="DASS")
    with pytest.raises(ValueError, match=r"No fit at block_output\[7\]@last; there are \['block_output\[0\]@2'"):
        SEVERAL.where(site=Site("block_output", 7, "last"))
    with pytest.raises(ValueError, match="No fit at"):
        SEVERAL.where(method=PCA, site=FIRST).where(site=SECOND)
    assert len(made_fits([]).where(method="anything", site="anywhere")) == 0


def test_variables_at_several_sites_are_found_by_either() -> None:
    sites = {"v": FIRST, "w": SECOND}
    alignment = Alignment({name: (site, random_subspace(8, 2, 0)) for name, site in sites.items()})
    one = made_fit(alignment=alignment)
    fits = made_fits([one, made_fit(Site("block_output", 2, "last"))])
    assert one.place == f"v: {FIRST}, w: {SECOND}" and one.sites == sites
    for site in (FIRST, SECOND, one.place):
        assert fits.where(site=site).fits == (one,)
    assert (
        fits.where(layer=1).fits == fits.where(positions=2).fits == (one,)
        and len(fits.where(positions="last")) == 2
    )
    assert one.record()["layer"] is None and one.record()["site"] == one.place
    with pytest.raises(ValueError, match=r"has the sites \[block_output\[0\]@2, block_output\[1\]@last\]"):
        _ = one.site
    with pytest.raises(ValueError, match=r"variable=None.*\['v', 'w'\]"):
        one.subspace()
    assert one.subspace("w").rank == 2


def test_a_score_that_there_is_not_is_named() -> None:
    with pytest.raises(KeyError, match=r"No 'log_odds' on the test split of DAS 1 at .*'dev': \['iia'\]"):
        SEVERAL[0].score("log_odds")
    with pytest.raises(KeyError, match="on the train split"):
        SEVERAL[0].score(split="train")
    assert SEVERAL[0].iia == SEVERAL[0].score() == score(0.60) and SEVERAL[0].score("iia", "dev") == score(0.5)


def test_the_loss_is_the_mean_of_the_last_tenth() -> None:
    losses = tuple(float(i) for i in range(40))
    assert made_fit(losses=losses).loss == statistics.fmean(losses[-4:]) == 37.5
    assert made_fit(losses=losses[:39]).loss == statistics.fmean(losses[36:39])
    assert made_fit(losses=losses[:5]).loss == 4.0
    assert made_fit(losses=()).loss is None


# --- choosing -----------------------------------------------------------------------------------------------


def test_the_best_is_chosen_on_dev_and_never_on_test() -> None:
    """PCA at the first site has the highest test score; DAS 4 at the second has the highest dev mean."""
    best = SEVERAL.best()
    assert (best.place, best.method, best.seed) == (str(SECOND), DAS(4, 0.1), 1)
    assert best.iia.value == 0.45 < max(fit.iia.value for fit in SEVERAL)


def test_the_best_has_the_highest_mean_and_not_the_luckiest_seed() -> None:
    """One seed of DAS 1 has .70 on dev, but its mean is .60, below .625."""
    lucky = max((f for f in SEVERAL if not f.method.control), key=lambda f: f.score(split="dev").value)
    assert (lucky.method, lucky.seed) == (DAS(1), 1) and SEVERAL.best() is not lucky


def test_a_control_is_never_the_best_but_of_controls() -> None:
    assert SEVERAL.where(method=RandomSubspace).best().seed == 0
    assert SEVERAL.where(site=FIRST).best().method == DAS(4, 0.1)


def test_where_there_is_nothing_to_choose_by_it_says_so() -> None:
    with pytest.raises(ValueError, match="There are no fits"):
        made_fits([]).best()
    only_test = made_fit(scores={"test": {"iia": score(0.5)}})
    with pytest.raises(ValueError, match="by metric='iia': they have no scores on dev"):
        made_fits([only_test]).best()
    with pytest.raises(ValueError, match=r"scores on dev are .*iia"):
        SEVERAL.best("log_odds")


def test_the_best_of_a_planted_sweep_is_chosen_on_dev() -> None:
    """Dev expects what the first site's full swap gives, test what the second's gives: dev decides."""
    kept: dict[str, Any] = {}
    for name, seed, site in (("dev", 2, FIRST), ("test", 1, SECOND)):
        data = counterfactuals(seed)
        states = states_by_hook(ids_of(data.sources["v"]), site)
        swapped = logits_by_hook(ids_of(data.base), {site: lambda _, states=states: states})  # type: ignore[misc]
        kept[name] = replace(data, answer=swapped.argmax(-1))
    found = swept([DAS(WIDTH), PCA(WIDTH - 2)], pairs=pairs(**kept), config=replace(QUICK, steps=1))
    at = {site: found.where(site=site, method=DAS)[0] for site in SITES}
    assert at[FIRST].score(split="dev").value == 1 == at[SECOND].score(split="test").value
    assert at[FIRST].iia.value < 0.8 and at[SECOND].score(split="dev").value < 0.8
    assert found.best() is at[FIRST]


# --- averaging ----------------------------------------------------------------------------------------------


def test_the_mean_over_seeds_is_no_maximum() -> None:
    means = {(mean.place, mean.method.label): mean for mean in SEVERAL.mean()}
    assert len(means) == 8
    one = means[str(FIRST), "DAS 1"]
    assert (one.n, one.low, one.high) == (2, 0.60, 0.80)
    assert one.value == pytest.approx(0.70) and one.spread == pytest.approx(statistics.stdev([0.6, 0.8]))
    assert one.fits == SEVERAL.fits[:2] and str(one) == "0.70 ± 0.14"
    single = means[str(FIRST), "PCA 4"]
    assert single.spread is None and str(single) == "0.97"
    dev = SEVERAL.mean(split="dev")[0]
    assert dev.value == pytest.approx(0.60)
    for mean in SEVERAL.mean():
        assert mean.low <= mean.value <= mean.high


def test_the_spread_is_that_of_the_seeds() -> None:
    values = [0.2, 0.5, 0.9]
    (mean,) = grid({(FIRST, DAS(1), seed): (0.5, value) for seed, value in enumerate(values)}).mean()
    assert mean.value == pytest.approx(1.6 / 3) and mean.spread == pytest.approx(statistics.stdev(values))
    (same,) = grid({(FIRST, DAS(1), seed): (0.5, 0.5) for seed in range(3)}).mean()
    assert same.spread == 0 and str(same) == "0.50 ± 0.00"  # of seeds; of one seed there is none


def test_means_of_anything_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mean\(over='layer'\): possible is 'seed'"):
        SEVERAL.mean("layer")
    with pytest.raises(KeyError, match="No 'log_odds'"):
        SEVERAL.mean(metric="log_odds")


def test_means_follow_the_metric_that_is_asked_for() -> None:
    scored = {"iia": score(0.5), "other": score(3.0)}
    fits = made_fits([made_fit(scores={"dev": scored, "test": scored})])
    assert fits.metric == "iia" and fits.mean()[0].value == 0.5 and fits.mean(metric="other")[0].value == 3.0
    assert made_fits([], facts={"metrics": ["other", "iia"]}).metric == "other"
    turned = {"other": score(3.0), "iia": score(0.5)}
    assert made_fits([made_fit(scores={"dev": turned, "test": turned})]).metric == "other"


# --- reading by a program -----------------------------------------------------------------------------------


def test_records_make_a_data_frame_and_json() -> None:
    records = SEVERAL.records()
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    frame = pandas.DataFrame(records)
    assert len(frame) == 13 and list(frame["site"].unique()) == [str(FIRST), str(SECOND)]
    first = records[0]
    expected = {
        "method": "DAS", "label": "DAS 1", "rank": 3, "learning_rate": None, "orthonormalise": "qr",
        "natural": 0.0,
        "site": str(FIRST), "component": "block_output", "layer": 0, "positions": "2", "variables": "above",
        "seed": 0, "start": SEVERAL[0].start, "loss": 1.0, "start_overlap": None,
        "iia_dev": 0.5, "iia_dev_low": 0.47, "iia_dev_high": 0.52,
        "iia_test": 0.6, "iia_test_low": 0.57, "iia_test_high": 0.62,
    }  # fmt: skip
    assert first == expected
    means = frame[frame.method == "DAS"].groupby(["site", "label"]).iia_test.mean()
    assert means[str(FIRST), "DAS 1"] == pytest.approx(0.70)


def test_everything_but_the_subspaces_is_json() -> None:
    fits = swept([DAS(2), PCA(1), FullVector()], seeds=2, metrics=[iia, logit_margin])
    told = json.loads(json.dumps(fits.as_dict(), allow_nan=False))
    assert set(told) == {"facts", "floors", "fits", "failures"} and told["fits"] == fits.records()
    assert told["floors"]["test"]["constant"]["value"] == fits.floors["test"].constant.value
    assert "rows" not in json.dumps(told) and len(told["fits"]) == 8


def test_fits_compare_by_what_they_hold() -> None:
    assert replace(SEVERAL) == SEVERAL and SEVERAL[:3] != SEVERAL[:2] and SEVERAL.fits != SEVERAL
    failure = Failure("PCA 9", str(FIRST), 0, "no states")
    assert made_fits([made_fit()]) != made_fits([made_fit()], failures=(failure,))


def test_fits_are_values() -> None:
    with pytest.raises(AttributeError):
        SEVERAL.fits = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        SEVERAL[0].seed = 3  # type: ignore[misc]


# --- tables -------------------------------------------------------------------------------------------------


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    "condition", [{"seed": 9}, {"rank": 5}, {"layer": 7}, {"positions": "nmae"}, {"learning_rate": 2}]
)
def test_a_condition_that_no_fit_meets_is_no_empty_result(condition: dict[str, Any]) -> None:
    name, value = next(iter(condition.items()))
    with pytest.raises(ValueError, match=re.escape(f"No fit with {name}={value!r}; there are [")):
        SEVERAL.where(**condition)


def test_the_table_has_every_place_and_method() -> None:
    lines = repr(SEVERAL).splitlines()
    (first,) = [line.split() for line in lines if line.split()[:2] == ["0", "2"]]
    (second,) = [line.split() for line in lines if line.split()[:2] == ["1", "last"]]
    assert " ".join(first[2:]) == "0.70 ± 0.14 0.50 ± 0.21 0.97 0.98 ± 0.01 –"
    assert " ".join(second[2:]) == "* 0.55 ± 0.04 0.46 ± 0.01 0.43 – 0.91"
    told = words(repr(SEVERAL))
    for part in (
        "Interchange intervention accuracy (IIA) on 321 test pairs.",
        "±: standard deviation over seeds or draws (×);",
        "Floors on these pairs: no intervention 0.29, best constant answer 0.38.",
        "the model answers 0.97 [0.94, 0.99] of the bases right",
        f"*: chosen on dev, {SEVERAL.best().method.label} at {SEVERAL.best().place}. On test: {SEVERAL.best().iia}.",
    ):
        assert part in told, part
    heading = words("\n".join(lines[:4]))
    assert "(×2)" in heading and "Full" in heading and "Vector" in heading and "position" in heading


def test_a_single_trained_fit_shows_its_interval() -> None:
    """An interval of a fit is one of its own pairs, and is no spread over seeds."""
    one = made_fits([made_fit(test=0.64)])
    assert "0.64 [.61, .66]" in repr(one) and "±" not in repr(one)
    assert "0.64 [.61, .66]" in one._repr_html_()


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.0, 1.0, "[.00, 1.00]"), (-0.5, 10.25, "[-.50, 10.25]"), (-20.04, 0.07, "[-20.04, .07]")],
)
def test_limits_lose_their_leading_zero_and_nothing_else(low: float, high: float, shown: str) -> None:
    scored = {"margin": Estimate(0.5, low, high, 9)}
    assert f"0.50 {shown}" in repr(made_fits([made_fit(scores={"dev": scored, "test": scored})]))


def test_the_chosen_place_is_bold() -> None:
    table = table_of(SEVERAL, title="a title")
    assert [row.style for row in table.rows] == [None, "bold"] and table.title == "a title"
    html = SEVERAL._repr_html_()
    assert re.findall(r"<tr style=\"font-weight:(\w+)\"><td[^>]*>(\d)", html) == [("normal", "0"), ("bold", "1")]
    assert [row.style for row in table_of(SEVERAL.where(method=RandomSubspace)).rows] == ["bold"]


def shades(html: str) -> list[float]:
    return [float(x) for x in re.findall(r"background:rgba\([^)]*,([\d.]+)\)", html)]


def test_the_notebooks_table_shades_from_the_floor_up() -> None:
    """0.38 is the higher floor: what is no better has no colour."""
    values = [0.20, 0.38, 0.69, 1.0]
    sites = [Site("block_output", layer, "last") for layer in range(4)]
    html = grid({(s, PCA(1), 0): (0.5, v) for s, v in zip(sites, values, strict=True)})._repr_html_()
    assert html.startswith("<table>") and html.count("<tr") == 5
    low, floor, middle, high = shades(html)
    assert low == floor == 0 < middle < high and middle == pytest.approx(high / 2, abs=0.01)
    assert "Floors on these pairs" in html


def test_a_table_escapes_what_it_shows() -> None:
    failure = Failure("PCA 1", "<b>", 0, "a < b & [red]c[/red]")
    fits = made_fits([made_fit()], failures=(failure,))
    assert "&lt;b&gt;" in fits._repr_html_() and "<b>" not in fits._repr_html_()
    assert "a < b & [red]c[/red]" in repr(fits)


def test_a_table_of_other_columns_beside() -> None:
    twin = grid({(FIRST, DAS(1), 0): (0.3, 0.31), (SECOND, DAS(1), 0): (0.3, 0.33)})
    table = table_of(SEVERAL, more={"twin: DAS 1": twin})
    heading, *column = table.columns[-1].header, *table.columns[-1].cells
    assert words(str(heading)) == "twin: DAS 1"
    assert column == ["0.31 [.28, .33]", "0.33 [.30, .35]"]


def test_a_long_table_says_what_it_leaves_out() -> None:
    sites = [Site("block_output", layer, "last") for layer in range(70)]
    fits = grid({(site, PCA(1), 0): (0.5, 0.5) for site in sites})
    assert "The first 60 of 70 sites are shown; `records()` has all." in words(repr(fits))
    assert len(table_of(fits).rows) == 60 and fits._repr_html_().count("<tr") == 61 and len(fits.records()) == 70


def test_places_of_several_kinds_are_named_in_full() -> None:
    sites = [Site("block_output", 0, "last"), Site("mlp_output", 0, "last"), Site("wte.output", None, "last")]
    shown = repr(grid({(site, PCA(1), 0): (0.5, 0.5) for site in sites}))
    assert all(str(site) in shown for site in sites) and "position" not in shown


def test_failures_are_told_under_the_table() -> None:
    failures = tuple(Failure("PCA 9", str(FIRST), i, "too few states") for i in range(7))
    lines = notes_of(made_fits([made_fit()], failures=failures))
    assert sum("No result: PCA 9 at block_output[0]@2, seed" in line for line in lines) == 5
    assert lines[-1] == "No result of 2 more searches; `failures` has all."
    nothing = made_fits([], failures=failures[:1])
    for shown in (repr(nothing), nothing._repr_html_()):
        assert "No fits." in shown and "too few states" in shown
    assert repr(made_fits([])) == "No fits."


def test_floors_know_the_higher_one() -> None:
    assert Floors(score(0.9), score(0.2), score(0.6)).highest == 0.6
    assert Floors(score(0.9), score(0.7), score(0.6)).highest == 0.7


# --- 108 cells ----------------------------------------------------------------------------------------------

RANKS, SEEDS = (1, 2, 4), (0, 1, 2)
GRID_SITES = [Site("block_output", layer, at) for layer in (0, 1) for at in ("2", "last")]
GRID_METHODS = [DAS(RANKS), DAS(RANKS, orthonormalise="polar"), RandomSubspace(RANKS, draws=3)]


@pytest.fixture(scope="module")
def many() -> Fits:
    """3 methods × 3 ranks × 3 seeds × 4 sites."""
    few: dict[str, Any] = {name: counterfactuals(seed, n=30) for seed, name in enumerate(("train", "test", "dev"))}
    return swept(GRID_METHODS, GRID_SITES, seeds=SEEDS, config=replace(QUICK, steps=2), pairs=pairs(**few))


def test_108_cells_are_all_there(many: Fits) -> None:
    assert len(many) == 108 and not many.failures
    assert len(set(cells(many))) == 108
    records = pandas.DataFrame(many.records())
    assert len(records) == 108 and records.start.nunique() == 72  # random subspaces have no start
    counts = records.groupby(["site", "method", "orthonormalise", "rank", "seed"], dropna=False).size()
    assert len(counts) == 108 and set(counts) == {1}


def test_108_cells_are_indexed(many: Fits) -> None:
    """Each by its own key, and each with a basis that no other has."""
    seen = []
    for site in GRID_SITES:
        for method in GRID_METHODS:
            for one in method.variants():
                for seed in SEEDS:
                    (fit,) = many.where(site=site, method=one, seed=seed)
                    assert (fit.site, fit.method, fit.seed, fit.rank) == (site, one, seed, vars(one)["rank"])
                    seen.append(fit.subspace().basis())
    assert len(seen) == 108
    flat = {tuple(rows.flatten().tolist()) for rows in seen}
    assert len(flat) == 108
    assert len(many.where(rank=4)) == len(many.where(seed=2)) == 36 and len(many.where(layer=1)) == 54
    assert many.best().method.control is False


def test_108_cells_are_averaged_and_printed(many: Fits) -> None:
    means = many.mean()
    assert len(means) == 36 and sum(mean.n for mean in means) == 108
    assert {id(fit) for mean in means for fit in mean.fits} == {id(fit) for fit in many}
    table = table_of(many)
    assert len(table.rows) == 4 and len(table.columns) == 2 + 9
    shown, html = repr(many), many._repr_html_()
    for mean in means:
        assert str(mean) in words(shown) and str(mean) in html
    assert html.count("±") == 36 + 1 and shown.count("(×3)") == html.count("(×3)") == 9


def test_108_cells_are_drawn(many: Fits) -> None:
    figure = iia_heatmap(many)
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in panels] == [f"{label} (×3)" for label in many.methods]
    for axis, label in zip(panels, many.methods, strict=True):
        told = sorted(t.get_text() for t in axis.texts)
        means = [mean for mean in many.mean() if mean.method.label == label]
        expected = [f"{m.value:.2f}" for m in means] + [f"± {m.spread:.2f}" for m in means]
        assert told == sorted(expected) and len(axis.patches) == 4


def test_108_cells_are_compared(many: Fits) -> None:
    """Every trained one with every other; rank 2 and rank 4 of one seed too, which have starts of their own."""
    found = compare(many)
    trained = [fit for fit in many if not fit.method.control]
    assert len(found.labels) == len(trained) == 72 == len(set(found.labels))
    assert found.ranks == tuple(fit.rank for fit in trained) and found.width == WIDTH
    i, j = (next(k for k, fit in enumerate(trained) if fit.rank == rank and fit.seed == 0) for rank in (2, 4))
    assert found.ranks[i] != found.ranks[j] and not found.matrix[i][j] > 0.9
    a, b = (trained[k].subspace().basis() for k in (i, j))
    assert found.matrix[i][j] == pytest.approx(float((a @ b.T).square().sum()) / 2, abs=1e-5)
    assert set(found.chance) == {(a, b) for a in RANKS for b in RANKS if a <= b}
    figure = overlap_heatmap(compare(many.where(method="DAS 2")))
    assert len(figure.axes[0].patches) == 12 * 11 / 2


def test_the_spread_over_draws_and_seeds_is_there(many: Fits) -> None:
    """A control of one draw would have no spread."""
    for mean in many.mean():
        assert mean.n == 3 and mean.spread == statistics.stdev([fit.iia.value for fit in mean.fits])
    assert sum((mean.spread or 0) > 0 for mean in many.mean()) > 5
    assert overlap_of(many[0].subspace().basis(), many[1].subspace().basis()) < 0.9
    assert many[0].iia == proportion(many[0].pair_scores["iia"].bool()) and many[0].iia.n == 30


def test_a_heat_map_of_one_method_at_two_ranks_keeps_them_apart() -> None:
    """`DifferenceOfMeans` is the label of one variant and the name of both."""
    fits = swept([DifferenceOfMeans(), DifferenceOfMeans(1)], config=replace(QUICK, steps=1))
    panels = [axis for axis in iia_heatmap(fits).axes if axis.get_title(loc="left")]
    assert [len(axis.patches) for axis in panels] == [2, 2]
    assert isinstance(fits[0], Fit) and torch.isfinite(torch.tensor(fits[0].iia.value))


def test_a_subspace_that_works_where_the_whole_state_does_nothing_is_remarked() -> None:
    """A swap of everything that changes nothing, and a subspace that changes everything: the mark of an illusion."""
    strange = made_fits([made_fit(method=DAS(1), test=0.95), made_fit(method=FullVector(), test=0.30)])
    usual = made_fits([made_fit(method=DAS(1), test=0.95), made_fit(method=FullVector(), test=0.60)])
    assert "the interchange of the full vector is at its floor (0.30)" in words(repr(strange))
    assert "Caution" not in repr(usual)
