"""Running with edits: every family, component and kind of position against hand-written hooks.

The oracle is `families.hooked`: plain torch hooks at places written down by hand.
"""

import contextlib
import copy
import itertools
from typing import Any

import families
import pytest
import torch
from families import (
    DECODERS,
    LAYERS,
    NAMES,
    TRANSFORMERS,
    WIDTH,
    Spot,
    by_hand,
    call,
    capture,
    differ,
    editing,
    exact,
    heads,
    hooked,
    rounding,
    spots,
    standing,
    state,
)
from torch import Tensor, nn

from subspace_lab.core.interventions import (
    Intervention,
    consreft,
    direft,
    full_vector,
    interchange,
    lobireft,
    loreft,
    noreft,
    red,
    steer,
    zero_ablation,
)
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace, random_subspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward

LENGTH = 11
RAGGED = (11, 6, 1)
DECODER_RAGGED = (7, 11, 2)
POSITIONS = ("all", "last", "1:3", "f1+l1")
BACKBONES: dict = {}


def build(name: str, dtype: torch.dtype | None = None) -> Any:
    return families.build(name, dtype or exact(name))


def fresh(name: str, dtype: torch.dtype | None = None) -> Any:
    return families.fresh(name, dtype or exact(name))


def inputs(name: str, *args: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
    return families.inputs(name, *args, dtype=dtype or exact(name), **options)


def backbone(name: str, dtype: torch.dtype | None = None) -> Any:
    dtype = dtype or exact(name)
    if (name, dtype) not in BACKBONES:
        BACKBONES[name, dtype] = Backbone(build(name, dtype))
    return BACKBONES[name, dtype]


def ragged(name: str, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
    return inputs(name, 3, LENGTH, seed, lengths=RAGGED, decoder_lengths=DECODER_RAGGED, dtype=dtype)


def site_of(
    name: str, component: str, positions: str = "all", layer: int = 1, heads: list[int] | None = None
) -> Site:
    if name == "mlp":
        return Site(component, positions=positions)
    return Site(component, layer, positions, heads)


def rows_of(name: str, component: str, positions: str) -> list[list[int]] | None:
    """Where the positions stand in the ragged batch, by hand; None for a stream without positions."""
    if name == "mlp":
        return None
    return standing(positions, DECODER_RAGGED if component.startswith("decoder.") else RAGGED, LENGTH)


def width_at(name: str, spot: Spot, given: dict[str, Any]) -> int:
    return capture(backbone(name).model, given, spot).shape[-1]


def strong(width: int, rank: int = 4, seed: int = 0) -> Intervention:
    """LoReFT from the paper's start with a bias that shows in the logits."""
    edit: Any = loreft(width, min(rank, width), seed=seed, start="paper")
    with torch.no_grad():
        edit.value.bias.add_(2.0)
    return edit


def output(
    name: str,
    given: Batch | dict[str, Any],
    edits: dict[Site, Any],
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    out = forward(backbone(name, dtype), given, edits, **options)
    return out if isinstance(out, torch.Tensor) else out.logits


CASES = [(name, component) for name in NAMES for component in spots(name, 1)]
HALF = ("gpt2", "llama", "neox", "qwen3", "gemma3", "bert", "roberta", "t5", "mlp")


# --- reading, writing, leaving alone ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "component"), CASES)
def test_collect_sees_what_a_hook_sees(name: str, component: str) -> None:
    given, spot = ragged(name), spots(name, 1)[component]
    whole = capture(build(name), given, spot)
    for positions in POSITIONS if name != "mlp" else ("all",):
        site = site_of(name, component, positions)
        states = collect(backbone(name), given, [site])[site]
        if name == "mlp":
            assert torch.equal(states, whole)
            continue
        rows = rows_of(name, component, positions)
        assert rows is not None
        assert states.shape[:2] == (3, max(map(len, rows)))
        for row, at in enumerate(rows):
            assert torch.equal(states[row, : len(at)], whole[row, at]), (positions, row)
            assert states[row, len(at) :].isnan().all()


@pytest.mark.parametrize(
    ("name", "component", "dtype"),
    [(*case, exact(case[0])) for case in CASES] + [(*case, torch.bfloat16) for case in CASES if case[0] in HALF],
)
@torch.no_grad()
def test_edit_gives_what_a_hook_gives(name: str, component: str, dtype: torch.dtype) -> None:
    given, spot, model = ragged(name, dtype=dtype), spots(name, 1)[component], build(name, dtype)
    edit = strong(width_at(name, spot, ragged(name)))
    plain = call(model, given)
    for positions in POSITIONS if name != "mlp" else ("all",):
        rows = rows_of(name, component, positions)
        with hooked(model, {spot: editing(by_hand(edit), rows, spot)}):
            expected = call(model, given)
        found = output(name, given, {site_of(name, component, positions): edit}, dtype)
        assert found.dtype == dtype
        if dtype != torch.bfloat16:
            assert differ(found, expected) < rounding(dtype), positions
        else:
            assert torch.equal(found, expected), positions
        # The control: the edit is felt, far above the rounding that is forgiven.
        assert differ(found, plain) > 1e-3, positions


def at_rest(width: int) -> list[Any]:
    rank = min(4, width)
    return [
        loreft(width, rank, seed=0),
        noreft(width, rank, seed=0),
        direft(width, rank, seed=0),
        lobireft(width, rank, seed=0),
        red(width),
        steer(random_subspace(width, rank, 0), 0.0),
        lambda h: h,
    ]


@pytest.mark.parametrize(("name", "component"), CASES)
@torch.no_grad()
def test_identity_edits_change_no_bit(name: str, component: str) -> None:
    for dtype in (exact(name), torch.bfloat16) if name in HALF else (exact(name),):
        given = ragged(name, dtype=dtype)
        plain = call(build(name, dtype), given)
        for i, edit in enumerate(at_rest(width_at(name, spots(name, 1)[component], ragged(name)))):
            site = site_of(name, component, "all" if name == "mlp" else POSITIONS[i % 4])
            assert torch.equal(output(name, given, {site: edit}, dtype), plain), (site, dtype)
        assert torch.equal(output(name, given, {}, dtype), plain)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_interchange_of_the_whole_stream_is_the_source_run(name: str) -> None:
    base, source = (inputs(name, 3, LENGTH, seed) for seed in (0, 1))
    model, door = build(name), backbone(name)
    expected = call(model, source)
    component = "encoder.block_output" if name == "t5" else "block_output"
    if name == "t5":  # the decoder keeps reading the base's own tokens
        expected = call(model, {**base, **{key: source[key] for key in ("input_ids", "attention_mask")}})
    site = Site(component, 1)
    states = collect(door, source, [site])
    plain = call(model, base)
    assert differ(plain, expected) > 0.1
    found = output(name, base, {site: full_vector(WIDTH)}, sources=states)
    assert torch.equal(found, expected)
    for subspace in (LearnedSubspace(WIDTH, WIDTH, seed=0), random_subspace(WIDTH, WIDTH, 1)):
        whole = output(name, base, {site: interchange(subspace)}, sources=states)
        assert differ(whole, expected) < 1e-4
    # The controls: a smaller subspace is not enough, and the base's own states are no change.
    part = output(name, base, {site: interchange(random_subspace(WIDTH, WIDTH // 2, 0))}, sources=states)
    assert differ(part, expected) > 0.01 and differ(part, plain) > 0.01
    own = collect(door, base, [site])
    assert torch.equal(output(name, base, {site: full_vector(WIDTH)}, sources=own), plain)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_heads_are_slices(name: str) -> None:
    given, model, door = ragged(name), build(name), backbone(name)
    for component, whole in spots(name, 1).items():
        if component.rpartition(".")[2] not in ("query_output", "key_output", "value_output", "head_output"):
            continue
        count, size = heads(name, component)
        for chosen in ([count - 1], [1, 0], list(range(count))):
            every = capture(model, given, whole)
            columns = [size * head + i for head in chosen for i in range(size)]
            own = range(every.shape[-1]) if whole.columns is None else whole.columns
            spot = Spot(whole.path, whole.side, tuple(own[c] for c in columns))
            site = site_of(name, component, "f1+l1", heads=chosen)
            rows = rows_of(name, component, "f1+l1")
            states = collect(door, given, [site])[site]
            assert rows is not None
            for row, at in enumerate(rows):
                assert torch.equal(states[row, : len(at)], every[row][at][:, columns]), (component, chosen)
            edit = strong(len(columns))
            with hooked(model, {spot: editing(by_hand(edit), rows, spot)}):
                expected = call(model, given)
            found = output(name, given, {site: edit})
            assert differ(found, expected) < rounding(exact(name)), (component, chosen)
            assert differ(found, call(model, given)) > 1e-4


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n != "gemma2"])  # its attention is not torch's
@torch.no_grad()
def test_heads_are_those_that_attention_computes_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `head_output` and `value_output` hold, compared with what torch's attention is given and gives."""
    given, door, seen = inputs(name, 2, LENGTH), backbone(name), []
    true = nn.functional.scaled_dot_product_attention

    def spying(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = true(query, key, value, *args, **kwargs)
        seen.append((query, key, value, result))
        return result

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spying)
    call(build(name), given)
    monkeypatch.undo()
    stacks = {"": 1} if name != "t5" else {"encoder.": 1, "decoder.": LAYERS + 2}
    for stack, number in stacks.items():  # in T5's decoder, attention to itself and to the encoder take turns
        query, key, value, result = seen[number]
        plain = name in ("gpt2", "bert", "roberta", "t5")  # no rotation and no norm between projection and use
        compared = {"value_output": value, "head_output": result}
        if plain:
            compared |= {"query_output": query, "key_output": key}
        for component, used in compared.items():
            count, size = heads(name, component)
            for head in range(count):
                site = Site(stack + component, 1, heads=head)
                states = collect(door, given, [site])[site]
                copies = used.shape[1] // count  # grouped keys and values may be repeated for the kernel
                for copied in range(copies):
                    assert torch.equal(states, used[:, head * copies + copied]), (component, head)
                assert states.shape[-1] == size


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_edits_and_nothing_else(name: str) -> None:
    given, model = ragged(name, dtype=torch.float64), build(name, torch.float64)
    door = backbone(name, torch.float64)
    if name == "gemma2":  # its padding is NaN in float64, with or without edits
        given = inputs(name, 3, LENGTH)
    stack = "encoder." if name == "t5" else ""
    wanted = (
        ["first.output", "second.input"]
        if name == "mlp"
        else [f"{stack}block_output", f"{stack}head_output", f"{stack}value_output"]
    )
    edits, mixing = {}, None
    for i, component in enumerate(wanted):
        spot = spots(name, 1 + i % 2)[component]
        edit = strong(capture(model, given, spot).shape[-1], seed=i).double()
        edits[site_of(name, component, "all" if name == "mlp" else "f1+l1", 1 + i % 2)] = edit, spot
    for parameter in model.parameters():
        assert parameter.requires_grad and parameter.grad is None
    out = forward(door, given, {site: edit for site, (edit, _) in edits.items()})
    logits = out if name == "mlp" else out.logits
    mixing = torch.randn(logits.shape, dtype=torch.float64)
    (logits * mixing).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    found = {site: {n: p.grad.clone() for n, p in edit.named_parameters()} for site, (edit, _) in edits.items()}  # type: ignore[union-attr]
    acts = {}
    for site, (edit, spot) in edits.items():
        edit.zero_grad()
        rows = rows_of(name, site.component, site.positions)
        acts[spot] = editing(by_hand(edit), [[0, LENGTH - 1]] * 3 if name == "gemma2" else rows, spot)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with hooked(model, acts):
            (call(model, given) * mixing).sum().backward()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    for site, (edit, _) in edits.items():
        for n, p in edit.named_parameters():
            assert p.grad is not None
            assert p.grad.norm() > 0
            assert differ(found[site][n], p.grad) < 1e-9, (site, n)


def test_base_is_trained_when_asked_for() -> None:
    model = fresh("llama")
    edit: Any
    site, edit = Site("block_output", 1, "last"), strong(WIDTH)
    model.lm_head.weight.requires_grad_(False)
    forward(Backbone(model), ragged("llama"), {site: edit}, train_base=True).logits.sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters()}
    assert trained.pop("lm_head.weight") is None
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    assert edit.value.weight.grad is not None
    assert edit.value.weight.grad.abs().max() > 0


def test_flags_that_the_user_set_stay() -> None:
    model = fresh("llama")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    forward(Backbone(model), ragged("llama"), {Site("block_output", 1): strong(WIDTH)}).logits.sum().backward()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


# --- a guest of the model -----------------------------------------------------------------------------------


class Failure(Exception):
    pass


def failing(h: Tensor) -> Any:
    raise Failure


def misshapen(h: Tensor) -> Tensor:
    return h[:, :1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mlp"])
def test_nothing_of_the_model_changes(name: str) -> None:
    model = fresh(name)
    model.train()
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = ragged(name)
    before, weights = state(model), copy.deepcopy(model.state_dict())
    door = Backbone(model)
    site = site_of(name, next(iter(spots(name, 1))), layer=1)
    later = site_of(name, list(spots(name, 1))[-1], layer=1)
    width = door.width(site)
    collect(door, given, [site, later])
    forward(door, given, {site: strong(width)})
    states = collect(door, given, [site])
    forward(door, given, {site: full_vector(width)}, sources=states)
    wrong: Any
    for wrong, error in ((failing, Failure), (misshapen, ValueError), (lambda h: h.float(), ValueError)):
        with pytest.raises(error):
            forward(door, given, {site: strong(width), later: wrong})
    with pytest.raises(ValueError):
        forward(door, given, {site: strong(width + 1)})
    assert state(model) == before
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[key], weights[key]) for key in weights)
    # And it still runs, by itself and with edits, as one that was never wrapped.
    untouched = fresh(name).train()
    first = next(m for m in untouched.modules() if isinstance(m, nn.Linear))
    first.eval()
    for module in untouched.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    results = []
    for one in (model, untouched):
        torch.manual_seed(0)  # some attention drops by a function
        with torch.no_grad():
            results.append(call(one, given))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_the_users_hooks_stay_and_fire(name: str) -> None:
    model, given, fired = fresh(name), ragged(name), []
    spot = next(iter(spots(name, 1).values()))
    module = model.get_submodule(spot.path)
    module.register_forward_hook(lambda *_: fired.append("after"))
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    door = Backbone(model)
    module.register_forward_hook(lambda *_: fired.append("later"))
    site = site_of(name, next(iter(spots(name, 1))))
    edit = strong(door.width(site))
    forward(door, given, {site: edit})
    assert sorted(fired) == ["after", "before", "later"]
    with pytest.raises(Failure):
        forward(door, given, {site: failing})
    fired.clear()
    call(model, given)
    assert sorted(fired) == ["after", "before", "later"]
    collect(door, given, [site])
    assert len(module._forward_hooks) == 2 and len(module._forward_pre_hooks) == 1


def test_a_hook_of_the_user_and_an_edit_compose() -> None:
    """Edits happen inside the module's call: before the user's own hook on its output, after one on its input."""
    model, given, edit = fresh("llama"), ragged("llama"), strong(WIDTH)
    door, rows = Backbone(model), rows_of("llama", "block_output", "last")
    block = model.model.layers[1]
    before = block.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    block.register_forward_hook(lambda m, args, out: 2 * out)
    with torch.no_grad():
        for component, side in (("block_output", "output"), ("block_input", "input")):
            spot = Spot("model.layers.1", side)
            act = editing(by_hand(edit), rows, spot)
            if side == "output":
                by_oracle = block.register_forward_hook(lambda m, args, out, act=act: act(out), prepend=True)
            else:
                by_oracle = block.register_forward_pre_hook(lambda m, args, act=act: (act(args[0]), *args[1:]))
            expected = call(model, given)
            by_oracle.remove()
            found = forward(door, given, {Site(component, 1, "last"): edit}).logits
            assert differ(found, expected) < 1e-6 < 1e-3 < differ(found, call(model, given))
    before.remove()


def test_inputs_and_sources_are_not_written_into() -> None:
    for name in ("gpt2", "t5", "mlp"):
        given = ragged(name)
        kept = copy.deepcopy(given)
        site = site_of(name, next(iter(spots(name, 1))))
        door = backbone(name)
        sources = collect(door, given, [site])
        states = {key: value.clone() for key, value in sources.items()}
        edits = {site: interchange(random_subspace(door.width(site), 3, 0))}
        before = dict(edits)
        forward(door, given, edits, sources=sources)
        same = torch.equal(sources[site].nan_to_num(), states[site].nan_to_num())
        assert edits == before and list(sources) == [site] and same
        if name == "mlp":
            assert torch.equal(given, kept)
        else:
            assert list(given) == list(kept) and all(torch.equal(given[k], kept[k]) for k in kept)


def test_collected_states_are_the_users_own() -> None:
    door, given, site = backbone("llama"), ragged("llama"), Site("block_output", 1)
    states = collect(door, given, [site])[site]
    again = states.clone()
    assert not states.requires_grad
    states.zero_()
    assert torch.equal(collect(door, given, [site])[site].nan_to_num(), again.nan_to_num())


def test_collected_states_are_not_those_that_a_model_overwrites() -> None:
    """An activation in place, between two sites, writes into what the first one saw."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    given, sites = torch.randn(5, 4), [Site("0.output"), Site("2.output")]
    states = collect(Backbone(model), given, sites)
    torch.testing.assert_close(states[sites[0]], model[0](given).detach())
    assert (states[sites[0]] < 0).any()


def test_the_run_ends_after_the_last_site() -> None:
    counted = []
    model = fresh("llama")
    for layer in range(LAYERS):
        model.model.layers[layer].register_forward_hook(lambda *_, layer=layer: counted.append(layer))
    collect(Backbone(model), ragged("llama"), [Site("block_output", 0), Site("head_output", 1)])
    assert counted == [0]
    forward(Backbone(model), ragged("llama"), {Site("block_output", 0): lambda h: h})
    assert counted == [0, 0, 1, 2]  # the control


# --- several sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_components_at_once_in_any_order(name: str) -> None:
    given, model = ragged(name), build(name)
    wanted = {
        site_of(name, c, layer=layer): s for layer in (2, 0) for c, s in reversed(spots(name, layer).items())
    }
    found = collect(backbone(name), given, wanted)
    assert set(found) == set(wanted)
    for site, spot in wanted.items():
        whole, rows = capture(model, given, spot), rows_of(name, site.component, "all")
        assert rows is not None
        for row, at in enumerate(rows):
            assert torch.equal(found[site][row, : len(at)], whole[row, at]), site


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "bert", "t5"])
@torch.no_grad()
def test_several_edits_at_once(name: str) -> None:
    """Two layers, two components of one block, two sets of positions and two heads of one stream."""
    given, model = ragged(name), build(name)
    stack = "decoder." if name == "t5" else ""
    places = [
        (f"{stack}block_output", 2, "last", None),
        (f"{stack}block_output", 0, "0", None),
        (f"{stack}block_output", 2, ":-1", None),
        (f"{stack}head_output", 1, "all", [0]),
        (f"{stack}head_output", 1, "last", [2, 3]),
        (f"{stack}mlp_output", 1, "all", None),
    ]
    edits, acts = {}, []
    lengths = DECODER_RAGGED if name == "t5" else RAGGED
    for i, (component, layer, positions, chosen) in enumerate(places):
        spot = spots(name, layer)[component]
        if chosen:
            size = heads(name, component)[1]
            spot = Spot(spot.path, spot.side, tuple(size * h + j for h in chosen for j in range(size)))
        edit = strong(len(spot.columns) if spot.columns else WIDTH, seed=i)
        edits[site_of(name, component, positions, layer, chosen)] = edit
        rows = {
            "last": [[n - 1] for n in lengths],
            "0": [[0] for n in lengths],
            ":-1": [list(range(n - 1)) for n in lengths],
            "all": [list(range(n)) for n in lengths],
        }[positions]
        acts.append((spot, editing(by_hand(edit), rows, spot)))
    results = []
    for some in (acts, acts[:-1], acts[1:]):
        with contextlib.ExitStack() as stack_of_hooks:
            for spot, act in some:
                stack_of_hooks.enter_context(hooked(model, {spot: act}))
            results.append(call(model, given))
    found = output(name, given, edits)
    assert differ(found, results[0]) < 1e-6
    assert torch.equal(output(name, given, dict(reversed(edits.items()))), found)
    assert differ(found, results[1]) > 1e-3 < differ(found, results[2])


@torch.no_grad()
def test_several_variables_at_one_site() -> None:
    base, first, second = (inputs("llama", 3, LENGTH, seed) for seed in (0, 1, 2))
    door, model, site = backbone("llama"), build("llama"), Site("block_output", 1, "last")
    spot = spots("llama", 1)["block_output"]
    parts = LearnedSubspace(WIDTH, 8, seed=0).partition({"a": 3, "b": 5})
    sources = {"a": collect(door, first, [site])[site], "b": collect(door, second, [site])[site]}

    def formula(h: Tensor, row: int) -> Tensor:
        for name, part in parts.items():
            rows = part.basis().double()
            h = h + (sources[name][row, 0] @ rows.T - h @ rows.T) @ rows
        return h

    def act(value: Any) -> Tensor:
        new = value.clone()
        for row in range(3):
            new[row, -1] = formula(value[row, -1], row)
        return new

    with hooked(model, {spot: act}):
        expected = call(model, base)
    found = output("llama", base, {site: interchange(parts)}, sources={site: sources})
    assert differ(found, expected) < 1e-6
    only = output("llama", base, {site: interchange(parts)}, sources={site: {"b": sources["b"]}})
    assert (
        differ(only, output("llama", base, {site: interchange(parts["b"])}, sources={site: sources["b"]})) < 1e-6
    )
    assert differ(only, found) > 1e-4


@torch.no_grad()
def test_source_may_stand_elsewhere() -> None:
    """Positions of the source are those it was collected at: read at "first", written at "last", by name ..."""
    base, source = ragged("gpt2"), ragged("gpt2", seed=1)
    door, model, spot = backbone("gpt2"), build("gpt2"), spots("gpt2", 1)["block_output"]
    there, here = Site("block_output", 0, "f1+l1"), Site("block_output", 1, "word")
    batch = Batch(base, columns={"word": torch.tensor([[4, 7], [0, 5], [0, -1]])})
    states = collect(door, source, [there])[there]
    subspace = random_subspace(WIDTH, 6, 0)
    rows = subspace.basis().double()
    read = capture(model, source, spots("gpt2", 0)["block_output"])
    read_at, written_at = [[0, 10], [0, 5], [0]], [[4, 7], [0, 5], [0]]

    def act(value: Any) -> Tensor:
        new = value.clone()
        for row in range(3):
            for i, j in zip(read_at[row], written_at[row], strict=True):
                h = value[row, j]
                new[row, j] = h + (read[row, i] @ rows.T - h @ rows.T) @ rows
        return new

    with hooked(model, {spot: act}):
        expected = call(model, base)
    found = output("gpt2", batch, {here: interchange(subspace)}, sources={here: states})
    assert differ(found, expected) < 1e-6 < 1e-3 < differ(found, call(model, base))


@torch.no_grad()
def test_prompt_lengths_keep_the_answer_out() -> None:
    given, model, door = ragged("llama"), build("llama"), backbone("llama")
    batch = Batch(given, prompt_lengths=torch.tensor([4, 6, 1]))
    spot, edit = spots("llama", 1)["block_output"], strong(WIDTH)
    for positions, rows in (
        ("last", [[3], [5], [0]]),
        ("l1", [[3], [5], [0]]),
        ("all", [[0, 1, 2, 3], [*range(6)], [0]]),
    ):
        with hooked(model, {spot: editing(by_hand(edit), rows, spot)}):
            expected = call(model, given)
        site = Site("block_output", 1, positions)
        assert differ(output("llama", batch, {site: edit}), expected) < 1e-6
        assert differ(output("llama", given, {site: edit}), expected) > 1e-4
        states, whole = collect(door, batch, [site])[site], capture(model, given, spot)
        assert all(torch.equal(states[r, : len(at)], whole[r, at]) for r, at in enumerate(rows))


def test_a_batch_of_rows_is_the_rows_of_the_batch() -> None:
    batch = Batch(ragged("llama"), torch.tensor([4, 6, 1]), {"word": torch.tensor([1, 2, 0])})
    part = batch.rows(torch.tensor([2, 0]))
    assert part.prompt_lengths is not None
    assert len(part) == 2 and part.prompt_lengths.tolist() == [1, 4] and part.columns["word"].tolist() == [0, 1]
    assert torch.equal(part.inputs["input_ids"], batch.inputs["input_ids"][[2, 0]])
    assert torch.equal(part.to("cpu").inputs["input_ids"], part.inputs["input_ids"])
    assert Batch.of(batch) is batch and len(Batch.of(torch.randn(5, 2))) == 5
    site = Site("block_output", 1, "word")
    whole = collect(backbone("llama"), batch, [site])[site]
    torch.testing.assert_close(collect(backbone("llama"), part, [site])[site], whole[[2, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # true of the layers below the edit
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_a_block_is_refused(reentrant: bool) -> None:
    """Run again, the block does not meet the edit: no gradient, and with one kind of checkpoint no error."""
    model, given = fresh("llama"), inputs("llama", 2, 7)
    door = Backbone(model)
    model.train()
    # transformers 5.24 gives it a new name.
    switch = (
        "activation_checkpointing"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing"
    )
    getattr(model, f"{switch}_enable")({"use_reentrant": reentrant})
    for component in ("head_output", "attention_output", "mlp_output", "key_output"):
        site = Site(component, 1)
        with pytest.raises(ValueError, match=r"checkpointing is on, and 'model.layers.1\..*' is inside a block"):
            forward(door, given, {site: strong(door.width(site))})
        collect(door, given, [site])
    edit: Any = strong(WIDTH)
    if reentrant:
        forward(door, given, {Site("block_output", 1): edit}).logits.square().sum().backward()
        assert edit.value.weight.grad is not None
        found, _ = edit.value.weight.grad.clone(), edit.zero_grad()
        getattr(model, f"{switch}_disable")()
        forward(door, given, {Site("block_output", 1): edit}).logits.square().sum().backward()
        assert differ(found, edit.value.weight.grad) < 1e-6 < edit.value.weight.grad.norm()


# --- what is refused, before anything runs ------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted() -> tuple[Backbone, list[int]]:
    """A model that counts its forward passes."""
    model = fresh("llama")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return Backbone(model), calls


def lens(width: int = WIDTH) -> Intervention:
    return interchange(random_subspace(width, 3, 0))


def free(h: Tensor) -> Tensor:
    return h


B, H = "block_output", "head_output"


@pytest.mark.parametrize(
    ("edits", "sources", "error", "message"),
    [
        ({Site(B, 1): free, Site(B, -2, "last"): free}, {}, ValueError, r"same positions of one stream \(row 0"),
        ({Site(B, 1, "2"): free, Site(B, 1, "l3"): free}, {}, ValueError, r"same positions .* \(row 0"),
        ({Site(B, 1, "2:4"): free, Site(B, 1, "3"): free}, {}, ValueError, r"disjoint positions \(or heads\)"),
        ({Site(B, 1): free, Site("model.layers.1.output"): free}, {}, ValueError, r"same positions"),
        ({Site(H, 1, heads=[0, 1]): free, Site(H, 1, heads=[1, 2]): free}, {}, ValueError, r"same positions"),
        ({Site(H, 1): free, Site(H, 1, heads=[1]): free}, {}, ValueError, r"same positions"),
        ({Site(B, 1): loreft(WIDTH + 1, 2, seed=0)}, {}, ValueError, r"has width 32; .* made for 33"),
        ({Site(H, 1, heads=[0]): loreft(WIDTH, 2, seed=0)}, {}, ValueError, r"has width 8; .* made for 32"),
        ({Site(B, 1): lens()}, {}, ValueError, r"an interchange needs the source's states"),
        ({Site(B, 1): loreft(WIDTH, 2, seed=0)}, {Site(B, 1): torch.randn(2, 5, WIDTH)}, ValueError, r"no other"),
        (
            {Site(B, 1): lens()},
            {Site(B, 0): torch.randn(2, 5, WIDTH)},
            ValueError,
            r"Sources for \[block_output\[0\]",
        ),
        (
            {Site(B, 1): lens()},
            {Site(B, 1): torch.randn(3, 5, WIDTH)},
            ValueError,
            r"3 source states for 2 base rows",
        ),
        (
            {Site(B, 1): lens()},
            {Site(B, 1): torch.randn(2, 4, WIDTH)},
            ValueError,
            r"row 0 of the base has 5 positions and its source.* has 4",
        ),
        (
            {Site(B, 1): lens()},
            {Site(B, 1): torch.randn(2, 1, WIDTH)},
            ValueError,
            r"row 0 of the base has 5 positions and its source.* has 1",
        ),
        (
            {Site(B, 1): full_vector(WIDTH)},
            {Site(B, 1): torch.randn(2, 1, WIDTH)},
            ValueError,
            r"row 0 of the base has 5 positions and its source.* has 1",
        ),
        (
            {Site(B, 1, "l2"): lens()},
            {Site(B, 1, "l2"): torch.randn(2, 1, WIDTH)},
            ValueError,
            r"row 0 of the base has 2 positions and its source.* has 1",
        ),
        ({Site(B, 1): lens()}, {Site(B, 1): torch.randn(2, WIDTH)}, ValueError, r"source of shape \(2, 32\)"),
        (
            {Site(B, 1): lens()},
            {Site(B, 1): torch.randn(2, 5, WIDTH + 1)},
            ValueError,
            r"has width 32; its source has 33",
        ),
        (
            {Site(B, 1): interchange(LearnedSubspace(WIDTH, 4, seed=0).partition({"a": 2, "b": 2}))},
            {Site(B, 1): {"a": torch.randn(2, 5, WIDTH), "b": torch.randn(2, 4, WIDTH)}},
            ValueError,
            r"row 0 of the base has 5 positions and its source.* has 4",
        ),
        ({Site(B, 1, "9"): free}, {}, IndexError, r"'9' is outside row 0"),
        ({Site(B, 1, "5"): free}, {}, IndexError, r"outside row 0, whose prompt has 5 tokens"),
        ({Site(B, 3): free}, {}, IndexError, r"layers 0 to 2"),
        ({Site(B, 1, "verb"): free}, {}, KeyError, r"'verb'"),
        ({Site("third.output"): free}, {}, ValueError, r"no submodule 'third'"),
    ],
)
def test_refused_before_anything_runs(
    counted: tuple[Backbone, list[int]],
    edits: dict[Site, Any],
    sources: dict[Site, Any],
    error: type[Exception],
    message: str,
) -> None:
    door, calls = counted
    given = inputs("llama", 2, 5)
    calls.clear()
    with pytest.raises(error, match=message):
        forward(door, given, edits, sources=sources)
    assert not calls
    forward(door, given, {Site(B, 1): free})
    assert len(calls) == 1


def test_overlap_is_judged_row_by_row(counted: tuple[Backbone, list[int]]) -> None:
    """f2 and l2 overlap in a row of three tokens alone; with prompts of 2 + 2 they do not."""
    door, calls = counted
    edits = {Site(B, 1, "f2"): free, Site(B, 1, "l2"): free}
    calls.clear()
    with pytest.raises(ValueError, match="row 1 of the batch"):
        forward(door, inputs("llama", 3, 5, lengths=(5, 3, 4)), edits)
    assert not calls
    forward(door, inputs("llama", 3, 5, lengths=(5, 4, 4)), edits)
    forward(door, inputs("llama", 3, 5), {Site(B, 1): free, Site(B, 0): free, Site("block_input", 1): free})
    forward(door, inputs("llama", 3, 5), {Site(H, 1, heads=[0]): free, Site(H, 1, heads=[1]): free})
    # Filling of ragged rows is no position: the second row has none but its first in both sets.
    columns = {"a": torch.tensor([[1, 2], [0, -1], [1, -1]]), "b": torch.tensor([[3, -1], [1, 2], [0, -1]])}
    forward(door, Batch(inputs("llama", 3, 5), columns=columns), {Site(B, 1, "a"): free, Site(B, 1, "b"): free})


def test_positions_of_a_stream_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match="no position axis"):
        forward(backbone("mlp"), inputs("mlp"), {Site("first.output", positions="last"): free})
    with pytest.raises(ValueError, match="no position axis"):
        collect(Backbone(nn.Sequential(nn.Linear(3, 2))), torch.randn(2, 3), [Site("0.output", positions="last")])


@torch.no_grad()
def test_a_plain_modules_stream_has_positions_by_path() -> None:
    """As by layer: the second axis of what a module gives, whatever tokens are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    door, steps, others = Backbone(model), *torch.randn(2, 4, 5, 3, dtype=torch.float64)
    states = model[:2](steps)
    for positions, own in (("last", [4]), ("1", [1]), ("f1+l2", [0, 3, 4])):
        site = Site("1.output", positions=positions)
        found = collect(door, steps, [site])
        assert torch.equal(found[site], states[:, own])
        expected = model[:2](others)
        expected[:, own] = states[:, own]
        written = forward(door, others, {site: full_vector(WIDTH)}, sources=found)
        torch.testing.assert_close(written, model[2](expected))
    with pytest.raises(IndexError, match="5"):
        collect(door, steps, [Site("1.output", positions="7")])


@torch.no_grad()
def test_modules_that_end_together_are_read_from_the_inside() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh())), nn.Linear(5, 2)
    )
    door, given = Backbone(model.double()), torch.randn(6, 3, dtype=torch.float64)
    inner, middle, outer = (Site(f"{path}.output") for path in ("0.1.1", "0.1", "0"))
    for sites in itertools.permutations((inner, middle, outer)):
        found = collect(door, given, sites)
        assert all(torch.equal(found[site], model[0](given)) for site in sites)
    shift = {site: (lambda h, by=by: h + by) for site, by in ((outer, 1.0), (inner, 2.0), (middle, 4.0))}
    torch.testing.assert_close(forward(door, given, shift), model[1](model[0](given) + 7))


class Pooled(nn.Module):
    """A transformer with one vector a row behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build("bert").bert
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(torch.tanh(self.pooler(states[:, 0])))


class Backwards(nn.Module):
    """Runs its second module first, and its third never."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.sooner, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.later(self.sooner(x))


@torch.no_grad()
def test_modules_that_run_in_another_order_or_never_are_refused() -> None:
    model, given = Backwards(), torch.randn(2, 4)
    backbone = Backbone(model)
    sooner, later, never = (Site(f"{name}.output") for name in ("sooner", "later", "never"))
    for sites, named in (([later, sooner], "later.output.*sooner.output"), ([never], "never.output")):
        for run in (
            lambda sites=sites: collect(backbone, given, sites),
            lambda sites=sites: forward(backbone, given, dict.fromkeys(sites, free)),
        ):
            with pytest.raises(ValueError, match=f"does not run.*{named}.*order"):
                run()
    for site, expected in ((sooner, model.sooner(given)), (later, model(given))):
        assert torch.equal(collect(backbone, given, [site])[site], expected)


@torch.no_grad()
def test_stream_with_one_vector_a_row() -> None:
    model = Pooled().double()
    door, site, given = Backbone(model), Site("pooler.output"), ragged("bert")
    states = collect(door, ragged("bert", seed=1), [site])
    assert states[site].shape == (3, WIDTH)
    found = forward(door, given, {site: full_vector(WIDTH)}, sources=states)
    torch.testing.assert_close(found, model.head(torch.tanh(states[site])))
    assert differ(found, model(**given)) > 0.01
    for positions in ("last", "1:3"):
        with pytest.raises(ValueError, match="has no position axis"):
            collect(door, given, [site.at(positions)])
        with pytest.raises(ValueError, match="has no position axis"):
            forward(door, given, {site.at(positions): free})


# --- traps the peers fell into ------------------------------------------------------------------------------


@torch.no_grad()
def test_trap_single_position_and_then_a_position_for_each_row() -> None:
    """After a site given by one number, sites by row must still be taken row by row."""
    given, model, edit = ragged("gpt2"), build("gpt2"), strong(WIDTH)
    spot = spots("gpt2", 1)["block_output"]
    batch = Batch(given, columns={"word": torch.tensor([9, 2, 0])})
    both = {Site("block_output", 0, "0"): strong(WIDTH, seed=1), Site("block_output", 1, "word"): edit}
    early = spots("gpt2", 0)["block_output"]
    acts = {
        early: editing(by_hand(both[Site("block_output", 0, "0")]), [[0], [0], [0]], early),
        spot: editing(by_hand(edit), [[9], [2], [0]], spot),
    }
    with hooked(model, acts):
        expected = call(model, given)
    assert differ(output("gpt2", batch, both), expected) < 1e-6
    acts[spot] = editing(by_hand(edit), [[9], [9], [9]], spot)  # the trap: example 0's for all
    with hooked(model, acts):
        assert differ(call(model, given), expected) > 1e-3


@torch.no_grad()
def test_trap_two_positions_are_two() -> None:
    given, model, edit = inputs("gpt2", 2, 6), build("gpt2"), strong(WIDTH)
    spot = spots("gpt2", 1)["block_output"]
    for positions in ([2, 3], [1, 2, 3], slice(2, 4), "2+3"):
        at = [1, 2, 3] if positions == [1, 2, 3] else [2, 3]
        with hooked(model, {spot: editing(by_hand(edit), [at, at], spot)}):
            expected = call(model, given)
        found = output("gpt2", given, {Site("block_output", 1, positions): edit})
        assert differ(found, expected) < 1e-6
        with hooked(model, {spot: editing(by_hand(edit), [[3], [3]], spot)}):
            assert differ(found, call(model, given)) > 1e-3


@torch.no_grad()
def test_trap_tied_intervention_edits_each_layer_with_its_own_base() -> None:
    given, model, edit = ragged("llama"), build("llama"), strong(WIDTH)
    places = [spots("llama", layer)["block_output"] for layer in (0, 2)]
    rows = rows_of("llama", "block_output", "last")
    with hooked(model, {spot: editing(by_hand(edit), rows, spot) for spot in places}):
        expected = call(model, given)
    found = output("llama", given, {Site("block_output", layer, "last"): edit for layer in (0, 2)})
    assert differ(found, expected) < 1e-6
    one = output("llama", given, {Site("block_output", 2, "last"): edit})
    assert differ(one, found) > 1e-3
    # The same with sources: one subspace on two layers, each with the states of its own layer.
    shared, source = interchange(LearnedSubspace(WIDTH, 6, seed=0)), ragged("llama", seed=1)
    sites = [Site("block_output", layer, "last") for layer in (0, 2)]
    basis = shared.subspace.basis().double()
    acts = {}
    for spot in places:
        read = capture(model, source, spot)

        def act(value: Any, read: Tensor = read) -> Tensor:
            new = value.clone()
            assert rows is not None
            for row, (at,) in enumerate(rows):
                new[row, at] = value[row, at] + (read[row, at] - value[row, at]) @ basis.T @ basis
            return new

        acts[spot] = act
    with hooked(model, acts):
        expected = call(model, given)
    states = collect(backbone("llama"), source, sites)
    found = output("llama", given, dict.fromkeys(sites, shared), sources=states)
    assert differ(found, expected) < 1e-6 < 1e-3 < differ(found, call(model, given))
    exchanged = {sites[0]: states[sites[1]], sites[1]: states[sites[0]]}
    assert differ(output("llama", given, dict.fromkeys(sites, shared), sources=exchanged), found) > 1e-3


@torch.no_grad()
def test_trap_two_untied_rotations() -> None:
    """Two rotated layers at once, in the subspaces of two interventions, with one source each."""
    base, first, second = (inputs("neox", 3, LENGTH, seed) for seed in (0, 1, 2))
    door, model = backbone("neox"), build("neox")
    sites = [Site("block_output", 0, "last"), Site("attention_output", 2, "1:3")]
    edits = {site: interchange(LearnedSubspace(WIDTH, 5, seed=i)) for i, site in enumerate(sites)}
    states = {site: collect(door, given, [site])[site] for site, given in zip(sites, (first, second), strict=True)}
    acts = {}
    for site, given, at in zip(sites, (first, second), ([10], [1, 2]), strict=True):
        assert site.layer is not None
        spot, basis = spots("neox", site.layer)[site.component], edits[site].subspace.basis().double()
        read = capture(model, given, spot)

        def act(value: Any, read: Tensor = read, at: list[int] = at, basis: Tensor = basis) -> Tensor:
            new = value.clone()
            for row in range(3):
                for j in at:
                    new[row, j] = value[row, j] + (read[row, j] @ basis.T - value[row, j] @ basis.T) @ basis
            return new

        acts[spot] = act
    with hooked(model, acts):
        expected = call(model, base)
    assert differ(output("neox", base, edits, sources=states), expected) < 1e-6
    assert differ(expected, call(model, base)) > 1e-3


def test_trap_eval_and_train_reach_the_interventions() -> None:
    edit = loreft(WIDTH, 4, seed=0, start="paper", dropout=0.5)
    given, site = ragged("llama"), Site("block_output", 1)
    once, again = (output("llama", given, {site: edit}) for _ in range(2))
    assert not torch.equal(once, again)
    edit.eval()
    once, again = (output("llama", given, {site: edit}) for _ in range(2))
    assert torch.equal(once, again)


@torch.no_grad()
def test_autocast_around_the_model() -> None:
    """Under autocast the stream is bfloat16 in places; edits compute in float32 and give back what they got."""
    given, model, edit = ragged("llama"), build("llama"), strong(WIDTH)
    for component in ("block_output", "head_output", "attention_output"):
        spot = spots("llama", 1)[component]
        rows = rows_of("llama", component, "f1+l1")

        def exactly(h: Tensor, edit: Intervention = edit) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return by_hand(edit)(h)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            with hooked(model, {spot: editing(exactly, rows, spot)}):
                expected = call(model, given)
            found = output("llama", given, {Site(component, 1, "f1+l1"): edit})
            assert torch.equal(found, expected)
            assert not torch.equal(found, call(model, given))


def test_zero_ablation_and_constants_run_everywhere() -> None:
    given, site = ragged("gpt2"), Site("mlp_activation", 1, "last")
    subspace = random_subspace(48, 4, 0)
    edit = zero_ablation(subspace)
    door = backbone("gpt2")
    after = forward(door, given, {site: edit, Site("mlp_output", 1, "last"): consreft(WIDTH, 2, seed=0)})
    assert differ(after.logits, call(door.model, given)) > 1e-4
    # The edited value is what the layers above see.
    seen: Any = []
    forward(door, given, {site: edit, Site("block_output", 2): lambda h: seen.append(h) or h})
    plain = collect(door, given, [Site("block_output", 2)])[Site("block_output", 2)]
    there = ~plain.isnan()
    assert differ(seen[0].detach()[there], plain[there]) > 1e-4


def test_masks_without_ids_and_unpadded_decoders() -> None:
    """inputs_embeds instead of ids; every decoder gives the rows it was given alone."""
    given, model = ragged("gpt2"), build("gpt2")
    embedded = {
        "inputs_embeds": model.transformer.wte(given["input_ids"]).detach(),
        "attention_mask": given["attention_mask"],
    }
    edits = {Site("block_output", 1, "last"): strong(WIDTH)}
    with torch.no_grad():
        assert differ(output("gpt2", embedded, edits), output("gpt2", given, edits)) < 1e-6
    without = {"input_ids": given["input_ids"]}
    states = collect(backbone("gpt2"), without, [Site("block_output", 1, "last")])[Site("block_output", 1, "last")]
    assert torch.equal(states[:, 0], capture(model, without, spots("gpt2", 1)["block_output"])[:, -1])
    assert len(DECODERS) == 12
