"""Methods: what each finds against a formula written by hand, and how they name, split and refuse their settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from tiny_sweeps import (
    QUICK,
    SITES,
    WIDTH,
    counterfactuals,
    ids_of,
    overlap_of,
    pairs,
    states_by_hook,
    swept,
    tiny,
)
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import interchange
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, LearnedSubspace, random_subspace
from subspace_lab.das._places import cell_seed
from subspace_lab.das.methods import (
    DAS,
    PCA,
    DifferenceOfMeans,
    FullVector,
    Learner,
    Method,
    Problem,
    RandomSubspace,
)
from subspace_lab.das.methods.method import ParameterGroup, check_setting
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.das.prepared_pairs import PreparedPairs, from_pool
from subspace_lab.das.prepared_pairs import fit as train_learners
from subspace_lab.engine.training import TrainingConfig

SITE, OTHER = SITES
STILL = TrainingConfig(steps=1, batch_size=4, learning_rate=1e-9)
TWO = ("v", "w")


def problem(sites: dict[str, Site], width: int = 9, seed: int = 5, n: int = 50) -> Problem:
    """A search in random states, stretched so that their directions differ in size."""
    g = torch.Generator().manual_seed(3)
    stretch = torch.diag(torch.linspace(0.3, 3, width)) @ random_orthonormal(width, width, 8)
    states = {name: torch.randn(n, width, generator=g) @ stretch + 4 for name in sites}
    values = {name: torch.randint(0, 3, (n,), generator=g) for name in sites}
    for name in sites:
        states[name] = states[name] + values[name][:, None] * torch.linspace(-1, 1, width)
    widths = dict.fromkeys(sites.values(), width)
    return Problem(sites, widths, seed, torch.device("cpu"), states.__getitem__, values.__getitem__)


def found(method: Method, given: Problem) -> dict[str, Tensor]:
    """{variable: the basis that the method gives without any training}"""
    alignment = method.learner(given).alignment()
    assert {name: site for name, (site, _) in alignment.variables.items()} == dict(given.sites)
    return {name: subspace.basis().detach() for name, (_, subspace) in alignment.variables.items()}


def span(rows: Tensor) -> Tensor:
    """The projector onto the rows."""
    q = torch.linalg.qr(rows.double().T)[0]
    return q @ q.T


def same_span(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(span(one), span(other), rtol=0, atol=atol)


# --- each against its formula -------------------------------------------------------------------------------


def test_principal_components_are_eigenvectors_of_the_covariance() -> None:
    given = problem({"v": SITE})
    states = given.states("v").double()
    centred = states - states.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred / len(states))[1].T.flip(0)
    for rank in (1, 4):
        same_span(found(PCA(rank), given)["v"], vectors[:rank])
    # Not of the raw second moment, whose largest direction is the mean.
    raw = torch.linalg.eigh(states.T @ states)[1].T.flip(0)
    assert overlap_of(found(PCA(1), given)["v"].double(), raw[:1]) < 0.9


def test_the_first_variable_gets_the_largest_components() -> None:
    given = problem({"v": SITE, "w": SITE})
    both = found(PCA(2), given)
    whole = found(PCA(4), replace(given, sites={"v": SITE}))["v"]
    same_span(both["v"], whole[:2])
    same_span(both["w"], whole[2:])
    apart = problem({"v": SITE, "w": OTHER})
    for name in TWO:
        same_span(found(PCA(2), apart)[name], found(PCA(2), replace(apart, sites={name: SITE}))[name])


def class_means(given: Problem, name: str) -> Tensor:
    states, values = given.states(name).double(), given.values(name)
    return torch.stack([states[values == value].mean(0) for value in range(3)])


def test_difference_of_means_spans_the_differences() -> None:
    given = problem({"v": SITE})
    means = class_means(given, "v")
    basis = found(DifferenceOfMeans(), given)["v"]
    assert len(basis) == 2
    same_span(basis, torch.stack([means[1] - means[0], means[2] - means[0]]))
    # Of a lower rank the principal ones, of the means and not of the states; of a higher one what there is.
    centred = means - means.mean(0)
    same_span(found(DifferenceOfMeans(1), given)["v"], torch.linalg.svd(centred).Vh[:1])
    same_span(found(DifferenceOfMeans(2), given)["v"], basis)
    same_span(found(DifferenceOfMeans(5), given)["v"], basis)


def test_variables_at_one_site_get_orthogonal_differences() -> None:
    """The first keeps its span; the second loses what lies in it."""
    given = problem({"v": SITE, "w": SITE})
    both = found(DifferenceOfMeans(1), given)
    alone = {name: found(DifferenceOfMeans(1), replace(given, sites={name: SITE}))[name] for name in TWO}
    same_span(both["v"], alone["v"])
    rest = alone["w"] - alone["w"] @ alone["v"].T @ alone["v"]
    same_span(both["w"], rest)
    assert (both["v"] @ both["w"].T).abs().max() < 1e-5 < (alone["v"] @ alone["w"].T).abs().max()
    same = replace(given, states=lambda _: given.states("v"), values=lambda _: given.values("v"))
    with pytest.raises(
        ValueError, match=r"block_output\[0\]@2: the directions of \['v', 'w'\] lie in each other's"
    ):
        DifferenceOfMeans(1).learner(same)


def test_means_of_one_value_are_refused() -> None:
    given = problem({"v": SITE})
    with pytest.raises(ValueError, match="1 class"):
        DifferenceOfMeans().learner(replace(given, values=lambda _: torch.zeros(50, dtype=torch.long)))


def test_values_are_those_of_the_sources_and_else_the_expected_answers() -> None:
    data = counterfactuals(0)
    states = states_by_hook(ids_of(data.sources["v"]), OTHER).double()
    for train, labels in ((data, data.values["v"]), (replace(data, values={}), data.answer)):
        fit = swept(DifferenceOfMeans(), [OTHER], pairs=pairs(train=train))[0]
        means = torch.stack([states[labels == value].mean(0) for value in labels.unique()])
        assert fit.rank == len(labels.unique()) - 1
        same_span(fit.subspace().basis(), means[1:] - means[0], atol=1e-4)


def test_every_position_of_a_site_is_an_example() -> None:
    data, site = counterfactuals(0), Site("block_output", 0, "2:4")
    states = torch.cat([states_by_hook(ids_of(data.sources["v"]), site.at(at)) for at in ("2", "3")]).double()
    values = data.values["v"].repeat(2)
    components, means = swept([PCA(2), DifferenceOfMeans()], [site])
    vectors = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:2]
    same_span(components.subspace().basis(), vectors, atol=1e-4)
    of_value = torch.stack([states[values == value].mean(0) for value in range(3)])
    same_span(means.subspace().basis(), of_value[1:] - of_value[0], atol=1e-4)


def test_the_full_vector_is_all_of_the_state() -> None:
    given = problem({"v": SITE, "w": OTHER})
    for basis in found(FullVector(), given).values():
        assert torch.equal(basis, torch.eye(9))
    (edit, _) = FullVector().learner(given).edits.values()
    h, source = torch.randn(2, 4, 1, 9)
    assert torch.equal(edit(h, source), source)
    with pytest.raises(ValueError, match=r"FullVector for \['v', 'w'\] at \[block_output\[0\]@2\]"):
        FullVector().check({"v": SITE, "w": SITE}, {SITE: 9})


def test_random_subspaces_are_drawn_for_each_cell() -> None:
    given = problem({"v": SITE, "w": OTHER})
    drawn = found(RandomSubspace(3), given)
    same_span(drawn["v"], random_orthonormal(9, 3, 5))
    assert 0.02 < overlap_of(drawn["v"], drawn["w"]) < 0.8
    both = found(RandomSubspace(3), problem({"v": SITE, "w": SITE}))
    assert (both["v"] @ both["w"].T).abs().max() < 1e-5
    learner = RandomSubspace(3).learner(given)
    assert learner.start is None and learner.parameter_groups() == []


def test_random_subspaces_are_independent_of_data_training_and_seeds() -> None:
    method = RandomSubspace(4, draws=3)
    one = swept(method)
    other = swept(method, seeds=[5, 6], config=STILL, pairs=pairs(train=counterfactuals(9)))
    rows = [fit.subspace().basis() for fit in one]
    assert [fit.seed for fit in one] == [0, 1, 2, 0, 1, 2] and len(other) == 6
    assert all(torch.equal(a, b.subspace().basis()) for a, b in zip(rows, other, strict=True))
    for fit, basis in zip(one, rows, strict=True):
        seed = cell_seed(fit.seed, f"{fit.place} RandomSubspace 4")
        torch.testing.assert_close(basis, random_subspace(WIDTH, 4, seed).basis(), rtol=0, atol=1e-6)
    overlaps = [overlap_of(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    assert max(overlaps) < 0.5
    # More draws add to those that were there.
    more = swept(RandomSubspace(4, draws=5), SITES[:1])
    assert all(torch.equal(a.subspace().basis(), b) for a, b in zip(more[:3], rows[:3], strict=True))


def test_one_draw_is_no_control() -> None:
    assert RandomSubspace().draws >= 5
    assert len(RandomSubspace().seeds([0])) == RandomSubspace().draws


# --- DAS ----------------------------------------------------------------------------------------------------


def test_das_descends_the_gradient_of_the_swaps_loss() -> None:
    """One Adam step of a small rate changes each number of the raw basis by the rate, against its gradient."""
    data, rate = counterfactuals(0), 1e-4
    config = TrainingConfig(steps=1, batch_size=len(data), learning_rate=rate, warmup=0.0, schedule="constant")
    fit = swept(DAS(3), [OTHER], config=config)[0]
    assert isinstance(fit.start, int)
    start = LearnedSubspace(WIDTH, 3, start=random_orthonormal(WIDTH, 3, fit.start))
    prepared = PreparedPairs.of(tiny(), data, [{"v": OTHER}], frozen=False)
    every = torch.arange(len(data))
    logits = prepared.engine.logits(every, {OTHER: interchange(start)}, prepared.sources({"v": OTHER}, every))
    loss = nn.functional.cross_entropy(logits[:, 0], data.answer)
    assert fit.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [start.raw])
    with torch.no_grad():
        start.raw.sub_(rate * gradient.sign())
    clear = gradient.abs().min() / gradient.abs().max()
    assert clear > 1e-6
    torch.testing.assert_close(fit.subspace().basis(), start.basis().detach(), rtol=0, atol=2e-6)


def test_a_start_is_what_training_begins_with() -> None:
    basis = random_orthonormal(WIDTH, 3, 77)
    one, other = swept(DAS(3, start=basis), [OTHER], config=STILL, seeds=2)
    for fit in (one, other):
        torch.testing.assert_close(fit.subspace().basis(), basis, rtol=0, atol=1e-5)
        assert fit.start_overlap["v"] == pytest.approx(1, abs=1e-5)
    assert one.start == other.start and str(one.start).startswith("given ")
    another = swept(DAS(3, start=random_orthonormal(WIDTH, 3, 78)), [OTHER], config=STILL)[0]
    assert another.start != one.start
    trained = swept(DAS(3, start=basis), [OTHER])[0]
    overlap = overlap_of(trained.subspace().basis(), basis)
    assert trained.start_overlap["v"] == pytest.approx(overlap, abs=1e-5) and overlap < 0.999


@pytest.mark.parametrize("place", [{"v": OTHER, "w": OTHER}, {"v": SITE, "w": OTHER}], ids=["one site", "two"])
def test_an_alignment_is_a_start(place: dict[str, Site]) -> None:
    first = swept(DAS(2), [place], pairs=pairs(TWO))[0]
    again = swept(DAS(2, start=first.alignment), [place], pairs=pairs(TWO), config=STILL)[0]
    for name in TWO:
        torch.testing.assert_close(again.subspace(name).basis(), first.subspace(name).basis(), rtol=0, atol=1e-5)
    # At other sites of the same width too: what was found in one layer is tried in another.
    moved = {"v": Site("block_output", 2, "last"), "w": Site("block_output", 2, "last")}
    if place["v"] == place["w"]:
        there = swept(DAS(2, start=first.alignment), [moved], pairs=pairs(TWO), config=STILL)[0]
        torch.testing.assert_close(there.subspace("w").basis(), first.subspace("w").basis(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "variables", "message"),
    [
        (random_orthonormal(WIDTH, 2, 0), ("v",), r"start of 'v' has shape \(2, 32\); needed at .* \(3, 32\)"),
        (random_orthonormal(16, 3, 0), ("v",), r"shape \(3, 16\)"),
        (2 * random_orthonormal(WIDTH, 3, 0), ("v",), "not orthonormal"),
        (random_orthonormal(WIDTH, 3, 0), TWO, r"variables, \['v', 'w'\], must be an Alignment"),
        (Alignment({"v": (SITE, random_subspace(WIDTH, 3, 0))}), TWO, r"variables \['v'\] and lacks \['w'\]"),
        (
            Alignment({name: (SITE, random_subspace(WIDTH, 3, 0)) for name in TWO}),
            TWO,
            "not orthonormal",  # the two would share a site, and are one subspace
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_the_work(start: Any, variables: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swept(DAS(3, start=start), [SITE], pairs=pairs(variables))


def test_how_far_training_went_is_measured_from_its_start() -> None:
    still = swept(DAS(4, learning_rate=1e-9), [SITE])[0]
    assert still.start_overlap["v"] == pytest.approx(1, abs=1e-5)
    moved = swept(DAS(4, learning_rate=0.3), [SITE])[0]
    assert moved.start_overlap["v"] < 0.9 and moved.losses[-1] < still.losses[-1]
    assert isinstance(moved.start, int)
    start = random_orthonormal(WIDTH, 4, moved.start)
    assert moved.start_overlap["v"] == pytest.approx(overlap_of(moved.subspace().basis(), start), abs=1e-5)


def test_at_full_rank_parts_still_tell_how_far_they_went() -> None:
    """One subspace of full rank is always the whole space; two halves of it can turn."""
    whole = swept(DAS(WIDTH, learning_rate=0.3), [OTHER])[0]
    assert whole.start_overlap == {}
    halves = swept(DAS(WIDTH // 2, learning_rate=0.3), [OTHER], pairs=pairs(TWO))[0]
    assert set(halves.start_overlap) == set(TWO)
    assert all(0.4 < overlap < 0.99 for overlap in halves.start_overlap.values())
    assert halves.start_overlap["v"] == pytest.approx(
        halves.start_overlap["w"], abs=1e-4
    )  # complements turn alike


@pytest.mark.parametrize("how", ["qr", "polar"])
def test_both_ways_keep_the_basis_orthonormal(how: Literal["qr", "polar"]) -> None:
    fit = swept(DAS(4, learning_rate=0.5, orthonormalise=how), [SITE])[0]
    rows = fit.subspace().basis()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-5)


def test_a_rate_of_a_methods_own_takes_the_place_of_the_sweeps() -> None:
    """Two labels have two starts, so both begin at one that is given."""
    start = random_orthonormal(WIDTH, 2, 3)
    own = swept(DAS(2, learning_rate=0.2, start=start), [SITE])[0]
    of_sweep = swept(DAS(2, start=start), [SITE], config=replace(QUICK, learning_rate=0.2))[0]
    assert own.losses == of_sweep.losses
    assert torch.equal(own.subspace().basis(), of_sweep.subspace().basis())
    assert swept(DAS(2, start=start), [SITE])[0].losses != own.losses


# --- the protocol -------------------------------------------------------------------------------------------


class Steered(Learner):
    """Trains two parameters with rates of their own, is penalised, and writes down how far it is."""

    def __init__(self, given: Problem) -> None:
        site = given.sites["v"]
        super().__init__({"v": (site, LearnedSubspace(given.widths[site], 2, seed=given.seed))}, given.seed)
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.progress: list[float] = []

    def parameter_groups(self) -> list[ParameterGroup]:
        return [*super().parameter_groups(), ParameterGroup([self.weight], 0.5)]

    def penalty(self) -> Tensor:
        return self.weight.square()

    def advance(self, progress: float) -> None:
        self.progress.append(progress)


def test_a_learner_of_ones_own_is_trained_with_its_groups_and_penalty() -> None:
    given = problem({"v": OTHER}, width=WIDTH)
    data = counterfactuals(0)
    prepared = PreparedPairs.of(tiny(), data, [{"v": OTHER}])
    config = TrainingConfig(steps=5, batch_size=20, learning_rate=1e-9, warmup=0.0, schedule="constant")

    def losses(*learners: Learner) -> list[list[float]]:
        draws = [from_pool(prepared, {"v": OTHER}, config) for _ in learners]
        return train_learners(learners, draws, [config] * len(learners), nn.CrossEntropyLoss(reduction="none"))

    one, plain = Steered(given), DAS(2).learner(given)
    own, other = losses(one, plain)
    assert one.progress == [0.0, 0.2, 0.4, 0.6, 0.8]
    weight, expected = nn.Parameter(torch.tensor(3.0)), []
    adam = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    for _ in range(5):
        expected.append(weight.item() ** 2)
        weight.grad = 2 * weight.detach()
        adam.step()
    torch.testing.assert_close(torch.tensor(own) - torch.tensor(other), torch.tensor(expected), rtol=0, atol=1e-4)
    assert one.weight.item() == pytest.approx(weight.item(), abs=1e-5) and expected[-1] < 3
    assert one.start_overlap()["v"] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(torch.tensor(losses(DAS(2).learner(given))[0]), torch.tensor(other))


def test_what_was_found_does_not_train_on() -> None:
    learner = DAS(2).learner(problem({"v": SITE, "w": SITE}))
    alignment = learner.alignment()
    before = {name: s.basis().clone() for name, (_, s) in alignment.variables.items()}
    with torch.no_grad():
        for group in learner.parameter_groups():
            for parameter in group.parameters:
                parameter.add_(torch.randn_like(parameter))
    assert all(torch.equal(s.basis(), before[name]) for name, (_, s) in alignment.variables.items())
    assert not torch.equal(learner.subspaces["v"][1].basis(), before["v"])
    assert not any(s.basis().requires_grad for _, s in alignment.variables.values())


def test_several_variables_at_a_site_share_one_basis_and_one_set_of_parameters() -> None:
    learner = DAS(3).learner(problem({"v": SITE, "w": SITE}))
    (group,) = learner.parameter_groups()
    assert [tuple(p.shape) for p in group.parameters] == [(9, 6)]
    apart = DAS(3).learner(problem({"v": SITE, "w": OTHER}))
    (group,) = apart.parameter_groups()
    assert [tuple(p.shape) for p in group.parameters] == [(9, 3), (9, 3)]
    starts = [s.basis().detach() for _, s in apart.subspaces.values()]
    assert overlap_of(*starts) < 0.9  # two sites of one search start independently too


@dataclass(frozen=True)
class Mine(Method):
    """A method of a user's own: no registration."""

    width: Any = 2
    kind: str = "plain"

    def learner(self, given: Problem) -> Learner:
        return Learner({"v": (given.sites["v"], FixedSubspace(torch.eye(given.width("v"))[: self.width]))})


def test_a_method_of_ones_own_needs_no_registration() -> None:
    fits = swept([Mine(width=[1, 2]), PCA(1)], [SITE], seeds=2)
    assert fits.methods == ["Mine width=1", "Mine", "PCA 1"]
    assert [fit.seed for fit in fits] == [0, 1, 0, 1, 0] and fits[0].start is None
    assert fits.best().method in (Mine(1), Mine(2), PCA(1))
    assert fits[0].record()["method"] == "Mine" and fits[0].record()["width"] == 1


# --- settings -----------------------------------------------------------------------------------------------


def test_a_setting_that_is_a_list_runs_once_for_each() -> None:
    assert DAS(4).variants() == [DAS(4)]
    assert PCA([1, 2]).variants() == [PCA(1), PCA(2)] == PCA((1, 2)).variants()
    expected = [DAS(1, 0.1), DAS(1, 0.2), DAS(3, 0.1), DAS(3, 0.2)]
    assert DAS(rank=[1, 3], learning_rate=[0.1, 0.2]).variants() == expected
    start = torch.eye(2, 5)
    (kept,) = DAS([2], start=start).variants()
    assert vars(kept)["start"] is start


def test_labels_name_what_differs_from_the_defaults() -> None:
    labels = {
        "DAS 1": DAS(),
        "DAS 4 learning_rate=0.1": DAS(4, 0.1),
        "DAS 2 orthonormalise=polar": DAS(2, orthonormalise="polar"),
        "PCA 8": PCA(8),
        "DifferenceOfMeans": DifferenceOfMeans(),
        "DifferenceOfMeans 1": DifferenceOfMeans(1),
        "RandomSubspace 3": RandomSubspace(3, draws=2),
        "FullVector": FullVector(),
    }
    assert {method.label: method for method in labels.values()} == labels


def test_a_method_is_a_value_and_json() -> None:
    assert DAS(2) == DAS(2) != DAS(3) and hash(PCA(2)) == hash(PCA(2)) and DAS(1) != PCA(1)
    with pytest.raises(AttributeError):
        DAS(2).rank = 3  # type: ignore[misc]
    told = json.loads(json.dumps(DAS(2, 0.1, start=torch.eye(2, 4)).as_dict()))
    assert told == {"method": "DAS", "rank": 2, "learning_rate": 0.1, "orthonormalise": "qr", "natural": 0.0}
    assert RandomSubspace(3).as_dict() == {"method": "RandomSubspace", "rank": 3, "draws": 5}


def test_what_draws_nothing_runs_once() -> None:
    asked = [3, 1, 4]
    assert DAS().seeds(asked) == asked and Mine().seeds(asked) == asked
    assert [len(m.seeds(asked)) for m in (PCA(), DifferenceOfMeans(), FullVector())] == [1, 1, 1]
    assert RandomSubspace(draws=4).seeds(asked) == [0, 1, 2, 3]
    assert {type(m) for m in (DAS(), PCA(), DifferenceOfMeans(), FullVector(), RandomSubspace()) if m.control} == {
        FullVector,
        RandomSubspace,
    }


@pytest.mark.parametrize(
    ("value", "kind", "error", "message"),
    [
        (2.5, int, TypeError, r"Mine: width=2.5: a whole number is needed, found float"),
        ("4", int, TypeError, r"Mine: width=.4.: a whole number is needed"),
        (True, int, TypeError, "Mine: width=True: a whole number"),
        ([1, None], int, TypeError, "Mine: width=None: a whole number"),
        ("fast", float, TypeError, "needed is a number or a list of them"),
        ([], int, ValueError, r"Mine\(width=\[\]\): an empty list leaves nothing to run."),
        (0, int, ValueError, r"Mine\(width=0\): needed is a value above 0."),
        ([2, -1], int, ValueError, "above 0"),
        (float("nan"), float, ValueError, "above 0"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(value: Any, kind: type, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_setting(Mine(width=value), "width", kind)
    for right in (3, [1, 2], (5,)):
        check_setting(Mine(width=right), "width", kind)


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: DAS(bad),
        lambda bad: PCA(bad),
        lambda bad: RandomSubspace(bad),
        lambda bad: RandomSubspace(1, draws=bad),
        lambda bad: DifferenceOfMeans(bad),
        lambda bad: DAS(1, learning_rate=bad),
    ],
)
def test_every_method_looks_at_its_settings(make: Any) -> None:
    with pytest.raises(ValueError, match="above 0"):
        make(0)
    with pytest.raises(TypeError):
        make(True)


def test_the_data_type_of_pairs_does_not_matter_to_a_method() -> None:
    """Values may be any whole numbers; what is compared is which are equal."""
    data = counterfactuals(0)
    shifted = replace(data, values={"v": 7 - 3 * data.values["v"]})
    one, other = (swept(DifferenceOfMeans(), [SITE], pairs=pairs(train=d))[0] for d in (data, shifted))
    assert isinstance(data, Counterfactuals)
    same_span(one.subspace().basis(), other.subspace().basis(), atol=1e-4)
