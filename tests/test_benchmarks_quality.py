"""The pieces of benchmarks/reft_quality.py: what each method trains, who is compared on what, and what is kept."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


def encoder(width=384):
    """The shape of the encoder in the benchmark, with random weights and few words."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    return BertModel(BertConfig(vocab_size=50, **shape), add_pooling_layer=False).eval()


def inputs():
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
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's call of its prefix
@pytest.mark.parametrize("name", PARAMETERS)
def test_what_each_method_trains(name):
    from quality_minilm import METHODS

    if "pyreft" in name:
        pytest.importorskip("pyreft", reason="pyreft asks for versions that clash; see the extra `benchmarks`")
    model = encoder()
    with torch.no_grad():
        plain = model(**inputs()).last_hidden_state
    tuned = METHODS[name].attach(model, 3)
    assert sum(p.numel() for p in tuned.parameters) == PARAMETERS[name]
    states = tuned.model(**inputs()).last_hidden_state[:, -7:]
    if not any(soft in name for soft in ("prefix", "prompt", "pyreft")):
        torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)
    if tuned.parameters:
        states[inputs()["attention_mask"].bool()].square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters)
        assert not any(p.grad is not None and not p.requires_grad for p in model.parameters())


def test_half_of_the_parameters_of_lora():
    assert PARAMETERS["LoReFT, all tokens"] <= PARAMETERS["LoRA"] / 2


def test_pyreft_edits_where_ours_does():
    pytest.importorskip("pyreft", reason="pyreft asks for versions that clash; see the extra `benchmarks`")
    from quality_minilm import METHODS

    theirs, ours = (METHODS[name].attach(encoder(), 3) for name in ("LoReFT, f3+l3, pyreft", "LoReFT, f3+l3"))
    with torch.no_grad():
        pairs = zip(ours.model.edits().values(), theirs.model.inner[0].interventions.values(), strict=True)
        for edit, other in pairs:
            edit.subspace.raw.copy_(other.rotate_layer.weight)
            edit.value.weight.copy_(other.learned_source.weight)
            edit.value.bias.copy_(other.learned_source.bias)
        states = [t.model(**inputs()).last_hidden_state for t in (ours, theirs)]
        plain = encoder()(**inputs()).last_hidden_state
    real = inputs()["attention_mask"].bool()  # the second row is shorter than the six positions
    torch.testing.assert_close(states[0][real], states[1][real], atol=1e-4, rtol=1e-4)
    assert (states[0] - plain)[real].norm() > 0.1 * plain[real].norm()


def test_batches_of_a_seed_are_the_same_and_epochs_whole():
    from quality_runs import batches_by_length

    lengths = [3 + (7 * i) % 11 for i in range(20)]
    first, again, other = (list(islice(batches_by_length(lengths, 8, seed), 6)) for seed in (0, 0, 1))
    assert first == again != other
    for epoch in (first[:3], first[3:]):
        assert sorted(i for rows in epoch for i in rows) == list(range(20))
        spread = [max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in epoch]
        assert max(spread) <= 5 < max(lengths) - min(lengths)


def test_a_run_is_kept_only_for_the_same_settings(tmp_path):
    from quality_runs import Kept

    path = tmp_path / "figures.partial.jsonl"
    runs = []

    def work():
        runs.append(1)
        return {"score": len(runs)}

    assert Kept(path, "cpu").once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 1}
    again = Kept(path, "cpu")
    assert again.once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 1}
    assert again.once({"rate": 0.2, "seeds": (0, 1)}, work) == {"score": 2}
    assert [json.loads(line)["figures"]["score"] for line in path.read_text().splitlines()] == [1, 2]
    assert Kept(None, "cpu").once({"rate": 0.1, "seeds": (0, 1)}, work) == {"score": 3}


def test_the_interval_of_a_paired_difference():
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


def test_what_counts_as_the_right_answer():
    from quality_recipes import is_right, prompted

    assert is_right("choice", "the correct answer is Answer2.", "answer2")
    assert not is_right("choice", "answer2", "answer2")
    assert is_right("number", "so 3 + 4 = 7. The final answer is: 1,007.", "1007.0")
    assert not is_right("number", "7 and then 8", "7") and not is_right("number", "none", "7")
    assert is_right("number", "The answer is (D).", "D") and not is_right("number", "A then B", "A")
    row = prompted("number", {"question": "How many?", "answer": "2+2=4\n#### 4"})
    assert row["gold"] == "4" and row["answer"].endswith("The final answer is: 4") and "How many?" in row["prompt"]


def test_recipes_are_those_of_the_paper():
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
