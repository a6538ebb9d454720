"""What an adapter is: presets, refusals, which positions share an intervention, and the paper's counts."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from subspace_lab.core.positions import locate
from subspace_lab.reft import METHODS, ReftConfig, get_reft_model

LONGEST = 40


def test_presets_are_named_as_in_the_literature() -> None:
    assert METHODS == ("LoReFT", "NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "RED")
    for method in METHODS:
        assert ReftConfig(method.upper()).method == ReftConfig(method.lower()).method == method
    with pytest.raises(ValueError, match=r"'LoRA'.*LoReFT, NoReFT, DiReFT, ConsReFT, LobiReFT, RED"):
        ReftConfig("LoRA")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"layers": "some"}, "layers='some'"),
        ({"layers": ()}, r"layers=\(\)"),
        ({"layers": (1, 1)}, "distinct"),
        ({"positions": "f3+oops!"}, "oops"),
        ({"positions": "f0+l0"}, "nothing in any prompt"),
        ({"tied": "position", "positions": "all"}, "'all'"),
        ({"tied": "group", "positions": "f1+2:5"}, "f1\\+2:5"),
        ({"component": "nowhere"}, "nowhere"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"activation": "relu", "method": "RED"}, "relu"),
        ({"activation": "cube", "start": "paper"}, "cube"),
        ({"activation": "relu"}, "start='paper'"),
        ({"method": "DiReFT", "activation": "sigmoid"}, "start='paper'"),
        ({"basis": "fixed", "method": "DiReFT"}, "no orthonormal basis"),
        ({"parts": {"a": 2, "b": 3}}, "4 together"),
        ({"parts": {"a": 4, "b": 0}}, "1 or more"),
        ({"parts": {"a": 4}, "method": "NoReFT"}, "no orthonormal basis to split"),
        ({"parts": (("a", 2), ("a", 2))}, "distinct"),
        ({"parts": {"a.b": 4}}, "identifiers"),
    ],
    ids=str,
)
def test_contradictions_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReftConfig(**options)


def test_a_configuration_is_a_value_and_reads_back_what_it_wrote() -> None:
    given = ReftConfig(
        "DiReFT",
        rank=3,
        layers=[4, -1],
        positions="f2 + l1",
        tied="group",
        component="mlp_output",
        dropout=0.1,
        activation="gelu",
        start="paper",
        modules_to_save=["classifier"],
        base_model_name_or_path="some/model",
        revision="abc",
        seed=5,
    )
    with pytest.raises(AttributeError):
        given.rank = 4  # type: ignore[misc]
    again = ReftConfig.from_dict(json.loads(json.dumps(given.as_dict())))
    assert again == given and hash(again) == hash(given)
    assert again.layers == (4, -1) and again.positions == "f2+l1" and again.modules_to_save == ("classifier",)
    parted = ReftConfig(rank=6, parts={"one": 4, "two": 2})
    assert ReftConfig.from_dict(json.loads(json.dumps(parted.as_dict()))) == parted
    assert parted.sizes == {"one": 4, "two": 2}


def test_written_configurations_with_strange_keys_or_values_are_refused() -> None:
    facts = ReftConfig().as_dict()
    with pytest.raises(ValueError, match=r"Unknown keys \['ranks'\]"):
        ReftConfig.from_dict({**facts, "ranks": 3})
    for wrong in ({"layers": [1.5]}, {"layers": ["1"]}, {"tied": "yes"}, {"start": "there"}, {"basis": "free"}):
        with pytest.raises((ValueError, TypeError)):
            ReftConfig.from_dict({**facts, **wrong})


def test_groups() -> None:
    assert ReftConfig(positions="f3+l2").groups() == ("f3+l2",)
    assert ReftConfig(positions="f3+l2", tied="group").groups() == ("f3(l2)", "l2(f3)")
    assert ReftConfig(positions="f2+l1", tied="position").groups() == ("f2[0](l1)", "f2[1](l1)", "l1[0](f2)")
    assert ReftConfig(positions="f3", tied="group").groups() == ("f3",)
    assert ReftConfig(positions="f0+l3", tied="group").groups() == ("l3(f0)",)
    assert ReftConfig(positions="f2+l0", tied="position").groups() == ("f2[0](l0)", "f2[1](l0)")
    assert ReftConfig(positions="all").groups() == ("all",)


def chosen(spec: str, real: Tensor) -> list[Any]:
    """{positions} of each row, by a spec."""
    index, valid = locate(spec, real)
    return [{int(j) for j, ok in zip(js, oks, strict=True) if ok} for js, oks in zip(index, valid, strict=True)]


@pytest.mark.parametrize("p", range(12))
def test_whatever_is_tied_the_positions_are_the_papers(p: int) -> None:
    """p ← min(p, ⌊n/2⌋), s ← min(s, ⌈n/2⌉) where n < p + s, for every prompt length and every way to tie."""
    lengths = torch.arange(1, LONGEST + 1)
    real = torch.arange(LONGEST)[None] < lengths[:, None]
    for s in range(12):
        if p + s == 0:
            continue
        prefixes, suffixes = [], []
        for n in range(1, LONGEST + 1):
            short = n < p + s
            first, last = (min(p, n // 2), min(s, (n + 1) // 2)) if short else (p, s)
            prefixes.append(set(range(first)))
            suffixes.append(set(range(n - last, n)))
        paper = [a | b for a, b in zip(prefixes, suffixes, strict=True)]
        spec = f"f{p}+l{s}"
        (together,) = ReftConfig(positions=spec).groups()
        assert chosen(together, real) == paper, spec
        by_group = [chosen(g, real) for g in ReftConfig(positions=spec, tied="group").groups()]
        assert by_group == [side for side, count in ((prefixes, p), (suffixes, s)) if count], spec
        by_position = [chosen(g, real) for g in ReftConfig(positions=spec, tied="position").groups()]
        assert len(by_position) == p + s
        for n in range(LONGEST):
            rows = [row[n] for row in by_position]
            assert max(map(len, rows)) <= 1
            assert set().union(*rows) == paper[n] and sum(map(len, rows)) == len(paper[n]), (spec, n + 1)


def llama(
    width: int, layers: int, heads: int = 32, units: int | None = None, vocabulary: int = 32000, **more: Any
) -> transformers.LlamaForCausalLM:
    assert units is not None
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=units,
        vocab_size=vocabulary,
        **more,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def roberta(width: int, layers: int, heads: int) -> transformers.RobertaForMaskedLM:
    config = transformers.RobertaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=50265,
        max_position_embeddings=514,
    )
    with torch.device("meta"):
        return transformers.RobertaForMaskedLM(config)


def llama_7b() -> transformers.LlamaForCausalLM:
    return llama(4096, 32, units=11008)


def llama_13b() -> transformers.LlamaForCausalLM:
    return llama(5120, 40, 40, units=13824)


def llama_3_8b() -> transformers.LlamaForCausalLM:
    return llama(4096, 32, units=14336, vocabulary=128256, num_key_value_heads=8)


FEW = (3, 9, 18, 24)
PAPER = {
    "LLaMA-7B": (llama_7b, ReftConfig(rank=8, positions="f7+l7"), 2_097_408, 0.031),
    "LLaMA-13B": (llama_13b, ReftConfig(rank=8, positions="f7+l7"), 3_277_120, 0.025),
    "Llama-3-8B": (llama_3_8b, ReftConfig(rank=8, positions="f7+l7"), 2_097_408, 0.026),
    "instruct": (llama_7b, ReftConfig(rank=4, layers=FEW, positions="f5+l5", tied="group"), 262_176, 0.0039),
    "instruct, half": (
        llama_7b,
        ReftConfig(rank=2, layers=FEW, positions="f5+l5", tied="group"),
        131_088,
        0.0019,
    ),
    "DiReFT": (llama_7b, ReftConfig("DiReFT", rank=8, positions="f7+l7"), 2_097_408, 0.031),
    "RoBERTa-base": (lambda: roberta(768, 12, 12), ReftConfig(rank=1, positions="f3"), 18_444, 0.015),
    "RoBERTa-large": (lambda: roberta(1024, 24, 16), ReftConfig(rank=1, positions="f11"), 49_176, 0.014),
    "memorisation, 7B": (llama_7b, ReftConfig("ConsReFT", 1, layers=(15,), positions="last"), 4_097, None),
    "memorisation, 13B": (llama_13b, ReftConfig("ConsReFT", 1, layers=(15,), positions="last"), 5_121, None),
    "composition": (
        llama_7b,
        ReftConfig(rank=8, layers=(15,), positions="last", parts={"german": 4, "instruct": 4}),
        65_544,
        None,
    ),
    "RED": (llama_7b, ReftConfig("RED", positions="all"), 32 * 2 * 4096, 0.0039),
}


@pytest.mark.parametrize("setting", PAPER)
def test_parameter_counts_are_the_papers(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables 1 to 4, appendices F and G of arXiv 2404.03592, on the real shapes (without weights)."""
    make, config, count, percent = PAPER[setting]
    model = get_reft_model(make(), config)
    trainable, every = model.get_nb_trainable_parameters()
    assert trainable == count
    assert sum(p.numel() for p in model.adapter("default").parameters()) == count
    if percent is not None:
        digits = len(str(percent).partition(".")[2])
        assert round(100 * trainable / (every - trainable), digits) == pytest.approx(percent)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(
        f"trainable params: {count:,} || all params: {every:,} || trainable%: "
    )


def test_untied_by_position_has_one_intervention_each() -> None:
    config = ReftConfig(rank=1, layers=(0, 5), positions="f3+l2", tied="position")
    model = get_reft_model(roberta(768, 12, 12), config)
    assert model.get_nb_trainable_parameters()[0] == 2 * 5 * (2 * 768 + 1)


def test_an_intervention_for_each_of_ten_million_positions_is_refused_before_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"each of 10000001 positions.*possible are 4096"):
        ReftConfig(positions="f10000000+l1", tied="position")
    with pytest.raises(ValueError, match="10000001 positions"):
        ReftConfig.from_dict({"positions": "f10000000+l1", "tied": "position"})
    assert ReftConfig(positions="f10000000+l1").groups() == ("f10000000+l1",)


@pytest.mark.parametrize("seed", ["1", 1.0, None, True, [1]])
def test_a_seed_that_is_no_whole_number_is_refused_from_a_file_too(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed=.*whole number|parameter .seed."):
        ReftConfig.from_dict({"seed": seed})
