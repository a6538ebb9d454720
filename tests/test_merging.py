"""Edits that become weights: the same logits and generations, the same weights when taken out, and refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, WIDTH, build, call, differ, exact, fresh, inputs, rounding, state
from torch import Tensor, nn

from subspace_lab.core import interventions as iv
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace, random_subspace
from subspace_lab.core.values import Value
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import forward
from subspace_lab.model.merging import merge
from subspace_lab.reft import METHODS, ReftConfig, ReftModel, get_reft_model

WITH_B = ("gpt2", "llama", "neox", "bert", "roberta")
WITHOUT_B = ("qwen3", "gemma3", "olmo2", "phi3", "t5")
FAMILIES = (*WITH_B, *WITHOUT_B)
# mlp_activation and head_output are what a projection reads, the others what one gives.
COMPONENTS = ("mlp_output", "attention_output", "value_output", "head_output", "mlp_activation")
LENGTHS, NEW = (11, 5, 9), 6


def stirred(model: ReftModel, seed: int = 1, size: float = 0.3) -> ReftModel:
    """The adapters with other numbers everywhere, so that no part of the formula is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(
    name: str, component: str = "mlp_output", dtype: torch.dtype | None = None, base: Any = None, **options: Any
) -> ReftModel:
    """A model with a stirred adapter of every token; without b where the family has no place for it."""
    given: dict[str, Any] = {
        "rank": 3,
        "layers": (0, 2),
        "positions": "all",
        "every_token": True,
        "bias": name not in WITHOUT_B,
    }
    component = f"decoder.{component}" if name == "t5" else component
    base = fresh(name, exact(name) if dtype is None else dtype) if base is None else base
    return stirred(get_reft_model(base, ReftConfig(component=component, **{**given, **options})))


def batch(name: str) -> Any:
    padding = "left" if name in DECODERS else "right"
    more: Any = {"decoder_lengths": (11, 9, 7)} if name == "t5" else {}
    return inputs(name, lengths=LENGTHS, padding=padding, **more)


def logits(model: ReftModel | nn.Module, name: str) -> Tensor:
    """Of the real tokens: at padding an edit does nothing, and weights do what they do."""
    given = batch(name)
    if name in DECODERS:  # as `generate` counts positions behind padding on the left
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = call(model, given)
    return found[given["decoder_attention_mask" if name == "t5" else "attention_mask"].bool()]


def limit(name: str) -> float:
    """The largest relative difference of equal logits in float64; RMSNorm rounds to float32, LayerNorm does not."""
    return 1e-10 if name in ("gpt2", "neox", "bert", "roberta") else rounding(torch.float64)


# --- the same function --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_logits_are_the_edited_ones(name: str, component: str) -> None:
    model = adapted(name, component)
    with model.disable_adapter():
        plain = logits(model, name)
    edited = logits(model, name)
    assert differ(plain, edited) > 0.02, "the edit does too little to be seen"
    merged = model.merge_and_unload()
    assert type(merged) is type(build(name)) and merged is model.base_model
    assert differ(logits(merged, name), edited) < limit(name)
    assert torch.equal(logits(model, name), logits(merged, name)), "the wrapper edits a second time"


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_logits_in_lower_precision(name: str) -> None:
    """In float32 to 1e-4; in bfloat16 no farther from the exact ones than a plain run is from its own."""
    edited = logits(adapted(name, dtype=torch.float64), name)
    model = adapted(name, dtype=torch.float32)
    alone = logits(model, name)
    assert differ(logits(model.merge_and_unload(), name), alone) < 1e-4
    noise = differ(logits(fresh(name, torch.bfloat16), name), logits(fresh(name, torch.float64), name))
    merged = adapted(name, dtype=torch.bfloat16).merge_and_unload()
    assert merged.dtype == torch.bfloat16
    assert differ(logits(merged, name), edited) < 2 * noise


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("component", ["mlp_output", "mlp_activation"])
def test_every_method_merges(method: str, component: str) -> None:
    model = adapted("gpt2", component, method=method, bias=True)
    edited = logits(model, "gpt2")
    assert differ(logits(model.merge_and_unload(), "gpt2"), edited) < limit("gpt2")


@pytest.mark.parametrize(
    "options", [{"basis": "fixed"}, {"parts": {"a": 2, "b": 1}}, {"method": "RED", "bias": False}]
)
def test_other_forms_merge(options: dict[str, Any]) -> None:
    model = adapted("gpt2", **options)
    if "parts" in options:
        model.use_parts("b")
    edited = logits(model, "gpt2")
    assert differ(logits(model.merge_and_unload(), "gpt2"), edited) < limit("gpt2")


def core_edits(name: str) -> dict[Any, Any]:
    """Steering, ablation, heads, and both sides of one projection; each of its own kind."""
    g = torch.Generator().manual_seed(3)

    def some(width: int, rank: int, seed: int) -> FixedSubspace:
        return random_subspace(width, rank, seed)

    return {
        Site("mlp_output", 0): iv.steer(some(WIDTH, 1, 1), 2.0),
        Site("attention_output", 0): iv.zero_ablation(some(WIDTH, 4, 2)),
        Site("head_output", 0, heads=(1, 3)): iv.mean_ablation(some(16, 2, 3), torch.randn(9, 16, generator=g)),
        Site("value_output", 1, heads=0): iv.set_to(some(8, 2, 4), torch.tensor([1.0, -2.0])),
        Site("value_output", 1, heads=2): iv.loreft(8, 2, seed=5, start="paper"),
        Site("mlp_output", -1): iv.red(WIDTH),
    }


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_steering_ablation_and_heads_merge(name: str) -> None:
    lab, edits = Backbone(fresh(name, torch.float64)), core_edits(name)
    given = inputs(name)
    with torch.no_grad():
        expected = forward(lab, given, edits).logits
        parts = [
            forward(lab, given, {s: e for s, e in edits.items() if s != left}).logits for left in [*edits][:-1]
        ]
    assert all(differ(part, expected) > 1e-4 for part in parts), "an edit that does nothing"
    before = state(lab.model), {n: p.clone() for n, p in lab.model.named_parameters()}
    merged = merge(lab, edits)
    with torch.no_grad():
        assert differ(lab.model(**given).logits, expected) < limit(name)
    merged.undo()
    assert all(torch.equal(p, before[1][n]) for n, p in lab.model.named_parameters())


def test_a_site_by_its_path_merges() -> None:
    lab = Backbone(fresh("mlp", torch.float64))
    edits = {
        Site("second.output"): iv.loreft(WIDTH, 3, seed=1, start="paper"),
        Site("head.input"): iv.direft(WIDTH, 2, seed=2, start="paper"),
    }
    given = inputs("mlp", dtype=torch.float64)
    with torch.no_grad():
        expected = forward(lab, given, edits)
        merge(lab, edits)
        assert differ(lab.model(given), expected) < 1e-12


@pytest.mark.parametrize(("name", "component"), [("bert", "mlp_output"), ("t5", "encoder.attention_output")])
def test_encoders_merge_from_all_positions(name: str, component: str) -> None:
    """What is no prompt and no answer has no tokens that `every_token` could add."""
    base = fresh(name, torch.float64)
    config = ReftConfig(rank=3, positions="all", component=component, bias=False)
    model = stirred(get_reft_model(base, config))
    edited = logits(model, name)
    assert differ(logits(model.merge_and_unload(), name), edited) < limit(name)


# --- written and read by others -------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
sys.modules["subspace_lab"] = None  # whoever imports it meets an ImportError
import torch, transformers
try:
    import subspace_lab
except ImportError:
    pass
else:
    sys.exit("the package can be imported")
torch.set_num_threads(1)
for folder, kind in json.loads(sys.argv[1]):
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), (folder, told)
    given = torch.load(folder + "/given.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model.eval()(**given).logits, folder + "/logits.pt")
"""


def test_merged_models_run_where_this_package_is_not(tmp_path: Path) -> None:
    cases = [(name, "mlp_output") for name in FAMILIES] + [("llama", "attention_output"), ("gpt2", "value_output")]
    written = []
    for name, component in cases:
        folder = str(tmp_path / f"{name}_{component}")
        model = adapted(name, component, dtype=torch.float32)
        edited = logits(model, name)
        merged: Any = model.merge_and_unload()
        merged.save_pretrained(folder)
        given = batch(name)
        torch.save(given, f"{folder}/given.pt")
        with torch.no_grad():
            written.append((folder, type(merged).__name__, merged(**given).logits, name))
        assert differ(logits(merged, name), edited) < 1e-4
    told = json.dumps([(folder, kind) for folder, kind, *_ in written])
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, _, expected, name in written:
        found = torch.load(f"{folder}/logits.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_the_configuration_says_which_biases_there_are() -> None:
    model = adapted("llama")
    merged: Any = model.merge_and_unload()
    assert merged.config.mlp_bias and not merged.config.attention_bias
    names = {n.rpartition(".")[0].rpartition(".")[2] for n, _ in merged.named_parameters() if n.endswith("bias")}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    assert all(p.requires_grad for p in merged.parameters())
    assert not merged.model.layers[1].mlp.down_proj.bias.any() and merged.model.layers[2].mlp.down_proj.bias.any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "t5"])
def test_merged_generations_are_the_adapters(name: str) -> None:
    model, given = adapted(name), inputs(name, lengths=LENGTHS, padding="left")
    given = {k: v for k, v in given.items() if not k.startswith("decoder")}
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    edited = model.generate(**given, **options)
    prompt_alone = model.generate(**given, **options, every_token=False)
    merged: Any = model.merge_and_unload()
    assert torch.equal(merged.generate(**given, **options), edited)
    assert not torch.equal(prompt_alone, edited), "the generated tokens' edits change nothing"


# --- taken out again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_what_is_taken_out_leaves_the_model_as_it_was(name: str) -> None:
    base = fresh(name)
    reference, before = copy.deepcopy(base.state_dict()), json.dumps(base.config.to_dict(), default=str)
    model = adapted(name, base=base)
    edited = logits(model, name)
    model.merge_adapter()
    assert model.merged_adapters == ["default"] and not model.edits()
    assert not all(torch.equal(base.state_dict()[k], reference[k]) for k in reference)
    assert differ(logits(model, name), edited) < 1e-4
    model.unmerge_adapter()
    assert model.merged_adapters == [] and model.edits()
    found = base.state_dict()
    assert list(found) == list(reference) and all(torch.equal(found[k], reference[k]) for k in reference)
    assert json.dumps(base.config.to_dict(), default=str) == before
    assert torch.equal(logits(model, name), edited)
    model.merge_adapter()
    assert model.unload() is base  # as it was before it was wrapped
    assert all(torch.equal(base.state_dict()[k], reference[k]) for k in reference)
    assert all(p.requires_grad for p in base.parameters())


def test_while_merged_what_would_go_wrong_is_refused() -> None:
    model, given = adapted("gpt2"), batch("gpt2")
    model.add_adapter("other", ReftConfig(rank=2, positions="last"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are in the weights already: call `unmerge_adapter"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="already"):
        model.merge_and_unload()
    for wrong in (
        lambda: model.set_adapter("other"),
        lambda: model.disable_adapter().__enter__(),
        lambda: model.delete_adapter("default"),
        lambda: model.train_parts("a"),
        lambda: model(**given, adapter_names=["default", "__base__", "__base__"]),
    ):
        with pytest.raises(ValueError, match="in the weights"):
            wrong()
    model.delete_adapter("other")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="No adapter is merged"):
        model.unmerge_adapter()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="already for good"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="No copies"):
        model.unmerge_adapter()


def test_one_of_two_adapters_merges_and_the_other_goes_on() -> None:
    model = adapted("gpt2")
    model.add_adapter("other", ReftConfig(rank=2, layers=(1,), positions="all", every_token=True, start="paper"))
    model.set_adapter(["default", "other"])
    edited = logits(model, "gpt2")
    model.merge_adapter(["default"])
    assert [str(site) for site in model.edits()] == ["block_output[1]@all"]
    assert differ(logits(model, "gpt2"), edited) < limit("gpt2")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="block_output"):
        model.merge_adapter()
    assert model.merged_adapters == []


def test_adapters_of_one_site_do_not_merge_together() -> None:
    model = adapted("gpt2", layers=(0,))
    model.add_adapter("twin", model.adapter("default").config)
    with pytest.raises(ValueError, match=r"\['default', 'twin'\] edit mlp_output\[0\]@all"):
        model.merge_adapter(["default", "twin"])
    with pytest.raises(ValueError, match="another active adapter edits"):
        model.merge_adapter("twin")
    model.set_adapter("twin")
    model.merge_adapter("twin")
    assert model.merged_adapters == ["twin"]


def test_two_adapters_merge_together() -> None:
    model = adapted("gpt2")
    more = ReftConfig(
        rank=2, layers=(0, 1), component="head_output", positions="all", every_token=True, start="paper"
    )
    model.add_adapter("heads", more)
    model.set_adapter(["default", "heads"])
    edited = logits(model, "gpt2")
    assert differ(logits(model.merge_and_unload(), "gpt2"), edited) < limit("gpt2")


@pytest.mark.parametrize("undone", [True, False])
def test_modules_that_were_trained_along_take_their_places(undone: bool) -> None:
    base = fresh("neox", torch.float64)
    reference = copy.deepcopy(base.state_dict())
    model = adapted("neox", base=base, modules_to_save=("lm_head",))
    edited = logits(model, "neox")
    if undone:
        model.merge_adapter()
        assert differ(logits(model, "neox"), edited) < limit("neox")
        model.unmerge_adapter()
        assert all(torch.equal(base.state_dict()[k], reference[k]) for k in reference)
        assert torch.equal(logits(model, "neox"), edited)
    else:
        assert differ(logits(model.merge_and_unload(), "neox"), edited) < limit("neox")


# --- what does not merge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"positions": "f3+l3", "every_token": False},
            r"positions 'f3\+l3', weights at all tokens; use it with",
        ),
        ({"positions": "f3+l3", "every_token": False, "tied": "group"}, r"'f3\(l3\)', weights at all tokens"),
        ({"every_token": False}, "edits only the prompt.*every_token=True"),
        ({"component": "block_output"}, "GPT2Block, not a plain linear map.*mlp_output, attention_output"),
        ({"activation": "tanh", "start": "paper"}, "not one affine map"),
        ({"modules_to_save": ("mlp",)}, r"transformer.h.0.mlp is one of the modules_to_save of 'default'"),
    ],
    ids=str,
)
def test_adapters_that_no_weights_stand_for_are_refused(options: dict[str, Any], message: str) -> None:
    base = fresh("gpt2")
    reference = copy.deepcopy(base.state_dict())
    model = adapted("gpt2", base=base, **options)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    assert model.edits() and not model.merged_adapters
    assert all(torch.equal(base.state_dict()[k], reference[k]) for k in reference)


def test_dropout_has_to_be_off() -> None:
    model = adapted("gpt2", dropout=0.5)
    model.train()
    with pytest.raises(ValueError, match=r"dropout=0.5\): call `eval"):
        model.merge_adapter()
    model.eval()
    model.merge_adapter()


@pytest.mark.parametrize("name", WITHOUT_B)
def test_a_b_without_a_place_is_refused_with_the_way_out(name: str) -> None:
    model = adapted(name, bias=True)
    with pytest.raises(ValueError, match=r"has no bias that could take it.*ReftConfig\(bias=False\)"):
        model.merge_and_unload()
    unshifted = adapted(name, bias=True, method="NoReFT")
    with torch.no_grad():
        edit: Any
        for edit in unshifted.edits().values():
            edit.value.bias.zero_()
    unshifted.merge_and_unload()  # a b of zeros needs no place


class Twice(Value):
    def change(self, subspace: Any, h: Tensor, source: Any, write: Any) -> Tensor:
        return subspace.read(h) ** 2


def refused(model: Any, edits: dict[Site, Intervention], message: str) -> None:
    lab = Backbone(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        merge(lab, edits)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_edits_that_no_weights_stand_for_are_refused() -> None:
    line, site = random_subspace(WIDTH, 1, 1), Site("mlp_output", 0)
    good = iv.steer(line, 1.0)
    refused(fresh("gpt2"), {site: iv.interchange(line)}, "needs a source")
    refused(fresh("gpt2"), {site: iv.steer(line, torch.ones(3, 1))}, "not one affine map")
    refused(fresh("gpt2"), {site: Intervention(line, Twice())}, "not one affine map")
    refused(fresh("gpt2"), {site.at("last"): good}, "positions 'last'")
    refused(
        fresh("gpt2"), {site: iv.steer(random_subspace(8, 1, 1), 1.0)}, "width 32, the intervention was made for 8"
    )
    refused(fresh("gpt2"), {site: good, Site("transformer.h.0.mlp.c_proj.output"): good}, "the same dimensions")
    # The second is refused before the first has changed anything.
    refused(fresh("gpt2"), {site: good, Site("block_output", 1): good}, "GPT2Block")
    with pytest.raises(TypeError, match="edits"):
        merge(Backbone(fresh("gpt2")), {site: lambda h: h})  # type: ignore[dict-item]


def test_weights_that_cannot_be_changed_are_refused() -> None:
    line, site = random_subspace(WIDTH, 1, 1), Site("mlp_output", 0)
    edits = {site: iv.zero_ablation(line)}
    tied = fresh("llama")
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    refused(tied, edits, r"layers.0.mlp.down_proj shares its weights with model.layers.1")
    viewed = fresh("llama")
    viewed.model.layers[2].mlp.down_proj.weight = nn.Parameter(
        viewed.model.layers[0].mlp.down_proj.weight.detach()
    )
    refused(viewed, edits, "shares its weights with model.layers.2")
    same = fresh("llama")
    same.model.layers[1].mlp.down_proj = same.model.layers[0].mlp.down_proj
    refused(same, edits, "shares its weights with model.layers.1")
    hooked = fresh("llama")
    hooked.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    refused(hooked, edits, "wraps or hooks")
    quantised = fresh("llama")
    quantised.hf_quantizer = object()
    refused(quantised, edits, "is quantised")
    kind = type("Linear4bit", (nn.Linear,), {})
    quantised = fresh("llama")
    quantised.model.layers[0].mlp.down_proj.__class__ = kind
    refused(quantised, edits, r"\.Linear4bit, not a plain linear map")


def test_weights_that_become_too_large_are_refused_and_given_back() -> None:
    half = fresh("gpt2").to(torch.float16)
    edit: Any = iv.red(WIDTH)
    with torch.no_grad():
        edit.value.scale.fill_(1e6)
    refused(
        half, {Site("mlp_output", 0): edit, Site("mlp_output", 1): iv.red(WIDTH)}, "not finite in torch.float16"
    )


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model = fresh("llama")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="not in memory between runs"):
        merge(Backbone(model), {Site("mlp_output", 0): iv.zero_ablation(random_subspace(WIDTH, 1, 1))})


def test_another_active_adapter_at_the_projection_is_refused() -> None:
    model = adapted("gpt2", layers=(0,))
    by_path = ReftConfig(rank=2, layers=(0,), component="mlp_output", positions="f1")
    model.add_adapter("other", by_path)
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"another active adapter edits mlp_output\[0\]@f1"):
        model.merge_adapter(["default"])
