"""MIB (Mueller et al. 2025, arXiv 2504.13151): the data sets of its causal-variable track, and its word lists.

A row has a prompt, its answer, and counterfactual prompts with their answers, in columns that end in `_counterfactual`:

    {"prompt": …, "choices": [texts] or {"label": [letters], "text": [texts]}, "answerKey": 0, "template": …,
     "s2_io_flip_counterfactual": {"prompt": …, "choices": …, "answerKey": 1}, …}

Arithmetic has `label`, `operand1` and `operand2` instead of choices; RAVEL has `entity`, `attribute` and a column for
each attribute. The answer that is expected after the interchange depends on the variable. It is a function of base and
source: `token_of`, `position_of`, `carry_of`, `attribute_of("Country")`, or your own function.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from subspace_lab.das.loaders._parts import Row, expect, filled, numbers_of, parted, read

Case = Mapping[str, Any]
Expected = Callable[[Case, Case], str]
"""(base, source) → the answer after the interchange"""

ENDING = "_counterfactual"


def counterfactuals_of(
    data: str | Path | Dataset | Mapping[str, Any] | Sequence[Case],
    counterfactual: str,
    expected: Expected,
    *,
    variable: str,
) -> list[Row]:
    """Rows of pairs from a data set of MIB and one of its counterfactuals.

    The label is template. Rows of RAVEL also have the labels entity, source_entity and kind ("cause" if the prompt asks
    for the variable, otherwise "isolate"), and the position `entity`.

    Args:
        data: a .json file of rows, a `datasets.Dataset`, {split: data set} as `load_dataset` returns it, or a list.
        counterfactual: the column with the sources, with or without the ending "_counterfactual".
        expected: defines the variable: (base, source) → the answer after the interchange.
        variable: the name of the variable.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a counterfactual that the rows do not have, or rows without an answer.
    """
    if isinstance(data, str | Path):
        data = expect(read(Path(data)), list, str(data))
    if isinstance(data, Mapping):
        return [
            {**row, "split": split}
            for split, of in data.items()
            for row in counterfactuals_of(of, counterfactual, expected, variable=variable)
        ]
    column = counterfactual if counterfactual.endswith(ENDING) else f"{counterfactual}{ENDING}"
    found = []
    for i, base in enumerate(data):
        if column not in base:
            have = [name for name in base if name.endswith(ENDING)]
            raise ValueError(f"Row {i} has no {column!r}; its counterfactuals are {have}.")
        source = base[column]
        if not source:
            continue
        row: Row = {
            "base": base["prompt"],
            "source": {variable: source["prompt"]},
            "base_answer": answer_of(base, f"Row {i}"),
            "source_answer": {variable: answer_of(source, f"Row {i}, {column}")},
            "answer": expected(base, source),
        }
        if "template" in base:
            row["template"] = str(base["template"])
        if "attribute" in base:
            row |= {"entity": base["entity"], "source_entity": source["entity"]}
            row["span"] = {"entity": {"base": base["entity"], "source": source["entity"]}}
            row["kind"] = "cause" if base["attribute"] == variable else "isolate"
        found.append(row)
    if not found:
        raise ValueError(f"No row has a source in {column!r}.")
    return found


def answer_of(case: Case, where: str = "A row") -> str:
    """The right answer to a prompt: a choice or its letter, a label, or the value of the attribute."""
    if case.get("choices") and case.get("answerKey") is not None:
        return str(_choices(case)[int(case["answerKey"])])
    if case.get("label") not in (None, ""):
        return str(case["label"])
    if case.get("attribute") and case.get(case["attribute"]):
        return str(case[case["attribute"]])
    raise ValueError(f"{where} has no answer; needed are 'choices' and 'answerKey', 'label', or 'attribute'.")


def token_of(base: Case, source: Case) -> str:
    """The variable is the answer itself: the source's answer is expected."""
    return answer_of(source)


def position_of(base: Case, source: Case) -> str:
    """The variable is the answer's place among the choices: the base's choice at the source's place is expected."""
    choices, place = _choices(base), int(source["answerKey"])
    if place >= len(choices):
        raise ValueError(f"The source's answer is choice {place}; the base has {len(choices)}: {choices}.")
    return str(choices[place])


def carry_of(base: Case, source: Case) -> str:
    """The variable is the carry of the ones in a sum of two numbers: the base's sum with the source's carry."""
    carries = [(int(case["operand1"]) % 10 + int(case["operand2"]) % 10) // 10 for case in (base, source)]
    return str(int(base["operand1"]) + int(base["operand2"]) + 10 * (carries[1] - carries[0]))


def attribute_of(variable: str) -> Expected:
    """The variable is an attribute: the source's value is expected if the base asks for it, else the base's answer."""

    def expected(base: Case, source: Case) -> str:
        return str(source[variable]) if base["attribute"] == variable else answer_of(base)

    return expected


def _choices(case: Case) -> Sequence[Any]:
    choices = case["choices"]
    return choices["label"] if isinstance(choices, Mapping) else choices


def indirect_objects(
    folder: str | Path, *, pairs: int | Mapping[str, int] | None = None, seed: int = 0
) -> list[Row]:
    """Rows of pairs about indirect objects from MIB's word lists: names, places, objects and templates (.json).

    The variable "position" says which of two names is not repeated, the first or the second. Expected is the base's
    name at the source's position. In half of the pairs the position changes. The names are divided into three splits.
    The positions are name_A, name_B and name_C (the repeated name); the labels are entity (the base's indirect
    object) and template.

    Args:
        folder: the folder with names.json, places.json, objects.json and templates.json.
        pairs: how many pairs, such as {"train": 1000, "dev": 200, "test": 400}, or a number for train.
        seed: seed of the random draw and of the splits.
    """
    lists = {
        what: expect(read(Path(folder) / f"{what}.json"), list, f"{what}.json")
        for what in ("names", "places", "objects", "templates")
    }
    names = parted(lists["names"], seed)
    rng, rows = random.Random(seed), []
    for split, n in numbers_of(pairs).items():
        for i in range(n):
            thing = rng.choice(lists["objects"])
            vowel = thing[0].lower() in "aeiou"
            fitting = [t for t in lists["templates"] if ("an {object}" in t) == vowel or "{object}" not in t]
            template = rng.choice(expect(fitting, list, f"templates.json, with an article for {thing!r}"))
            shared = {"place": rng.choice(lists["places"]), "object": thing}
            first = rng.random() < 0.5
            source_first = first if i % 2 else not first
            base, source = rng.sample(names[split], 2), rng.sample(names[split], 2)
            # The variable is the position of the name that is not repeated, which is the answer.
            text, at = filled(template, {**shared, **_names(base, first)})
            text_of_source, at_source = filled(template, {**shared, **_names(source, source_first)})
            rows.append(
                {
                    "base": text,
                    "source": {"position": text_of_source},
                    "base_answer": base[not first],
                    "source_answer": {"position": source[not source_first]},
                    "answer": base[not source_first],
                    "position": {
                        name: {"base": at[name], "source": at_source[name]}
                        for name in ("name_A", "name_B", "name_C")
                    },
                    "entity": base[not first],
                    "template": template,
                    "split": split,
                }
            )
    return rows


def _names(both: Sequence[str], first: bool) -> dict[str, str]:
    """The names of a prompt whose indirect object is its first name (`first`), or its second."""
    return {"name_A": both[0], "name_B": both[1], "name_C": both[1] if first else both[0]}
