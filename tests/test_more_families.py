"""Families beside those of `families.py`, more lightly: where their parts are, and that resuming is the plain run.

Mixtures of experts, latent attention, sinks, ALiBi, chunks, and hybrids of attention with state-space layers,
convolutions or linear attention, of which no past of keys exists.
"""

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers as t
from families import VOCABULARY, WIDTH, Spot, capture, hooked, inputs
from test_frozen_past import LENGTHS, SUBJECT, compare, loreft, make_edits
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine import notices
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.recurrent import RecurrentStates
from subspace_lab.engine.schedule import Schedule
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward
from subspace_lab.model.resolved_sites import resolve
from subspace_lab.reft import ReftConfig, get_reft_model

COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED: dict[str, Any] = dict(COMMON, num_key_value_heads=2)
OLD: dict[str, Any] = dict(
    vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=48, n_layer=3, n_head=4, n_positions=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
MANY: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT: dict[str, Any] = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
DELTA: dict[str, Any] = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
LLAMA = ("model.layers.1", "self_attn.o_proj", "mlp.down_proj")
MIXED = (*LLAMA[:2], "mlp")

# name: its configuration, and of block 1 the paths of the block, of attention's projection and of the MLP's
FAMILIES = {
    "gptj": (t.GPTJConfig(**OLD, rotary_dim=4), ("transformer.h.1", "attn.out_proj", "mlp.fc_out")),
    "codegen": (t.CodeGenConfig(**OLD, rotary_dim=4), ("transformer.h.1", "attn.out_proj", "mlp.fc_out")),
    "gpt_neo": (
        t.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=3, num_heads=4, max_position_embeddings=64,
            attention_types=[[["global", "local", "global"], 1]], window_size=8, intermediate_size=48,
        ),
        ("transformer.h.1", "attn.attention.out_proj", "mlp.c_proj"),
    ),
    "bloom": (
        t.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=3, n_head=4, pad_token_id=0),
        ("transformer.h.1", "self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    "falcon": (
        t.FalconConfig(**COMMON, num_kv_heads=2, new_decoder_architecture=True),
        ("transformer.h.1", "self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    "mpt": (
        t.MptConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_heads=4, n_layers=3, max_seq_len=64),
        ("transformer.blocks.1", "attn.out_proj", "ffn.down_proj"),
    ),
    "opt": (
        t.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH),
        ("model.decoder.layers.1", "self_attn.out_proj", None),  # its MLP sees the tokens of all rows as one list
    ),
    "biogpt": (t.BioGptConfig(**COMMON), ("biogpt.layers.1", "self_attn.out_proj", "fc2")),
    "gpt_bigcode": (t.GPTBigCodeConfig(**OLD), ("transformer.h.1", "attn.c_proj", "mlp.c_proj")),
    "starcoder2": (t.Starcoder2Config(**GROUPED), ("model.layers.1", "self_attn.o_proj", "mlp.c_proj")),
    "cohere2": (
        t.Cohere2Config(
            **GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        ),
        LLAMA,
    ),
    "smollm3": (t.SmolLM3Config(**GROUPED), LLAMA),
    "glm4": (t.Glm4Config(**GROUPED, head_dim=8), LLAMA),
    "mixtral": (t.MixtralConfig(**GROUPED, **EXPERTS), MIXED),
    "qwen3_moe": (t.Qwen3MoeConfig(**GROUPED, **MANY, head_dim=8), MIXED),  # type: ignore[call-arg]
    "gpt_oss": (t.GptOssConfig(**GROUPED, **EXPERTS, head_dim=8, sliding_window=8), MIXED),
    "granitemoe": (t.GraniteMoeConfig(**GROUPED, **EXPERTS), (*LLAMA[:2], "block_sparse_moe")),
    "deepseek_v3": (t.DeepseekV3Config(**COMMON, **LATENT, num_key_value_heads=4), MIXED),
    "llama4": (
        t.Llama4TextConfig(
            **GROUPED, **EXPERTS, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=8,
            no_rope_layers=[1, 0, 1], layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
        (*LLAMA[:2], None),
    ),
    "qwen3_next": (
        t.Qwen3NextConfig(**GROUPED, **MANY, **DELTA, shared_expert_intermediate_size=16),
        MIXED,
    ),
    "qwen3_5": (t.Qwen3_5TextConfig(**GROUPED, **DELTA), LLAMA),
    "jamba": (
        t.JambaConfig(
            **GROUPED, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
        ),
        (*LLAMA[:2], "feed_forward"),
    ),
    "lfm2": (
        t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"]),
        ("model.layers.1", "self_attn.out_proj", "feed_forward.w2"),
    ),
    "recurrent_gemma": (
        t.RecurrentGemmaConfig(  # type: ignore[call-arg]
            **GROUPED, head_dim=8, lru_width=WIDTH, block_types=["recurrent", "attention"], attention_window_size=8
        ),
        ("model.layers.1", "temporal_block.o_proj", "mlp_block.down_proj"),
    ),
    "mamba": (
        t.MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, state_size=8, pad_token_id=0),
        ("backbone.layers.1", None, None),
    ),
}  # fmt: skip
ENCODERS = {
    "distilbert": (
        t.DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=48, n_layers=3, n_heads=4, pad_token_id=0),
        ("distilbert.transformer.layer.1", "attention.out_lin", "ffn.lin2"),
    ),
    "deberta-v2": (
        t.DebertaV2Config(**COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ("deberta.encoder.layer.1", "attention.output.dense", "output.dense"),
    ),
    "mpnet": (
        t.MPNetConfig(**COMMON | dict(pad_token_id=0)),
        ("mpnet.encoder.layer.1", "attention.attn.o", "output.dense"),
    ),
    "electra": (
        t.ElectraConfig(**COMMON, embedding_size=WIDTH),
        ("electra.encoder.layer.1", "attention.output.dense", "output.dense"),
    ),
}
EVERY = FAMILIES | ENCODERS
# Resumed at a block, and not at a token as well.
LAYERS_ONLY = (
    "jamba",
    "mamba",
    "recurrent_gemma",
)  # write over their states, or go on from none with several tokens
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "llama4", "qwen3_next", "jamba")
# In float64 their mask is lower than the lowest number of float32, in which they take the softmax: NaN at padding.
FLOAT32 = ("bloom", "mpt")
# Linear attention is computed in float32 whatever the model's dtype, and for one token otherwise than for many.
TOLERANCE = dict.fromkeys(("qwen3_next", "qwen3_5"), 1e-4)
CASES = [(name, padding) for name in FAMILIES for padding in ("right", "left")]
CASES += [(name, "right") for name in ENCODERS]


def fresh(name: str, dtype: torch.dtype | None = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        kind = t.AutoModelForMaskedLM if name in ENCODERS else t.AutoModelForCausalLM
        # The experts' own way of multiplying knows no float64.
        options = {"experts_implementation": "eager"} if name in MIXTURES else {}
        model = kind.from_config(EVERY[name][0], **options).to(
            dtype or (torch.float32 if name in FLOAT32 else torch.float64)
        )
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if name in FAMILIES:
        model.generation_config.eos_token_id = None  # generations have the length that was asked for
    return model


@pytest.fixture(scope="module")
def models() -> Callable[..., Any]:
    made: dict[str, Any] = {}
    return lambda name: made.setdefault(name, fresh(name))


def spots(name: str) -> dict[str, Spot]:
    """Of block 1: {component: spot}, written by hand."""
    block, attention, mlp = EVERY[name][1]
    found = {"block_input": Spot(block, "input"), "block_output": Spot(block, "output")}
    if attention:
        found["attention_output"] = Spot(f"{block}.{attention}", "output")
        found["head_output"] = Spot(f"{block}.{attention}", "input")
    if mlp:
        found["mlp_output"] = Spot(f"{block}.{mlp}", "output")
    return found


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_parts_are_where_a_hook_finds_them(name: str, models: Callable[..., Any]) -> None:
    model = models(name)
    backbone, given = Backbone(model), inputs("gpt2", 3, 9, seed=2)
    for component, spot in spots(name).items():
        site = Site(component, 1)
        expected = capture(model, given, spot)
        assert torch.equal(collect(backbone, given, [site])[site], expected), component
        width = expected.shape[-1]
        assert backbone.hook_point(site).width in (None, width)
        edit = loreft(width, 2, seed=5, start="paper")
        with hooked(model, {spot: lambda value, edit=edit: edit(value)}):  # type: ignore[misc]
            expected = model(**given).logits
        torch.testing.assert_close(forward(backbone, given, {site: edit}).logits, expected)
        assert (expected - model(**given).logits).norm() > 1e-4 * expected.norm(), component


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_resuming_is_the_plain_run(name: str, padding: str, models: Callable[..., Any]) -> None:
    backbone = Backbone(models(name))
    batch = Batch(
        inputs("gpt2", 6, 12, lengths=LENGTHS, padding=padding), columns={"subject": torch.tensor(SUBJECT)}
    )
    source = Batch(inputs("gpt2", 6, 12, seed=9, lengths=LENGTHS, padding=padding))
    readout = Readout.at(batch, "all" if name in ENCODERS else "last", (5, 11, 42))
    below = {"block_input": "subject", "block_output": "last", "attention_output": "f2+l1", "mlp_output": "-3"}
    sites = [Site(component, 1, positions) for component, positions in below.items() if component in spots(name)]
    sites += [Site("block_output", 0, "f2+l1")]
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    by_layers = name in LAYERS_ONLY or name in ENCODERS
    assert past.mode == ("layers" if by_layers else "keys and values"), past.describe()
    assert name not in LAYERS_ONLY or "was refused by its check" in past.describe()
    states = collect(backbone, source, [site.at("all") for site in sites])
    for seed, site in enumerate(sites):
        edits = make_edits({site: states[site.at("all")]}, [site], seed=2 * seed)
        compare(past, plain, torch.tensor([2, 0, 5, 2]), edits, tolerance=TOLERANCE.get(name))


STATEFUL = ("qwen3_next", "qwen3_5", "lfm2")


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_states_of_every_start(name: str, padding: str, models: Callable[..., Any]) -> None:
    """Rows that begin at their first token and rows that begin late; sites alone, together, and in pairs."""
    backbone = Backbone(models(name))
    columns = {"early": torch.tensor([0, 8, 1, 7, 0, 9]), "other": torch.tensor([5, 1, 6, 3, 4, 2])}
    batch = Batch(inputs("gpt2", 6, 12, lengths=LENGTHS, padding=padding), columns=columns)
    readout = Readout.at(batch, "last", (5, 11, 42))
    texts = ("block_output[0]@early", "mlp_output[1]@-3", "block_output[1]@last", "block_input[2]@other")
    sites = [Site.parse(text) for text in texts]
    past, plain = FrozenPast(backbone, batch, sites, readout, chunk=4), PlainEngine(backbone, batch, readout)
    assert past.mode == "keys and values", past.describe()
    assert (
        past.prefix is not None and len(past.prefix.recurrent) == 5
    )  # each alone and all together; no edit: as "last"
    for _ in range(2):  # no step leaves anything for the next
        # The first two together begin where no states are stored for, and run plainly.
        for chosen in (*([site] for site in sites), sites[:2], sites[1:3], sites):
            edits = {site: loreft(backbone.width(site), 2, seed=3, start="paper") for site in chosen}
            compare(past, plain, torch.tensor([2, 0, 4, 1, 2]), edits, tolerance=TOLERANCE.get(name))
    with torch.no_grad():
        found, expected = (run.logits(torch.arange(6), {}) for run in (past, plain))
    assert (found - expected).norm() <= TOLERANCE.get(name, 1e-6) * expected.norm()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_sites_that_are_edited_together(
    padding: str, models: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as a tuple, they are resumed too; not named, they are run plainly, and that is said once."""
    monkeypatch.setattr(notices, "_printed", set())
    model = models("lfm2")
    backbone, columns = Backbone(model), {"early": torch.tensor([0, 8, 1, 7, 0, 9])}
    batch = Batch(inputs("gpt2", 6, 12, lengths=LENGTHS, padding=padding), columns=columns)
    readout = Readout.at(batch, "last", (5, 11, 42))
    texts = ("block_output[1]@early", "mlp_output[1]@-3", "block_output[1]@last", "block_input[1]@first")
    early, late, *others = (Site.parse(text) for text in texts)
    edits = {site: loreft(WIDTH, 2, seed=3, start="paper") for site in (early, late)}
    ran = []
    handle = model.model.layers[0].feed_forward.register_forward_hook(lambda *_: ran.append(0))
    sites: Any
    for sites, blocks in (
        ([early, late, *others], 1),
        ([(early, late), *others], 0),
        ([*others, (late, early)], 0),
    ):
        past, plain = FrozenPast(backbone, batch, sites, readout, chunk=4), PlainEngine(backbone, batch, readout)
        assert past.mode == "keys and values", past.describe()
        capsys.readouterr()
        for _ in range(2):
            ran.clear()
            past.logits(torch.tensor([2, 0, 4]), edits)
            assert len(ran) == blocks
        said = capsys.readouterr().err
        assert said.count("\n") == blocks and ("Give them as a tuple" in said) == bool(blocks)
        compare(past, plain, torch.tensor([2, 0, 4, 1, 2]), edits)
        for site in (early, late, others[0]):  # each alone as well
            compare(past, plain, torch.tensor([1, 3]), {site: loreft(WIDTH, 2, seed=3, start="paper")})
    handle.remove()


def test_rows_without_a_past_have_no_state() -> None:
    """Padding leaves nothing, also where a bias would."""
    config = t.Lfm2Config(**GROUPED, conv_bias=True, layer_types=["conv", "full_attention", "conv"])
    model = t.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.ones_(model.model.layers[0].conv.in_proj.bias)
    backbone, batch = Backbone(model), Batch(inputs("gpt2", 3, 9), columns={"at": torch.tensor([0, 4, 0])})
    site, readout = Site("block_output", 1, "at"), Readout.at(batch, "last")
    schedule = Schedule(batch, {site: resolve(backbone, batch, site)}, readout)
    start = schedule.first([site])
    states = RecurrentStates(backbone, [0, 2], schedule, [start]).after(torch.arange(3), start)
    assert start.tolist() == [0, 4, 0] and {block for block, _, _ in states} == {0, 2}
    for tensor in states.values():
        assert not tensor[[0, 2]].any() and tensor[1].any()


def test_states_that_are_written_over_are_not_trained_through() -> None:
    """Jamba's single steps write into a float32 state; the logits are right, and the backward pass is not."""
    backbone, batch = Backbone(fresh("jamba", torch.float32)), Batch(inputs("gpt2", 3, 9))
    site, readout = Site("block_output", 1, "last"), Readout.at(batch, "last", (5, 11))
    past = FrozenPast(backbone, batch, [site], readout)
    assert past.mode == "layers" and "modified by an inplace operation" in past.describe(), past.describe()
    edits = {site: loreft(WIDTH, 2, start="paper")}
    compare(past, PlainEngine(backbone, batch, readout), torch.tensor([2, 0]), edits)


class RunningMean(torch.nn.Module):
    """Mixes tokens without attention, and remembers the tokens before it by itself."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Any, None]:
        steps = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        return hidden_states.cumsum(1) / steps[:, None], None


def test_states_that_are_not_in_the_models_cache_are_not_counted_on() -> None:
    model = families.fresh("llama", torch.float64)
    model.model.layers[2].self_attn = RunningMean()
    backbone, batch = Backbone(model), Batch(inputs("gpt2", 3, 9))
    site, readout = Site("block_output", 1, "last"), Readout.at(batch, "last", (5, 11))
    past = FrozenPast(backbone, batch, [site], readout)
    assert past.mode == "layers" and "no part of the model's cache" in past.describe(), past.describe()
    compare(
        past, PlainEngine(backbone, batch, readout), torch.tensor([2, 0]), {site: loreft(WIDTH, 2, start="paper")}
    )


@pytest.mark.parametrize("count", [2, 3])
def test_a_model_that_was_cut_short_is_resumed(count: int) -> None:
    """Its configuration, and so its cache, still has the layers that were cut off."""
    config = t.Lfm2Config(**GROUPED | dict(num_hidden_layers=4), layer_types=["conv", "full_attention"] * 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = t.AutoModelForCausalLM.from_config(config).double().eval()
    model.model.layers = model.model.layers[:count]
    backbone, batch = Backbone(model), Batch(inputs("gpt2", 3, 9))
    site, readout = Site("block_output", 0, "last"), Readout.at(batch, "last", (5, 11))
    past = FrozenPast(backbone, batch, [site], readout)
    assert past.mode == "keys and values", past.describe()
    compare(
        past, PlainEngine(backbone, batch, readout), torch.tensor([2, 0]), {site: loreft(WIDTH, 2, start="paper")}
    )


def test_states_for_which_there_is_no_room(models: Callable[..., Any]) -> None:
    backbone = Backbone(models("qwen3_5"))
    batch = Batch(inputs("gpt2", 64, 12))
    site, readout = Site("block_output", 1, "last"), Readout.at(batch, "last", (5, 11))
    whole = FrozenPast(backbone, batch, [site], readout, chunk=4).prefix.nbytes()  # type: ignore[union-attr]
    past = FrozenPast(backbone, batch, [site], readout, chunk=4, memory=whole // 2)
    assert past.mode == "layers" and "MiB would not fit" in past.describe(), past.describe()
    edits = {site: loreft(WIDTH, 2, seed=3, start="paper")}
    compare(past, PlainEngine(backbone, batch, readout), torch.tensor([2, 60]), edits, tolerance=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_generation_cached_uncached_and_alone(name: str, models: Callable[..., Any]) -> None:
    model, rows, lengths = models(name), 3, (9, 6, 7)
    reft = get_reft_model(model, ReftConfig(rank=2, positions="f2+l2", start="paper", seed=1)).eval()
    for parameter in reft.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    given = inputs("gpt2", rows, 9, seed=7, lengths=lengths, padding="left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = reft.generate(**given, **options)[:, 9:]
    assert torch.equal(reft.generate(**given, **options, use_cache=False)[:, 9:], together)
    for row, length in enumerate(lengths):
        ids = given["input_ids"][row : row + 1, 9 - length :]
        alone = reft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(alone[0, length:], together[row])
    with reft.disable_adapter():
        plain = reft.generate(**given, output_logits=True, return_dict_in_generate=True, **options).logits[0]
    edited = reft.generate(**given, output_logits=True, return_dict_in_generate=True, **options).logits[0]
    assert (edited - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize(
    "config",
    [
        t.AlbertConfig(**COMMON, embedding_size=WIDTH),  # one block for all layers
        t.XLMConfig(n_words=VOCABULARY, emb_dim=WIDTH, n_layers=3, n_heads=4),  # type: ignore[call-arg]  # lists of attentions, of norms, …
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_blocks_to_number_say_so(config: t.AlbertConfig | t.XLMConfig) -> None:
    backbone = Backbone(t.AutoModelForMaskedLM.from_config(config))
    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        backbone.hook_point(Site("block_output", 0))


# --- queries, keys and values -------------------------------------------------------------------------------


def by_head(parts: int, which: int) -> tuple[Any, ...]:
    """Columns of a projection that its attention views as (heads, parts, 8)."""
    return tuple(torch.arange(parts * WIDTH).view(4, parts, 8)[:, which].flatten().tolist())


def block(start: int, stop: int) -> tuple[Any, ...]:
    return tuple(range(start, stop))


THIRDS = (block(0, 32), block(32, 64), block(64, 96))
BY_HEAD = tuple(by_head(3, which) for which in range(3))
GATED = (by_head(2, 0), None, None)
PROJECTIONS = {
    "gptj": ("attn.{}_proj", None),
    "gpt_neo": ("attn.attention.{}_proj", None),
    "bloom": ("self_attention.query_key_value", BY_HEAD),
    "mpt": ("attn.Wqkv", THIRDS),
    "gpt_bigcode": ("attn.c_attn", (block(0, 32), block(32, 40), block(40, 48))),  # one head of keys and values
    "qwen3_next": ("self_attn.{}_proj", GATED),
    "qwen3_5": ("self_attn.{}_proj", GATED),
    "recurrent_gemma": ("temporal_block.{}_proj", None),
    "distilbert": ("attention.{}_lin", None),
    "deberta-v2": ("attention.self.{}_proj", None),
    "mpnet": ("attention.attn.{}", None),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_queries_keys_and_values(name: str, models: Callable[..., Any]) -> None:
    path, columns = PROJECTIONS[name]
    words = ("query", "key", "value") if name == "deberta-v2" else "qkv"
    check_projections(models(name), f"{EVERY[name][1][0]}.{path}", columns, words)


def test_several_heads_of_keys_in_one_projection() -> None:
    model = t.AutoModelForCausalLM.from_config(t.GPTBigCodeConfig(**OLD, multi_query=False)).eval()
    check_projections(model, "transformer.h.1.attn.c_attn", BY_HEAD)


def check_projections(
    model: Any, path: str, columns: tuple[Any, ...] | None, words: tuple[str, str, str] | str = "qkv"
) -> None:
    backbone, given = Backbone(model), inputs("gpt2", 3, 9, seed=2)
    for which, component in enumerate(("query_output", "key_output", "value_output")):
        site = Site(component, 1)
        wanted = None if columns is None else columns[which]
        expected = capture(model, given, Spot(path.format(words[which]), "output", wanted))
        assert torch.equal(collect(backbone, given, [site])[site], expected), component
        first = collect(backbone, given, [Site(component, 1, heads=0)])[Site(component, 1, heads=0)]
        assert torch.equal(first, expected[..., :8])


@pytest.mark.parametrize("name", ["falcon", "codegen", "deepseek_v3"])
def test_projections_in_an_order_that_is_not_known_are_refused(name: str, models: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no query_output that is known.*Submodules"):
        Backbone(models(name)).hook_point(Site("query_output", 1))


def test_projections_that_see_positions_before_rows_are_refused() -> None:
    config = t.LongformerConfig(**COMMON | dict(max_position_embeddings=66, pad_token_id=1), attention_window=8)
    backbone = Backbone(t.AutoModelForMaskedLM.from_config(config).eval())
    with pytest.raises(ValueError, match="no key_output that is known"):
        backbone.hook_point(Site("key_output", 1))
    by_path = Site("longformer.encoder.layer.1.attention.self.key.output", positions="last")
    with pytest.raises(ValueError, match="2 rows met a stream of 16 rows"):
        collect(backbone, inputs("gpt2", 2, 16), [by_path])


# --- models that see ----------------------------------------------------------------------------------------

IMAGE = 59
PICTURES = "model.vision_tower.encoder.layers"


@pytest.fixture(scope="module")
def seeing() -> tuple[Backbone, dict[Any, Any]]:
    """A language model that is given pictures of four patches each."""
    eyes: dict[str, Any] = dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**GROUPED), vision_config=t.CLIPVisionConfig(**eyes), image_token_index=IMAGE
    )
    torch.manual_seed(3)
    model = t.AutoModelForImageTextToText.from_config(config).eval()
    given = inputs("gpt2", 3, 11, lengths=(11, 9, 8))
    given["input_ids"] = given["input_ids"].clamp_max(IMAGE - 1)
    given["input_ids"][:, 1:5] = IMAGE
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(6))
    return Backbone(model), {**given, "pixel_values": pixels}


@pytest.mark.parametrize("name", ["block_output", f"{PICTURES}.block_output"])
@torch.no_grad()
def test_blocks_are_the_language_models_and_the_others_have_a_name(
    name: str, seeing: tuple[Backbone, dict[Any, Any]]
) -> None:
    backbone, given = seeing
    assert backbone.depth == 3
    site, spot = Site(name, 0), Spot("model.language_model.layers.0", "output")
    if name.startswith(PICTURES):
        spot = Spot(f"{PICTURES}.0", "output")
    expected = capture(backbone.model, given, spot)
    found = collect(backbone, given, [site])[site]
    real = real_tokens(given) if found.shape[1] == 11 else torch.ones(found.shape[:2], dtype=torch.bool)
    assert torch.equal(found[real], expected[real]) and found.shape[-1] == WIDTH
    edit = loreft(WIDTH, 2, seed=5, start="paper")
    with hooked(backbone.model, {spot: edit}):
        expected = backbone.model(**given).logits
    logits = forward(backbone, given, {site: edit}).logits
    torch.testing.assert_close(logits[real_tokens(given)], expected[real_tokens(given)])
    assert (logits - backbone.model(**given).logits).norm() > 1e-3 * logits.norm()


def real_tokens(given: dict[Any, Any]) -> Tensor:
    return given["attention_mask"].bool()


def test_resuming_behind_a_picture(seeing: tuple[Backbone, dict[Any, Any]]) -> None:
    backbone, given = seeing
    batch = Batch(given)
    readout, sites = (
        Readout.at(batch, "last", (5, 11)),
        [Site("block_output", 1, "last"), Site("mlp_output", 2, "l2")],
    )
    past, plain = FrozenPast(backbone, batch, sites, readout), PlainEngine(backbone, batch, readout)
    assert past.mode == "layers" and "pixel_values" in past.describe()
    text = Batch({name: given[name] for name in ("input_ids", "attention_mask")})
    text.inputs["input_ids"] = text.inputs["input_ids"].clamp_max(IMAGE - 1)  # type: ignore[index]
    without, plainly = FrozenPast(backbone, text, sites, readout), PlainEngine(backbone, text, readout)
    assert without.mode == "keys and values", without.describe()
    for site in sites:
        edits = {site: loreft(WIDTH, 2, seed=1, start="paper")}
        for one, other in ((past, plain), (without, plainly)):
            compare(one, other, torch.tensor([2, 0]), edits)


def test_positions_and_heads_of_pictures(seeing: tuple[Backbone, dict[Any, Any]]) -> None:
    backbone, given = seeing
    # One more than the patches that there are; heads are found, since the layer says how many it has.
    whole = collect(backbone, given, [Site(f"{PICTURES}.block_output", 0)])
    count = next(iter(whole.values())).shape[1]
    with pytest.raises(IndexError, match=f"has {count} tokens"):
        collect(backbone, given, [Site(f"{PICTURES}.block_output", 0, count)])
    with pytest.raises(ValueError, match=r"heads .* of .*; possible are 0 to"):
        backbone.hook_point(Site(f"{PICTURES}.head_output", 0, heads=99))
    with pytest.raises(ValueError, match=f"no stack 'eyes'; the model has .*{PICTURES}"):
        backbone.hook_point(Site("eyes.block_output", 0))


# --- streams of another shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama4"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_tokens_of_all_rows_as_one_list_are_refused(name: str, positions: str, models: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"mlp_output\[1\].*\(27, 32\), is not \(rows, positions, width\)"):
        collect(Backbone(models(name)), inputs("gpt2", 3, 9), [Site("mlp_output", 1, positions)])


def test_several_streams_at_once_are_refused() -> None:
    config = t.Gemma3nTextConfig(
        **GROUPED | dict(intermediate_size=[48] * 3), head_dim=8, sliding_window=8, num_kv_shared_layers=1,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 3, hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Backbone(t.AutoModelForCausalLM.from_config(config).eval())
    given = inputs("gpt2", 4, 9)  # as many rows as streams: the shape alone tells them apart
    with pytest.raises(ValueError, match=r"block_output\[1\].*\(4, 4, 9, 32\), is not \(rows, positions, width\)"):
        forward(backbone, given, {Site("block_output", 1, "first"): loreft(WIDTH, 2)})
