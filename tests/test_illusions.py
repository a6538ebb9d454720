"""Parts of a subspace, the tests of illusions, and `purify`: theorems on plain modules whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_sweeps import SITES, pairs, swept, tiny
from torch import Tensor, nn

from subspace_lab.analysis._subspace_parts import apart, outside_of, projected, share_in
from subspace_lab.analysis.illusions import illusion, off_natural
from subspace_lab.analysis.purifying import purify
from subspace_lab.analysis.variation import Variation, variations
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.fits import Fit
from subspace_lab.das.methods import DAS, RevNet
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect
from subspace_lab.tasks.planted import VARIABLE, Planted, planted_regression, squared_error

# --- a module that has a variable, a copy of it that nothing reads, and a dormant way into its answer --------

DIMENSIONS = 8
VALUE, COPY, DORMANT, OTHER = range(4)  # axes of the stream; the rest is noise
PLACE = Site("embed.output")


class Reader(nn.Module):
    """Logits (s, −s) with s = tanh(h_value + h_other) + 3 h_dormant: bent, so that gradients differ between states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIMENSIONS, DIMENSIONS, bias=False)
        nn.init.eye_(self.embed.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        s = torch.tanh(h[:, VALUE] + h[:, OTHER]) + 3 * h[:, DORMANT]
        return torch.stack([s, -s], 1)


def states(n: int, seed: int) -> Tensor:
    """Value ±1, its noisy copy, nothing on the dormant axis, another part of the answer of ±.5 or ±1.5, noise."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, DIMENSIONS, generator=g, dtype=torch.float64)
    sign = torch.randint(0, 2, (n,), generator=g) * 2.0 - 1
    h[:, VALUE], h[:, COPY], h[:, DORMANT] = sign, 2 * sign + 0.3 * h[:, COPY], 0
    h[:, OTHER] = torch.randint(0, 4, (n,), generator=g) - 1.5
    return h


def drawn(n: int, seed: int) -> Counterfactuals:
    base, source = states(n, 2 * seed), states(n, 2 * seed + 1)
    before, after = ((x[:, VALUE] + base[:, OTHER] < 0).long() for x in (base, source))
    values = {"v": (source[:, VALUE] < 0).long()}
    return Counterfactuals(Batch.of(base), {"v": Batch.of(source)}, before, after, ("+", "-"), values=values)


def reader() -> tuple[Backbone, Pairs]:
    return Backbone(Reader().double()), Pairs(drawn(200, 0), drawn(100, 1), drawn(150, 2))


def along(**parts: float) -> Tensor:
    """A direction by its axes: (1, DIMENSIONS)."""
    axes = {"value": VALUE, "copy": COPY, "dormant": DORMANT, "other": OTHER, "noise": DIMENSIONS - 1}
    found = torch.zeros(1, DIMENSIONS, dtype=torch.float64)
    for name, size in parts.items():
        found[0, axes[name]] = size
    return found / found.norm()


def aligned(basis: Tensor) -> Alignment:
    return Alignment({"v": (PLACE, FixedSubspace(basis))}, {"scores": {"iia": 0.5}, "task": "signs"})


def known() -> Variation:
    backbone, data = reader()
    return variations(backbone, data, {"v": PLACE}, varies=1.0, read=1.0)["v"]


def in_span(vector: Tensor, basis: Tensor) -> Tensor:
    return (vector @ basis.T).norm()


# --- what varies and what is read ---------------------------------------------------------------------------


def test_what_varies_is_the_span_of_the_differences() -> None:
    """All but the dormant axis; up to a share of the variance those where there is most of it."""
    found = known()
    backbone, data = reader()
    assert isinstance(data.train, Counterfactuals)
    by_hand = data.train.sources["v"].positional - data.train.base.positional  # type: ignore[operator]
    assert torch.equal(found.sources - found.bases, by_hand)
    assert len(found.varies) == torch.linalg.matrix_rank(by_hand) == DIMENSIONS - 1
    assert in_span(along(dormant=1), found.varies) < 1e-9
    shared = replace(data.train, sources={"v": Batch.of(with_axis_of(data.train, OTHER))})
    fewer = variations(backbone, shared, {"v": PLACE}, varies=1.0)["v"].varies
    assert len(fewer) == DIMENSIONS - 2 and in_span(along(other=1), fewer) < 1e-9  # it varies, in no pair
    most = variations(backbone, data, {"v": PLACE}, varies=0.3)["v"].varies
    assert len(most) == 1 and in_span(along(value=1, copy=2), most) > 0.9


def with_axis_of(data: Counterfactuals, axis: int) -> Tensor:
    """The sources with one of their axes as in their bases."""
    base, source = data.base.positional, data.sources["v"].positional
    assert isinstance(base, Tensor) and isinstance(source, Tensor)
    return source.index_copy(1, torch.tensor([axis]), base[:, axis : axis + 1])


def test_what_is_read_is_the_span_of_the_gradients() -> None:
    """G = E[JᵀJ] by hand: dlogits/dh = ± (1 − tanh²) on value and other, ± 3 on dormant, at the states between."""
    found = known()
    share = torch.tensor([illusions_along(i) for i in range(200)], dtype=torch.float64)[:, None]
    between = found.bases + share * (found.sources - found.bases)
    slope = 1 - torch.tanh(between[:, VALUE] + between[:, OTHER]).square()
    by_hand = torch.zeros(200, DIMENSIONS, dtype=torch.float64)
    by_hand[:, VALUE] = by_hand[:, OTHER] = slope
    by_hand[:, DORMANT] = 3
    # Two answers, whose mean is 0 already: a probe is half their difference.
    torch.testing.assert_close(found.gradients, torch.stack([by_hand, -by_hand], 1))
    assert len(found.read) == 2
    assert in_span(along(dormant=1), found.read) == pytest.approx(1)
    assert in_span(along(value=1, other=1), found.read) == pytest.approx(1)
    assert in_span(along(copy=1), found.read) < 1e-9
    # Inside what varies the dormant axis is not, and value and other are read along their sum alone.
    assert len(found.both) == 1 and in_span(along(value=1, other=1), found.both) == pytest.approx(1)


def illusions_along(i: int) -> float:
    from subspace_lab.analysis.variation import ALONG

    return ALONG[i % len(ALONG)]


def test_effects_are_products_by_hand() -> None:
    found = known()
    basis = random_orthonormal(DIMENSIONS, 2, 0).double()
    basis = torch.linalg.qr(basis.T)[0].T
    moved = found.differences @ found.both.T @ found.both @ basis.T @ basis
    by_hand = (found.gradients * moved[:, None]).sum(-1)
    torch.testing.assert_close(found.effects(found.both, basis), by_hand)


def test_gradients_through_a_language_model_are_those_of_its_own_forward() -> None:
    """Of a tiny GPT-2 against autograd through a forward hook, in the middle of the model."""
    backbone, data, site = tiny(), pairs(), SITES[1]
    found = variations(backbone, data, {"v": site}, examples=12)["v"]
    assert isinstance(data.train, Counterfactuals)
    rows = torch.linspace(0, len(data.train) - 1, 12).round().long()
    base, source = data.train.base.rows(rows), data.train.sources["v"].rows(rows)
    shares = torch.tensor([illusions_along(int(i)) for i in rows])[:, None]
    h, s = (collect(backbone, batch, [site])[site][:, 0] for batch in (base, source))
    leaf = (h + shares * (s - h)).requires_grad_()
    model: Any = backbone.model

    def put(_: nn.Module, __: Any, output: Any) -> Any:
        stream = (output if isinstance(output, Tensor) else output[0]).clone()
        stream[:, -1] = leaf
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    handle = model.transformer.h[site.layer].register_forward_hook(put)
    logits = model(**base.inputs).logits[:, -1, data.train.tokens]
    handle.remove()
    centred = logits - logits.mean(1, keepdim=True)
    by_hand = torch.stack(
        [torch.autograd.grad(centred[:, a].sum(), leaf, retain_graph=True)[0] for a in range(12)], 1
    )
    torch.testing.assert_close(found.gradients.float(), by_hand, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.differences.float(), s - h)
    less = variations(backbone, data, {"v": site}, read=0.5, examples=12)["v"]
    assert 0 < len(less.both) < len(found.both) and 0 < len(less.read) < len(found.read)
    assert not any(p.grad is not None for p in model.parameters())


def test_many_answers_are_asked_by_random_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[Jᵀ z zᵀ J] = JᵀJ: with many draws the mean of the probes' products is the exact one."""
    backbone, data = tiny(), pairs()
    exact = variations(backbone, data, {"v": SITES[0]}, examples=4)["v"].gradients
    monkeypatch.setattr("subspace_lab.analysis.variation.PROBES", 11)
    few = variations(backbone, data, {"v": SITES[0]}, examples=4)["v"].gradients
    assert few.shape[1] == 11 and exact.shape[1] == 12
    sizes = few.square().sum(), exact.square().sum()
    assert 0.4 < sizes[0] / sizes[1] < 2.5


def test_weights_that_read_a_hidden_layer_span_its_rows() -> None:
    """GPT-2 reads its 4 d hidden units by a projection of rank d, which is stored transposed."""
    backbone, site = tiny(), Site("mlp_activation", 1, "last")
    found = variations(backbone, pairs(), {"v": site}, examples=8)["v"]
    model: Any = backbone.model
    weight = model.transformer.h[1].mlp.c_proj.weight.detach().double()  # (units, width)
    assert found.weights is not None and found.weights.shape == (32, 128)
    inside = weight.T / weight.T.norm(dim=1, keepdim=True)
    torch.testing.assert_close((inside @ found.weights.T).norm(dim=1), torch.ones(32, dtype=torch.float64))
    # What the answers depend on lies in what the weights read.
    assert share_in(found.read, found.weights) == pytest.approx(1, abs=1e-6)
    assert variations(backbone, pairs(), {"v": SITES[0]}, examples=8)["v"].weights is None


# --- projections --------------------------------------------------------------------------------------------


def test_projection_keeps_what_lies_inside_and_drops_the_rest() -> None:
    space = torch.eye(6, dtype=torch.float64)[:3]
    tilted = torch.zeros(3, 6, dtype=torch.float64)
    tilted[0, 0], tilted[0, 3] = 0.8, 0.6
    tilted[1, 1], tilted[1, 4] = 0.09, (1 - 0.09**2) ** 0.5  # below a tenth: dropped
    tilted[2, 2] = 1
    inside, cosines = projected(tilted, space)
    torch.testing.assert_close(cosines, torch.tensor([1, 0.8, 0.09], dtype=torch.float64))
    assert len(inside) == 2 and share_in(inside, space) == pytest.approx(1)
    torch.testing.assert_close(inside.abs(), torch.eye(6, dtype=torch.float64)[[2, 0]])
    outside = outside_of(tilted, space)
    torch.testing.assert_close(
        (outside.T @ outside).diagonal(), torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.float64)
    )
    assert share_in(tilted, space) == pytest.approx((0.64 + 0.0081 + 1) / 3)


def test_variables_at_one_site_are_turned_apart_by_as_little_as_it_takes() -> None:
    one, other = along(value=1), along(value=0.1, other=1)
    found = apart({"a": PLACE, "b": PLACE}, {"a": one, "b": other})
    a, b = (found[name].basis() for name in "ab")
    assert float((a @ b.T).abs()) < 1e-6
    # By symmetry each gives half.
    assert float((a.double() @ one.T).abs()) == pytest.approx(float((b.double() @ other.T).abs()), abs=1e-6)
    with pytest.raises(ValueError, match="lie in each other's spans"):
        apart({"a": PLACE, "b": PLACE}, {"a": one, "b": one})


# --- reports ------------------------------------------------------------------------------------------------


def test_the_variable_itself_is_not_flagged() -> None:
    """Its gradient goes along value + other alone, and an exchange of that sum is no exchange of the value."""
    backbone, data = reader()
    report = illusion(backbone, data, aligned(along(value=1)), varies=1.0)
    assert not report.flagged and report.found.value == 1 and "carry the effect" in report.because
    assert report.part("both").iia.value < 0.9 and report.part("varies").iia.value == 1
    assert 0.15 < report.sensed["v"] < 0.5 and report.written["v"] == pytest.approx(1)
    assert report.full is not None and report.full.value < 0.9
    assert "Not flagged at embed.output" in str(report) and "n = 150 pairs" in str(report)
    told = json.loads(json.dumps(report.as_dict()))
    assert told["flagged"] is False and told["parts"][0]["name"] == "varies"
    with pytest.raises(KeyError, match="there are \\['varies', 'idle'"):
        report.part("weights")


def test_a_dormant_way_that_is_fed_by_the_copy_is_flagged() -> None:
    """Makelov's illusion: read from the copy, which nothing reads, written where nothing ever is.

    (copy + dormant)/√2 moves the dormant axis by the difference of the copy, which decides the answer. Its part that
    varies is the copy and its part that is read the dormant axis; neither changes an answer alone.
    """
    backbone, data = reader()
    report = illusion(backbone, data, aligned(along(copy=1, dormant=1)))
    assert report.found.value > 0.75 and report.flagged and "never vary" in report.because
    assert report.part("read").iia == report.part("idle").iia  # the dormant axis: nothing comes in
    assert report.part("read").iia.value < 0.7
    assert report.written["v"] < 0.01
    assert report.part("read").share["v"] == pytest.approx(0.5, abs=1e-6)


def test_an_exchange_that_changes_nothing_has_no_effect_to_share() -> None:
    backbone, data = reader()
    report = illusion(backbone, data, aligned(along(noise=1)), varies=1.0, read=1.0)
    assert report.sensed["v"] == report.written["v"] == 0
    assert report.part("both").ranks == {"v": 0} and report.part("both").iia == report.found


def test_scores_of_the_parts_are_interchanges_by_hand() -> None:
    backbone, data = reader()
    basis = along(value=1, copy=0.5, dormant=0.8)
    found = variations(backbone, data, {"v": PLACE})["v"]
    report = illusion(backbone, data, aligned(basis))
    base, source = data.test.base.positional, data.test.sources["v"].positional
    assert isinstance(base, Tensor) and isinstance(source, Tensor)
    for name, space in (("varies", found.varies), ("read", found.read), ("both", found.both)):
        part = (basis @ space.T) @ space
        part = part / part.norm()
        edited = backbone.model(base + ((source - base) @ part.T) @ part)
        right = (edited.argmax(-1) == data.test.answer).double().mean()
        assert report.part(name).iia.value == pytest.approx(float(right)), name
        assert report.part(name).share["v"] == pytest.approx(float((basis @ space.T).square().sum()))


# --- states that no input has -------------------------------------------------------------------------------


def test_states_of_another_input_are_as_near_as_natural_ones_and_a_dormant_axis_is_far() -> None:
    found = known()
    whole = off_natural(found, torch.eye(DIMENSIONS, dtype=torch.float64))
    assert abs(whole.value) < 0.05 and whole.p > 0.05 and len(whole.null) == 99
    far = off_natural(found, along(copy=1, dormant=1))
    assert far.value > 5 * abs(whole.value) and far.p <= 0.05


def test_the_energy_distance_is_its_formula() -> None:
    found = known()
    small = replace(found, bases=found.bases[:3], sources=found.sources[:3])
    basis = along(value=1)
    edited = small.bases + ((small.sources - small.bases) @ basis.T) @ basis
    natural = torch.cat([small.bases, small.sources])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))

    def apart_of(x: Tensor, y: Tensor, same: bool) -> float:
        each = [float((a - b).norm()) for i, a in enumerate(x) for j, b in enumerate(y) if not same or i != j]
        return sum(each) / len(each)

    y = natural[order[3:]]
    by_hand = 2 * apart_of(edited, y, False) - apart_of(edited, edited, True) - apart_of(y, y, True)
    by_hand /= apart_of(natural, natural, True)
    assert off_natural(small, basis, draws=1).value == pytest.approx(by_hand)


# --- purify -------------------------------------------------------------------------------------------------


def test_purify_takes_the_dormant_part_off_and_says_so() -> None:
    backbone, data = reader()
    given = aligned(along(value=1, copy=2, dormant=1.5))
    found = purify(backbone, data, given, varies=1.0)
    basis = found.subspace().basis().double()
    assert found.site() == PLACE and basis.shape == (1, DIMENSIONS)
    assert in_span(along(dormant=1), basis) < 1e-6
    told = found.facts["purified"]
    assert told["variables"]["v"]["kept"] == 1 and told["scores before"] == {"iia": 0.5}
    assert "scores" not in found.facts and found.facts["task"] == "signs"
    assert told["took"] == "varies" and told["iia on dev"]["after"] > 0.95
    assert given.subspace().basis()[0, DORMANT] != 0  # the one that was given is as it was


def test_purify_keeps_no_more_directions_than_dev_asks_for() -> None:
    backbone, data = reader()
    two = torch.cat([along(value=1, dormant=0.5), along(noise=1)])  # all of the noise varies, not all of the other
    found = purify(backbone, data, aligned(two), varies=1.0)
    assert found.subspace().rank == 1 and in_span(along(noise=1), found.subspace().basis().double()) < 1e-6
    assert found.facts["purified"]["took"] == "varies" and found.facts["purified"]["variables"]["v"]["kept"] == 1


def test_what_is_a_variable_already_stays_as_it_is() -> None:
    """On isometric states every direction varies, so the row space of the readout is all that is left."""
    planted = planted_regression(0, width=16, rank=3)
    tilted = torch.linalg.qr((planted.basis + 0.3 * random_orthonormal(16, 3, 5)).double().T)[0].T
    for basis in (planted.basis.double(), tilted):
        given = Alignment({VARIABLE: (planted.site, FixedSubspace(basis))})
        found = purify(Backbone(planted.model), planted.pairs, given, varies=1.0).subspace()
        assert found.rank == 3
        assert share_in(found.basis().double(), planted.basis.double()) == pytest.approx(1, abs=1e-4)


def test_a_copy_that_nothing_reads_is_flagged_where_it_is_strong() -> None:
    """The ready positive and negative control: DAS reads the copy of strength 3, and the variable beside one of 1."""
    reports = {}
    for strength in (1.0, 3.0):
        planted = planted_regression(0, width=16, rank=2, copy=strength, batch=128)
        fit = searched(planted)
        backbone = Backbone(planted.model)
        reports[strength] = report = illusion(backbone, planted.pairs, fit)
        truth = planted.basis.double()
        pure = purify(backbone, planted.pairs, fit.alignment)
        assert share_in(truth, pure.subspace().basis().double()) == pytest.approx(1, abs=1e-3)
        share = share_in(truth, fit.subspace().basis().double())
        assert share > 0.99 if strength == 1 else share < 0.3, (strength, share)
        assert report.part("both").iia.value >= report.found.value - 0.02
        assert report.sensed[VARIABLE] == pytest.approx(share, abs=0.1)
    assert reports[3.0].flagged and "a copy that the model does not read" in reports[3.0].because
    assert not reports[1.0].flagged


def searched(planted: Planted) -> Fit:
    config = TrainingConfig(steps=120, learning_rate=0.05, batch_size=128)
    rank = len(planted.basis)
    fits = sweep(
        Backbone(planted.model),
        planted.pairs,
        [planted.site],
        [DAS(rank)],
        config=config,
        loss=squared_error,
        quiet=True,
    )
    return fits[0]


# --- several variables, language models, and what is refused ------------------------------------------------


def test_two_variables_at_one_site_stay_parts_of_one_basis() -> None:
    data = pairs(("a", "b"))
    fit = swept(DAS(2), [SITES[1]], pairs=data)[0]
    report = illusion(tiny(), data, fit, examples=16)
    assert report.full is None and set(report.sensed) == {"a", "b"}
    found = purify(tiny(), data, fit.alignment, examples=16)
    a, b = (found.subspace(name).basis() for name in "ab")
    assert float((a @ b.T).abs().max()) < 1e-4
    prepared = PreparedPairs.of(tiny(), data.test, [{"a": SITES[1], "b": SITES[1]}])
    prepared.outcomes({"a": SITES[1], "b": SITES[1]}, [found.edits()])  # it edits


def test_variables_at_sites_of_their_own_and_reports_of_a_language_model() -> None:
    data, place = pairs(("a", "b")), {"a": SITES[0], "b": SITES[1]}
    fit = swept(DAS(2), [place], pairs=data)[0]
    report = illusion(tiny(), data, fit, examples=16)
    assert report.found.value == fit.iia.value and report.full is not None
    assert report.place == f"{SITES[0]}, {SITES[1]}"
    hidden = Site("mlp_activation", 1, "last")
    fit = swept(DAS(2), [hidden])[0]
    parts = {part.name for part in illusion(tiny(), pairs(), fit, examples=16).parts}
    assert parts == {"varies", "idle", "read", "unread", "both", "weights", "beyond weights"}


def test_what_cannot_be_looked_at_is_refused() -> None:
    backbone, data = reader()
    right = aligned(along(value=1))
    with pytest.raises(ValueError, match="varies=0: it has to be a share above 0"):
        illusion(backbone, data, right, varies=0)
    with pytest.raises(ValueError, match="examples=0"):
        purify(backbone, data, right, examples=0)
    with pytest.raises(ValueError, match=r"has the variables \['w'\], the pairs exchange \['v'\]"):
        purify(backbone, data, Alignment({"w": (PLACE, FixedSubspace(along(value=1)))}))
    dormant = purify(backbone, data, aligned(along(dormant=1)))
    assert dormant.facts["purified"]["took"] == "nothing"
    torch.testing.assert_close(dormant.subspace().basis().double(), along(dormant=1))
    same = replace(drawn(20, 5), sources={"v": drawn(20, 5).base})
    with pytest.raises(ValueError, match="The sources of 'v' have the same states as their bases"):
        illusion(backbone, Pairs(same, data.dev, data.test), right)
    nonlinear = swept(RevNet(), [SITES[0]])[0].alignment
    with pytest.raises(ValueError, match="is a nonlinear map"):
        purify(tiny(), pairs(), nonlinear)
