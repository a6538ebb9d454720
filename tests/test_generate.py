"""Generation with an edited prompt: cached and uncached, batched and single, beside hooks; padding anywhere."""

import copy
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers
from families import (
    DECODERS,
    ENCODERS,
    WIDTH,
    Spot,
    by_hand,
    call,
    differ,
    editing,
    exact,
    heads,
    hooked,
    inputs,
    rounding,
    spots,
    standing,
    state,
)
from torch import Tensor

from subspace_lab.core.interventions import Intervention, interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward, generate

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3", "neox")
LENGTH, NEW = 11, 6  # the prompt is longer than Gemma 3's window of 8
RAGGED = (11, 5, 9)
BACKBONES: dict = {}
ROUNDING = rounding(torch.float64)


def build(name: str) -> Any:
    return families.build(name, exact(name))


def fresh(name: str) -> Any:
    return families.fresh(name, exact(name))


def backbone(name: str) -> Any:
    if name not in BACKBONES:
        BACKBONES[name] = Backbone(build(name))
    return BACKBONES[name]


def strong(width: int, seed: int = 0) -> Intervention:
    edit: Any = loreft(width, 4, seed=seed, start="paper")
    with torch.no_grad():
        edit.value.bias.add_(3.0)
    return edit


def prompts(name: str, seed: int = 0, lengths: tuple[int, ...] | None = None) -> dict[Any, Any]:
    given = inputs(name, 3, LENGTH, seed, lengths=lengths, padding="left")
    return {key: value for key, value in given.items() if not key.startswith("decoder")}


def several(name: str) -> dict[Site, tuple[Any, Spot]]:
    """Edits of three components in three layers, as {site: (edit, spot)}."""
    places = [("block_output", 0, "f1+l1"), ("head_output", 1, "last"), ("attention_output", 2, "1:3")]
    found = {}
    for i, (component, layer, positions) in enumerate(places):
        count, size = heads(name, component) if component == "head_output" else (1, WIDTH)
        found[Site(component, layer, positions)] = strong(count * size, i), spots(name, layer)[component]
    return found


def edits_of(name: str) -> dict[Any, Any]:
    return {site: edit for site, (edit, _) in several(name).items()}


def run(
    name: str,
    given: Any,
    edits: dict[Site, Any],
    **options: Any,
) -> tuple[Any, Tensor]:
    """(tokens, logits of every step) of a generation."""
    out = generate(backbone(name), given, edits, **asked(options))
    return out.sequences, torch.stack(out.logits)


def asked(options: dict[str, Any]) -> dict[Any, Any]:
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }


def plain(model: Any, given: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
    out = model.generate(**given, **asked(options))
    return out.sequences, torch.stack(out.logits)


def prefill_hooks(
    edits: dict[Site, tuple[Any, Spot]], lengths: tuple[int, ...], length: int = LENGTH, rows: int = 3
) -> dict[Any, Callable[..., Any]]:
    """Hooks that edit the pass over the prompt (more than one token) and let every later pass be."""
    acts = {}
    for site, (edit, spot) in edits.items():
        at = standing(site.positions, lengths, length, "left")

        def act(value: Any, edit: Any = edit, spot: Spot = spot, at: list[list[int]] = at) -> Tensor | None:
            if value.shape[1] < length:
                return None
            repeated = [columns for columns in at for _ in range(len(value) // rows)]
            return editing(by_hand(edit), repeated, spot)(value)

        acts[spot] = act
    return acts


# --- the prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(LENGTH,) * 3, RAGGED], ids=["full", "left-padded"])
def test_cached_uncached_and_hooks_agree(name: str, lengths: tuple[int, ...]) -> None:
    given, model = prompts(name, lengths=lengths), build(name)
    edits = edits_of(name)
    tokens, logits = run(name, given, edits)
    assert tokens.shape == (3, LENGTH + NEW) and torch.equal(tokens[:, :LENGTH], given["input_ids"])
    uncached, same = run(name, given, edits, use_cache=False)
    assert torch.equal(uncached, tokens) and differ(same, logits) < ROUNDING
    with hooked(model, prefill_hooks(several(name), lengths)):
        by_hooks, expected = plain(model, given)
    assert torch.equal(by_hooks, tokens) and differ(logits, expected) < ROUNDING
    # The control: without the edits other tokens come, and an edit that is lost after the prefill would show.
    without, others = plain(model, given)
    assert not torch.equal(without, tokens) and differ(others, logits) > 0.01
    with hooked(model, prefill_hooks(several(name), lengths)):
        lost, _ = plain(model, given, use_cache=False, max_new_tokens=1)
    assert torch.equal(lost, tokens[:, : LENGTH + 1])


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_generated_as_if_alone(name: str) -> None:
    given, edits = prompts(name, lengths=RAGGED), edits_of(name)
    tokens, logits = run(name, given, edits)
    for row, n in enumerate(RAGGED):
        alone = {key: value[row : row + 1, LENGTH - n :] for key, value in given.items()}
        assert bool(alone["attention_mask"].all())
        single, expected = run(name, alone, edits)
        assert torch.equal(single[0, n:], tokens[row, LENGTH:])
        assert differ(logits[:, row], expected[:, 0]) < ROUNDING


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_samples(name: str) -> None:
    given, model = prompts(name, lengths=RAGGED), build(name)
    edits, acts = edits_of(name), prefill_hooks(several(name), RAGGED)
    for options in (
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0, "num_beams": 2},
    ):
        results = []
        for way in ("ours", "uncached", "hooks", "plain"):
            torch.manual_seed(7)
            if way == "hooks":
                with hooked(model, acts):
                    results.append(plain(model, given, **options)[0])
            elif way == "plain":
                results.append(plain(model, given, **options)[0])
            else:
                results.append(run(name, given, edits, use_cache=way == "ours", **options)[0])
        assert len(results[0]) == 3 * options.get("num_return_sequences", 1)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), options
        assert not torch.equal(results[0], results[3]), options


def test_prompt_is_edited_once() -> None:
    given, calls = prompts("llama"), []

    def counting(h: Tensor) -> Any:
        calls.append(tuple(h.shape))
        return h

    edits = {Site("block_output", 1, "last"): counting, Site("block_output", 2, "1:3"): counting}
    run("llama", given, edits)
    assert calls == [(3, 1, WIDTH), (3, 2, WIDTH)]
    calls.clear()
    run("llama", given, edits, use_cache=False)
    assert calls == [(3, 1, WIDTH), (3, 2, WIDTH)] * NEW
    calls.clear()
    run("llama", given, {Site("block_output", 1): counting}, use_cache=False)
    assert calls == [(3, LENGTH, WIDTH)] * NEW  # all of the prompt and nothing of what is added


def test_cache_setting_is_read_where_generate_reads_it() -> None:
    """Keyword before the given configuration before the model's own; the architecture's `use_cache` counts not."""
    model = fresh("llama")
    door, given, calls = Backbone(model), prompts("llama"), []
    edit = strong(WIDTH)

    def counting(h: Tensor) -> Any:
        calls.append(1)
        return edit(h)

    def steps(**options: Any) -> int:
        calls.clear()
        tokens = generate(door, given, {Site("block_output", 1, "last"): counting}, **options)
        assert torch.equal(tokens, expected)
        return len(calls)

    length: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = generate(door, given, {Site("block_output", 1, "last"): edit}, **length)
    config = transformers.GenerationConfig(use_cache=False, pad_token_id=0, **length)
    assert steps(**length) == 1
    assert steps(use_cache=False, **length) == NEW
    assert steps(generation_config=config) == NEW
    model.config.use_cache = False
    assert steps(**length) == 1
    model.generation_config.use_cache = False
    assert steps(**length) == NEW
    assert steps(use_cache=True, **length) == 1


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_sources_in_generation(name: str) -> None:
    """Interchange at the last prompt token: greedy, and in beams where rows are repeated."""
    base, source, model, door = prompts(name), prompts(name, 1), build(name), backbone(name)
    site, spot = Site("block_output", 1, "last"), spots(name, 1)["block_output"]
    subspace = random_subspace(WIDTH, 20, 0)
    basis, states = subspace.basis().double(), collect(door, source, [site])
    edits = {site: interchange(subspace)}

    def act(value: Any) -> Tensor | None:
        if value.shape[1] < LENGTH:
            return None
        new = value.clone()
        read = states[site][:, 0].repeat_interleave(len(value) // 3, 0)
        new[:, -1] = value[:, -1] + (read - value[:, -1]) @ basis.T @ basis
        return new

    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        with hooked(model, {spot: act}):
            expected, logits = plain(model, base, **options)
        tokens, found = run(name, base, edits, sources=states, **options)
        assert differ(found, logits) < ROUNDING
        uncached, _ = run(name, base, edits, sources=states, use_cache=False, **options)
        assert torch.equal(tokens, expected) and torch.equal(uncached, expected)
        turned = {site: states[site].roll(1, 0)}
        assert differ(run(name, base, edits, sources=turned, **options)[1][0], logits[0]) > 1e-3


def test_prompt_lengths_and_columns_in_generation() -> None:
    given, model, edit = prompts("llama", lengths=RAGGED), build("llama"), strong(WIDTH)
    batch = Batch(given, torch.tensor([4, 5, 2]), {"word": torch.tensor([2, 0, 1])})
    spot = spots("llama", 1)["block_output"]
    for positions, rows in (("last", [[3], [10], [3]]), ("word", [[2], [6], [3]])):

        def act(value: Any, rows: list[list[int]] = rows) -> Tensor | None:
            return editing(by_hand(edit), rows, spot)(value) if value.shape[1] == LENGTH else None

        with hooked(model, {spot: act}):
            expected, logits = plain(model, given)
        tokens, found = run("llama", batch, {Site("block_output", 1, positions): edit})
        assert torch.equal(tokens, expected) and differ(found, logits) < ROUNDING
        assert differ(found, plain(model, given)[1]) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_every_token_when_asked_for(name: str) -> None:
    given, model, edit = prompts(name, lengths=RAGGED), build(name), strong(WIDTH)
    site, spot = Site("block_output", 1, "last"), spots(name, 1)["block_output"]
    with hooked(model, {spot: lambda value: torch.cat([value[:, :-1], by_hand(edit)(value[:, -1:])], 1)}):
        expected, logits = plain(model, given)
    tokens, found = run(name, given, {site: edit}, every_token=True)
    uncached, same = run(name, given, {site: edit}, every_token=True, use_cache=False)
    assert torch.equal(tokens, expected) and differ(found, logits) < ROUNDING
    assert torch.equal(uncached, expected) and differ(same, logits) < ROUNDING
    assert differ(run(name, given, {site: edit})[1], logits) > 1e-3
    with pytest.raises(ValueError, match="no tokens to swap"):
        states = collect(backbone(name), given, [site])
        run(name, given, {site: interchange(random_subspace(WIDTH, 2, 0))}, sources=states, every_token=True)


# --- encoder and decoder ------------------------------------------------------------------------------------


def t5_edits() -> dict[Any, Any]:
    places = [("encoder.block_output", 1, "f1+l1"), ("encoder.head_output", 2, "last")]
    return {
        Site(component, layer, positions): (strong(WIDTH, i), spots("t5", layer)[component])
        for i, (component, layer, positions) in enumerate(places)
    }


@pytest.mark.parametrize("lengths", [(LENGTH,) * 3, RAGGED], ids=["full", "left-padded"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_encoder_edits_of_t5(lengths: tuple[int, ...], use_cache: bool) -> None:
    given, model = prompts("t5", lengths=lengths), build("t5")
    calls: Any
    several, calls = t5_edits(), []
    edits = {site: (lambda h, edit=edit: calls.append(1) or edit(h)) for site, (edit, _) in several.items()}
    with hooked(model, prefill_hooks(several, lengths)):
        expected, logits = plain(model, given, use_cache=use_cache)
    tokens, found = run("t5", given, edits, use_cache=use_cache)
    assert torch.equal(tokens, expected) and differ(found, logits) < ROUNDING
    assert differ(found, plain(model, given)[1]) > 1e-3
    assert len(calls) == 2  # the encoder runs once, cache or no cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_encoder_and_decoder_edits_of_t5_together(use_cache: bool) -> None:
    """The decoder's prompt is its start token. Uncached, that token runs again at every step, the encoder not."""
    given, model = prompts("t5"), build("t5")
    several = t5_edits()
    site, spot, edit = Site("decoder.block_output", 1), spots("t5", 1)["decoder.block_output"], strong(WIDTH, 9)
    starts: list[Any] = []

    def act(value: Any) -> Tensor | None:
        if use_cache and starts:
            return None
        starts.append(1)
        return torch.cat([by_hand(edit)(value[:, :1]), value[:, 1:]], 1)

    with hooked(model, {**prefill_hooks(several, (LENGTH,) * 3), spot: act}):
        expected, logits = plain(model, given, use_cache=use_cache)
    edits = {**{s: e for s, (e, _) in several.items()}, site: edit}
    tokens, found = run("t5", given, edits, use_cache=use_cache)
    assert torch.equal(tokens, expected) and differ(found, logits) < ROUNDING
    only, others = run("t5", given, {s: e for s, e in edits.items() if s != site}, use_cache=use_cache)
    # The control, at each step: the start token is edited in all of them.
    assert only.shape == tokens.shape
    assert all(differ(found[step], others[step]) > 1e-4 for step in range(NEW))


def test_every_token_of_t5s_decoder() -> None:
    given, model, edit = prompts("t5"), build("t5"), strong(WIDTH, 9)
    site, spot = Site("decoder.block_output", 1), spots("t5", 1)["decoder.block_output"]
    encoder = Site("encoder.block_output", 1, "last")
    both = {site: edit, encoder: strong(WIDTH, 3)}
    acts = prefill_hooks({encoder: (both[encoder], spots("t5", 1)["encoder.block_output"])}, (LENGTH,) * 3)
    with hooked(model, {**acts, spot: lambda value: by_hand(edit)(value)}):
        expected, logits = plain(model, given)
    for use_cache in (True, False):
        tokens, found = run("t5", given, both, every_token=True, use_cache=use_cache)
        assert torch.equal(tokens, expected) and differ(found, logits) < ROUNDING
    assert differ(run("t5", given, both)[1], logits) > 1e-3


def test_decoder_prompts_must_hold_the_start_token() -> None:
    given, edit, spot = inputs("t5", 3, LENGTH), strong(WIDTH, 9), spots("t5", 1)["decoder.block_output"]
    site, door = Site("decoder.block_output", 1, "last"), backbone("t5")
    with pytest.raises(ValueError, match="puts the start token 0 before decoder_input_ids"):
        run("t5", given, {site: edit})
    given["decoder_input_ids"][:, 0] = 0
    tokens, logits = run("t5", given, {site: edit})
    with hooked(door.model, prefill_hooks({site: (edit, spot)}, (LENGTH,) * 3)):
        expected, same = plain(door.model, given)
    assert torch.equal(tokens, expected) and differ(logits, same) < ROUNDING
    assert differ(plain(door.model, given)[1], logits) > 1e-3
    # The token that is edited is the one that a forward pass edits.
    seen: Any = []
    generate(door, given, {site: lambda h: seen.append(h.clone()) or h}, max_new_tokens=1)
    torch.testing.assert_close(seen[0], collect(door, given, [site])[site], atol=ROUNDING, rtol=ROUNDING)


# --- a guest, and what is refused ---------------------------------------------------------------------------


class Failure(Exception):
    pass


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generation_leaves_nothing_behind(name: str) -> None:
    model = fresh(name)
    given, door = prompts(name), Backbone(model)
    stack = "encoder." if name == "t5" else ""
    edits = {Site(f"{stack}block_output", 1, "last"): strong(WIDTH)}
    model.generate(**given, max_new_tokens=1)  # what a first generation sets up by itself
    before, kept = state(model), copy.deepcopy(given)
    generate(door, given, edits, max_new_tokens=2, do_sample=False)
    generate(door, given, edits, max_new_tokens=2, do_sample=False, use_cache=False)

    def failing(h: Tensor) -> Any:
        raise Failure

    for use_cache in (True, False):
        with pytest.raises(Failure):
            generate(door, given, dict.fromkeys(edits, failing), max_new_tokens=2, use_cache=use_cache)
        with pytest.raises(ValueError, match="shape and dtype must stay"):
            generate(door, given, dict.fromkeys(edits, lambda h: h[:0]), max_new_tokens=2, use_cache=use_cache)
    assert state(model) == before
    assert all(torch.equal(given[key], kept[key]) for key in kept)
    tokens = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, fresh(name).generate(**given, max_new_tokens=4, do_sample=False))
    assert torch.equal(generate(door, given, {}, max_new_tokens=4, do_sample=False), tokens)


def test_models_that_do_not_generate_are_refused() -> None:
    for name, given in (("mlp", inputs("mlp")), ("modernbert", inputs("modernbert"))):
        with pytest.raises(TypeError, match=r"(Sequential|ModernBertForMaskedLM) has no generate"):
            generate(backbone(name), given, {}, max_new_tokens=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sites_in_an_order_that_cannot_be_run_are_not_lost(use_cache: bool) -> None:
    """Submodules by path are visited as they are registered; where a model calls them otherwise, that is said.

    It is not taken for the end of the generation, as which the same exception comes.
    """
    calls: Any = []
    sites = [Site("model.layers.1.input_layernorm.output", positions="last"), Site("model.layers.1.mlp.output")]
    with pytest.raises(Exception, match=r"input_layernorm.* was requested but the model already ran past it"):
        run("llama", prompts("llama"), {s: lambda h: calls.append(1) or h for s in sites}, use_cache=use_cache)


# --- padding in a plain forward -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, "t5"])
@torch.no_grad()
def test_padding_on_either_side_is_the_row_alone(name: str) -> None:
    right, left = (inputs(name, 3, LENGTH, lengths=RAGGED, padding=side) for side in ("right", "left"))
    stack = "encoder." if name == "t5" else ""
    places = [(f"{stack}block_output", 1, "f1+l1"), (f"{stack}value_output", 2, "all")]
    edits = {}
    for component, layer, positions in places:
        count, size = heads(name, component) if "value" in component else (1, WIDTH)
        edits[Site(component, layer, positions)] = strong(count * size)
    for some in (edits, {}):
        found = [forward(backbone(name), given, some).logits for given in (right, left)]
        for row, n in enumerate(RAGGED):
            alone = {key: value[row : row + 1] for key, value in right.items()}
            for key in ("input_ids", "attention_mask"):
                alone[key] = alone[key][:, :n]
            expected = forward(backbone(name), alone, some).logits[0]
            parts = [found[0][row], found[1][row]] if name == "t5" else [found[0][row, :n], found[1][row, -n:]]
            for part in parts:
                assert differ(part, expected) < rounding(exact(name))
            assert not some or differ(call(build(name), alone)[0], expected) > 1e-3


@torch.no_grad()
def test_without_positions_a_left_padded_batch_would_differ() -> None:
    """The control of the test above: a plain forward of GPT-2 with left padding. One's own positions stay."""
    left, model, door = inputs("gpt2", 3, LENGTH, lengths=RAGGED, padding="left"), build("gpt2"), backbone("gpt2")
    mended = forward(door, left, {}).logits
    assert differ(call(model, left)[1, -5:], mended[1, -5:]) > 1e-3
    own = {**left, "position_ids": torch.arange(LENGTH).expand(3, -1)}
    assert torch.equal(forward(door, own, {}).logits, call(model, own))
    assert "position_ids" not in left
    spot = Spot("transformer.wpe", "input")
    seen = []
    with hooked(model, {spot: lambda ids: seen.append(ids.clone())}):
        forward(door, left, {})
    assert seen[0][1].tolist()[-5:] == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_kin_of_roberta_count_from_their_padding() -> None:
    """CamemBERT has RoBERTa's way of counting under another name."""
    config = transformers.CamembertConfig(**build("roberta").config.to_diff_dict() | {"model_type": "camembert"})
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    left, right = (inputs("roberta", 3, LENGTH, lengths=RAGGED, padding=side) for side in ("left", "right"))
    found, expected = (forward(Backbone(model), given, {}).logits for given in (left, right))
    for row, n in enumerate(RAGGED):
        assert differ(found[row, -n:], expected[row, :n]) < ROUNDING
    counted: dict[str, Any] = {**left, "position_ids": (left["attention_mask"].cumsum(-1) - 1).clamp_min(0)}
    assert differ(model(**counted).logits[1, -5:], expected[1, :5]) > 0.01  # the control: GPT-2's way of counting
