"""Scores with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """The mean of n cases with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def proportion(correct: Tensor, confidence: float = 0.95) -> Estimate:
    """The share of True with Wilson's score interval, which does not shrink to nothing at 0 and 1.

    The interval speaks of pairs drawn as these were, for this one fitted subspace; it knows nothing of the
    spread between seeds or of pairs that share an entity.

    Raises:
        ValueError: of no case at all.
    """
    n = correct.numel()
    if not n:
        raise ValueError("A share of 0 cases is not defined.")
    share = correct.double().mean().item()
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At 0 and 1 a limit is the share itself, which rounding must not put outside.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def estimate(values: Tensor) -> Estimate:
    """The mean of values of cases with its 95 % interval: Wilson's of a share, else a bootstrap over the cases."""
    share = bool(((values == 0) | (values == 1)).all())
    return proportion(values.bool()) if share else bootstrap_mean(values)


def bootstrap_mean(values: Tensor, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Estimate:
    """The mean with its percentile bootstrap interval over the cases (Efron 1979)."""
    n = values.numel()
    if not n:
        raise ValueError("A mean of 0 cases is not defined.")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n, (draws, n), generator=generator)
    means = values.double().flatten()[picks].mean(1)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.double)
    low, high = means.quantile(tails).tolist()
    return Estimate(values.double().mean().item(), low, high, n)
