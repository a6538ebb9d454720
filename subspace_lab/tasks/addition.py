"""Addition, shown by examples: does the model carry?

    addition     two numbers of two digits, 38 + 27 =; the answer is the first digit of the sum, (tens of both) + carry
    digit_sums   two digits, 8 + 7 =; the answer is the first digit of the sum: 1 with a carry, else the ones' digit

The variable is the carry of the ones. A prompt shows a few additions and then asks for one; sums are below 100. Pairs
of ones' digits are held out: a subspace that memorised which pairs carry is useless on the test split.

Small language models add digits but cannot add numbers of two digits: SmolLM2-135M answers .9 of `digit_sums` and about
.3 of `addition`, which is for larger models.
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.tasks.wording import fill

EXAMPLES = ("23 + 45 = 68", "38 + 27 = 65", "51 + 26 = 77", "16 + 48 = 64")
DIGIT_EXAMPLES = ("2 + 5 = 7", "8 + 6 = 14", "4 + 4 = 8", "9 + 3 = 12")

_ones = [(a, b) for a in range(10) for b in range(10)]
random.Random(0).shuffle(_ones)
ONES = {"test": tuple(_ones[:30]), "dev": tuple(_ones[30:45]), "train": tuple(_ones[45:])}


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """Two numbers whose ones' digits are a pair of the split; every second sum carries, no sum reaches 100."""
    check_split(split)
    carries = rng.random() < 0.5
    ones = rng.choice([pair for pair in ONES[split] if (sum(pair) >= 10) == carries])
    both = rng.randint(2, 8)  # sum of the tens; the sum stays below 100 with either carry, also after an exchange
    tens = rng.randint(1, both - 1)
    first, second = (10 * t + o for t, o in zip((tens, both - tens), ones, strict=True))
    return {"first": first, "second": second, "ones": f"{ones[0]} and {ones[1]}"}


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: `first` and `second` (possibly several tokens each), and `last`, the equals sign."""
    return fill("\n".join((*EXAMPLES, "{first} + {second}{last}")), {**setting, "last": " = "})


def sample_digits(rng: random.Random, split: str) -> dict[str, Any]:
    """Two digits from 1 to 9 that are a pair of the split; every second sum carries."""
    check_split(split)
    carries = rng.random() < 0.5
    first, second = rng.choice([(a, b) for a, b in ONES[split] if a and b and (a + b >= 10) == carries])
    return {"first": first, "second": second, "ones": f"{first} and {second}"}


def prompt_digits(setting: Mapping[str, Any]) -> Prompt:
    """Spans as in `prompt`."""
    return fill("\n".join((*DIGIT_EXAMPLES, "{first} + {second}{last}")), {**setting, "last": " = "})


ADDITION = Task(
    name="addition",
    description="the first digit of the sum of two numbers of two digits",
    causal_model=CausalModel(
        {
            "ones_carry": lambda first, second: (first % 10 + second % 10) // 10,
            "tens": lambda first, second: first // 10 + second // 10,
            "first_digit": lambda tens, ones_carry: tens + ones_carry,
        }
    ),
    variable="ones_carry",
    answers={digit: str(digit) for digit in range(2, 10)},
    sample=sample,
    prompt=prompt,
    entity="ones",
)

DIGIT_SUMS = Task(
    name="digit_sums",
    description="the first digit of the sum of two digits",
    causal_model=CausalModel(
        {
            "ones_carry": lambda first, second: (first + second) // 10,
            "ones": lambda first, second: (first + second) % 10,
            "first_digit": lambda ones_carry, ones: 1 if ones_carry else ones,
        }
    ),
    variable="ones_carry",
    answers={digit: str(digit) for digit in range(10)},
    sample=sample_digits,
    prompt=prompt_digits,
    entity="ones",
)
