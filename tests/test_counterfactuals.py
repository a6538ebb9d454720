"""Counterfactual data sets: answers by the causal model, balance, splits, and what is refused."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, counterfactual_dataset


def sample(rng: random.Random, split: str) -> dict[str, int]:
    numbers = range(10) if split == "train" else range(10, 20)
    return {"a": rng.choice(numbers), "b": rng.choice(numbers), "template": rng.randrange(2)}


def prompt(setting) -> Prompt:
    a, b = str(setting["a"]), str(setting["b"])
    before = ("sum ", "the sum of ")[setting["template"]]
    spans = {"a": (len(before), len(before + a)), "b": (len(before + a) + 1, len(before + a + b) + 1)}
    return Prompt(f"{before}{a} {b}", spans)


# The answer is the parity of a + b, by way of either number's parity.
PARITY = Task(
    name="parity",
    description="is the sum odd",
    causal_model=CausalModel(
        {
            "a_odd": lambda a: a % 2,
            "b_odd": lambda b: b % 2,
            "odd": lambda a_odd, b_odd: (a_odd + b_odd) % 2,
        }
    ),
    variable="a_odd",
    answers={0: "even", 1: "odd"},
    sample=sample,
    prompt=prompt,
)


def numbers_of(text: str) -> tuple[int, int]:
    a, b = text.split()[-2:]
    return int(a), int(b)


def word(total: int) -> str:
    return "odd" if total % 2 else "even"


def test_one_variable_gives_the_answers_of_the_causal_model():
    for row in counterfactual_dataset(PARITY, 200, split="train", seed=0):
        (a, b), (other, _) = numbers_of(row["base"]), numbers_of(row["sources"]["a_odd"])
        assert row["base_answer"] == word(a + b) and row["answer"] == word(other + b)
        assert row["changes"] == (row["answer"] != row["base_answer"])


def test_spans_point_at_the_words_and_templates_are_shared():
    for row in counterfactual_dataset(PARITY, 50, split="train", seed=0):
        source = row["sources"]["a_odd"]
        assert source.startswith("the") == row["base"].startswith("the")
        for text, spans in ((row["base"], row["base_spans"]), (source, row["source_spans"]["a_odd"])):
            assert tuple(int(text[slice(*spans[name])]) for name in "ab") == numbers_of(text)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 101])
def test_rows_are_balanced(n):
    rows = counterfactual_dataset(PARITY, n, split="test", seed=3)
    assert len(rows) == n
    counts = Counter(zip(rows["changes"], rows["answer"], strict=True))
    changing = sum(count for (changes, _), count in counts.items() if changes)
    assert abs(2 * changing - n) <= 1
    for changes in (True, False):
        assert abs(counts[changes, "odd"] - counts[changes, "even"]) <= 1


def test_splits_are_those_of_the_task():
    for split, numbers in (("train", range(10)), ("test", range(10, 20))):
        for row in counterfactual_dataset(PARITY, 50, split=split, seed=0):
            assert {*numbers_of(row["base"]), *numbers_of(row["sources"]["a_odd"])} <= set(numbers)


def test_the_seed_decides():
    first, again, other = (counterfactual_dataset(PARITY, 30, split="train", seed=seed) for seed in (5, 5, 6))
    assert first.to_list() == again.to_list() and first.to_list() != other.to_list()


def test_several_variables_exchange_every_subset_with_sources_of_their_own():
    rows = counterfactual_dataset(PARITY, 600, split="train", seed=0, variables=("a_odd", "b_odd"))
    alone = Counter()
    for row in rows:
        base, first, second = row["base"], row["sources"]["a_odd"], row["sources"]["b_odd"]
        assert row["base_answer"] == word(sum(numbers_of(base)))
        assert row["answer"] == word(numbers_of(first)[0] + numbers_of(second)[1])
        for name, text in row["sources"].items():
            if text == base:
                assert row["source_spans"][name] == row["base_spans"]
        alone[first == base, second == base] += 1
    # A drawn source is the base itself once in a hundred: those few count as left alone.
    assert all(abs(alone[kind] - 200) < 50 for kind in [(True, False), (False, True), (False, False)])
    assert alone[True, True] < 15


def test_a_variable_that_never_or_always_changes_the_answer_is_refused():
    ignored = CausalModel({"a_odd": lambda a: a % 2, "odd": lambda b: b % 2}, output="odd")
    with pytest.raises(ValueError, match=r"'parity': 'a_odd' never changed the answer"):
        counterfactual_dataset(replace(PARITY, causal_model=ignored), 4, split="train", seed=0)
    draws = iter(range(10**9))
    alternating = replace(PARITY, sample=lambda rng, split: {"a": next(draws), "b": 0, "template": 0})
    with pytest.raises(ValueError, match="'a_odd' always changed"):
        counterfactual_dataset(alternating, 4, split="train", seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, r"unknown split 'validation'; possible are \['train', 'test'\]"),
        ({"n": 0}, "n = 0 rows asked"),
        ({"variables": ["sum"]}, r"\['sum'\] asked; possible .*'a_odd', 'b_odd', 'odd'"),
        ({"variables": []}, r"\[\] asked"),
        ({"variables": ["a_odd", "a_odd"]}, "each once"),
    ],
)
def test_what_is_asked_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        counterfactual_dataset(**{"task": PARITY, "n": 4, "split": "train", "seed": 0, **change})
