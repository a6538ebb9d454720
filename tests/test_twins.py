"""Randomly initialised twins: what they share with a model and what they may not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import TRANSFORMERS, call, fresh, inputs
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names whose tensors lie in one place."""
    groups: dict[int, set[str]] = {}
    for name, tensor in named(model).items():
        groups.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def plain() -> nn.Module:
    """Linear maps, a norm with running statistics, torch's attention, and a map that occurs twice."""
    torch.manual_seed(3)
    shared = nn.Linear(8, 8)
    attention = nn.MultiheadAttention(8, 2)
    return nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.BatchNorm1d(8), nn.ReLU()), "b": shared, "c": attention}
    ).eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_twin_has_the_shape_of_the_model_and_other_weights(name: str) -> None:
    model = fresh(name)
    before = copy.deepcopy(model.state_dict())
    twin: Any = reinitialised(model, 0)
    assert type(twin) is type(model) and twin.config is not model.config
    mine, theirs = twin.config.to_dict(), model.config.to_dict()
    assert {n for n in mine | theirs if mine.get(n) != theirs.get(n)} <= {"dtype"}  # where it was left open
    assert {n: p.shape for n, p in named(twin).items()} == {n: p.shape for n, p in named(model).items()}
    matrices = [n for n, p in named(model).items() if p.ndim > 1]
    assert matrices and not any(torch.equal(named(twin)[n], named(model)[n]) for n in matrices)
    assert ties(twin) == ties(model)
    mine, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (twin, model))
    assert not mine & theirs
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    with torch.no_grad():
        assert call(twin, inputs(name)).shape == call(model, inputs(name)).shape


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_a_new_model(tied: bool) -> None:
    """As if the architecture had been made under this seed: not a shuffle, not noise on the old weights."""
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        new = GPT2LMHeadModel(config)
    twin = reinitialised(model, 7)
    assert all(torch.equal(named(twin)[name], p) for name, p in named(new).items())
    assert bool(ties(twin)) is tied


def test_one_seed_gives_one_twin_and_draws_nothing_from_the_caller() -> None:
    for model in (fresh("llama"), plain()):
        state = torch.get_rng_state()
        one, again, other = (reinitialised(model, seed) for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(99)  # nor does it depend on where the caller's generator stands
        later = reinitialised(model, 5)
        for name, p in named(one).items():
            assert torch.equal(p, named(again)[name]) and torch.equal(p, named(later)[name])
        assert any(not torch.equal(p, named(other)[name]) for name, p in named(one).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_mode_and_flags_are_kept(dtype: torch.dtype) -> None:
    model = fresh("llama", dtype)
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    twin = reinitialised(model, 0)
    assert {p.dtype for p in twin.parameters()} == {dtype}
    assert {n: b.dtype for n, b in twin.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}
    assert [m.training for m in twin.modules()] == modes == [m.training for m in model.modules()]
    flags = {n: p.requires_grad for n, p in named(model).items()}
    assert {n: p.requires_grad for n, p in named(twin).items()} == flags and not all(flags.values())
    assert torch.get_default_dtype() == torch.float32


def test_twin_of_a_plain_module() -> None:
    model: Any = plain()
    model["a"][1].running_mean.fill_(3.0)
    model["a"][0].weight.grad = torch.ones(8, 8)
    before = copy.deepcopy(model.state_dict())
    twin: Any = reinitialised(model, 0)
    assert not any(torch.equal(named(twin)[n], p) for n, p in named(model).items() if p.ndim > 1)
    assert twin["a"][0] is twin["b"] and ties(twin) == ties(model)
    assert twin["a"][1].running_mean.abs().max() == 0  # statistics of the data are learned as well
    assert twin["c"].out_proj.bias.abs().max() == 0  # the parent's reset comes after the child's, as when made
    assert all(p.grad is None for p in twin.parameters()) and model["b"].weight.grad is not None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not twin.training


def test_twin_of_a_model_that_was_opened() -> None:
    """nnsight leaves controllers on the modules: the twin must run by itself and leave the model alone."""
    x = torch.randn(3, 12)
    for model, given, site in (
        (fresh("llama"), inputs("llama"), Site("block_output", 1, "last")),
        (fresh("mlp"), x, Site("first.output")),
    ):
        backbone = Backbone(model)
        expected = collect(backbone, given, [site])[site]
        twin = reinitialised(model, 0)
        found = collect(Backbone(twin), given, [site])[site]
        assert not torch.allclose(found, expected)
        torch.testing.assert_close(
            found, collect(Backbone(reinitialised(fresh_of(model), 0)), given, [site])[site]
        )
        torch.testing.assert_close(collect(backbone, given, [site])[site], expected)


def fresh_of(model: nn.Module) -> nn.Module:
    return fresh("llama" if hasattr(model, "config") else "mlp")


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.by


def test_a_module_that_cannot_be_drawn_again_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Shift(), nn.ReLU(), nn.Sequential(Shift()))
    with pytest.raises(
        ValueError, match=r"1 \(Shift\), 3\.0 \(Shift\).*reset_parameters|reset_parameters.*1 \(Sh"
    ):
        reinitialised(model, 0)


def test_a_configuration_that_does_not_describe_the_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    untied = LlamaForCausalLM(config)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="shares weights in another way"):
        reinitialised(untied, 0)
    cut = LlamaForCausalLM(config)
    cut.model.layers = cut.model.layers[:1]
    with pytest.raises(ValueError, match=r"does not describe it.*model\.layers\.1"):
        reinitialised(cut, 0)
