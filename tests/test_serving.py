"""Every fenced block of docs/serving.md runs as it is printed, and its recipes give the same tokens.

What the page takes from its reader is that of the README (`test_readme.yours`). Where lm-evaluation-harness is not
installed, a stand-in with its names makes the harness's calls.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_readme import ROOT, answers, blocks, shorten_training, yours
from test_reft_scoring import Harness
from torch import nn
from typer.testing import CliRunner

from subspace_lab.cli import app
from subspace_lab.reft.harness import _Scores

PAGE = "docs/serving.md"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's names, as far as the page uses them, with one request to score."""
    if "lm_eval" in sys.modules or importlib.util.find_spec("lm_eval") is not None:
        return
    top, models, hugging = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))

    def made(pretrained: Any, tokenizer: Any) -> Harness:
        return Harness(pretrained)

    def evaluated(model: Any, tasks: Any) -> list[Any]:
        assert isinstance(model._loglikelihood_tokens, _Scores) and tasks
        return model._loglikelihood_tokens([(("", ""), [5, 6, 7], [8, 9])])

    hugging.HFLM, top.simple_evaluate = made, evaluated  # type: ignore[attr-defined]
    for module in (top, models, hugging):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_python_blocks_run_from_top_to_bottom_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'subspace-lab[gguf]'")
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    shorten_training(monkeypatch)
    space = yours()
    space["model"].generation_config.eos_token_id = None  # generations have the length that was asked for
    ran = 0
    for language, line, text in blocks(PAGE):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, ROOT / PAGE, "exec"), space)
            ran += 1
            if 'positions="f3+l3"' in text:  # three steps alone do not show in what is generated
                for parameter in space["reft"].adapters.parameters():
                    nn.init.normal_(parameter, std=0.5)
    assert ran >= 9
    expected, inputs = space["text"], space["inputs"]
    with space["reft"].disable_adapter():
        plain = space["reft"].generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(plain, expected), "the edits do not show"
    for name in ("same", "static"):
        assert torch.equal(space[name], expected), name
    # A pipeline decodes the new tokens apart from the prompt, and loses the space between the two.
    words = space["tokenizer"].decode(expected[0], skip_special_tokens=True)
    assert space["written"].replace(" ", "") == words.replace(" ", "")
    assert (tmp_path / "merged" / "config.json").is_file() and space["again"].keys() == space["edits"].keys()
    assert space["scores"]


def test_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert answers(tmp_path / "rows").name == "rows.jsonl"
    lines = [line for language, _, text in blocks(PAGE) if language == "bash" for line in text.splitlines()]
    assert [line.split()[1] for line in lines] == ["finetune", "merge"]
    for line in lines:
        program, *words = shlex.split(line)
        small = ["--steps", "2", "--samples", "0"] if words[0] == "finetune" else []
        done = CliRunner().invoke(app, [*words, *small])
        assert program == "subspace-lab" and done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_language_is_known() -> None:
    assert {language for language, _, _ in blocks(PAGE)} == {"python", "bash", "text"}
