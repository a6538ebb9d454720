"""From an alignment to an adapter and back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import build, fresh, inputs
from test_reft_composition import QUICK, answering, logits
from torch import Tensor

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, Subspace, random_subspace
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model

SITE = Site("block_output", 1, "last")
FACTS = {"method": "DAS", "scores": {"iia": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 100}}}


def one_variable(rank: int = 3) -> Alignment:
    return Alignment({"gender": (SITE, random_subspace(32, rank, 5))}, FACTS)


def two_variables() -> Alignment:
    """At one site, orthogonal to each other."""
    whole = random_subspace(32, 5, 6).basis()
    return Alignment(
        {"gender": (SITE, FixedSubspace(whole[:2])), "number": (SITE, FixedSubspace(whole[2:]))}, FACTS
    )


def overlap(one: Subspace, other: Subspace) -> float:
    return float((one.basis() @ other.basis().T).square().sum() / one.rank)


@pytest.mark.parametrize("method", ["LoReFT", "ConsReFT", "LobiReFT"])
@pytest.mark.parametrize("basis", ["learned", "fixed"])
def test_there_and_back(basis: Literal["learned", "fixed"], method: str, tmp_path: Path) -> None:
    found = one_variable()
    model = get_reft_model(fresh("llama"), found, config=ReftConfig(method, basis=basis))
    config = model.adapter("default").config
    assert (config.method, config.layers, config.positions, config.rank) == (method, (1,), "last", 3)
    torch.testing.assert_close(model.subspace(SITE).basis(), found.subspace().basis(), atol=1e-6, rtol=0)
    if method != "ConsReFT":  # which starts by setting the coordinates to 0
        torch.testing.assert_close(logits(model), logits_of_base(), atol=1e-5, rtol=1e-5)
    losses = finetune(model, answering(7), QUICK, quiet=True)
    assert losses[-1] < (0.8 if method == "LoReFT" else 0.95) * losses[0]
    back = model.alignment()
    assert list(back.variables) == ["gender"] and back.site() == SITE
    assert torch.equal(back.subspace().basis(), model.subspace(SITE).basis())
    assert (overlap(back.subspace(), found.subspace()) > 0.9999) == (basis == "fixed")
    assert back.facts["method"] == method and back.facts["start"]["default"] == FACTS
    assert back.facts["adapters"]["default"]["basis"] == basis and back.facts["base"]["hidden_size"] == 32
    # The way through files keeps the names and where it came from.
    model.save_pretrained(tmp_path / "adapter")
    again = ReftModel.from_pretrained(fresh("llama"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    again.alignment().save(tmp_path / "found")
    loaded = Alignment.load(tmp_path / "found")
    assert list(loaded.variables) == ["gender"] and loaded.facts["start"]["default"] == FACTS
    assert torch.equal(loaded.subspace().basis(), back.subspace().basis())
    # And what comes back is an alignment like any other: it can be swapped.
    swap = loaded.edits(interchange)[SITE]
    h, source = torch.randn(2, 4, 32)
    torch.testing.assert_close(loaded.subspace().read(swap(h, source)), loaded.subspace().read(source))


def logits_of_base() -> Tensor:
    model = get_reft_model(fresh("llama"), ReftConfig(rank=1))
    with model.disable_adapter():
        return logits(model)


@pytest.mark.parametrize("basis", ["learned", "fixed"])
def test_several_variables_at_one_site_become_parts(basis: Literal["learned", "fixed"], tmp_path: Path) -> None:
    found = two_variables()
    model = get_reft_model(fresh("llama"), found, config=ReftConfig(basis=basis))
    assert model.adapter("default").config.sizes == {"gender": 2, "number": 3}
    for name in ("gender", "number"):
        back: Any = model.alignment().subspace(name)
        torch.testing.assert_close(back.basis(), found.subspace(name).basis(), atol=1e-6, rtol=0)
    model.train_parts("number")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (
        trained and all(".number" in name for name in trained) and len(trained) == (3 if basis == "learned" else 2)
    )
    before = logits(model)
    finetune(model, answering(7), QUICK, quiet=True)
    assert not torch.equal(logits(model), before)
    assert list(model.alignment().variables) == ["number"]  # the part that is in use
    assert model.subspace(SITE).rank == 3
    model.use_parts(["gender", "number"])
    back = model.alignment()
    gender, number = back.subspace("gender").basis(), back.subspace("number").basis()
    torch.testing.assert_close(gender, found.subspace("gender").basis(), atol=1e-6, rtol=0)
    assert (overlap(back.subspace("number"), found.subspace("number")) > 0.9999) == (basis == "fixed")
    torch.testing.assert_close(gender @ number.T, torch.zeros(2, 3), atol=1e-5, rtol=0)
    back.edits()  # orthogonal, so both can be swapped at once
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(fresh("llama"), tmp_path)
    again.use_parts(["gender", "number"])
    assert torch.equal(logits(again), logits(model))


def test_several_layers_each_with_its_variable() -> None:
    low, high = random_subspace(32, 2, 1), random_subspace(32, 2, 2)
    found = Alignment({"late": (Site("mlp_output", -1, "f2"), high), "early": (Site("mlp_output", 0, "f2"), low)})
    model = get_reft_model(build("llama"), found)
    assert model.adapter("default").sites == [Site("mlp_output", 2, "f2"), Site("mlp_output", 0, "f2")]
    back = model.alignment()
    assert back.site("late") == Site("mlp_output", 2, "f2") and back.site("early") == Site("mlp_output", 0, "f2")
    torch.testing.assert_close(back.subspace("late").basis(), high.basis(), atol=1e-6, rtol=0)
    torch.testing.assert_close(back.subspace("early").basis(), low.basis(), atol=1e-6, rtol=0)


def test_an_alignment_of_adapters_that_started_at_random() -> None:
    model = get_reft_model(build("llama"), ReftConfig("DiReFT", rank=2, positions="f1+l1", tied="group"))
    with torch.no_grad():
        edit: Any
        for edit in model.edits().values():
            edit.subspace.directions.mul_(3).add_(0.1)
    back = model.alignment()
    assert list(back.variables) == [str(site) for site in model.edits()] and back.facts["start"] == "random"
    for site, edit in model.edits().items():  # the span of directions that are no longer orthonormal
        basis, directions = back.subspace(str(site)).basis(), edit.subspace.directions.detach()
        torch.testing.assert_close(directions @ basis.T @ basis, directions, atol=1e-5, rtol=1e-5)
    parts = get_reft_model(
        build("llama"), ReftConfig(rank=3, layers=(0, 1), positions="last", parts={"a": 1, "b": 2})
    )
    assert "block_output[1]@last/b" in parts.alignment().variables
    model.add_adapter("second", one_variable(), config=ReftConfig(basis="fixed"))
    model.set_adapter("second")
    assert torch.equal(model.alignment().subspace("gender").basis(), one_variable().subspace().basis())
    with model.disable_adapter(), pytest.raises(ValueError, match="No adapter is active"):
        model.alignment()


def test_two_adapters_with_a_variable_of_one_name() -> None:
    model = get_reft_model(build("llama"), one_variable())
    other = Alignment({"gender": (Site("block_output", 2, "last"), random_subspace(32, 1, 0))})
    model.add_adapter("other", other)
    model.set_adapter(["default", "other"])
    assert list(model.alignment().variables) == ["default/gender", "other/gender"]


ONE = random_subspace(32, 3, 5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"a": (SITE, ONE), "b": (Site("block_output", 2, "first"), ONE)}, "No single adapter can have"),
        ({"a": (SITE, ONE), "b": (Site("mlp_output", 2, "last"), ONE)}, "one component, one set of positions"),
        ({"a": (SITE, ONE), "b": (Site("block_output", 2, "last"), random_subspace(32, 2, 5))}, "rank 2"),
        ({"a": (Site("model.norm.output"), ONE)}, "No single adapter can have"),
        ({"a": (Site("head_output", 1, "last", heads=0), random_subspace(8, 3, 5))}, "no single heads"),
        (
            {
                "a": (SITE, Axes(32, [0])),
                "b": (SITE, Axes(32, [1])),
                "c": (Site("block_output", 2, "last"), Axes(32, [0])),
                "d": (Site("block_output", 2, "last"), Axes(32, [1])),
            },
            "several variables at one site only",
        ),
        ({"a": (SITE, ONE), "b": (SITE, random_subspace(32, 3, 6))}, "'a' and 'b' are not orthogonal"),
        ({"a": (SITE, random_subspace(16, 3, 5))}, r"block_output\[1\]@last has width 32; .* found in width 16"),
        ({"not a name": (SITE, Axes(32, [0])), "b": (SITE, Axes(32, [1]))}, "names must be distinct identifiers"),
    ],
)
def test_alignments_that_no_one_adapter_can_have_are_refused(variables: dict[str, Any], message: str) -> None:
    base = fresh("llama")
    with pytest.raises(ValueError, match=message):
        get_reft_model(base, Alignment(variables))
    assert all(p.requires_grad for p in base.parameters())


def test_methods_without_an_orthonormal_basis_are_refused() -> None:
    for method in ("NoReFT", "DiReFT", "RED"):
        with pytest.raises(ValueError, match=f"{method} has no orthonormal basis that could start in"):
            get_reft_model(build("llama"), one_variable(), config=ReftConfig(method))


WRONG = """
import numpy as np, torch
from torch import nn
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, LearnedSubspace, FreeDirections, random_subspace
from subspace_lab.core.interventions import loreft, interchange, Intervention
from subspace_lab.core.checkpoints import save_edits, save_subspaces
from subspace_lab.reft import ReftConfig, get_reft_model

SITE = Site("block_output", 1, "last")
found = Alignment({"v": (SITE, Axes(4))})
model = nn.Linear(2, 2)
edit = loreft(8, np.int64(2), seed=np.int64(0))
CASES = [
    (lambda: ReftConfig(rank=2.0), "rank=2.0: a whole number is needed, found float."),
    (lambda: ReftConfig(rank=True), "rank=True: a whole number is needed, found bool"),
    (lambda: ReftConfig(rank="4"), "rank='4': a whole number is needed, found str"),
    (lambda: ReftConfig(layers="3"), "layers='3'; possible are 'all' or distinct integers"),
    (lambda: ReftConfig(layers=3), "layers=3; possible are 'all' or distinct integers"),
    (lambda: ReftConfig(layers=(1.0,)), "layers=(1.0,); possible"),
    (lambda: ReftConfig(layers=(True,)), "layers=(True,); possible"),
    (lambda: ReftConfig(seed=1.5), "seed=1.5: a whole number is needed, found float"),
    (lambda: ReftConfig(dropout="0.1"), "dropout='0.1'; possible is 0 ≤ p < 1"),
    (lambda: ReftConfig(positions=None), "positions=None"),
    (lambda: ReftConfig(component=None), "component=None; possible are"),
    (lambda: ReftConfig(method=None), "method=None; possible are"),
    (lambda: ReftConfig(parts={"a": 1.0, "b": 3}), "the size of part 'a'=1.0: a whole number is needed, found float"),
    (lambda: get_reft_model(model, {"rank": 2}), "config_or_alignment is of type dict; needed is ReftConfig or A"),
    (lambda: get_reft_model(model, found, config={"rank": 2}), "config is of type dict; needed is ReftConfig"),
    (lambda: get_reft_model(model, ReftConfig(), config=ReftConfig()), "Two configurations: config= is only for an"),
    (lambda: get_reft_model("gpt2", ReftConfig()), "model is of type str; needed is Module: the base"),
    (lambda: LearnedSubspace(8, 2.0), "rank=2.0: a whole number is needed, found float."),
    (lambda: LearnedSubspace(8.0, 2), "width=8.0: a whole number is needed, found float"),
    (lambda: FreeDirections(8, True), "rank=True: a whole number is needed, found bool"),
    (lambda: random_subspace(8, 2, 0.5), "seed=0.5: a whole number is needed, found float"),
    (lambda: loreft(8, 2.5), "rank=2.5: a whole number is needed, found float"),
    (lambda: loreft("8", 2), "width='8': a whole number is needed, found str"),
    (lambda: FixedSubspace([[1.0, 0.0]]), "The basis is of type list; needed is Tensor"),
    (lambda: Axes(4, [0.5]), "an index=0.5: a whole number is needed, found float"),
    (lambda: Axes(4, 2), "indices=2 is of type int; needed are whole numbers"),
    (lambda: random_subspace(8, 4, 0).partition({"a": 2.0}), "the size of part 'a'=2.0: a whole number"),
    (lambda: random_subspace(8, 4, 0).partition([2, 2]), "sizes is of type list; needed is Mapping"),
    (lambda: interchange("gender"), "The subspace is of type str; needed is Subspace"),
    (lambda: Intervention(Axes(4), torch.ones(4)), "The value is of type Tensor; needed is Value."),
    (lambda: Site("block_output", "3"), "layer='3': a whole number is needed, found str."),
    (lambda: Site("block_output", 3.0), "layer=3.0: a whole number is needed, found float"),
    (lambda: Site("block_output", True), "layer=True: a whole number is needed, found bool"),
    (lambda: Site(3, 1), "component=3 is of type int; needed is"),
    (lambda: Site("block_output", 3, 1.5), "positions=1.5"),
    (lambda: Site("head_output", 3, "last", heads="0"), "heads='0'"),
    (lambda: Site("head_output", 3, "last", heads=[0.5]), "0.5"),
    (lambda: Site.parse(3), "3 is of type int"),
    (lambda: save_edits("never", SITE), "edits is of type Site; needed is a mapping {site: …}."),
    (lambda: save_edits("never", {"block_output[1]@last": edit}), "edits has a key 'block_output[1]@last' that"),
    (lambda: save_edits("never", {SITE: Axes(4)}), "edits[block_output[1]@last] is of type Axes; needed is In"),
    (lambda: save_subspaces("never", {"v": torch.eye(4)}), "The subspace of 'v' is of type Tensor; needed is S"),
    (lambda: edit(np.ones((2, 8))), "h is of type ndarray; needed is Tensor"),
    (lambda: edit([[1.0] * 8]), "h is of type list; needed is Tensor"),
]
failed = []
for i, (call, wanted) in enumerate(CASES):
    try:
        call()
    except (TypeError, ValueError) as error:
        if wanted not in str(error) or len(str(error)) > 500:
            failed.append((i, wanted, repr(error)))
    else:
        failed.append((i, wanted, "nothing raised"))
assert not failed, "\\n".join(map(str, failed))
# What is fine: numpy's integers, and they are saved as plain ones.
made = LearnedSubspace(np.int64(8), np.int64(2), seed=np.int64(1))
assert type(made.width) is int and type(made.rank) is int
assert str(Site("block_output", np.int64(3), np.int64(-1))) == "block_output[3]@-1"
assert ReftConfig(rank=np.int64(3), layers=np.arange(2), seed=np.int64(1)).as_dict()["layers"] == (0, 1)
import json; json.dumps(ReftConfig(rank=np.int64(3), layers=np.arange(2), seed=np.int64(1)).as_dict())
"""


def test_wrong_types_get_a_sentence(tmp_path: Path) -> None:
    program = [sys.executable, "-c", WRONG.replace("\\\\n", "\\n")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_an_adapter_file_names_what_it_started_from_only_where_there_is_something(tmp_path: Path) -> None:
    get_reft_model(build("llama"), ReftConfig(rank=1)).save_pretrained(tmp_path / "random")
    assert "alignment" not in json.loads((tmp_path / "random/adapter_config.json").read_text())
    get_reft_model(build("llama"), one_variable()).save_pretrained(tmp_path / "found")
    written = json.loads((tmp_path / "found/adapter_config.json").read_text())["alignment"]
    assert written == {"variables": {str(SITE): "gender"}, "facts": FACTS}
    assert torch.equal(
        logits(ReftModel.from_pretrained(build("llama"), tmp_path / "found")),
        logits(get_reft_model(build("llama"), one_variable())),
    )
    assert inputs("llama")["input_ids"].shape[0] == 3
