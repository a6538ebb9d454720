"""The pieces of benchmarks/reft_quality.py: what each method trains, who is compared on what, and what is kept."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


def encoder(width: int = 384) -> Any:
    """The shape of the encoder in the benchmark, with random weights and few words."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    return BertModel(BertConfig(vocab_size=50, **shape), add_pooling_layer=False).eval()


def inputs() -> dict[Any, Any]:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 2], [1, 5, 2, 0, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


# Counted by hand: 6 layers, width 384, MLP 1536.
PARAMETERS = {
    "head only": 0,
    "LoReFT, all tokens": 5 * (2 * 384 * 4 + 4),
    "LoReFT, f3+l3": 6 * (2 * 384 * 4 + 4),
    "LoReFT, f3+l3, pyreft": 6 * (2 * 384 * 4 + 4),
    "DiReFT, all tokens": 5 * (2 * 384 * 4 + 4),
    "LoRA": 6 * 2 * 2 * 384 * 4,
    "DoRA": 6 * 2 * (2 * 384 * 4 + 384),
    "prefix tuning": 4 * 6 * 2 * 384,
    "prompt tuning": 8 * 384,
    # Behind the outputs of keys and values, before the inputs of both dense outputs.
    "(IA)³": 6 * (3 * 384 + 1536),
    "BitFit": 384 + 6 * (7 * 384 + 1536),
    "LoReFT, mlp_output": 5 * (2 * 384 * 4 + 4),
    "LoReFT, mlp_output, rank 8": 6 * (2 * 384 * 8 + 8),
    "DiReFT, mlp_output, rank 8": 6 * (2 * 384 * 8 + 8),
    "adapters, serial": 6 * 2 * (2 * 384 * 4 + 4 + 384),
    "adapters, parallel": 6 * (2 * 384 * 8 + 8 + 384),
    "LoRA, base in nf4": 6 * 2 * 2 * 384 * 4,
    # Embeddings of eight tokens and a network of three layers on them.
    "P-tuning": 8 * 384 + (384 * 32 + 32) + (32 * 32 + 32) + (32 * 384 + 384),
}
CHANGES = ("prefix", "prompt", "pyreft", "P-tuning", "nf4")  # from the start


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's call of its prefix
@pytest.mark.parametrize("name", PARAMETERS)
def test_what_each_method_trains(name: str) -> None:
    from quality_minilm import METHODS

    if "pyreft" in name:
        pytest.importorskip("pyreft", reason="pyreft asks for versions that clash; see the extra `benchmarks`")
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    model = encoder()
    with torch.no_grad():
        plain = model(**inputs()).last_hidden_state
    tuned = METHODS[name].attach(model, 3)
    assert sum(p.numel() for p in tuned.parameters) == PARAMETERS[name]
    states = tuned.model(**inputs()).last_hidden_state[:, -7:]
    if not any(part in name for part in CHANGES):
        torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)
    if tuned.parameters:
        states[inputs()["attention_mask"].bool()].square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters)
        assert not any(p.grad is not None and not p.requires_grad for p in model.parameters())


def test_half_of_the_parameters_of_lora() -> None:
    assert PARAMETERS["LoReFT, all tokens"] <= PARAMETERS["LoRA"] / 2


def test_methods_that_are_compared_at_equal_size_have_it() -> None:
    for name in (
        "LoReFT, mlp_output, rank 8",
        "DiReFT, mlp_output, rank 8",
        "adapters, serial",
        "adapters, parallel",
    ):
        assert abs(PARAMETERS[name] / PARAMETERS["LoRA"] - 1) <= 0.2
    assert PARAMETERS["LoReFT, mlp_output"] == PARAMETERS["LoReFT, all tokens"]


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def test_bottleneck_adapters_are_their_formulas() -> None:
    """Serial h + U gelu(D h) behind a projection; parallel MLP(x) + U gelu(D x), also inside BERT's norm."""
    from quality_adapters import Parallel, Serial

    def added(adapter: Any, h: Tensor) -> Tensor:
        down, up = adapter.added.down, adapter.added.up
        return torch.nn.functional.gelu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias

    x = torch.randn(2, 3, 8, dtype=torch.float64)
    linear = torch.nn.Linear(8, 8)
    serial, parallel = (randomised(kind(linear, 8, 3)).double() for kind in (Serial, Parallel))
    torch.testing.assert_close(serial(x), linear(x) + added(serial, linear(x)))
    torch.testing.assert_close(parallel(x), linear(x) + added(parallel, x))
    layer = encoder(width=24).encoder.layer[0].double()
    inside = torch.nn.functional.gelu(layer.intermediate.dense(h := torch.randn(2, 3, 24, dtype=torch.float64)))
    mine = randomised(Parallel(layer.output, 24, 5)).double()
    wanted = layer.output.LayerNorm(layer.output.dense(inside) + added(mine, h) + h)
    torch.testing.assert_close(mine(inside, h), wanted)


def language_model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape)).eval()


def test_only_the_chosen_heads_are_edited_and_they_are_those_of_the_largest_gradient() -> None:
    from quality_adapters import head_edits, keep_heads

    tuned = head_edits()(language_model(), 0)
    ids = torch.randint(3, 40, (4, 7))
    labels = ids.masked_fill(torch.arange(7) < 5, -100)

    def loss_of(_: int) -> Any:
        return tuned.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    model: Any = tuned.model
    edits = model.edits().values()
    loss_of(0).backward()
    norms = torch.stack([e.value.scale.grad.view(4, 8).square().sum(1) for e in edits])
    for p in tuned.parameters:
        p.grad = None
    assert keep_heads(tuned, loss_of, heads=2, batches=1) == 2 * (8 + 8)
    assert all(p.grad is None for p in tuned.parameters)
    optimizer = torch.optim.AdamW(tuned.parameters, lr=0.1, weight_decay=0.0)
    for i in range(3):
        optimizer.zero_grad()
        loss_of(i).backward()
        optimizer.step()
    moved = torch.stack(
        [(e.value.scale - 1).view(4, 8).abs().sum(1) + e.value.bias.view(4, 8).abs().sum(1) for e in edits]
    )
    assert set(moved.flatten().nonzero()[:, 0].tolist()) == set(norms.flatten().topk(2).indices.tolist())


def test_an_answer_is_right_if_greedy_decoding_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import quality_smollm2 as smollm2

    model = language_model()
    monkeypatch.setattr(smollm2, "loaded", lambda device: (model, SimpleNamespace(pad_token_id=0)))
    rows, wanted = [], []
    for i, n in enumerate((3, 6, 4, 5, 3, 6)):
        prompt = torch.randint(3, 40, (1, n))
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3, do_sample=False,
            pad_token_id=0,
        )[0].tolist()  # fmt: skip
        if i % 2:
            whole[n + i // 2] = 1 + whole[n + i // 2] % 38  # one token differs: the first, the second, the third
        rows.append({"input_ids": whole, "attention_mask": [1] * len(whole), "labels": [-100] * n + whole[n:]})
        wanted.append(i % 2 == 0)
    assert smollm2.right(model, rows, "cpu", size=4) == wanted


def test_sizes_of_the_methods_on_the_chat_model() -> None:
    """Width 576, 30 layers, 9 heads of 64, 3 for keys and values, MLP 1536; free sizes within a fifth of LoRA's."""
    from quality_smollm2 import HEADS, METHODS

    lora = 30 * 2 * ((576 + 576) + (576 + 192))
    sizes = {"LoRA": lora, "DoRA": lora + 30 * (576 + 192)}
    reft = [name for name in METHODS if "ReFT" in name]
    sizes |= {name: 30 * (2 * 576 * 3 + 3) for name in reft} | {"LoReFT, two layers": 2 * (2 * 576 * 50 + 50)}
    assert all(abs(size / lora - 1) <= 0.2 for size in sizes.values())
    free = {"RED": 30 * 2 * 576, "(IA)³": 30 * (2 * 192 + 1536), "head edits": HEADS * 2 * 64}
    assert set(sizes) | set(free) == set(METHODS)


def test_which_rows_were_right_is_written_and_read() -> None:
    from reft_quality import compared, hits, packed

    runs = [{"wrong": [0, 3], "tested": 6}, {"wrong": [], "tested": 6}]
    row = {"method": "mine", "tested": 6, "right by seed": [packed(run) for run in runs]}
    assert hits(row).tolist() == [[False, True, True, False, True, True], [True] * 6]
    worse = [packed({"wrong": [0, 1, 2, 3], "tested": 6}) for _ in range(2)]
    rows = [row, {"method": "LoRA", "tested": 6, "right by seed": worse}, {"method": "unknown rows"}]
    mine, lora, unknown = compared(rows, ["LoRA"])  # type: ignore[arg-type]
    assert mine["− LoRA"]["by seed"] == pytest.approx([2 / 6, 4 / 6])
    assert mine["− LoRA"]["mean"] == pytest.approx(0.5)
    assert "− LoRA" not in lora and "− LoRA" not in unknown


def test_rows_of_a_task_are_compared_within_it() -> None:
    from reft_quality import compared

    bits = {"tested": 4, "right by seed": ["f"]}
    rows = [{"task": "a", "method": "x", **bits}, {"task": "b", "method": "LoRA", **bits}]
    assert "− LoRA" not in compared(rows, ["LoRA"])[0]


def test_rows_that_a_call_did_not_measure_stay() -> None:
    from reft_quality import with_older

    before = {
        "machine": {"transformers": "5.0"},
        "table": {"minilm": [{"method": "a"}, {"method": "b", "test": 0}]},
    }
    found = with_older([{"method": "c"}, {"method": "b", "test": 1}], before, "minilm")
    assert found == [{"transformers": "5.0", "method": "a"}, {"method": "b", "test": 1}, {"method": "c"}]


def test_with_kept_only_nothing_is_run(tmp_path: Path) -> None:
    from quality_runs import Kept, NotKept

    Kept(path := tmp_path / "figures.partial.jsonl", "cpu").once({"rate": 0.1}, lambda: {"score": 1})
    only = Kept(path, "cpu", only=True)
    assert only.once({"rate": 0.1}, lambda: {"score": 2}) == {"score": 1}
    with pytest.raises(NotKept):
        only.once({"rate": 0.2}, lambda: pytest.fail("it ran"))


def test_pyreft_edits_where_ours_does() -> None:
    pytest.importorskip("pyreft", reason="pyreft asks for versions that clash; see the extra `benchmarks`")
    from quality_minilm import METHODS

    theirs, ours = (METHODS[name].attach(encoder(), 3) for name in ("LoReFT, f3+l3, pyreft", "LoReFT, f3+l3"))
    with torch.no_grad():
        pairs = zip(ours.model.edits().values(), theirs.model.inner[0].interventions.values(), strict=True)  # type: ignore[operator, index, union-attr]
        for edit, other in pairs:
            edit.subspace.raw.copy_(other.rotate_layer.weight)
            edit.value.weight.copy_(other.learned_source.weight)
            edit.value.bias.copy_(other.learned_source.bias)
        states = [t.model(**inputs()).last_hidden_state for t in (ours, theirs)]
        plain = encoder()(**inputs()).last_hidden_state
    real = inputs()["attention_mask"].bool()  # the second row is shorter than the six positions
    torch.testing.assert_close(states[0][real], states[1][real], atol=1e-4, rtol=1e-4)
    assert (states[0] - plain)[real].norm() > 0.1 * plain[real].norm()


def test_a_quick_run_leaves_out_what_is_not_installed_and_any_other_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import reft_quality

    missing = ["pyreft", "bitsandbytes"]
    monkeypatch.setattr(reft_quality, "find_spec", lambda name: None if name in missing else name)
    names = ["LoReFT", "LoReFT, pyreft", "LoRA", "LoRA, base in nf4"]
    assert reft_quality.possible("stories", names, True) == ["LoReFT", "LoRA"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out of stories, LoReFT, pyreft: pip install --no-deps pyreft==0.1.0"
    assert lines[1] == "left out of stories, LoRA, base in nf4: pip install --no-deps bitsandbytes"
    with pytest.raises(SystemExit, match="Not installed for stories, LoReFT, pyreft: pip install"):
        reft_quality.possible("stories", names, False)
    assert reft_quality.possible("minilm", ["LoRA"], False) == ["LoRA"]
    missing.append(reft_quality.minilm.PACKAGE)  # type: ignore[attr-defined]
    assert reft_quality.possible("minilm", ["LoRA"], True) == []


def test_batches_of_a_seed_are_the_same_and_epochs_whole() -> None:
    from quality_runs import batches_by_length

    lengths = [3 + (7 * i) % 11 for i in range(20)]
    first, again, other = (list(islice(batches_by_length(lengths, 8, seed), 6)) for seed in (0, 0, 1))
    assert first == again != other
    for epoch in (first[:3], first[3:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(20))
        spread = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in epoch]
        assert max(spread) <= 5 < max(lengths) - min(lengths)


def test_a_run_is_kept_only_for_the_same_settings(tmp_path: Path) -> None:
    from quality_runs import Kept

    path = tmp_path / "figures.partial.jsonl"
    runs = []

    def work() -> dict[Any, Any]:
        runs.append(1)
        return {"score": len(runs)}

    assert Kept(path, "cpu").once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 1}
    again = Kept(path, "cpu")
    assert again.once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 1}
    assert again.once({"rate": 0.2, "seeds": (0, 1)}, work) == {"score": 2}
    assert [json.loads(line)["figures"]["score"] for line in path.read_text().splitlines()] == [1, 2]
    assert Kept(None, "cpu").once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 3}


def test_the_interval_of_a_paired_difference() -> None:
    from quality_runs import paired_interval

    generator = torch.Generator().manual_seed(0)
    one = torch.rand(3, 400, generator=generator) < 0.8
    other = one.clone()
    assert paired_interval(one, other, draws=200) == (0, 0, 0)
    other[:, :40] = False
    mean, low, high = paired_interval(one, other, draws=500)
    assert low < mean < high and mean == pytest.approx(one[:, :40].double().sum().item() / 1200)
    # Standard error of a mean of 400 whose spread is known.
    error = (one.double() - other.double()).mean(0).std().item() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_what_counts_as_the_right_answer() -> None:
    from quality_recipes import is_right, prompted

    assert is_right("choice", "the correct answer is Answer2.", "answer2")
    assert not is_right("choice", "answer2", "answer2")
    assert is_right("number", "so 3 + 4 = 7. The final answer is: 1,007.", "1007.0")
    assert not is_right("number", "7 and then 8", "7") and not is_right("number", "none", "7")
    assert is_right("number", "The answer is (D).", "D") and not is_right("number", "A then B", "A")
    row = prompted("number", {"question": "How many?", "answer": "2+2=4\n#### 4"})
    assert row["gold"] == "4" and row["answer"].endswith("The final answer is: 4") and "How many?" in row["prompt"]


def test_recipes_are_those_of_the_paper() -> None:
    """Parameters that the paper counts: layers × groups × (2 d k + k)."""
    from quality_recipes import RECIPES

    depth = {"commonsense": (32, 4096), "arithmetic": (32, 4096), "instruct": (32, 4096), "glue-sst2": (12, 768)}
    counted = {}
    for name, (layers, width) in depth.items():
        recipe = RECIPES[name]
        edited = layers if recipe.layers == "all" else len(recipe.layers)
        groups = 2 if recipe.tied == "group" else 1
        counted[name] = edited * groups * (2 * width * recipe.rank + recipe.rank)
    assert counted == {"commonsense": 2_097_408, "arithmetic": 2_097_408, "instruct": 262_176, "glue-sst2": 18_444}
    assert {name: r.batch * r.accumulate for name, r in RECIPES.items()} == {
        "commonsense": 32,
        "arithmetic": 32,
        "instruct": 128,
        "glue-sst2": 32,
    }
