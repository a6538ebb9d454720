"""The frozen past gives the plain run's numbers: every family, padding, kind of site; or it says why it refuses.

`mode` is asserted beside every comparison: a frozen past that fell back to the plain run would agree by itself.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from families import DECODERS, ENCODERS, exact, inputs, rounding, spots
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies._internal.core import DataObject
from hypothesis.strategies._internal.strategies import SearchStrategy
from torch import Tensor, nn

from subspace_lab.core import interventions
from subspace_lab.core.sites import COMPONENTS, Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.engine import frozen_past
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward, generate

LENGTH = 12  # longer than every sliding window
LENGTHS = (12, 9, 7, 12, 5, 10)
SUBJECT = (3, 8, 5, 7, 1, 8)
POSITIONS = ("last", "f2+l1", "-3", "all", "subject", "2:5")
TOKENS = (5, 11, 42)
ROWS = (torch.tensor([4, 0, 2, 2, 5]), torch.tensor([2, 4]), torch.arange(6), torch.tensor([3]))
MODES = dict.fromkeys(DECODERS, "keys and values") | dict.fromkeys(ENCODERS, "layers") | {"t5": "plain"}
PAIRS = (
    ("block_output[0]@last", "block_input[2]@2:5"),  # the deeper one stands earlier
    ("mlp_output[1]@subject", "head_output[2]@last"),
    ("query_output[0]@last", "key_output[1]@2:5"),
    ("block_output[1]@-3", "block_output[1]@last"),
    ("head_output[1].heads(0)@last", "head_output[1].heads(3,2)@all"),
    ("value_output[2]@f2+l1", "mlp_activation[0]@all"),
    ("attention_output[0]@subject", "mlp_output[0]@2:5", "block_output[2]@last"),
)


# --- helpers ------------------------------------------------------------------------------------------------


def build(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    return families.build(name, dtype or exact(name))


def fresh(name: str) -> nn.Module:
    return families.fresh(name, exact(name))


def loreft(*args: Any, **options: Any) -> nn.Module:
    return interventions.loreft(*args, **options).double()


def interchange(subspace: LearnedSubspace) -> nn.Module:
    return interventions.interchange(subspace).double()


def make_batch(name: str, padding: str = "right", seed: int = 0, rows: int = 6) -> Batch:
    if name == "mlp":
        return Batch.of(inputs(name, rows, seed=seed).double())
    lengths = None if padding == "none" else LENGTHS[:rows]
    side = "right" if padding == "none" else padding
    more: Any = {"decoder_lengths": (4, 5, 6, 3, 6, 5)} if name == "t5" else {}
    made = inputs(name, rows, LENGTH, seed, lengths=lengths, padding=side, **more)
    return Batch(made, columns={"subject": torch.tensor(SUBJECT[:rows])})


def make_readout(name: str, batch: Batch) -> Readout:
    if name == "mlp":
        return Readout.at(batch)
    # An encoder's last token may lie outside the window of an edit: every token is read.
    return Readout.at(batch, "all" if name in ENCODERS else "last", TOKENS)


def single_sites(name: str, shift: int) -> list[Site]:
    """Every component in every layer, at positions that change from test to test."""
    if name == "mlp":
        return [Site(path) for path in spots("mlp", 0)]
    stacks = ("encoder.", "decoder.") if name == "t5" else ("",)
    made = []
    for number, (stack, component, layer) in enumerate(itertools.product(stacks, COMPONENTS, range(3))):
        positions = POSITIONS[(number + number // 3 + 2 * shift) % len(POSITIONS)]
        if stack == "decoder.":
            positions = "last" if positions in ("-3", "subject", "2:5") else positions
        # Nothing of the last block is read at the last token but what stands there, keys and values apart.
        if layer == 2 and component not in ("block_input", "key_output", "value_output"):
            positions = positions if positions in ("last", "f2+l1", "all") else "last"
        made.append(Site(stack + component, layer, positions))
    return made


def make_edits(states: dict[Site, Tensor], sites: Any, seed: int = 0) -> dict:
    """LoReFT as its paper starts it and interchange by turns, for sites with such states."""
    made = {}
    for number, site in enumerate(sites):
        width = states[site].shape[-1]
        if (seed + number) % 2:
            made[site] = interchange(LearnedSubspace(width, 3, seed=seed + number))
        else:
            made[site] = loreft(width, 3, seed=seed + number, start="paper")
    return made


def states_for(states: dict[Site, Tensor], edits: dict[Site, nn.Module], rows: Tensor) -> dict:
    return {s: states[s][rows] for s, edit in edits.items() if edit.needs_source}


def measured(
    run: PlainEngine | FrozenPast,
    rows: Tensor,
    edits: dict[Site, Any],
    sources: dict[Any, Any] | None = None,
) -> list[torch.Tensor]:
    """Logits of the real reads, and the gradient of every parameter of the edits."""
    parameters = [p for edit in edits.values() for p in edit.parameters()]
    logits = run.logits(rows, edits, sources)
    valid = run.readout.rows(rows).valid
    if valid is not None:
        logits = logits[valid]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    if not parameters:
        return [logits.detach()]
    gradients = torch.autograd.grad((weights * logits.double()).sum(), parameters, allow_unused=True)
    assert all(g is not None for g in gradients)
    return [logits.detach(), *gradients]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference, each tensor by its own norm."""
    assert len(found) == len(expected)
    gaps = []
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        gaps.append(float((a - b).double().norm() / b.double().norm().clamp_min(1e-12)))
    return max(gaps)


def compare(
    past: FrozenPast,
    plain: PlainEngine,
    rows: Tensor,
    edits: dict[Site, nn.Module],
    states: dict[Site, Tensor] | None = None,
    tolerance: float | None = None,
) -> None:
    """Equal numbers, and numbers that the edits matter for."""
    sources = states_for(states or {}, edits, rows)
    expected = measured(plain, rows, edits, sources)
    found = measured(past, rows, edits, sources)
    tolerance = tolerance or rounding(expected[0].dtype)
    assert all(g.norm() > 1e-8 for g in expected[1:]), f"{list(edits)} change nothing"
    with torch.no_grad():
        untouched = plain.logits(rows, {})
        untouched = untouched if plain.readout.valid is None else untouched[plain.readout.rows(rows).valid]
    assert gap([untouched], expected[:1]) > tolerance, f"{list(edits)} change no logit"
    assert gap(found, expected) <= tolerance, f"{list(edits)}, rows {rows.tolist()}: {gap(found, expected):.1e}"


class Counter:
    """Which blocks ran, for how many rows and tokens: seen at a module inside each, where no skip reaches."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.calls: list[tuple[int, int, int]] = []
        for layer in range(3):
            inner = model.get_submodule(spots(name, layer)["mlp_output"].path)
            inner.register_forward_hook(
                lambda m, args, out, layer=layer: self.calls.append((layer, *out.shape[:2]))
            )

    def take(self) -> list[tuple[int, int, int]]:
        taken, self.calls = self.calls, []
        return taken


# --- equality -----------------------------------------------------------------------------------------------

CASES = [
    (name, padding)
    for name in MODES
    for padding in ("none", "right", "left")
    if padding != "left" or name not in ENCODERS
]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_equals_the_plain_run(name: str, padding: str) -> None:
    shift = ("none", "right", "left").index(padding)
    backbone, batch = Backbone(build(name)), make_batch(name, padding)
    readout = make_readout(name, batch)
    sites = single_sites(name, shift)
    pairs = [tuple(Site.parse(text) for text in pair) for pair in PAIRS] if name != "t5" else []
    sites = sites[shift::3] if name == "t5" else sites
    served = [*sites, *(site for pair in pairs for site in pair)]
    past, plain = FrozenPast(backbone, batch, served, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == MODES[name], past.describe()
    states = collect(backbone, make_batch(name, padding, seed=9), served)
    for number, edited in enumerate([*((site,) for site in sites), *pairs]):
        edits = make_edits(states, edited, seed=number + shift)
        compare(past, plain, ROWS[number % len(ROWS)], edits, states)


def test_equals_the_plain_run_of_a_plain_module() -> None:
    backbone, batch = Backbone(build("mlp")), make_batch("mlp")
    sites = single_sites("mlp", 0)
    past, plain = FrozenPast(backbone, batch, sites, Readout()), PlainEngine(backbone, batch, Readout())
    assert past.mode == "layers"
    states = collect(backbone, make_batch("mlp", seed=9), sites)
    edited = [(site,) for site in sites] + [(Site("second.output"), Site("head.input")), (sites[0], sites[3])]
    for seed, group in itertools.product((0, 1), edited):
        compare(past, plain, torch.tensor([3, 0, 3, 5]), make_edits(states, group, seed), states)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["l3", "all", "subject", "first", "f1+l2", "2:5"])
def test_equal_wherever_logits_are_read(positions: str, padding: str) -> None:
    backbone, batch = Backbone(build("gemma2")), make_batch("gemma2", padding)
    readout = Readout.at(batch, positions)
    sites = [Site("block_output", 1, "last"), Site("attention_output", 0, "first"), Site("value_output", 1, "1:3")]
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "keys and values", past.describe()
    for chosen, rows in itertools.product([*((s,) for s in sites), sites[1:], sites], ROWS[:3]):
        edits = {site: loreft(backbone.width(site), 2, seed=3, start="paper") for site in chosen}
        expected, found = measured(plain, rows, edits), measured(past, rows, edits)
        # An edit behind everything that is read has no effect: both gradients are 0 there.
        tolerance = rounding(expected[0].dtype)
        assert all((a - b).norm() <= tolerance * b.norm() + 1e-9 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("positions", ["first", "f2", "last", "all"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "t5"])
def test_equal_without_any_edit(name: str, positions: str) -> None:
    """The model as it is, by which every search begins."""
    backbone, batch = Backbone(build(name)), make_batch(name)
    readout = make_readout(name, batch)
    stack = "encoder." if name == "t5" else ""
    past = FrozenPast(backbone, batch, [Site(f"{stack}block_output", 1, positions)], readout)
    assert past.mode == MODES[name]
    plain = PlainEngine(backbone, batch, readout)
    for rows in ROWS:
        assert gap(measured(past, rows, {}), measured(plain, rows, {})) < rounding(torch.float64)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_ragged_positions_fit_the_sources_of_any_rows(name: str) -> None:
    """Short rows alone have fewer positions than the data set: their sources are cut from the whole one's."""
    backbone, batch = Backbone(build(name)), make_batch(name)
    site = Site("block_output", 1, "all")
    readout = make_readout(name, batch)
    states = collect(backbone, make_batch(name, seed=9), [site])
    edits = {site: interchange(LearnedSubspace(32, 3, seed=0))}
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    compare(past, plain, torch.tensor([4, 2]), edits, states)


def test_columns_with_absent_positions() -> None:
    backbone = Backbone(build("llama"))
    spans = torch.tensor([[3, 5], [8, -1], [-1, -1], [7, 11], [0, 1], [2, -1]])
    batch = Batch(make_batch("llama").inputs, columns={"span": spans})
    readout = Readout.at(batch, "last")
    sites = [Site("block_output", layer, "span") for layer in (0, 1)]
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "keys and values"
    states = collect(backbone, Batch(make_batch("llama", seed=9).inputs, columns={"span": spans}), sites)
    for site, seed in itertools.product(sites, (0, 1)):
        compare(past, plain, torch.arange(6), make_edits(states, [site], seed), states)
        compare(past, plain, torch.tensor([1, 5]), make_edits(states, [site], seed), states)


def lengths_and_sides() -> SearchStrategy[tuple[Any, Any]]:
    """Prompts of 1 to LENGTH tokens, one of them of LENGTH: slices that no row has are an error."""
    ragged = st.lists(st.integers(1, LENGTH), max_size=4).map(lambda lengths: [*lengths, LENGTH])
    return st.tuples(ragged.flatmap(st.permutations), st.sampled_from(["right", "left"]))


ANY_SITE = st.builds(
    Site,
    st.sampled_from(COMPONENTS),
    st.integers(-3, 2),
    st.sampled_from(["last", "first", "all", "f2+l1", "f3", "l3", "1:3", "0", "-1", ":-1"]),
)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@settings(max_examples=20, deadline=None, phases=[Phase.reuse, Phase.generate, Phase.shrink])
@given(
    shape=lengths_and_sides(),
    sites=st.lists(ANY_SITE, min_size=1, max_size=3, unique_by=lambda s: (s.component, (s.layer or 0) % 3)),
    reads=st.sampled_from(["last", "last", "l2", "all", "first"]),
    data=st.data(),
)
def test_any_rows_sites_and_reads(
    name: str, shape: tuple[Any, ...], sites: list[Site], reads: str, data: DataObject
) -> None:
    lengths, side = shape
    count = len(lengths)
    backbone = Backbone(build(name))
    batch = Batch(inputs(name, count, LENGTH, seed=sum(lengths), lengths=tuple(lengths), padding=side))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6)))
    readout = Readout.at(batch, reads, None if data.draw(st.booleans()) else TOKENS)
    past = FrozenPast(backbone, batch, sites, readout, chunk=data.draw(st.integers(1, 6)))
    assert past.mode == "keys and values", past.describe()
    source = Batch({**batch.inputs, "input_ids": batch.inputs["input_ids"].roll(1, 0)})
    states = collect(backbone, source, sites)
    edits = make_edits(states, sites[: data.draw(st.integers(1, len(sites)))], seed=len(sites))
    sources = states_for(states, edits, rows)
    found = measured(past, rows, edits, sources)
    expected = measured(PlainEngine(backbone, batch, readout), rows, edits, sources)
    for a, b in zip(found, expected, strict=True):
        # A query before a single key has no effect: its gradient is rounding, in either run.
        noise = 1e-9 * (1 + expected[0].norm())
        assert a.shape == b.shape and (a - b).norm() <= rounding(torch.float64) * b.norm() + noise


# --- answers, and where logits may be read --------------------------------------------------------------------


def answered(name: str, padding: str) -> tuple[Batch, torch.Tensor]:
    """Prompts with answers of 1 to 4 tokens, and the labels of the answers."""
    batch = make_batch(name, padding)
    answers = torch.tensor([1, 3, 2, 4, 2, 1])
    real = batch.real_tokens()
    assert real is not None
    number, lengths = real.long().cumsum(1) - 1, real.sum(1)
    labels = batch.inputs["input_ids"].masked_fill(~(real & (number >= (lengths - answers)[:, None])), -100)
    return Batch(batch.inputs, prompt_lengths=lengths - answers), labels


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_losses_on_answers_equal_the_model_s_own(name: str, padding: str) -> None:
    backbone = Backbone(build(name))
    batch, labels = answered(name, padding)
    readout, targets = Readout.before_labels(labels)
    sites = [Site("block_output", layer, "f1+l1") for layer in (0, 1)]
    past = FrozenPast(backbone, batch, sites, readout)
    assert past.mode == "keys and values", past.describe()
    for rows, chosen in itertools.product((torch.arange(6), torch.tensor([4, 1, 1])), (sites[:1], sites)):
        edits = {site: loreft(32, 3, seed=2, start="paper") for site in chosen}
        parameters = [p for edit in edits.values() for p in edit.parameters()]
        part = batch.rows(rows)
        own = forward(backbone, Batch({**part.inputs, "labels": labels[rows]}, part.prompt_lengths), edits).loss
        expected = [own, *torch.autograd.grad(own, parameters)]
        logits = past.logits(rows, edits).flatten(0, 1).float()  # as the model's own loss
        loss = nn.functional.cross_entropy(logits, targets[rows].flatten(), ignore_index=-100)
        found = [loss, *torch.autograd.grad(loss, parameters)]
        assert expected[1].norm() > 1e-6
        assert gap(found, expected) < rounding(torch.float32)


def test_training_steps_are_the_plain_run_s() -> None:
    """Twenty steps of Adam end at the same edit."""
    backbone = Backbone(build("llama"))
    batch, labels = answered("llama", "right")
    readout, targets = Readout.before_labels(labels)
    site = Site("block_output", 1, "f1+l1")
    ends = []
    for run in (FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)):
        edit: Any = loreft(32, 2, seed=0)
        optimizer = torch.optim.Adam(edit.parameters(), lr=0.02)
        losses = []
        for step in range(20):
            rows = torch.tensor([step % 6, (step + 2) % 6, (step + 3) % 6])
            logits = run.logits(rows, {site: edit}).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, targets[rows].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        ends.append([torch.stack(losses), edit.subspace.basis().detach()])
    assert gap(*ends) < rounding(torch.float64)
    assert ends[0][0][-3:].mean() < ends[0][0][:3].mean()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_logits_read_at_padding_are_the_model_s(padding: str) -> None:
    """Labels of whole rows ask, on left-padded ones, for the logits at the padding before the first token."""
    backbone, batch = Backbone(build("llama")), make_batch("llama", padding)
    where = -1 if padding == "right" else 0
    readout = Readout(torch.full((6, 1), where % LENGTH), None, torch.tensor(TOKENS))
    site = Site("block_output", 1, "last")
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "layers" and "padding" in past.describe()
    edits = {site: loreft(32, 3, seed=0, start="paper")}
    for rows in ROWS:
        assert gap(measured(past, rows, edits)[:1], measured(plain, rows, edits)[:1]) < rounding(torch.float64)


def test_masks_with_holes() -> None:
    """Positions of such rows depend on what stands beside them in a batch: nothing is frozen."""
    backbone, batch = Backbone(build("llama")), make_batch("llama")
    mask = batch.inputs["attention_mask"].clone()
    mask[:3, 2] = 0
    batch = Batch({**batch.inputs, "attention_mask": mask})
    readout = Readout.at(batch, "last")
    site = Site("block_output", 1, "last")
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "plain" and "hole" in past.describe()
    compare(past, plain, ROWS[0], {site: loreft(32, 3, seed=0, start="paper")})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_that_the_user_gave(name: str) -> None:
    backbone, batch = Backbone(build(name)), make_batch(name)
    shifted = torch.arange(LENGTH).expand(6, -1) * 2 + torch.arange(6)[:, None]
    site = Site("block_output", 0, "subject")
    readout = Readout.at(batch, "last")
    batch = Batch({**batch.inputs, "position_ids": shifted}, columns=batch.columns)
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "keys and values"
    compare(past, plain, ROWS[0], {site: loreft(32, 3, seed=0, start="paper")})


def test_packed_rows_keep_to_themselves() -> None:
    """Two texts in one row, told apart by positions alone: their mask is not a causal one."""
    backbone = Backbone(build("llama"))
    ids = make_batch("llama", "none").inputs["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(6, -1)
    batch = Batch({"input_ids": ids, "position_ids": positions})
    readout = Readout.at(batch, "last")
    site = Site("block_output", 0, "7")
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "layers"
    compare(past, plain, ROWS[0], {site: loreft(32, 3, seed=0, start="paper")})


@pytest.mark.parametrize("padding", ["right", "left"])
def test_embeddings_instead_of_tokens(padding: str) -> None:
    model: Any = build("llama")
    backbone, batch = Backbone(model), make_batch("llama", padding)
    embedded = model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    batch = Batch({"inputs_embeds": embedded, "attention_mask": batch.inputs["attention_mask"]})
    readout = Readout.at(batch, "last", TOKENS)
    site = Site("block_output", 1, "last")
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "layers"
    compare(past, plain, ROWS[0], {site: loreft(32, 3, seed=0, start="paper")})


@pytest.mark.parametrize("more", [{"logits_to_keep": 1}, {"use_cache": False}], ids=str)
def test_options_that_a_readout_makes_needless(more: dict[str, Any]) -> None:
    backbone, plain_batch = Backbone(build("llama")), make_batch("llama")
    batch = Batch({**plain_batch.inputs, **more}, columns=plain_batch.columns)
    readout = Readout.at(batch, "l2", TOKENS)
    site = Site("block_output", 0, "subject")
    past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, plain_batch, readout)
    assert past.mode == "keys and values"
    compare(past, plain, ROWS[0], {site: loreft(32, 3, seed=0, start="paper")})


# --- half precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "modernbert"])
def test_half_precision_within_the_plain_run_s_noise(name: str) -> None:
    model = build(name, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    backbone, batch = Backbone(model), make_batch(name)
    readout = make_readout(name, batch)
    sites = [
        Site("block_output", 0, "f2+l1"),
        Site("attention_output", 1, "last"),
        Site("block_output", 2, "last"),
    ]
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == MODES[name], past.describe()
    assert past.prefix is not None
    assert {t.dtype for t in past.prefix.tensors()} == {torch.bfloat16}
    reference = PlainEngine(Backbone(exact), batch, readout)
    for site, rows in itertools.product(sites, ROWS[:2]):
        edits = {site: loreft(32, 3, seed=1, start="paper")}
        numbers = [[t.float() for t in measured(run, rows, edits)] for run in (past, plain, reference)]
        assert past.logits(rows, edits).dtype == torch.bfloat16
        for found, expected, right in zip(*numbers, strict=True):
            noise = (expected - right).norm()
            assert 0 < noise < 0.2 * right.norm()
            assert (found - expected).norm() <= 3 * noise


# --- what is computed -----------------------------------------------------------------------------------------


def test_what_runs() -> None:
    """One pass for all sites; then no block below the boundary, and only the tokens from the first edit on."""
    model = fresh("llama")
    counter = Counter(model, "llama")
    backbone, batch = Backbone(model), make_batch("llama")
    sites = {
        Site("block_output", 1, "last"): {2: 1},
        Site("block_input", 0, "last"): {0: 1, 1: 1, 2: 1},
        Site("mlp_output", 1, "-3"): {1: 3, 2: 3},
        Site("block_output", 0, "first"): {1: LENGTH, 2: LENGTH},
        Site("block_output", 2, "last"): {},
    }
    past = FrozenPast(backbone, batch, sites, Readout.at(batch, "last"), chunk=5)
    seen = counter.take()
    assert [c for c in seen if c[1] == 5] == [(layer, 5, LENGTH) for layer in range(3)], (
        "one pass for all the sites"
    )
    for site, expected in sites.items():
        past.logits(torch.arange(6), {site: loreft(32, 2, seed=0)})
        assert {layer: tokens for layer, _, tokens in counter.take()} == expected, site
    both = [Site("block_output", 1, "last"), Site("mlp_output", 1, "-3")]
    past.logits(torch.tensor([1, 4]), {site: loreft(32, 2, seed=0) for site in both})
    assert counter.take() == [(1, 2, 3), (2, 2, 3)]


def test_tokens_after_the_last_read_do_not_run() -> None:
    model = fresh("gpt2")
    counter = Counter(model, "gpt2")
    batch = make_batch("gpt2", "none")
    past = FrozenPast(Backbone(model), batch, [Site("block_output", 0, "3")], Readout.at(batch, "5"))
    counter.take()
    past.logits(torch.arange(3), {Site("block_output", 0, "3"): loreft(32, 2, seed=0)})
    assert counter.take() == [(1, 3, 3), (2, 3, 3)]


def test_encoders_skip_blocks() -> None:
    model = fresh("bert")
    counter = Counter(model, "bert")
    batch = make_batch("bert")
    sites = [Site("mlp_output", 2, "last"), Site("block_output", 0, "first")]
    past = FrozenPast(Backbone(model), batch, sites, Readout.at(batch, "last"), chunk=6)
    assert counter.take().count((0, 6, LENGTH)) == 1
    for site, layers in zip(sites, ([2], [1, 2]), strict=True):
        past.logits(torch.arange(2), {site: loreft(32, 2, seed=0)})
        assert [layer for layer, *_ in counter.take()] == layers


class Counting(nn.Module):
    """A linear map inside a module, where it tells of every run."""

    def __init__(self, name: str, ran: list[str]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.register_forward_hook(lambda m, args, out: ran.append(name))

    def forward(self, x: Any) -> Any:
        return self.inner(x).tanh()


def test_chains_of_modules_skip_what_lies_before() -> None:
    ran: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"chain": nn.Sequential(*(Counting(n, ran) for n in "abcd"))}).double()
    model.forward = lambda x: model["chain"](x) * 2
    backbone, batch = Backbone(model), Batch.of(torch.randn(5, 4, dtype=torch.float64))
    sites = {
        Site("chain.2.output"): ["d"],
        Site("chain.1.inner.output"): ["b", "c", "d"],
        Site("chain.0.input"): [*"abcd"],
    }
    past, plain = FrozenPast(backbone, batch, sites, Readout()), PlainEngine(backbone, batch, Readout())
    assert past.prefix is not None
    assert past.mode == "layers" and sorted(past.prefix.states) == [1, 3]
    for site, expected in sites.items():
        compare(past, plain, torch.tensor([3, 1, 1]), {site: loreft(4, 2, seed=0, start="paper")})
        ran.clear()
        past.logits(torch.arange(2), {site: loreft(4, 2, seed=0)})
        assert ran == expected


def test_sites_by_path_in_a_transformer_skip_the_blocks_below() -> None:
    model = fresh("llama")
    counter = Counter(model, "llama")
    backbone, batch = Backbone(model), make_batch("llama")
    readout = Readout.at(batch, "last", TOKENS)
    sites = [Site("model.layers.1.self_attn.o_proj.output", positions="last"), Site("block_output", 1, "-3")]
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "layers"
    counter.take()
    for site, layers in zip(sites, ([1, 2], [2]), strict=True):
        compare(past, plain, ROWS[0], {site: loreft(32, 2, seed=0, start="paper")})
        counter.take()
        past.logits(ROWS[0], {site: loreft(32, 2, seed=0)})
        assert [layer for layer, *_ in counter.take()] == layers


def test_a_path_outside_every_chain_is_run_plainly() -> None:
    backbone, batch = Backbone(build("llama")), make_batch("llama")
    readout = Readout.at(batch, "last", TOKENS)
    site = Site("model.norm.output", positions="last")
    past = FrozenPast(backbone, batch, [site], readout)
    assert past.mode == "plain"
    compare(past, PlainEngine(backbone, batch, readout), ROWS[0], {site: loreft(32, 2, seed=0, start="paper")})


def test_only_what_is_needed_is_kept() -> None:
    """States of the boundary from the first edited token on; keys and values of the earlier ones, above it."""
    batch = make_batch("llama", "none")
    past = FrozenPast(Backbone(build("llama")), batch, [Site("block_output", 0, "-3")], Readout.at(batch, "last"))
    assert past.prefix is not None
    assert {b: t.shape for b, t in past.prefix.states.items()} == {1: (6, 3, 32)}
    (group,) = past.prefix.groups
    assert group.labels == [(layer, side) for layer in (1, 2) for side in ("keys", "values")]
    assert group.tensor.shape == (4, 6, LENGTH - 3, 2, 8)
    assert past.prefix.nbytes() == 8 * 6 * (3 * 32 + 4 * 2 * (LENGTH - 3) * 8)


# --- memory ---------------------------------------------------------------------------------------------------

SITES = [Site("block_output", 1, "last"), Site("attention_output", 0, "2:5")]


def kept_by(memory: int | str | None, chunk: int = 2, name: str = "llama") -> FrozenPast:
    batch = make_batch(name)
    return FrozenPast(Backbone(build(name)), batch, SITES, Readout.at(batch, "last"), memory=memory, chunk=chunk)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_does_not_fit_is_recomputed(name: str) -> None:
    whole = kept_by(None, name=name)
    assert whole.prefix is not None
    size = whole.prefix.nbytes()
    assert "on cpu" in whole.describe() and f"{size / 2**20:.1f} MiB" in whole.describe()
    past = kept_by(size // 3 + 1, name=name)
    assert past.prefix is None and past.mode == MODES[name] and "recomputed" in past.describe()
    plain = PlainEngine(past.backbone, past.batch, past.readout)
    for site, rows in itertools.product(SITES, ROWS):
        compare(past, plain, rows, {site: loreft(32, 3, seed=1, start="paper")})


def test_a_budget_below_one_batch_is_refused() -> None:
    size = kept_by(None).prefix.nbytes()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"cannot hold one batch of 2 rows.*smaller chunk"):
        kept_by(size // 3 - 1)
    assert kept_by(size // 3 - 1, chunk=1).mode == "keys and values"
    with pytest.raises(ValueError, match="cannot hold"):
        kept_by(0)


def test_the_host_takes_what_the_device_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_past, "budgets", lambda memory, device: (10, 10**9))
    past = kept_by(None)
    assert past.prefix is not None
    assert "in host memory" in past.describe() and past.prefix.nbytes() > 10
    edits = {SITES[0]: loreft(32, 3, seed=1), SITES[1]: loreft(32, 3, seed=2, start="paper")}
    compare(past, PlainEngine(past.backbone, past.batch, past.readout), ROWS[0], edits)


@pytest.mark.parametrize("text", ["8GiB", "500MB", "0.5 gib", "1000000", "2000 KB", "3G"])
def test_budgets_as_text(text: str) -> None:
    assert kept_by(text).prefix is not None


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-1GiB", "GiB", "1e9"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="memory="):
        kept_by(text)


def test_a_fallback_keeps_to_the_budget() -> None:
    """A model that refuses cached keys may still not keep more than was allowed."""
    model = both_ways(fresh("llama"))
    batch = make_batch("llama", "none")
    sites = [Site("block_output", 0, "last"), Site("block_output", 0, "-3")]
    made = FrozenPast(Backbone(model), batch, sites, Readout.at(batch, "last"), chunk=2)
    assert made.prefix is not None
    assert made.mode == "layers" and made.prefix.nbytes() == 8 * 6 * LENGTH * 32
    tight = FrozenPast(Backbone(model), batch, sites, Readout.at(batch, "last"), chunk=2, memory=14_000)
    assert tight.mode == "layers" and "recomputed" in tight.describe()


# --- what has changed -----------------------------------------------------------------------------------------


def weight_added(model: Any, batch: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)


def one_weight_set(model: Any, batch: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = 3.0


def optimizer_step(model: Any, batch: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def state_loaded(model: Any, batch: Any) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def state_assigned(model: Any, batch: Any) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def data_added(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.add_(0.1)


def data_replaced(model: Any, batch: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def parameter_replaced(model: Any, batch: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach() * 2)


def module_replaced(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.down_proj = nn.Linear(48, 32, bias=False)


def trained(model: Any, batch: Any) -> None:
    model.train()


def part_trained(model: Any, batch: Any) -> None:
    model.model.layers[2].train()


def cast(model: Any, batch: Any) -> None:
    model.to(torch.bfloat16)


def cast_and_back(model: Any, batch: Any) -> None:
    model.to(torch.bfloat16).to(torch.float64)


def tokens_edited(model: Any, batch: Any) -> None:
    batch.inputs["input_ids"][0, 1] = 7


def mask_edited(model: Any, batch: Any) -> None:
    batch.inputs["attention_mask"][0, -1] = 0


def column_edited(model: Any, batch: Any) -> None:
    batch.columns["subject"][0] += 1


def tokens_edited_beside_torch(model: Any, batch: Any) -> None:
    batch.inputs["input_ids"].numpy()[0, 1] = 7


def tokens_replaced(model: Any, batch: Any) -> None:
    batch.inputs["input_ids"] = batch.inputs["input_ids"].clone()


def hook_added(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)


def hook_added_before(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def forward_replaced(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: 2 * x


def class_replaced(model: Any, batch: Any) -> None:
    class Other(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        pass

    model.model.layers[0].mlp.__class__ = Other


def scale_of_attention_set(model: Any, batch: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def scale_of_rotation_set(model: Any, batch: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


def epsilon_set(model: Any, batch: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1


def activation_replaced(model: Any, batch: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def configuration_set(model: Any, batch: Any) -> None:
    model.config.initializer_range = 0.5


CHANGES = [
    hook_added,
    hook_added_before,
    forward_replaced,
    class_replaced,
    scale_of_attention_set,
    scale_of_rotation_set,
    epsilon_set,
    activation_replaced,
    configuration_set,
    weight_added,
    one_weight_set,
    optimizer_step,
    state_loaded,
    state_assigned,
    data_added,
    data_replaced,
    parameter_replaced,
    module_replaced,
    trained,
    part_trained,
    cast,
    cast_and_back,
    tokens_edited,
    mask_edited,
    column_edited,
    tokens_edited_beside_torch,
    tokens_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_change_after_the_pass_is_told(change: Callable[..., Any], memory: int | None) -> None:
    model, batch = fresh("llama"), make_batch("llama")
    past = FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last"), memory=memory, chunk=2)
    assert (past.prefix is None) == (memory is not None)
    edits = {SITES[0]: loreft(32, 2, seed=0)}
    past.logits(torch.arange(2), edits)
    past.logits(torch.arange(2), edits)
    change(model, batch)
    with pytest.raises(RuntimeError, match="changed after its past was computed"):
        past.logits(torch.arange(2), edits)


def test_a_method_of_a_class_replaced_after_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any
    model, batch = fresh("llama"), make_batch("llama")
    past = FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last"))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"computed \(a forward was replaced\)"):
        past.logits(torch.arange(2), {})


def test_what_changes_no_state_is_no_change() -> None:
    model: Any
    model, batch = fresh("llama"), make_batch("llama")
    past = FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last"))
    expected = past.logits(torch.arange(2), {})
    name = (
        "activation_checkpointing"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing"
    )
    getattr(model, f"{name}_enable")()
    getattr(model, f"{name}_disable")()
    model.config.use_cache = False
    model(**inputs("llama", 2, 5), output_hidden_states=True, output_attentions=True)  # leaves hooks that read
    model.generate(**inputs("llama", 2, 5), max_new_tokens=2)
    model.model.note = 3
    assert torch.equal(past.logits(torch.arange(2), {}), expected)


class Noting(nn.Module):
    """Notes of the model's own, which its states do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.last = nn.Linear(4, 4), 0, 0

    def forward(self, x: Any) -> Any:
        self.calls, self.last = self.calls + 1, len(x)
        return self.linear(x)


def test_attributes_that_a_run_sets_are_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), Noting(), nn.Linear(4, 3)).eval()
    past = FrozenPast(Backbone(model), Batch.of(torch.randn(5, 4)), [Site("2.input")], Readout())
    assert past.mode == "layers"
    past.logits(torch.arange(3), {})
    past.logits(torch.arange(2), {})
    model[1].linear.in_features = 7
    with pytest.raises(RuntimeError, match="attributes of modules were set: in_features"):
        past.logits(torch.arange(3), {})


def test_buffers_count_as_weights() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    past = FrozenPast(Backbone(model), Batch.of(torch.randn(5, 4)), [Site("2.input")], Readout())
    assert past.mode == "layers"
    past.logits(torch.arange(3), {})
    model[1].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="changed"):
        past.logits(torch.arange(3), {})


def test_autocast_is_part_of_what_was_kept() -> None:
    batch = make_batch("llama")
    past = FrozenPast(Backbone(build("llama")), batch, SITES, Readout.at(batch, "last"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="changed"):
        past.logits(torch.arange(3), {})


def test_unknown_sites_are_refused() -> None:
    past = kept_by(None)
    with pytest.raises(ValueError, match=r"block_output\[0\]@last.* were not named"):
        past.logits(torch.arange(2), {Site("block_output", 0, "last"): loreft(32, 2, seed=0)})
    with pytest.raises(ValueError, match="none were given"):
        FrozenPast(past.backbone, past.batch, [], past.readout)
    with pytest.raises(IndexError, match="layer 7"):
        FrozenPast(past.backbone, past.batch, [Site("block_output", 7)], past.readout)


def test_sources_are_checked_as_in_the_plain_run() -> None:
    past = kept_by(None)
    edit = {SITES[1]: interchange(LearnedSubspace(32, 2, seed=0))}
    for sources in (None, {SITES[1]: torch.zeros(2, 2, 32)}, {SITES[1]: torch.zeros(3, 3, 32)}):
        with pytest.raises(ValueError, match=r"source|rows"):
            past.logits(torch.arange(2), edit, sources)
    past.logits(torch.arange(2), edit, {SITES[1]: torch.zeros(2, 3, 32)})


# --- models that do not keep what is assumed --------------------------------------------------------------------


def both_ways(model: Any) -> nn.Module:
    """Causal by its class alone: without padding every token sees all the others."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def refused_or_right(model: nn.Module, batch: Batch, sites: list[Site], readout: Readout, mode: str) -> FrozenPast:
    backbone = Backbone(model)
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == mode and past.reason, past.describe()
    states = collect(backbone, batch, sites)
    for site, rows in itertools.product(sites, ROWS[:3]):
        edits = make_edits(states, [site])
        compare(past, plain, rows, edits)
        plain.logits(rows.flip(0)[:1], {})  # what a stateful model remembers next is of other rows
    return past


@pytest.mark.parametrize("positions", ["last", "-3"])
def test_attention_both_ways_is_noticed(positions: str) -> None:
    """With an edit that changes nothing such a model resumes without fault: its check has to change something."""
    batch = make_batch("llama", "none")
    sites = [Site("block_output", 0, positions)]
    past = refused_or_right(both_ways(fresh("llama")), batch, sites, Readout.at(batch, "last"), "layers")
    assert "refused" in past.describe()


@pytest.mark.parametrize("positions", ["last", "all", "first"])
def test_a_block_that_remembers_for_a_later_one_is_noticed(positions: str) -> None:
    model: Any = fresh("llama")
    kept = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: kept.append(out))
    model.model.layers[2].mlp.register_forward_hook(lambda m, args, out: out + kept[-1])
    batch = make_batch("llama", "none")
    refused_or_right(model, batch, [Site("block_output", 0, positions)], Readout.at(batch, "last"), "plain")


class SelfAttention(nn.Linear):
    """Enough of an attention for blocks to be found by it."""


class TupleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = SelfAttention(16, 16)

    def forward(self, hidden: Any, depth: Any) -> tuple[Any, Any]:
        return hidden + self.mix(hidden).tanh() * depth, depth + 1


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(3))
        self.head = nn.Linear(16, 60)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden, depth = self.embed(input_ids), 1
        for layer in self.layers:
            hidden, depth = layer(hidden, depth)
        return self.head(hidden)


def test_blocks_that_return_more_than_states_are_noticed() -> None:
    batch = make_batch("llama", "none")
    sites = [Site("layers.0.mix.output"), Site("block_output", 1, "last")]
    readout = Readout.at(batch, "last")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TupleModel().double()
    refused_or_right(model, batch, sites[1:], readout, "plain")
    refused_or_right(model, batch, sites, readout, "plain")


def test_a_cache_that_is_none_is_no_error() -> None:
    """Whatever fails while keys are being kept ends in a lesser mode, not in an exception."""
    model = fresh("llama")
    whole = type(model).forward

    class Uncached(type(model)):  # type: ignore[misc]
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
        ) -> Any:
            return whole(self, input_ids, attention_mask, position_ids, use_cache=False)

    model.__class__ = Uncached
    batch = make_batch("llama", "left")
    refused_or_right(model, batch, SITES, Readout.at(batch, "last"), "layers")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_active_dropout_freezes_nothing(name: str) -> None:
    model = fresh(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3  # type: ignore[assignment]
    batch = make_batch(name)
    model.train()
    past = FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last"))
    assert past.mode == "plain" and "dropout" in past.describe()
    torch.manual_seed(3)
    one = past.logits(torch.arange(3), {})
    assert not torch.equal(one, past.logits(torch.arange(3), {})), "the model's own dropout stays in force"
    torch.manual_seed(3)
    assert torch.equal(one, PlainEngine(past.backbone, batch, past.readout).logits(torch.arange(3), {}))
    model.eval()
    again = FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last"))
    assert again.mode == MODES[name]
    for module in model.modules():
        module.train()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    assert FrozenPast(Backbone(model), batch, SITES, Readout.at(batch, "last")).mode == MODES[name]


def test_statistics_of_a_batch_freeze_nothing() -> None:
    """Normalised by its batch, a state depends on the rows beside it; looking must not move the averages."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = copy.deepcopy(model.state_dict())
    past = FrozenPast(Backbone(model), Batch.of(torch.randn(5, 4)), [Site("2.input")], Readout())
    assert past.mode == "plain" and "1" in past.reason
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- a guest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "mlp"])
def test_the_model_the_data_and_the_dice_stay_as_they_were(name: str) -> None:
    model, batch = fresh(name), make_batch(name)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    next(iter(model.children())).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in parameters], [m.training for m in model.modules()]
    given = {k: v.clone() for k, v in batch.inputs.items()} if batch.positional is None else {}
    versions = [t._version for t in (*batch.inputs.values(), *batch.columns.values())]
    sites = [Site("second.output")] if name == "mlp" else SITES
    widths = (32, 32)
    edits = {site: loreft(width, 2, seed=3) for site, width in zip(sites, widths, strict=False)}
    readout = make_readout(name, batch)
    dice = torch.get_rng_state()
    past = FrozenPast(Backbone(model), batch, sites, readout)
    measured(past, torch.tensor([1, 0]), edits)
    past.describe()
    assert past.mode == {"mlp": "layers", **MODES}[name]
    assert torch.equal(dice, torch.get_rng_state())
    assert flags == ([p.requires_grad for p in parameters], [m.training for m in model.modules()])
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, given[k]) for k, v in batch.inputs.items())
    assert versions == [t._version for t in (*batch.inputs.values(), *batch.columns.values())]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_generation_after_training_is_the_model_s_own() -> None:
    model: Any
    model, batch = fresh("llama"), make_batch("llama", "left")
    backbone = Backbone(model)
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False)
    before = model.generate(**batch.inputs, **options)
    readout = Readout.at(batch, "last")
    past = FrozenPast(backbone, batch, SITES, readout)
    edits = {site: loreft(32, 2, seed=i, start="paper") for i, site in enumerate(SITES)}
    optimizer = torch.optim.Adam([p for e in edits.values() for p in e.parameters()], lr=0.5)
    for _ in range(5):
        loss = nn.functional.cross_entropy(past.logits(torch.arange(6), edits)[:, 0], torch.full((6,), 7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.generate(**batch.inputs, **options), before)
    edited = generate(backbone, batch, edits, **options)[:, LENGTH:]
    assert not torch.equal(edited, before[:, LENGTH:])
    with torch.no_grad():
        assert torch.equal(edited[:, 0], past.logits(torch.arange(6), edits)[:, 0].argmax(-1))


def test_inference_mode_around_the_pass_is_no_trap() -> None:
    """Tensors kept inside inference mode could not serve training afterwards."""
    backbone, batch = Backbone(build("llama")), make_batch("llama")
    with torch.inference_mode():
        past = FrozenPast(backbone, batch, SITES, Readout.at(batch, "last"))
    compare(
        past, PlainEngine(backbone, batch, past.readout), ROWS[0], {SITES[0]: loreft(32, 3, seed=1, start="paper")}
    )
