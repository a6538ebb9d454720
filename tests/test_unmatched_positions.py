"""Sources that have more or fewer positions than their bases, against hooks written by hand, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import WIDTH, fresh
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from subspace_lab.core.interventions import interchange
from subspace_lab.core.positions import match
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, LearnedSubspace, random_subspace
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward, generate

BASES, SOURCES = (7, 4, 9, 2), (5, 9, 3, 2)  # lengths


@pytest.fixture(scope="module")
def lab() -> Backbone:
    return Backbone(fresh("llama"))


def padded(
    lengths: tuple[int, ...] | list[int], padding: str, seed: int, columns: dict[str, Any] | None = None
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, n in enumerate(lengths):
        at = slice(longest - n, None) if padding == "left" else slice(0, n)
        ids[row, at], mask[row, at] = torch.randint(3, 60, (n,), generator=g), 1
    return Batch({"input_ids": ids, "attention_mask": mask}, columns=columns or {})


def tokens(batch: Batch, row: int) -> Tensor:
    return batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()][None]


# {positions: (base length, source length) → [(base token, source token)]}, written out by hand.
def ends(n: int, p: int, s: int) -> tuple[list[int], list[int]]:
    p, s = (p, s) if n >= p + s else (min(p, n // 2), min(s, (n + 1) // 2))
    return list(range(p)), list(range(n - s, n))


def by_ends(b: int, s: int) -> list[tuple[int, int]]:
    (front_b, back_b), (front_s, back_s) = ends(b, 3, 3), ends(s, 3, 3)
    return [*zip(front_b, front_s, strict=False), *zip(back_b[::-1], back_s[::-1], strict=False)]


def lopsided(b: int, s: int) -> list[tuple[int, int]]:
    (front_b, back_b), (front_s, back_s) = ends(b, 1, 5), ends(s, 1, 5)
    return [*zip(front_b, front_s, strict=False), *zip(back_b[::-1], back_s[::-1], strict=False)]


MATCHED = {
    "all": lambda b, s: [(i, i) for i in range(min(b, s))],
    "2:": lambda b, s: [(i, i) for i in range(2, min(b, s))],
    ":-1": lambda b, s: [(i, i) for i in range(min(b, s) - 1)],
    "-4:": lambda b, s: [(b - i, s - i) for i in range(1, min(b, s, 4) + 1)],
    "f3+l3": by_ends,
    "f1+l5": lopsided,
}


def oracle(
    lab: Any, base: Batch, source: Batch, where: Callable[..., Any], layers: list[Any], basis: Tensor
) -> Tensor:
    """(rows, vocabulary): logits after each row's last token, with torch hooks, one row at a time."""
    found = []
    for row in range(len(base)):
        ids, other = tokens(base, row), tokens(source, row)
        pairs = where(ids.shape[1], other.shape[1])
        at, of = [p for p, _ in pairs], [p for _, p in pairs]
        states: dict[Any, Any] = {}
        handles: list[Any] = []
        for layer in layers:
            block = lab.model.model.layers[layer]

            def keep(_: Any, __: Any, out: Any, layer: int = layer, states: dict[Any, Any] = states) -> None:
                states[layer] = (out if isinstance(out, Tensor) else out[0]).clone()

            handles.append(block.register_forward_hook(keep))
        with torch.no_grad():
            lab.model(other)
        [h.remove() for h in handles]

        def edit(out: Any, kept: Any, at: list[Any] = at, of: list[Any] = of) -> Any:
            h = (out if isinstance(out, Tensor) else out[0]).clone()
            h[:, at] = h[:, at] + (kept[:, of] - h[:, at]) @ basis.T @ basis
            return h if isinstance(out, Tensor) else (h, *out[1:])

        handles = [
            lab.model.model.layers[layer].register_forward_hook(
                lambda _, __, out, edit=edit, kept=states[layer]: edit(out, kept)
            )
            for layer in layers
        ]
        with torch.no_grad():
            found.append(lab.model(ids).logits[0, -1])
        [h.remove() for h in handles]
    return torch.stack(found)


def last_logits(output: Any, batch: Batch) -> Tensor:
    logits, real = output.logits, batch.inputs["attention_mask"].bool()
    at = (real.long() * torch.arange(real.shape[1])).argmax(1)
    return logits[torch.arange(len(batch)), at]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("positions", MATCHED)
def test_positions_that_either_side_lacks_stay_the_base_s(lab: Backbone, positions: str, padding: str) -> None:
    base, source = padded(BASES, padding, 0), padded(SOURCES, padding, 1)
    subspace = random_subspace(WIDTH, 8, 3)
    sites = [Site("block_output", 0, positions), Site("block_output", 1, positions)]
    sources = collect(lab, source, sites)
    edits = {site: interchange(subspace) for site in sites}
    expected = oracle(lab, base, source, MATCHED[positions], [0, 1], subspace.basis())
    found = last_logits(forward(lab, base, edits, sources=sources, unmatched="keep_base"), base)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([2, 0, 3, 1, 1])
    some = {site: states[rows] for site, states in sources.items()}
    readout = Readout.at(base)
    for engine in (PlainEngine(lab, base, readout), FrozenPast(lab, base, [tuple(sites)], readout)):
        logits = engine.logits(rows, edits, some, "keep_base")[:, 0]
        torch.testing.assert_close(logits, expected[rows], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"row \d of the base has \d positions and its source has \d"):
        forward(lab, base, edits, sources=sources)


def test_the_message_names_the_example_and_both_counts(lab: Backbone) -> None:
    base, source = padded((7, 4), "right", 0), padded((7, 3), "right", 1)
    site = Site("block_output", 1)
    states = collect(lab, source, [site])
    edits = {site: interchange(Axes(WIDTH))}
    sentence = r"row 1 of the base has 4 positions and its source has 3; an interchange needs the same number"
    for run in (
        lambda: forward(lab, base, edits, sources=states),
        lambda: generate(lab, base, edits, sources=states, max_new_tokens=1),
        lambda: PlainEngine(lab, base, Readout.at(base)).logits(torch.arange(2), edits, states),
        lambda: FrozenPast(lab, base, [site], Readout.at(base)).logits(torch.arange(2), edits, states),
    ):
        with pytest.raises(ValueError, match=sentence):
            run()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_generation_with_fewer_positions(lab: Backbone, padding: str) -> None:
    base, source = padded(BASES, padding, 0), padded(SOURCES, padding, 1)
    site, axes = Site("block_output", 1, "f3+l3"), Axes(WIDTH)
    states = collect(lab, source, [site])
    expected = oracle(lab, base, source, by_ends, [1], axes.basis()).argmax(-1)
    for more in ({}, {"num_beams": 2, "use_cache": False}, {"use_cache": False}):
        left = base if padding == "left" else padded(BASES, "left", 0)
        out = generate(
            lab,
            left,
            {site: interchange(axes)},
            sources=states,
            unmatched="keep_base",
            max_new_tokens=1,
            do_sample=False,
            **more,
        )
        assert out[:, -1].tolist() == expected.tolist()


def test_collect_marks_what_a_row_lacks(lab: Backbone) -> None:
    found = collect(lab, padded((5, 2), "left", 0), [Site("block_output", 1)])[Site("block_output", 1)]
    assert found[0].isfinite().all() and found[1, :2].isfinite().all() and found[1, 2:].isnan().all()


@pytest.mark.parametrize("frozen", [True, False])
def test_several_variables_of_which_each_has_its_own_positions(lab: Backbone, frozen: bool) -> None:
    """The oracle is a run of single rows, in which a variable that lacks the position is left out."""
    base = padded((6, 6), "right", 0)
    a, b = padded((6, 4), "right", 1), padded((3, 6), "right", 2)
    site = Site("block_output", 1, "3:5")
    parts = random_subspace(WIDTH, 8, 0).partition({"a": 3, "b": 5})
    sources = {site: {"a": collect(lab, a, [site])[site], "b": collect(lab, b, [site])[site]}}
    readout = Readout.at(base)
    engine = FrozenPast(lab, base, [site], readout) if frozen else PlainEngine(lab, base, readout)
    found = engine.logits(torch.arange(2), {site: interchange(parts)}, sources, "keep_base")[:, 0]
    # Row 0: b has none of the two positions. Row 1: a has one of them, b both.
    expected = []
    for row, names_at in ((0, {3: ["a"], 4: ["a"]}), (1, {3: ["a", "b"], 4: ["b"]})):
        edits, given = {}, {}
        for at, names in names_at.items():
            own = Site("block_output", 1, at)
            edits[own] = interchange({n: parts[n] for n in names})
            of = {"a": a, "b": b}
            given[own] = {n: collect(lab, of[n].rows(torch.tensor([row])), [own])[own] for n in names}
        one = base.rows(torch.tensor([row]))
        expected.append(last_logits(forward(lab, one, edits, sources=given), one)[0])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_finite_and_those_of_the_rows_alone(lab: Backbone, frozen: bool) -> None:
    base, source = padded(BASES, "left", 0), padded(SOURCES, "left", 1)
    site = Site("block_output", 1)
    states = collect(lab, source, [site])[site]
    subspace = LearnedSubspace(WIDTH, 4, seed=0)
    readout = Readout.at(base)
    engine = FrozenPast(lab, base, [site], readout) if frozen else PlainEngine(lab, base, readout)
    parameters = list(subspace.parameters())

    def gradient(rows: Tensor) -> Tensor:
        own = {site: states[rows]}
        logits = engine.logits(rows, {site: interchange(subspace)}, own, "keep_base")
        return torch.autograd.grad(logits[:, 0, 5].sum(), parameters)[0]

    whole = gradient(torch.arange(4))
    assert whole.isfinite().all() and whole.abs().sum() > 0
    alone = sum(gradient(torch.tensor([row])) for row in range(4))
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-4)


def test_ragged_rows_of_equal_counts_train_with_finite_gradients(lab: Backbone) -> None:
    base, source = padded(BASES, "left", 0), padded(BASES, "right", 1)
    site = Site("block_output", 1)
    subspace = LearnedSubspace(WIDTH, 4, seed=0)
    out = forward(lab, base, {site: interchange(subspace)}, sources=collect(lab, source, [site]))
    (gradient,) = torch.autograd.grad(last_logits(out, base)[:, 5].sum(), list(subspace.parameters()))
    assert gradient.isfinite().all()
    expected = oracle(lab, base, source, MATCHED["all"], [1], subspace.basis().detach())
    torch.testing.assert_close(last_logits(out, base).detach(), expected, rtol=1e-4, atol=1e-4)


def test_names_of_more_tokens_than_the_other_s(lab: Backbone) -> None:
    base = padded((6, 6), "right", 0, {"name": torch.tensor([[2, 3], [1, -1]])})
    source = padded((6, 6), "right", 1, {"name": torch.tensor([[4, -1], [1, 2]])})
    site = Site("block_output", 1, "name")
    states = collect(lab, source, [site])
    edits = {site: interchange(Axes(WIDTH))}
    with pytest.raises(ValueError, match="row 0 of the base has 2 positions and its source has 1"):
        forward(lab, base, edits, sources=states)
    found = forward(lab, base, edits, sources=states, unmatched="keep_base").logits[:, -1]
    expected = [
        oracle(lab, base.rows(r), source.rows(r), lambda *_, p=p: p, [1], torch.eye(WIDTH))[0]
        for r, p in ((torch.tensor([0]), [(2, 4)]), (torch.tensor([1]), [(1, 1)]))
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_what_the_counts_cannot_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="Use a site for each term"):
        match("name+last", torch.tensor([3]), torch.tensor([2]), 3)
    assert match("name+last", torch.tensor([3]), torch.tensor([3]), 3).tolist() == [[0, 1, 2]]
    for mixed in ("2:-2+4", "-3:5", "a+b", "f3[0]+l2[1]"):
        with pytest.raises(ValueError, match="it is not clear which position"):
            match(mixed, torch.tensor([3]), torch.tensor([2]), 3)


def test_a_source_with_holes_is_refused(lab: Backbone) -> None:
    base, site = padded((4, 4), "right", 0), Site("block_output", 1)
    states = collect(lab, base, [site])[site]
    states[0, 1] = float("nan")
    with pytest.raises(ValueError, match="states that are NaN before others"):
        forward(lab, base, {site: interchange(Axes(WIDTH))}, sources={site: states})


# --- searches -----------------------------------------------------------------------------------------------


def searched(lengths_base: list[int], lengths_source: list[int], seed: int) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    n = len(lengths_base)
    before, after = (torch.randint(0, 4, (n,), generator=g) for _ in range(2))
    values = {"v": torch.arange(n) % 2}
    base, source = padded(lengths_base, "right", seed), padded(lengths_source, "right", seed + 1)
    return Counterfactuals(base, {"v": source}, before, after, tuple("abcd"), torch.arange(7, 11), values)


def lengths(seed: int, n: int = 70) -> list[int]:
    return torch.randint(3, 9, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def small() -> Backbone:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    return Backbone(GPT2LMHeadModel(config).eval())


def test_a_search_names_the_pair(small: Backbone) -> None:
    site = Site("block_output", 0)
    own = lengths(0)
    other = [*own[:66], own[66] + 1, *own[67:]]
    with pytest.raises(ValueError, match=rf"row 66 of the base has {own[66]} .* source for 'v' has {other[66]}"):
        PreparedPairs.of(small, searched(own, other, 0), [{"v": site}])
    PreparedPairs.of(small, searched(own, other, 0), [{"v": site}], unmatched="keep_base")


def test_methods_without_training_see_positions_alone(small: Backbone) -> None:
    """Principal components and means of the states that there are: not of what fills rows up."""
    site = Site("block_output", 0)
    train, dev, test = (searched(lengths(i), lengths(i), 3 * i) for i in range(3))
    pairs = Pairs(train, dev, test)
    fits = sweep(small, pairs, [site], [PCA(2), DifferenceOfMeans()], min_accuracy=None, quiet=True)
    states, values = [], []
    assert isinstance(pairs.train, Counterfactuals)
    source = pairs.train.sources["v"]
    for row in range(len(source)):
        one = collect(small, Batch({"input_ids": tokens(source, row)}), [site])[site][0]
        states.append(one)
        values += [row % 2] * len(one)
    joined, rest = torch.cat(states), torch.tensor(values)
    centred = joined - joined.mean(0)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    found = fits[0].alignment.variables["v"][1].basis()
    torch.testing.assert_close(found.T @ found, expected.T @ expected, rtol=1e-3, atol=1e-3)
    gap = joined[rest == 1].mean(0) - joined[rest == 0].mean(0)
    cosine = (fits[1].alignment.variables["v"][1].basis()[0] @ gap / gap.norm()).abs()
    assert float(cosine) > 0.9999


def test_a_sweep_keeps_the_base_where_asked(small: Backbone) -> None:
    site = Site("block_output", 0, "f2+l2")
    train, dev, test = (searched(lengths(i), lengths(i + 9), 3 * i) for i in range(3))
    pairs = Pairs(train, dev, test)
    methods = [DAS(2), PCA(1), FullVector()]
    config = TrainingConfig(steps=3, batch_size=8)
    options: dict[str, Any] = {"config": config, "min_accuracy": None, "quiet": True}
    with pytest.raises(ValueError, match=r"of the base has . positions and its source for 'v' has ."):
        sweep(small, pairs, [site], methods, **options)
    fits = sweep(small, pairs, [site], methods, unmatched="keep_base", **options)
    assert len(fits) == 3 and not fits.failures and fits.facts["unmatched"] == "keep_base"
    assert all(loss == loss for loss in fits[0].losses)
    # The full swap, row by row: what each row gives alone with the terms matched by hand.
    right = []
    for row in range(len(pairs.test)):
        one = pairs.test.rows(torch.tensor([row]))
        base, source = tokens(one.base, 0), tokens(one.sources["v"], 0)
        (fb, lb), (fs, ls) = ends(base.shape[1], 2, 2), ends(source.shape[1], 2, 2)
        matched = [*zip(fb, fs, strict=False), *zip(lb[::-1], ls[::-1], strict=False)]
        whole = Site("block_output", 0)
        of = collect(small, Batch({"input_ids": source}), [whole])[whole]

        def swap(h: Tensor, matched: list[tuple[int, int]] = matched, of: Tensor = of) -> Tensor:
            h = h.clone()
            for p, q in matched:
                h[:, p] = of[:, q]
            return h

        logits = forward(small, Batch({"input_ids": base}), {whole: swap}).logits[0, -1, 7:11]
        right.append(float(logits.argmax() == one.answer[0]))
    assert fits[2].pair_scores["iia"].tolist() == right
