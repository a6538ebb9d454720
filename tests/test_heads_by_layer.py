"""A head's width comes from its layer: layers with other numbers of heads, other head sizes, and stacks of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from subspace_lab.core.interventions import interchange, loreft
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, LearnedSubspace
from subspace_lab.das.methods import DAS, PCA, FullVector
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.search import search
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward

TEXT: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def laguna() -> nn.Module:
    config = t.LagunaConfig(
        **TEXT,
        num_attention_heads=4,
        num_attention_heads_per_layer=[4, 8, 2],
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return t.LagunaForCausalLM(config)


def gemma4() -> nn.Module:
    config = t.Gemma4TextConfig(  # type: ignore[call-arg]
        **TEXT,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=60,
        num_kv_shared_layers=0,
        sliding_window=8,
    )
    return t.Gemma4ForCausalLM(config)


# {name: (model, attention's path, for each layer (query heads, heads of keys, head size))}
BY_LAYER = {
    "Laguna": (laguna, [(4, 2, 8), (8, 2, 8), (2, 2, 8)]),
    "Gemma4Text": (gemma4, [(4, 2, 8), (4, 2, 16), (4, 2, 16)]),
}


@pytest.mark.parametrize("name", BY_LAYER)
def test_heads_are_those_of_the_layer(name: str) -> None:
    if not hasattr(t, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    make, sizes = BY_LAYER[name]
    torch.manual_seed(0)
    model = make().eval()
    lab, ids = Backbone(model), {"input_ids": torch.randint(3, 60, (2, 5))}
    parts = {"head_output": "o_proj", "query_output": "q_proj", "key_output": "k_proj", "value_output": "v_proj"}
    for layer, (queries, keys, size) in enumerate(sizes):
        for component, path in parts.items():
            seen: list[Any] = []
            module = model.get_submodule(f"model.layers.{layer}.self_attn.{path}")
            handle = module.register_forward_hook(
                lambda m, args, out, seen=seen, c=component: seen.append(args[0] if c == "head_output" else out)
            )
            with torch.no_grad():
                model(**ids)
            handle.remove()
            count = keys if component in ("key_output", "value_output") else queries
            for heads in ((1,), (0, count - 1)):
                site = Site(component, layer, heads=heads)
                assert lab.width(site) == size * len(heads)
                expected = torch.cat([seen[0][..., size * h : size * (h + 1)] for h in heads], -1)
                torch.testing.assert_close(collect(lab, ids, [site])[site], expected)
            with pytest.raises(ValueError, match=f"possible are 0 to {count - 1}"):
                lab.hook_point(Site(component, layer, heads=count))


# --- images -------------------------------------------------------------------------------------------------

IMAGE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    initializer_range=0.3,
)
# {name: (model, blocks, attention, its output projection, positions before the patches)}
IMAGES = {
    "vit": (lambda: t.ViTModel(t.ViTConfig(**IMAGE)), 1),
    "deit": (lambda: t.DeiTModel(t.DeiTConfig(**IMAGE)), 2),
    "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**IMAGE)), 1),
    "dinov3": (lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**IMAGE, num_register_tokens=2)), 3),
    "clip": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)), 1),
    "siglip": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**IMAGE)), 0),
}


def image_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = IMAGES[name][0]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def images(n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def last_state(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).last_hidden_state


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    model, given = image_model(name), images()
    lab, length = Backbone(model), 4 + IMAGES[name][1]
    block = next(iter(lab.anatomy.stacks.values()))[1]
    attention = next(p for p in ("attention", "self_attn") if f"{block}.{p}" in lab.anatomy.modules)
    output = next(p for p in ("o_proj", "out_proj") if f"{block}.{attention}.{p}" in lab.anatomy.modules)
    spots = {
        "query_output": (f"{block}.{attention}.q_proj", "output"),
        "key_output": (f"{block}.{attention}.k_proj", "output"),
        "value_output": (f"{block}.{attention}.v_proj", "output"),
        "head_output": (f"{block}.{attention}.{output}", "input"),
        "attention_output": (f"{block}.{attention}.{output}", "output"),
        "block_output": (block, "output"),
    }
    for component, (path, side) in spots.items():
        seen: list[Any] = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda m, args, out, seen=seen, side=side: seen.append(
                args[0] if side == "input" else out if isinstance(out, torch.Tensor) else out[0]
            )
        )
        last_state(model, given)
        handle.remove()
        for positions, at in (("all", list(range(length))), ("2", [2]), ("-1", [length - 1]), ("1:3", [1, 2])):
            site = Site(component, 1, positions)
            torch.testing.assert_close(collect(lab, given, [site])[site], seen[0][:, at])
        if component in ("query_output", "head_output", "value_output"):
            site = Site(component, 1, "2", heads=(1, 3))
            columns = [*range(8, 16), *range(24, 32)]
            torch.testing.assert_close(collect(lab, given, [site])[site], seen[0][:, [2]][..., columns])
    # An edit of one patch is the same edit by a hook.
    site, swap = Site("block_output", 1, "2"), interchange(Axes(32))
    source = collect(lab, images(seed=1), [site])[site]
    found = forward(lab, given, {site: swap}, sources={site: source}).last_hidden_state

    def put(module: nn.Module, args: Any, out: Any) -> Any:
        h = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        h[:, 2] = source[:, 0]
        return h if isinstance(out, torch.Tensor) else (h, *out[1:])

    handle = model.get_submodule(block).register_forward_hook(put)
    expected = last_state(model, given)
    handle.remove()
    torch.testing.assert_close(found, expected)
    # The class token by its name, where there is one.
    if name == "siglip":
        with pytest.raises(KeyError, match=r"'cls'; the columns are \[\]"):
            lab_states = collect(lab, given, [Site("block_output", 1, "cls")])
            assert lab_states is None
    else:
        by_name, by_number = Site("block_output", 1, "cls"), Site("block_output", 1, "0")
        assert torch.equal(*collect(lab, given, [by_name, by_number]).values())
    with pytest.raises(IndexError, match=f"whose prompt has {length} tokens"):
        collect(lab, given, [Site("block_output", 1, str(length))])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_stacks_of_a_model_of_texts_and_images(name: str) -> None:
    vision = dict(IMAGE)
    text = dict(TEXT, num_attention_heads=2, max_position_embeddings=16)
    torch.manual_seed(0)
    if name == "clip":
        model = t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    else:
        model = t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text)).eval()
    lab = Backbone(model)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **images(2)}
    for stack in ("", "text_model.encoder.layers."):
        site = Site(f"{stack}head_output", 1, "last", heads=1)
        assert lab.width(site) == 16
        states = collect(lab, given, [site])[site]
        whole = collect(lab, given, [site.at("all")])[site.at("all")]
        assert torch.equal(states[:, 0], torch.stack([whole[0, 3], whole[1, 2]]))
    site = Site("vision_model.encoder.layers.head_output", 1, "1:3", heads=(0, 3))
    assert collect(lab, given, [site])[site].shape == (2, 2, 16)


def test_a_search_among_patches() -> None:
    torch.manual_seed(0)
    model = t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=4)).eval()  # type: ignore[call-arg]

    def drawn(seed: int) -> Counterfactuals:
        g = torch.Generator().manual_seed(seed)
        answer, base_answer = (torch.randint(0, 4, (20,), generator=g) for _ in range(2))
        base, source = Batch(images(20, seed)), Batch(images(20, seed + 10))
        return Counterfactuals(base, {"v": source}, answer, base_answer, tuple("abcd"))

    pairs = Pairs(drawn(0), drawn(1), drawn(2))
    sites = [
        Site("block_output", 1, "cls"),
        Site("head_output", 1, "cls", heads=2),
        Site("block_output", 1, "1:3"),
    ]
    methods = [DAS(2), PCA(2), FullVector()]
    config = TrainingConfig(steps=3, batch_size=8)
    fits = search(Backbone(model), pairs, sites, methods=methods, config=config, min_accuracy=None, quiet=True)
    assert len(fits) == 9 and not fits.failures
    lab, base = Backbone(model), Batch(images(6))
    engine, plain = FrozenPast(lab, base, sites, Readout()), PlainEngine(lab, base, Readout())
    assert engine.mode == "layers"
    rows, edits = torch.tensor([4, 1]), {sites[2]: loreft(32, 2, seed=0, start="paper")}
    torch.testing.assert_close(engine.logits(rows, edits), plain.logits(rows, edits))
    swap = {sites[0]: interchange(LearnedSubspace(32, 3, seed=0))}
    source = {sites[0]: torch.randn(2, 1, 32)}
    torch.testing.assert_close(engine.logits(rows, swap, source), plain.logits(rows, swap, source))
