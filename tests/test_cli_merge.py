"""The terminal: an adapter in the weights of its base model, and which adapters are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import differ
from test_cli import SHIPPED
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from subspace_lab.cli import app
from subspace_lab.reft import ReftConfig, ReftModel, get_reft_model

IDS = torch.arange(3, 15)[None]


def merged(*options: str | Path) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, options)])


def adapter(folder: Path, **options: Any) -> Path:
    """An adapter of the shipped model with some numbers."""
    given: dict[str, Any] = {
        "rank": 2,
        "layers": (0, 2),
        "positions": "all",
        "component": "mlp_output",
        "every_token": True,
    }
    given = {**given, "start": "paper", **options}
    model = get_reft_model(AutoModelForCausalLM.from_pretrained(SHIPPED), ReftConfig(**given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_merged_model_is_a_plain_one_with_the_edits(tmp_path: Path, bias: bool, named: bool) -> None:
    folder, out = adapter(tmp_path / "adapter", bias=bias), tmp_path / "nested" / "out"
    done = merged(folder, "--out", out, *(["--model", SHIPPED] if named else []))  # type: ignore[arg-type]
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "mlp_output of layers 0, 2" in done.stdout and str(out) in done.stdout.replace("\n", "")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    found, told = loaded
    assert not any(told.values()) and type(found) is type(base)
    assert found.config.mlp_bias == bias
    with torch.no_grad():
        plain = base(IDS).logits
        edited = ReftModel.from_pretrained(base, folder)(IDS).logits
        assert differ(found(IDS).logits, edited) < 1e-4 < 0.02 < differ(plain, edited)
    text = "a fair price is from 3 to 9 dollars ."
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(SHIPPED)(text)


def test_a_finetuned_classifier_is_merged_with_its_head(tmp_path: Path) -> None:
    rows = [{"text": f"a price of {n} dollars .", "label": "low" if n < 5 else "high"} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--steps", "3", "--every-token", "--positions", "all", "--component", "mlp_output", "--no-bias"]
    options += ["--learning-rate", "0.1", "--out", str(tmp_path / "adapter")]
    trained = CliRunner().invoke(app, ["finetune", "--data", str(data), *map(str, options)])
    assert trained.exit_code == 0, (trained.stderr, trained.exception)
    done = merged(tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "ForSequenceClassification.from_pretrained" in done.stdout
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert sorted(found.config.id2label.values()) == ["high", "low"]
    base = AutoModelForSequenceClassification.from_pretrained(SHIPPED, num_labels=2)
    base.config.pad_token_id = found.config.pad_token_id
    with torch.no_grad():
        expected = ReftModel.from_pretrained(base.eval(), tmp_path / "adapter")(IDS).logits
        assert differ(found(IDS).logits, expected) < 1e-4
        assert not torch.equal(base(IDS).logits, expected)


def refused(message: str, *options: str | Path) -> None:
    done = merged(*options)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert message in done.stderr, done.stderr


def test_adapters_that_do_not_merge_are_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("neither a folder nor an adapter on the Hub", tmp_path / "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    refused("is not a whole adapter", tmp_path / "empty", "--out", out)
    options: Any
    for i, (options, message) in enumerate(
        [
            ({"positions": "f3+l3", "every_token": False, "layers": (1,)}, "mlp_output[1]@f3+l3 cannot be merged"),
            ({"positions": "f3+l3", "every_token": False}, "acts at the positions 'f3+l3'"),
            ({"every_token": False}, "edits only the prompt"),
            ({"component": "block_output"}, "residual stream is the sum"),
            ({"activation": "tanh"}, "not one affine map"),
        ]
    ):
        refused(message, adapter(tmp_path / f"adapter{i}", **options), "--out", out)
    unnamed = adapter(tmp_path / "unnamed")
    config = json.loads((unnamed / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (unnamed / "adapter_config.json").write_text(json.dumps(config))
    refused("does not name its base model: give it with --model", unnamed, "--out", out)
    refused("--model", unnamed, "--out", out, "--model", tmp_path / "empty")
    assert not out.exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    folder, base = adapter(tmp_path / "adapter"), tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(SHIPPED).save_pretrained(base)
    refused("the tokenizer of this folder could not be loaded", folder, "--out", tmp_path / "no", "--model", base)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(base)
    before = {path: path.read_bytes() for path in [*base.iterdir(), *folder.iterdir()]}
    refused("the adapter's own folder", folder, "--out", folder)
    refused("the base model's own folder", folder, "--out", base, "--model", base)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    refused("is not empty", folder, "--out", full)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_an_adapter_is_merged_once(tmp_path: Path) -> None:
    folder, other, out = adapter(tmp_path / "one"), adapter(tmp_path / "two", layers=(1,)), tmp_path / "out"
    assert merged(folder, "--out", out).exit_code == 0
    refused("the edit would act twice", folder, "--model", out, "--out", tmp_path / "again")
    assert merged(other, "--model", out, "--out", tmp_path / "both").exit_code == 0
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) == 1  # whoever may read one of the files may read all


def test_an_adapter_that_does_nothing_is_named(tmp_path: Path) -> None:
    config = ReftConfig(rank=2, layers=(0,), positions="all", component="mlp_output", every_token=True)
    get_reft_model(AutoModelForCausalLM.from_pretrained(SHIPPED), config).save_pretrained(tmp_path / "adapter")
    done = merged(tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "Caution: on 16 tokens the adapter changes no logit" in " ".join(
        done.stdout.split()
    )


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    folder = adapter(tmp_path / "adapter")
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fails)
    done = merged(folder, "--out", tmp_path / "out")
    assert done.exit_code == 2 and done.stderr.splitlines()[-1] == "subspace-lab: No space left on device"
    assert not (tmp_path / "out").exists()
