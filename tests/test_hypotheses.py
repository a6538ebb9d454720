"""Rival hypotheses: the same bases for all, the answers of each, and the true one first."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_counterfactuals import PARITY, numbers_of, word_level
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.fits import Fits
from subspace_lab.das.hypotheses import Hypothesis, balanced, rival_pairs
from subspace_lab.das.methods import DAS, RandomSubspace
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.ranking import Ranking, _floor, _ordered, rank_hypotheses
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

# --- a network that computes (a ∧ b) ∨ c from a ∧ b and c, and a rival that computes (a ∨ c) ∧ (b ∨ c) ------------

AND_FIRST = Hypothesis(
    "and first",
    CausalModel({"both": lambda a, b: a & b, "third": lambda c: c, "yes": lambda both, third: both | third}),
    ("both", "third"),
)
OR_FIRST = Hypothesis(
    "or first",
    CausalModel({"one": lambda a, c: a | c, "other": lambda b, c: b | c, "yes": lambda one, other: one & other}),
    ("one", "other"),
)
SITE = Site("mix.output")


class AndThenOr(nn.Module):
    """mix: Q [relu(a + b − 1), relu(c), relu(noise)] with a random orthogonal Q; head: the sum of the first two."""

    def __init__(self) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
        first, second, head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)
        with torch.no_grad():
            first.weight.copy_(torch.eye(8))
            first.weight[:2, :3] = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
            first.bias.copy_(torch.tensor([-1.0, *[0] * 7]))
            second.weight.copy_(rotation)
            yes = rotation[:, 0] + rotation[:, 1]
            head.weight.copy_(torch.stack([-yes, yes]))
            head.bias.copy_(torch.tensor([0.5, -0.5]))
        self.mix = nn.Sequential(first, nn.ReLU(), second)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.mix(inputs))


def bits(inputs: Tensor) -> dict[str, Tensor]:
    return {name: inputs[:, i] > 0.5 for i, name in enumerate("abc")}


def drawn(n: int, seed: int) -> dict[str, Counterfactuals]:
    g = torch.Generator().manual_seed(seed)
    base, *sources = (
        torch.cat([torch.randint(0, 2, (n, 3), generator=g).float(), torch.randn(n, 5, generator=g)], 1)
        for _ in range(3)
    )
    subset = torch.randint(1, 4, (n, 1), generator=g)
    sources = [torch.where((subset >> i & 1).bool(), source, base) for i, source in enumerate(sources)]
    found = {}
    for h in (OR_FIRST, AND_FIRST):
        given = dict(zip(h.variables, sources, strict=True))
        after = h.causal_model.interchange(bits(base), {v: bits(s) for v, s in given.items()})["yes"]
        found[h.name] = Counterfactuals(
            Batch.of(base),
            {v: Batch.of(s) for v, s in given.items()},
            h.causal_model.run(bits(base))["yes"].long(),
            after.long(),
            ("no", "yes"),
        )
    return found


@cache
def toy() -> tuple[dict[str, Pairs], dict[str, Fits]]:
    splits: dict[str, Any] = {"train": drawn(512, 0), "dev": drawn(300, 1), "test": drawn(500, 2)}
    rivals = {
        name: Pairs(**{split: of[name] for split, of in splits.items()}, task=name) for name in splits["test"]
    }
    config = TrainingConfig(steps=120, learning_rate=0.1, batch_size=64)
    lab = Backbone(AndThenOr())
    methods = [DAS([1, 2, 3]), RandomSubspace(1)]
    return rivals, {
        n: sweep(lab, p, [SITE], methods, seeds=2, config=config, quiet=True) for n, p in rivals.items()
    }


@cache
def ranking() -> Ranking:
    return rank_hypotheses(*toy())


def test_the_algorithm_that_the_network_computes_stands_first() -> None:
    first, second = ranking().standings
    assert (first.name, second.name) == ("and first", "or first")
    assert first.iia.value > 0.98 and first.differing.value > 0.95 and first.behind is None
    assert second.differing.value < 0.5
    assert second.behind is not None and second.behind.low > 0.3
    assert ranking().best is first


def test_the_smallest_rank_within_the_margin_is_found() -> None:
    """The network has one dimension for each variable: rank 1 is as good as 3."""
    assert ranking().best.rank == 1
    of_rank = {m.fits[0].rank: m.value for m in toy()[1]["and first"].where(method=DAS).mean(split="dev")}
    assert max(of_rank.values()) - of_rank[1] <= 0.02


def test_shares_are_counted_over_the_pairs() -> None:
    rivals, fits = toy()
    answers = {name: pairs.test.answer for name, pairs in rivals.items()}
    differ = answers["and first"] != answers["or first"]
    found = ranking()
    assert found.n == 500 and found.n_differing == int(differ.sum())
    assert found.agreement["and first"]["or first"] == (~differ).double().mean().item()
    assert found.agreement["or first"]["or first"] == 1
    for one in found.standings:
        best = max(fits[one.name].where(method=DAS).mean(split="dev"), key=lambda mean: mean.value)
        values = torch.stack([fit.pair_scores["iia"] for fit in best.fits]).double().mean(0)
        assert one.iia.value == values.mean().item() and one.differing.value == values[differ].mean().item()
        assert one.method == best.method.label and one.differing.n == int(differ.sum())
        base, after = (getattr(rivals[one.name].test, name)[differ] for name in ("base_answer", "answer"))
        shares = [(base == after), after == 0, after == 1]
        assert one.floor == max(share.double().mean().item() for share in shares)
        assert one.ceiling == (one.name == "and first")  # of two answers, where they differ
    scores = [
        torch.stack([f.pair_scores["iia"] for f in fits[s.name] if f.method.label == s.method]).double().mean(0)
        for s in found.standings
    ]
    assert found.standings[1].behind is not None
    assert abs(found.standings[1].behind.value - (scores[0] - scores[1])[differ].mean().item()) < 1e-12


def test_it_is_printed_flattened_saved_and_read_again(tmp_path: Path) -> None:
    found = ranking()
    text = repr(found)
    assert text.index("and first") < text.index("or first") and f"{found.best.method}, mix.output" in text
    assert f"on {found.n_differing} of them" in text and "Not above the floor: or first" in text
    assert "<td style='text-align:left'>and first</td>" in found._repr_html_()
    first, second = found.records()
    assert found.standings[1].behind is not None
    assert (
        first["order"] == 1 and first["behind"] is None and second["behind_low"] == found.standings[1].behind.low
    )
    found.save(tmp_path / "ranking")
    again = Ranking.load(tmp_path / "ranking")
    assert again.as_dict() == found.as_dict() and again.standings == found.standings
    assert {name: fits.records() for name, fits in again.fits.items()} == {
        name: fits.records() for name, fits in found.fits.items()
    }
    assert rank_hypotheses(toy()[0], again.fits).as_dict() == found.as_dict()
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "ranking")
    with pytest.raises(FileNotFoundError, match=r"no ranking\.json"):
        Ranking.load(tmp_path)
    record = tmp_path / "ranking" / "ranking.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="format 7; this version reads 1"):
        Ranking.load(tmp_path / "ranking")


def test_close_scores_are_ordered_by_rank_and_others_by_score() -> None:
    scores = {"a": 0.90, "b": 0.95, "c": 0.94, "d": 0.89}
    assert _ordered(scores, {"a": 1, "b": 4, "c": 2, "d": 1}, 0.02) == ["c", "b", "a", "d"]
    assert _ordered(scores, {"a": 1, "b": 4, "c": 2, "d": 1}, 0.0) == ["b", "c", "a", "d"]
    assert _ordered(scores, dict.fromkeys("abcd", 1), 0.5) == ["b", "c", "a", "d"]


def test_the_floor_is_the_better_of_no_intervention_and_a_constant_answer() -> None:
    every = torch.ones(4, dtype=torch.bool)
    assert _floor(["a", "b", "a", "b"], ["a", "b", "a", "a"], every) == 0.75
    assert _floor(["a", "b", "a", "b"], ["a", "b", "b", "b"], every) == 0.75
    assert _floor(["a", "b", "c", "d"], ["a", "b", "c", "a"], every) == 0.75  # unedited; constant .5
    assert _floor(["a", "b", "c", "d"], ["d", "d", "d", "a"], every) == 0.75  # constant; unedited 0
    assert _floor(["a", "b", "c", "d"], ["d", "d", "d", "a"], torch.tensor([1, 0, 0, 1]).bool()) == 0.5


def test_what_cannot_be_ranked_is_refused() -> None:
    rivals, fits = toy()
    one, other = rivals
    with pytest.raises(ValueError, match="needed are two or more, the same in both"):
        rank_hypotheses(rivals, {one: fits[one]})
    with pytest.raises(ValueError, match="needed are two or more"):
        rank_hypotheses({one: rivals[one]}, {one: fits[one]})
    with pytest.raises(ValueError, match=f"the fits of '{one}' are of other pairs"):
        rank_hypotheses(rivals, {one: fits[other], other: fits[one]})
    elsewhere = {one: rivals[one], "x": replace(rivals[one], test=drawn(500, 9)[one])}
    made = {
        one: fits[one],
        "x": replace(fits[one], facts={**fits[one].facts, "data": elsewhere["x"].fingerprint()}),
    }
    with pytest.raises(ValueError, match="other test bases"):
        rank_hypotheses(elsewhere, made)
    with pytest.raises(ValueError, match="expect the same of all 500 test pairs"):
        rank_hypotheses({"x": rivals[one], "y": rivals[one]}, {"x": fits[one], "y": fits[one]})
    twin = replace(fits[other], facts={**fits[other].facts, "model": "another"})
    with pytest.raises(ValueError, match="of 2 models"):
        rank_hypotheses(rivals, {one: fits[one], other: twin})
    controls = fits[one].where(method=RandomSubspace)
    with pytest.raises(ValueError, match=f"fits of '{one}' hold no search that was scored by `iia`"):
        rank_hypotheses(rivals, {**fits, one: controls})


# --- pairs from a task of prompts -----------------------------------------------------------------------------

A_ODD = Hypothesis("a", PARITY.causal_model, ("a_odd",))
TWO = Hypothesis("both", PARITY.causal_model, ("a_odd", "b_odd"))
SUM = Hypothesis("sum", CausalModel({"odd": lambda a, b: (a + b) % 2}), ("odd",))


def test_all_hypotheses_see_the_same_bases_and_sources_and_answer_by_themselves() -> None:
    tokenizer = word_level()
    rivals = rival_pairs(PARITY, [A_ODD, TWO, SUM], tokenizer, train=60, dev=20, test=40)
    assert {name: pairs.variables for name, pairs in rivals.items()} == {
        "a": ["a_odd"], "both": ["a_odd", "b_odd"], "sum": ["odd"]
    }  # fmt: skip

    def texts(batch: Batch) -> list[str]:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        return [str(tokenizer.decode(row[there])) for row, there in zip(ids, mask, strict=True)]

    for split in ("train", "dev", "test"):
        a, both, total = (getattr(rivals[name], split) for name in ("a", "both", "sum"))
        bases, sources = texts(a.base), texts(a.sources["a_odd"])
        alone = {
            tuple(text == base for text in both_sources)
            for base, *both_sources in zip(bases, *map(texts, both.sources.values()), strict=True)
        }
        assert {(True, False), (False, True), (False, False)} <= alone
        assert bases == texts(both.base) == texts(total.base)
        assert sources == texts(total.sources["odd"])
        for i, (base, source) in enumerate(zip(bases, sources, strict=True)):
            (x, y), (u, v) = numbers_of(base), numbers_of(source)
            assert a.answers[a.answer[i]] == ("even", "odd")[(u + y) % 2]
            assert total.answers[total.answer[i]] == ("even", "odd")[(u + v) % 2]
            first, second = (texts(both.sources[name])[i] for name in ("a_odd", "b_odd"))
            assert first in (source, base)  # the first of its two sources is that of the others, or the base
            expected = (numbers_of(first)[0] + numbers_of(second)[1]) % 2
            assert both.answers[both.answer[i]] == ("even", "odd")[expected]
            assert int(a.base_answer[i]) == (x + y) % 2
    combinations = torch.stack([p.train.answer for p in rivals.values()] + [a.base_answer[:0].new_zeros(60)])  # type: ignore[union-attr]
    assert len(set(map(tuple, combinations.T.tolist()))) == 8


def test_pairs_are_drawn_from_the_task_and_the_seed() -> None:
    one, again, other = (
        rival_pairs(PARITY, [A_ODD, SUM], word_level(), train=10, dev=10, test=10, seed=s)["a"] for s in (0, 0, 1)
    )
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_what_is_no_set_of_rivals_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x': variables \['sum'\] asked for; possible .*'a_odd'"):
        Hypothesis("x", PARITY.causal_model, ("sum",))
    with pytest.raises(ValueError, match=r"variables \[\] asked for"):
        Hypothesis("x", PARITY.causal_model, ())
    for few in ([A_ODD], [A_ODD, A_ODD]):
        with pytest.raises(ValueError, match="two or more are needed, of different names"):
            rival_pairs(PARITY, few, word_level())
    with pytest.raises(ValueError, match="expect the same of all 100 pairs"):
        rival_pairs(PARITY, [A_ODD, replace(A_ODD, name="again")], word_level(), train=10)
    wrong = Hypothesis("wrong", CausalModel({"odd": lambda a: a % 2}), ("odd",))
    with pytest.raises(ValueError, match="other answers to the base"):
        rival_pairs(replace(PARITY, causal_model=PARITY.causal_model), [SUM, replace(wrong)], word_level())
    with pytest.raises(ValueError, match="n = 0 pairs asked for"):
        rival_pairs(PARITY, [A_ODD, SUM], word_level(), train=0)


@pytest.mark.parametrize("n", [1, 6, 30, 37])
def test_balanced_rows_are_each_kind_as_often_as_the_next(n: int) -> None:
    kinds = torch.tensor([0] * 20 + [1] * 20 + [2] * 3)[
        torch.randperm(43, generator=torch.Generator().manual_seed(0))
    ]
    rows = balanced(kinds, n, 5)
    assert len(set(rows.tolist())) == n
    counts = torch.bincount(kinds[rows], minlength=3).tolist()
    assert abs(counts[0] - counts[1]) <= 1 and (counts[2] == 3 or max(counts) - counts[2] <= 1)
    assert torch.equal(rows, balanced(kinds, n, 5))
    with pytest.raises(ValueError, match="44 pairs asked for, of 43"):
        balanced(kinds, 44, 0)


def test_settings_are_drawn_once_for_all_hypotheses() -> None:
    calls = []

    def sample(rng: random.Random, split: str) -> dict[str, int]:
        calls.append(split)
        return PARITY.sample(rng, split)

    rival_pairs(replace(PARITY, sample=sample), [A_ODD, SUM], word_level(), train=4, dev=2, test=3)
    looked_at = 20  # prompts of each split, to see behind what the answers stand
    assert [calls.count(split) - looked_at for split in ("train", "dev", "test")] == [80, 40, 60]
