"""Power: would a search with these pairs at this site find a variable that is there? One is planted and searched for.

A random model holds no variable. So one is planted along a random direction v of its states h at the site: which of
two answers the model gives then depends only on the sign of v·h − m, where m is near the median over the pairs. Bases
and sources stay as they are; the expected answer depends on which side of m the source is. A search that misses this
variable would miss every other variable that is held as simply. If such a search finds nothing in the trained model,
this does not show that nothing is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subspace_lab.core.arguments import whole_number
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.intervene import collect
from subspace_lab.model.resolved_sites import resolve

SHARP = 3.0  # steepness of tanh, per standard deviation of v·h: nearly a step, but with a gradient near the states
STRENGTH = 2.0  # times the widest spread of the answers' logits, so that the planted variable decides the answer
COLUMN = "planted_column"  # the name of the model's input that holds the position of each row's state
RUN = 64  # pairs in one forward pass


@dataclass(frozen=True, eq=False)
class Power:
    """A model in which a variable is planted, and pairs that exchange it.

    Attributes:
        model: answers by the planted variable. It contains the model that was passed in.
        pairs: the bases and sources that were passed in, with the answers of the planted variable.
        direction: v, of length 1.
        site: where it is planted, by its name in `model`.
    """

    model: nn.Module
    pairs: Pairs
    direction: Float[Tensor, " width"]
    site: Site


def plant(model: nn.Module, pairs: Pairs, site: Site, seed: int) -> Power:
    """Plant a variable into a model along a random direction.

    Args:
        model: a random model, such as `reinitialised(model, 0)`. Nothing else should use it: it becomes a part of the
            new model.
        pairs: pairs of one variable; each answer is one token.
        site: a module's output, at one position of each row.
        seed: the seed of the direction.

    Raises:
        ValueError: several variables, answers of several tokens or fewer than two of them, a site that is a
            module's input or has several positions, states or logits that are the same for all pairs.
    """
    whole_number(seed, "seed")
    test = pairs.test
    scored = test.scored
    if len(test.sources) > 1:
        raise ValueError(f"One variable is planted at a time; the pairs have {list(test.sources)}.")
    if len(test.answers) < 2 or (scored is not None and scored.ndim == 2):
        raise ValueError(
            "A planted variable needs at least two answers of one token each; these pairs have others."
        )
    inner = Backbone(model)
    point = inner.hook_point(site)
    if point.side != "output":
        raise ValueError(f"{site}: a variable can be planted in the output of a module, not in its input.")
    dev = _states(inner, pairs.dev, site)
    width = dev.shape[-1]
    direction = random_orthonormal(width, 1, seed)[0]
    along = dev @ direction
    middle, spread = _between(along), float(along.std())
    logits = _logits(inner, pairs.dev)
    strength = STRENGTH * float((logits.amax(-1) - logits.amin(-1)).max())
    if not 0 < spread < float("inf") or not 0 < strength < float("inf"):
        raise ValueError(
            f"{site}: the states or the logits are the same for all pairs, so nothing can be planted."
        )
    planted = _Planted(
        model,
        point.path,
        point.columns,
        direction,
        middle,
        spread,
        strength,
        None if scored is None else scored[:2],
    )
    inside = site if site.layer is not None else replace(site, component=f"model.{site.component}")

    def changed(split: Counterfactuals) -> Counterfactuals:
        sides = {}
        for name, batch in (("base", split.base), *split.sources.items()):
            part = replace(split, base=batch)
            sides[name] = (_states(inner, part, site)[: len(split)] @ direction > middle).long()
        (variable, source), *_ = split.sources.items()
        labels = {name: of for name, of in split.labels.items() if name != "kind"}
        return replace(
            split,
            base=_with_column(inner, split.base, site),
            sources={variable: _with_column(inner, source, site)},
            base_answer=sides["base"],
            answer=sides[variable],
            values={variable: sides[variable]},
            source_answers={variable: sides[variable]},
            labels=labels,
        )

    stream = pairs.train
    train: Any = (lambda step: changed(stream(step))) if callable(stream) else changed(stream)
    task = f"{pairs.task}: planted" if pairs.task else "planted"
    return Power(planted.eval(), Pairs(train, changed(pairs.dev), changed(pairs.test), task), direction, inside)


class _Planted(nn.Module):
    """A model whose first two answers depend on one direction of its own states."""

    direction: Tensor
    tokens: Tensor

    def __init__(
        self,
        model: nn.Module,
        path: str,
        columns: tuple[int, ...] | None,
        direction: Tensor,
        middle: float,
        spread: float,
        strength: float,
        tokens: Tensor | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = getattr(model, "config", None)
        self.path, self.columns = path, columns
        self.middle, self.spread, self.strength = middle, spread, strength
        first = torch.arange(2) if tokens is None else tokens
        device = next(model.parameters()).device
        self.register_buffer("direction", direction.to(device))
        self.register_buffer("tokens", first.to(device))

    def forward(self, *args: Any, planted_column: Tensor | None = None, **kwargs: Any) -> Any:
        seen: list[Tensor] = []

        def look(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        # After the module's own forward and the edits of its output, so that it sees the edited output.
        handle = self.model.get_submodule(self.path).register_forward_hook(look)
        try:
            output = self.model(*args, **kwargs)
        finally:
            handle.remove()
        h = seen[0]
        if self.columns is not None:
            h = h[..., torch.tensor(self.columns, device=h.device)]
        if planted_column is not None:
            h = h[torch.arange(len(h), device=h.device), planted_column.to(h.device)]
        along = (h.to(self.direction.dtype) @ self.direction - self.middle) / self.spread
        push = self.strength * torch.tanh(SHARP * along)
        logits = output if isinstance(output, Tensor) else output.logits
        ways = torch.stack([-push, push], -1).to(logits.dtype)
        ways = ways[:, None].expand(-1, logits.shape[1], -1) if logits.ndim == 3 else ways
        logits = logits.index_add(-1, self.tokens.to(logits.device), ways)
        if isinstance(output, Tensor):
            return logits
        output.logits = logits
        return output


def _between(values: Tensor) -> float:
    """The middle of the widest gap near the median of some values (between their 35th and 65th percentile).

    If the states come from a few words, they are a few points. The median would be one of them, on neither side.
    """
    middle = values.sort().values[int(0.35 * len(values)) : max(2, math.ceil(0.65 * len(values)))]
    i = int(middle.diff().argmax()) if len(middle) > 1 else 0
    return float(middle[i : i + 2].mean())


def _with_column(inner: Backbone, batch: Batch, site: Site) -> Batch:
    """The batch with two inputs that the planted model needs: each row's position at the site, and position ids."""
    if batch.positional is not None:
        return batch
    return replace(
        batch,
        inputs={**model_inputs(inner.model, batch), COLUMN: _column(inner, batch, site)},  # type: ignore[dict-item]
    )


def _column(inner: Backbone, batch: Batch, site: Site) -> Tensor:
    found = resolve(inner, batch.to(inner.device), site)
    if found.index is None or found.index.shape[1] != 1 or found.valid is not None:
        raise ValueError(
            f"{site}: a variable can be planted at one position of each row only; this site has others."
        )
    return found.index[:, 0].to(next(iter(batch.inputs.values())).device)


def _states(inner: Backbone, data: Counterfactuals, site: Site) -> Float[Tensor, "pair width"]:
    """(pairs, width) states of the bases at the one position."""
    return _in_parts(
        len(data), lambda rows: _flat(collect(inner, data.base.rows(rows).to(inner.device), [site])[site], site)
    )


def _flat(states: Tensor, site: Site) -> Tensor:
    states = states.float().cpu()
    if states.ndim == 3 and states.shape[1] == 1:
        return states[:, 0]
    if states.ndim != 2:
        raise ValueError(
            f"{site}: a variable can be planted at one position of each row only; the states have the shape "
            f"{tuple(states.shape)}."
        )
    return states


def _logits(inner: Backbone, data: Counterfactuals) -> Float[Tensor, "pair answer"]:
    """(pairs, answers) logits of the answers to the bases."""
    from subspace_lab.engine.plain import PlainEngine

    engine = PlainEngine(inner, data.base.to(inner.device), data.to(inner.device).readout)
    with torch.no_grad():
        found = _in_parts(len(data), lambda rows: engine.logits(rows, {}))
    return found[:, 0] if found.ndim == 3 else found


def _in_parts(n: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([run(rows).float().cpu() for rows in torch.arange(n).split(RUN)])
