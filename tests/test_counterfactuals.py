"""Counterfactual data sets: answers by the causal model, balance, splits, and what is refused."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, counterfactual_dataset
from subspace_lab.das.pairs import Counterfactuals, Pairs

NUMBERS = {"train": range(10), "dev": range(20, 30), "test": range(10, 20)}


def sample(rng: random.Random, split: str) -> dict[str, int]:
    numbers = NUMBERS[split]
    return {"a": rng.choice(numbers), "b": rng.choice(numbers), "template": rng.randrange(2)}


def prompt(setting: Any) -> Prompt:
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


def test_one_variable_gives_the_answers_of_the_causal_model() -> None:
    for row in counterfactual_dataset(PARITY, 200, split="train", seed=0):
        (a, b), (other, _) = numbers_of(row["base"]), numbers_of(row["sources"]["a_odd"])
        assert row["base_answer"] == word(a + b) and row["answer"] == word(other + b)
        assert row["changes"] == (row["answer"] != row["base_answer"])


def test_spans_point_at_the_words_and_templates_are_shared() -> None:
    for row in counterfactual_dataset(PARITY, 50, split="train", seed=0):
        source = row["sources"]["a_odd"]
        assert source.startswith("the") == row["base"].startswith("the")
        for text, spans in ((row["base"], row["base_spans"]), (source, row["source_spans"]["a_odd"])):
            assert tuple(int(text[slice(*spans[name])]) for name in "ab") == numbers_of(text)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 101])
def test_rows_are_balanced(n: int) -> None:
    rows = counterfactual_dataset(PARITY, n, split="test", seed=3)
    assert len(rows) == n
    counts = Counter(zip(rows["changes"], rows["answer"], strict=True))
    changing = sum(count for (changes, _), count in counts.items() if changes)
    assert abs(2 * changing - n) <= 1
    for changes in (True, False):
        assert abs(counts[changes, "odd"] - counts[changes, "even"]) <= 1


def test_splits_are_those_of_the_task() -> None:
    for split, numbers in NUMBERS.items():
        for row in counterfactual_dataset(PARITY, 50, split=split, seed=0):
            assert {*numbers_of(row["base"]), *numbers_of(row["sources"]["a_odd"])} <= set(numbers)


def test_the_seed_decides() -> None:
    first, again, other = (counterfactual_dataset(PARITY, 30, split="train", seed=seed) for seed in (5, 5, 6))
    assert first.to_list() == again.to_list() and first.to_list() != other.to_list()


def test_source_values_are_those_of_the_causal_model_in_each_source() -> None:
    rows = counterfactual_dataset(PARITY, 100, split="train", seed=0, variables=("a_odd", "b_odd"))
    for row in rows:
        for name, which in (("a_odd", 0), ("b_odd", 1)):
            assert row["source_values"][name] == str(numbers_of(row["sources"][name])[which] % 2)
    (one,) = counterfactual_dataset(PARITY, 1, split="test", seed=2, variables=["a"])["source_values"]
    assert int(one["a"]) in NUMBERS["test"]  # an input of the causal model is a variable too


def test_several_variables_exchange_every_subset_with_sources_of_their_own() -> None:
    rows = counterfactual_dataset(PARITY, 600, split="train", seed=0, variables=("a_odd", "b_odd"))
    alone: Counter[Any] = Counter()
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


def test_pairs_can_be_filtered_by_the_values_of_the_causal_model() -> None:
    seen = []

    def differ(base: Any, sources: Any, after: Any) -> Any:
        seen.append((base, sources, after))
        return base["b_odd"] != sources["a_odd"]["a_odd"]

    rows = counterfactual_dataset(PARITY, 60, split="train", seed=0, keep=differ)
    assert len(rows) == 60 and sum(rows["changes"]) == 30  # as balanced as without a filter
    for row in rows:
        assert numbers_of(row["base"])[1] % 2 != numbers_of(row["sources"]["a_odd"])[0] % 2
    for base, sources, after in seen[:100]:
        assert base == PARITY.causal_model.run({"a": base["a"], "b": base["b"]})
        assert after == PARITY.causal_model.interchange(
            {"a": base["a"], "b": base["b"]}, {"a_odd": {name: sources["a_odd"][name] for name in "ab"}}
        )
    both: dict[str, Any] = {
        "variables": ("a_odd", "b_odd"),
        "keep": lambda base, sources, after: len(sources) == 2,
    }
    rows = counterfactual_dataset(PARITY, 200, split="train", seed=0, **both)
    alone = [row for row in rows if row["base"] in row["sources"].values()]
    assert len(alone) < 10  # unfiltered 133; a drawn source is the base itself once in two hundred


def test_a_filter_that_leaves_no_pair_is_an_error_with_its_counts() -> None:
    with pytest.raises(ValueError, match=r"'parity': `keep` took 0 of 1000 pairs of the dev split in a row"):
        counterfactual_dataset(PARITY, 4, split="dev", seed=0, keep=lambda *_: False)
    with pytest.raises(ValueError, match=r"'a_odd' never changed the answer"):
        counterfactual_dataset(
            PARITY, 4, split="dev", seed=0, keep=lambda base, _, after: base["odd"] == after["odd"]
        )


def test_labels_are_those_of_the_base() -> None:
    kinds = replace(
        PARITY, entity="a", kind=lambda base, exchanged, changes: f"{base['a'] % 2} {exchanged} {changes}"
    )
    for row in counterfactual_dataset(kinds, 40, split="train", seed=0):
        a, _ = numbers_of(row["base"])
        assert row["entity"] == str(a) and row["kind"] == f"{a % 2} ['a_odd'] {row['changes']}"
        assert row["template"] == str(int(row["base"].startswith("the")))
    assert not {"entity", "kind"} & set(counterfactual_dataset(PARITY, 4, split="train", seed=0).column_names)
    pairs = kinds.pairs(word_level(), train=20, dev=4, test=8)
    rows = counterfactual_dataset(kinds, 8, split="test", seed=0)
    assert pairs.test.labels == {name: tuple(rows[name]) for name in ("entity", "template", "kind")}


def test_a_variable_that_never_or_always_changes_the_answer_is_refused() -> None:
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
        ({"split": "validation"}, r"unknown split 'validation'; possible are \['train', 'dev', 'test'\]"),
        ({"n": 0}, "n = 0 pairs asked for"),
        ({"variables": ["sum"]}, r"\['sum'\] asked for; possible .*'a_odd', 'b_odd', 'odd'"),
        ({"variables": []}, r"\[\] asked for"),
        ({"variables": ["a_odd", "a_odd"]}, "each once"),
    ],
)
def test_what_is_asked_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counterfactual_dataset(**{"task": PARITY, "n": 4, "split": "train", "seed": 0, **change})


# --- a task's pairs -------------------------------------------------------------------------------------------


def word_level() -> PreTrainedTokenizerFast:
    words = ["<unk>", "even", "odd", "sum", "the", "of", *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_tasks_pairs_come_in_three_splits_that_share_no_number() -> None:
    tokenizer = word_level()
    pairs = PARITY.pairs(tokenizer, train=40, dev=10, test=21, seed=4)
    assert isinstance(pairs, Pairs) and pairs.task == "parity" and pairs.variables == ["a_odd"]
    assert isinstance(pairs.train, Counterfactuals)
    assert [len(split) for split in (pairs.train, pairs.dev, pairs.test)] == [40, 10, 21]
    for name in ("train", "dev", "test"):
        split, rows = getattr(pairs, name), counterfactual_dataset(PARITY, 40, split=name, seed=4)
        assert split.answers == ("even", "odd") and split.tokens.tolist() == [1, 2]
        for i, row in zip(range(len(split)), rows, strict=False):
            for batch, text in ((split.base, row["base"]), (split.sources["a_odd"], row["sources"]["a_odd"])):
                ids = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
                assert tokenizer.decode(ids) == text
                assert {*numbers_of(text)} <= set(NUMBERS[name])
            assert split.answers[split.answer[i]] == row["answer"]
            assert int(split.values["a_odd"][i]) == int(row["source_values"]["a_odd"])
    assert pairs.fingerprint() == PARITY.pairs(tokenizer, train=40, dev=10, test=21, seed=4).fingerprint()
    assert pairs.fingerprint() != PARITY.pairs(tokenizer, train=40, dev=10, test=21, seed=5).fingerprint()


def test_a_tasks_pairs_of_several_variables() -> None:
    pairs = PARITY.pairs(word_level(), train=30, dev=10, test=10, variables=["b_odd", "a_odd"])
    assert pairs.variables == ["b_odd", "a_odd"]
    assert isinstance(pairs.train, Counterfactuals)
    assert {name: v.unique().tolist() for name, v in pairs.train.values.items()} == {
        "b_odd": [0, 1],
        "a_odd": [0, 1],
    }
    with pytest.raises(ValueError, match="n = 0 pairs asked for"):
        PARITY.pairs(word_level(), train=30, dev=0, test=10)
