"""What two subspaces do, against the same by hand; and bases carried to another site's coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from chains import FIRST, SECOND, WIDTH, at, basis, chain, chain_pairs, turn
from tiny_sweeps import SITES, ids_of, pairs, states_by_hook, swapped, swept, tiny, unedited
from torch import Tensor

from subspace_lab.analysis.compared import Compared, read
from subspace_lab.analysis.comparisons import compare
from subspace_lab.analysis.drift import DriftCorrected, procrustes, ridge
from subspace_lab.analysis.geometry import overlap
from subspace_lab.analysis.looks import differences_at, prepared, principal_null
from subspace_lab.analysis.measures import Measure
from subspace_lab.analysis.similarity import (
    Agreement,
    ClassMeans,
    DataWeighted,
    Functional,
    Transfer,
    effects,
    outcomes,
)
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, Subspace, random_subspace
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS
from subspace_lab.das.prepared_pairs import PreparedPairs


@pytest.fixture(scope="module")
def fits() -> Fits:
    return swept(DAS([2, 3]), seeds=2)


@pytest.fixture(scope="module")
def look(fits: Fits) -> PreparedPairs:
    return prepared(tiny(), pairs().test, fits)


def projector(subspace: Subspace) -> torch.Tensor:
    rows = subspace.basis().detach().double()
    return rows.T @ rows


def test_effects_are_those_by_hand_and_their_cosines(fits: Fits, look: PreparedPairs) -> None:
    items, data = read(fits), pairs().test
    found = effects(look, items)
    by_hand = [swapped(fit, data).double() - unedited(data).double() for fit in fits]
    by_hand = [change - change.mean(1, keepdim=True) for change in by_hand]
    for one, expected in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=0)
    matrix = Functional(look).matrix(items)
    for i, one in enumerate(by_hand):
        for j, other in enumerate(by_hand):
            cosine = float((one * other).sum() / (one.norm() * other.norm()))
            assert matrix[i][j] == pytest.approx(cosine, abs=1e-4)
    assert matrix[0][0] == pytest.approx(1)


def test_what_moves_all_answers_alike_is_no_effect(fits: Fits, look: PreparedPairs) -> None:
    """A constant added to all logits of one fit's outcome must change no effect."""
    items = read(fits)[:1]
    plain = outcomes(look, items)[0]
    change = (plain.logits - plain.unedited).double()
    assert change.mean(-1).abs().max() > 1e-3  # there is something to subtract
    assert effects(look, items)[0].mean(-1).abs().max() < 1e-9


def test_an_interchange_that_moves_nothing_has_cosine_0() -> None:
    """The last map reads ANSWERS dimensions of the WIDTH; the others move nothing."""
    model: Any
    model, data = chain(), chain_pairs()
    last = model.model[2].weight.detach()
    unread = torch.linalg.svd(last)[2][len(last) :]
    null = at(SECOND, unread[:1])
    full = at(SECOND, torch.eye(WIDTH, dtype=torch.float64))
    found = Functional(prepared(model, data, {"null": null, "full": full}))
    matrix = found.matrix(read({"null": null, "full": full}))
    assert matrix[1][1] == pytest.approx(1) and abs(matrix[0][1]) < 1e-3


def test_agreement_is_the_share_of_equal_answers_among_those_that_change(fits: Fits, look: PreparedPairs) -> None:
    items, data = read(fits), pairs().test
    answers, before = [swapped(fit, data).argmax(1) for fit in fits], unedited(data).argmax(1)
    matrix = Agreement(look).matrix(items)
    for i, one in enumerate(answers):
        for j, other in enumerate(answers):
            either = (one != before) | (other != before)
            assert 0 < either.sum() < len(before)
            assert matrix[i][j] == pytest.approx(float((one == other)[either].double().mean()))


def test_what_changes_no_answer_agrees_with_nothing() -> None:
    model: Any
    model, data = chain(), chain_pairs()
    last = model.model[2].weight.detach()
    unread = torch.linalg.svd(last)[2][len(last) :]
    items = {"one": at(SECOND, unread[:1]), "other": at(SECOND, unread[1:2])}
    assert Agreement(prepared(model, data, items)).matrix(read(items)) == [[0, 0], [0, 0]]


def test_transfer_at_home_is_the_iia_and_elsewhere_that_of_the_same_basis(fits: Fits, look: PreparedPairs) -> None:
    matrix, data = Transfer(look).matrix(read(fits)), pairs().test
    for i, fit in enumerate(fits):
        assert matrix[i][i] == pytest.approx(fit.iia.value)
        for j, other in enumerate(fits):
            moved = read(fits)[i]
            moved = Compared(moved.label, moved.subspace, other.site, moved.variable)
            outcome = outcomes(look, [moved])[0]
            expected = float((outcome.logits.argmax(1) == data.answer).double().mean())
            assert matrix[i][j] == pytest.approx(expected)
    # The same basis at two sites does two things.
    assert any(matrix[i][j] != matrix[i][i] for i in range(4) for j in range(4, 8))


def test_data_weighted_overlap_is_the_formula_with_projectors(fits: Fits, look: PreparedPairs) -> None:
    matrix, data = DataWeighted(look).matrix(read(fits)), pairs().test
    written = []
    for fit in fits:
        source, base = (states_by_hook(ids_of(one), fit.site) for one in (data.sources["v"], data.base))
        difference = (source - base).double()
        found = differences_at(look, "v", fit.site)
        torch.testing.assert_close(found, difference, atol=1e-5, rtol=0)
        moment = difference.T @ difference / len(difference)
        p = projector(fit.subspace())
        written.append(p @ moment @ p)
    for i, one in enumerate(written):
        for j, other in enumerate(written):
            expected = float((one * other).sum() / (one.norm() * other.norm()))
            assert matrix[i][j] == pytest.approx(expected, abs=1e-5)


def test_class_mean_overlap_is_that_of_the_projected_means(fits: Fits, look: PreparedPairs) -> None:
    matrix, data = ClassMeans(look).matrix(read(fits)), pairs().test
    spans = []
    for fit in fits:
        states = states_by_hook(ids_of(data.sources["v"]), fit.site).double()
        means = torch.stack([states[data.values["v"] == value].mean(0) for value in range(3)])
        inside = (means - means.mean(0)) @ projector(fit.subspace())
        rank = min(2, fit.rank)
        spans.append(torch.linalg.svd(inside)[2][:rank])
    for i, one in enumerate(spans):
        for j, other in enumerate(spans):
            assert matrix[i][j] == pytest.approx(overlap(one, other), abs=1e-5)


def test_measures_go_into_compare_with_their_own_nulls(fits: Fits, look: PreparedPairs) -> None:
    assert isinstance(Functional(look), Measure) and not isinstance(overlap, Measure)
    low = fits.where(rank=2)
    found = compare(low, across="seed", measure=Functional(look), min_effect=None)
    assert found.null is not None
    assert found.across is not None
    assert found.measure == "cosine of effects" and found.across.pairs == 2 and -1 <= found.null.mean <= 1
    again = compare(low, across="seed", measure=Functional(look), min_effect=None)
    assert again == found  # the null is drawn from seeds
    top = principal_null(look, low, 4)
    narrow = compare(low, across="seed", null={"top 4": top}, min_effect=None)
    # Two random planes of a space of four dimensions share half; of 32 dimensions a sixteenth.
    assert narrow.null is not None
    assert narrow.nulls["top 4"].mean > 3 * narrow.null.mean
    for one in top:
        components = torch.linalg.svd((s := look.states["v"][one.site()][:, 0].double()) - s.mean(0))[2][:4]
        inside = one.subspace().basis().double() @ components.T
        torch.testing.assert_close(inside.square().sum(), torch.tensor(2.0).double(), atol=1e-4, rtol=0)


def test_what_the_measures_cannot_do_is_said(fits: Fits, look: PreparedPairs) -> None:
    alone = Compared("alone", random_subspace(32, 2, 0))
    with pytest.raises(ValueError, match="alone is a subspace without a site"):
        Functional(look).matrix([alone])
    with pytest.raises(ValueError, match=r"No pairs for the model 'b'; there are pairs for \['a'\]"):
        Functional({"a": look}).matrix([Compared("x", random_subspace(32, 2, 0), SITES[0], "v", model="b")])
    other = prepared(tiny(), pairs().dev, fits)
    with pytest.raises(ValueError, match="different pairs"):
        Functional({"a": look, "b": other}).matrix(read(fits))
    two = pairs(("v", "w")).test
    with pytest.raises(ValueError, match=r"the variables \['v', 'w'\], none of which is 'edited'"):
        prepared(tiny(), two, {"x": Alignment({"edited": (SITES[0], random_subspace(32, 2, 0))})})
    with pytest.raises(ValueError, match="rank 2 asked for a stream of width 1"):
        principal_null(look, fits.where(rank=2), 1)


# --- maps between sites ---------------------------------------------------------------------------------------


def test_procrustes_gives_a_rotation_back_and_ridge_a_linear_map() -> None:
    states = torch.randn(50, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(procrustes(states, states @ turn()), turn(), atol=1e-9, rtol=0)
    linear = torch.randn(WIDTH, 7, dtype=torch.float64)
    torch.testing.assert_close(ridge(states, states @ linear, 1e-9), linear, atol=1e-6, rtol=0)
    stretched = procrustes(states, states @ torch.diag(torch.arange(1.0, WIDTH + 1).double()))
    torch.testing.assert_close(stretched @ stretched.T, torch.eye(WIDTH).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("fit", [procrustes, partial(ridge, strength=1e-9)])
def test_a_carried_basis_meets_itself_behind_a_rotation(fit: Callable[..., Tensor] | partial[Tensor]) -> None:
    model, data = chain(), chain_pairs()
    first, second = basis(3), basis(3) @ turn().T
    items = {"first": at(FIRST, first), "second": at(SECOND, second), "other": at(SECOND, basis(3, 9))}
    measure = DriftCorrected(prepared(model, data, items), fit)
    matrix = measure.matrix(read(items))
    assert overlap(first, second) < 0.8
    assert matrix[0][1] == pytest.approx(1, abs=1e-6) and matrix[1][0] == pytest.approx(1, abs=1e-6)
    assert matrix[1][2] == pytest.approx(overlap(second, basis(3, 9)), abs=1e-9)  # one site: nothing is carried
    assert matrix[0][2] == pytest.approx(matrix[1][2], abs=1e-6)
    # A rotation brings random subspaces no nearer than chance; compare draws that null by the same map.
    found = compare(items, measure=measure)
    assert found.chance_of(0, 1).mean == pytest.approx(3 / WIDTH, abs=0.15)


def test_a_map_between_two_models_is_fitted_on_the_same_texts() -> None:
    turned: Any
    data, turned = chain_pairs(), chain()
    with torch.no_grad():  # the same function in other coordinates
        turned.model[0].weight.copy_(turn() @ turned.model[0].weight)
        turned.model[0].bias.copy_(turn() @ turned.model[0].bias)
        turned.model[1].weight.copy_(turned.model[1].weight @ turn().T)
    items = [
        Compared("one", FixedSubspace(basis(2)), FIRST, "v", model="a"),
        Compared("other", FixedSubspace(basis(2) @ turn().T), FIRST, "v", model="b"),
    ]
    looks = {"a": prepared(chain(), data, {"x": at(FIRST, basis(2))})}
    looks["b"] = prepared(turned, data, {"x": at(FIRST, basis(2))})
    assert DriftCorrected(looks).matrix(items)[0][1] == pytest.approx(1, abs=1e-6)
    assert Functional(looks).matrix(items)[0][1] == pytest.approx(1, abs=1e-6)


def test_sites_without_common_positions_have_no_map() -> None:
    wide, last = Site("block_output", 0, "2:4"), Site("block_output", 1, "last")
    given = {
        "a": Alignment({"v": (wide, random_subspace(32, 2, 0))}),
        "b": Alignment({"v": (last, random_subspace(32, 2, 1))}),
    }
    with pytest.raises(ValueError, match="positions in these texts"):
        DriftCorrected(prepared(tiny(), pairs().test, given)).matrix(read(given))
