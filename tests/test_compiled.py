"""Compiled programs: the reader of schematics, and that their truth is one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes
from subspace_lab.das.methods import DAS
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.tasks.compiled import Compiled, columns_of, load

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
NAMES = (
    *("carry", "parity", "greater", "table", "equal", "both"),
    *("either", "maximum", "copy", "modular sum", "distance", "product sign"),
)

needs_torchwright = pytest.mark.skipif(
    find_spec("torchwright") is None, reason="torchwright is not installed (extra 'benchmarks')"
)


# --- the reader, on a schematic written by hand -------------------------------------------------------------


def schematic() -> Any:
    """Nodes a (columns 3, 1 after blocks 1 and 2), b (the last two of c's columns after block 0), d (merged away)."""
    nodes = [
        SimpleNamespace(id=f"s:{i}", name=name) for i, name in enumerate(["a", "b", "c", "d", None, "e", "e"])
    ]
    places = {
        "s:0": SimpleNamespace(lowered="l:7", slice=None),
        "s:1": SimpleNamespace(lowered="l:8", slice=(1, 2)),
        "s:2": SimpleNamespace(lowered="l:8", slice=None),
        "s:3": SimpleNamespace(lowered=None, slice=None),
    }
    states = [
        SimpleNamespace(key="input", columns={"l:7": (9,)}),
        SimpleNamespace(key="L0.post", columns={"l:8": (6, 5, 4)}),
        SimpleNamespace(key="L1.post", columns={"l:7": (3, 1)}),
        SimpleNamespace(key="L2.post", columns={"l:7": (3, 1)}),
        SimpleNamespace(key="output", columns={"l:7": (9,)}),
    ]
    return SimpleNamespace(
        source_nodes=lambda: nodes, realization=places.__getitem__, residual_states=lambda: states
    )


def at(layer: int, positions: str) -> Site:
    return Site("block_output", layer, positions)


def test_columns_keep_their_order_and_states_of_blocks_alone_count() -> None:
    assert columns_of(schematic(), {"a": "last"}) == {at(1, "last"): (3, 1), at(2, "last"): (3, 1)}


def test_a_slice_of_a_node_and_several_homes() -> None:
    assert columns_of(schematic(), {"b": "2"}) == {at(0, "2"): (5, 4)}
    both = columns_of(schematic(), {"a": "last", "c": "2"})
    assert list(both) == [at(0, "2"), at(1, "last"), at(2, "last")] and both[at(0, "2")] == (6, 5, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("z", r"0 nodes are called 'z'.*\['a', 'b', 'c', 'd', 'e'\]"),
        ("e", "2 nodes are called 'e'; needed is one"),
        ("d", "'d' is never in the residual stream"),
    ],
)
def test_nodes_that_tell_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns_of(schematic(), {name: "last"})


def test_what_holds_a_variable() -> None:
    model = torch.nn.Module()
    model.config = SimpleNamespace(hidden_size=8)  # type: ignore[assignment]
    compiled = Compiled(model, None, {"v": columns_of(schematic(), {"a": "last"})})
    assert compiled.holds("v", at(1, "last")) and not compiled.holds("v", at(0, "last"))
    assert not compiled.holds("v", at(1, "2"))
    found = compiled.alignment("v")
    assert found.site() == at(1, "last")
    assert found.subspace().basis().nonzero().tolist() == [[0, 3], [1, 1]]
    with pytest.raises(ValueError, match=r"Unknown variable 'w'; the program has \['v'\]"):
        compiled.holds("w", at(1, "last"))


def test_without_torchwright_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchwright"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchwright", None)
    with pytest.raises(ModuleNotFoundError, match=r"subspace-lab\[benchmarks\]"):
        load(tmp_path)


# --- programs -----------------------------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from compiled_programs import PROGRAMS

    return {program.name: program for program in PROGRAMS}


@needs_torchwright
@pytest.mark.parametrize("name", NAMES)
def test_the_columns_of_the_schematic_are_the_variable(
    name: str, programs: dict[str, Any], tmp_path: Path
) -> None:
    """The model answers right, and an exchange of these columns, of no others, exchanges the variable."""
    assert set(programs) == set(NAMES)
    program = programs[name]
    compiled = program.compiled(tmp_path / "model")
    pairs = program.pairs(compiled.tokenizer, train=8, dev=8, test=200)
    backbone, (site, subspace) = Backbone(compiled.model), compiled.alignment(name).variables[name]
    prepared = PreparedPairs.of(backbone, pairs.test, [{name: site}])
    outside = Axes(subspace.width, sorted(set(range(subspace.width)) - set(subspace.indices.tolist())))
    edits = [Alignment({name: (site, s)}).edits() for s in (subspace, outside)]
    (inside, rest) = (prepared.outcomes({name: site}, [edit])[0] for edit in edits)
    assert torch.equal(prepared.unedited.argmax(-1), pairs.test.base_answer)
    assert torch.equal(inside.logits.argmax(-1), pairs.test.answer)
    # All other columns of the source, z among them, do not bring its variable with them.
    assert (rest.logits.argmax(-1) == pairs.test.answer).float().mean() < 0.75
    # The answers change in some pairs and stay in others; no split has an input of another.
    assert 0.2 < (pairs.test.answer != pairs.test.base_answer).float().mean() < 0.9
    seen = [
        {
            tuple(row)
            for batch in (split.base, *split.sources.values())
            for row in batch.inputs["input_ids"].tolist()
        }
        for split in (pairs.train, pairs.dev, pairs.test)
    ]
    assert not (seen[0] & seen[2] or seen[1] & seen[2] or seen[0] & seen[1])


@needs_torchwright
def test_a_search_names_the_site_and_is_at_its_floor_where_the_variable_is_not(
    programs: dict[str, Any], tmp_path: Path
) -> None:
    program = programs["carry"]
    compiled = program.compiled(tmp_path / "model")
    config = TrainingConfig(steps=100, learning_rate=0.05, batch_size=32)
    fits = sweep(
        Backbone(compiled.model),
        program.pairs(compiled.tokenizer),
        program.sites(compiled.model.config.num_hidden_layers),
        [DAS(4)],
        config=config,
        quiet=True,
    )
    assert compiled.holds("carry", fits.best().site) and fits.best().iia.value > 0.95
    others = [fit for fit in fits if not compiled.holds("carry", fit.site)]
    floor = fits.floors["test"].highest
    assert len(others) == 2 and all(fit.iia.low <= floor for fit in others), others


@needs_torchwright
def test_a_folder_whose_homes_are_not_known_lists_its_nodes(programs: dict[str, Any], tmp_path: Path) -> None:
    program = programs["product sign"]
    program.compiled(tmp_path / "model")
    given = load(tmp_path / "model", {"sign": {"product sign": "3"}})
    assert given.truth["sign"] == load(tmp_path / "model").truth["product sign"]
    with pytest.raises(ValueError, match=r"needed is one. The named nodes are \[.*'product sign'"):
        load(tmp_path / "model", {"sign": {"no such node": "3"}})
    with pytest.raises(ValueError, match="does not say which nodes hold variables"):
        load(tmp_path / "model", {})
