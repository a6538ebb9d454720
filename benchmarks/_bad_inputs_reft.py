"""Odd inputs for ReFT's Python interface, each with what it must come to: a list for programs that replay it.

A case is a small function of a scratch folder. It ends in one of two ways: refused (an exception of the type that is
named, whose message holds the expected text), or right (it returns true, having compared with what is known). All of
it is done with random models of a few thousand parameters, made here.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _bad_inputs_case import Case
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from subspace_lab.core.sites import Site
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import forward, generate
from subspace_lab.reft import PromptCollator, ReftConfig, ReftModel, from_pyreft, get_reft_model, to_pyreft
from subspace_lab.reft.harness import with_prompts

IDS = torch.tensor([[7, 21, 22, 23, 9, 21, 22, 40, 7, 21], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
TURNS = torch.tensor([-100, -100, -100, 23, 9, -100, -100, 40, 7, 21])  # two answers
NEW = 6


# --- models -------------------------------------------------------------------------------------------------


def llama(seed: int = 0, kind: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        **options,
    )
    return kind(config).eval()


def gpt2(kind: Any = transformers.GPT2LMHeadModel) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, num_labels=1
    )
    return kind(config).eval()


def bert(kind: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return kind(config).eval()


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config).eval()


def whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=40,
        decoder_start_token_id=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def adapted(positions: str = "l1", base: Any = None, **options: Any) -> ReftModel:
    """A model whose edits are far from the identity."""
    model = get_reft_model(
        llama() if base is None else base, ReftConfig(rank=2, positions=positions, start="paper", **options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: Any, **given: Any) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**given).logits


def close(one: Any, other: Any) -> bool:
    return bool(torch.allclose(one, other, atol=1e-4, rtol=1e-4))


# --- 6b: log-probabilities ----------------------------------------------------------------------------------


def fused(temperature: float, **named: Any) -> bool:
    from trl.trainer.utils import add_fused_lm_head

    model, labels = adapted(), IDS.where(torch.arange(10) > 5, -100)
    plain = logits(model, input_ids=IDS, labels=labels)[:, :-1] / temperature
    expected = plain.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    add_fused_lm_head(model, temperature=temperature)
    with torch.no_grad():
        found = model(IDS, labels=labels, fused_lm_head=True, **named).log_probs
    return close(found, expected.where(labels[:, 1:] != -100, 0))


# --- 7: ways to generate ------------------------------------------------------------------------------------


def guessed(every_token: bool = False, **way: Any) -> bool:
    """The tokens are those that no cache and no guess give."""
    model = adapted("l1" if every_token else "f1+l2")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "every_token": every_token}
    found = model.generate(IDS[:1], **options, **way)
    return bool(torch.equal(found, model.generate(IDS[:1], **options, use_cache=False)))


def with_itself(part: Callable[[ReftModel], Any]) -> Any:
    model = adapted()
    return model.generate(IDS[:1], max_new_tokens=2, assistant_model=part(model))


def from_cache(**way: Any) -> Any:
    model = adapted()
    first = model.generate(IDS[:1], max_new_tokens=2, return_dict_in_generate=True)
    cache = first.cache if hasattr(first, "cache") else first.past_key_values
    return model.generate(torch.cat([first.sequences, IDS[:1, :2]], 1), cache=cache, max_new_tokens=2, **way)


# --- 8: where prompts end -----------------------------------------------------------------------------------


def said(lengths: Any, expected: list[int] | None = None) -> bool:
    model = adapted("l1")
    with model.prompt_lengths(lengths):
        found = logits(model, input_ids=IDS)
    return expected is not None and close(
        found, logits(model, input_ids=IDS, prompt_lengths=torch.tensor(expected))
    )


def warned(positions: str, **given: Any) -> int:
    model = adapted(positions)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            model(input_ids=IDS, **given)
    return sum("taken as prompt" in str(w.message) for w in caught)


class Scorer:
    """What a harness of other people does: right padding by zeros, neither mask nor labels."""

    max_length, backend = 32, "causal"

    def __init__(self, model: Any) -> None:
        self.model = model

    def _loglikelihood_tokens(self, requests: list[Any]) -> list[Any]:
        rows = [torch.tensor([*p, *a][:-1]) for _, p, a in requests]
        scores = logits(self.model, input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True)).log_softmax(-1)
        return [
            float(s[len(r) - len(a) : len(r)][range(len(a)), list(a)].sum())
            for (_, _, a), s, r in zip(requests, scores, rows, strict=True)
        ]


def harnessed(*pairs: tuple[list[int], list[int]]) -> bool:
    model = adapted("l1")
    found = with_prompts(Scorer(model))._loglikelihood_tokens([("", p, a) for p, a in pairs])
    expected = []
    for prompt, answer in pairs:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        expected.append(-float(loss) * len(answer))
    return close(torch.tensor(found), torch.tensor(expected))


# --- 9: turns and ties --------------------------------------------------------------------------------------


def trained(positions: str, labels: Any, **named: Any) -> bool:
    return bool(torch.isfinite(adapted(positions)(input_ids=IDS[:1], labels=labels[None], **named).loss))


def split_is_whole() -> bool:
    model = adapted("f1")
    first, second = TURNS.clone(), TURNS.clone()
    first[5:], second[:5] = -100, -100
    losses = [model(input_ids=IDS[:1], labels=x[None]).loss for x in (TURNS, first, second)]
    return close(losses[0], (2 * losses[1] + 3 * losses[2]) / 5)


def tied(*names: str) -> bool:
    saved = get_reft_model(gpt2(), ReftConfig(rank=2, modules_to_save=names)).adapter("default").saved
    return saved["transformer/wte"].weight is saved["lm_head"].weight


# --- 10: what the base model does ---------------------------------------------------------------------------


def mixed(names: Any, call: str = "forward", **options: Any) -> bool:
    model = adapted("l1")
    model.add_adapter("other", ReftConfig(rank=2, positions="f1+l2", start="paper", seed=7))
    model.add_adapter("head", ReftConfig(rank=2, modules_to_save=("lm_head",)))

    def once(**chosen: Any) -> Any:
        if call == "generate":
            return model.generate(
                IDS, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options, **chosen
            )
        return logits(model, input_ids=IDS, prompt_lengths=torch.tensor([6, 10]), **chosen)

    found = once(adapter_names=names)
    for i, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            if not close(once()[i].float(), found[i].float()):
                return False
    return True


def same_inputs() -> bool:
    model = adapted()
    one, two = (
        model.generate(**{name: IDS}, max_new_tokens=NEW, do_sample=False) for name in ("inputs", "input_ids")
    )
    return bool(torch.equal(one, two))


def noisy() -> bool:
    """NEFTune's noise reaches the embeddings that are used."""
    base = llama()
    model = adapted(base=base, modules_to_save=("embed_tokens",))
    return model.get_input_embeddings() is model.adapter("default").saved["model/embed_tokens"]


# --- 11: folders --------------------------------------------------------------------------------------------


def written(folder: Path, model: ReftModel, name: str = "model.safetensors", **changed: Any) -> Path:
    state = {**model.state_dict(), **changed}
    save_file({k: v for k, v in state.items() if v is not None}, folder / name)
    return folder


def read_back(folder: Path, base: Any = None, name: str = "default") -> bool:
    read = ReftModel.from_pretrained(llama() if base is None else base, folder, name)
    return close(logits(read.eval(), input_ids=IDS), logits(adapted(), input_ids=IDS))


def by_trainer(folder: Path, where: str) -> bool:
    model = adapted()
    data = Dataset.from_list(
        [{"input_ids": IDS[0].tolist(), "labels": TURNS.where(torch.arange(10) > 5, -100).tolist()}]
    )
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    run = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    run.train()
    run.save_model(str(folder / "final"))
    read = ReftModel.from_pretrained(llama(), folder / where).eval()
    return close(logits(read, input_ids=IDS), logits(model.eval(), input_ids=IDS))


def expanded(path: Path) -> None:
    """One number of the file for each tensor, repeated to petabytes."""
    state = torch.load(path, weights_only=True)
    torch.save(
        {k: v if k == "_extra_state" else torch.zeros(1).expand(10**9, 10**6) for k, v in state.items()}, path
    )


def expanded_pyreft(folder: Path) -> Any:
    to_pyreft(adapted(), folder)
    expanded(next(folder.glob("*.bin")))
    return from_pyreft(llama(), folder, "l1")


def expanded_checkpoint(folder: Path) -> Any:
    model = adapted()
    own = {k: v for k, v in model.state_dict().items() if k.startswith("adapters.") or k == "_extra_state"}
    torch.save(own, folder / "pytorch_model.bin")
    expanded(folder / "pytorch_model.bin")
    return ReftModel.from_pretrained(llama(), folder)


def raw(value: Any) -> Any:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def both_ways(folder: Path) -> Any:
    model = adapted()
    model.save_pretrained(folder)
    with torch.no_grad():
        next(model.adapters.parameters()).add_(1)
    return ReftModel.from_pretrained(llama(), written(folder, model))


def other_positions(_: Path) -> Any:
    return adapted("f1").load_state_dict(adapted("l1").state_dict())


# --- 12: other arguments ------------------------------------------------------------------------------------


def images(**given: Any) -> bool:
    model = adapted("all", vit())
    pixels = torch.randn(2, 3, 8, 8)
    with model.disable_adapter():
        plain = logits(model, pixel_values=pixels)
    return not close(plain, logits(model, **{"pixel_values": pixels, **given}))


def spans() -> bool:
    model = adapted("all", bert(transformers.BertForQuestionAnswering))
    at = torch.tensor([1, 2])
    return bool(torch.isfinite(model(IDS, start_positions=at, end_positions=at).loss))


def choices() -> bool:
    model = adapted("l1", bert(transformers.BertForMultipleChoice))
    ids = torch.stack([IDS, IDS.flip(-1)], 1)
    return close(logits(model, input_ids=ids)[:1, :1], logits(model, input_ids=ids[:1, :1]))


def two_heads(**named: Any) -> bool:
    model = adapted("l1", gpt2(transformers.GPT2DoubleHeadsModel))
    ids, last = torch.stack([IDS, IDS.flip(-1)], 1), torch.full((2, 2), 9)
    return bool(torch.isfinite(model(input_ids=ids, mc_token_ids=last, labels=ids.clone(), **named).loss))


def sounds(positions: str, component: str = "encoder.block_output", **named: Any) -> bool:
    model = adapted(positions, whisper(), component=component)
    sound = torch.randn(2, 8, 20)
    found = logits(model, input_features=sound, labels=IDS[:, :4], **named)
    with model.disable_adapter():
        return not close(found, logits(model, input_features=sound, labels=IDS[:, :4]))


def detecting(_: Path) -> Any:
    base = whisper()
    base.generation_config.is_multilingual = True
    return adapted("all", base, component="encoder.block_output").generate(torch.randn(1, 8, 20), max_new_tokens=2)


def packed(**named: Any) -> Any:
    return adapted()(input_ids=IDS[:1], labels=IDS[:1].where(torch.arange(10) > 5, -100), **named)


def attribute(name: str, base: Any = None) -> Any:
    return getattr(adapted(base=base), name)


V, T, A = ValueError, TypeError, AttributeError
UNEDITED = "would run the base model without edits"
END = torch.tensor([0, 5, 10], dtype=torch.int32)

CASES = (
    Case("temperature 0.5", "6b", lambda _: fused(0.5)),
    Case("temperature 3", "6b", lambda _: fused(3.0)),
    Case("temperature 1", "6b", lambda _: fused(1.0)),
    Case("no cache asked for", "6b", lambda _: fused(0.7, use_cache=True)),
    Case(
        "a head that nobody put in",
        "6b",
        lambda _: adapted()(IDS, labels=IDS, fused_lm_head=True, prompt_lengths=END[1:]),
        (T, "add_fused_lm_head"),
    ),
    Case("lookup in the prompt", "7", lambda _: guessed(prompt_lookup_num_tokens=3)),
    Case(
        "lookup of one token, every token edited",
        "7",
        lambda _: guessed(True, prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    ),
    Case("an assistant", "7", lambda _: guessed(assistant_model=llama(0))),
    Case("an assistant, every token edited", "7", lambda _: guessed(True, assistant_model=llama(3))),
    Case("an adapted assistant", "7", lambda _: guessed(assistant_model=adapted(base=llama(5)))),
    Case("a static cache", "7", lambda _: guessed(cache_implementation="static")),
    Case("a static cache, every token edited", "7", lambda _: guessed(True, cache_implementation="static")),
    Case("early exit", "7", lambda _: guessed(assistant_early_exit=1), (V, "assistant_early_exit guesses")),
    Case(
        "early exit by configuration",
        "7",
        lambda _: guessed(generation_config=transformers.GenerationConfig(assistant_early_exit=1)),
        (V, "assistant_early_exit"),
    ),
    Case(
        "the base model assists",
        "7",
        lambda _: with_itself(lambda m: m.base_model),
        (V, "has parts of, the model"),
    ),
    Case("the model assists itself", "7", lambda _: with_itself(lambda m: m), (V, "has parts of, the model")),
    Case(
        "a part of the base model assists",
        "7",
        lambda _: with_itself(lambda m: nn.ModuleList([m.base_model.model])),
        (V, "has parts of, the model"),
    ),
    Case(
        "lookup behind a cache",
        "7",
        lambda _: from_cache(prompt_lookup_num_tokens=2),
        (V, "that are in the cache already"),
    ),
    Case(
        "an assistant behind a cache",
        "7",
        lambda _: from_cache(assistant_model=llama()),
        (V, "that are in the cache already"),
    ),
    Case(
        "a prompt in chunks",
        "7",
        lambda _: adapted().generate(IDS, max_new_tokens=1, prefill_chunk_size=2),
        (V, "not in chunks"),
    ),
    Case(
        "a prompt in chunks, the function",
        "7",
        lambda _: generate(
            (m := adapted()).backbone, {"input_ids": IDS}, m.edits(), max_new_tokens=1, prefill_chunk_size=2
        ),
        (V, "not in chunks"),
    ),
    Case(
        "guidance without a cache",
        "7",
        lambda _: adapted().generate(IDS, max_new_tokens=1, guidance_scale=1.5, use_cache=False),
        (V, "guidance_scale=1.5"),
    ),
    Case(
        "guidance and every token",
        "7",
        lambda _: adapted().generate(IDS, max_new_tokens=1, guidance_scale=1.5, every_token=True),
        (V, "guidance_scale=1.5"),
    ),
    Case("a sound of unknown language", "7", detecting, (V, "language='en'")),
    Case("one length for all", "8", lambda _: said(4, [4, 4])),
    Case("a length each", "8", lambda _: said([3, 7], [3, 7])),
    Case("lengths by a function", "8", lambda _: said(lambda ids: [2, 9], [2, 9])),
    Case("all of it is prompt", "8", lambda _: said("all", [10, 10])),
    Case("lengths of another batch", "8", lambda _: said([3, 3, 3]), (V, "given for 3 examples")),
    Case("a word that is no length", "8", lambda _: said("most"), (V, "the only possible text is 'all'")),
    Case("half a token", "8", lambda _: said(1.5), (T, "lengths")),
    Case("a length beyond the example", "8", lambda _: said(11), (V, "Prompt lengths")),
    Case("a negative length", "8", lambda _: said(-1), (V, "Prompt lengths")),
    Case("a warning, once", "8", lambda _: warned("l1") == 1),
    Case("no warning of a prefix", "8", lambda _: warned("f2") == 0),
    Case("no warning where it is said", "8", lambda _: warned("l1", prompt_lengths=torch.tensor([3, 3])) == 0),
    Case("a harness", "8", lambda _: harnessed(([5, 6, 7], [8, 9]), ([20, 21], [22]))),
    Case(
        "a harness, prompt here and answer there",
        "8",
        lambda _: harnessed(([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9])),
    ),
    Case(
        "a harness, answers that are padding tokens",
        "8",
        lambda _: harnessed(([5, 6], [0, 0]), ([5, 6, 7, 8], [0])),
    ),
    Case("a harness of another model", "8", lambda _: with_prompts(Scorer(llama())), (T, "lm.model")),
    Case("two answers, suffix", "9", lambda _: trained("l1", TURNS), (V, "has 2 answers")),
    Case("two answers, both ends", "9", lambda _: trained("f1+l1", TURNS), (V, "an example of each answer")),
    Case("two answers, all", "9", lambda _: trained("all", TURNS), (V, "has 2 answers")),
    Case(
        "two answers, a prefix longer than the first prompt",
        "9",
        lambda _: trained("f5", TURNS),
        (V, "has 2 answers"),
    ),
    Case("two answers, a prefix", "9", lambda _: split_is_whole()),
    Case(
        "two answers, the first prompt's length said",
        "9",
        lambda _: trained("l1", TURNS, prompt_lengths=torch.tensor([3])),
    ),
    Case(
        "two answers in a kept past",
        "9",
        lambda _: adapted().keep_past(
            Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": TURNS.tolist()}])
        ),
        (V, "has 2 answers"),
    ),
    Case("no answer at all", "9", lambda _: trained("l1", torch.full((10,), -100)), (V, "has no label but")),
    Case("an answer from the first token", "9", lambda _: trained("l1", IDS[0]), (V, "empty prompt")),
    Case("one of two tied modules", "9", lambda _: tied("wte"), (V, "no longer tied")),
    Case("the tied head alone", "9", lambda _: tied("lm_head"), (V, "no longer tied")),
    Case("both tied modules", "9", lambda _: tied("wte", "lm_head")),
    Case("a module that is not there", "9", lambda _: tied("wte", "head"), (V, "modules_to_save names 'head'")),
    Case("dtype", "10", lambda _: attribute("dtype") is torch.float32),
    Case("a misspelt method", "10", lambda _: attribute("set_adaptr"), (A, "nor its base model")),
    Case("generation that would not be edited", "10", lambda _: attribute("generate_batch"), (A, UNEDITED)),
    Case(
        "a vocabulary that grows under the adapter",
        "10",
        lambda _: adapted().resize_token_embeddings(64),
        (A, "resize the base model"),
    ),
    Case("inputs by another name", "10", lambda _: same_inputs()),
    Case("inputs twice", "10", lambda _: adapted().generate(IDS, input_ids=IDS), (V, "the same argument")),
    Case("embeddings that are used", "10", lambda _: noisy()),
    Case(
        "parameters of both",
        "10",
        lambda _: (m := adapted()).num_parameters() == sum(p.numel() for p in m.parameters()),
    ),
    Case("an adapter each", "10", lambda _: mixed(["default", "other"])),
    Case("an adapter and none", "10", lambda _: mixed(["__base__", "other"])),
    Case("an adapter each, generated", "10", lambda _: mixed(["other", "default"], "generate")),
    Case(
        "an adapter each, every token", "10", lambda _: mixed(["other", "__base__"], "generate", every_token=True)
    ),
    Case("an adapter each, beams", "10", lambda _: mixed(["other", "__base__"], "generate", num_beams=3)),
    Case("too few names", "10", lambda _: mixed(["other"]), (V, "1 names for 2 examples")),
    Case(
        "too many names, generated",
        "10",
        lambda _: mixed(["other"] * 3, "generate"),
        (V, "3 names for 2 examples"),
    ),
    Case("a name that is no adapter's", "10", lambda _: mixed(["other", "third"]), (V, "No adapter 'third'")),
    Case("one name for all", "10", lambda _: mixed("other"), (T, "adapter_names")),
    Case("an adapter with a head of its own", "10", lambda _: mixed(["head", "other"]), (V, "modules_to_save")),
    Case("a folder of Trainer", "11", lambda folder: by_trainer(folder, "checkpoint-1")),
    Case("a folder of save_model", "11", lambda folder: by_trainer(folder, "final")),
    Case("a state in a file", "11", lambda folder: read_back(written(folder, adapted()))),
    Case(
        "the only adapter under another name",
        "11",
        lambda folder: read_back(written(folder, adapted()), name="mine"),
    ),
    Case(
        "a state of another model",
        "11",
        lambda folder: read_back(written(folder, adapted()), gpt2()),
        (V, "another base model"),
    ),
    Case(
        "a state without configuration",
        "11",
        lambda folder: read_back(written(folder, adapted(), _extra_state=None)),
        (V, "holds no ReFT adapter"),
    ),
    Case(
        "a configuration that is a number",
        "11",
        lambda folder: read_back(written(folder, adapted(), _extra_state=torch.tensor(3.0))),
        (V, "not the configurations"),
    ),
    Case(
        "a configuration that is a list",
        "11",
        lambda folder: read_back(written(folder, adapted(), _extra_state=raw([1]))),
        (V, "not the configurations"),
    ),
    Case(
        "a configuration of something else",
        "11",
        lambda folder: read_back(written(folder, adapted(), _extra_state=raw({"default": {"peft_type": "LORA"}}))),
        (V, "'LORA'"),
    ),
    Case(
        "half a file",
        "11",
        lambda folder: [(folder / "model.safetensors").write_bytes(b"12345678{"), read_back(folder)],
        (V, "not a whole file"),
    ),
    Case(
        "a whole model in the folder",
        "11",
        lambda folder: [llama().save_pretrained(folder), read_back(folder)],
        (V, "holds no ReFT adapter"),
    ),
    Case("a folder saved into in two ways", "11", both_ways, (V, "hold different adapters")),
    Case("numbers of other positions", "11", other_positions, (V, "another configuration: sites")),
    Case("an empty folder", "11", lambda folder: read_back(folder), (FileNotFoundError, "not a whole adapter")),
    Case("images", "12", lambda _: images(interpolate_pos_encoding=False)),
    Case(
        "images by a misspelt name",
        "12",
        lambda _: images(pixel_value=torch.zeros(1)),
        (T, "no ['pixel_value'] is known"),
    ),
    Case(
        "a prefix of images",
        "12",
        lambda _: bool(logits(adapted("f1", vit()), pixel_values=torch.randn(1, 3, 8, 8)).isfinite().all()),
    ),
    Case("spans", "12", lambda _: spans()),
    Case("choices", "12", lambda _: choices()),
    Case("two heads", "12", lambda _: two_heads(prompt_lengths=torch.full((2, 2), 4))),
    Case("two heads without prompts", "12", lambda _: two_heads(), (V, "empty prompt")),
    Case("sounds", "12", lambda _: sounds("all")),
    Case(
        "sounds with a mask of frames",
        "12",
        lambda _: sounds("all", attention_mask=torch.ones(2, 20, dtype=torch.long)),
    ),
    Case("a word written down", "12", lambda _: sounds("l1", "decoder.block_output")),
    Case("a misspelt argument", "12", lambda _: adapted()(IDS, noise_level=3), (T, "no ['noise_level'] is known")),
    Case(
        "a misspelt argument of GPT-2",
        "12",
        lambda _: adapted(base=gpt2())(IDS, attention_masks=IDS),
        (T, "no ['attention_masks'] is known"),
    ),
    Case("an argument twice", "12", lambda _: adapted()(IDS, input_ids=IDS), (T, "given twice")),
    Case("too many positional arguments", "12", lambda _: adapted()(*[IDS] * 30), (T, "30 positional inputs")),
    Case("packed by positions", "12", lambda _: packed(position_ids=torch.arange(10)[None] % 5), (V, "packed")),
    Case("packed by lengths", "12", lambda _: packed(cu_seq_lens_q=END, cu_seq_lens_k=END), (V, "packed")),
    Case("packed by numbers", "12", lambda _: packed(seq_idx=torch.arange(10)[None] // 5), (V, "packed")),
    Case("training without labels", "12", lambda _: adapted().train()(IDS), (V, "Training needs labels")),
    Case(
        "groups that share an example",
        "10",
        lambda _: forward(
            (m := adapted()).backbone,
            Batch({"input_ids": IDS}),
            {},
            groups=[(torch.tensor([0]), m.edits()), (torch.tensor([0]), m.edits())],
        ),
        (V, "each at most once"),
    ),
    Case(
        "a group outside the batch",
        "10",
        lambda _: forward(
            (m := adapted()).backbone, Batch({"input_ids": IDS}), {}, groups=[(torch.tensor([2]), m.edits())]
        ),
        (V, "each at most once"),
    ),
    Case("a collator of no examples", "9", lambda _: PromptCollator(None)([]), (V, "No examples")),
    Case(
        "a site that is no adapter's",
        "10",
        lambda _: adapted().subspace(Site("block_output", 0, "f1")),
        (V, "No active adapter edits"),
    ),
    Case("a layer that is not there", "10", lambda _: adapted(layers=[5]), (IndexError, "layers 0 to 1")),
    Case(
        "a wrapped model wrapped",
        "10",
        lambda _: get_reft_model(adapted(), ReftConfig()),
        (T, "has ReFT adapters already"),
    ),
    Case("petabytes in a file of pyreft", "14", expanded_pyreft, (V, "does not hold enough numbers")),
    Case("petabytes in a checkpoint", "14", expanded_checkpoint, (V, "does not hold enough numbers")),
)
