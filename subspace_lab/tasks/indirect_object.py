"""Indirect object identification: of two names, which one is not repeated? (Wang et al. 2022, arXiv 2211.00593)

There are two hypotheses (`HYPOTHESES`) about what is passed on to the last word:

    position   the position of the repeated name, first or second; the name at the other position is then looked up
    name       the name that is the answer

A subspace for the name must represent all names. Names that the search never saw show whether it does: if a search only
memorised its training names, its score on held-out names (as here) is at the floor.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.das.hypotheses import Hypothesis
from subspace_lab.tasks.wording import fill

_NAMES = {
    "train": "Mary John Anna Peter Laura James Alice Robert Emma David Sarah Thomas Julia Daniel Clara Henry "
    "Nora Simon Helen Martin Ruth George Irene Walter",
    "dev": "Diana Victor Paula Oscar Sophie Felix Grace Hugo",
    "test": "Kate Paul Lucy Mark Rose Adam Eva Frank Jane Eric Lisa Karl Nina Leo Vera Max",
}
NAMES = {split: tuple(names.split()) for split, names in _NAMES.items()}
TEMPLATES = (
    "when {first} and {second} went to the store , {subject} gave a drink {last}",
    "after {first} and {second} met in the park , {subject} handed a book {last}",
    "while {first} and {second} sat at the table , {subject} passed a plate {last}",
    "{first} and {second} had a long day at school , then {subject} sent a letter {last}",
)


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """Two different names of the split; the first and the second are repeated equally often."""
    check_split(split)
    first, second = rng.sample(NAMES[split], 2)
    return {
        "first": first,
        "second": second,
        "subject": rng.choice([first, second]),
        "template": rng.randrange(len(TEMPLATES)),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `first`, `second`, `subject` (the repeated name) and `last`, the closing "to"."""
    return fill(TEMPLATES[setting["template"]], {**setting, "last": "to"})


INDIRECT_OBJECT = Task(
    name="indirect_object",
    description="the one of two names that is not repeated",
    causal_model=CausalModel(
        {
            "subject_is_first": lambda subject, first: subject == first,
            "indirect_object": lambda subject_is_first, first, second: second if subject_is_first else first,
        }
    ),
    variable="subject_is_first",
    answers={name: name for names in NAMES.values() for name in names},
    sample=sample,
    prompt=prompt,
    entity="subject",
)

HYPOTHESES = (
    Hypothesis("position", INDIRECT_OBJECT.causal_model, ("subject_is_first",)),
    Hypothesis("name", INDIRECT_OBJECT.causal_model, ("indirect_object",)),
)
