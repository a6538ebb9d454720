"""Which model a result is of: what its digest tells apart, and what it does not look at."""

from __future__ import annotations

import copy
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import transformers
from families import fresh
from torch import nn

from subspace_lab.model import identity
from subspace_lab.model.identity import model_facts, versions


def test_facts_name_the_model() -> None:
    model = fresh("llama")
    facts = model_facts(model)
    assert facts["class"] == "LlamaForCausalLM" and facts["dtype"] == "float32" and facts["name"] is None
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads(json.dumps(facts)) == facts and len(facts["weights"]) == 16


def test_a_loaded_model_has_its_name(tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        model_facts(loaded)["name"] == tmp_path.name
    )  # the folder's name: a path of one machine tells others nothing
    assert model_facts(loaded)["weights"] == model_facts(fresh("llama"))["weights"]


def test_the_digest_changes_with_the_weights_and_not_with_the_mode() -> None:
    model = fresh("llama")
    before = model_facts(model)
    model.train().requires_grad_(False)
    assert model_facts(model) == before == model_facts(copy.deepcopy(model))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            old = parameter.flatten()[0].item()
            parameter.view(-1)[0] += 1
            assert model_facts(model)["weights"] != before["weights"], name
            parameter.view(-1)[0] = old
    assert model_facts(model) == before
    optimizer = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=0.1)
    model(torch.arange(6)[None]).logits.square().mean().backward()
    optimizer.step()
    assert model_facts(model)["weights"] != before["weights"]


def test_rounding_and_names_change_the_digest() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    facts = model_facts(model)
    half = model_facts(copy.deepcopy(model).to(torch.bfloat16))
    assert half["dtype"] == "bfloat16" and half["weights"] != facts["weights"]
    assert model_facts(nn.ModuleDict({"a": model[0], "b": model[1]}))["weights"] != facts["weights"]
    assert (facts["class"], facts["name"], facts["parameters"]) == ("Sequential", None, 40)


def test_models_without_numbers_have_facts_too() -> None:
    assert model_facts(nn.ReLU()) == {**model_facts(nn.Tanh()), "class": "ReLU"}
    assert model_facts(nn.ReLU())["dtype"] is None and model_facts(nn.ReLU())["parameters"] == 0
    with torch.device("meta"):
        facts = model_facts(nn.Linear(10**6, 10**6))
    assert facts["parameters"] == 10**12 + 10**6
    mixed = nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9).to(torch.float64))
    assert model_facts(mixed)["dtype"] == "float32"  # of most of its numbers


def test_versions_are_those_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert set(found) == {"subspace_lab", "torch", "transformers", "nnsight"}
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", missing)
    assert set(versions().values()) == {None}
