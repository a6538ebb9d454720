"""Scores beside IIA: the whole vocabulary, the complement, kinds of pairs, clusters; each against plain hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import (
    ANSWERS,
    PAIRS,
    SITES,
    _column,
    counterfactuals,
    ids_of,
    pairs,
    states_by_hook,
    swept,
    tiny,
    unedited,
)
from torch import Tensor, nn

from subspace_lab.core.estimates import Clusters, estimate, proportion
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, RandomSubspace
from subspace_lab.das.objectives import (
    Divergence,
    JensenShannon,
    Outcome,
    complement_stays,
    disentangle,
    iia,
    iia_vocabulary,
    iso,
)
from subspace_lab.das.pairs import Counterfactuals, Pairs

KINDS = tuple("cause" if i % 3 else "isolate" for i in range(PAIRS))
ENTITIES = tuple(f"e{i % 12}" for i in range(PAIRS))
TEMPLATES = tuple(f"t{i % 5}" for i in range(PAIRS))
LABELS: dict[str, Any] = {"kind": KINDS, "entity": ENTITIES, "template": TEMPLATES}


def labelled() -> Pairs:
    given = pairs()
    return Pairs(**{name: replace(getattr(given, name), labels=LABELS) for name in ("train", "dev", "test")})


@pytest.fixture(scope="module")
def fits() -> Fits:
    # Both at a random start and after a few steps; more than two fits in one stack.
    metrics = [iia, iia_vocabulary, complement_stays, iso, disentangle]
    return swept([DAS(4), RandomSubspace(4, draws=2), FullVector()], pairs=labelled(), metrics=metrics)


def whole_logits(ids: Tensor, site: Site, states: Tensor) -> Tensor:
    """(texts, vocabulary): with these states written at a site."""
    model = tiny().model

    def hook(_: nn.Module, __: object, output: object) -> object:
        stream = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
        stream = stream.clone()
        stream[:, _column(site)] = states
        return stream if isinstance(output, Tensor) else (stream, *output[1:])  # type: ignore[index]

    handle = model.transformer.h[site.layer].register_forward_hook(hook)  # type: ignore[index, union-attr]
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    handle.remove()
    return logits


def of_edit(fit: Fit, data: Counterfactuals, *, complement: bool = False) -> Tensor:
    base, source = (states_by_hook(ids_of(b), fit.site) for b in (data.base, data.sources["v"]))
    projector = fit.subspace().basis().T @ fit.subspace().basis()
    if complement:
        projector = torch.eye(len(projector)) - projector
    return whole_logits(ids_of(data.base), fit.site, base + (source - base) @ projector)


def test_the_whole_vocabulary_is_asked_for_the_expected_answer(fits: Fits) -> None:
    data = pairs().test
    said = []
    for fit in fits:
        highest = of_edit(fit, data).argmax(-1)
        said.append(highest)
        assert fit.pair_scores["iia_vocabulary"].tolist() == (highest == ANSWERS[data.answer]).tolist()
        assert (fit.pair_scores["iia_vocabulary"] <= fit.pair_scores["iia"]).all()
    # The control: most tokens are no answers, and what is said depends on the edit.
    assert fits.mean(metric="iia")[0].value > fits.mean(metric="iia_vocabulary")[0].value
    assert not torch.equal(said[0], said[1])


def test_a_token_that_is_no_answer_is_told_as_such() -> None:
    seen: list[Tensor] = []

    def look(outcome: Outcome) -> Tensor:
        seen.append(outcome.vocabulary())
        return iia(outcome)

    fit = swept(FullVector(), SITES[1:], metrics=[look])[0]
    data = pairs().test
    highest = of_edit(fit, data).argmax(-1)
    expected = [ANSWERS.tolist().index(token) if token in ANSWERS else -1 for token in highest.tolist()]
    assert any(torch.equal(one, torch.tensor(expected)) for one in seen) and -1 in expected and max(expected) > -1
    before = whole_logits(ids_of(data.base), SITES[1], states_by_hook(ids_of(data.base), SITES[1])).argmax(-1)
    unedited = [ANSWERS.tolist().index(token) if token in ANSWERS else -1 for token in before.tolist()]
    assert seen[0].tolist() == unedited


def test_the_complement_is_exchanged_and_the_answer_held_against_the_base(fits: Fits) -> None:
    data = pairs().test
    kept = []
    for fit in fits:
        answers = of_edit(fit, data, complement=True)[:, ANSWERS].argmax(-1)
        kept.append(answers == data.base_answer)
        assert fit.pair_scores["complement_stays"].tolist() == kept[-1].tolist(), fit
        if isinstance(fit.method, FullVector):  # nothing is left to exchange
            assert answers.tolist() == unedited(data).argmax(-1).tolist()
    assert not torch.equal(kept[0], kept[3])  # of DAS and the full vector


def test_scores_by_kind_are_means_over_those_pairs(fits: Fits) -> None:
    lines = fits.by_kind("iia")
    assert len(lines) == 2 * len(fits)
    for fit, (first, second) in zip(fits, zip(lines[::2], lines[1::2], strict=True), strict=True):
        assert (first["kind"], first["n"], second["kind"], second["n"]) == ("isolate", 20, "cause", 40)
        for line in (first, second):
            there = torch.tensor([kind == line["kind"] for kind in KINDS])
            assert line["value"] == pytest.approx(fit.pair_scores["iia"][there].mean().item())
            assert line["low"] <= line["value"] <= line["high"]
            assert (line["label"], line["site"]) == (fit.method.label, fit.place)
        mean = (first["value"] + second["value"]) / 2
        assert fit.score("disentangle").value == pytest.approx(mean, abs=1e-6)
        assert fit.score("iso").value == pytest.approx(first["value"]) and fit.score("iso").n == 20
    assert {line["template"] for line in fits.by_kind(by="template")} == set(TEMPLATES)
    assert [line["kind"] for line in fits[:1].by_kind("iso")] == ["isolate"]
    best = fits.best()
    shown = [line for line in fits.by_kind() if (line["label"], line["site"]) == (best.method.label, best.place)]
    assert f"isolate {shown[0]['value']:.2f} (20 pairs), cause {shown[1]['value']:.2f} (40 pairs)" in repr(fits)
    with pytest.raises(KeyError, match=r"no label 'colour'; they have \['kind', 'entity', 'template'\]"):
        fits.by_kind(by="colour")
    with pytest.raises(KeyError, match="No 'log_odds' by pair"):
        fits.by_kind("log_odds")


def test_intervals_are_of_the_clusters_where_there_are_some(fits: Fits) -> None:
    clusters = Clusters.of(LABELS)
    assert fits.facts["intervals"] == "of a bootstrap over 12 values of 'entity' and 5 values of 'template'"
    for fit in fits:
        assert fit.iia == estimate(fit.pair_scores["iia"], clusters)
        assert fit.iia.high - fit.iia.low > 0
    alone = swept(PCA(2), SITES[:1])
    assert alone.facts["intervals"] == "of independent pairs"
    assert alone[0].iia == proportion(alone[0].pair_scores["iia"])
    assert set(alone.labels) == {"kind"}


def test_labels_are_saved_once_and_read_again(fits: Fits, tmp_path: Path) -> None:
    fits.save(tmp_path / "fits")
    again = Fits.load(tmp_path / "fits")
    assert again.labels == LABELS and again.by_kind() == fits.by_kind()
    assert all(
        torch.equal(a.pair_scores[m].nan_to_num(-1), b.pair_scores[m].nan_to_num(-1))
        for a, b in zip(again, fits, strict=True)
        for m in b.pair_scores
    )


def test_pairs_of_several_variables_know_which_they_exchange() -> None:
    data = counterfactuals(1, ("v", "w"))
    chosen = torch.arange(PAIRS) % 3
    sources = {}
    for i, name in enumerate(("v", "w")):
        ids = torch.where((chosen == i)[:, None], ids_of(data.base), ids_of(data.sources[name]))
        sources[name] = replace(data.base, inputs={**data.base.inputs, "input_ids": ids})
    test = replace(data, sources=sources)
    found = swept(PCA(2), SITES[:1], pairs=pairs(("v", "w"), test=test))
    assert found.labels["exchanged"] == tuple(("w", "v", "v, w")[i] for i in chosen.tolist())
    assert {line["exchanged"]: line["n"] for line in found.by_kind(by="exchanged")} == {
        "w": 20,
        "v": 20,
        "v, w": 20,
    }


# --- refused before the work --------------------------------------------------------------------------------


def test_metrics_that_cannot_be_had_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def worked(*_: object) -> None:
        raise AssertionError("a fit was begun")

    monkeypatch.setattr(DAS, "learner", worked)
    alike = replace(counterfactuals(1), labels={"kind": ("a",) * PAIRS})
    with pytest.raises(ValueError, match=r"'iso' on the test pairs: No pair of the kind 'isolate' or 'stays'"):
        swept(DAS(1), metrics=[iia, iso], pairs=pairs(test=alike))
    with pytest.raises(ValueError, match="'iso' on the train pairs: No pair of the kind"):
        swept(DAS(1), metrics=[iia, iso], pairs=pairs(train=alike))
    two = pairs(("v", "w"))
    with pytest.raises(ValueError, match=r"'complement_stays'.*\['v', 'w'\] share the site block_output\[0\]@2"):
        swept(DAS(1), metrics=[complement_stays], pairs=two)

    def one_number(outcome: Outcome) -> Tensor:
        return iia(outcome).mean()

    with pytest.raises(ValueError, match=r"'one_number' gives \(\); needed is a value for each of 60 pairs"):
        swept(DAS(1), metrics=[one_number])


def test_the_complement_of_variables_at_sites_of_their_own_is_exchanged() -> None:
    apart = {"v": SITES[0], "w": SITES[1]}
    fit = swept(PCA(2), [apart], pairs=pairs(("v", "w")), metrics=[complement_stays])[0]
    assert 0 <= fit.score("complement_stays").value <= 1


# --- losses towards the source ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [Divergence(), JensenShannon()])
def test_losses_towards_the_source_are_of_what_the_model_says_there(loss: Divergence | JensenShannon) -> None:
    """Of the full vector at the last position the edited logits are the source's: nothing is left to learn."""
    data = pairs().train
    assert isinstance(data, Counterfactuals)
    whole = swept(DAS(32), [Site("block_output", 2, "last")], loss=loss)
    assert whole[0].losses[0] == pytest.approx(0, abs=1e-6)
    part = swept(DAS(2), [Site("block_output", 2, "last")], loss=loss)
    assert part[0].losses[0] > 0.05 and part[0].losses[-1] < part[0].losses[0]
    assert part.facts["loss"] == type(loss).__name__
    two = swept(DAS(2), SITES[:1], loss=type(loss)("answer"), pairs=pairs(("v", "w")))
    assert two[0].losses


def test_a_loss_towards_one_source_is_refused_for_several() -> None:
    with pytest.raises(ValueError, match=r"needs one source; the variables \['v', 'w'\] have one each"):
        swept(DAS(2), SITES[:1], loss=Divergence(), pairs=pairs(("v", "w")))
