"""What each edit of an adapter does, against losses of the model's own forward with the edits as hooks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_sweeps import tiny
from torch import Tensor, nn

from subspace_lab.analysis.edit_effects import edit_effects
from subspace_lab.core.sites import Site
from subspace_lab.reft import ReftConfig, get_reft_model
from subspace_lab.reft.model import ReftModel

LAYERS = (0, 2)


def adapted() -> ReftModel:
    """Edits that change something, at the last token of the prompt."""
    model = get_reft_model(
        deepcopy(tiny().model), ReftConfig(layers=list(LAYERS), positions="last", rank=2, seed=1)
    )
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5 * torch.randn(p.shape, generator=g))
    return model


def rows(n: int = 5) -> list[dict[str, list[int]]]:
    """Prompts of three to five tokens and answers of one or two."""
    g = torch.Generator().manual_seed(4)
    found = []
    for i in range(n):
        prompt, answer = 3 + i % 3, 1 + i % 2
        ids = torch.randint(1, 50, (prompt + answer,), generator=g).tolist()
        labels = [-100] * prompt + ids[prompt:]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def losses(model: ReftModel, which: set[int]) -> Tensor:
    """(rows,) by hooks on the model's own blocks, a row at a time."""
    plain: Any = tiny().model
    found = []
    for row in rows():
        prompt = row["labels"].count(-100)

        def put(edit: nn.Module, at: int = prompt - 1) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                stream = (output if isinstance(output, Tensor) else output[0]).clone()
                stream[:, at] = edit(stream[:, at])
                return stream if isinstance(output, Tensor) else (stream, *output[1:])

            return hook

        edits = {site.layer: edit for site, edit in model.edits().items()}
        handles = [plain.transformer.h[i].register_forward_hook(put(edits[i])) for i in which]
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = plain(ids).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        answer = range(prompt, len(row["input_ids"]))
        found.append(-torch.stack([log_p[j - 1, ids[0, j]] for j in answer]).mean())
    return torch.stack(found)


def test_effects_are_differences_of_losses_by_hooks() -> None:
    model = adapted()
    effects = edit_effects(model, rows())
    assert [one.site for one in effects] == [Site("block_output", i, "last") for i in LAYERS]
    base, whole = losses(model, set()), losses(model, set(LAYERS))
    for one, layer in zip(effects, LAYERS, strict=True):
        alone, without = losses(model, {layer}), losses(model, set(LAYERS) - {layer})
        assert one.alone.value == pytest.approx(float((base - alone).mean()), abs=1e-5)
        assert one.lost.value == pytest.approx(float((without - whole).mean()), abs=1e-5)
        assert one.together.value == pytest.approx(float((base - whole).mean()), abs=1e-5)
        assert one.alone.n == 5 and one.alone.low <= one.alone.value <= one.alone.high
        assert abs(one.alone.value) > 1e-3


def test_an_edit_that_changes_nothing_does_nothing_and_the_mode_stays() -> None:
    model = get_reft_model(deepcopy(tiny().model), ReftConfig(layers=[1], positions="last", rank=2)).train()
    (one,) = edit_effects(model, rows())
    assert one.alone.value == one.lost.value == one.together.value == 0 and model.training


def test_what_has_no_effect_to_measure_is_refused() -> None:
    model = adapted()
    with pytest.raises(TypeError, match="ReftModel"):
        edit_effects(tiny().model, rows())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 edits and 1 rows"):
        edit_effects(model, rows(1))
    empty = {**rows()[0], "labels": [-100] * 4}
    with pytest.raises(ValueError, match="A row has no answer"):
        edit_effects(model, [rows()[0], empty])
    with model.disable_adapter(), pytest.raises(ValueError, match="0 edits"):
        edit_effects(model, rows())
