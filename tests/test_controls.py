"""Control pairs have nothing to find; a planted variable is there to be found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import fresh
from tiny_sweeps import ANSWERS, SITES, batch_of, counterfactuals, pairs, tiny

from subspace_lab.analysis.controls import control_labels, shuffled_pairs
from subspace_lab.analysis.planting import Power, plant
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.methods import DAS
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

CONTROLS = (control_labels, shuffled_pairs)


def splits(found: Pairs) -> dict[str, Counterfactuals]:
    assert isinstance(found.train, Counterfactuals)
    return {"train": found.train, "dev": found.dev, "test": found.test}


def few_sources() -> Pairs:
    """Pairs of eight sources that all splits share."""
    g = torch.Generator().manual_seed(3)
    texts = torch.randint(1, 50, (8, 7), generator=g)

    def split(seed: int) -> Counterfactuals:
        data = counterfactuals(seed)
        chosen = torch.randint(8, (len(data),), generator=torch.Generator().manual_seed(seed))
        kinds = tuple("cause" if i % 2 else "isolate" for i in range(len(data)))
        entities = tuple(str(one) for one in chosen.tolist())
        return replace(
            data, sources={"v": batch_of(texts[chosen])}, labels={"kind": kinds, "entity": entities},
            source_answers={"v": data.answer},
        )  # fmt: skip

    return Pairs(split(0), split(2), split(1), "prices")


@pytest.mark.parametrize("make", CONTROLS)
def test_bases_sources_and_answers_stay_and_the_seed_decides(make: Callable[..., Pairs]) -> None:
    given = few_sources()
    found, again, other = make(given, 1), make(given, 1), make(given, 2)
    assert found.fingerprint() == again.fingerprint() != other.fingerprint()
    for name, split in splits(found).items():
        before = splits(given)[name]
        assert split.base is before.base and dict(split.sources) == dict(before.sources)
        assert split.answers == before.answers and torch.equal(split.base_answer, before.base_answer)
        assert not torch.equal(split.answer, before.answer)
        assert not split.values and not split.source_answers and set(split.labels) == {"entity"}
    assert found.task.startswith("prices: ") and given.fingerprint() == few_sources().fingerprint()


def test_each_source_has_one_label_in_all_splits_and_each_label_is_as_frequent() -> None:
    given = few_sources()
    expected = {answer for split in splits(given).values() for answer in split.answer.tolist()}
    seen = defaultdict(set)
    for split in splits(control_labels(given, 0)).values():
        for entity, answer in zip(split.labels["entity"], split.answer.tolist(), strict=True):
            seen[entity].add(answer)
    assert len(seen) == 8 and all(len(of) == 1 for of in seen.values())
    dealt = Counter(next(iter(of)) for of in seen.values())
    assert set(dealt) <= expected and max(dealt.values()) - min(dealt.values()) <= 1
    assert len(dealt) == min(8, len(expected))


def test_labels_of_fresh_pairs_are_the_same_whenever_a_source_comes() -> None:
    given = few_sources()
    known = counterfactuals(9)
    stream = Pairs(lambda step: given.train if step % 2 else known, given.dev, given.test)  # type: ignore[arg-type, return-value]
    found = control_labels(stream, 0)
    labels = {entity: answer for split in (found.dev, found.test)
              for entity, answer in zip(split.labels["entity"], split.answer.tolist(), strict=True)}  # fmt: skip
    assert callable(found.train)
    drawn = found.train(1)
    assert [labels[one] for one in drawn.labels["entity"]] == drawn.answer.tolist()
    assert torch.equal(found.train(0).answer, found.train(2).answer)
    assert len(set(found.train(0).answer.tolist())) > 5 and torch.equal(
        found.train(0).base_answer, known.base_answer
    )


def test_shuffling_keeps_how_often_each_answer_is_expected() -> None:
    given = few_sources()
    for name, split in splits(shuffled_pairs(given, 0)).items():
        assert Counter(split.answer.tolist()) == Counter(splits(given)[name].answer.tolist())
    stream = Pairs(lambda step: counterfactuals(7), given.dev, given.test)
    found = shuffled_pairs(stream, 0)
    assert callable(found.train)
    assert not torch.equal(found.train(0).answer, found.train(1).answer)  # another order at each step


def test_pairs_of_one_answer_have_no_labels() -> None:
    one = replace(counterfactuals(0), answer=torch.zeros(60, dtype=torch.long))
    with pytest.raises(ValueError, match="expect one answer, 'a'"):
        control_labels(Pairs(one, one, one), 0)


def test_several_variables_have_one_label_together() -> None:
    found = control_labels(pairs(("a", "b")), 0)
    assert found.variables == ["a", "b"] and len(set(found.test.answer.tolist())) > 2


# --- a planted variable -------------------------------------------------------------------------------------


def iia_of(power: Power, basis: torch.Tensor) -> float:
    """With an exchange of this subspace in the model that has the planted variable."""
    (variable,) = power.pairs.variables
    prepared = PreparedPairs.of(Backbone(power.model), power.pairs.test, [{variable: power.site}])
    (outcome,) = prepared.outcomes(
        {variable: power.site}, [Alignment({variable: (power.site, FixedSubspace(basis))}).edits()]
    )
    return float((outcome.logits.argmax(-1) == outcome.answer).float().mean())


def without(direction: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of all that is orthogonal to a direction."""
    return torch.linalg.svd(direction[None])[2][1:]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_what_is_planted_is_exchanged_along_its_direction_and_along_no_other(site: Site) -> None:
    power = plant(reinitialised(tiny().model, 0), pairs(), site, seed=1)
    assert abs(float(power.direction.norm()) - 1) < 1e-6
    test, given = power.pairs.test, pairs().test
    assert 0.2 < float(test.answer.float().mean()) < 0.8 and test.answers == given.answers
    assert torch.equal(test.base.inputs["input_ids"], given.base.inputs["input_ids"])
    assert iia_of(power, power.direction[None]) >= 0.9
    changed = test.answer != test.base_answer
    # Orthogonal to it everything can be exchanged, and the answer stays the base's.
    stays = 1 - float(changed.float().mean())
    assert abs(iia_of(power, without(power.direction)) - stays) < 0.1


def test_a_search_finds_what_is_planted() -> None:
    power = plant(reinitialised(tiny().model, 0), pairs(), SITES[1], seed=1)
    config = TrainingConfig(steps=60, learning_rate=0.05)
    fits = sweep(
        Backbone(power.model), power.pairs, [power.site], [DAS(1)], config=config, min_accuracy=None, quiet=True
    )
    assert fits[0].iia.low > fits.floors["test"].highest
    found = fits[0].subspace().basis()[0]
    assert abs(float(found @ power.direction)) > 0.3  # 1/√32 = .18 by chance


def test_a_plain_module_can_have_a_variable_planted() -> None:
    g = torch.Generator().manual_seed(0)

    def split(n: int) -> Counterfactuals:
        base, source = (Batch.of(torch.randn(n, 12, generator=g)) for _ in range(2))
        zero = torch.zeros(n, dtype=torch.long)
        return Counterfactuals(base, {"v": source}, zero, zero, tuple("abcde"))

    power = plant(fresh("mlp"), Pairs(split(50), split(50), split(80)), Site("first.output"), seed=0)
    assert power.site == Site("model.first.output") and iia_of(power, power.direction[None]) >= 0.9


def test_what_cannot_be_planted_is_said() -> None:
    model = tiny().model

    def refused(match: str, given: Pairs, site: Site = SITES[0]) -> None:
        with pytest.raises(ValueError, match=match):
            plant(reinitialised(model, 0), given, site, 0)

    refused("One variable is planted at a time", pairs(("a", "b")))
    refused("one position of each row", pairs(), Site("block_output", 0, "l2"))
    refused("not in its input", pairs(), Site("block_input", 0, "last"))
    long = torch.stack([ANSWERS, ANSWERS.flip(0)], 1)
    spelled: dict[str, Any] = {
        name: replace(split, tokens=long, whole=True) for name, split in splits(pairs()).items()
    }
    refused("two answers of one token each", Pairs(**spelled))
