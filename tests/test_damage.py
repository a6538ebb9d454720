"""The damage of an exchange on other text, against a run with plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_sweeps import WIDTH, tiny
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import bootstrap_mean
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, random_subspace
from subspace_lab.das.damage import damage

SITE = Site("block_output", 1, "last")
LENGTHS = torch.tensor([7, 5, 7, 3])
IDS = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < LENGTHS[:, None]).long()
TEXTS: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}


def by_hand(basis: Tensor) -> Tensor:
    model = tiny().model
    block: Any = model.transformer.h[1]  # type: ignore[index, union-attr]
    seen: list[Tensor] = []

    def stream(output: object) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]

    handle = block.register_forward_hook(lambda _, __, output: seen.append(stream(output).clone()))
    with torch.no_grad():
        plain = model(**TEXTS).logits
    handle.remove()
    (states,) = seen
    both = (MASK * MASK.roll(-1, 0))[..., None]
    moved = states + both * ((states.roll(-1, 0) - states) @ basis.T @ basis)

    def put(_: nn.Module, __: object, output: object) -> object:
        return moved if isinstance(output, Tensor) else (moved, *output[1:])  # type: ignore[index]

    handle = block.register_forward_hook(put)
    with torch.no_grad():
        edited = model(**TEXTS).logits
    handle.remove()
    rises = []
    for i, n in enumerate(LENGTHS.tolist()):
        loss = [nn.functional.cross_entropy(logits[i, : n - 1], IDS[i, 1:n]) for logits in (edited, plain)]
        rises.append(loss[0] - loss[1])
    return torch.stack(rises)


def test_it_is_the_rise_of_the_loss() -> None:
    small, whole = random_subspace(WIDTH, 3, 1), Axes(WIDTH)
    for subspace in (small, whole):
        found = damage(tiny(), Alignment({"v": (SITE, subspace)}), TEXTS)
        expected = by_hand(subspace.basis())
        assert found.value == pytest.approx(expected.double().mean().item(), abs=1e-4) and found.n == 4
        assert found.low == pytest.approx(bootstrap_mean(expected).low, abs=1e-4)
    assert abs(found.value) > 0.1


def test_positions_and_variables_are_exchanged_as_asked() -> None:
    one, other = random_subspace(WIDTH, 5, 1).partition({"v": 2, "w": 3}).values()
    two = damage(tiny(), Alignment({"v": (SITE, one), "w": (SITE, other)}), TEXTS)
    assert two.value == pytest.approx(by_hand(random_subspace(WIDTH, 5, 1).basis()).mean().item(), abs=1e-4)
    first = damage(tiny(), Alignment({"v": (SITE, Axes(WIDTH))}), TEXTS, positions="0")
    assert first != damage(tiny(), Alignment({"v": (SITE, Axes(WIDTH))}), TEXTS)
    same = {"input_ids": IDS[:1].expand(3, -1), "attention_mask": MASK[:1].expand(3, -1)}
    assert damage(tiny(), Alignment({"v": (SITE, Axes(WIDTH))}), same).value == pytest.approx(0, abs=1e-6)


def test_too_few_texts_are_refused() -> None:
    found = Alignment({"v": (SITE, Axes(WIDTH))})
    with pytest.raises(ValueError, match="1 texts; needed are two or more, each of two or more tokens"):
        damage(tiny(), found, {name: part[:1] for name, part in TEXTS.items()})
    with pytest.raises(ValueError, match="4 texts; needed are two or more"):
        damage(tiny(), found, {name: part[:, :1] for name, part in TEXTS.items()})
