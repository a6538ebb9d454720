"""The numerical check: a run that starts in the middle must give the plain run's logits, otherwise it is not used.

A model may violate the assumptions of a strategy: it may attend in both directions, pass something to a later block
outside of its output, or write into what is stored. So each strategy is tried on a few rows before it is used. It is
tried with edits, because without edits some of these models resume correctly (those that attend in both directions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.model.edits import Edits

Logits = Callable[[Tensor, Edits], Tensor]
"""(rows, edits) → (rows, reads, vocabulary) logits."""
# Tolerances relative to the norm of the logits. Rounding errors grow with the square root of the number of operations,
# from 1e-7 in float32 (models in float64 may compute parts in float32), 1e-3 in float16 and 1e-2 in bfloat16. A wrong
# run differs by a tenth or more.
LARGEST_DIFFERENCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
LARGEST_DIFFERENCE_ELSE = 1e-4


def disagreement(
    resumed: Logits, plain: Logits, rows: Tensor, sites: Sequence[Site], valid: Tensor | None, *, writes: bool
) -> str | None:
    """Why resumed runs differ from plain runs; None if they agree.

    Args:
        rows: indices of the data set.
        sites: each is edited once, alone.
        valid: (rows, reads) which logits are real; None for all.
        writes: whether the model may write into what is stored; then a backward pass is tried as well.
    """
    for site in dict.fromkeys(sites):
        edits = {site: _changed}
        with torch.no_grad():
            expected = plain(rows, edits)
            # In another order than the plain run: a block that keeps states of that run then gives those of other rows.
            found = resumed(rows.flip(0), edits).flip(0)
        if valid is not None:
            expected, found = expected[valid.to(expected.device)], found[valid.to(found.device)]
        if writes:
            # If a stored state is overwritten, the backward pass fails: detect it here, not during training.
            scale = torch.ones((), device=expected.device, requires_grad=True)
            scaled = resumed(rows, {site: lambda h, scale=scale: h * scale})
            torch.autograd.grad(scaled.float().sum(), scale)
        error = float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
        if not error <= LARGEST_DIFFERENCE.get(expected.dtype, LARGEST_DIFFERENCE_ELSE):
            return f"its logits differ by {error:.1e} with an edit at {site}"
    return None


def _changed(states: Tensor) -> Tensor:
    """An edit that changes every state."""
    return -states.roll(1, -1)
