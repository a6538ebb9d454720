"""Price tagging: is an amount between two bounds? (Wu et al. 2023, "Interpretability at Scale", section 4)

The two comparisons are the variables of interest: does a model compute "at least the lower bound" separately, before it
combines it with "at most the upper bound"? The paper compares four hypotheses, `HYPOTHESES`:

    left boundary      amount ≥ lower is computed first, and the upper bound is compared later
    both boundaries    both comparisons are computed, and then combined
    midpoint distance  |amount − (lower + upper) / 2| is computed, and compared with half of the width
    bracket identity   the bounds are passed on unchanged, and compared with the amount later
"""

import random
from collections.abc import Mapping
from typing import Any

from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, check_split
from subspace_lab.das.hypotheses import Hypothesis
from subspace_lab.tasks.wording import fill

HIGHEST = 99
TEMPLATES = (
    "say yes if the price is between {lower} and {upper} dollars , else no . "
    "price : {amount} {unit} . {query} {last}",
    "a fair price is from {lower} to {upper} dollars . this one costs {amount} {unit} . {query} {last}",
)
_FIXED = {"unit": "dollars", "query": "answer", "last": ":"}

_amounts = list(range(1, HIGHEST + 1))
random.Random(0).shuffle(_amounts)
# Amounts are held out, bounds are not: a subspace that memorised amounts is useless on the test split.
AMOUNTS = {
    "test": tuple(sorted(_amounts[:30])),
    "dev": tuple(sorted(_amounts[30:45])),
    "train": tuple(sorted(_amounts[45:])),
}


def sample(rng: random.Random, split: str) -> dict[str, Any]:
    """Whole dollars: half of the amounts between the bounds, a quarter below and a quarter above."""
    check_split(split)
    kind = rng.choice([(True, True), (True, True), (False, True), (True, False)])
    while True:
        amount = rng.choice(AMOUNTS[split])
        lower, upper = rng.randint(1, HIGHEST), rng.randint(1, HIGHEST)
        if lower < upper and (amount >= lower, amount <= upper) == kind:
            return {
                "lower": lower,
                "upper": upper,
                "amount": amount,
                "template": rng.randrange(len(TEMPLATES)),
            }


def prompt(setting: Mapping[str, Any]) -> Prompt:
    """Spans: the numbers, `unit` (the word after the amount), `query` and `last`, the closing colon."""
    return fill(TEMPLATES[setting["template"]], {**setting, **_FIXED})


PRICE_TAGGING = Task(
    name="price_tagging",
    description="yes if lower <= amount <= upper, else no",
    causal_model=CausalModel(
        {
            "above_lower": lambda lower, amount: amount >= lower,
            "below_upper": lambda upper, amount: amount <= upper,
            "answer": lambda above_lower, below_upper: above_lower & below_upper,
        }
    ),
    variable="above_lower",
    answers={True: "yes", False: "no"},
    sample=sample,
    prompt=prompt,
    entity="amount",
)

HYPOTHESES = (
    Hypothesis("left boundary", PRICE_TAGGING.causal_model, ("above_lower",)),
    Hypothesis("both boundaries", PRICE_TAGGING.causal_model, ("above_lower", "below_upper")),
    Hypothesis(
        "midpoint distance",
        CausalModel(
            {
                # Both are doubled, so that they stay whole numbers.
                "distance": lambda lower, upper, amount: abs(2 * amount - (lower + upper)),
                "width": lambda lower, upper: upper - lower,
                "answer": lambda distance, width: distance <= width,
            }
        ),
        ("distance",),
    ),
    Hypothesis(
        "bracket identity",
        CausalModel(
            {
                "bracket": lambda lower, upper: (lower, upper),
                "answer": lambda bracket, amount: bracket[0] <= amount <= bracket[1],
            }
        ),
        ("bracket",),
    ),
)
