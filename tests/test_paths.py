"""Path patching: what it is by hand-written hooks, and what must hold of any path."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import families as f
import pytest
import torch
from families import Spot, call, differ, fresh, hooked, rounding, spots
from tiny_sweeps import SITES, counterfactuals, pairs, swept, tiny
from torch import Tensor

from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, FullVector, Learner, Method, PathPatching, Problem
from subspace_lab.das.objectives import iia, log_odds
from subspace_lab.das.paths import Path
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward
from subspace_lab.model.site_lists import list_sites

LENGTHS = (11, 7, 9)


# --- by hand ------------------------------------------------------------------------------------------------


def spot_of(name: str, site: Site) -> Spot:
    """The module of a site, and its columns: those of the heads alone, if it names some."""
    assert site.layer is not None
    spot = spots(name, site.layer)[site.component]
    if site.heads is None:
        return spot
    _, size = f.heads(name, site.component)
    chosen = [size * head + i for head in site.heads for i in range(size)]
    return replace(spot, columns=tuple(chosen if spot.columns is None else [spot.columns[i] for i in chosen]))


@dataclass
class Stream:
    """What hooks do with the value of one side of one module, in the order of the list."""

    acts: list

    def __call__(self, value: Tensor) -> Tensor:
        value = value.clone()
        for act in self.acts:
            act(value)
        return value


def path_by_hand(
    name: str,
    model: Any,
    base: Any,
    source: Any,
    sender: Site,
    receiver: Site,
    hold: tuple[Any, ...] | list[Site] = (),
    *,
    lengths: tuple[int, ...] = LENGTHS,
    padding: str = "right",
) -> tuple[Tensor, Tensor]:
    """Two runs with hooks: the logits, and the base's own."""

    def places(site: Site) -> list[Any]:
        length = base["input_ids"].shape[1]
        return [
            (row, position)
            for row, at in enumerate(f.standing(site.positions, lengths, length, padding))
            for position in at
        ]

    def columns(site: Site, value: Tensor) -> list[Any]:
        spot = spot_of(name, site)
        return list(range(value.shape[-1])) if spot.columns is None else list(spot.columns)

    def kept(given: dict[str, Any], site: Site) -> Tensor:
        whole = spot_of(name, site)
        return f.capture(model, given, Spot(whole.path, whole.side))

    def write(site: Site, states: Tensor) -> Callable[..., Any]:
        def act(value: Tensor) -> None:
            for row, position in places(site):
                at = columns(site, value)
                value[row, position, at] = states[row, position, at]

        return act

    found: list[Tensor] = []
    steps = [(site, write(site, kept(base, site))) for site in hold]
    steps += [(sender, write(sender, kept(source, sender))), (receiver, lambda value: found.append(value.clone()))]
    streams: dict[Spot, Stream] = {}
    for site, act in steps:
        spot = spot_of(name, site)
        streams.setdefault(Spot(spot.path, spot.side), Stream([])).acts.append(act)
    with torch.no_grad(), hooked(model, streams):
        call(model, base)
    spot = spot_of(name, receiver)
    with torch.no_grad(), hooked(model, {Spot(spot.path, spot.side): Stream([write(receiver, found[0])])}):
        edited = call(model, base)
    with torch.no_grad():
        return edited, call(model, base)


def path_of(
    lab: Backbone, base: Any, source: Any, sender: Site, receiver: Site, hold: tuple[Any, ...] | list[Site] = ()
) -> Tensor:
    """The same by the package."""
    path = Path(receiver, tuple(hold))
    path.check(lab, [sender])
    batch = Batch.of(base)
    states = collect(lab, source, [sender])
    edit = {sender: interchange(Axes(lab.width(sender)))}
    edits, at = path.exchange(lab, batch, torch.arange(len(batch)), edit, states)
    with torch.no_grad():
        return forward(lab, batch, edits, sources=at).logits


PATHS = {
    "MLP to a query": ("mlp_output[0]@1:3", "query_output[2].heads(1)@last"),
    "head to values": ("head_output[0].heads(2)@all", "value_output[1]@all"),
    "head to a head": ("head_output[0].heads(1)@1:3", "head_output[2].heads(3)@last"),
    "no other head": (
        "head_output[0].heads(1)@1:3",
        "head_output[2]@last",
        "head_output[0]@all",
        "head_output[1]@all",
    ),
    "no attention": ("block_output[0]@1:3", "block_output[1]@all", "attention_output[1]@all"),
    "no MLP": ("mlp_output[0]@last", "key_output[2]@all", *(f"mlp_output[{i}]@all" for i in range(3))),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("which", PATHS)
def test_a_path_is_what_hooks_make_of_it(name: str, which: str) -> None:
    sender, receiver, *hold = map(Site.parse, PATHS[which])
    if name == "llama" and receiver.component == "value_output":
        receiver = Site("value_output", 1, "all", heads=1)
    dtype = f.exact(name)
    model = fresh(name, dtype)
    lab = Backbone(model)
    # GPT-2 by itself numbers the positions of padding too.
    padding = "left" if which == "head to a head" and name != "gpt2" else "right"
    base, source = (f.inputs(name, lengths=LENGTHS, padding=padding, seed=seed) for seed in (0, 1))
    expected, plain = path_by_hand(name, model, base, source, sender, receiver, hold, padding=padding)
    found = path_of(lab, base, source, sender, receiver, hold)
    real = base["attention_mask"].bool()
    assert differ(found[real], expected[real]) < rounding(dtype)
    assert differ(expected[real], plain[real]) > 1e-4  # the path does something
    if hold:  # and what is held would have done something too
        free, _ = path_by_hand(name, model, base, source, sender, receiver, padding=padding)
        assert differ(free[real], expected[real]) > 1e-5


def test_with_everything_held_the_direct_path_adds_what_the_sender_changes() -> None:
    """In a residual stream without norms on it: h_receiver = h_base + (sender of the source − sender of the base)."""
    lab = Backbone(fresh("llama", torch.float64))
    base, source = (Batch.of(f.inputs("llama", seed=seed)) for seed in (0, 1))
    sender, receiver = Site("mlp_output", 0, "3"), Site("block_output", 2, "3")
    hold = (*list_sites(lab, "attention_output"), *list_sites(lab, "mlp_output"))
    states, before = collect(lab, source, [sender]), collect(lab, base, [sender, receiver])
    rows = torch.arange(len(base))
    _, at = Path(receiver, hold).exchange(lab, base, rows, {sender: interchange(Axes(f.WIDTH))}, states)
    torch.testing.assert_close(at[receiver], before[receiver] + states[sender] - before[sender])
    # Not so when other components may answer.
    _, free = Path(receiver).exchange(lab, base, rows, {sender: interchange(Axes(f.WIDTH))}, states)
    assert differ(free[receiver], at[receiver]) > 0.01


# --- laws, by a sweep ---------------------------------------------------------------------------------------


def scores(method: Method, at: list[Any], **options: Any) -> dict[str, Tensor]:
    """{place: log odds by test pair}."""
    fits = swept(method, at, metrics=[log_odds], **options)
    assert not fits.failures
    return {fit.place: fit.pair_scores["log_odds"] for fit in fits}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[place], other[place], atol=1e-4) for place in one)


@pytest.mark.parametrize("site", ["block_output[0]@2", "head_output[1].heads(2)@all", "mlp_output[2]@last"])
def test_with_the_sender_as_receiver_it_is_the_full_vector(site: str) -> None:
    at = [Site.parse(site)]
    full = scores(FullVector(), at)
    assert same(scores(PathPatching(site), at), full)
    assert not torch.allclose(full[site], torch.zeros(()))


def test_where_all_ways_pass_the_receiver_it_is_the_full_vector() -> None:
    """The answer is read from the last block's output at the last position, and from nothing else."""
    senders = [
        *list_sites(tiny(), positions=["2", "last"], layers=[0, 1]),
        *list_sites(tiny(), "head_output", positions="all", heads=[0, 3]),
    ]
    full = scores(FullVector(), senders)
    assert same(scores(PathPatching("block_output[2]@last"), senders), full)
    assert min(float(one.abs().max()) for one in full.values()) > 0.01


def test_what_no_path_reaches_does_nothing() -> None:
    sender = [Site("block_output", 0, "3")]
    nothing = {str(sender[0]): torch.zeros(60)}
    full = scores(FullVector(), sender)
    assert not same(full, nothing)
    # A position in front of the sender, and a receiver that is cut off.
    assert same(scores(PathPatching("block_output[1]@2"), sender), nothing)
    far = PathPatching("block_output[1]@last", hold="attention_output[1]@all")
    assert same(scores(far, sender), nothing)
    assert not same(scores(PathPatching("block_output[1]@last"), sender), nothing)


def test_what_lies_not_between_is_not_held() -> None:
    """The receiver itself, what lies behind it, and what lies in front of the sender."""
    sender, receiver = [Site("mlp_output", 0, "last")], "head_output[1].heads(0,2)@last"
    free = scores(PathPatching(receiver), sender)
    other = ["head_output[1]@all", "mlp_output[1]@all", "block_output[2]@last", "block_input[0]@all"]
    assert same(scores(PathPatching(receiver, hold=other), sender), free)
    assert not same(free, {str(sender[0]): torch.zeros(60)})


@pytest.mark.parametrize("hold", [(), (Site("mlp_output", 1),)])
@pytest.mark.parametrize("receiver", ["query_output[2].heads(1)@last", "mlp_output[1]@all"])
def test_the_frozen_past_and_plain_runs_agree(receiver: str, hold: tuple[Site, ...]) -> None:
    data, path = counterfactuals(1), Path(Site.parse(receiver), hold)
    sender = Site("block_output", 0, "2")
    edits = [{sender: interchange(Axes(32))}, {sender: interchange(Axes(32))}]
    runs = []
    for frozen in (True, False):
        prepared = PreparedPairs.of(tiny(), data, [{"v": sender}], frozen=frozen, paths=[path])
        assert isinstance(prepared.engine, FrozenPast) == frozen
        one, two = prepared.outcomes({"v": sender}, edits, path=path)
        torch.testing.assert_close(one.logits, two.logits)
        (some,) = prepared.outcomes({"v": sender}, edits[:1], torch.tensor([5, 3]), path)
        torch.testing.assert_close(some.logits, one.logits[[5, 3]])
        runs.append(one)
    torch.testing.assert_close(runs[0].logits, runs[1].logits)
    torch.testing.assert_close(runs[0].vocabulary(), runs[1].vocabulary())
    torch.testing.assert_close(runs[0].complement(), runs[0].unedited)  # all of the state is exchanged
    assert not torch.allclose(runs[0].logits, runs[0].unedited)


def test_two_variables_at_sites_of_their_own_send_together() -> None:
    two = pairs(("a", "b"))
    at = [{"a": Site("block_output", 0, "2"), "b": Site("mlp_output", 1, "4")}]
    full, along = (scores(m, at, pairs=two) for m in (FullVector(), PathPatching("block_output[2]@last")))
    assert same(full, along)
    with pytest.raises(ValueError, match=r"PathPatching for .*variables that share a site"):
        swept(PathPatching("block_output[2]@last"), pairs=two)


def test_answers_of_several_tokens() -> None:
    spelled = torch.tensor([[7 + i % 3, 20 + i] for i in range(12)])
    splits: dict[str, Any] = {"train": 0, "dev": 2, "test": 1}
    data = pairs(**{s: replace(counterfactuals(n), tokens=spelled, whole=True) for s, n in splits.items()})  # type: ignore[arg-type]
    full, along = (scores(m, SITES, pairs=data) for m in (FullVector(), PathPatching("block_output[2]@last")))
    # Tokens behind the prompt also read the sender's state through their own attention, which is no path by its end.
    assert not same(full, along)
    assert same(scores(PathPatching(str(SITES[1])), SITES[1:], pairs=data), {str(SITES[1]): full[str(SITES[1])]})


def ragged(seed: int, ids: int | None = None) -> Batch:
    tokens = torch.randint(1, 50, (60, 7), generator=torch.Generator().manual_seed(seed if ids is None else ids))
    mask = (torch.arange(7) < torch.randint(3, 8, (60, 1), generator=torch.Generator().manual_seed(seed))).long()
    return Batch({"input_ids": tokens * mask, "attention_mask": mask})


def test_rows_of_different_lengths() -> None:
    data = replace(counterfactuals(1), base=ragged(3), sources={"v": ragged(4)})
    unequal = pairs(train=data, dev=data, test=data)
    at = [Site("block_output", 0, "all")]
    full = scores(FullVector(), at, pairs=unequal, unmatched="keep_base")
    for receiver in ("block_output[0]@all", "block_output[1]@all", "block_output[2]@last"):
        assert same(scores(PathPatching(receiver), at, pairs=unequal, unmatched="keep_base"), full)
    with pytest.raises(ValueError, match="the same number in both"):
        scores(PathPatching("block_output[1]@all"), at, pairs=unequal)
    # A base and its source of one length need no leave.
    paired = replace(data, sources={"v": ragged(3, ids=4)})
    equal = pairs(train=paired, dev=paired, test=paired)
    along = scores(PathPatching("block_output[1]@all"), at, pairs=equal)
    assert same(along, scores(FullVector(), at, pairs=equal)) and not same(along, full)


# --- the method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "receiver", "said"),
    [
        (
            "block_output[1]@last",
            "block_output[0]@last",
            r"block_output\[1\]@last to block_output\[0\]@last.*must come after",
        ),
        ("mlp_output[1]@last", "query_output[1].heads(0)@last", "must come after"),
        ("head_output[1].heads(0)@last", "head_output[1].heads(1,2)@last", "side by side"),
        ("head_output[1].heads(0)@last", "head_output[2].heads(4)@last", "possible are 0 to 3"),
        ("block_output[0]@last", "block_output[1]@subject", "subject"),
    ],
)
def test_receivers_that_no_path_reaches_are_refused(
    sender: str, receiver: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathPatching, "learner", None)  # before anything is fitted
    with pytest.raises((ValueError, KeyError), match=said):
        swept(PathPatching(receiver), [Site.parse(sender)])


def test_a_hold_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(IndexError, match="layer 7"):
        swept(PathPatching("block_output[2]@last", hold="mlp_output[7]@all"))


def test_what_is_no_site_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        PathPatching([])
    with pytest.raises(ValueError, match="Unknown component"):
        PathPatching("blocks[1]@last")


def test_several_receivers_are_several_methods() -> None:
    both = PathPatching(
        ["block_output[1]@last", Site("mlp_output", 2, "last")], hold=list_sites(tiny(), "head_output")
    )
    assert [one.label for one in both.variants()] == [
        "PathPatching to block_output[1]@last, holding 3 head_output",
        "PathPatching to mlp_output[2]@last, holding 3 head_output",
    ]
    at = list_sites(tiny(), layers=[0], positions=["2", "last"])
    fits = swept([FullVector(), both], at, metrics=[log_odds])
    assert fits.methods == ["FullVector", *(one.label for one in both.variants())] and len(fits) == 6
    assert not fits.failures and fits.best().method.control
    # Each gives what it gives alone.
    alone = [scores(method, at) for method in (FullVector(), *both.variants())]
    for method, expected in zip(fits.methods, alone, strict=True):
        assert same({fit.place: fit.pair_scores["log_odds"] for fit in fits.where(method=method)}, expected)
    assert not any(same(alone[i], alone[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_it_is_saved_read_and_sent(tmp_path: Any) -> None:
    method = PathPatching("head_output[2].heads(1)@last", hold=["mlp_output[1]@all"])
    fits = swept(method, metrics=[iia, log_odds], out=tmp_path / "run")
    read = Fits.load(tmp_path / "run")
    assert read == fits and [fit.method for fit in read] == [method] * len(SITES)
    assert fits.records()[0]["receiver"] == "head_output[2].heads(1)@last"
    assert pickle.loads(pickle.dumps(method)) == method and len({method, method.variants()[0]}) == 1
    # Another path is another sweep.
    with pytest.raises(ValueError, match="methods"):
        swept(replace(method, hold=()), metrics=[iia, log_odds], out=tmp_path / "run")


class Trained(DAS):
    @property
    def path(self) -> Path:
        return Path(Site("block_output", 2, "last"))

    def learner(self, problem: Problem) -> Learner:
        return super().learner(problem)


def test_a_trained_method_takes_no_path() -> None:
    with pytest.raises(TypeError, match="not trained along it"):
        swept(Trained(2))
