"""Positions that select nothing, and numbers that are none: refused, never counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sweeps import QUICK, SITES, WIDTH, counterfactuals, pairs, swept, tiny
from torch import Tensor
from transformers import GPT2LMHeadModel

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.checkpoints import load_edits, load_subspaces, save_edits, save_subspaces
from subspace_lab.core.interventions import (
    Intervention,
    direft,
    interchange,
    loreft,
    mean_ablation,
    noreft,
    set_to,
    steer,
)
from subspace_lab.core.positions import normalise
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    difference_of_means,
    pca,
    random_subspace,
)
from subspace_lab.das.methods import DAS, FullVector
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect, forward, generate

NAN, INF = float("nan"), float("inf")


# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["f0", "l0", "f0+l0", "f0(l2)", "5:2", "2:2", ":0", "-2:-4", "-3:-3", "0:0+5:2"])
def test_positions_that_select_nothing_in_any_prompt(text: str) -> None:
    with pytest.raises(ValueError, match="select nothing in any prompt"):
        normalise(text)


@pytest.mark.parametrize("text", ["f0+l2", "f2(l0)", "-2:5", "2:-2", "5:2+last", ":"])
def test_positions_that_select_something(text: str) -> None:
    assert normalise(text) == text


def test_slices_outside_every_row() -> None:
    lab, base = tiny(), counterfactuals(0).base
    site = Site("block_output", 0, "99:")
    said = r"'99:' select nothing in any of the 60 rows, whose prompts have 7 to 7 tokens"
    for run in (
        lambda: collect(lab, base, [site]),
        lambda: forward(lab, base, {site: lambda h: h}),
        lambda: generate(lab, base, {site: lambda h: h}, max_new_tokens=1),
        lambda: PlainEngine(lab, base, Readout.at(base)).logits(torch.arange(2), {site: lambda h: h}),
        lambda: FrozenPast(lab, base, [site], Readout.at(base)),
        lambda: Readout.at(base, "99:"),
        lambda: swept(DAS(1), [site]),
    ):
        with pytest.raises(IndexError, match=said):
            run()
    # Of a term that a short prompt has no place for nothing is edited, as it says.
    short = base.rows(torch.arange(3))
    plain = forward(lab, short, {}).logits
    edited = forward(lab, short, {Site("block_output", 0, "f5[4](l5)"): lambda h: h + 1}).logits
    assert torch.equal(plain, edited)


# --- edits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_constructors_refuse_what_is_no_number(wrong: float) -> None:
    basis = torch.eye(8)[:2].clone()
    basis[0, 0] = wrong
    subspace = random_subspace(8, 2, 0)
    for make in (
        lambda: FixedSubspace(basis),
        lambda: LearnedSubspace(8, 2, start=basis),
        lambda: LearnedSubspace(8, 2, seed=0).set_basis(basis),
        lambda: FreeDirections(8, 2, start=basis),
        lambda: FreeDirections(8, 2, seed=0).set_basis(basis),
        lambda: steer(subspace, wrong),
        lambda: set_to(subspace, torch.tensor([1.0, wrong])),
        lambda: mean_ablation(subspace, torch.full((3, 8), NAN)),
    ):
        with pytest.raises(ValueError, match="are NaN or infinite"):
            make()
    states = torch.randn(9, 8)
    states[4, 2] = wrong
    for make in (lambda: pca(states, 2), lambda: difference_of_means(states, torch.arange(9) % 2)):
        with pytest.raises(ValueError, match="1 of 9 states hold NaN or infinite"):
            make()


def test_directions_of_length_0() -> None:
    basis = torch.eye(8)[:2].clone()
    basis[1] = 0
    for make in (
        lambda: FreeDirections(8, 2, start=basis),
        lambda: FreeDirections(8, 2, seed=0).set_basis(basis),
        lambda: LearnedSubspace(8, 2, seed=0).set_basis(basis),
    ):
        with pytest.raises(ValueError, match="a vector that is all zero, which spans nothing"):
            make()


KINDS = {
    "LoReFT": lambda: loreft(8, 2, seed=0),
    "NoReFT": lambda: noreft(8, 2, seed=0),
    "DiReFT": lambda: direft(8, 2, seed=0),
    "interchange": lambda: interchange(LearnedSubspace(8, 2, seed=0)),
    "parts": lambda: interchange(LearnedSubspace(8, 4, seed=0).partition({"a": 2, "b": 2})),
    "fixed": lambda: interchange(random_subspace(8, 2, 0)),
    "constant": lambda: set_to(random_subspace(8, 2, 0), 1.0),
}
BASES = ("raw", "directions", "vectors")


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, dict[str, torch.Tensor]]:
    """{what is said: the tensors, one of them broken} for each tensor."""
    found = {}
    for name, t in tensors.items():
        if not t.is_floating_point():
            continue
        if how in ("nan", "inf"):
            new = t.clone()
            new.view(-1)[0] = NAN if how == "nan" else INF
        elif how == "whole":
            new = t.round().long()
        elif name.rpartition(".")[2] in BASES:
            new = torch.zeros_like(t)
        else:
            continue
        found[name] = {**tensors, name: new}
    return found


@pytest.mark.parametrize("how", ["nan", "inf", "whole", "zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_and_states_with_broken_numbers(kind: str, how: str, tmp_path: Path) -> None:
    edit, site, path = KINDS[kind](), Site("block_output", 0), tmp_path / "edits.safetensors"
    for tensors in broken(edit.state_dict(), how).values():
        with pytest.raises(ValueError, match=r"NaN or infinite|needed are floating|all zero|not orthonormal"):
            KINDS[kind]().load_state_dict(tensors)
    save_edits(path, {site: edit})
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for tensors in broken(load_file(path), how).values():
        save_file(tensors, path, metadata)
        with pytest.raises(
            ValueError, match=r"edits.safetensors.*(NaN or inf|floating|all zero|not orthonormal|Type-check)"
        ):
            load_edits(path)


@pytest.mark.parametrize("how", ["nan", "whole", "zero"])
def test_other_files(how: str, tmp_path: Path) -> None:
    subspace = random_subspace(8, 2, 0)
    save_subspaces(tmp_path / "s.safetensors", {"v": subspace})
    for tensors in broken(load_file(tmp_path / "s.safetensors"), "whole" if how == "whole" else "nan").values():
        save_file(tensors, tmp_path / "s.safetensors")
        with pytest.raises(ValueError, match=r"NaN or infinite|needed are floating|Type-check"):
            load_subspaces(tmp_path / "s.safetensors")
    alignment = Alignment({"v": (Site("block_output", 0), subspace)})
    path = file = tmp_path / "found.safetensors"
    alignment.save(path)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for tensors in broken(load_file(file), how).values():
        save_file(tensors, file, metadata)
        with pytest.raises(ValueError, match=r"NaN or infinite|needed are floating|not orthonormal|Type-check"):
            Alignment.load(path)


# --- logits -------------------------------------------------------------------------------------------------


class Explodes(Intervention):
    """Writes a number into some rows that the model cannot carry."""

    def forward(self, h: Tensor, source: Any = None) -> Tensor:
        out = super().forward(h, source).clone()
        out[::2] = NAN
        return out


class Exploding(Method):
    def learner(self, problem: Problem) -> Learner:
        learner: Any = Learner({"v": (problem.sites["v"], Axes(problem.width("v")))})
        learner.edits = {problem.sites["v"]: Explodes(Axes(WIDTH), learner.edits[problem.sites["v"]].value)}
        return learner


def test_nan_logits_are_no_answers() -> None:
    fits = swept([Exploding(), FullVector()], SITES[:1])
    assert [fit.method.label for fit in fits] == ["FullVector"]
    (failure,) = fits.failures
    assert failure.method == "Exploding" and "The logits are NaN for 30 of 60 dev pairs" in failure.reason
    alone = swept(FullVector(), SITES[:1])
    assert fits[0].scores == alone[0].scores


def test_a_model_that_gives_nan() -> None:
    config: Any = tiny().model.config
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight[5] = NAN
    options: dict[str, Any] = {"config": QUICK, "min_accuracy": None, "quiet": True}
    with pytest.raises(ValueError, match="The model gives NaN instead of logits for 60 of 60 bases"):
        sweep(Backbone(model), pairs(), SITES[:1], [DAS(1)], **options)
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[5] = NAN
    with pytest.raises(
        ValueError, match=r"block_output\[0\]@2: the model's states are NaN in 60 of 60 rows, row 0"
    ):
        sweep(Backbone(model), pairs(), SITES[:1], [DAS(1)], **options)
