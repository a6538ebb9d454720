"""Generation that makes other passes over the model: with assistants, guesses from the prompt, guidance, chunks.

What is right is told by plain greedy generation of the edited model, token by token without a cache.
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from families import fresh, inputs
from test_reft_generate import adapted

from subspace_lab.model.intervene import generate
from subspace_lab.reft import ReftConfig, get_reft_model

NEW = 10


def prompt(name: str) -> dict[Any, Any]:
    """One example, of which tokens come again, so that something can be guessed from it."""
    ids = torch.tensor([[7, 21, 22, 23, 9, 21, 22, 40, 7, 21]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def other(name: str) -> Any:
    """An assistant of the same vocabulary that guesses some tokens right and others wrong."""
    model = fresh(name)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def written(model: Any, given: dict[str, Any], **options: Any) -> Any:
    return model.generate(**given, **{"max_new_tokens": NEW, "do_sample": False, "min_new_tokens": NEW, **options})


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_way_to_guess_gives_the_greedy_tokens(name: str, every_token: bool) -> None:
    model, given = adapted(name, "f2+l2" if not every_token else "last"), prompt(name)
    expected = written(model, given, every_token=every_token, use_cache=False)
    with model.disable_adapter():
        assert not torch.equal(written(model, given), expected)
    # One token after another by plain forwards, with positions counted in the prompt.
    ids, n = given["input_ids"], given["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(NEW if not every_token else 0):
            logits = model(input_ids=ids, prompt_lengths=torch.tensor([n])).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert every_token or torch.equal(ids, expected)
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        {"assistant_model": other(name)},
        {"assistant_model": fresh(name)},
    )
    for way in ways:
        found = written(model, given, every_token=every_token, **way)
        assert torch.equal(found, expected), way


def test_guesses_behind_a_prompt_whose_beginning_is_cached_are_refused() -> None:
    """transformers runs the cached tokens once more then, and gives other tokens than greedy for any model."""
    model, given = adapted("llama", "last"), prompt("llama")
    first = written(model, given, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[21, 22, 23, 21, 22]])], 1)
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": other("llama")}):
        with pytest.raises(ValueError, match="also the 12 tokens that are in the cache"):
            model.generate(ids, cache=copy.deepcopy(first.past_key_values), max_new_tokens=3, **way)
    model.generate(ids, cache=first.past_key_values, max_new_tokens=3)


@pytest.mark.parametrize("every_token", [False, True])
def test_assistants_that_run_the_models_own_layers_are_refused(every_token: bool) -> None:
    model, given = adapted("llama"), prompt("llama")
    base: Any = model.base_model
    parts = transformers.LlamaForCausalLM(base.config)
    parts.model = base.model
    reft = get_reft_model(fresh("llama"), ReftConfig(rank=2))
    for way, sentence in (
        ({"assistant_early_exit": 1}, "assistant_early_exit guesses tokens with the model's own"),
        ({"assistant_model": base}, "assistant_model is, or has parts of, the model"),
        ({"assistant_model": model}, "assistant_model is, or has parts of, the model"),
        ({"assistant_model": parts}, "assistant_model is, or has parts of, the model"),
        ({"generation_config": transformers.GenerationConfig(assistant_early_exit=1)}, "assistant_early_exit"),
    ):
        with pytest.raises(ValueError, match=sentence):
            written(model, given, every_token=every_token, **way)
    expected = written(model, given, every_token=every_token)
    assert torch.equal(written(model, given, every_token=every_token, assistant_model=reft), expected)
    with model.disable_adapter():  # nothing is edited, so nothing can be taken for something else
        assert torch.equal(written(model, given, assistant_early_exit=1), written(base, given))


def test_chunks_are_refused_in_the_function_too() -> None:
    model, given = adapted("gpt2"), prompt("gpt2")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model.backbone, given, model.edits(), max_new_tokens=2, prefill_chunk_size=4)
    base = fresh("gpt2")
    base.generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        get_reft_model(base, ReftConfig(rank=2)).generate(**given, max_new_tokens=2)


def test_guidance_edits_the_prompt_and_not_the_run_without_it() -> None:
    """Greedy by hand: scale times the edited log-probabilities, and the rest of the plain model's without prompt."""
    model, given, scale = adapted("llama", "l2"), prompt("llama"), 1.5
    ids, n = given["input_ids"], given["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(5):
            edited = model(input_ids=ids, prompt_lengths=torch.tensor([n])).logits[:, -1].log_softmax(-1)
            with model.disable_adapter():
                alone = model(input_ids=ids[:, n - 1 :]).logits[:, -1].log_softmax(-1)
            ids = torch.cat([ids, (scale * (edited - alone) + alone).argmax(-1)[:, None]], 1)
    found = written(model, given, guidance_scale=scale, max_new_tokens=5, min_new_tokens=0)
    assert torch.equal(found, ids[:, : found.shape[1]])
    for options in ({"every_token": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match=r"guidance_scale=1\.5 runs the model a second time"):
            written(model, given, guidance_scale=scale, **options)


def whisper(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=80,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=40,
        decoder_start_token_id=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **options,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_detecting_the_language_is_refused_before_the_first_pass() -> None:
    base = whisper()
    config = base.generation_config
    config.is_multilingual, config.lang_to_id = True, {"<|en|>": 10, "<|de|>": 11}
    config.task_to_id, config.no_timestamps_token_id = {"transcribe": 12, "translate": 13}, 14
    model = get_reft_model(
        base, ReftConfig(rank=2, component="encoder.block_output", positions="all", start="paper")
    )
    sound = torch.randn(2, 8, 60)
    with pytest.raises(ValueError, match="language='en'"):
        model.generate(sound, max_new_tokens=4)
    options: dict[str, Any] = {
        "language": "en",
        "max_new_tokens": 4,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = model.generate(sound, **options)
    with model.disable_adapter():
        plain = model.generate(sound, **options)
    assert not torch.equal(found.logits[0], plain.logits[0])


@pytest.mark.parametrize("name", ["llama"])
def test_padding_and_samples_as_before(name: str) -> None:
    model, given = adapted(name), inputs(name, lengths=(11, 5, 9), padding="left")
    torch.manual_seed(3)
    one = model.generate(**given, max_new_tokens=5, do_sample=True, every_token=True)
    torch.manual_seed(3)
    other_way = model.generate(**given, max_new_tokens=5, do_sample=True, every_token=True, use_cache=False)
    assert torch.equal(one, other_way)
