"""`check` on models whose truth is known: what is there is supported, and each way of being wrong has its name."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import pairs as tiny_pairs
from tiny_sweeps import swept, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from subspace_lab.analysis import checking
from subspace_lab.analysis.checking import check, complement_of, of_search, training_floor
from subspace_lab.analysis.controls import control_labels
from subspace_lab.analysis.evidence import at_cell
from subspace_lab.analysis.illusions import illusion
from subspace_lab.analysis.twins import embeddings_kept, only_above, only_below, reinitialised
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, RandomSubspace, RevNet
from subspace_lab.das.objectives import complement_stays, iia, log_odds, logit_difference
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.identity import model_facts
from subspace_lab.tasks import PRICE_TAGGING
from subspace_lab.tasks.hierarchical_equality import LEFT_EQUALITY, counterfactuals
from subspace_lab.tasks.planted import planted_decoder

SHIPPED = Path(str(files("subspace_lab"))) / "assets" / "tiny_decoder"
QUIET: dict[str, Any] = {"min_accuracy": None, "quiet": True}


# --- something is there -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Backbone, Pairs, Fits]:
    """The decoder that comes along, searched where it has the variable and where it has not yet."""
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(SHIPPED).eval())
    pairs = PRICE_TAGGING.pairs(AutoTokenizer.from_pretrained(SHIPPED), train=300, dev=60, test=120)
    sites = [Site("block_output", 1, "amount"), Site("block_output", 1, "last")]
    fits = search(backbone, pairs, sites, rank=8, config=TrainingConfig(steps=60, learning_rate=0.05), quiet=True)
    return backbone, pairs, fits


@pytest.fixture(scope="module")
def partial(shipped: tuple[Backbone, Pairs, Fits]) -> dict[str, list[nn.Module]]:
    model = shipped[0].model
    return {
        "embeddings kept": [embeddings_kept(model, 0)],
        "only above layer 1": [only_above(model, 1, 0)],
        "only below layer 1": [only_below(model, 1, 0)],
    }


def test_what_the_shipped_decoder_holds_is_supported(
    shipped: tuple[Backbone, Pairs, Fits], partial: dict[str, list[nn.Module]], tmp_path: Path
) -> None:
    backbone, pairs, fits = shipped
    verdict = check(backbone, pairs, fits, twins=2, partial=partial, out=tmp_path / "check", quiet=True)
    assert verdict.supported and verdict.preliminary, verdict
    assert verdict.claim.place == "block_output[1]@last" and verdict.claim.iia.value > 0.85
    assert max(verdict.check("twins").null) < 0.1 and verdict.check("control: control labels").null[0] < 0.2
    for kind in partial:
        (told,) = verdict.check(f"twins, {kind}").null
        assert verdict.check(f"twins, {kind}").passed is None and told < 0.9
    assert {path.name for path in (tmp_path / "check").iterdir()} >= {"twin_1", "twin_2", "control_1"}
    report = illusion(backbone, pairs, fits.best())
    parts = verdict.check("illusion")
    assert parts.passed is None and parts.observed == pytest.approx(min(report.sensed.values()))
    assert parts.because.startswith("flagged") == report.flagged
    # What search has already is not fitted again.
    assert not (tmp_path / "check" / "model").exists()
    assert {one.name for one in verdict.checks} >= {
        "power",
        "complement",
        "random subspaces",
        "baselines",
        "seeds",
    }


def test_a_check_goes_on_where_it_was_killed(
    shipped: tuple[Backbone, Pairs, Fits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, pairs, fits = shipped
    options: dict[str, Any] = {"twins": 1, "out": tmp_path / "check", "quiet": True}
    with monkeypatch.context() as patched:
        patched.setattr(checking, "judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check(backbone, pairs, fits, **options)
    runs: Any = []
    at = sweep
    monkeypatch.setattr(checking, "sweep", lambda *a, **k: runs.append(k["out"].name) or at(*a, **k))
    monkeypatch.setattr(
        "subspace_lab.das._places.Places.at", lambda *_: pytest.fail("a place that was finished is searched again")
    )
    verdict = check(backbone, pairs, fits, **options)
    assert runs == ["twin_1", "control_1"] and verdict.supported


def test_other_seeds_search_the_model_again_too(shipped: tuple[Backbone, Pairs, Fits], tmp_path: Path) -> None:
    backbone, pairs, fits = shipped
    verdict = check(backbone, pairs, fits, twins=1, seeds=[3, 4], controls=[], out=tmp_path, quiet=True)
    assert len(verdict.check("seeds").null) == 2 and Fits.load(tmp_path / "model").methods == ["DAS 8"]
    assert [fit.seed for fit in Fits.load(tmp_path / "twin_1")] == [3, 4]


def test_a_search_with_twins_gives_a_verdict_by_itself(shipped: tuple[Backbone, Pairs, Fits]) -> None:
    backbone, pairs, fits = shipped
    cell = fits.where(site="block_output[1]@last", method="DAS")
    twin = replace(cell, fits=tuple(replace(fit, scores={**fit.scores, "test": {"iia": replace(fit.iia, value=0.5)}})
                                    for fit in cell))  # fmt: skip
    assert of_search(backbone, answered(backbone, pairs, fits), fits, [twin]).supported
    elsewhere = fits.where(site="block_output[1]@amount")
    with pytest.raises(ValueError, match=r"DAS 8 was searched at block_output\[1\]@last in none of 1 twins"):
        of_search(backbone, pairs, fits, [elsewhere])
    with pytest.raises(ValueError, match="Without twins"):
        of_search(backbone, pairs, fits, [])


def answered(backbone: Backbone, pairs: Pairs, fits: Fits) -> Pairs:
    """The pairs that the search counted."""
    from subspace_lab.das.answered import only_answered

    found = only_answered(backbone, pairs)
    assert found.fingerprint() == fits.facts["data"]
    return found


def test_the_complement_is_that_of_the_metric(shipped: tuple[Backbone, Pairs, Fits]) -> None:
    backbone, pairs, fits = shipped
    chosen, counted = fits.best("iia"), answered(backbone, pairs, fits)
    again = sweep(
        backbone, counted, [chosen.site], [chosen.method], config=TrainingConfig(**fits.facts["training"]),
        metrics=(iia, complement_stays), quiet=True,
    )  # fmt: skip
    torch.testing.assert_close(again[0].subspace().basis(), chosen.subspace().basis(), atol=1e-3, rtol=0)
    stays, why = complement_of(backbone, counted, again[0])
    assert stays is not None and why is None
    changes = counted.test.answer != counted.test.base_answer
    assert torch.equal(stays.isnan(), ~changes)
    assert torch.equal(stays[changes], again[0].pair_scores["complement_stays"][changes])
    full = fits.where(method=FullVector)[0]
    assert complement_of(backbone, counted, full) == (None, "a full vector has no complement")


def test_the_floor_of_the_training_pairs(shipped: tuple[Backbone, Pairs, Fits]) -> None:
    backbone, pairs, _ = shipped
    train = pairs.train
    with torch.no_grad():
        assert isinstance(train, Counterfactuals)
        ids, mask = (train.base.inputs[name] for name in ("input_ids", "attention_mask"))
        logits = backbone.model(input_ids=ids, attention_mask=mask).logits[
            torch.arange(len(train)), mask.sum(1) - 1
        ]
    given = logits[:, train.tokens].argmax(-1)
    expected = max(
        (given == train.answer)[:400].double().mean(), (train.answer[:400] == 0).double().mean(),
        (train.answer[:400] == 1).double().mean(),
    )  # fmt: skip
    assert training_floor(backbone, pairs) == pytest.approx(float(expected))
    assert training_floor(backbone, replace(pairs, train=lambda step: train)) is None


def test_control_labels_are_not_supported(shipped: tuple[Backbone, Pairs, Fits]) -> None:
    backbone, pairs, fits = shipped
    given = control_labels(answered(backbone, pairs, fits), 5)
    found = sweep(backbone, given, [Site("block_output", 1, "last")], [DAS(8), RandomSubspace(8)],
                  config=TrainingConfig(steps=60, learning_rate=0.05), **QUIET)  # fmt: skip
    verdict = check(backbone, given, found, twins=1, controls=[], power=False, quiet=True)
    assert verdict.conclusion in ("memorised", "not found"), verdict


def test_stories_hold_the_gender(assets: Path) -> None:
    from subspace_lab.tasks.story_gender import STORY_GENDER

    folder = assets / "models" / "stories260K"
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder).eval())
    pairs = STORY_GENDER.pairs(AutoTokenizer.from_pretrained(folder), train=150, dev=50, test=100)
    config = TrainingConfig(steps=60, learning_rate=3e-2, batch_size=16)
    fits = sweep(backbone, pairs, [Site("block_output", 1, "gender_word")], [DAS(4)], config=config, quiet=True)
    verdict = check(backbone, pairs, fits, twins=1, controls=[], quiet=True)
    assert verdict.supported and max(verdict.check("twins").null) < 0.25, verdict


# --- nothing is there ---------------------------------------------------------------------------------------


class Layer(nn.Linear):
    """tanh(W h + b), with weights large enough that answers differ."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1.5 / self.in_features**0.5)
        nn.init.normal_(self.bias, std=0.3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def network(width: int, seed: int = 0) -> nn.Module:
    """A random network over pairs of hierarchical equality."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(Layer(16, width), Layer(width, width), nn.Linear(width, 2, bias=False))


def equality(train: int, dev: int = 200, test: int = 400) -> Pairs:
    sizes: dict[str, Any] = {"train": train, "dev": dev, "test": test}
    return Pairs(**{name: counterfactuals(n, i, LEFT_EQUALITY) for i, (name, n) in enumerate(sizes.items())})  # type: ignore[arg-type]


def readable(train: int, dev: int = 200, test: int = 400) -> Pairs:
    """Is the input on this side of a plane? Any state tells it, and no random network does anything with it."""
    g = torch.Generator().manual_seed(0)
    plane = torch.randn(16, generator=g)

    def split(n: int) -> Counterfactuals:
        base, source = (torch.randn(n, 16, generator=g) for _ in range(2))
        before, after = ((inputs @ plane > 0).long() for inputs in (base, source))
        return Counterfactuals(Batch.of(base), {"side": Batch.of(source)}, before, after, ("0", "1"))

    return Pairs(split(train), split(dev), split(test))


HIDDEN = Site("0.output")


def test_a_fixed_pool_on_a_wide_random_network_is_memorised() -> None:
    backbone, pairs = Backbone(network(512)), equality(200)
    config = TrainingConfig(steps=100, learning_rate=0.05)
    fits = sweep(backbone, pairs, [HIDDEN], [DAS(16)], config=config, **QUIET)
    verdict = check(backbone, pairs, fits, twins=1, quiet=True)
    assert verdict.conclusion == "memorised" and "memorised its training pairs" in verdict.reason, verdict


def test_a_nonlinear_map_of_a_random_network_is_expressive() -> None:
    backbone, pairs = Backbone(network(64)), readable(1000)
    config = TrainingConfig(steps=100, batch_size=64)
    fits = sweep(backbone, pairs, [HIDDEN], [RevNet(8)], config=config, **QUIET)
    verdict = check(backbone, pairs, fits, twins=2, quiet=True)
    assert verdict.claim.iia.low > verdict.claim.floor
    assert verdict.conclusion == "expressive" and verdict.check("twins").passed is False, verdict
    assert verdict.check("illusion").because.startswith("not done: ")


def test_ten_pairs_are_underpowered_even_where_the_variable_is() -> None:
    planted = planted_decoder(0, train=10, dev=10, test=10)
    backbone = Backbone(planted.model)
    fits = sweep(backbone, planted.pairs, [planted.site], [DAS(2)], config=TrainingConfig(steps=40, learning_rate=0.05),
                 **QUIET)  # fmt: skip
    verdict = check(backbone, planted.pairs, fits, twins=1, quiet=True)
    assert verdict.conclusion == "underpowered" and "10 test pairs" in verdict.reason


def test_where_nothing_is_seen_a_planted_variable_tells_whether_something_could_have_been() -> None:
    """At a place where the model has nothing, with pairs enough, and with steps too few to find anything."""
    planted = planted_decoder(0, train=128, dev=64, test=128)
    backbone = Backbone(planted.model)
    nowhere = Site("block_output", 0, "last")
    found = {}
    for steps in (1, 100):
        config = TrainingConfig(steps=steps, learning_rate=0.05, batch_size=32 if steps > 1 else 1)
        fits = sweep(backbone, planted.pairs, [nowhere], [DAS(1)], config=config, **QUIET)
        found[steps] = check(backbone, planted.pairs, fits, twins=1, controls=[], quiet=True)
    assert found[1].conclusion == "underpowered" and found[100].conclusion == "not found", found
    assert found[100].check("planted variable").passed


# --- what is served, and what is refused before anything runs -----------------------------------------------


def test_several_variables_and_sites_and_metrics_are_served() -> None:
    two = tiny_pairs(("a", "b"))
    places = [
        {"a": Site("block_output", 0, "2"), "b": Site("block_output", 1, "last")},
        Site("block_output", 1, "last"),
    ]
    for place, complement in zip(places, (True, False), strict=True):
        fits = swept([DAS(2)], [place], pairs=two, metrics=(iia, log_odds))
        verdict = check(tiny(), two, fits, twins=1, quiet=True)
        assert verdict.claim.variable == "a, b"
        told = verdict.check("complement").because
        assert ("not done" in told) is not complement


def test_methods_without_training_are_checked_too() -> None:
    fits = swept([DifferenceOfMeans(), PCA(3)], seeds=2)
    verdict = check(tiny(), tiny_pairs(), fits, twins=[reinitialised(tiny().model, 3)], quiet=True)
    assert verdict.preliminary and len(at_cell(fits, fits.best())) == 1


def test_what_does_not_belong_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = swept([DAS(2)])
    monkeypatch.setattr(checking, "sweep", lambda *_, **__: pytest.fail("something ran"))

    def refused(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        given: dict[str, Any] = {"backbone": tiny(), "pairs": tiny_pairs(), "fits": fits, "quiet": True, **changes}
        with pytest.raises(error, match=match):
            check(**given)

    refused("not the pairs of the fits", pairs=tiny_pairs(dev=tiny_pairs().test))
    refused(
        r"This model \(weights .*\) is not the model of the fits",
        backbone=Backbone(reinitialised(tiny().model, 1)),
    )
    refused("19 twins are needed", twins=1, level=0.05)
    refused("Without twins no verdict", twins=0)
    refused("loss was 'cross_entropy'", loss=logit_difference)
    refused("log_odds", fits=swept([DAS(2)], metrics=(log_odds,)))
    refused("Only controls", fits=swept([FullVector()]))
    refused("backbone", TypeError, backbone=tiny().model)
    refused("fits", TypeError, fits=[fits[0]])
    refused("pairs", TypeError, pairs=tiny_pairs().train)
    refused("seed", TypeError, seed=True)
    refused("twins", TypeError, twins=True)


def test_a_twin_counts_once() -> None:
    fits = swept(DAS(2), [Site("block_output", 1, "last")])
    twin = reinitialised(tiny().model, 3)
    for twins, said in (([twin, twin], "Twin 2 has the weights of twin 1"), ([tiny().model], "the model itself")):
        with pytest.raises(ValueError, match=said):
            check(tiny(), tiny_pairs(), fits, twins=twins, controls=[], parts=False, quiet=True)


def test_a_random_model_is_not_its_own_twin() -> None:
    """`tiny` was drawn from the seed 0, which is that of its first twin too."""
    with torch.random.fork_rng(devices=[]):
        assert model_facts(reinitialised(tiny().model, 0))["weights"] == model_facts(tiny().model)["weights"]
    found = [model_facts(twin)["weights"] for twin in checking._reinitialised(tiny().model, 3, 0)]
    assert len({*found, model_facts(tiny().model)["weights"]}) == 4


def test_a_verdict_does_not_depend_on_where_the_callers_generator_stands() -> None:
    fits = swept([DAS(2)])
    torch.manual_seed(1)
    one = check(tiny(), tiny_pairs(), fits, twins=1, quiet=True)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert check(tiny(), tiny_pairs(), fits, twins=1, quiet=True) == one
    assert torch.equal(torch.get_rng_state(), state) and isinstance(tiny_pairs().train, Counterfactuals)
    assert json.dumps(one.as_dict())
