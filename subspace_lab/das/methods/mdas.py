"""DAS with isolation losses: the variable is exchanged, and everything else in the states must stay.

Source: Huang et al. 2024, "RAVEL: evaluating interpretability methods on disentangling language model
representations" (arXiv 2402.17700), which calls it multi-task DAS (MDAS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_lab.das.methods.das import DAS
from subspace_lab.das.methods.method import Learner, Problem, check_setting
from subspace_lab.das.objectives import CAUSE, ISOLATE


@dataclass(frozen=True)
class MDAS(DAS):
    """DAS that minimises cause · L(pairs that change) + isolate · L(pairs that stay), each L a mean over its pairs.

    The kinds of pairs are those of `Counterfactuals.kinds`. In pairs of the kinds "cause" and "changes" the answer must
    become the source's. In pairs of the kinds "isolate" and "stays" the prompt asks for something else, and the answer
    must stay the base's. `isolate=0` is DAS on only the pairs that change.

    Attributes:
        cause, isolate: weights of the two losses; they are divided by their sum.
        others: as in `DAS`.
    """

    cause: float | Sequence[float] = 1.0
    isolate: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "cause", float, least=0.0)
        check_setting(self, "isolate", float, least=0.0)
        if self.cause == self.isolate == 0:
            raise ValueError("MDAS(cause=0, isolate=0): at least one of the losses needs a weight above 0.")

    def learner(self, problem: Problem) -> Learner:
        assert isinstance(self.cause, int | float) and isinstance(self.isolate, int | float)
        parts = {CAUSE: self.cause, ISOLATE: self.isolate}
        for kinds, weight in parts.items():
            if weight and problem.kinds and not set(kinds) & set(problem.kinds):
                raise ValueError(
                    f"{self.label} needs training pairs of the kind {' or '.join(map(repr, kinds))}; the kinds here "
                    f"are {sorted(problem.kinds)}."
                )
        learner = super().learner(problem)
        learner.weights = {kind: weight for kinds, weight in parts.items() for kind in kinds}
        return learner
