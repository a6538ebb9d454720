"""DAS that keeps edited states near natural ones: its loss against the formula, and what it changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_illusions import PLACE, Reader, along, drawn, in_span
from tiny_sweeps import QUICK, SITES, pairs, swept
from torch import Tensor

from subspace_lab.core.interventions import interchange
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, MDAS
from subspace_lab.das.methods._natural import NearNatural
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig, shuffled_rows
from subspace_lab.model.backbone import Backbone

CONFIG = TrainingConfig(steps=40, batch_size=50, learning_rate=0.05)


def by_hand(edited: Tensor, source: Tensor, states: Tensor, values: Tensor) -> float:
    """The formula, state by state, with loops."""
    variance = float((states - states.mean(0)).square().sum(1).mean())
    total = 0.0
    for h, s in zip(edited, source, strict=True):
        value = values[(states - s).norm(dim=1).argmin()]
        same = states[values == value]
        x = same[(same - h).norm(dim=1).argmin()]
        cosine = float(h @ x / (h.norm() * x.norm()))
        total += float((h - x).square().sum()) / variance / 2 - cosine / 2
    return total / len(edited)


def test_the_loss_is_its_formula_and_the_value_decides_which_states_count() -> None:
    g = torch.Generator().manual_seed(0)
    states, values = torch.randn(30, 5, generator=g), torch.randint(0, 3, (30,), generator=g)
    h, source = torch.randn(8, 5, generator=g), states[:8]
    near = NearNatural(interchange(FixedSubspace(random_orthonormal(5, 2, 1))), states, values)
    edited = near(h, source)
    assert float(near.loss()) == pytest.approx(by_hand(edited, source, states, values), rel=1e-5)
    blind = NearNatural(near.edit, states, torch.zeros(30, dtype=torch.long))
    blind(h, source)
    assert float(blind.loss()) < float(near.loss())  # with fewer to choose from none is nearer


def training(data: Pairs) -> Counterfactuals:
    assert isinstance(data.train, Counterfactuals)
    return data.train


def test_it_is_added_to_the_loss_of_the_answers() -> None:
    """From one start: the first step's loss is that of DAS and the weight times the formula at its pairs."""
    data = Pairs(drawn(60, 0), drawn(30, 1), drawn(30, 2))
    start = random_orthonormal(8, 1, 3)
    options: dict[str, Any] = {"config": replace(QUICK, steps=1), "min_accuracy": None, "quiet": True}
    methods = [DAS(1, start=start), DAS(1, natural=0.5, start=start)]
    plain, kept = sweep(Backbone(Reader().double()), data, [PLACE], methods, **options)
    rows = next(shuffled_rows(60, replace(QUICK, seed=0)))
    base, source = training(data).base.positional, training(data).sources["v"].positional
    assert isinstance(base, Tensor) and isinstance(source, Tensor)
    edited = base[rows] + ((source - base)[rows] @ start.double().T) @ start.double()
    expected = by_hand(edited, source[rows], source, training(data).values["v"])
    assert kept.losses[0] - plain.losses[0] == pytest.approx(0.5 * expected, rel=1e-4)


def test_it_keeps_a_search_off_the_dormant_way() -> None:
    """The dormant axis is the quickest way to the answer, and no natural state is there."""
    data = Pairs(drawn(200, 0), drawn(100, 1), drawn(150, 2))
    start = along(value=0.3, copy=1, dormant=1).float()
    backbone = Backbone(Reader().double())
    methods = [DAS(1, start=start), DAS(1, natural=3.0, start=start)]
    plain, kept = sweep(backbone, data, [PLACE], methods, config=CONFIG, quiet=True)
    dormant = [float(in_span(along(dormant=1), fit.subspace().basis().double())) for fit in (plain, kept)]
    assert dormant[1] < 0.5 * dormant[0], dormant
    assert kept.iia.value >= plain.iia.value - 0.02


def test_without_weight_it_is_das_to_the_bit_and_what_is_scored_is_a_plain_exchange(tmp_path: Path) -> None:
    plain, off = (swept(method, SITES[:1])[0] for method in (DAS(2), DAS(2, natural=0.0)))
    assert plain.losses == off.losses and torch.equal(plain.subspace().basis(), off.subspace().basis())
    assert (
        DAS(2).label == DAS(2, natural=0.0).label == "DAS 2" and DAS(2, natural=0.1).label == "DAS 2 natural=0.1"
    )
    fits = swept([DAS(2, natural=[0.0, 0.2]), MDAS(2, natural=0.2)], SITES)
    assert len(fits) == 6 and not fits.failures and fits[1].method == DAS(2, natural=0.2)
    fits.save(tmp_path)
    assert Fits.load(tmp_path) == fits


def test_fits_that_are_older_than_the_setting_are_read(tmp_path: Path) -> None:
    from subspace_lab.das._fits_files import _method

    older = {"method": "DAS", "rank": 2, "learning_rate": None, "orthonormalise": "qr"}
    one = {"method": older, "label": "DAS 2", "control": False}
    assert _method(one, []) == DAS(2)
    for wrong in ({**older, "depth": 3}, {k: v for k, v in older.items() if k != "orthonormalise"}):
        if "depth" in wrong:
            with pytest.raises(ValueError, match="was saved with the settings"):
                _method({**one, "method": wrong}, [])
        else:
            assert _method({**one, "method": wrong}, []) == DAS(2)
    assert json.loads(json.dumps(DAS(2).as_dict()))["natural"] == 0.0


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="some of which share a site"):
        swept(DAS(2, natural=0.1), SITES[:1], pairs=pairs(("a", "b")))
    assert len(swept(DAS(2, natural=0.1), [{"a": SITES[0], "b": SITES[1]}], pairs=pairs(("a", "b")))) == 1
    with pytest.raises(ValueError, match="natural=-1"):
        DAS(2, natural=-1.0)
