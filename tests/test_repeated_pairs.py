"""Pairs that come several times, pairs that were trained on, and what is said of scores that show nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import PAIRS, SITES, counterfactuals, pairs, swept
from torch import Tensor

from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.equal_pairs import clusters_of, keys_of, seen_in
from subspace_lab.das.methods import DAS, FullVector
from subspace_lab.das.objectives import JensenShannon, complement_stays, cross_entropy, iia, log_odds
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.model.batches import Batch


def repeated(data: Counterfactuals, times: int) -> Counterfactuals:
    return data.rows(torch.arange(len(data)).repeat(times))


def test_a_pair_that_comes_eight_times_is_one_piece_of_evidence() -> None:
    once = swept(FullVector(), SITES[:1])[0].iia
    eight = swept(FullVector(), SITES[:1], pairs=pairs(test=repeated(counterfactuals(1), 8)))
    often = eight[0].iia
    assert often.value == pytest.approx(once.value) and often.n == 8 * PAIRS
    # A bootstrap over the different pairs against Wilson's interval of them: nearly the same width.
    assert 0.75 < (often.high - often.low) / (once.high - once.low) < 1.3
    assert eight.facts["intervals"] == f"of a bootstrap over {PAIRS} different pairs"
    assert eight.facts["different test pairs"] == PAIRS
    assert all(line["high"] - line["low"] > 0.05 for line in eight.by_kind())
    assert swept(FullVector(), SITES[:1]).facts["intervals"] == "of independent pairs"


def test_equal_pairs_are_told_whatever_their_padding_and_whatever_they_are_made_of() -> None:
    data = counterfactuals(0, n=4)
    ids, mask = (data.base.inputs[name] for name in ("input_ids", "attention_mask"))
    shifted = Batch(
        {
            "input_ids": torch.nn.functional.pad(ids, (2, 0)),
            "attention_mask": torch.nn.functional.pad(mask, (2, 0)),
        }
    )
    assert keys_of(replace(data, base=shifted)) == keys_of(data) and len(set(keys_of(data))) == 4
    assert clusters_of(data) is None
    some = Batch.of(torch.randn(3, 2, 5))
    plain = Counterfactuals(
        some.rows(torch.tensor([0, 1, 0])),
        {"v": some.rows(torch.tensor([2, 2, 2]))},
        torch.zeros(3).long(),
        torch.zeros(3).long(),
        ("a", "b"),
    )
    one, two, three = keys_of(plain)
    assert one == three != two
    found = clusters_of(plain)
    assert found is not None and found.sizes == (2,)
    # A known entity says more than which pairs are equal.
    known = clusters_of(replace(plain, labels={"entity": ("x", "y", "z")}))
    assert known is not None and known.names == ("entity",)


def test_test_pairs_that_were_trained_on_are_named() -> None:
    train = counterfactuals(0)
    mixed = counterfactuals(1).rows(torch.arange(50))
    known = train.rows(torch.arange(10))

    def joined(one: Batch, other: Batch) -> Batch:
        return Batch({name: torch.cat([t, other.inputs[name]]) for name, t in one.inputs.items()})

    test = replace(
        mixed,
        base=joined(known.base, mixed.base),
        sources={"v": joined(known.sources["v"], mixed.sources["v"])},
        base_answer=torch.cat([known.base_answer, mixed.base_answer]),
        answer=torch.cat([known.answer, mixed.answer]),
        values={},
    )
    assert seen_in(train, test) == 10
    fits = swept(DAS(1), SITES[:1], pairs=pairs(test=test))
    assert fits.facts["test pairs in training"] == 10
    assert "Caution: 10 of the test pairs are training pairs too" in " ".join(repr(fits).split())
    clean = swept(DAS(1), SITES[:1])
    assert "training pairs too" not in repr(clean) and "test pairs in training" not in clean.facts


def test_scores_that_show_nothing_say_so() -> None:
    """A source that is the base, and answers that are all the same, have a perfect score."""
    data = counterfactuals(1)
    alike = replace(data, answer=torch.zeros_like(data.answer), base_answer=torch.zeros_like(data.answer))
    fits = swept([DAS(1), FullVector()], SITES[:1], pairs=pairs(test=alike))
    assert fits.floors["test"].highest == 1
    assert "not above the floors: these pairs show no effect there" in " ".join(repr(fits).split())


def test_floors_are_of_the_metric_that_is_shown() -> None:
    fits = swept([DAS(1)], SITES[:1], metrics=[log_odds, iia, complement_stays])
    said = " ".join(repr(fits).split())
    assert "Floors on these pairs" not in said
    without = fits.facts["without_edit"]
    assert without["log_odds"] == pytest.approx(0, abs=1e-6)  # nothing moves without an edit
    assert without["iia"] == pytest.approx(fits.floors["test"].no_intervention.value)
    assert "Without it log_odds is 0.00" in said or "Without it log_odds is -0.00" in said
    assert "Scored too: iia, complement_stays. See `mean(metric=…)`" in said
    assert "Floors on these pairs" in repr(swept([DAS(1)], SITES[:1]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, answers: cross_entropy(logits, answers).mean(), r"gives \(\) for 16 pairs"),
        (lambda logits: logits, "fails on 16 made-up pairs"),
        (lambda logits, answers: None, "gives NoneType for 16 pairs"),
        (lambda logits, answers: cross_entropy(logits, answers).detach(), "numbers without a gradient"),
        (JensenShannon, r"write JensenShannon\(\)"),
    ],
)
def test_a_loss_that_is_none_is_refused_before_the_work(loss: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        swept(DAS(1), SITES[:1], loss=loss)


def test_losses_that_are_some_are_taken() -> None:
    def margin(logits: Tensor, answers: Tensor) -> Tensor:
        return -logits.gather(1, answers[:, None])[:, 0]

    for loss in (margin, JensenShannon(), JensenShannon("answer")):
        assert len(swept(DAS(1), SITES[:1], loss=loss)) == 1


def test_a_metric_that_fails_is_named() -> None:
    def broken(outcome: Any) -> Tensor:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(ValueError, match="The metric 'broken' on the test pairs: division by zero"):
        swept(DAS(1), SITES[:1], metrics=[broken])


def test_no_column_that_has_a_meaning_of_its_own_is_proposed_for_one_that_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"base": "a", "source": "b", "base_answer": "x"}\n')
    with pytest.raises(ValueError, match="missing are answer") as error:
        load_pairs(file, str)
    assert "meant?" not in str(error.value)
    file.write_text('{"base": "a", "source": "b", "base_answer": "x", "answr": "y"}\n')
    with pytest.raises(ValueError, match="Is 'answr' meant"):
        load_pairs(file, str)


def test_a_model_that_fails_is_shown_where() -> None:
    with pytest.raises(
        ValueError, match=r"For example base \d+ of the test split: expected is '\w', it prefers '\w'"
    ):
        from tiny_sweeps import tiny

        from subspace_lab.das.answered import only_answered

        only_answered(tiny(), pairs(), min_accuracy=0.9)


def test_splits_of_a_stream_are_not_looked_through() -> None:
    assert "test pairs in training" not in swept(DAS(1), SITES[:1], pairs=pairs(train=counterfactuals)).facts
    assert isinstance(pairs(), Pairs)
