"""A model with adapters: the edits are the formulas at the right places, and PEFT's verbs do what they say."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import transformers
from families import Spot, build, call, editing, fresh, hooked, inputs, spots, standing
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.model.intervene import forward
from subspace_lab.reft import METHODS, ReftConfig, ReftModel, get_reft_model

LENGTHS, LENGTH = (11, 5, 1), 11


def stirred(model: ReftModel, seed: int = 0) -> Any:
    """The model with every adapter's parameters moved off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits(model: ReftModel, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def exact(edit: nn.Module) -> Callable[..., Any]:
    """The formula of an intervention, written out in float64 from its raw parameters."""
    p = {name.split(".")[-1]: t.detach().double() for name, t in edit.state_dict().items()}
    if "scale" in p:
        return lambda h: (p["scale"] * h.double() + p["bias"]).to(h.dtype)
    rows = p.get("directions", p.get("rows"))
    if rows is None:
        q, t = torch.linalg.qr(p["raw"])
        rows = (q * t.diagonal().sign()).T

    def formula(h: Tensor) -> Tensor:
        x = h.double()
        z = x @ p["weight"].T + p["bias"] if "weight" in p else p["z"].expand(*x.shape[:-1], -1)
        return (x + (z - x @ rows.T if edit.write else z) @ rows).to(h.dtype)

    return formula


def spot(name: str, site: Site) -> Spot:
    assert site.layer is not None
    return spots(name, site.layer)[site.component]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("name", "positions"), [("gpt2", "f1+l1"), ("llama", "last"), ("gemma3", "f1+l1"), ("bert", "all")]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_formula_at_its_positions(
    name: str, positions: str, padding: str, method: str
) -> None:
    base = build(name)
    model = stirred(get_reft_model(base, ReftConfig(method, rank=3, layers=(0, 2), positions=positions)))
    given = inputs(name, lengths=LENGTHS, padding=padding)
    rows = standing(positions, LENGTHS, LENGTH, padding)
    acts = {spot(name, s): editing(exact(e), rows, spot(name, s)) for s, e in model.edits().items()}
    by_hand = {**given, "position_ids": (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)}
    real = given["attention_mask"].bool()
    with torch.no_grad(), hooked(base, acts):
        expected = call(base, by_hand)[real]
    found = logits(model, given)[real]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    with torch.no_grad():
        assert (call(base, by_hand)[real] - expected).abs().max() > 0.1, "the edits do nothing"
    model.unload()


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_model_as_it_is(method: str) -> None:
    base, given = build("qwen3"), inputs("qwen3", lengths=LENGTHS)
    model = get_reft_model(base, ReftConfig(method, rank=4, positions="f2+l2"))
    same = torch.equal(logits(model, given), logits(base, given))
    assert same == (method != "ConsReFT")  # h + Rᵀ(b − R h) is never the identity
    if method in ("LoReFT", "NoReFT", "DiReFT"):
        control = get_reft_model(base, ReftConfig(method, rank=4, positions="f2+l2", start="paper"))
        assert not torch.equal(logits(control, given), logits(base, given))


def test_the_seed_says_all() -> None:
    config = ReftConfig(rank=3, start="paper", layers=(0, 1))
    one = get_reft_model(fresh("gpt2"), config).state_dict()
    torch.manual_seed(99)
    two = get_reft_model(fresh("gpt2"), config).state_dict()
    other = get_reft_model(fresh("gpt2"), ReftConfig(rank=3, start="paper", layers=(0, 1), seed=1)).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one if not k.endswith("bias"))
    bases = [v for k, v in one.items() if k.endswith("raw")]
    assert len(bases) == 2 and not torch.equal(*bases)


def test_ties() -> None:
    """Tied: one edit everywhere. By group, by position: as many as there are, each where it belongs."""
    base, given = build("gpt2"), inputs("gpt2", lengths=(11, 7, 9))
    tied: Any
    for tied, count in (("all", 1), ("group", 2), ("position", 5)):
        model = stirred(get_reft_model(base, ReftConfig(rank=2, layers=(1,), positions="f3+l2", tied=tied)))
        edits = list(model.edits().values())
        assert len(edits) == count
        where = spots("gpt2", 1)["block_output"]
        owner = {"all": [0] * 5, "group": [0, 0, 0, 1, 1], "position": [0, 1, 2, 3, 4]}[tied]
        acts = {}
        rows: dict[int, list[list[int]]] = {i: [[] for _ in range(3)] for i in range(count)}
        for row, n in enumerate((11, 7, 9)):
            for place, column in enumerate([0, 1, 2, n - 2, n - 1]):
                rows[owner[place]][row].append(column)

        def act(
            value: Any, edits: list[Any] = edits, rows: dict[int, list[list[Any]]] = rows, where: Spot = where
        ) -> Any:
            for i, edit in enumerate(edits):
                value = editing(exact(edit), rows[i], where)(value)
            return value

        acts[where] = act
        with torch.no_grad(), hooked(base, acts):
            expected = call(base, given)
        torch.testing.assert_close(logits(model, given), expected, atol=2e-4, rtol=2e-4)
        model.unload()


def test_the_prompt_is_told_by_labels_or_by_a_column() -> None:
    base, given = build("llama"), inputs("llama", lengths=(11, 9, 6))
    model = stirred(get_reft_model(base, ReftConfig(rank=2, layers=(1,), positions="last")))
    prompt = torch.tensor([4, 9, 2])
    columns = torch.arange(LENGTH)
    given["labels"] = given["input_ids"].masked_fill(columns < prompt[:, None], -100)
    given["labels"][given["attention_mask"] == 0] = -100
    given["labels"][1, 8] = 5
    prompt[1] = 8
    where = spots("llama", 1)["block_output"]
    (edit,) = model.edits().values()
    acts = {where: editing(exact(edit), [[3], [7], [1]], where)}
    with torch.no_grad(), hooked(base, acts):
        expected = base(**given)
    with torch.no_grad():
        by_labels = model(**given)
        by_column = model(**given, prompt_lengths=prompt)
        whole = model(**{k: v for k, v in given.items() if k != "labels"})
    for found in (by_labels, by_column):
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert (whole.logits - expected.logits).abs().max() > 0.1
    left: dict[str, Any] = {k: v.flip(1) if k == "attention_mask" else v.clone() for k, v in given.items()}
    for row, n in enumerate((11, 9, 6)):
        for key in ("input_ids", "labels"):
            left[key][row] = torch.cat([given[key][row, n:], given[key][row, :n]])
    with torch.no_grad():
        moved = model(**left)
    torch.testing.assert_close(moved.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_prompts_that_are_none_are_refused() -> None:
    model = get_reft_model(build("llama"), ReftConfig(rank=2))
    given = inputs("llama", lengths=(11, 9, 6))
    with pytest.raises(ValueError, match="Row 0 has no label but −100"):
        model(**given, labels=torch.full_like(given["input_ids"], -100))
    with pytest.raises(ValueError, match="Row 1 has an empty prompt"):
        labels = given["input_ids"].clone()
        labels[0, :4] = labels[2, :4] = -100
        model(**given, labels=labels)
    with pytest.raises(ValueError, match="Prompt lengths"):
        model(**given, prompt_lengths=torch.tensor([11, 10, 6]))
    with pytest.raises(ValueError, match="Labels of shape"):
        model(**given, labels=torch.tensor([0, 1, 1]))


def test_prompts_shorter_than_prefix_and_suffix_follow_the_papers_rule() -> None:
    model = stirred(get_reft_model(build("gpt2"), ReftConfig(rank=2, positions="f7+l7")))
    given = inputs("gpt2", lengths=(11, 1, 3))
    same = stirred(get_reft_model(build("gpt2"), ReftConfig(rank=2, positions="all")))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(
        logits(model, given)[real], logits(same, given)[real]
    )  # f7 and l7 cover all of them


# --- a guest ------------------------------------------------------------------------------------------------


def hooks(model: Any) -> dict[Any, Any]:
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def test_the_base_model_is_left_as_it_was() -> None:
    base, given = fresh("gpt2"), inputs("gpt2")
    for i, p in enumerate(base.parameters()):
        p.requires_grad_(i % 2 == 0)
    base.transformer.h[1].ln_1.train()
    flags = [p.requires_grad for p in base.parameters()]
    modes = [m.training for m in base.modules()]
    weights = copy.deepcopy(base.state_dict())
    before, expected = hooks(base), logits(base, given)
    model = stirred(get_reft_model(base, ReftConfig(rank=2)))
    assert not any(p.requires_grad for p in base.parameters())
    model(**given, labels=given["input_ids"], prompt_lengths=torch.tensor([3, 3, 3])).loss.backward()
    with pytest.raises(ValueError, match="no label"):
        model(**given, labels=torch.full_like(given["input_ids"], -100))
    assert model.unload() is base
    assert [p.requires_grad for p in base.parameters()] == flags
    assert [m.training for m in base.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    assert hooks(base) == before and torch.equal(logits(base, given), expected)
    assert model.adapter("default").edits[0].value.weight.grad.abs().sum() > 0


def test_what_cannot_be_made_leaves_the_base_model_alone() -> None:
    base = fresh("llama")
    for config, error, message in (
        (ReftConfig(rank=33), ValueError, "rank=33 .* width 32"),
        (ReftConfig(layers=(0, 3)), IndexError, "layers 0 to 2"),
        (ReftConfig(layers=(2, -1)), ValueError, "twice"),
        (ReftConfig(component="encoder.block_output"), ValueError, "encoder"),
        (ReftConfig(modules_to_save=("classifier",)), ValueError, "classifier.*lm_head"),
    ):
        with pytest.raises(error, match=message):
            get_reft_model(base, config)
        assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(TypeError, match="add_adapter"):
        get_reft_model(get_reft_model(base, ReftConfig()), ReftConfig())


def test_dropout_is_on_in_training_alone() -> None:
    base, given = fresh("llama").eval(), inputs("llama")
    model = stirred(get_reft_model(base, ReftConfig(rank=8, dropout=0.5)))
    plain = stirred(get_reft_model(base, ReftConfig(rank=8)))
    assert torch.equal(logits(model, given), logits(plain, given)), "dropout beside an eval model"
    model.train()
    assert not torch.equal(logits(model, given), logits(model, given))
    model.eval()
    assert torch.equal(logits(model, given), logits(plain, given))
    model.add_adapter("late", ReftConfig(rank=2, dropout=0.5))
    assert not model.adapter("late").training


# --- several adapters ---------------------------------------------------------------------------------------


def test_several_adapters() -> None:
    base, given = build("neox"), inputs("neox", lengths=(11, 5, 9))
    plain = logits(base, given)
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2", seed=1), "start")
    model.add_adapter("end", ReftConfig("DiReFT", rank=2, positions="l2", seed=2))
    stirred(model)
    assert model.active_adapters == ["start"] and model.names == ["start", "end"]
    start = logits(model, given)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(n.startswith("adapters.start.") for n in trainable)
    model.set_adapter("end")
    end = logits(model, given)
    assert all(n.startswith("adapters.end.") for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter(["start", "end"])
    both = logits(model, given)
    assert len(model.edits()) == 6
    acts = {}
    for layer in range(3):
        where = spots("neox", layer)["block_output"]
        first, last = (model.adapter(n).edits[layer] for n in ("start", "end"))

        def act(
            value: Any, first: nn.Module = first, last: nn.Module = last, where: Spot = where
        ) -> Tensor | None:
            value = editing(exact(first), [[0, 1]] * 3, where)(value)
            return editing(exact(last), [[9, 10], [3, 4], [7, 8]], where)(value)

        acts[where] = act
    with torch.no_grad(), hooked(base, acts):
        torch.testing.assert_close(both, call(base, given), atol=2e-4, rtol=2e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, given), plain)
        with pytest.raises(RuntimeError), model.disable_adapter():
            raise RuntimeError
        assert model.active_adapters == []
    assert model.active_adapters == ["start", "end"] and torch.equal(logits(model, given), both)
    assert len({t.sum().item() for t in (plain, start, end, both)}) == 4
    model.delete_adapter("start")
    assert model.names == model.active_adapters == ["end"] and torch.equal(logits(model, given), end)


def test_adapters_at_the_same_positions_are_refused() -> None:
    base = build("neox")
    model = get_reft_model(base, ReftConfig(rank=2, positions="f2"))
    model.add_adapter("same", ReftConfig(rank=3, layers=(1,), positions="f2"))
    with pytest.raises(ValueError, match=r"edit block_output\[1\]@f2; their positions must be disjoint"):
        model.set_adapter(["default", "same"])
    assert model.active_adapters == ["default"]
    model.add_adapter("overlap", ReftConfig(rank=3, layers=(1,), positions="l2"))
    model.set_adapter(["default", "overlap"])
    logits(model, inputs("neox", lengths=(11, 5, 4)))
    with pytest.raises(ValueError, match=r"same positions of one stream \(row 2"):
        logits(model, inputs("neox", lengths=(11, 5, 3)))


def test_names_of_adapters() -> None:
    model = get_reft_model(build("gpt2"), ReftConfig(rank=2))
    for name in ("default", "a.b", "keys"):
        with pytest.raises(ValueError, match=f"'{name}' is taken or has a dot"):
            model.add_adapter(name, ReftConfig(rank=2))
    for act in (model.set_adapter, model.delete_adapter, model.adapter):
        with pytest.raises(ValueError, match=r"No adapter 'other'; there are \['default'\]"):
            act("other")


# --- to and from subspaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["learned", "fixed"])
def test_an_edit_starts_in_a_subspace_that_was_found(basis: Literal["learned", "fixed"]) -> None:
    base, given = build("gpt2"), inputs("gpt2")
    sites = [Site("block_output", layer, "last") for layer in (0, 2)]
    found = {site: random_subspace(32, 3, seed) for seed, site in enumerate(sites)}
    alignment = Alignment({f"v{site.layer}": (site, subspace) for site, subspace in found.items()})
    model = get_reft_model(base, alignment, config=ReftConfig(basis=basis))
    for site, subspace in found.items():
        torch.testing.assert_close(model.subspace(site).basis(), subspace.basis(), atol=1e-6, rtol=0)
        torch.testing.assert_close(model.subspace(str(site)).basis(), subspace.basis(), atol=1e-6, rtol=0)
    assert torch.equal(logits(model, given), logits(base, given))
    count = model.get_nb_trainable_parameters()[0]
    assert count == 2 * ((2 if basis == "learned" else 1) * 32 * 3 + 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**given, labels=given["input_ids"], prompt_lengths=torch.tensor([9, 9, 9])).loss.backward()
    optimizer.step()
    for site, subspace in found.items():
        moved = (model.subspace(site).basis() - subspace.basis()).abs().max()
        # At W = R, b = 0 the basis has no gradient yet; one step later it has.
        assert moved < 1e-5 if basis == "fixed" else moved < 1e-2
    model(**given, labels=given["input_ids"], prompt_lengths=torch.tensor([9, 9, 9])).loss.backward()
    optimizer.step()
    moved = max((model.subspace(s).basis() - f.basis()).abs().max() for s, f in found.items())
    assert (moved == 0) == (basis == "fixed")


def test_subspaces_of_sites_without_an_edit_are_refused() -> None:
    model = get_reft_model(build("gpt2"), ReftConfig(rank=3, layers=(1,), positions="last"))
    with pytest.raises(ValueError, match=r"edited are \['block_output\[1\]@last'\]"):
        model.subspace("block_output[0]@last")


@pytest.mark.parametrize("options", [*METHODS, "tanh", "parts"])
def test_folded_edits_are_the_same_function_in_plain_matrices(options: Any) -> None:
    base, given = build("llama"), inputs("llama", lengths=(11, 5, 9), padding="left")
    more: Any = {
        "tanh": {"activation": "tanh", "start": "paper"},
        "parts": {"parts": {"a": 2, "b": 1}},
    }.get(options, {"method": options})
    model = stirred(get_reft_model(base, ReftConfig(rank=3, **more)))
    folded = model.fold()
    assert list(folded) == list(model.edits())
    for edit in folded.values():
        assert type(edit) is Intervention and not any(p.requires_grad for p in edit.parameters())
        if options in ("LoReFT", "NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "parts"):
            kinds = {type(m).__name__ for m in edit.modules()}
            assert kinds == {"Intervention", "FreeDirections", "Affine", "Dropout"} and not edit.write
    real = given["attention_mask"].bool()
    with torch.no_grad():
        found = forward(model.backbone, given, folded).logits
        torch.testing.assert_close(found[real], logits(model, given)[real], atol=1e-4, rtol=1e-4)
        stirred(model, seed=1)  # what was folded does not change with the adapter
        assert torch.equal(forward(model.backbone, given, folded).logits, found)


# --- other tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_encoder_decoder(stack: str) -> None:
    base = build("t5")
    given = inputs("t5", lengths=(11, 5, 9))
    labels = given["decoder_input_ids"]
    del given["decoder_input_ids"], given["decoder_attention_mask"]
    config = ReftConfig(rank=3, layers=(1,), positions="f1+l1", component=f"{stack}.block_output")
    model = stirred(get_reft_model(base, config))
    where = spots("t5", 1)[f"{stack}.block_output"]
    (edit,) = model.edits().values()
    lengths = (11, 5, 9) if stack == "encoder" else (11, 11, 11)
    acts = {where: editing(exact(edit), standing("f1+l1", lengths, LENGTH), where)}
    with torch.no_grad(), hooked(base, acts):
        expected = base(**given, labels=labels)
    output = model(**given, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_masked_language_model() -> None:
    base, given = build("roberta"), inputs("roberta", lengths=(11, 5, 9))
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 2] = given["input_ids"][:, 2]
    model = stirred(get_reft_model(base, ReftConfig(rank=3, layers=(0,), positions="last")))
    where = Spot("roberta.encoder.layer.0", "output")
    (edit,) = model.edits().values()
    with torch.no_grad(), hooked(base, {where: editing(exact(edit), [[10], [4], [8]], where)}):
        expected = base(**given, labels=labels).loss
    found = model(**given, labels=labels)  # −100 tells no prompt from an answer here
    torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=1e-5)


def test_modules_to_save_stand_in_for_those_of_the_base_model() -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    base = transformers.BertForSequenceClassification(config).eval()
    given = inputs("bert", lengths=(11, 5, 9))
    model = get_reft_model(base, ReftConfig(rank=2, positions="first", modules_to_save=["classifier", "pooler"]))
    saved = model.adapter("default").saved
    assert set(saved) == {"classifier", "bert/pooler"} and torch.equal(logits(model, given), logits(base, given))
    model(**given, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in base.parameters())
    with torch.no_grad():
        for module in saved.values():
            for p in module.parameters():
                p.normal_()
        changed = logits(model, given)
        expected = copy.deepcopy(base)
        expected.classifier, expected.bert.pooler = copy.deepcopy(saved["classifier"]), saved["bert/pooler"]
    torch.testing.assert_close(changed, logits(expected, given))
    with model.disable_adapter():
        assert torch.equal(logits(model, given), logits(base, given))
    assert not torch.equal(changed, logits(base, given))


def test_a_model_that_is_no_transformer_is_refused_clearly() -> None:
    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        get_reft_model(nn.Sequential(nn.Linear(4, 4)), ReftConfig(rank=2))


def test_what_the_base_model_does_not_know_it_refuses() -> None:
    model = get_reft_model(build("gpt2"), ReftConfig(rank=2))
    with pytest.raises(TypeError, match="noise_level"):
        model(**inputs("gpt2"), noise_level=3)
    assert isinstance(model, ReftModel)
