"""Adapters that version 0.1 saved: they load to the bit and do the same."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from families import fresh, inputs
from safetensors.torch import load_file

from subspace_lab.reft import ReftModel

OLD = Path(__file__).parent / "fixtures" / "version_0_1"
ADAPTERS = runpy.run_path(str(OLD / "make.py"))["ADAPTERS"]
# The names that a number has in a file of 0.1 and here.
RENAMED = {"rows": "vectors"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_version_0_1_load_to_the_bit_and_do_the_same(name: str) -> None:
    model = ReftModel.from_pretrained(fresh("llama"), OLD / f"adapter_{name}")
    state = {k.removeprefix("adapters.default."): v for k, v in model.state_dict().items() if k != "_extra_state"}
    saved = load_file(OLD / f"adapter_{name}" / "adapter_model.safetensors")
    expected = {".".join(RENAMED.get(part, part) for part in key.split(".")): v for key, v in saved.items()}
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    with torch.no_grad():
        logits = model(**inputs("llama", lengths=(11, 5, 9))).logits[:, -1]
        base = fresh("llama")(**inputs("llama", lengths=(11, 5, 9))).logits[:, -1]
    torch.testing.assert_close(logits, load_file(OLD / "logits.safetensors")[name], atol=1e-5, rtol=1e-5)
    assert (logits - base).abs().max() > 1e-2


def test_parts_of_version_0_1_go_on_with_the_part_that_trained_last() -> None:
    model = ReftModel.from_pretrained(fresh("llama"), OLD / "adapter_parts", is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".b" in name for name in trained)
