"""Tasks for pretrained language models: answers by rules written anew here, spans, splits, kinds of pairs."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from subspace_lab.das import Task
from subspace_lab.das.counterfactuals import counterfactual_dataset
from subspace_lab.das.hypotheses import Hypothesis
from subspace_lab.tasks import (
    addition,
    city_attribute,
    indirect_object,
    load_task,
    multiple_choice,
    number_agreement,
    price_tagging,
)

TASKS = ("number_agreement", "city_attribute", "addition", "digit_sums", "multiple_choice")
SPLITS = ("train", "dev", "test")


def settings_of(name: str, split: str, n: int) -> list[dict]:
    rng = random.Random(0)
    return [load_task(name).sample(rng, split) for _ in range(n)]


def rule(name: str, text: str) -> str:
    """The answer read from the text alone, without the causal model and the setting."""
    if name == "number_agreement":
        subject = re.search(r"[Tt]he (\w+) (near|behind|beside) the \w+$", text)
        assert subject is not None
        return " are" if subject[1].endswith("s") else " is"
    if name == "city_attribute":
        *_, question = re.split(r"(?<=[a-z][a-z])\. ", text)
        city = next(c for c in sorted(city_attribute.COUNTRY_OF, key=len, reverse=True) if c in question)
        country = next(k for k, listed in city_attribute._CITIES.items() if city in listed.split(", "))
        language, continent = city_attribute.COUNTRIES[country]
        return f" {language if 'speak' in question else continent if 'continent' in question else country}"
    if name in ("addition", "digit_sums"):
        a, b = map(int, re.findall(r"\d+", text.splitlines()[-1]))
        return str(a + b)[0]
    text = text.split("\n\n")[-1]
    colour = re.search(r"is (\w+)[.]", text)
    assert colour is not None
    letter = re.search(rf"^([A-Z])\. {colour[1]}$", text, flags=re.MULTILINE)
    assert letter is not None
    return f" {letter[1]}"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_causal_model_gives_the_answer_that_the_text_asks_for(name: str, split: str) -> None:
    task = load_task(name)
    assert task.name == name
    for setting in settings_of(name, split, 300):
        assert task.answer(setting) == rule(name, task.prompt(setting).text)


@pytest.mark.parametrize("name", TASKS)
def test_spans_are_the_same_in_all_prompts_and_point_at_their_words(name: str) -> None:
    task, names = load_task(name), set()
    for setting in settings_of(name, "train", 300):
        prompt = task.prompt(setting)
        names.add(frozenset(prompt.spans))
        assert prompt.spans["last"][1] == len(prompt.text)
        for span, (start, end) in prompt.spans.items():
            if span in setting:
                assert prompt.text[start:end] == str(setting[span])
    assert len(names) == 1


@pytest.mark.parametrize("name", [*TASKS, "price_tagging", "indirect_object", "entity_attribute", "story_gender"])
def test_splits_share_no_entity_and_each_has_several(name: str) -> None:
    task = load_task(name)
    assert task.entity is not None
    train, dev, test = ({one[task.entity] for one in settings_of(name, split, 3000)} for split in SPLITS)
    assert not train & dev and not train & test and not dev & test
    assert len(train) >= 16 and len(dev) >= 8 and len(test) >= 16


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_drawn_with_their_labels(name: str, split: str) -> None:
    task = load_task(name)
    rows = counterfactual_dataset(task, 60, split=split, seed=0)
    assert sum(rows["changes"]) == 30
    drawn = {str(one[task.entity]) for one in settings_of(name, split, 3000)}
    for row in rows:
        assert row["base_answer"] == rule(name, row["base"]) and row["entity"] in drawn
    for changes in (True, False):
        answers = Counter(row["answer"] for row in rows if row["changes"] == changes)
        assert max(answers.values()) - min(answers.values()) <= 1


@pytest.mark.parametrize("name", TASKS)
def test_unknown_splits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        load_task(name).sample(random.Random(0), "validation")


# --- one by one -----------------------------------------------------------------------------------------------


def test_the_number_of_subject_and_attractor_are_drawn_apart() -> None:
    settings = settings_of("number_agreement", "test", 4000)
    both = Counter((s["subject"].endswith("s"), s["attractor"].endswith("s")) for s in settings)
    assert all(abs(n / 4000 - 0.25) < 0.03 for n in both.values()) and len(both) == 4
    assert {s["preposition"] for s in settings} == set(number_agreement.PREPOSITIONS)
    assert number_agreement.plural("box") == "boxes" and number_agreement.NUMBER["boxes"] == "plural"


def test_sums_carry_in_every_second_prompt_and_stay_below_a_hundred() -> None:
    for name in ("addition", "digit_sums"):
        settings = settings_of(name, "train", 4000)
        carries = [one["first"] % 10 + one["second"] % 10 >= 10 for one in settings]
        assert abs(sum(carries) / 4000 - 0.5) < 0.03
        top = 100 if name == "addition" else 19
        assert all(one["first"] + one["second"] < top and min(one["first"], one["second"]) > 0 for one in settings)
    assert all(min(one["first"], one["second"]) >= 10 for one in settings_of("addition", "test", 500))
    assert sum(map(len, addition.ONES.values())) == 100


def test_exchanging_the_carry_moves_the_first_digit_by_one() -> None:
    model = addition.ADDITION.causal_model
    after = model.interchange({"first": 23, "second": 45}, {"ones_carry": {"first": 38, "second": 27}})
    assert after["first_digit"] == 7
    digits = addition.DIGIT_SUMS.causal_model
    assert (
        digits.interchange({"first": 3, "second": 4}, {"ones_carry": {"first": 8, "second": 5}})["first_digit"]
        == 1
    )
    assert (
        digits.interchange({"first": 8, "second": 5}, {"ones_carry": {"first": 3, "second": 4}})["first_digit"]
        == 3
    )


def test_the_pointer_picks_the_bases_letter_at_the_sources_place() -> None:
    rng, model = random.Random(0), multiple_choice.MULTIPLE_CHOICE.causal_model
    for _ in range(100):
        base, source = (load_task("multiple_choice").sample(rng, "train") for _ in range(2))
        place = [source[f"choice_{i}"] for i in range(4)].index(source["colour"])
        inputs = [{name: one[name] for name in model.inputs} for one in (base, source)]
        assert model.interchange(inputs[0], {"pointer": inputs[1]})["letter"] == base[f"letter_{place}"]
        assert model.interchange(inputs[0], {"letter": inputs[1]})["letter"] == source[f"letter_{place}"]
    places = Counter(
        [one[f"choice_{i}"] for i in range(4)].index(one["colour"])
        for one in settings_of("multiple_choice", "dev", 2000)
    )
    assert all(abs(n / 2000 - 0.25) < 0.04 for n in places.values())


@pytest.mark.parametrize("name", ["city_attribute", "entity_attribute"])
def test_kinds_tell_whether_the_exchanged_attribute_is_asked_for(name: str) -> None:
    rows = counterfactual_dataset(load_task(name), 200, split="test", seed=0)
    for row in rows:
        question = re.split(r"(?<=[a-z][a-z])\. ", row["base"])[-1]
        exchanged_is_asked = not re.search("speak|continent|food", question)
        expected = "isolate" if not exchanged_is_asked else "cause" if row["changes"] else "same"
        assert row["kind"] == expected
        assert row["kind"] != "isolate" or not row["changes"]
    assert {"cause", "isolate"} <= set(rows["kind"])


def test_every_country_has_cities_in_every_split() -> None:
    assert set(city_attribute.CITIES) == set(SPLITS)
    for cities in city_attribute.CITIES.values():
        assert set(cities) == set(city_attribute.COUNTRIES) and all(cities.values())
    assert sum(len(of) for cities in city_attribute.CITIES.values() for of in cities.values()) == len(
        city_attribute.COUNTRY_OF
    )


@pytest.mark.parametrize(
    ("task", "hypotheses", "names"),
    [
        (
            price_tagging.PRICE_TAGGING,
            price_tagging.HYPOTHESES,
            ["left boundary", "both boundaries", "midpoint distance", "bracket identity"],
        ),
        (indirect_object.INDIRECT_OBJECT, indirect_object.HYPOTHESES, ["position", "name"]),
    ],
)
def test_rival_hypotheses_answer_every_base_as_the_task_does(
    task: Task, hypotheses: tuple[Hypothesis, ...], names: list[str]
) -> None:
    assert [one.name for one in hypotheses] == names
    for setting in settings_of(task.name, "test", 500):
        for one in hypotheses:
            model = one.causal_model
            value = model.run({name: setting[name] for name in model.inputs})[model.output]
            assert task.answers[value] == task.answer(setting)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left boundary", lambda base, s: s["lower"] <= s["amount"] and base["amount"] <= base["upper"]),
        ("bracket identity", lambda base, s: s["lower"] <= base["amount"] <= s["upper"]),
        (
            "midpoint distance",
            lambda base, s: (
                abs(s["amount"] - (s["lower"] + s["upper"]) / 2) <= (base["upper"] - base["lower"]) / 2
            ),
        ),
    ],
)
def test_price_hypotheses_expect_what_their_names_say(name: str, expected: Callable[..., Any]) -> None:
    (one,) = (h for h in price_tagging.HYPOTHESES if h.name == name)
    settings = settings_of("price_tagging", "train", 1000)
    for base, source in zip(settings[::2], settings[1::2], strict=True):
        inputs = [{k: s[k] for k in one.causal_model.inputs} for s in (base, source)]
        after = one.causal_model.interchange(inputs[0], dict.fromkeys(one.variables, inputs[1]))
        assert after["answer"] == expected(base, source)
