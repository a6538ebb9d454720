"""Generation with adapters: padding, caches, continued chats, streams, samples, beams, heads that stand in."""

import copy
import threading
from typing import Any

import pytest
import torch
from families import build, fresh, inputs
from test_reft_data import make_tokenizer
from torch import Tensor
from transformers import TextIteratorStreamer

from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import generate
from subspace_lab.reft import ReftConfig, ReftModel, get_reft_model

FAMILIES = ("gpt2", "llama", "qwen3", "gemma3", "neox")
LENGTHS, LENGTH, NEW = (11, 5, 9), 11, 6


def adapted(name: str, positions: str = "f2+l2", **options: Any) -> ReftModel:
    model = get_reft_model(
        build(name), ReftConfig(**{"rank": 3, "positions": positions, "start": "paper", **options})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def prompts(name: str, lengths: tuple[int, ...] = LENGTHS, padding: str = "left") -> Any:
    return inputs(name, lengths=lengths, padding=padding)


def written(model: ReftModel, given: dict[str, Any], **options: Any) -> Tensor:
    """The new tokens."""
    ids = model.generate(**given, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return ids[:, given["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_uncached_and_single_agree(name: str) -> None:
    model, given = adapted(name), prompts(name)
    found = written(model, given)
    assert torch.equal(found, written(model, given, use_cache=False))
    for row, n in enumerate(LENGTHS):
        alone = {k: v[row : row + 1, LENGTH - n :] for k, v in given.items()}
        assert torch.equal(written(model, alone)[0], found[row])
    with model.disable_adapter():
        plain = written(model, given)
    assert torch.equal(plain, build(name).generate(**given, max_new_tokens=NEW, do_sample=False)[:, LENGTH:])
    assert not torch.equal(plain, found)


def test_padding_is_told_by_the_pad_token_where_there_is_no_mask() -> None:
    model, given = adapted("llama"), prompts("llama")
    ids = given["input_ids"]
    assert torch.equal(written(model, {"input_ids": ids}, pad_token_id=0), written(model, given))
    full = prompts("llama", lengths=(11, 11, 11))["input_ids"]
    full[0, 0] = 0  # a pad token that also ends texts may be meant
    mask = torch.ones_like(full)
    expected = written(model, {"input_ids": full, "attention_mask": mask}, eos_token_id=0, pad_token_id=0)
    assert torch.equal(written(model, {"input_ids": full}, eos_token_id=0, pad_token_id=0), expected)


def test_every_token_when_asked_for() -> None:
    model, given = adapted("gpt2", "last"), prompts("gpt2")
    found = written(model, given, every_token=True)
    assert torch.equal(found, written(model, given, every_token=True, use_cache=False))
    assert not torch.equal(found, written(model, given))


def test_options_reach_the_base_models_generate_and_strange_ones_are_refused() -> None:
    model, given = adapted("gpt2"), prompts("gpt2")
    with pytest.raises(ValueError, match="noise_level"):
        written(model, given, noise_level=3)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        written(model, given, prefill_chunk_size=4)


# --- beams, samples, streams --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_beams_and_samples_are_those_of_the_base_model_where_nothing_is_changed(name: str) -> None:
    given, base = prompts(name), build(name)
    identity = get_reft_model(base, ReftConfig(rank=3, positions="f2+l2"))
    edited = adapted(name)
    options: dict[str, Any]
    for options in (
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        outcomes: list[Any] = []
        for model in (base, identity, edited, edited):
            torch.manual_seed(4)
            if len(outcomes) == 3:
                options = {**options, "use_cache": False}
            outcomes.append(written(model, given, **options))
        assert torch.equal(outcomes[0], outcomes[1])
        assert not torch.equal(outcomes[0], outcomes[2])
        assert torch.equal(outcomes[2], outcomes[3])


class Kept:
    """The simplest streamer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streams() -> None:
    model = adapted("llama")
    given: dict[str, Any] = {
        "input_ids": torch.tensor([[4, 7, 8, 9]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }
    whole = model.generate(**given, max_new_tokens=NEW, do_sample=False)[0]
    streamer = Kept()
    model.generate(**given, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert streamer.tokens == whole.tolist() and streamer.ended
    tokenizer = make_tokenizer()
    text = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options: dict[str, Any] = {**given, "max_new_tokens": NEW, "do_sample": False, "streamer": text}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(text)
    thread.join()
    assert "".join(pieces).split() == str(tokenizer.decode(whole[4:])).split()
    assert len(pieces) > 2, "it came all at once"


# --- continued chats ----------------------------------------------------------------------------------------

MORE = torch.tensor([[21, 22, 23, 24, 25], [26, 27, 28, 29, 30], [31, 32, 33, 34, 35]])


def two_turns(model: ReftModel, given: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """(the conversation up to its second answer, what the second turn was given, the cache before it)."""
    first = model.generate(**given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **options)
    ids = torch.cat([first.sequences, MORE], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(3, ids.shape[1] - LENGTH, dtype=torch.long)], 1)
    return {"input_ids": ids, "attention_mask": mask}, first.past_key_values


def edited_at(model: ReftModel, whole: dict[str, Tensor], positions: list[list[int]], **options: Any) -> Any:
    """The whole conversation run at once, with the model's edits at these positions of each row."""
    longest = max(map(len, positions))
    column = torch.tensor([row + [-1] * (longest - len(row)) for row in positions])
    edits = {site.at("turns"): edit for site, edit in model.edits().items()}
    batch = Batch(whole, columns={"turns": column})
    return generate(model.backbone, batch, edits, max_new_tokens=NEW, do_sample=False, **options)


def chosen(n: int, first: int, last: int) -> list[Any]:
    return [*range(first), *range(n - last, n)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_that_goes_on_is_the_whole_conversation_with_each_turns_edits(name: str) -> None:
    """Each turn's positions count the whole conversation up to it; what the cache holds is not edited again."""
    model, given = adapted(name), prompts(name)
    whole, cache = two_turns(model, given)
    assert cache.get_seq_length() == LENGTH + 2  # the last generated token has not run yet
    full: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}

    def continued(given: dict[str, Any]) -> tuple[Any, Tensor]:
        options: dict[str, Any] = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "past_key_values": copy.deepcopy(cache),
            **full,
        }
        found = model.generate(**given, **options)
        return found.sequences[:, given["input_ids"].shape[1] :], torch.stack(found.logits)

    def at_once(positions: list[list[Any]], **options: Any) -> tuple[Any, Tensor]:
        found = edited_at(model, whole, positions, **full, **options)
        return found.sequences[:, whole["input_ids"].shape[1] :], torch.stack(found.logits)

    first, second = [chosen(n, 2, 2) for n in LENGTHS], [chosen(n + 3 + 5, 2, 2) for n in LENGTHS]
    both = [sorted({*one, *two}) for one, two in zip(first, second, strict=True)]
    found = continued(whole)
    # The new tokens alone may be given too, with the mask of all of them.
    new = continued({**whole, "input_ids": whole["input_ids"][:, LENGTH + 2 :]})
    for other in (at_once(both), at_once(both, use_cache=False), new):
        assert torch.equal(other[0], found[0])
        torch.testing.assert_close(other[1], found[1], atol=1e-3, rtol=1e-3)
    # Controls: the second turn's edits matter, and so do those of the first that the cache holds.
    for part in (first, second):
        assert (at_once(part)[1][0] - found[1][0]).abs().max() > 0.05


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prefix_edits_of_a_continued_chat_are_those_of_one_long_prompt(name: str) -> None:
    model, given = adapted(name, "f3"), prompts(name)
    whole, cache = two_turns(model, given)
    assert torch.equal(written(model, whole, past_key_values=cache), written(model, whole))


def test_what_the_base_model_cached_stays_unedited() -> None:
    """A prefix that is shared between requests, say: only what comes after it is edited."""
    model, given = adapted("gpt2", "all"), prompts("gpt2")
    with model.disable_adapter():
        whole, cache = two_turns(model, given)
    after = [list(range(n + 2, n + 8)) for n in LENGTHS]
    found = written(model, whole, past_key_values=cache)
    assert torch.equal(found, edited_at(model, whole, after)[:, whole["input_ids"].shape[1] :])
    assert not torch.equal(found, written(model, whole))


def test_without_a_mask_the_ids_are_the_whole_conversation() -> None:
    model, given = adapted("gpt2"), prompts("gpt2", lengths=(11, 11, 11))
    whole, cache = two_turns(model, given)
    found = written(model, whole, past_key_values=copy.deepcopy(cache))
    assert torch.equal(written(model, {"input_ids": whole["input_ids"]}, past_key_values=cache), found)


@pytest.mark.parametrize("masked", [True, False])
def test_a_plain_forward_after_a_cache(masked: bool) -> None:
    model = adapted("llama", "l3")
    given = prompts("llama", lengths=(11, 11, 11))
    with torch.no_grad(), model.disable_adapter():
        first = model(**given, use_cache=True)
    ids = torch.cat([given["input_ids"], MORE], 1)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with torch.no_grad():
        found = model(input_ids=MORE, past_key_values=first.past_key_values, **mask).logits
        expected = model(input_ids=ids).logits[:, LENGTH:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- heads that were trained along --------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_head_that_stands_in_does_so_at_every_step(use_cache: bool) -> None:
    base = fresh("neox")
    config = ReftConfig(rank=3, positions="last", modules_to_save=("lm_head",))
    model, given = get_reft_model(base, config), prompts("neox")
    head: Any = model.adapter("default").saved["lm_head"]
    with torch.no_grad():
        head.weight.copy_(base.lm_head.weight.roll(7, 0))
    found = written(model, given, use_cache=use_cache)
    other = fresh("neox")
    with torch.no_grad():
        other.lm_head.weight.copy_(head.weight)
    assert torch.equal(found, written(other, given))
    assert not torch.equal(found, written(base, given))
