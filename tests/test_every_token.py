"""Adapters that edit every token: answers and generated tokens too, in training, over the frozen past and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import by_hand, differ, editing, fresh, hooked, inputs, rounding, spots
from test_reft_trainer import collate

from subspace_lab.core.checkpoints import load_edits, save_edits
from subspace_lab.core.interventions import Intervention, direft, loreft, noreft, red
from subspace_lab.core.sites import Site
from subspace_lab.core.values import Affine, Diagonal
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model
from subspace_lab.reft.storage import digest

LENGTHS, PROMPTS = (11, 5, 9), (6, 3, 8)
COMPONENTS = ("mlp_output", "head_output", "block_output")


def adapted(
    name: str = "gpt2", component: str = "mlp_output", dtype: torch.dtype = torch.float64, **options: Any
) -> ReftModel:
    given: dict[str, Any] = {
        "rank": 3,
        "layers": (0, 2),
        "positions": "all",
        "every_token": True,
        "start": "paper",
        **options,
    }
    model = get_reft_model(fresh(name, dtype), ReftConfig(component=component, **given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def answered(name: str = "gpt2") -> dict[Any, Any]:
    """A batch padded on the right with labels behind each prompt."""
    given = inputs(name, lengths=LENGTHS)
    labels = given["input_ids"].clone()
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        labels[row, :prompt] = -100
        labels[row, length:] = -100
    return {**given, "labels": labels}


def examples() -> list[dict[Any, Any]]:
    given = answered()
    rows = []
    for i, n in enumerate(LENGTHS):
        rows.append({name: value[i, :n].tolist() for name, value in given.items()})
    return rows


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_labels_do_not_end_what_is_edited(name: str, component: str) -> None:
    """Against hooks written by hand on every token."""
    model, given = adapted(name, component), answered(name)
    out = model(**given)
    where = {spots(name, site.layer or 0)[component]: edit for site, edit in model.edits().items()}
    acts = {spot: editing(by_hand(edit), None, spot) for spot, edit in where.items()}
    with torch.no_grad(), hooked(model.base_model, acts):
        expected = model.base_model(**given)
    real = given["attention_mask"].bool()
    assert differ(out.logits[real], expected.logits[real]) < rounding(torch.float64)
    assert abs(float(out.loss.detach() - expected.loss)) < 1e-6
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    prompts = adapted(name, component, every_token=False)
    prompts.load_state_dict({k: v for k, v in model.state_dict().items() if k != "_extra_state"})
    with torch.no_grad():
        assert differ(prompts(**given).logits[real], expected.logits[real]) > 0.02, "answers would not matter"


def test_no_labels_and_no_lengths_are_needed(recwarn: pytest.WarningsRecorder) -> None:
    model, given = adapted("llama"), answered("llama")
    labels = given.pop("labels")
    model.train()
    found = model(**given).logits  # training: with prompts alone this is an error
    told = model(**given, labels=labels, prompt_lengths=torch.tensor(PROMPTS)).logits
    assert torch.equal(found, told)
    with model.prompt_lengths(1):
        assert torch.equal(model(**given).logits, found)
    assert not [w for w in recwarn if "prompt" in str(w.message)]


def test_conversations_of_several_answers_are_trained_on() -> None:
    model, given = adapted(), answered()
    given["labels"][0, 8] = -100  # two answers, which the prompt's edits alone could not have
    with torch.no_grad():
        assert torch.isfinite(model(**given).loss)
    with pytest.raises(ValueError, match="2 answers"):
        adapted(every_token=False)(**given)


# --- the frozen past ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 2), (2,)])
def test_loss_and_gradient_over_the_frozen_past_are_those_of_the_plain_run(layers: tuple[int, ...]) -> None:
    model = adapted(dtype=torch.float32, layers=layers)
    batch = collate(examples())
    expected = model(**batch)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.keep_past(_dataset(examples()))
    got = model(row=torch.arange(3))
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    assert len(gradients) == 3 * len(layers)
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_the_loop_trains_what_is_then_generated_with() -> None:
    where: dict[str, Any] = {"layers": (1,), "component": "mlp_output", "positions": "all", "every_token": True}
    model = get_reft_model(fresh("llama"), ReftConfig(rank=4, bias=False, **where))
    config = TrainingConfig(steps=60, batch_size=3, learning_rate=2e-2, seed=0)
    losses = finetune(model, examples(), config, quiet=True)
    assert losses[-1] < losses[0] - 0.2
    with torch.no_grad():
        batch = collate(examples())
        assert abs(float(model(**batch).loss) - losses[-1]) < 0.5 * (losses[0] - losses[-1])


def _dataset(rows: list[dict[Any, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


# --- generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_generation_edits_what_training_edits(name: str) -> None:
    model = adapted(name)
    given = inputs(name, lengths=(11, 11, 11))
    found = model.generate(
        **given, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        whole = model(input_ids=found.sequences, attention_mask=torch.ones_like(found.sequences)).logits
    steps = torch.stack(found.logits, 1)
    assert differ(steps, whole[:, 10:-1]) < 1e-5
    alone = model.generate(
        **given,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        every_token=False,
    )
    assert differ(torch.stack(alone.logits, 1)[:, :1], steps[:, :1]) < 1e-5
    assert differ(torch.stack(alone.logits, 1), steps) > 0.02


# --- together with others -----------------------------------------------------------------------------------


def test_adapters_of_both_kinds_do_not_run_in_one_call() -> None:
    model, given = adapted(layers=(0,)), answered()
    model.add_adapter("prompt", ReftConfig(rank=2, layers=(1,), positions="last"))
    model.set_adapter(["default", "prompt"])
    ids: dict[str, Any] = {k: given[k] for k in ("input_ids", "attention_mask")}
    for call in (
        lambda: model(**given),
        lambda: model.generate(**ids, max_new_tokens=2),
        lambda: finetune(model, examples(), TrainingConfig(steps=1), quiet=True),
        lambda: model(**given, adapter_names=["default", "prompt", "__base__"]),
    ):
        with pytest.raises(ValueError, match="every token and adapters that edit only the prompt"):
            call()
    model.set_adapter("default")
    with torch.no_grad():
        whole = model(**given).logits
        mixed = model(**given, adapter_names=["default", "__base__", "default"]).logits
        plain = model.base_model(**given).logits
    for row, expected in enumerate([whole, plain, whole]):
        torch.testing.assert_close(mixed[row, : LENGTHS[row]], expected[row, : LENGTHS[row]])


# --- what is configured and saved ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_token": True}, r"positions='f3\+l3' only some"),
        ({"bias": False, "method": "ConsReFT"}, "nothing to write"),
        ({"bias": False, "method": "LobiReFT"}, "nothing to write"),
    ],
    ids=str,
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(**options)


def test_adapters_saved_before_there_were_these_settings_are_still_read() -> None:
    """The digest of a configuration without them is the one that earlier versions wrote with the numbers."""
    config = ReftConfig("DiReFT", rank=3, layers=[1, -1], positions="all", seed=5)
    assert digest(config) == "d663b6d0951f55a4cf0ba114dc33d61150c24ec1026817f8252218ef1f5a5b3f"
    written = config.as_dict()
    del written["every_token"], written["bias"]
    assert ReftConfig.from_dict(written) == config
    others: Any = [{}, {"every_token": True}, {"bias": False}]
    assert len({digest(ReftConfig("DiReFT", positions="all", **one)) for one in others}) == 3


@pytest.mark.parametrize("method", ["LoReFT", "NoReFT", "DiReFT", "RED"])
def test_an_adapter_without_b_comes_back_to_the_bit(method: str, tmp_path: Path) -> None:
    model = adapted(method=method, bias=False, start="identity" if method == "RED" else "paper")
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(fresh("gpt2", torch.float64), tmp_path)
    assert again.adapter("default").config == model.adapter("default").config
    assert not again.adapter("default").config.bias and again.adapter("default").config.every_token
    one, other = model.state_dict(), again.state_dict()
    assert not [k for k in one if k.endswith("bias")]
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    with_b = adapted(method=method)
    with pytest.raises((RuntimeError, ValueError)):
        with_b.load_state_dict(one)


@pytest.mark.parametrize("make", [loreft, noreft, direft])
def test_without_b_is_with_a_b_of_zeros(make: Callable[..., Intervention], tmp_path: Path) -> None:
    with_b, without = make(16, 3, seed=1, start="paper"), make(16, 3, seed=1, start="paper", bias=False)
    h = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(with_b(h), without(h))
    assert sum(p.numel() for p in without.parameters()) == 2 * 16 * 3
    torch.testing.assert_close(without.folded()(h), without(h))
    assert torch.equal(without(torch.zeros(1, 16)), torch.zeros(1, 16))
    for edit, asked in ((with_b, False), (without, True)):
        assert ("bias" in edit.value.description()) == asked
        save_edits(tmp_path / "edits", {Site("mlp_output", 0): edit})
        again = load_edits(tmp_path / "edits")[Site("mlp_output", 0)]
        assert torch.equal(again(h), edit(h)) and [*again.state_dict()] == [*edit.state_dict()]
    bent = make(16, 3, seed=1, start="paper", activation="tanh", bias=False)
    torch.testing.assert_close(bent(h), make(16, 3, seed=1, start="paper", activation="tanh")(h))


def test_red_without_b_scales(tmp_path: Path) -> None:
    edit: Any = red(16, bias=False)
    with torch.no_grad():
        edit.value.scale.copy_(torch.arange(16.0))
    h = torch.randn(4, 16)
    torch.testing.assert_close(edit(h), torch.arange(16.0) * h)
    save_edits(tmp_path / "edits", {Site("mlp_output", 0): edit})
    assert torch.equal(load_edits(tmp_path / "edits")[Site("mlp_output", 0)](h), edit(h))
    assert "bias" not in Diagonal(4).description() and "bias" not in Affine(4, 2).description()


def test_pyrefts_layout_has_a_b_of_zeros(tmp_path: Path) -> None:
    from subspace_lab.reft import from_pyreft, to_pyreft

    model = adapted(component="block_output", bias=False, every_token=False, dtype=torch.float32)
    to_pyreft(model, tmp_path)
    again = from_pyreft(copy.deepcopy(model.base_model), tmp_path, "all")
    given = answered()
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)
