"""Multiple choice with a pointer: which choice is right, and which letter it has.

After the task MCQA of MIB (Mueller et al. 2025, arXiv 2504.13151) and Wiegreffe et al. 2024 (arXiv 2407.15018). The
prompt says the colour of a thing and then asks for it; the choices have random letters. There are two variables:

    pointer   the number of the right choice, from 0; after its exchange the answer is the base's letter of the
              source's choice
    letter    the answer itself; after its exchange the answer is the source's letter

Things are held out, colours and letters are not. The task is for models that can do it. SmolLM2-135M cannot, with or
without examples, and a search needs a model that is right.
"""

import random
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.tasks.wording import fill

_THINGS = {
    "train": "box cup hat car ball shirt door lamp chair bag coat boat book pen kite bowl",
    "dev": "table phone jacket plate dress spoon bottle basket",
    "test": "house truck bench ring wall brush towel clock glove sock scarf pillow candle drum sofa rug",
}
THINGS = {split: tuple(things.split()) for split, things in _THINGS.items()}
COLOURS = [
    "red",
    "blue",
    "green",
    "black",
    "white",
    "yellow",
    "pink",
    "brown",
    "gray",
    "orange",
    "purple",
    "silver",
]
CHOICES = 4
_CHOICES = "".join(f"{{letter_{i}}}. {{choice_{i}}}\n" for i in range(CHOICES))
# Two answered questions come first: without them an instructed model writes a sentence, or nothing.
_SHOWN = (
    "The vase is red. What color is the vase?\nK. blue\nT. red\nD. green\nW. black\nAnswer: T\n\n"
    "The tent is yellow. What color is the tent?\nP. pink\nB. white\nM. gray\nF. yellow\nAnswer: F\n\n"
)
TEMPLATES = (
    f"{_SHOWN}The {{thing}} is {{colour}}. What color is the {{thing}}?\n{_CHOICES}Answer{{last}}",
    f"{_SHOWN}A {{thing}} is {{colour}}. Which color does it have?\n{_CHOICES}Answer{{last}}",
)


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """A thing of the split, different colours to choose from in random order, and different letters."""
    check_split(split)
    colours, letters = rng.sample(COLOURS, CHOICES), rng.sample(ascii_uppercase, CHOICES)
    return {
        "thing": rng.choice(THINGS[split]),
        "colour": rng.choice(colours),
        **{f"choice_{i}": colour for i, colour in enumerate(colours)},
        **{f"letter_{i}": letter for i, letter in enumerate(letters)},
        "template": rng.randrange(len(TEMPLATES)),
    }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `thing` and `colour`, each choice and its letter, and `last`, the closing colon."""
    return fill(TEMPLATES[setting["template"]], {**setting, "last": ":"})


MULTIPLE_CHOICE = Task(
    name="multiple_choice",
    description="the letter of the choice that is the colour named before",
    causal_model=CausalModel(
        {
            "pointer": lambda colour, choice_0, choice_1, choice_2, choice_3: (
                choice_0,
                choice_1,
                choice_2,
                choice_3,
            ).index(colour),
            "letter": lambda pointer, letter_0, letter_1, letter_2, letter_3: (
                letter_0,
                letter_1,
                letter_2,
                letter_3,
            )[pointer],
        }
    ),
    variable="pointer",
    answers={letter: f" {letter}" for letter in ascii_uppercase},
    sample=sample,
    prompt=prompt,
    entity="thing",
)
