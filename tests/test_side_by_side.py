"""Edits in several blocks, side by side in one run, give what each gives alone."""

from typing import Any

import pytest
import torch
from families import DECODERS, ENCODERS, exact, rounding
from hypothesis import given
from hypothesis import strategies as st
from test_frozen_past import MODES, build, gap, interchange, loreft, make_batch, make_readout

from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.engine.cohorts import cohorts_of
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine, Part
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect

PLACES = (
    "block_input[0]",
    "mlp_output[0]",
    "block_output[0]",
    "attention_output[1]",
    "block_output[1]",
    "block_output[2]",
)
ROWS = ([4, 0, 2], [2, 2], [5], [1, 3, 0, 4], [3, 5], [0, 1])
NAMES = [name for name in (*DECODERS, *ENCODERS) if MODES[name] != "plain"]


def parts_at(states: dict, sites: list[Site]) -> list[Part]:
    """LoReFT and interchange by turns, each of rows of its own."""
    parts = []
    for number, (site, chosen) in enumerate(zip(sites, ROWS, strict=False)):
        rows, width = torch.tensor(chosen), states[site].shape[-1]
        if number % 2:
            edit, sources = (
                interchange(LearnedSubspace(width, 3, seed=number)),
                {site: states[site][(rows + 1) % 6]},
            )
        else:
            edit, sources = loreft(width, 3, seed=number, start="paper"), None
        parts.append(Part(rows, {site: edit}, sources))
    return parts


def measured(logits: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
    edits: list[Any] = [edit for part in parts for edit in part.edits.values()]
    parameters = [p for edit in edits for p in edit.parameters()]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    return [logits.detach(), *torch.autograd.grad((weights * logits.double()).sum(), parameters)]


def runs_of(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run from now on has."""
    found: list[int] = []
    plain = Backbone.run

    def counted(self: Any, inputs: Any, hooks: Any, **options: Any) -> Any:
        found.append(len(next(iter(inputs.values()))))
        return plain(self, inputs, hooks, **options)

    monkeypatch.setattr(Backbone, "run", counted)
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_side_by_side_are_the_parts_alone(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, backbone = make_batch(name, padding), Backbone(build(name))
    readout = make_readout(name, batch)
    sites = [Site.parse(f"{place}@subject") for place in PLACES]
    # Nothing of the last block is read at the subject.
    sites = sites if name in ENCODERS else sites[:-1]
    frozen, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert frozen.mode == MODES[name]
    states = collect(backbone, batch, sites)
    parts = parts_at(states, sites)
    alone = torch.cat([plain.logits(p.rows, p.edits, p.sources) for p in parts])
    sizes = runs_of(backbone, monkeypatch)
    together = frozen.side_by_side(parts)
    assert sizes == [sum(len(p.rows) for p in parts)]
    assert gap(measured(together, parts), measured(alone, parts)) < rounding(exact(name))


def test_parts_that_begin_at_other_tokens_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, backbone = make_batch("llama"), Backbone(build("llama"))
    sites = [Site("block_output", 0, "last"), Site("block_output", 1, "-3")]
    frozen = FrozenPast(backbone, batch, sites, make_readout("llama", batch))
    parts = parts_at(collect(backbone, batch, sites), sites)
    sizes = runs_of(backbone, monkeypatch)
    together = frozen.side_by_side(parts)
    assert sizes == [len(part.rows) for part in parts]
    alone = [frozen.logits(p.rows, p.edits, p.sources) for p in parts]
    assert torch.equal(together, torch.cat(alone))


def test_a_part_without_edits_is_the_plain_run() -> None:
    batch, backbone = make_batch("qwen2", "left"), Backbone(build("qwen2"))
    readout, sites = (
        make_readout("qwen2", batch),
        [Site("block_output", 0, "last"), Site("block_output", 1, "last")],
    )
    frozen, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    rows = torch.tensor([3, 1])
    edited = parts_at(collect(backbone, batch, sites), sites)[0]
    found = frozen.side_by_side([edited, Part(rows, {})])
    assert gap([found[len(edited.rows) :]], [plain.logits(rows, {})]) < rounding(torch.float64)


def test_a_site_that_was_not_named_is_refused() -> None:
    batch, backbone = make_batch("llama"), Backbone(build("llama"))
    site, other = Site("block_output", 0, "last"), Site("block_output", 1, "last")
    frozen = FrozenPast(backbone, batch, [site], make_readout("llama", batch))
    assert isinstance(frozen, Engine)
    with pytest.raises(ValueError, match="were not named"):
        frozen.side_by_side(
            [Part(torch.tensor([0]), {site: lambda h: h}), Part(torch.tensor([0]), {other: lambda h: h})]
        )


# --- which run together -------------------------------------------------------------------------------------


def cost(cohort: list[int], starts: list[int], depth: int, rows: int, tokens: float, fixed: float) -> float:
    return (depth - min(starts[i] for i in cohort) + 1) * (fixed + rows * len(cohort) * tokens)


def partitions(numbers: list[int]) -> list[list[list[int]]]:
    """All ways to cut a list into stretches."""
    if not numbers:
        return [[]]
    return [[numbers[:n], *rest] for n in range(1, len(numbers) + 1) for rest in partitions(numbers[n:])]


@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    rows=st.integers(1, 40),
    tokens=st.floats(1, 5),
    fixed=st.floats(0, 300),
)
def test_no_other_cohorts_of_neighbours_cost_less(
    starts: list[int], rows: int, tokens: float, fixed: float
) -> None:
    found = cohorts_of(starts, 6, rows, tokens, fixed)
    assert sorted(i for cohort in found for i in cohort) == list(range(len(starts)))
    order = sorted(range(len(starts)), key=lambda i: starts[i])
    best = min(sum(cost(c, starts, 6, rows, tokens, fixed) for c in cut) for cut in partitions(order))
    assert sum(cost(c, starts, 6, rows, tokens, fixed) for c in found) <= best * (1 + 1e-12)


def test_large_batches_run_alone_and_small_ones_share() -> None:
    assert len(cohorts_of([1, 2, 3], 6, 500, 1.0, 0.0)) == 3
    assert cohorts_of([1, 2, 3], 6, 1, 1.0, 100.0) == [[0, 1, 2]]
    assert [len(c) for c in cohorts_of([1] * 5, 6, 400, 1.0, 1e9)] == [1, 2, 2]  # at most 1,024 rows


def test_cohorts_begin_at_the_same_tokens() -> None:
    batch, backbone = make_batch("llama", "left"), Backbone(build("llama"))
    sites = [Site("block_output", layer, p) for layer in range(3) for p in ("last", "-3")]
    frozen = FrozenPast(backbone, batch, sites, make_readout("llama", batch))
    found = frozen.cohorts([(site,) for site in sites], 2)
    assert sorted(i for cohort in found for i in cohort) == list(range(len(sites)))
    assert all(len({sites[i].positions for i in cohort}) == 1 for cohort in found)
    assert max(map(len, found)) > 1
    assert PlainEngine(backbone, batch, make_readout("llama", batch)).cohorts([(s,) for s in sites], 2) == [
        [i] for i in range(len(sites))
    ]
