"""Rotary embeddings that depend on the longest row of a batch: the frozen past is right, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.longest import depends_on_longest, reaches
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

LIMIT = 16
SITES = [Site("block_output", 0, "-2"), Site("block_output", 1, "f2"), Site("key_output", 1, "last")]
COMMON: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
    "rope_theta": 100.0,
    "original_max_position_embeddings": LIMIT,
}


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "dynamic":
        config = LlamaConfig(**COMMON, max_position_embeddings=LIMIT, rope_parameters=dict(DYNAMIC))
        return LlamaForCausalLM(config).eval()
    phi = Phi3Config(
        **COMMON,
        max_position_embeddings=64,
        original_max_position_embeddings=LIMIT,
        rope_parameters=dict(LONG),
    )
    return Phi3ForCausalLM(phi).eval()


def batch(lengths: tuple[int, ...], padding: str) -> Batch:
    g, longest = torch.Generator().manual_seed(1), max(lengths)
    ids, mask = (torch.zeros(len(lengths), longest, dtype=torch.long) for _ in range(2))
    for row, n in enumerate(lengths):
        at = slice(longest - n, None) if padding == "left" else slice(0, n)
        ids[row, at], mask[row, at] = torch.randint(3, 60, (n,), generator=g), 1
    return Batch({"input_ids": ids, "attention_mask": mask})


def compare(lab: Backbone, data: Batch, past: FrozenPast) -> None:
    """Any rows in any company give what a plain run of the same rows gives."""
    plain = PlainEngine(lab, data, Readout.at(data))
    for i, site in enumerate(SITES):
        edit = {site: loreft(lab.width(site), 2, seed=i, start="paper")}
        for rows in ([0], [1], [2, 0], list(range(len(data)))):
            chosen = torch.tensor(rows)
            with torch.no_grad():
                expected, found = plain.logits(chosen, edit), past.logits(chosen, edit)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("lengths", [(5, 30, 12, 28), (16, 17, 9)])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_on_both_sides_are_refused_in_words(kind: str, lengths: tuple[int, ...], padding: str) -> None:
    lab, data = Backbone(model(kind)), batch(lengths, padding)
    past = FrozenPast(lab, data, SITES, Readout.at(data))
    assert past.mode != "keys and values"
    assert f"rotary embeddings ({kind}) that depend on the longest row of a batch, and rows" in past.describe()
    if kind == "longrope":  # with dynamic frequencies even plain runs depend on the runs before
        compare(lab, data, past)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("dynamic", (5, 16, 12)),
        ("dynamic", (24, 24, 24)),
        ("longrope", (5, 16, 12)),
        ("longrope", (24, 30, 17)),
    ],
)
def test_rows_on_one_side_have_a_frozen_past(kind: str, lengths: tuple[int, ...], padding: str) -> None:
    lab, data = Backbone(model(kind)), batch(lengths, padding)
    past = FrozenPast(lab, data, SITES, Readout.at(data))
    assert past.mode == "keys and values", past.describe()
    compare(lab, data, past)


class OwnRotation(nn.Module):
    """What depends on the longest row without saying so: states are scaled by the highest position."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.self_attn = block, block.self_attn

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        out = self.block(hidden_states, **kwargs)
        return out * (1 + 0.05 * float(kwargs["position_ids"].max()))


def test_what_says_nothing_of_it_is_found_by_the_check() -> None:
    odd: Any = model("longrope")
    odd.config.rope_parameters["original_max_position_embeddings"] = 10**6
    odd.model.layers[0] = OwnRotation(odd.model.layers[0])
    data = batch((5, 12, 14, 9), "left")
    past = FrozenPast(Backbone(odd), data, [Site("block_output", 1, "-2")], Readout.at(data))
    assert past.mode == "plain" and "of the shortest row alone" in past.describe()


def test_reaches() -> None:
    assert reaches(batch((3, 5), "right")).tolist() == [5, 5]
    ids = torch.ones(2, 4, dtype=torch.long)
    assert reaches(Batch({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3]])})).tolist() == [4]
    assert reaches(Batch.of(torch.ones(2, 3))).tolist() == []
    assert depends_on_longest(nn.Linear(2, 2), torch.tensor([3, 5])) is None
