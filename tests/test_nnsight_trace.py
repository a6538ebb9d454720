"""Interventions inside a user's own nnsight trace: the same numbers, beside a backbone or without one."""

from typing import Any

import pytest
import torch
from families import build, call, differ, fresh, inputs
from nnsight import NNsight

from subspace_lab.core.interventions import Intervention, full_vector, interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect, forward, generate

WIDTH = 32


def blocks(net: Any, name: str) -> Any:
    return net.transformer.h if name == "gpt2" else net.model.layers


def strong(seed: int = 0) -> Intervention:
    edit: Any = loreft(WIDTH, 4, seed=seed, start="paper")
    with torch.no_grad():
        edit.value.bias.add_(2.0)
    return edit


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edit_in_a_users_trace(name: str) -> None:
    given, edit = inputs(name, 3, 7), strong()
    net, door = NNsight(fresh(name)), Backbone(build(name))
    with torch.no_grad(), net.trace(**given):
        hidden = blocks(net, name)[1].output.clone()
        hidden[:, -1] = edit(hidden[:, -1])
        blocks(net, name)[1].output = hidden
        logits = net.output.logits.save()
    with torch.no_grad():
        expected = forward(door, given, {Site("block_output", 1, "last"): edit}).logits
        assert differ(logits, expected) < 1e-6
        assert differ(logits, call(build(name), given)) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_interchange_in_a_users_trace(name: str) -> None:
    base, source = (inputs(name, 3, 7, seed) for seed in (0, 1))
    net, door = NNsight(fresh(name)), Backbone(build(name))
    there, here = Site("block_output", 0, 2), Site("block_output", 1, "last")
    for edit in (interchange(LearnedSubspace(WIDTH, 6, seed=0)), full_vector(WIDTH)):
        with torch.no_grad(), net.trace(**source):
            states = blocks(net, name)[0].output[:, 2].save()
            net.output.save()
        with torch.no_grad(), net.trace(**base):
            hidden = blocks(net, name)[1].output.clone()
            hidden[:, -1] = edit(hidden[:, -1], states)
            blocks(net, name)[1].output = hidden
            logits = net.output.logits.save()
        with torch.no_grad():
            collected = collect(door, source, [there])[there]
            assert torch.equal(collected[:, 0], states)
            expected = forward(door, base, {here: edit}, sources={here: collected}).logits
            assert differ(logits, expected) < 1e-6
            assert differ(logits, call(build(name), base)) > 1e-3


def test_gradients_of_a_users_trace() -> None:
    given, edit, net = (
        inputs("llama", 3, 7),
        strong().double(),
        NNsight(fresh("llama", torch.float64)),
    )
    for parameter in net._module.parameters():
        parameter.requires_grad_(False)
    with net.trace(**given):
        states = net.model.layers[1].output
        hidden = states.clone()
        hidden[:, -1] = edit(states[:, -1])  # of what was not written into: autograd keeps it
        net.model.layers[1].output = hidden
        logits = net.output.logits.save()
    (logits**2).sum().backward()
    expected = {name: p.grad.clone() for name, p in edit.named_parameters()}  # type: ignore[union-attr]
    edit.zero_grad()
    door = Backbone(build("llama", torch.float64))
    (forward(door, given, {Site("block_output", 1, "last"): edit}).logits ** 2).sum().backward()
    for name, p in edit.named_parameters():
        assert p.grad is not None
        assert p.grad.norm() > 0 and differ(p.grad, expected[name]) < 1e-9


@pytest.mark.parametrize("first", ["user", "package"])
def test_two_wrappings_of_one_model(first: str) -> None:
    """The user's NNsight and a backbone on one model, whichever came first, run in turns unseen by each other."""
    model, given, edit = fresh("llama"), inputs("llama", 3, 7), strong()
    if first == "user":
        net = NNsight(model)
        door = Backbone(model)
    else:
        door = Backbone(model)
        net = NNsight(model)
    untouched = fresh("llama")
    site = Site("block_output", 1, "last")
    with torch.no_grad():
        plain = call(untouched, given)
        edited = forward(Backbone(untouched), given, {site: edit}).logits
    for _ in range(2):
        with torch.no_grad(), net.trace(**given):
            hidden = net.model.layers[1].output.clone()
            hidden[:, -1] = edit(hidden[:, -1])
            net.model.layers[1].output = hidden
            logits = net.output.logits.save()
        assert differ(logits, edited) < 1e-6
        with torch.no_grad():
            assert torch.equal(forward(door, given, {site: edit}).logits, edited)
            assert torch.equal(forward(door, given, {}).logits, plain)
            assert torch.equal(call(model, given), plain)
            tokens = generate(door, given, {site: edit}, max_new_tokens=3, do_sample=False)
            assert torch.equal(
                tokens, generate(Backbone(model), given, {site: edit}, max_new_tokens=3, do_sample=False)
            )
        with torch.no_grad(), net.trace(**given):
            logits = net.output.logits.save()
        assert torch.equal(logits, plain)
    assert differ(edited, plain) > 1e-3
