"""Every fenced block of docs/training.md runs as it is printed, and each model learns.

What the page takes from its reader is that of the README (`test_readme.yours`), and `name`, a model to load. Blocks
that need torchao or bitsandbytes run where these are installed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_readme import ROOT, SHIPPED, answers, blocks, shorten_training, yours
from test_suggest import loss_of
from tiny_sweeps import swept, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from subspace_lab.cli import app
from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.reft import ReftConfig, finetune, get_reft_model

PAGE = "docs/training.md"
OPTIONAL = ("torchao", "bitsandbytes")
PYTHON = [(line, text) for language, line, text in blocks(PAGE) if language == "python"]


def ran(text: str, line: int, space: dict) -> None:
    exec(compile("\n" * (line - 1) + text, ROOT / PAGE, "exec"), space)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The reader's objects after all blocks that need nothing optional."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        shorten_training(patch)
        found = {**yours(), "name": SHIPPED}
        for line, text in PYTHON:
            if not any(one in text.lower() for one in OPTIONAL):
                ran(text, line, found)
        yield found


def test_python_blocks_run_from_top_to_bottom(space: dict[str, Any]) -> None:
    assert space["found"].best in [trial.config for trial in space["found"].trials]
    assert len(space["history"].held_out) >= 2 and space["trainer"].state.best_model_checkpoint
    assert {p.dtype for p in space["half"].parameters()} == {torch.bfloat16}
    assert any("lora" in name for name in space["both"].trained_base_parameters())


def unpacked(weight: Tensor) -> Any:
    """The numbers that a quantised weight stands for."""
    if not hasattr(weight, "quant_state"):
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("package", OPTIONAL)
def test_quantised_models_learn(package: str, space: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    line, text = next((line, text) for line, text in PYTHON if package in text.lower())
    shorten_training(monkeypatch)
    ran(text, line, space)
    model = space["eight" if package == "torchao" else "four"]
    space["reft"].unload()
    assert model.is_quantized
    again = get_reft_model(model, ReftConfig(layers=(1, 2), start="paper"))
    batch: dict[str, Any] = {k: torch.tensor(space["examples"][0][k])[None] for k in ("input_ids", "labels")}
    again(**batch).loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=model.dtype)
    for path, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            module.weight.data = unpacked(model.get_submodule(path).weight).to(model.dtype)
    oracle = get_reft_model(plain, ReftConfig(layers=(1, 2), start="paper"))
    oracle(**batch).loss.backward()
    one, other = (torch.cat([p.grad.flatten() for p in m.adapters.parameters()]).double() for m in (again, oracle))  # type: ignore[union-attr]
    assert torch.cosine_similarity(one, other, dim=0) > 0.999 and one.norm() > 1e-3
    before = loss_of(again, space["examples"])
    finetune(again, space["examples"], space["config"], quiet=True)
    assert loss_of(again, space["examples"]) < before


def test_a_base_that_gives_no_gradients_is_refused() -> None:
    """bitsandbytes' 4-bit layers on some CPUs, here by their attributes alone."""
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    layer = base.model.layers[0].mlp.down_proj
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu"):
        finetune(get_reft_model(base, ReftConfig(layers=(1,))), rows, quiet=True)
    model, batch = (
        get_reft_model(base, ReftConfig(layers=(1,))),
        {k: torch.tensor([v]) for k, v in rows[0].items()},
    )
    model.eval()(**batch)
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu"):  # as Trainer calls it
        model.train()(**batch)
    layer.support_avx512bf16_for_cpu = False
    assert finetune(get_reft_model(base, ReftConfig(layers=(1,))), rows, quiet=True)


def test_a_search_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny().model
    monkeypatch.setattr(model.transformer.h[2].mlp, "support_avx512bf16_for_cpu", True, raising=False)
    assert swept(RandomSubspace(2))
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu"):
        swept(DAS(2))


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers(tmp_path / "rows")
    lines = [line for language, _, text in blocks(PAGE) if language == "bash" for line in text.splitlines()]
    assert len(lines) == 1
    program, *words = shlex.split(lines[0])
    done = CliRunner().invoke(app, [*words, "--steps", "2", "--samples", "0"])
    assert program == "subspace-lab" and done.exit_code == 0, (done.output, done.exception)


def test_every_language_is_known() -> None:
    assert {language for language, _, _ in blocks(PAGE)} == {"python", "bash"}
