"""What a run leaves behind, compiled models, and plain modules whose widths only a run tells."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import WIDTH, fresh, inputs
from torch import Tensor, nn

from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, LearnedSubspace
from subspace_lab.das.encoding import encode
from subspace_lab.das.methods import DAS, PCA, FullVector
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.search import search
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward, generate

SITE = Site("block_output", 1)


def lost(run: Callable[..., Any]) -> list[tuple[int, ...]]:
    """The shapes of the tensors that are in cycles after a run, so that only the collector of garbage frees them."""
    run()  # what is made once is no loss
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        return [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_runs_leave_no_tensors_in_cycles() -> None:
    lab, given = Backbone(fresh("llama")), inputs("llama")
    batch, edits = Batch.of(given), {SITE: loreft(WIDTH, 2, seed=0)}
    readout = Readout.at(batch)
    plain, past = PlainEngine(lab, batch, readout), FrozenPast(lab, batch, [SITE], readout)
    rows = torch.arange(3)
    runs = {
        "collect": lambda: collect(lab, given, [SITE, Site("head_output", 2)]),
        "forward": lambda: forward(lab, given, edits),
        "generate": lambda: generate(lab, given, edits, max_new_tokens=2),
        "plain engine": lambda: plain.logits(rows, edits),
        "frozen past": lambda: past.logits(rows, edits),
        "a new frozen past": lambda: FrozenPast(lab, batch, [SITE], readout).logits(rows, edits),
        "a new plain engine": lambda: PlainEngine(lab, batch, readout).logits(rows, edits),
    }
    assert {name: lost(run) for name, run in runs.items()} == {name: [] for name in runs}


def test_an_engine_is_freed_when_it_is_dropped() -> None:
    lab, batch = Backbone(fresh("llama")), Batch.of(inputs("llama"))
    gc.collect()
    gc.disable()
    try:
        past = FrozenPast(lab, batch, [SITE], Readout.at(batch))
        stored = weakref.ref(past.prefix)
        del past
        assert stored() is None
    finally:
        gc.enable()


def test_a_run_that_fails_inside_says_so_and_leaves_the_model_usable() -> None:
    lab, given = Backbone(fresh("llama")), inputs("llama")
    expected = collect(lab, given, [SITE])[SITE]
    with pytest.raises(ZeroDivisionError):
        forward(lab, given, {SITE: lambda h: h / (1 // 0)})
    assert torch.equal(collect(lab, given, [SITE])[SITE], expected)


@pytest.mark.parametrize("how", ["model.compile()", "torch.compile(model)", "block.compile()"])
def test_compiled_models_run_as_they_are_written(how: str) -> None:
    plain, model, given = Backbone(fresh("llama")), fresh("llama"), inputs("llama")
    edits = {SITE: loreft(WIDTH, 2, seed=0, start="paper")}
    expected, states = forward(plain, given, edits).logits, collect(plain, given, [SITE])[SITE]
    if how == "model.compile()":
        model.compile()
    elif how == "block.compile()":
        model.model.layers[0].compile()
    lab = Backbone(torch.compile(model) if how == "torch.compile(model)" else model)  # type: ignore[arg-type]
    begun = time.monotonic()
    assert torch.equal(collect(lab, given, [SITE])[SITE], states)
    assert torch.equal(forward(lab, given, edits).logits, expected)
    assert time.monotonic() - begun < 5


def test_rows_of_another_format() -> None:
    wrong = Dataset.from_list([{"base": "a", "source": "b", "answer": "c", "base_answer": "d"}])
    said = r"lacks base_spans, sources, source_spans and has answer, base, base_answer, source\. .*`from_texts`"
    with pytest.raises(ValueError, match=said):
        encode(wrong, None, ["c", "d"])
    with pytest.raises(ValueError, match="lacks base, base_spans"):
        encode(Dataset.from_list([{"text": "a"}]), None, ["c"])


# --- widths that only a run tells ---------------------------------------------------------------------------


class Widens(nn.Module):
    """Nothing in it says how wide its output is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10))

    def forward(self, x: Any) -> Tensor:
        return torch.tanh(x @ self.weight)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Widens(), nn.GELU(), nn.Linear(10, 3))


SITES = [Site("1.output"), Site("2.output"), Site("1.input"), Site("0.output")]


def drawn(seed: int) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    base, source = (Batch.of(torch.randn(40, 4, generator=g)) for _ in range(2))
    with torch.no_grad():
        answer, base_answer = (chain()(b.positional).argmax(-1) for b in (base, source))
    return Counterfactuals(base, {"v": source}, answer, base_answer, tuple("abc"))


def test_sites_of_unknown_width() -> None:
    model = chain()
    lab, x, other = Backbone(model), torch.randn(5, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="its width is not known before a run"):
        lab.width(SITES[0])
    source = collect(lab, other, [SITES[0]])
    swap = {SITES[0]: interchange(Axes(10))}
    expected = model[3](model[2](model[1](model[0](other))))
    torch.testing.assert_close(forward(lab, x, swap, sources=source), expected)
    with pytest.raises(ValueError, match="width 10 for a subspace of width 7"):
        forward(lab, x, {SITES[0]: interchange(Axes(7))}, sources=source)
    batch, rows = Batch.of(x), torch.tensor([3, 0])
    past = FrozenPast(lab, batch, SITES, Readout())
    assert past.mode == "layers"
    for site, width in zip(SITES, (10, 10, 6, 6), strict=True):
        edits = {site: interchange(LearnedSubspace(width, 2, seed=0))}
        states = {site: collect(lab, other, [site])[site][rows]}
        found = past.logits(rows, edits, states)
        torch.testing.assert_close(found, PlainEngine(lab, batch, Readout()).logits(rows, edits, states))


def test_a_search_at_sites_of_unknown_width() -> None:
    pairs = Pairs(drawn(0), drawn(1), drawn(2))
    methods = [DAS(2), PCA(10), FullVector()]
    config = TrainingConfig(steps=3, batch_size=8)
    fits = search(Backbone(chain()), pairs, SITES[:2], methods=methods, config=config, quiet=True)
    assert len(fits) == 6 and not fits.failures
    # All of the state carries the answer, whichever way it is exchanged.
    whole = [fit for fit in fits if fit.method.label in ("FullVector", "PCA 10")]
    assert [fit.scores["test"]["iia"].value for fit in whole] == [1.0] * 4
    with pytest.raises(ValueError, match=r"rank 11 for 1 variable.* in states of width 10"):
        search(Backbone(chain()), pairs, SITES[:1], methods=[PCA(11)], config=config, quiet=True)
