"""Twins that keep a part of the model: what each kind keeps, what it draws anew, and the manners of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import LAYERS, call, fresh, inputs, state
from test_twins import named, plain, ties
from torch import nn

from subspace_lab.analysis.twins import (
    cascading,
    embeddings_kept,
    moment_matched,
    only_above,
    only_below,
    reinitialised,
    shuffled,
    spectrum_kept,
)
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect

REDRAWN = (shuffled, moment_matched, spectrum_kept)


def above(model: nn.Module, seed: int, layer: int = 0) -> nn.Module:
    return only_above(model, layer, seed)


def below(model: nn.Module, seed: int, layer: int = 0) -> nn.Module:
    return only_below(model, layer, seed)


KINDS = (reinitialised, *REDRAWN, embeddings_kept, above, below)


def stream(model: nn.Module, layer: int) -> torch.Tensor:
    """The states behind a block, at all positions."""
    site = Site("block_output", layer)
    return collect(Backbone(model), inputs("llama"), [site])[site]


# --- manners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "bert"])  # tied and not, with biases and without
def test_a_twin_is_like_the_model_and_leaves_it_alone(kind: Callable[..., nn.Module], name: str) -> None:
    model = fresh(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, weights, drawn = state(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    twin, again, other = (kind(model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert state(model) == before and all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert ties(twin) == ties(model) and type(twin) is type(model)
    assert not {t.data_ptr() for t in twin.state_dict().values()} & {
        t.data_ptr() for t in model.state_dict().values()
    }
    assert [m.training for m in twin.modules()] == before["training"]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(p, named(again)[n]) for n, p in named(twin).items())
    assert any(not torch.equal(p, named(other)[n]) for n, p in named(twin).items())
    with torch.no_grad():
        assert call(twin.eval(), inputs(name)).shape == call(model.eval(), inputs(name)).shape


@pytest.mark.parametrize("kind", KINDS)
def test_twins_of_offloaded_models_are_those_of_the_plain_ones(kind: Callable[..., nn.Module]) -> None:
    offloaded = cpu_offload(fresh("llama"), execution_device=torch.device("cpu"))
    twin, expected = kind(offloaded, 5), kind(fresh("llama"), 5)
    assert all(torch.equal(p, named(expected)[n]) for n, p in named(twin).items())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_unpacked_are_served_whatever_the_configuration_says(
    kind: Callable[..., nn.Module],
) -> None:
    """As transformers leaves a model that it read from a GGUF file."""
    model = fresh("llama")
    model.is_quantized, model.config.quantization_config = True, {"quant_method": "gguf"}
    twin = kind(model, 5)
    assert all(torch.equal(p, named(kind(fresh("llama"), 5))[n]) for n, p in named(twin).items())
    assert not hasattr(twin.config, "quantization_config") and model.config.quantization_config


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_packed_are_refused(kind: Callable[..., nn.Module]) -> None:
    model = fresh("llama")
    weight = model.model.layers[1].mlp.up_proj
    weight.weight = nn.Parameter(torch.zeros_like(weight.weight, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantised.*layers\.1\.mlp\.up_proj\.weight"):
        kind(model, 0)


def test_half_precision_is_kept() -> None:
    for kind in KINDS:
        assert {p.dtype for p in kind(fresh("llama", torch.bfloat16), 0).parameters()} == {torch.bfloat16}


# --- what is kept -------------------------------------------------------------------------------------------


def test_shuffling_keeps_the_numbers_of_each_tensor_and_not_their_order() -> None:
    model = fresh("llama")
    twin = named(shuffled(model, 0))
    for name, p in named(model).items():
        assert torch.equal(twin[name].flatten().sort().values, p.flatten().sort().values)
        assert not torch.equal(twin[name], p)


def test_moment_matching_follows_each_tensor_when_it_is_shifted_and_scaled() -> None:
    """twin(s w + m) = s twin(w) + m, and of a tensor without spread all numbers are its mean."""
    model, moved = fresh("llama", torch.float64), fresh("llama", torch.float64)
    with torch.no_grad():
        for i, p in enumerate(moved.parameters()):
            p.mul_(1 + i).add_(0.5 * i)
        moved.model.norm.weight.fill_(0.7)
    one, other = named(moment_matched(model, 2)), named(moment_matched(moved, 2))
    for i, (name, _) in enumerate(moved.named_parameters()):
        if name == "model.norm.weight":
            assert bool((other[name] - 0.7).abs().max() < 1e-12)
            continue
        torch.testing.assert_close(other[name], one[name] * (1 + i) + 0.5 * i)
    weight = named(model)["model.embed_tokens.weight"].detach()
    drawn = one["model.embed_tokens.weight"].detach()
    n = weight.numel()
    assert abs(float(drawn.mean() - weight.mean())) < 5 * float(weight.std()) / n**0.5
    assert abs(float(drawn.std() / weight.std()) - 1) < 5 / (2 * n) ** 0.5


def test_the_spectrum_is_kept_and_the_singular_vectors_are_not() -> None:
    model = fresh("llama", torch.float64)
    twin = named(spectrum_kept(model, 0))
    for name, p in named(model).items():
        if p.ndim == 1:
            assert torch.equal(twin[name].sort().values, p.sort().values)
            continue
        torch.testing.assert_close(torch.linalg.svdvals(twin[name]), torch.linalg.svdvals(p))
        overlap = torch.linalg.svd(p)[2][0] @ torch.linalg.svd(twin[name])[2][0]
        assert abs(float(overlap)) < 0.8


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("llama", False)])
def test_embeddings_are_kept_with_a_tied_head(name: str, tied: bool) -> None:
    model = fresh(name)
    twin, anew = named(embeddings_kept(model, 6)), named(reinitialised(model, 6))
    kept = {"gpt2": ["transformer.wte.weight", "transformer.wpe.weight"], "llama": ["model.embed_tokens.weight"]}[
        name
    ]
    kept += ["lm_head.weight"] if tied else []
    for n, p in named(model).items():
        assert torch.equal(twin[n], p if n in kept else anew[n]), n


@pytest.mark.parametrize("layer", [-1, 0, LAYERS - 2])
def test_above_a_layer_nothing_is_the_models(layer: int) -> None:
    model = fresh("llama")
    twin = only_above(model, layer, 6)
    if layer >= 0:
        assert torch.equal(stream(twin, layer), stream(model, layer))
    assert not torch.allclose(stream(twin, layer + 1), stream(model, layer + 1))
    anew = named(reinitialised(model, 6))
    for n in (f"model.layers.{layer + 1}.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(named(twin)[n], anew[n])


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_below_a_layer_is_the_other_half(layer: int) -> None:
    """Each weight is the model's in one of the two, and drawn anew in the other."""
    for name in ("llama", "gpt2"):
        model = fresh(name)
        over, under = named(only_above(model, layer, 6)), named(only_below(model, layer, 6))
        anew = named(reinitialised(model, 6))
        for n, p in named(model).items():
            one, other = (over, under) if torch.equal(over[n], p) else (under, over)
            assert torch.equal(one[n], p) and torch.equal(other[n], anew[n]), n
        assert torch.equal(over["lm_head.weight"], named(model)["lm_head.weight"]) is (name == "gpt2")


def test_cascading_renews_one_block_more_each() -> None:
    model = fresh("llama")
    twins: Any = list(cascading(model, 6))
    assert len(twins) == LAYERS
    for i, twin in enumerate(twins):
        last = LAYERS - 2 - i  # the last block that is kept
        expected = named(only_above(model, last, 6))
        assert all(torch.equal(p, expected[n]) for n, p in named(twin).items())
        kept = [
            j for j in range(LAYERS) if torch.equal(*(m.model.layers[j].mlp.up_proj.weight for m in (twin, model)))
        ]
        assert kept == list(range(last + 1))
    assert torch.equal(twins[-1].model.embed_tokens.weight, model.model.embed_tokens.weight)


# --- plain modules, and what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", REDRAWN)
def test_plain_modules_keep_their_ties_and_their_statistics(kind: Callable[..., nn.Module]) -> None:
    model: Any = plain()
    model["a"][1].running_mean.fill_(3.0)
    twin: Any = kind(model, 0)
    assert twin["a"][0] is twin["b"] and float(twin["a"][1].running_mean.min()) == 3.0
    assert twin["a"][1].running_mean.data_ptr() != model["a"][1].running_mean.data_ptr()
    assert not torch.equal(twin["b"].weight, model["b"].weight)


def test_what_cannot_be_made_is_said() -> None:
    mlp, t5 = fresh("mlp"), fresh("t5")
    with pytest.raises(ValueError, match="Sequential has no embeddings"):
        embeddings_kept(mlp, 0)
    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        only_above(mlp, 0, 0)
    with pytest.raises(ValueError, match="several stacks"):
        cascading(t5, 0)
    for make in (only_above, only_below):
        for layer in (LAYERS, -2):
            with pytest.raises(ValueError, match=f"layers 0 to {LAYERS - 1}"):
                make(fresh("llama"), layer, 0)
        with pytest.raises(TypeError, match="layer=True"):
            make(fresh("llama"), True, 0)
    for kind in KINDS:
        with pytest.raises(TypeError, match="seed=True"):
            kind(fresh("llama"), True)
