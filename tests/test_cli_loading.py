"""Models for the terminal: GGUF files, code that comes along, and what a checkpoint may lack."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import SHIPPED, TINY, search
from test_cli_finetune import TINY as TINY_ADAPTER
from test_cli_finetune import finetuned, local_model, results_of, written
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from subspace_lab.analysis.twins import reinitialised
from subspace_lab.cli.loading import Source, load_causal, load_classifier, load_tokenizer, longest_text
from subspace_lab.reft import ReftModel

TOKENS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", ".", "ab"]
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
IDS = torch.tensor([[2, 3, 4, 28, 30]])


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path, without: str = "nothing") -> None:
    """The model as llama.cpp writes it; the matrices of the MLPs in 8 bits, exactly what they then are."""
    config, file = model.config, gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    assert config.num_key_value_heads is not None
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    assert config.head_dim is not None
    file.add_rope_dimension_count(config.head_dim)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(TOKENS)
    file.add_token_types([1] * len(TOKENS))
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" or without in key:
            continue
        name = NAMES.get(key)
        if name is None:
            _, _, layer, rest = key.split(".", 3)
            name = f"blk.{layer}.{PARTS[rest.removesuffix('.weight')]}.weight"
        if "q_proj" in key or "k_proj" in key:  # rotary halves lie interleaved there
            heads = config.num_attention_heads
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        numbers = np.ascontiguousarray(tensor.detach().float().numpy())
        if "mlp" in key:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(numbers, kind)
            file.add_tensor(name, packed, raw_dtype=kind)
            tensor.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
        else:
            file.add_tensor(name, numbers)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def packed(tmp_path: Path) -> tuple[LlamaForCausalLM, Source]:
    model = tiny()
    write_gguf(model, tmp_path / "Tiny.GGUF")
    return model, Source(str(tmp_path / "Tiny.GGUF"))


def test_a_gguf_file_is_a_plain_model_of_its_unpacked_weights(
    packed: tuple[LlamaForCausalLM, Source], tmp_path: Path
) -> None:
    model, source = packed
    loaded = load_causal(source, "cpu", "auto")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
        loaded.save_pretrained(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(saved(IDS).logits, loaded(IDS).logits)
    assert loaded.dtype == torch.float32 and loaded.config._name_or_path == source.name
    assert not hasattr(loaded.config, "quantization_config")
    assert load_causal(source, "cpu", "bfloat16").dtype == torch.bfloat16
    tokenizer = load_tokenizer(source)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"][-1] == TOKENS.index("c")
    assert longest_text(source, tokenizer) == 64


def test_a_twin_of_a_gguf_model_is_another_model(packed: tuple[LlamaForCausalLM, Source]) -> None:
    loaded = load_causal(packed[1], "cpu", "auto")
    twin: Any = reinitialised(loaded, 0)
    with torch.no_grad():
        assert not torch.allclose(twin(IDS).logits, loaded(IDS).logits)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_finetune_takes_a_gguf_file(packed: tuple[LlamaForCausalLM, Source], tmp_path: Path) -> None:
    _, source = packed
    rows = written(tmp_path / "rows.jsonl", [{"prompt": a * 4, "answer": a} for a in "cdefghij"])
    assert source.name is not None
    result = finetuned("--model", source.name, "--data", rows, *TINY_ADAPTER, "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert ReftModel.from_pretrained(load_causal(source, "cpu", "auto"), tmp_path / "out")
    texts = written(tmp_path / "texts.jsonl", [{"text": a * 4, "label": a < "g"} for a in "cdefghij"])
    result = finetuned("--model", source.name, "--data", texts, *TINY_ADAPTER, "--out", tmp_path / "classes")
    assert result.exit_code == 0, (result.stderr, result.exception)
    one, other = (load_classifier(source, "cpu", "auto", ["no", "yes"], seed)[0] for seed in (1, 1))
    assert torch.equal(one.score.weight, other.score.weight) and results_of(tmp_path / "classes")["classes"]


def test_a_gguf_file_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    write_gguf(tiny(), tmp_path / "m.gguf", without="layers.1.")
    with pytest.raises(ValueError, match=r"no weights of model\.layers\.1"):
        load_causal(Source(str(tmp_path / "m.gguf")), "cpu", "auto")


def test_without_the_extra_a_gguf_file_names_it(
    packed: tuple[LlamaForCausalLM, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'subspace-lab\[gguf\]'"):
        load_causal(packed[1], "cpu", "auto")


# --- whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_missing_and_others_are(tied: bool, tmp_path: Path) -> None:
    model = local_model(tmp_path / "model", LlamaForCausalLM, tie_word_embeddings=tied)
    weights = load_file(model / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    if tied:
        assert load_causal(Source(str(model)), "cpu", "auto")
    else:
        with pytest.raises(ValueError, match="no weights of lm_head"):
            load_causal(Source(str(model)), "cpu", "auto")


@pytest.mark.parametrize(
    "lost", ["bert.embeddings.LayerNorm", "bert.embeddings.word", "bert.encoder.layer.1.output"]
)
def test_a_classifier_may_lack_its_head_and_pooler_and_nothing_else(lost: str, tmp_path: Path) -> None:
    """Else what lies before the edits would be random, and be trained as if it were a head."""
    model = local_model(tmp_path / "model", transformers.BertForMaskedLM)
    network, fresh = load_classifier(Source(str(model)), "cpu", "auto", ["no", "yes"], 0)
    assert set(fresh) == {"classifier", "bert.pooler.dense"} and network.num_labels == 2
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    assert len(kept) < len(weights)
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no weights of bert"):
        load_classifier(Source(str(model)), "cpu", "auto", ["no", "yes"], 0)


def test_layers_for_several_tokens_ahead_are_left_out_where_the_configuration_says_so(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHIPPED, model)
    config = json.loads((model / "config.json").read_text())
    for ahead, layers in ((1, 3), (1, 2)):
        (model / "config.json").write_text(
            json.dumps({**config, "num_hidden_layers": layers, "num_nextn_predict_layers": ahead})
        )
        if layers == 3:
            assert load_causal(Source(str(model)), "cpu", "auto")
        else:
            with pytest.raises(ValueError, match=r"holds model\.layers\.2, model\.layers\.3.*fewer layers"):
                load_causal(Source(str(model)), "cpu", "auto")


# --- code that comes along ----------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class Mine(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Mine
"""


def test_code_that_comes_along_is_run_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(SHIPPED, model)
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": own}))
    (model / "mine.py").write_text(CODE.format(mark=str(mark)))
    options: list[str | Path] = [*TINY, "--positions", "last", "--method", "PCA", "--no-twin", "--model", model]
    result = search(*options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--trust-remote-code" in result.stderr and result.stderr.count("\n") == 1
    assert not mark.exists()
    result = search(*options, "--trust-remote-code", "--out", tmp_path / "out")
    assert result.exit_code == 0 and mark.exists(), (result.stderr, result.exception)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = local_model(tmp_path / "model", LlamaForCausalLM)
    for path in SHIPPED.glob("tokenizer*"):
        shutil.copy(path, model)
    rows = written(tmp_path / "rows.jsonl", [{"prompt": "a fair price", "answer": " is from"}])
    result = finetuned(
        "--model", model, "--data", rows, *TINY_ADAPTER, "--held-out", "0", "--out", tmp_path / "out"
    )
    assert result.exit_code == 2 and "the model has 13 tokens" in result.stderr, result.stderr
