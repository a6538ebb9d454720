"""The numerical check: a run that starts in the middle must give the plain run's logits, or it is not used.

A model may break what a strategy assumes: attend both ways, pass something to a later block outside its output,
write into what was stored. So each strategy is tried on a few rows before it is trusted, with edits that change
something: a model that attends both ways resumes rightly as long as nothing is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.model.edits import Edits

Logits = Callable[[Tensor, Edits], Tensor]
"""(rows, edits) → (rows, reads, vocabulary) logits."""
# Relative to the norm of the logits. Rounding grows with the square root of the number of operations and starts at
# 1e-7 in float32 (in which models in float64 may compute parts of themselves), 1e-3 in float16 and 1e-2 in
# bfloat16. A run that is wrong is so by a tenth and more.
LARGEST_DIFFERENCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
LARGEST_DIFFERENCE_ELSE = 1e-4


def disagreement(
    resumed: Logits, plain: Logits, rows: Tensor, sites: Sequence[Site], valid: Tensor | None, *, writes: bool
) -> str | None:
    """Why resumed runs are not the plain ones, if they are not.

    Args:
        rows: indices of the data set.
        sites: each is edited once, alone.
        valid: (rows, reads) which logits are real; None for all.
        writes: whether the model may write into what was stored: then a backward pass is tried as well.
    """
    for site in dict.fromkeys(sites):
        edits = {site: _changed}
        with torch.no_grad():
            expected = plain(rows, edits)
            # In another order than the plain run's: what a block stored during that would be of other rows.
            found = resumed(rows.flip(0), edits).flip(0)
        if valid is not None:
            expected, found = expected[valid.to(expected.device)], found[valid.to(found.device)]
        if writes:
            # A state that is written over fails in the backward pass: found out here, not in training.
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
