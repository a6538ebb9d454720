"""The distance of edited states from natural ones: the counterfactual latent loss of arXiv 2511.04638."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class NearNatural(nn.Module):
    """An exchange that keeps its last inputs and outputs for the loss.

    Args:
        edit: the exchange.
        states: natural states at the site, without NaN.
        values: the variable's value in each state.
    """

    def __init__(
        self, edit: nn.Module, states: Float[Tensor, "example width"], values: Int[Tensor, " example"]
    ) -> None:
        super().__init__()
        self.edit = edit
        self._states, self._values = states.detach().float(), values
        self._variance = self._states.var(0, unbiased=False).sum().clamp_min(torch.finfo(torch.float).tiny)

    def forward(self, h: Tensor, source: Tensor) -> Tensor:
        edited: Tensor = self.edit(h, source)
        self._edited, self._source = edited, source
        return edited

    def loss(self) -> Tensor:
        """½ |h′ − x|² / s² − ½ cos(h′, x), averaged over the states of the last call.

        The value of a source is that of the natural state that equals it or is nearest to it.
        """
        edited = self._edited.flatten(0, -2).float()
        source = self._source.detach().flatten(0, -2).to(edited)
        states, values = self._states.to(edited.device), self._values.to(edited.device)
        with torch.no_grad():
            wanted = values[torch.cdist(source, states).argmin(1)]
            apart = torch.cdist(edited, states).masked_fill(wanted[:, None] != values, torch.inf)
            near = states[apart.argmin(1)]
        squares = (edited - near).square().sum(1) / self._variance.to(edited.device)
        return (squares - nn.functional.cosine_similarity(edited, near, dim=1)).mean() / 2
