"""Adapters at single heads: `ReftConfig(component="head_output", heads={layer: heads})`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import fresh
from test_reft_trainer import answers
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model, suggest

HEADS = {2: [1], 0: [3, 0]}
WIDTH = 8  # of a head of the tests' Llama: 32 in 4 heads
OPTIONS: dict[str, Any] = {
    "component": "head_output",
    "positions": "all",
    "every_token": True,
    "rank": 2,
    "bias": False,
}


def trained(**options: Any) -> ReftModel:
    model = get_reft_model(fresh("llama"), ReftConfig(**{**OPTIONS, "heads": HEADS, **options}))
    finetune(model, answers(8), TrainingConfig(steps=3, batch_size=4, learning_rate=0.1), quiet=True)
    return model


def logits(model: ReftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_only_these_heads_change() -> None:
    model: Any = trained()
    assert list(model.edits()) == [Site("head_output", 2, heads=[1]), Site("head_output", 0, heads=[3, 0])]
    assert [edit.subspace.width for edit in model.edits().values()] == [WIDTH, 2 * WIDTH]
    out: list[torch.Tensor] = []
    module = model.base_model.model.layers[0].self_attn.o_proj
    hook = module.register_forward_hook(lambda _, __, output: out.append(output))
    logits(model)
    with model.disable_adapter():
        logits(model)
    hook.remove()
    # Layer 0 has the same input in both runs. What its output projection adds comes from the edited heads alone.
    change = torch.linalg.solve(module.weight, (out[0] - out[1])[0].T).T
    moved = change.unflatten(-1, (4, WIDTH)).abs().amax((0, 2))
    assert moved[[1, 2]].max() < 1e-2 * moved[[0, 3]].min()  # not 0: the outputs are rounded


def test_heads_are_saved_and_merged(tmp_path: Path) -> None:
    model: Any = trained()
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(fresh("llama"), tmp_path)
    assert "heads {2: (1,), 0: (3, 0)}" in (tmp_path / "README.md").read_text()
    assert again.adapter("default").config == model.adapter("default").config
    found = logits(model)
    assert torch.equal(logits(again), found)
    assert (found - logits(fresh("llama"))).abs().max() > 1e-3
    assert torch.allclose(logits(model.merge_and_unload()), found, atol=1e-5)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"heads": {1: [4]}}, ValueError, "4"),
        ({"heads": {7: [0]}}, IndexError, "layers 0 to 2"),
        ({"heads": {0: [0], -3: [1]}}, ValueError, "twice"),
        ({"heads": {1: [0]}, "rank": 9}, ValueError, "width 8"),
        ({"heads": {1: [0, 0]}}, ValueError, "distinct"),
        ({"heads": {1: []}}, ValueError, "distinct"),
        ({"heads": {1: [-1]}}, ValueError, "from 0"),
        ({"heads": {1: [0]}, "layers": (2,)}, ValueError, "leave out layers"),
        ({"heads": {1: [0]}, "component": "mlp_output"}, ValueError, "has no heads"),
        ({"heads": [(1, [0]), (1, [1])]}, ValueError, "distinct integers"),
    ],
)
def test_other_heads_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        get_reft_model(fresh("llama"), ReftConfig(**{**OPTIONS, **options}))


def test_a_suggestion_tells_them_apart() -> None:
    settings = [ReftConfig(**OPTIONS, heads={1: [head]}) for head in (0, 3)]
    config = TrainingConfig(steps=1, batch_size=4)
    found = suggest(fresh("llama"), answers(8), settings=settings, training=config, quiet=True)
    assert {"layer 1 heads 0" in str(t) for t in found.trials} == {True, False}
    assert {"layer 1 heads 3" in str(t) for t in found.trials} == {True, False}


def test_the_same_layers_may_be_named() -> None:
    assert ReftConfig(**OPTIONS, heads=HEADS, layers=(2, 0)) == ReftConfig(**OPTIONS, heads=HEADS)
