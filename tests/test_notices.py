"""What runs more slowly than it could is said once on standard error; what could not run faster is not."""

from typing import Any

import pytest
import torch
from families import fresh, inputs
from torch import nn

from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.engine import notices
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.notices import say_once
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

SITE = Site("block_output", 0, "last")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_printed", set())


def make(model: nn.Module, batch: Batch, positions: str = "last", **options: Any) -> FrozenPast:
    return FrozenPast(Backbone(model), batch, [SITE], Readout.at(batch, positions), **options)


def with_holes(batch: Batch) -> Batch:
    mask = torch.ones_like(batch.inputs["input_ids"])
    mask[:, 2] = 0
    return Batch({**batch.inputs, "attention_mask": mask})


def dropping(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model.train()


def both_ways(model: Any) -> nn.Module:
    """Without padding every token sees all the others: resuming by tokens fails its check."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def embedded(model: Any, batch: Batch) -> Batch:
    return Batch({"inputs_embeds": model.get_input_embeddings()(batch.inputs["input_ids"]).detach()})


@pytest.mark.parametrize(
    ("case", "mode", "said"),
    [
        ("holes", "plain", "plain runs of the whole model instead of a faster way: the attention mask has holes"),
        ("dropout", "plain", "plain runs of the whole model instead of a faster way: dropout is active in"),
        ("check", "layers", "resuming by layers instead of a faster way: resuming by keys and values was refused"),
        ("embeddings", "layers", "resuming by layers instead of a faster way: inputs ['inputs_embeds']"),
        ("budget", "keys and values", "does not fit the memory budget, and is computed again for each batch"),
    ],
)
def test_what_is_slower_than_expected_is_said_once(
    case: str, mode: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Batch({"input_ids": inputs("llama", 8, 9)["input_ids"]})
    for _ in range(2):
        model = fresh("gpt2" if case == "dropout" else "llama")
        options: dict[str, Any] = {}
        match case:
            case "holes":
                batch = with_holes(batch)
            case "dropout":
                dropping(model)
            case "check":
                both_ways(model)
            case "embeddings":
                batch = batch if "inputs_embeds" in batch.inputs else embedded(model, batch)
            case "budget":
                options = {"memory": 8_000, "chunk": 1}
        past = make(model, batch, **options)
        assert past.mode == mode, past.describe()
    written = capsys.readouterr()
    assert written.out == "" and written.err.count("\n") == 1, written.err
    assert written.err.startswith("subspace_lab: ") and said in written.err, written.err
    assert past.reason or "would not fit" in past.describe()


@pytest.mark.parametrize("case", ["decoder", "encoder", "encoder-decoder", "path", "modules", "no blocks"])
def test_what_could_not_be_faster_is_not_said(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = {"encoder": "bert", "encoder-decoder": "t5", "modules": "mlp"}.get(case, "llama")
    more: Any = {"decoder_lengths": (4, 5, 6)} if name == "t5" else {}
    batch = Batch.of(inputs(name, 3) if name == "mlp" else inputs(name, 3, 9, **more))
    site = {
        "encoder-decoder": Site("encoder.block_output", 1, "last"),
        "path": Site("model.layers.1.output", None, "last"),
        "modules": Site("second.output"),
        "no blocks": Site("model.norm.output", None, "last"),
    }.get(case, SITE)
    past = FrozenPast(Backbone(fresh(name)), batch, [site], Readout.at(batch))
    expected = {"decoder": "keys and values", "encoder-decoder": "plain", "no blocks": "plain"}
    assert past.mode == expected.get(case, "layers"), past.describe()
    past.logits(torch.arange(2), {site: loreft(32, 2, seed=0)})
    assert capsys.readouterr() == ("", "")


def test_each_reason_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("one", "two", "one"):
        say_once(text)
    assert capsys.readouterr().err == "subspace_lab: one\nsubspace_lab: two\n"
