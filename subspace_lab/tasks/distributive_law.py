"""The distributive law: one function, two algorithms. Which of them does a small network follow?

Source: Sutter et al. 2025, "The non-linear representation dilemma" (arXiv 2507.08802). An input is six vectors
a, …, f; the answer is ((a = b) ∧ (c = d)) ∨ ((c = d) ∧ (e = f)), which is the same as (c = d) ∧ ((a = b) ∨ (e = f)).

    And-Or-And   the variables are the two conjunctions
    And-Or       the variables are c = d and the disjunction

Both algorithms give every input the same answer; they differ in what they expect after an interchange. Inputs are
vectors, not text: batches are positional, and the sites are the hidden layers of an `EqualityMLP`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspace_lab.core.estimates import Estimate
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.hypotheses import Hypothesis, balanced
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.batches import Batch
from subspace_lab.tasks.hierarchical_equality import NETWORK_TRAINING, SIZE, EqualityMLP, trained

WIDTH = 6 * SIZE  # width of inputs and hidden layers
ANSWERS = ("no", "yes")
OVERSAMPLING = 4  # draws for each pair; pairs are chosen so that combinations of answers are equally frequent

# (a = b, c = d, e = f) for the answers no and yes; all cases of an answer are equally frequent.
_CASES = (
    torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [0, 1, 0]]).bool(),
    torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool(),
)
_EQUALITIES = {
    "left_equal": lambda a, b: (a == b).all(-1),
    "middle_equal": lambda c, d: (c == d).all(-1),
    "right_equal": lambda e, f: (e == f).all(-1),
}
AND_OR_AND = Hypothesis(
    "And-Or-And",
    CausalModel(
        {
            **_EQUALITIES,
            "left_and": lambda left_equal, middle_equal: left_equal & middle_equal,
            "right_and": lambda middle_equal, right_equal: middle_equal & right_equal,
            "label": lambda left_and, right_and: left_and | right_and,
        }
    ),
    ("left_and", "right_and"),
)
AND_OR = Hypothesis(
    "And-Or",
    CausalModel(
        {
            **_EQUALITIES,
            "either": lambda left_equal, right_equal: left_equal | right_equal,
            "label": lambda middle_equal, either: middle_equal & either,
        }
    ),
    ("middle_equal", "either"),
)
HYPOTHESES = (AND_OR_AND, AND_OR)


def sample(n: int, generator: torch.Generator | int) -> tuple[Float[Tensor, "n 24"], Int[Tensor, " n"]]:
    """n inputs [a, …, f], each vector from U(−½, ½)⁴, and their labels; both labels are equally frequent."""
    generator = _generator(generator)
    yes = torch.randperm(n, generator=generator) % 2 == 1
    no_case, yes_case = (of[torch.randint(len(of), (n,), generator=generator)] for of in _CASES)
    equal = torch.where(yes[:, None], yes_case, no_case)
    vectors = torch.rand(n, 6, SIZE, generator=generator) - 0.5
    vectors[:, 1::2] = torch.where(equal[..., None], vectors[:, 0::2], vectors[:, 1::2])
    inputs = vectors.flatten(1)
    return inputs, AND_OR.causal_model.run(setting(inputs))["label"].long()


def setting(inputs: Float[Tensor, "*batch 24"]) -> dict[str, Tensor]:
    """The inputs of the causal models, {"a": (*batch, 4), …}."""
    return dict(zip("abcdef", inputs.split(SIZE, -1), strict=True))


def counterfactuals(n: int, generator: torch.Generator | int) -> dict[str, Counterfactuals]:
    """{hypothesis: n pairs}, with the same bases and sources for both hypotheses.

    Every pair exchanges the first variable, the second, or both, with equal probability; a variable that is not
    exchanged has the base as its source. The combinations of the base's answer and the two expected answers are equally
    frequent, up to a remainder.
    """
    generator, drawn = _generator(generator), OVERSAMPLING * n
    base, before = sample(drawn, generator)
    subset = torch.randint(1, 4, (drawn,), generator=generator)
    sources = [
        torch.where((subset >> bit & 1).bool()[:, None], sample(drawn, generator)[0], base) for bit in (0, 1)
    ]
    expected = []
    for hypothesis in HYPOTHESES:
        of = {name: setting(source) for name, source in zip(hypothesis.variables, sources, strict=True)}
        expected.append(hypothesis.causal_model.interchange(setting(base), of)["label"].long())
    rows = balanced(before + 2 * expected[0] + 4 * expected[1], n, generator)
    return {
        hypothesis.name: Counterfactuals(
            base=Batch.of(base[rows]),
            sources={v: Batch.of(s[rows]) for v, s in zip(hypothesis.variables, sources, strict=True)},
            base_answer=before[rows],
            answer=answer[rows],
            answers=ANSWERS,
        )
        for hypothesis, answer in zip(HYPOTHESES, expected, strict=True)
    }


def rivals(batch_size: int, seed: int, *, dev: int = 1024, test: int = 4096) -> dict[str, Pairs]:
    """{hypothesis: pairs}, with training pairs that are drawn at every step.

    Args:
        batch_size: pairs in one step.
        seed: seed of all draws; other seeds give other pairs in every split.
        dev, test: numbers of held-out pairs.
    """
    held_out = {split: counterfactuals(n, _seed(seed, split)) for split, n in (("dev", dev), ("test", test))}

    def stream(name: str) -> Callable[[int], Counterfactuals]:
        return lambda step: counterfactuals(batch_size, _seed(seed, step))[name]

    return {
        name: Pairs(stream(name), held_out["dev"][name], held_out["test"][name], task=f"distributive law: {name}")
        for name in held_out["test"]
    }


def _seed(seed: int, what: object) -> int:
    # Hashed, so that no step shares its random numbers with a small seed.
    return zlib.crc32(f"{seed}:{what}".encode())


def train_network(
    seed: int, config: TrainingConfig = NETWORK_TRAINING, *, min_accuracy: float = 0.99
) -> tuple[EqualityMLP, Estimate]:
    """A network trained on fresh samples, and its accuracy on 20,000 other samples.

    Args:
        seed: seed of the initialisation and of the samples; it replaces the seed of `config`.

    Raises:
        RuntimeError: the network is less accurate than `min_accuracy`.
    """
    network = EqualityMLP(seed, WIDTH, WIDTH)
    return trained(network, sample, replace(config, seed=seed), min_accuracy, "the distributive law")


def _generator(generator: torch.Generator | int) -> torch.Generator:
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
