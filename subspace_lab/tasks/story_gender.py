"""Story gender: openings of children's stories that a TinyStories model continues with "She" or "He".

For a pretrained model with its own tokenizer: the answers are pieces of a SentencePiece vocabulary. The gender is given
by the word girl or boy and, more weakly, by the name. The word decides: in all templates, and with all names here, a
260 K-parameter TinyStories model (llama2.c's stories260K) prefers She after "girl" and He after "boy". So the model
represents the gender at this word, and an interchange there can find it.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.tasks.wording import fill

_NAMES = {
    "train": {
        "girl": "Molly Kate Rose Susie Jill Lola Maria Sophie Jenny Eva Grace Betty",
        "boy": "Tim Max Sam Bob John Tommy Fred Leo Peter David Johnny Alex",
    },
    "dev": {"girl": "Clara Lulu Wendy Katie", "boy": "James Harry Joey Paul"},
    "test": {
        "girl": "Daisy Bella Zoe Nina Mandy Ellie Julia Cindy Ann Ruby Alice Kim Tina Penny Maya",
        "boy": "Tom Jack Billy Joe Timmy Jake Mike Dan Bobby Charlie Adam Danny Andy Jimmy Nick",
    },
}
NAMES = {
    split: {word: tuple(names.split()) for word, names in of_split.items()} for split, of_split in _NAMES.items()
}
TEMPLATES = (
    "Once upon a time, there was a little {gender_word} {named} {name}{last}",
    "One day, a little {gender_word} {named} {name} went to the park{last}",
    "One day, a happy {gender_word} {named} {name} went to the store{last}",
    "One day, a {gender_word} {named} {name} was playing in the garden{last}",
    "Once upon a time, there was a {gender_word} {named} {name} who lived in a big house{last}",
    "Once upon a time, there was a {gender_word} {named} {name} who liked to play with toys{last}",
    "Once upon a time, a little {gender_word} {named} {name} lived in a small house{last}",
    "One sunny day, a kind {gender_word} {named} {name} walked to the beach{last}",
    "There was a {gender_word} {named} {name} who had a red ball{last}",
)


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """A girl or a boy with a name of the split."""
    check_split(split)
    word = rng.choice(("girl", "boy"))
    return {
        "gender_word": word,
        "name": rng.choice(NAMES[split][word]),
        "template": rng.randrange(len(TEMPLATES)),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `gender_word` (girl or boy), `named`, `name` and `last`, the closing period."""
    return fill(TEMPLATES[setting["template"]], {**setting, "named": "named", "last": "."})


STORY_GENDER = Task(
    name="story_gender",
    description="She or He after the opening of a story about a girl or a boy",
    causal_model=CausalModel({"gender": lambda gender_word: gender_word, "pronoun": lambda gender: gender}),
    variable="gender",
    answers={"girl": "▁She", "boy": "▁He"},
    sample=sample,
    prompt=prompt,
    entity="name",
)
