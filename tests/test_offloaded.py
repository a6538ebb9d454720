"""Models whose weights accelerate brings for each run alone, against the same models as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import WIDTH, fresh, inputs
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.das.search import search
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.identity import model_facts
from subspace_lab.model.intervene import collect, forward, generate

CPU = torch.device("cpu")
SITE, ROWS = Site("block_output", 1, "last"), torch.tensor([2, 0, 1])


def by_cpu(model: nn.Sequential, folder: Path) -> Any:
    return cpu_offload(model, execution_device=CPU)


def by_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=CPU)


def head_on_disk(model: Any, folder: Path) -> Any:
    rest = {name: "cpu" for name, _ in model.named_children()}
    return dispatch_model(model, {**rest, "lm_head": "disk"}, main_device="cpu", offload_dir=str(folder))


def read_in_part(model: Any, folder: Path) -> Any:
    """As `device_map="auto"` leaves it where memory is short."""
    model.save_pretrained(folder / "whole")
    names = {name for name, _ in model.named_children()} - {"lm_head"}
    device_map = {**dict.fromkeys(names, "cpu"), "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "whole", device_map=device_map, offload_folder=str(folder / "off")
    ).eval()


WAYS = [by_cpu, by_disk, head_on_disk, read_in_part]


def rows(name: str) -> Batch:
    return Batch.of(inputs(name, 3, 9, lengths=(9, 4, 7)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_the_plain_model(name: str, way: Callable[..., Any], tmp_path: Path) -> None:
    if name == "gpt2" and way in (head_on_disk, read_in_part):
        pytest.skip("its head is its embedding, and is on one side with it")
    plain, model = Backbone(fresh(name)), Backbone(way(fresh(name), tmp_path))
    assert model.device == CPU
    batch = rows(name)
    flags = [p.requires_grad for p in model.model.parameters()]
    sites = [SITE, Site("head_output", 0), Site("block_input", 2, "f1")]
    for site, states in collect(model, batch, sites).items():
        assert torch.equal(states.nan_to_num(), collect(plain, batch, [site])[site].nan_to_num())
    edit, source = loreft(WIDTH, 2, seed=0, start="paper"), collect(plain, batch, [SITE])[SITE].flip(0)
    swap = interchange(LearnedSubspace(WIDTH, 4, seed=1))
    for edits, sources in (({SITE: edit}, None), ({SITE: swap}, {SITE: source})):
        expected = forward(plain, batch, edits, sources=sources).logits
        assert torch.equal(forward(model, batch, edits, sources=sources).logits, expected)
    left = Batch.of(inputs(name, 3, 9, lengths=(9, 4, 7), padding="left"))
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(generate(model, left, {SITE: edit}, **asked), generate(plain, left, {SITE: edit}, **asked))
    # Two answers, of which the head's rows were multiplied by hand; and all of them.
    for tokens in ([5, 9], None):
        readout = Readout.at(batch, "last", tokens)
        expected, parameters = PlainEngine(plain, batch, readout), list(swap.parameters())
        engines: list[Any] = [PlainEngine(model, batch, readout), FrozenPast(model, batch, [SITE], readout)]
        assert engines[1].mode == "keys and values", engines[1].describe()
        wanted = expected.logits(ROWS, {SITE: swap}, {SITE: source[ROWS]})
        gradient = torch.autograd.grad(wanted.square().sum(), parameters)[0]
        for engine in engines:
            for _ in range(2):
                found = engine.logits(ROWS, {SITE: swap}, {SITE: source[ROWS]})
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                torch.autograd.grad(found.square().sum(), parameters)[0], gradient, rtol=1e-3, atol=1e-4
            )
    assert [p.requires_grad for p in model.model.parameters()] == flags
    assert model_facts(model.model)["weights"] == model_facts(plain.model)["weights"]


@pytest.mark.parametrize("way", [by_cpu, by_disk])
def test_hooks_that_come_after_the_backbone(way: Callable[..., Any], tmp_path: Path) -> None:
    plain, model, batch = Backbone(fresh("llama")), Backbone(fresh("llama")), rows("llama")
    readout, edits = Readout.at(batch, "last", [5, 9]), {SITE: loreft(WIDTH, 2, seed=0, start="paper")}
    engine = PlainEngine(model, batch, readout)
    expected = PlainEngine(plain, batch, readout).logits(ROWS, edits)
    assert torch.equal(engine.logits(ROWS, edits), expected)
    way(model.model, tmp_path)
    torch.testing.assert_close(engine.logits(ROWS, edits), expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_offloaded_weights_is_noticed(tmp_path: Path) -> None:
    model: Any
    model, batch = Backbone(by_cpu(fresh("llama"), tmp_path)), rows("llama")
    engine = FrozenPast(model, batch, [SITE], Readout.at(batch))
    engine.logits(ROWS, {})
    hook = model.model.model.layers[0].self_attn.q_proj._hf_hook
    with torch.no_grad():
        hook.weights_map["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="was changed after its past was computed"):
        engine.logits(ROWS, {})


def test_twins_of_offloaded_models(tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        expected = reinitialised(fresh(name), 3)
        twin = reinitialised(by_disk(fresh(name), tmp_path / name), 3)
        given = inputs(name, 2, 5)
        assert torch.equal(twin(**given).logits, expected(**given).logits)
        assert not any(p.is_meta for p in twin.parameters())
    chain = by_cpu(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tmp_path)
    with pytest.raises(ValueError, match="are offloaded, so a copy of it has none that could be drawn again"):
        reinitialised(chain, 0)


def test_a_search(tmp_path: Path) -> None:
    from tiny_sweeps import pairs

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    other = GPT2LMHeadModel(plain.config).eval()
    other.load_state_dict(state)
    config = TrainingConfig(steps=4, batch_size=16)
    fits = [
        search(Backbone(m), pairs(), [SITE], config=config, min_accuracy=None, quiet=True)
        for m in (plain, by_cpu(other, tmp_path))
    ]
    for one, same in zip(*fits, strict=True):
        assert one.scores == same.scores
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(same.losses), rtol=1e-4, atol=1e-5)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
    lab = Backbone(model)
    given: dict[str, Any] = {"input_ids": torch.tensor([[1, 2]])}
    for run in (
        lambda: lab.device,
        lambda: forward(lab, given, {}),
        lambda: collect(lab, given, [SITE]),
        lambda: generate(lab, given, {}, max_new_tokens=1),
        lambda: FrozenPast(lab, Batch.of(given), [SITE], Readout.at(Batch.of(given))),
    ):
        with pytest.raises(ValueError, match=r"on 'meta', a device without memory.*load them first"):
            run()


# --- whatever replaces or wraps the head is called ----------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Any:
        return 2 * weight


def double(_: Any, __: Any, out: Any) -> Any:
    return 2 * out


def replaced(head: Any) -> None:
    own = type(head).forward
    head.forward = lambda x: 2 * own(head, x)


def wrapped_as_accelerate_does(head: Any) -> None:
    own = head.forward
    head._old_forward = own
    head.forward = lambda x: 2 * own(x)


def parametrized(head: Any) -> None:
    parametrize.register_parametrization(head, "weight", Doubled())


class Quantised(nn.Parameter):
    pass


def of_another_kind(head: Any) -> None:
    head.weight = Quantised(head.weight.detach() * 2)


WRAPPED = {
    "replaced": replaced,
    "wrapped": wrapped_as_accelerate_does,
    "hooked": lambda head: head.register_forward_hook(double),
    "hooked before": lambda head: head.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "parametrized": parametrized,
    "a weight of another kind": of_another_kind,
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_head_that_is_not_plain_is_called(kind: str, before: bool) -> None:
    if kind in ("replaced", "parametrized") and not before:
        pytest.skip("nnsight must see a replaced forward, and a changed class, first")
    plain, model, batch = fresh("llama"), fresh("llama"), rows("llama")
    if before:
        WRAPPED[kind](model.lm_head)
    lab = Backbone(model)
    readout = Readout.at(batch, "last", [5, 9])
    engine = PlainEngine(lab, batch, readout)
    if not before:
        WRAPPED[kind](model.lm_head)
    for run in (engine, FrozenPast(lab, batch, [SITE], readout)):
        expected = 2 * PlainEngine(Backbone(plain), batch, readout).logits(ROWS, {})
        torch.testing.assert_close(run.logits(ROWS, {}), expected, rtol=1e-4, atol=1e-4)
