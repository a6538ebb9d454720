"""Readouts and the plain run: the logits are the model's own at the places that were asked for."""

import itertools
from typing import Any

import families
import pytest
import torch
import transformers
from families import DECODERS, ENCODERS, LAYERS, TRANSFORMERS, WIDTH, call, exact, inputs
from torch import Tensor, nn

from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine
from subspace_lab.engine.readouts import Head, Readout, head_hook
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward

LENGTHS = (9, 4, 7, 6)
DECODER_LENGTHS = (5, 6, 3, 4)
TOKENS = [7, 3, 41, 3]
ROWS = torch.tensor([2, 0, 3, 2])


def build(name: str) -> nn.Module:
    return families.build(name, exact(name))


def fresh(name: str) -> nn.Module:
    return families.fresh(name, exact(name))


def make_batch(name: str, padding: str = "right") -> Batch:
    more: Any = {"decoder_lengths": DECODER_LENGTHS} if name == "t5" else {}
    return Batch(inputs(name, 4, 9, 0, lengths=LENGTHS, padding=padding, **more))


def whole_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return call(model, batch.inputs)


# --- where logits are read --------------------------------------------------------------------------------------


def test_positions_of_the_prompt() -> None:
    batch = Batch(make_batch("llama", "left").inputs, prompt_lengths=torch.tensor([6, 4, 5, 1]))
    readout = Readout.at(batch, "last", TOKENS)
    assert readout.index is not None
    assert readout.index.tolist() == [[5], [8], [6], [3]] and readout.valid is None
    assert readout.tokens is not None
    assert readout.tokens.tolist() == TOKENS
    ragged = Readout.at(batch, "l2")
    assert ragged.index is not None
    assert ragged.index[ragged.valid].tolist() == [4, 5, 7, 8, 5, 6, 3]
    assert ragged.valid is not None
    twice = ragged.rows(torch.tensor([3, 3])).valid
    assert twice is not None
    assert twice.tolist() == [ragged.valid[3].tolist()] * 2
    assert Readout.at(Batch.of(torch.zeros(3, 4))).index is None


def test_positions_of_a_decoder_of_its_own() -> None:
    """The last token of an encoder-decoder is the decoder's."""
    batch = Batch(make_batch("t5").inputs, prompt_lengths=torch.tensor([3, 2, 1, 2]))
    last = Readout.at(batch, "last").index
    assert last is not None
    assert last[:, 0].tolist() == [n - 1 for n in DECODER_LENGTHS]


def test_targets_are_what_comes_next() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [9, 8, -100, -100, 4], [-100, -100, -100, -100, -100]])
    readout, targets = Readout.before_labels(labels)
    # The label of the first column has nothing before it.
    assert readout.valid is not None
    assert readout.valid.tolist() == [[True, True], [True, True], [False, False]]
    assert readout.index is not None
    assert readout.index[:2].tolist() == [[1, 2], [0, 3]]
    assert targets.tolist() == [[5, 6], [8, 4], [-100, -100]]
    second = readout.rows(torch.tensor([1])).index
    assert second is not None
    assert second.tolist() == [[0, 3]]


@pytest.mark.parametrize("labels", [torch.full((2, 3), -100), torch.tensor([[5, -100], [4, -100]])])
def test_labels_that_leave_nothing_to_learn_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing is left to learn"):
        Readout.before_labels(labels)


def own_positions(batch: Batch) -> dict:
    """A left-padded decoder's positions, as generation counts them."""
    mask = batch.inputs["attention_mask"]
    return dict(batch.inputs) | {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_is_the_model_s_own(name: str, padding: str) -> None:
    batch = make_batch(name, padding)
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    real, lengths = batch.real_tokens(), batch.real_tokens().sum(1)  # type: ignore[union-attr]
    assert real is not None
    answer = (real.long().cumsum(1) - 1) >= (lengths - torch.tensor([1, 3, 2, 4]))[:, None]
    labels = labels.masked_fill(~answer, -100)
    model = build(name)
    readout, targets = Readout.before_labels(labels)
    assert (targets != -100).sum(1).tolist() == [1, 3, 2, 4]
    with torch.no_grad():
        own = model(**own_positions(batch), labels=labels).loss
        logits = PlainEngine(Backbone(model), batch, readout).logits(torch.arange(4), {})
    logits = logits.float()  # as the model's own loss
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert torch.allclose(loss, own, rtol=1e-5)


# --- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, TOKENS, [5]], ids=["vocabulary", "answers", "one"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_the_model_s(name: str, tokens: list[int] | None) -> None:
    """For heads with softcaps, scales, biases and transforms before them."""
    model, batch = build(name), make_batch(name)
    expected = whole_logits(model, batch)
    expected = expected if tokens is None else expected[..., tokens]
    for positions in ("last", "all", "f1+l1"):
        readout = Readout.at(batch, positions, tokens)
        run = PlainEngine(Backbone(model), batch, readout)
        found = run.logits(ROWS, {})
        assert readout.index is not None
        index = readout.index[ROWS]
        wanted = torch.stack([expected[row, index[i]] for i, row in enumerate(ROWS)])
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.equal(found[0], found[1])
        assert not found.requires_grad


def test_softcap_and_bias_matter() -> None:
    """The odd heads are odd here: what the head gives alone is not what the model gives."""
    model: Any
    model, batch = build("gemma2"), make_batch("gemma2")
    leaving = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: leaving.append(out))
    logits = whole_logits(model, batch)
    handle.remove()
    cap = model.config.final_logit_softcapping
    assert torch.allclose(logits, cap * torch.tanh(leaving[0] / cap), atol=1e-5)
    assert not torch.allclose(logits, leaving[0], atol=1e-3)
    bert: Any = build("bert")
    assert bert.get_output_embeddings().bias.norm() > 0.1


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_plain_heads_are_known_as_such(name: str) -> None:
    assert Head.of(Backbone(build(name))).narrow  # type: ignore[union-attr]


def count_head(model: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    linear = nn.functional.linear
    weight = model.get_output_embeddings().weight

    def counted(value: Any, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        if matrix is weight or len(matrix) in (60, len(TOKENS)):
            shapes.append((*value.shape[:-1], len(matrix)))
        return linear(value, matrix, bias)

    functional: Any = nn.functional
    functional.linear = counted
    try:
        batch = make_batch("llama")
        PlainEngine(Backbone(model), batch, Readout.at(batch, "l2", TOKENS)).logits(ROWS, {})
    finally:
        nn.functional.linear = linear
    return shapes


def test_the_head_computes_what_is_read_and_no_more() -> None:
    assert count_head(build("llama")) == [(4, 2, len(TOKENS))]


class Doubled(nn.Linear):
    def forward(self, x: Any) -> Tensor:
        return 2 * super().forward(x)


def test_heads_of_another_kind_are_run_as_they_are() -> None:
    model: Any
    model, batch = fresh("llama"), make_batch("llama")
    head = Doubled(WIDTH, 60, bias=False).double()
    head.load_state_dict(model.lm_head.state_dict())
    plain = whole_logits(model, batch)
    model.set_output_embeddings(head)
    readout = Readout.at(batch, "last", TOKENS)
    backbone = Backbone(model)
    assert head_hook(backbone, readout).side == "input"  # type: ignore[union-attr]
    found = PlainEngine(backbone, batch, readout).logits(torch.arange(4), {})
    last = plain[torch.arange(4), torch.tensor(LENGTHS) - 1][:, None]
    assert torch.allclose(found, 2 * last[..., TOKENS], atol=1e-5)
    assert count_head(model) == [(4, 2, 60)], "fewer positions even so"


def test_hooks_on_the_head_are_obeyed() -> None:
    model: Any
    model, batch = fresh("llama"), make_batch("llama")
    bias = torch.linspace(-1, 1, 60)
    model.lm_head.register_forward_hook(lambda m, args, out: out + bias)
    expected = whole_logits(model, batch)[torch.arange(4), torch.tensor(LENGTHS) - 1][:, None, TOKENS]
    found = PlainEngine(Backbone(model), batch, Readout.at(batch, "last", TOKENS)).logits(torch.arange(4), {})
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's
def test_an_adapted_head() -> None:
    """peft wraps the head: its low-rank part counts."""
    peft = pytest.importorskip("peft")
    model, batch = fresh("llama"), make_batch("llama")
    plain = whole_logits(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=4)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    backbone = Backbone(adapted)
    readout = Readout.at(batch, "last", TOKENS)
    assert head_hook(backbone, readout).side == "input"  # type: ignore[union-attr]
    expected = whole_logits(adapted, batch)
    assert (expected - plain).norm() > plain.norm() * 0.1
    at = torch.arange(4), torch.tensor(LENGTHS) - 1
    found = PlainEngine(backbone, batch, readout).logits(torch.arange(4), {})
    assert torch.allclose(found[:, 0], expected[at][:, TOKENS], atol=1e-5)
    edited = forward(
        backbone, batch, edits := {Site("block_output", 1, "last"): loreft(WIDTH, 2, seed=0, start="paper")}
    )
    found = PlainEngine(backbone, batch, readout).logits(torch.arange(4), edits)
    assert torch.allclose(found[:, 0], edited.logits[at][:, TOKENS], atol=1e-5)


@pytest.mark.parametrize("tokens", [[5], TOKENS])
def test_a_bias_behind_the_head(tokens: list[int]) -> None:
    """BART adds one of the vocabulary's size to what the head gives."""
    config = transformers.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias.copy_(torch.linspace(-3, 3, 60))
    backbone, batch = Backbone(model), make_batch("t5")
    assert not Head.of(backbone).narrow  # type: ignore[union-attr]
    readout = Readout.at(batch, "last", tokens)
    found = PlainEngine(backbone, batch, readout).logits(torch.arange(4), {})
    expected = whole_logits(model, batch)[torch.arange(4), torch.tensor(DECODER_LENGTHS) - 1][:, None, tokens]
    assert torch.allclose(found, expected, atol=1e-5)


def test_models_without_a_head_are_read_whole() -> None:
    out = call(build("mlp"), given := inputs("mlp", 4, dtype=torch.float64))
    batch = Batch.of(given)
    run = PlainEngine(Backbone(build("mlp")), batch, Readout.at(batch))
    assert torch.allclose(run.logits(ROWS, {}), out[ROWS])
    chosen = PlainEngine(Backbone(build("mlp")), batch, Readout.at(batch, tokens=[4, 1]))
    assert torch.allclose(chosen.logits(ROWS, {}), out[ROWS][:, [4, 1]])


def test_classifiers_are_read_whole() -> None:
    config = transformers.BertConfig(  # type: ignore[call-arg]
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    batch = make_batch("bert")
    found = PlainEngine(Backbone(model), batch, Readout()).logits(ROWS, {})
    assert torch.allclose(found, whole_logits(model, batch)[ROWS], atol=1e-6)


@pytest.mark.parametrize("more", [{"logits_to_keep": 1}, {"labels": torch.zeros(4, 9, dtype=torch.long)}], ids=str)
def test_inputs_that_shape_the_model_s_own_logits_and_loss(more: dict[str, Any]) -> None:
    batch = make_batch("llama")
    readout = Readout.at(batch, "2", TOKENS)
    backbone = Backbone(build("llama"))
    expected = PlainEngine(backbone, batch, readout).logits(ROWS, {})
    found = PlainEngine(backbone, Batch({**batch.inputs, **more}), readout).logits(ROWS, {})
    assert torch.equal(found, expected)


def test_a_cache_among_the_inputs_is_refused() -> None:
    batch = make_batch("llama")
    given = Batch({**batch.inputs, "past_key_values": transformers.DynamicCache()})
    with pytest.raises(ValueError, match="cache among the inputs"):
        PlainEngine(Backbone(build("llama")), given, Readout.at(batch, "last"))


def test_labels_that_a_decoder_starts_from() -> None:
    model, batch = build("t5"), make_batch("t5")
    labels = batch.inputs["decoder_input_ids"].roll(-1, 1)
    given: dict[str, Any] = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")} | {
        "labels": labels
    }
    with torch.no_grad():
        expected = model(**given).logits[ROWS, 2][:, TOKENS]
    readout = Readout(torch.full((4, 1), 2), None, torch.tensor(TOKENS))
    found = PlainEngine(Backbone(model), Batch(given), readout).logits(ROWS, {})
    assert torch.allclose(found[:, 0], expected, atol=1e-5)


# --- edits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", *ENCODERS, "t5"])
def test_edits_and_gradients_are_those_of_forward(name: str) -> None:
    backbone, batch = Backbone(build(name)), make_batch(name)
    stack = "decoder." if name == "t5" else ""
    site = Site(f"{stack}block_output", LAYERS - 2, "last")
    states = collect(backbone, batch.rows(torch.tensor([1, 2, 3, 0])), [site])
    readout = Readout.at(batch, "last", TOKENS)
    run = PlainEngine(backbone, batch, readout)
    assert isinstance(run, Engine) and len(run) == 4 and "plain" in run.describe()
    for edit in (loreft(WIDTH, 2, seed=1, start="paper"), interchange(LearnedSubspace(WIDTH, 2, seed=1))):
        sources = {site: states[site][ROWS]} if edit.needs_source else {}
        part = batch.rows(ROWS)
        whole = forward(backbone, part, {site: edit}, sources=sources).logits
        assert readout.index is not None
        expected = whole[torch.arange(4), readout.index[ROWS, 0]][:, TOKENS]
        found = run.logits(ROWS, {site: edit}, sources)[:, 0]
        gradients = [torch.autograd.grad(out.square().sum(), list(edit.parameters())) for out in (found, expected)]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(*gradients, strict=True):
            assert b.norm() > 0 and (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_an_edited_head_is_run_whole(side: str, tokens: list[int] | None) -> None:
    """It cannot be narrowed to the rows that are read and be edited as a whole at once."""
    backbone, batch = Backbone(build("llama")), make_batch("llama", "left")
    site = Site(f"lm_head.{side}", None, "last")
    edit = loreft(backbone.width(site), 2, seed=1, start="paper")
    readout = Readout.at(batch, "last", tokens)
    found = PlainEngine(backbone, batch, readout).logits(ROWS, {site: edit})[:, 0]
    expected = forward(backbone, batch.rows(ROWS), {site: edit}).logits[:, -1]
    expected = expected if tokens is None else expected[:, tokens]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, whole_logits(backbone.model, batch.rows(ROWS))[:, -1][:, tokens or ...])


def test_sources_of_ragged_positions_fit_any_rows() -> None:
    """Row 1 has 4 tokens, the data set 9: its states come as they were cut from the whole."""
    backbone, batch = Backbone(build("llama")), make_batch("llama")
    site = Site("block_output", 0, "all")
    states = collect(backbone, batch, [site])[site]
    run = PlainEngine(backbone, batch, Readout.at(batch, "last"))
    edit = interchange(LearnedSubspace(WIDTH, WIDTH, seed=0))
    rows = torch.tensor([1, 1])
    same = run.logits(rows, {site: edit}, {site: states[rows]})
    assert torch.allclose(same, run.logits(rows, {}), atol=1e-4), "a row's own states change nothing"
    other = run.logits(
        rows, {site: edit}, {site: states[rows].flip(0)[:, torch.tensor([3, 0, 1, 2, *range(4, 9)])]}
    )
    assert not torch.allclose(same, other, atol=1e-2)


@pytest.mark.parametrize("edited", ["in place", "replaced"])
def test_positions_follow_the_data(edited: str) -> None:
    """Nothing is kept of a data set that has changed since."""
    backbone, batch = Backbone(build("llama")), make_batch("llama")
    readout = Readout.at(batch, "0")
    site = Site("block_input", 0, "last")
    edits = {site: loreft(WIDTH, 2, seed=0, start="paper")}
    run = PlainEngine(backbone, batch, Readout.at(batch, "all"))
    run.logits(ROWS, edits)
    mask = batch.inputs["attention_mask"]
    if edited == "replaced":
        batch.inputs["attention_mask"] = mask = mask.clone()  # type: ignore[index]
    mask[:, 3:] = 0
    fresh_run = PlainEngine(backbone, batch, run.readout)
    assert torch.equal(run.logits(ROWS, edits), fresh_run.logits(ROWS, edits))
    assert readout.index is not None
    assert readout.index.tolist() == [[0]] * 4


def test_the_base_model_is_left_as_it_was() -> None:
    model, batch = fresh("llama"), make_batch("llama")
    flags = [i % 3 > 0 for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    run = PlainEngine(Backbone(model), batch, Readout.at(batch, "last"))
    site = Site("block_output", 1, "last")

    def failing(states: Tensor) -> Any:
        raise ZeroDivisionError

    run.logits(ROWS, {site: loreft(WIDTH, 2, seed=0)}).sum().backward()
    with pytest.raises(ZeroDivisionError):
        run.logits(ROWS, {site: failing})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rows_come_in_any_order_and_number() -> None:
    backbone, batch = Backbone(build("gpt2")), make_batch("gpt2", "left")
    run = PlainEngine(backbone, batch, Readout.at(batch, "last", TOKENS))
    single = torch.cat([run.logits(torch.tensor([i]), {}) for i in range(4)])
    for rows in itertools.chain([torch.arange(4), ROWS], torch.arange(4).split(3)):
        assert torch.allclose(run.logits(rows, {}), single[rows], atol=1e-5)
