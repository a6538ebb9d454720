"""Small sweeps for tests: a tiny GPT-2, random pairs, and what plain torch hooks say about an interchange.

The pairs are random: what is asked of them is whether numbers are what they are said to be, not whether they are high.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.das.fits import Fit, Fits, Floors
from subspace_lab.das.methods import DAS, Method
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch

WIDTH, PAIRS, LENGTH = 32, 60, 7
ANSWERS = torch.arange(7, 19)  # many, so that a swap changes which is the highest
LETTERS = tuple("abcdefghijkl")
SITES = [Site("block_output", 0, "2"), Site("block_output", 1, "last")]
QUICK = TrainingConfig(steps=8, batch_size=16, learning_rate=0.05)


@cache
def tiny() -> Backbone:
    """Always the same model: leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50,
            n_embd=WIDTH,
            n_layer=3,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.5,  # so that a swap changes answers
        )
        return Backbone(GPT2LMHeadModel(config).eval())


def batch_of(ids: Tensor) -> Batch:
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def counterfactuals(seed: int, variables: tuple[str, ...] = ("v",), n: int = PAIRS) -> Counterfactuals:
    """Random texts with random answers."""
    g = torch.Generator().manual_seed(seed)
    base, *sources = (batch_of(torch.randint(1, 50, (n, LENGTH), generator=g)) for _ in range(1 + len(variables)))
    before, after = (torch.randint(0, 12, (n,), generator=g) for _ in range(2))
    values = {name: torch.randint(0, 3, (n,), generator=g) for name in variables}
    return Counterfactuals(
        base, dict(zip(variables, sources, strict=True)), before, after, LETTERS, ANSWERS, values
    )


def pairs(variables: tuple[str, ...] = ("v",), **splits: Any) -> Pairs:
    """Train, dev and test pairs; any of them can be given instead."""
    seeds = {"train": 0, "dev": 2, "test": 1}
    drawn: dict[str, Any] = {
        name: counterfactuals(seed, variables) for name, seed in seeds.items() if name not in splits
    }
    return Pairs(**drawn, **splits)


def swept(methods: Method | list[Method], sites: Any = SITES, **options: Any) -> Fits:
    """A quick sweep of the tiny model over its random pairs."""
    options = {"config": QUICK, "min_accuracy": None, "quiet": True, "pairs": None, **options}
    given = options.pop("pairs") or pairs()
    return sweep(tiny(), given, sites, methods if isinstance(methods, list) else [methods], **options)


def failing_stream(step: int) -> Counterfactuals:
    if step == 2:
        raise RuntimeError("stop here")
    return counterfactuals(step)


# --- the oracle ---------------------------------------------------------------------------------------------


def ids_of(batch: Batch) -> Tensor:
    return batch.inputs["input_ids"]


def _column(site: Site) -> int:
    return -1 if site.positions == "last" else int(site.positions)


def _stream(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def states_by_hook(ids: Tensor, site: Site) -> Tensor:
    """(texts, width): the states at a block's output and a position."""
    found: list[Tensor] = []
    model: Any = tiny().model
    handle = model.transformer.h[site.layer].register_forward_hook(
        lambda _, __, output: found.append(_stream(output)[:, _column(site)].clone())
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0]


def logits_by_hook(ids: Tensor, edits: dict[Site, Callable[[Tensor], Tensor]]) -> Tensor:
    """(texts, answers): the answers' logits with the states at each site replaced by edit(states)."""
    model: Any = tiny().model

    def hook(site: Site, edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def swap(_: nn.Module, __: Any, output: Any) -> Any:
            stream = _stream(output).clone()
            stream[:, _column(site)] = edit(stream[:, _column(site)])
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        return swap

    handles = [model.transformer.h[s.layer].register_forward_hook(hook(s, edit)) for s, edit in edits.items()]
    with torch.no_grad():
        logits = model(ids).logits[:, -1, ANSWERS]
    for handle in handles:
        handle.remove()
    return logits


def swapped(fit: Fit, data: Counterfactuals) -> Tensor:
    """(texts, answers): logits after h + Σ Rᵥᵀ Rᵥ (h_sourceᵥ − h) at each site, with the fit's subspaces."""
    changes: dict[Site, list[tuple[Tensor, Tensor]]] = {}
    for name, (site, subspace) in fit.alignment.variables.items():
        states = states_by_hook(ids_of(data.sources[name]), site)
        changes.setdefault(site, []).append((states, subspace.basis().detach()))

    def edit(at: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda h: h + sum((states - h) @ rows.T @ rows for states, rows in at)

    return logits_by_hook(ids_of(data.base), {site: edit(at) for site, at in changes.items()})


def unedited(data: Counterfactuals) -> Tensor:
    return logits_by_hook(ids_of(data.base), {})


def overlap_of(one: Tensor, other: Tensor) -> float:
    """tr(P₁ P₂) / k of two bases of one rank."""
    return float((one @ other.T).square().sum() / len(one))


# --- fits without a model -----------------------------------------------------------------------------------


def score(value: float, n: int = 321) -> Estimate:
    return Estimate(value, round(max(0.0, value - 0.03), 2), round(min(1.0, value + 0.02), 2), n)


def made_fit(
    site: Site = SITES[0],
    method: Method | None = None,
    seed: int = 0,
    *,
    test: float = 0.5,
    dev: float = 0.5,
    rank: int = 3,
    width: int = 16,
    **changes: Any,
) -> Fit:
    """A fit with these scores and a random subspace."""
    method = DAS(rank) if method is None else method
    number, trained = zlib.crc32(f"{site} {method.label} {seed}".encode()), isinstance(method, DAS)
    fit = Fit(
        method=method,
        alignment=Alignment({"above": (site, random_subspace(width, rank, number))}),
        seed=seed,
        start=number if trained else None,
        scores={"dev": {"iia": score(dev)}, "test": {"iia": score(test)}},
        losses=(2.0, 1.0) if trained else (),
    )
    return replace(fit, **changes)


def made_fits(fits: list[Fit], accuracy: float = 0.97, **changes: Any) -> Fits:
    floors = Floors(score(accuracy), score(0.29), score(0.38))
    return Fits(tuple(fits), **{"floors": {"dev": floors, "test": floors}, "facts": {"task": "prices"}, **changes})
