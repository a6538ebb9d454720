"""What passes from an exchange through a later subspace: laws on chains of maps, and the same run by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from chains import FIRST, SECOND, START, WIDTH, at, basis, chain, chain_pairs, turn
from tiny_sweeps import WIDTH as STREAM
from tiny_sweeps import counterfactuals, ids_of, logits_by_hook, states_by_hook, tiny, unedited
from torch import nn

from subspace_lab.analysis.geometry import overlap
from subspace_lab.analysis.mediation import carried, mediation, mediations
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes, FixedSubspace, random_subspace


def test_all_passes_the_full_vector_behind_and_nothing_one_before() -> None:
    model, data = chain(), chain_pairs()
    whole = Alignment({"v": (SECOND, Axes(WIDTH))})
    behind = mediation(model, data, at(FIRST, basis(3)), whole)
    assert behind.share.value == pytest.approx(1, abs=1e-9)
    before = mediation(model, data, at(SECOND, basis(3)), Alignment({"v": (FIRST, Axes(WIDTH))}))
    assert before.share.value == pytest.approx(0, abs=1e-9)
    assert before.iia_held == before.iia


def test_it_passes_where_the_map_takes_it_and_not_beside() -> None:
    model, data = chain(), chain_pairs()
    moved = basis(3) @ turn().T
    beside = torch.linalg.svd(moved)[2][3:6]
    through = mediation(model, data, at(FIRST, basis(3)), at(SECOND, moved))
    assert through.share.value == pytest.approx(1, abs=1e-9)
    around = mediation(model, data, at(FIRST, basis(3)), at(SECOND, beside))
    assert around.share.value == pytest.approx(0, abs=1e-9)
    # A random subspace of three of ten dimensions is neither, and the control says what it carries.
    assert through.control is not None
    assert 0.02 < through.control.mean < 0.9 and through.control.draws == 5
    assert through.control == around.control
    told = json.loads(json.dumps(through.as_dict()))
    assert told["rank"] == 3 and told["sender"] == "0.output@all" and told["sentence"].startswith("1.00")


def test_the_share_is_that_of_runs_by_hand() -> None:
    sender, receiver = Site("block_output", 0, "last"), Site("block_output", 1, "last")
    one, held = random_subspace(STREAM, 6, 0), random_subspace(STREAM, 20, 1)
    data = counterfactuals(3)
    found = mediation(tiny(), data, Alignment({"v": (sender, one)}), Alignment({"v": (receiver, held)}), draws=2)
    source, base = states_by_hook(ids_of(data.sources["v"]), sender), states_by_hook(ids_of(data.base), receiver)
    p, q = (s.basis().T @ s.basis() for s in (one, held))
    exchange = {sender: lambda h: h + (source - h) @ p}
    plain = logits_by_hook(ids_of(data.base), exchange)
    stopped = logits_by_hook(ids_of(data.base), {**exchange, receiver: lambda h: h + (base - h) @ q})
    effect, rest = (
        (c := (logits - unedited(data)).double()) - c.mean(1, keepdim=True) for logits in (plain, stopped)
    )
    assert found.share.value == pytest.approx(1 - float((rest * effect).sum() / effect.square().sum()), abs=1e-4)
    assert found.iia.value == pytest.approx(float((plain.argmax(1) == data.answer).double().mean()))
    assert found.iia_held.value == pytest.approx(float((stopped.argmax(1) == data.answer).double().mean()))
    assert 0.05 < found.share.value < 0.98 and found.share.low < found.share.value < found.share.high


def test_other_ways_stay_open() -> None:
    """Held at the last token of a middle block, what other tokens bring on reaches the answer."""
    sender = Alignment({"v": (Site("block_output", 0, "2"), Axes(STREAM))})
    data = counterfactuals(3)
    last = mediation(tiny(), data, sender, Alignment({"v": (Site("block_output", 1, "last"), Axes(STREAM))}))
    every = mediation(tiny(), data, sender, Alignment({"v": (Site("block_output", 1, "all"), Axes(STREAM))}))
    assert last.share.value < 0.99 and every.share.value == pytest.approx(1, abs=1e-5)


def test_every_pair_in_the_order_of_the_model() -> None:
    model, data = chain(), chain_pairs()
    found = mediations(model, data, [at(SECOND, basis(2)), at(START, basis(2)), at(FIRST, basis(2))], draws=0)
    assert [(one.sender, one.receiver) for one in found] == [(START, FIRST), (START, SECOND), (FIRST, SECOND)]
    assert all(one.control is None for one in found)


def test_what_has_no_mediation_is_refused() -> None:
    model: Any
    model, data = chain(), chain_pairs()
    with pytest.raises(ValueError, match=r"both at 0\.output@all"):
        mediation(model, data, at(FIRST, basis(2)), at(FIRST, basis(2, 1)))
    unread = torch.linalg.svd(model.model[2].weight.detach())[2][-2:]
    with pytest.raises(ValueError, match="changes no answer's logit"):
        dead: Any = chain(nn.Linear(WIDTH, WIDTH))
        nn.init.zeros_(dead.model[1].weight)
        mediation(dead, data, at(FIRST, basis(2)), at(SECOND, unread))
    two = Alignment({name: (FIRST, random_subspace(WIDTH, 2, i)) for i, name in enumerate("vw")})
    with pytest.raises(ValueError, match=r"\['v', 'w'\].*alignment.only"):
        mediation(model, data, two, at(SECOND, basis(2)))


# --- the Jacobian -----------------------------------------------------------------------------------------------


def test_a_basis_is_carried_by_a_linear_map_exactly() -> None:
    found = carried(chain(), chain_pairs(), at(FIRST, basis(3)), SECOND)
    assert found.alignment.site() == SECOND and found.alignment.subspace().rank == 3
    assert overlap(found.alignment.subspace(), basis(3) @ turn().T) == pytest.approx(1, abs=1e-6)
    assert found.share == pytest.approx(1, abs=1e-6)
    assert found.eigenvalues[:3] == pytest.approx([1, 1, 1], abs=1e-4)


def test_a_basis_is_carried_by_the_mean_outer_product_of_the_jacobians() -> None:
    """Through tanh each text has a Jacobian of its own, diag(1 − tanh²) here."""

    class Squash(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(3 * h)

    model: Any
    model, data = chain(Squash()), chain_pairs()
    found = carried(model, data, at(FIRST, basis(2)), SECOND, step=1e-4)
    states = model.model[0](data.base.positional).detach()
    jacobians = [torch.diag(3 * (1 - torch.tanh(3 * h).square())) @ basis(2).T for h in states]
    mean = sum(j @ j.T for j in jacobians) / len(jacobians)
    values, vectors = torch.linalg.eigh(mean)
    assert overlap(found.alignment.subspace(), vectors[:, -2:].T) == pytest.approx(1, abs=1e-4)
    assert found.share == pytest.approx(float(values[-2:].sum() / values.sum()), abs=1e-3)
    assert found.share < 0.9


def test_a_way_that_turns_signs_around_does_not_cancel() -> None:
    class Signed(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return h * torch.sign(h[:, :1]).detach()

    data = chain_pairs(200)  # none of which the step takes across 0
    found = carried(chain(Signed()), data, at(FIRST, basis(2)), SECOND, step=1e-7)
    assert overlap(found.alignment.subspace(), basis(2)) > 0.95


def test_where_no_way_leads_nothing_is_carried() -> None:
    with pytest.raises(ValueError, match=r"moves 0 dimensions at 0\.output"):
        carried(chain(), chain_pairs(), at(SECOND, basis(2)), FIRST)
    with pytest.raises(ValueError, match="step=0"):
        carried(chain(), chain_pairs(), at(FIRST, basis(2)), SECOND, step=0)
    bent = FixedSubspace(torch.eye(WIDTH)[:2])
    assert carried(chain(), chain_pairs(), Alignment({"v": (FIRST, bent)}), SECOND).share == pytest.approx(1)
