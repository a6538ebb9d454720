"""Public data sets as rows of pairs, on small files of their formats: every row against rules written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_answers import byte_level

from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.loaders import (
    attribute_of,
    carry_of,
    counterfactuals_of,
    indirect_objects,
    minimal_pairs,
    position_of,
    ravel,
    suite,
    templates_of,
    token_of,
)
from subspace_lab.das.pairs import Counterfactuals

PAIRS = {"train": 40, "dev": 20, "test": 20}
COUNTRIES = {"Peru": "Spanish", "Japan": "Nihongo", "Norway": "Norse"}


def put(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def at(row: dict[str, Any], name: str, side: str) -> str:
    (source,) = row["source"].values()
    text: str = row["base"] if side == "base" else source
    return text[slice(*row["position"][name][side])]


# --- RAVEL --------------------------------------------------------------------------------------------------


@pytest.fixture
def cities(tmp_path: Path) -> Path:
    names = [f"City{i}" for i in range(18)]
    facts = {
        name: {"Country": (c := list(COUNTRIES)[i % 3]), "Language": f"{COUNTRIES[c]},Other"}
        for i, name in enumerate(names)
    }
    prompts = {
        "Country": ["%s is in", "the land of %s is", 'Lima is in Peru, {"city": "%s", "country": "'],
        "Language": ["in %s people speak", "the language of %s is", "%s: they speak"],
    }
    splits = ("train", "val", "test")
    put(tmp_path / "ravel_city_entity_attributes.json", facts)
    put(tmp_path / "ravel_city_attribute_to_prompts.json", prompts)
    put(tmp_path / "ravel_city_entity_to_split.json", {name: splits[i // 6] for i, name in enumerate(names)})
    own = {prompt: splits[i] for of in prompts.values() for i, prompt in enumerate(of)}
    put(tmp_path / "ravel_city_prompt_to_split.json", own)
    return tmp_path


def test_an_attribute_is_caused_where_it_is_asked_and_isolated_elsewhere(cities: Path) -> None:
    rows = ravel(cities, "city", "Country", pairs=PAIRS)
    assert {name: sum(row["split"] == name for row in rows) for name in PAIRS} == PAIRS
    splits = ("train", "dev", "test")
    for row in rows:
        base, source = at(row, "entity", "base"), at(row, "entity", "source")
        assert (base, source) == (row["entity"], row["source_entity"])
        country, other = (list(COUNTRIES)[int(name[4:]) % 3] for name in (base, source))
        assert country != other
        assert {int(base[4:]) // 6, int(source[4:]) // 6} == {splits.index(row["split"])}
        assert row["base"] == row["template"].replace("%s", base)
        asked = "speak" in row["base"] or "language" in row["base"]
        before, after = (COUNTRIES[country], COUNTRIES[other]) if asked else (country, other)
        assert row["kind"] == ("isolate" if asked else "cause")
        assert (row["base_answer"], row["source_answer"]["Country"]) == (before, after)
        assert row["answer"] == (before if asked else after)
    assert sum(row["kind"] == "cause" for row in rows) == 40
    assert (
        rows
        == ravel(cities, "city", "Country", pairs=PAIRS)
        != ravel(cities, "city", "Country", pairs=PAIRS, seed=1)
    )
    made = load_pairs(rows, byte_level(), balance=False)
    assert isinstance(made.train, Counterfactuals)
    assert made.variables == ["Country"] and set(made.test.kinds) == {"cause", "isolate"} and len(made.train) == 40


def test_what_ravel_does_not_have_is_refused(cities: Path) -> None:
    with pytest.raises(
        ValueError, match=r"\['Colour'\] are no attributes of 'city'; it has \['Country', 'Language'\]"
    ):
        ravel(cities, "city", "Colour")
    with pytest.raises(ValueError, match=r"entity_type='verb': the files in .* are of city\."):
        ravel(cities, "verb", "Past")
    for load in (lambda to: ravel(to, "city", "Country"), indirect_objects):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere;"):
            load(cities / "nowhere")
    (cities / "ravel_city_entity_to_split.json").rename(cities / "other.json")
    with pytest.raises(FileNotFoundError, match=r"ravel_city_entity_to_split.*in its folder are other\.json"):
        ravel(cities, "city", "Country")
    (cities / "other.json").rename(cities / "ravel_city_entity_to_split.json")
    put(cities / "ravel_city_prompt_to_split.json", {"%s is in": "train", "in %s people speak": "train"})
    with pytest.raises(ValueError, match=r"The val split has 6 entities and 0 prompts"):
        ravel(cities, "city", "Country")


# --- CausalGym ----------------------------------------------------------------------------------------------

NOUNS = {"is": [f"dog{i}" for i in range(12)], "are": [f"cats{i}" for i in range(12)]}


def test_minimal_pairs_differ_in_one_word(tmp_path: Path) -> None:
    one = {
        "templates": ["The {noun} near the {place}"],
        "label": "noun",
        "label_prepend_space": True,
        "variables": {"noun": NOUNS, "place": ["sea", "hill"]},
    }
    path = put(tmp_path / "data.json", {"number": one})
    rows = minimal_pairs(path, "number", pairs=PAIRS)
    words: dict[str, set[str]] = {name: set() for name in PAIRS}
    for i, row in enumerate(rows):
        base, source = at(row, "noun", "base"), at(row, "noun", "source")
        assert base != source and row["base"].replace(base, source) == row["source"]["noun"]
        assert at(row, "place", "base") == at(row, "place", "source")
        assert row["base_answer"] == ("is" if base.startswith("dog") else "are")
        assert row["answer"] == row["source_answer"]["noun"] == ("is" if source.startswith("dog") else "are")
        assert (row["answer"] != row["base_answer"]) == (i % 2 == 0)
        words[row["split"]] |= {base, source}
    assert (
        not words["train"] & words["dev"]
        and not words["train"] & words["test"]
        and not words["dev"] & words["test"]
    )
    assert load_pairs(rows, byte_level(), balance=False).test.answers in (("is", "are"), ("are", "is"))
    assert templates_of(path) == ["number"]
    with pytest.raises(ValueError, match=r"has no set 'gender'; it has \['number'\]"):
        minimal_pairs(path, "gender")
    put(path, {"number": {**one, "variables": {"noun": {"is": ["dog"], "are": ["cats"]}}}})
    with pytest.raises(ValueError, match=r"1 different values \(dog\)"):
        minimal_pairs(path, "number")


def syntax(conditions: dict[str, list[str]], formulas: list[str], items: int = 8) -> dict[str, Any]:
    def regions(words: list[str], i: int) -> list[dict[str, Any]]:
        return [{"content": word.format(i=i), "region_number": n + 1} for n, word in enumerate(words)]

    return {
        "items": [
            {
                "item_number": i,
                "conditions": [
                    {"condition_name": name, "regions": regions(of, i)} for name, of in conditions.items()
                ],
            }
            for i in range(items)
        ],
        "predictions": [{"formula": formula, "type": "formula"} for formula in formulas],
        "region_meta": {"1": "intro", "2": "np subject", "3": "verb"},
    }


def test_a_suite_gives_what_stands_before_the_region(tmp_path: Path) -> None:
    conditions = {
        "match_sing": ["The", "dog{i}", "is", "good"],
        "mismatch_sing": ["The", "dog{i}", "are", "good"],
        "match_plural": ["The", "cats{i}", "are", "good"],
        "mismatch_plural": ["The", "cats{i}", "is", "good"],
    }
    formulas = ["(3;%match_sing%) < (3;%mismatch_sing%)", "(3;%mismatch_plural%) > (3;%match_plural%)"]
    path = put(tmp_path / "suite.json", syntax(conditions, formulas))
    rows = suite(path, pairs=PAIRS)
    items: dict[str, set[str]] = {name: set() for name in PAIRS}
    for i, row in enumerate(rows):
        base, source = at(row, "np_subject", "base"), at(row, "np_subject", "source")
        assert row["base"] == f"The {base}" and row["source"]["type"] == f"The {source}"
        right = {name: "is" if name.startswith("dog") else "are" for name in (base, source)}
        assert row["base_answer"] == right[base] and row["source_answer"]["type"] == right[source] == row["answer"]
        assert (base[-1] == source[-1]) == (right[base] != right[source]) == (i % 2 == 0)
        items[row["split"]] |= {row["entity"], row["source_entity"]}
    assert (
        not items["train"] & items["dev"]
        and not items["train"] & items["test"]
        and not items["dev"] & items["test"]
    )


def test_a_suite_without_alternatives_asks_for_one(tmp_path: Path) -> None:
    conditions = {"neg": ["No", "dog{i}", "any", "food"], "pos": ["The", "dog{i}", "any", "food"]}
    path = put(tmp_path / "npi.json", syntax(conditions, ["(3;%neg%) < (3;%pos%)"]))
    with pytest.raises(ValueError, match=r"give 0 types of prompts with an answer.*instead="):
        suite(path)
    for row in suite(path, instead="some", pairs=PAIRS):
        assert row["base_answer"] == ("any" if row["base"].startswith("No") else "some")
        assert row["answer"] == ("any" if row["source"]["type"].startswith("No") else "some")


# --- MIB ----------------------------------------------------------------------------------------------------


def test_choices_are_pointed_at_or_taken_over() -> None:
    def case(letters: str, texts: list[str], key: int) -> dict[str, Any]:
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
        return {
            "prompt": f"Which?{listed}\nAnswer:",
            "choices": {"label": list(letters), "text": texts},
            "answerKey": key,
        }

    source = case("WXYZ", ["blue", "tan", "red", "gold"], 3)
    base = {**case("ABCD", ["red", "blue", "tan", "gold"], 1), "answerPosition_counterfactual": source}
    (row,) = counterfactuals_of([base], "answerPosition", position_of, variable="pointer")
    assert (row["base_answer"], row["source_answer"], row["answer"]) == ("B", {"pointer": "Z"}, "D")
    (row,) = counterfactuals_of([base], "answerPosition_counterfactual", token_of, variable="answer")
    assert row["answer"] == "Z" and row["source"]["answer"].startswith("Which?\nW. blue")
    with pytest.raises(
        ValueError, match=r"no 'symbol_counterfactual'; its counterfactuals are \['answerPosition_"
    ):
        counterfactuals_of([base], "symbol", token_of, variable="answer")
    with pytest.raises(ValueError, match=r"The source's answer is choice 3; the base has 2"):
        position_of(case("AB", ["red", "blue"], 0), case("ABCD", ["a", "b", "c", "d"], 3))


@pytest.mark.parametrize(
    ("one", "other", "sum_"), [((13, 25), (17, 5), 48), ((17, 25), (11, 1), 32), ((17, 5), (9, 9), 22)]
)
def test_a_carry_is_exchanged(one: tuple[int, int], other: tuple[int, int], sum_: int) -> None:
    cases = [{"prompt": f"{a}+{b}=", "label": a + b, "operand1": a, "operand2": b} for a, b in (one, other)]
    rows = [{**cases[0], "random_counterfactual": cases[1], "template": "{a}+{b}="}]
    (row,) = counterfactuals_of({"train": rows}, "random", carry_of, variable="carry")
    assert (row["base_answer"], row["answer"]) == (str(sum(one)), str(sum_))
    assert (
        row["split"] == "train"
        and row["template"] == "{a}+{b}="
        and row["source_answer"] == {"carry": str(sum(other))}
    )


def test_attributes_of_mib_and_sources_that_are_missing(tmp_path: Path) -> None:
    def case(city: str, attribute: str) -> dict[str, Any]:
        values = {"Country": f"land of {city}", "Language": f"tongue of {city}"}
        return {"prompt": f"{attribute} of {city}:", "entity": city, "attribute": attribute, **values}

    rows = [
        {**case("Lima", "Country"), "attribute_counterfactual": case("Oslo", "Language")},
        {**case("Lima", "Language"), "attribute_counterfactual": case("Oslo", "Country")},
        {**case("Lima", "Language"), "attribute_counterfactual": None},
    ]
    path = put(tmp_path / "rows.json", rows)
    one, other = counterfactuals_of(path, "attribute", attribute_of("Country"), variable="Country")
    assert (one["kind"], one["answer"]) == ("cause", "land of Oslo")
    assert (other["kind"], other["answer"], other["base_answer"]) == (
        "isolate",
        "tongue of Lima",
        "tongue of Lima",
    )
    assert one["span"]["entity"] == {"base": "Lima", "source": "Oslo"}
    with pytest.raises(ValueError, match="Row 0 has no answer"):
        counterfactuals_of(
            [{"prompt": "x", "random_counterfactual": {"prompt": "y"}}], "random", token_of, variable="v"
        )


def test_indirect_objects_of_word_lists(tmp_path: Path) -> None:
    put(tmp_path / "names.json", [f"Name{chr(65 + i)}" for i in range(20)])
    put(tmp_path / "places.json", ["store"])
    put(tmp_path / "objects.json", ["ring", "apple"])
    text = "After {name_A} and {name_B} left the {place}, {name_C} gave ARTICLE {object} to"
    templates = [text.replace("ARTICLE", article) for article in ("a", "an")]
    put(tmp_path / "templates.json", templates)
    rows = indirect_objects(tmp_path, pairs=PAIRS)
    found: dict[str, set[str]] = {name: set() for name in PAIRS}
    for i, row in enumerate(rows):
        base = [at(row, name, "base") for name in ("name_A", "name_B", "name_C")]
        source = [at(row, name, "source") for name in ("name_A", "name_B", "name_C")]
        assert ("an apple" in row["base"]) != (" a ring" in row["base"])
        for names, answer in ((base, row["base_answer"]), (source, row["source_answer"]["position"])):
            assert names[2] in names[:2] and {answer, names[2]} == set(names[:2])
        assert row["answer"] == base[source.index(row["source_answer"]["position"])]
        assert (row["answer"] != row["base_answer"]) == (i % 2 == 0)
        found[row["split"]] |= {*base, *source}
    assert (
        not found["train"] & found["dev"]
        and not found["train"] & found["test"]
        and not found["dev"] & found["test"]
    )
