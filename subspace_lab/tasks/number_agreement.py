"""Number agreement: is the verb singular or plural? It agrees with the subject, whatever noun is next to the verb.

Source: Linzen et al. 2016, "Assessing the ability of LSTMs to learn syntax-sensitive dependencies" (arXiv 1611.01368).
For a pretrained language model of English. Between subject and verb there is another noun, the attractor. Its number is
independent of the subject's, so a model that uses the nearest noun is right in half of the prompts. So there are two
hypotheses, the number of the subject and the number of the attractor; only the first is right.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.tasks.wording import fill

_NOUNS = {
    "train": "key dog car boy book cup bird tree chair lamp horse door king farmer doctor student worker player "
    "brother pilot nurse letter bottle table",
    "dev": "girl teacher sister guard boat coat apple ticket",
    "test": "lawyer friend author singer driver artist soldier visitor cat cow ball box picture stone flower cloud",
}
_IRREGULAR = {"box": "boxes"}
ATTRACTORS = ("cabinet", "house", "river", "garden", "road", "school", "shop", "window", "bridge", "tower")
PREPOSITIONS = ("near", "behind", "beside")
TEMPLATES = ("The {subject} {preposition} the {last}", "We know that the {subject} {preposition} the {last}")


def plural(noun: str) -> str:
    """The plural of one of the nouns here."""
    return _IRREGULAR.get(noun, f"{noun}s")


NOUNS = {split: tuple(nouns.split()) for split, nouns in _NOUNS.items()}
NUMBER = {noun: "singular" for noun in [noun for nouns in NOUNS.values() for noun in nouns] + list(ATTRACTORS)}
NUMBER |= {plural(noun): "plural" for noun in NUMBER}


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """A subject of the split, in either number, and an attractor in either number."""
    check_split(split)
    noun, attractor = rng.choice(NOUNS[split]), rng.choice(ATTRACTORS)
    return {
        "noun": noun,
        "subject": rng.choice([noun, plural(noun)]),
        "attractor": rng.choice([attractor, plural(attractor)]),
        "preposition": rng.choice(PREPOSITIONS),
        "template": rng.randrange(len(TEMPLATES)),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `subject`, `preposition` and `last`, which is the attractor."""
    return fill(TEMPLATES[setting["template"]], {**setting, "last": setting["attractor"]})


NUMBER_AGREEMENT = Task(
    name="number_agreement",
    description="is or are, by the number of the subject and not of the noun before the verb",
    causal_model=CausalModel({"number": lambda subject: NUMBER[subject], "verb": lambda number: number}),
    variable="number",
    answers={"singular": " is", "plural": " are"},
    sample=sample,
    prompt=prompt,
    entity="noun",
)
