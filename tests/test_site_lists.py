"""Lists of sites: layers × heads × positions, all of them there."""

from __future__ import annotations

from typing import Any

import families as f
import pytest
import torch
from families import build
from tiny_sweeps import pairs, swept, tiny
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.das.fits import table_of
from subspace_lab.das.methods import DAS, FullVector, RandomSubspace
from subspace_lab.das.objectives import log_odds
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.site_lists import list_sites


def test_every_layer_at_every_position() -> None:
    assert list_sites(tiny()) == [Site("block_output", i, "all") for i in range(3)]
    assert list_sites(tiny(), "mlp_output", layers=[2, -3], positions=["f1", 3]) == [
        Site("mlp_output", layer, spec) for layer in (2, 0) for spec in ("f1", "3")
    ]
    # A list holds several sites, and a text or a list in the list is one.
    assert [site.positions for site in list_sites(tiny(), layers=0, positions=["f1+l1", [0, 2], slice(1, 3)])] == [
        "f1+l1", "0+2", "1:3",
    ]  # fmt: skip
    assert list_sites(tiny(), layers=[1, -2]) == [Site("block_output", 1)]  # the same layer


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "phi3", "neox"])
@pytest.mark.parametrize("component", ["head_output", "query_output", "key_output"])
def test_every_head_alone(name: str, component: str) -> None:
    lab, (count, width) = Backbone(build(name)), f.heads(name, component)
    found = list_sites(lab, component, positions=["1", "last"], heads="all")
    expected = [Site(component, i, p, h) for i in range(f.LAYERS) for h in range(count) for p in ("1", "last")]
    assert found == expected and {lab.width(site) for site in found} == {width}
    assert list_sites(lab, component, layers=1, positions="last", heads=[1, 0]) == [
        Site(component, 1, "last", 1), Site(component, 1, "last", 0),
    ]  # fmt: skip


def test_stacks_and_submodules() -> None:
    lab = Backbone(build("t5"))
    assert len(list_sites(lab, "decoder.head_output", heads="all")) == f.LAYERS * f.HEADS
    assert list_sites(tiny(), "transformer.ln_f.output", positions=["1", "last"]) == [
        Site("transformer.ln_f.output", None, "1"), Site("transformer.ln_f.output", None, "last"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"component": "blocks"}, ValueError, "Unknown component"),
        ({"layers": 3}, IndexError, "layer 3 of a model with layers 0 to 2"),
        ({"layers": [-4]}, IndexError, "layer -4"),
        ({"layers": []}, ValueError, "No sites"),
        ({"positions": []}, ValueError, "No sites"),
        ({"heads": "all"}, ValueError, "has no heads"),
        ({"component": "head_output", "heads": [4]}, ValueError, "possible are 0 to 3"),
        ({"component": "transformer.ln_f.output", "layers": [0]}, ValueError, "by its path"),
        ({"component": "transformer.no.output"}, ValueError, "no submodule"),
    ],
)
def test_what_the_model_has_not_is_refused(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        list_sites(tiny(), **given)


# --- searching heads ----------------------------------------------------------------------------------------


def with_head(site: Site, given: torch.Tensor, states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """By a hook on what the output projection reads: the logits, and the head's columns at the last position."""
    assert site.heads is not None
    own = slice(8 * site.heads[0], 8 * site.heads[0] + 8)
    seen = []

    def act(_: Any, args: Any) -> tuple[Any]:
        whole = args[0].clone()
        seen.append(args[0][:, -1, own].clone())
        if states is not None:
            whole[:, -1, own] = states
        return (whole,)

    model: Any = tiny().model
    handle = model.transformer.h[site.layer].attn.c_proj.register_forward_pre_hook(act)
    with torch.no_grad():
        logits = model(given).logits[:, -1]
    handle.remove()
    return logits, seen[0]


def test_heads_are_searched_each_alone() -> None:
    at = list_sites(tiny(), "head_output", layers=[1, 2], positions="last", heads="all")
    fits = swept(FullVector(), at, metrics=[log_odds])
    data = pairs().test
    base, source = (batch.inputs["input_ids"] for batch in (data.base, data.sources["v"]))

    def gap(logits: Tensor) -> Tensor:
        answers = logits[:, data.tokens]
        rows = torch.arange(len(answers))
        return answers[rows, data.answer] - answers[rows, data.base_answer]

    for fit in fits:
        _, states = with_head(fit.site, source, None)
        plain, edited = (with_head(fit.site, base, one)[0] for one in (None, states))
        expected = gap(edited) - gap(plain)
        torch.testing.assert_close(fit.pair_scores["log_odds"], expected, atol=1e-4, rtol=1e-4)
        assert float(expected.abs().max()) > 0.01


def test_the_table_names_layer_and_head() -> None:
    fits = swept(FullVector(), list_sites(tiny(), "head_output", layers=[1, 2], positions="last", heads=[0, 3]))
    table = table_of(fits)
    assert [column.header for column in table.columns][:3] == ["layer", "head", "position"]
    assert list(table.columns[0].cells) == ["1", "1", "2", "2"] and list(table.columns[1].cells) == [
        "0",
        "3",
        "0",
        "3",
    ]
    assert "<th style='text-align:left'>head</th>" in fits._repr_html_()
    together = swept(FullVector(), [Site("head_output", 1, "last", (0, 1)), Site("head_output", 1, "last", 2)])
    assert table_of(together).columns[0].header == "site"


def test_a_rank_above_a_heads_width_is_refused() -> None:
    at = list_sites(tiny(), "head_output", layers=[1], positions="last", heads="all")
    for method in (DAS(9), RandomSubspace(9)):
        with pytest.raises(
            ValueError, match=r"head_output\[1\].heads\(0\)@last: rank 9 .* width 8; possible are 1 to 8"
        ):
            swept(method, at)
    assert len(swept([DAS(8), FullVector()], at[:1])) == 2
