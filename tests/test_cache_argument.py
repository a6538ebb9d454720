"""The key-value cache under its newer and its older name, whichever the caller uses and the model has."""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from families import build, fresh, inputs
from torch import Tensor, nn

from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.cache_argument import NAMES, forward_name, generate_name, given_cache
from subspace_lab.model.intervene import forward, generate
from subspace_lab.reft import ReftConfig, get_reft_model

WIDTH, LENGTH = 32, 9
EDITS = {Site("block_output", 1, "last"): loreft(WIDTH, 2, seed=0, start="paper")}
CALLERS = ("cache", "past_key_values")


def older(name: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of someone's own, whose forward has the older name alone."""
    model = fresh(name, dtype)
    own, newer = type(model).forward, str(forward_name(model))

    class Older(type(model)):  # type: ignore[misc]
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
        ) -> Any:
            return own(
                self, input_ids, attention_mask, position_ids, use_cache=use_cache, **{newer: past_key_values}
            )

    model.__class__ = Older
    return model


def filled(model: nn.Module, ids: torch.Tensor) -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{str(forward_name(model)): cache})
    return cache


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("kind", ["installed", "older"])
def test_a_forward_goes_on_from_a_cache(kind: str, caller: str) -> None:
    model = build("llama", torch.float64) if kind == "installed" else older()
    ids = inputs("llama", 3, LENGTH)["input_ids"]
    cache = filled(model, ids[:, :5])
    batch = Batch({"input_ids": ids[:, 5:], caller: cache, "attention_mask": torch.ones_like(ids)})
    assert batch.cached == 5
    with torch.no_grad():
        found = forward(Backbone(model), batch, EDITS).logits
        expected = forward(Backbone(model), {"input_ids": ids}, EDITS).logits[:, 5:]
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert cache.get_seq_length() == LENGTH, "the caller's cache was not the one that was used"


@pytest.mark.parametrize("caller", CALLERS)
def test_generation_goes_on_from_a_cache(caller: str) -> None:
    model = build("llama", torch.float64)
    ids = inputs("llama", 3, LENGTH)["input_ids"]
    cache = filled(model, ids[:, :5])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = generate(Backbone(model), given, EDITS, **options)
    again: dict[str, Any] = {caller: copy.deepcopy(cache)}
    assert torch.equal(generate(Backbone(model), given, EDITS, **again, **options), expected)
    assert torch.equal(generate(Backbone(model), Batch({**given, caller: cache}), EDITS, **options), expected)


@pytest.mark.parametrize("caller", CALLERS)
def test_adapters_take_either_name(caller: str) -> None:
    model = get_reft_model(fresh("llama", torch.float64), ReftConfig(rank=2, positions="l2", start="paper")).eval()
    ids = inputs("llama", 3, LENGTH)["input_ids"]
    cache = filled(model.base_model, ids[:, :5])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 5:]
        found = model(
            input_ids=ids[:, 5:], attention_mask=torch.ones_like(ids), **{caller: copy.deepcopy(cache)}
        ).logits
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    held: dict[str, Any] = {caller: cache}
    tokens = model.generate(ids, **options, **held)
    assert torch.equal(tokens, model.generate(ids, **options))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_resuming_a_model_that_has_the_older_name_alone(padding: str) -> None:
    model = older()
    assert forward_name(model) == "past_key_values"
    batch = Batch(inputs("llama", 3, LENGTH, lengths=(9, 4, 7), padding=padding))
    readout = Readout.at(batch, "last")
    backbone = Backbone(model)
    past = FrozenPast(backbone, batch, list(EDITS), readout)
    assert past.mode == "keys and values", past.describe()
    with torch.no_grad():
        found = past.logits(torch.arange(3), EDITS)
        expected = PlainEngine(backbone, batch, readout).logits(torch.arange(3), EDITS)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "neox", "phi3"])
def test_no_call_of_ours_uses_a_name_that_will_go_away(name: str) -> None:
    backbone, batch = Backbone(build(name)), Batch(inputs(name, 3, LENGTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past = FrozenPast(backbone, batch, list(EDITS), Readout.at(batch, "last"))
        past.logits(torch.arange(3), EDITS)
        generate(backbone, batch, EDITS, max_new_tokens=2, do_sample=False)
    assert past.mode == "keys and values", past.describe()


def test_two_caches_are_refused() -> None:
    cache = transformers.DynamicCache()
    ids = torch.ones(1, 2, dtype=torch.long)
    both = {"input_ids": ids, "cache": cache, "past_key_values": cache}
    for use in (
        lambda: given_cache(both),
        lambda: forward(Backbone(build("llama")), both, {}),
        lambda: generate(
            Backbone(build("llama")), {"input_ids": ids}, {}, cache=cache, past_key_values=cache, max_new_tokens=1
        ),
    ):
        with pytest.raises(ValueError, match=r"given as \['cache', 'past_key_values'\].*names of one argument"):
            use()


@pytest.mark.parametrize("caller", NAMES)
def test_a_cache_is_no_input_of_a_data_set(caller: str) -> None:
    batch = Batch({**inputs("llama", 3, LENGTH), caller: transformers.DynamicCache()})
    with pytest.raises(ValueError, match="cache among the inputs"):
        PlainEngine(Backbone(build("llama")), batch, Readout.at(batch, "last"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's
def test_a_wrapper_has_the_name_of_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    model = fresh("llama")
    expected = forward_name(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert expected in NAMES and forward_name(adapted) == expected


def test_what_has_no_cache_is_left_alone() -> None:
    class Storing(nn.Module):
        def forward(self, x: Any, memory: Any = None) -> Any:
            return x

    assert forward_name(Storing()) is None and forward_name(build("mlp")) is None
    given = {"x": torch.ones(2, 3), "memory": 4}
    assert model_inputs(Storing(), Batch(given)) == given
    assert generate_name(build("llama")) in NAMES
