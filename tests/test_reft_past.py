"""LoReFT over the frozen past under plain Trainer: the same training, without the layers below the edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.data import pad
from subspace_lab.reft.model import ReftModel, get_reft_model

LAYER = 2


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows(n: int = 12) -> Dataset:
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        prompt, answer = 4 + i % 3, 2 + i % 4
        ids = torch.randint(3, 60, (prompt + answer,), generator=g).tolist()
        made.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * prompt + ids[prompt:],
            }
        )
    return Dataset.from_list(made)


def reft(**changes: Any) -> ReftModel:
    config = ReftConfig(**{"rank": 2, "layers": (LAYER,), "positions": "f1+l2", "seed": 3, **changes})
    return get_reft_model(base(), config)


def trained(model: ReftModel, data: Dataset, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "seed": 5,
            "disable_tqdm": True,
            **changes,
        },
    )
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=lambda r: pad(r, 0)).train()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_learns_the_same_from_a_kept_past(tmp_path: Path, accumulated: int) -> None:
    plain = trained(reft(), rows(), tmp_path / "plain", gradient_accumulation_steps=accumulated)
    model: Any = reft()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[int] = []
    handles = [
        block.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.base_model.model.layers)
    ]
    data = model.keep_past(rows())
    assert data.column_names[-1] == "row"
    calls.clear()
    kept = trained(model, data, tmp_path / "kept", gradient_accumulation_steps=accumulated)
    assert set(calls) == {LAYER + 1}  # the blocks up to the edit never run again
    for handle in handles:
        handle.remove()
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-5)
    assert any((kept[name] - start[name]).abs().max() > 1e-3 for name in start)


def test_loss_and_gradient_of_rows_are_those_of_the_whole_batch() -> None:
    model = reft()
    p: Any
    for p in model.edits().values():
        nn.init.normal_(p.value.weight, std=0.2)
    data = rows()
    batch = pad(list(data)[3:7], 0)
    expected = model(**batch, num_items_in_batch=7)
    expected.loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.keep_past(data)
    got = model(row=torch.arange(3, 7), num_items_in_batch=torch.tensor(7))
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    assert len(gradient) == 3
    for name, p in model.named_parameters():
        if name in gradient:
            torch.testing.assert_close(p.grad, gradient[name], rtol=1e-4, atol=1e-7)


def test_the_base_model_rests_while_a_past_is_kept() -> None:
    model = reft()
    model.keep_past(rows())
    model.train()
    assert not model.base_model.training and model.adapters["default"].training
    model.forget_past()
    model.train()
    assert model.base_model.training
    with pytest.raises(ValueError, match="was not called on this model"):
        model(row=torch.tensor([0]))


def test_what_is_not_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="modules_to_save"):
        reft(modules_to_save=("lm_head",)).keep_past(rows())
    model: Any = reft()
    with model.disable_adapter(), pytest.raises(ValueError, match="active adapters"):
        model.keep_past(rows())
    model.keep_past(rows())
    with torch.no_grad():
        model.base_model.model.norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed after its past was computed"):
        model(row=torch.tensor([0]))
