"""Sites: small values that print and read back, and the refusals of places that a model has not."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from families import LAYERS, TRANSFORMERS, WIDTH, build, heads, spots
from hypothesis import given
from torch import nn

from subspace_lab.core.sites import COMPONENTS, HEADED, Site
from subspace_lab.model.backbone import Backbone

# --- values -------------------------------------------------------------------------------------------------

POSITIONS = st.sampled_from(["all", "last", "f3+l2", "1:3", "-1", "subject", "f2(l1)", "l2[1]", "0+3"])
STACKS = st.sampled_from(["", "encoder.", "decoder."])
PATHS = st.lists(
    st.text("abcXYZ_0189-", min_size=1, max_size=6).filter(lambda s: s not in COMPONENTS), min_size=1, max_size=4
).map(".".join)


@st.composite
def sites(draw: Callable[..., Any]) -> Site:
    positions = draw(POSITIONS)
    if draw(st.booleans()):
        return Site(f"{draw(PATHS)}.{draw(st.sampled_from(['input', 'output']))}", positions=positions)
    component = draw(st.sampled_from(COMPONENTS))
    some = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True)
    chosen = draw(st.none() | some) if component in HEADED else None
    return Site(draw(STACKS) + component, draw(st.integers(-40, 40)), positions, chosen)


@given(sites())
def test_a_site_reads_back_what_it_printed(site: Site) -> None:
    again = Site.parse(str(site))
    assert again == site and hash(again) == hash(site) and str(again) == str(site) == repr(site)
    assert {site: 1}[again] == 1


@given(st.lists(sites(), max_size=6))
def test_sites_are_told_apart_and_sorted(several: list[Any]) -> None:
    assert len({str(site) for site in several}) == len(set(several))
    ordered = sorted(several)
    assert sorted(reversed(several)) == ordered
    for one, other in itertools.pairwise(ordered):
        assert one <= other and not other < one and (one == other) == (not one < other)


def test_order_is_by_component_and_layer() -> None:
    given = [
        Site("mlp_output", 2),
        Site("mlp_output", 10),
        Site("block_output", 11),
        Site("key_output", 1, heads=0),
    ]
    given.append(Site("key_output", 1))
    assert [str(s) for s in sorted(given)] == [
        "block_output[11]@all",
        "key_output[1]@all",
        "key_output[1].heads(0)@all",
        "mlp_output[2]@all",
        "mlp_output[10]@all",
    ]


def test_what_is_written() -> None:
    assert str(Site("block_output", 3, "last")) == "block_output[3]@last"
    assert str(Site("head_output", -1, [0, 2], heads=[3, 1])) == "head_output[-1].heads(3,1)@0+2"
    assert str(Site("layers.0.output")) == "layers.0.output@all"
    assert Site.parse("block_output[3]") == Site("block_output", 3) == Site("block_output", 3, "all")
    assert Site("block_output", 3, slice(1, 3)).positions == "1:3"
    assert Site("query_output", 0, heads=2).heads == (2,)
    moved = Site("query_output", 0, "last", heads=2).at("f1")
    assert moved == Site("query_output", 0, "f1", heads=[2]) and moved != Site("query_output", 0, "f1")
    with pytest.raises(AttributeError):
        moved.layer = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site("resid_post", 1), r"Unknown component 'resid_post'. Possible: block_input, query_output"),
        (lambda: Site("output", 1), r"Unknown component 'output'"),
        (lambda: Site("block_output"), r"'block_output' needs a layer"),
        (lambda: Site("layers.0.output", 1), r"names a submodule by its path; layer=1 has no meaning"),
        (lambda: Site("block_output", 1, heads=0), r"has no heads; components with heads: query_output"),
        (lambda: Site("layers.0.output", heads=0), r"has no heads"),
        (lambda: Site("query_output", 1, heads=[]), r"heads=\(\): needed are distinct indices from 0"),
        (lambda: Site("query_output", 1, heads=[1, 1]), r"distinct"),
        (lambda: Site("query_output", 1, heads=-1), r"distinct indices from 0"),
        (lambda: Site("block_output", 1, "3rd"), r"'3rd' is not understood"),
        (lambda: Site.parse("block_output[x]"), r"'block_output\[x\]' is not a site; a site looks like"),
        (lambda: Site.parse("block_output[1].heads()"), r"is not a site"),
        (lambda: Site.parse("block_output [1]"), r"is not a site"),
        (lambda: Site.parse("block_output[1]@"), r"is not a site"),
        (lambda: Site.parse("block_output"), r"needs a layer"),
        (lambda: Site.parse(""), r"is not a site"),
    ],
)
def test_what_is_no_site_is_refused(make: Callable[..., Site], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- hook points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_component_is_where_the_architecture_has_it(name: str) -> None:
    backbone = Backbone(build(name))
    if name != "t5":
        assert backbone.depth == LAYERS
    for layer in (0, LAYERS - 1, -1):
        for component, spot in spots(name, layer % LAYERS).items():
            hook_point = backbone.hook_point(Site(component, layer))
            found = hook_point.path, hook_point.side, hook_point.columns
            assert found == (spot.path, spot.side, spot.columns), component
            if component.rpartition(".")[2] in HEADED:
                count, size = heads(name, component)
                assert hook_point.width == count * size
                part = backbone.hook_point(Site(component, layer, heads=[count - 1]))
                own = spot.columns or tuple(range(count * size))
                assert part.columns == own[-size:] and part.width == size
            elif component.endswith("mlp_activation"):
                assert hook_point.width == 48
            else:
                assert hook_point.width == WIDTH
            assert backbone.width(Site(component, layer)) == hook_point.width


@pytest.mark.parametrize(
    ("name", "site", "error", "message"),
    [
        ("llama", Site("block_output", 3), IndexError, r"layer 3 of a model with layers 0 to 2"),
        ("llama", Site("block_output", -4), IndexError, r"layer -4 of a model with layers 0 to 2"),
        ("llama", Site("head_output", 1, heads=[0, 4]), ValueError, r"heads \(0, 4\) of 4; possible are 0 to 3"),
        ("llama", Site("key_output", 1, heads=2), ValueError, r"heads \(2,\) of 2; possible are 0 to 1"),
        (
            "gpt2",
            Site("encoder.block_output", 1),
            ValueError,
            r"no stack 'encoder'; the model has one without a name",
        ),
        (
            "t5",
            Site("block_output", 1),
            ValueError,
            r"several stacks; put one of \['encoder\.', 'decoder\.'\] before it",
        ),
        (
            "t5",
            Site("middle.block_output", 1),
            ValueError,
            r"no stack 'middle'; the model has \['encoder\.', 'decoder\.'\]",
        ),
        ("mlp", Site("block_output", 1), ValueError, r"no stack of transformer blocks .* such as 'first\.output'"),
        ("mlp", Site("third.output"), ValueError, r"no submodule 'third'; it has \['bend', 'bend_again', 'first'"),
        ("gpt2", Site("transformer.h.9.output"), ValueError, r"no submodule 'transformer\.h\.9'; it has \["),
    ],
)
def test_resolved_that_a_model_has_not_are_refused(
    name: str, site: Site, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Backbone(build(name)).hook_point(site)


class SomeAttention(nn.Module):
    """Attention whose parts have names of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(8, 8)


def test_unknown_block_says_what_it_has() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"attention_here": SomeAttention()}) for _ in range(2))
    backbone = Backbone(model)
    assert backbone.depth == 2 and backbone.hook_point(Site("block_output", 1)).path == "blocks.1"
    with pytest.raises(
        ValueError, match=r"no head_output that is known. .*\['attention_here', 'attention_here.mixer'\]"
    ):
        backbone.hook_point(Site("head_output", 1))
    with pytest.raises(ValueError, match="width is not known before a run"):
        backbone.width(Site("block_output", 1))
    assert backbone.width(Site("blocks.0.attention_here.mixer.input")) == 8


def test_paths() -> None:
    backbone = Backbone(build("gpt2"))
    assert backbone.width(Site("transformer.h.0.mlp.c_fc.output")) == 48
    assert backbone.width(Site("transformer.h.0.mlp.c_fc.input")) == WIDTH
    assert Backbone(build("mlp")).width(Site("second.output")) == WIDTH
    assert Backbone(build("t5")).hook_point(Site("decoder.block.0.layer.0.output")).stack == "decoder"
    assert Backbone(build("t5")).hook_point(Site("encoder.block.0.layer.0.output")).stack == "encoder"


def test_a_backbone_is_made_of_a_module() -> None:
    model = build("mlp")
    assert Backbone(model).device == torch.device("cpu")
    bare = inspect.unwrap(Backbone.__init__)  # the checker of these tests would refuse first
    with pytest.raises(TypeError, match="a backbone already"):
        bare(object.__new__(Backbone), Backbone(model))
    with pytest.raises(TypeError, match="torch module, not from str"):
        bare(object.__new__(Backbone), "gpt2")


def test_order_of_a_run() -> None:
    """Components come in the order of `COMPONENTS`, block after block; submodules by path within their block."""
    backbone = Backbone(build("llama"))
    run = [
        Site("model.embed_tokens.output"),
        Site("block_input", 0),
        Site("block_input", 1),
        *[Site(component, 1) for component in COMPONENTS[1:-1]],
        Site("model.layers.1.self_attn.output"),
        Site("model.layers.1.mlp.gate_proj.output"),
        Site("model.layers.1.post_attention_layernorm.output"),
        Site("block_output", 1),
        Site("block_output", 2),
        Site("model.norm.output"),
        Site("lm_head.input"),
        Site(".output"),
    ]
    order = [backbone.hook_point(site).order for site in run]
    assert order == sorted(order) and len(set(order)) == len(order)
