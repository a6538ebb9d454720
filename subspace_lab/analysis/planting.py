"""Power: would a search with these pairs at this site find a variable that is there? One is planted and looked for.

A random model holds no variable. Along a random direction v of its states h at the site one is planted: which of
two answers the model gives then depends on the sign of v·h − m alone, where m is near the median of the pairs. Bases
and sources stay as they are; the expected answer is the one of the source's side of m. A search that does not find
this variable would have found no other that is held in as plain a way: that it found nothing says nothing.
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

SHARP = 3.0  # of tanh, in standard deviations of v·h: a step, but one that has a gradient where states are
STRENGTH = 2.0  # times the widest spread of the answers' logits: what is planted decides the answer, not the model
COLUMN = "planted_column"  # the input by which a row says where its state is
RUN = 64  # pairs a run


@dataclass(frozen=True, eq=False)
class Power:
    """A model in which a variable is planted, and pairs that exchange it.

    Attributes:
        model: gives the answers by the planted variable. It contains the model that was given.
        pairs: the bases and sources that were given, with the answers of the planted variable.
        direction: v, of length 1.
        site: where it is planted, as it is called in `model`.
    """

    model: nn.Module
    pairs: Pairs
    direction: Float[Tensor, " width"]
    site: Site


def plant(model: nn.Module, pairs: Pairs, site: Site, seed: int) -> Power:
    """Plant a variable into a model along a random direction.

    Args:
        model: a random one, such as `reinitialised(model, 0)`, that nothing else uses: it runs inside of the new
            one.
        pairs: of one variable, whose answers are told apart by one token each.
        site: an output, at one position of each row.
        seed: of the direction.

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
        raise ValueError("A planted variable has two answers of a token each; these pairs have other ones.")
    inner = Backbone(model)
    point = inner.hook_point(site)
    if point.side != "output":
        raise ValueError(f"{site}: a variable is planted where a module gives something out, not in its input.")
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
            base=_told(inner, split.base, site),
            sources={variable: _told(inner, source, site)},
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

        # Behind the module's own forward, so that it sees what an edit made of the output.
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

    States of a few words are a few points: the median would be one of them, and on neither side.
    """
    middle = values.sort().values[int(0.35 * len(values)) : max(2, math.ceil(0.65 * len(values)))]
    i = int(middle.diff().argmax()) if len(middle) > 1 else 0
    return float(middle[i : i + 2].mean())


def _told(inner: Backbone, batch: Batch, site: Site) -> Batch:
    """The batch with what the planted model has to know of each row: its position at the site, and its position ids."""
    if batch.positional is not None:
        return batch
    return replace(
        batch,
        inputs={**model_inputs(inner.model, batch), COLUMN: _column(inner, batch, site)},  # type: ignore[dict-item]
    )


def _column(inner: Backbone, batch: Batch, site: Site) -> Tensor:
    found = resolve(inner, batch.to(inner.device), site)
    if found.index is None or found.index.shape[1] != 1 or found.valid is not None:
        raise ValueError(f"{site}: a variable is planted at one position of each row; this site has others.")
    return found.index[:, 0].to(next(iter(batch.inputs.values())).device)


def _states(inner: Backbone, data: Counterfactuals, site: Site) -> Float[Tensor, "pair width"]:
    """Of the bases; (pairs, width), at the one position."""
    return _in_parts(
        len(data), lambda rows: _flat(collect(inner, data.base.rows(rows).to(inner.device), [site])[site], site)
    )


def _flat(states: Tensor, site: Site) -> Tensor:
    states = states.float().cpu()
    if states.ndim == 3 and states.shape[1] == 1:
        return states[:, 0]
    if states.ndim != 2:
        raise ValueError(
            f"{site}: a variable is planted at one position of each row; the states are {tuple(states.shape)}."
        )
    return states


def _logits(inner: Backbone, data: Counterfactuals) -> Float[Tensor, "pair answer"]:
    """Of the answers to the bases."""
    from subspace_lab.engine.plain import PlainEngine

    engine = PlainEngine(inner, data.base.to(inner.device), data.to(inner.device).readout)
    with torch.no_grad():
        found = _in_parts(len(data), lambda rows: engine.logits(rows, {}))
    return found[:, 0] if found.ndim == 3 else found


def _in_parts(n: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([run(rows).float().cpu() for rows in torch.arange(n).split(RUN)])
