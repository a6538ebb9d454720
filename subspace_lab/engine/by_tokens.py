"""For causal decoders: run only the tokens from the first edited one on.

For each row is stored:

    states             at the input of the first edited block, for the tokens from the first edited one on
    keys and values    of all earlier tokens, in the blocks from there on
    block states       of blocks without attention, after the earlier tokens (`engine/recurrent.py`)

So the blocks below are skipped, and the model gets the earlier tokens through its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.caches import caches_all_states, filled_cache, keys_and_values_in, unserved_blocks
from subspace_lab.engine.longest import depends_on_longest, reaches
from subspace_lab.engine.prefix import Prefix, gather_tokens, grouped
from subspace_lab.engine.readouts import BEHIND_BLOCKS, LOSS_INPUTS, Readout
from subspace_lab.engine.recurrent import RecurrentStates, without_attention
from subspace_lab.engine.schedule import Aligned, Schedule
from subspace_lab.engine.strategies import FrozenData, Refusal, Resumption, Strategy
from subspace_lab.model.backbone import Hook
from subspace_lab.model.cache_argument import forward_name
from subspace_lab.model.resolved_sites import ResolvedSite

DECODER_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", *LOSS_INPUTS}
PLANS = 16


@dataclass(frozen=True)
class Plan:
    """How one set of sites is run.

    Attributes:
        boundary: how many blocks are skipped.
        aligned: the tokens that run.
        resolved: {site: its resolved form in these tokens}.
        start: the number of the stored block states from which the run begins; None if none are stored for it.
    """

    boundary: int
    aligned: Aligned
    resolved: dict[Site, ResolvedSite]
    start: int | None


class ByTokens(Strategy):
    """Stores the states of the tokens that run, and the keys and values of the tokens before."""

    name: ClassVar[str] = "keys and values"

    def __init__(self, data: FrozenData) -> None:
        self._data, backbone = data, data.backbone
        self._schedule = Schedule(data.batch, data.sites, data.readout)
        self._argument = forward_name(backbone.model)
        self._plans: dict[tuple[Site, ...], Plan] = {}
        blocks = without_attention(backbone, data.chain.blocks)
        if blocks and not caches_all_states(backbone.model, len(data.chain.blocks), blocks):
            blocks = []  # all of them are below the first edited block, otherwise `refusal` had refused
        each = [(), tuple(data.sites), *((site,) for site in data.sites), *data.together]
        starts = (self._schedule.first(sites) for sites in each)
        self._recurrent = RecurrentStates(backbone, blocks, self._schedule, starts)
        # One pass for each start would cost more than a plain run. Such blocks also overwrite their states.
        self.recomputable, self.writes = not blocks, bool(blocks)

    @staticmethod
    def refusal(data: FrozenData) -> Refusal | None:
        """Why earlier tokens cannot come through a cache, as far as known without a run; None if they can."""
        backbone, inputs, readout = data.backbone, data.batch.inputs, data.readout
        real = data.batch.real_tokens()
        if not hasattr(backbone.model, "generate") or backbone.head() is None:
            return Refusal("no causal language model", expected=True)
        if any(site.layer is None for site in data.sites):
            return Refusal("sites are named by path", expected=True)
        if forward_name(backbone.model) is None:
            return Refusal("the model's forward has no argument for a cache", expected=True)
        unserved = unserved_blocks(backbone.model, len(data.chain.blocks))
        if unserved is not None:
            return Refusal(unserved, expected=True)
        blocks, depth = without_attention(backbone, data.chain.blocks), len(data.chain.blocks)
        if max(blocks, default=-1) >= data.chain.lowest and not caches_all_states(backbone.model, depth, blocks):
            return Refusal(
                "blocks without attention, whose states are no part of the model's cache", expected=True
            )
        extra = sorted(set(inputs) - DECODER_INPUTS)
        if extra:
            return Refusal(f"inputs {extra}")
        if real is None or "input_ids" not in inputs or readout.index is None:
            return Refusal("no tokens, or no positions at which logits are read")
        given = [inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None]
        if any(not isinstance(t, Tensor) or t.ndim != 2 for t in given):
            return Refusal("a mask or positions with more axes than (row, token)")
        positions = inputs.get("position_ids")
        if positions is not None and "attention_mask" not in inputs and bool((positions.diff(dim=1) != 1).any()):
            return Refusal("positions that start again: several texts in one row")
        # Resumed runs end at the last read, plain runs at the end of the batch, so their longest rows can differ.
        number = (real.long().cumsum(1) - 1).gather(1, readout.index.to(real.device)).cpu()
        read = number if readout.valid is None else number.masked_fill(~readout.valid.cpu(), 0)
        longest = depends_on_longest(backbone.model, torch.cat([reaches(data.batch), read.amax(1) + 1]))
        if longest is not None:
            return Refusal(longest)
        at_padding = ~real.gather(1, readout.index.to(real.device))
        if readout.valid is not None:
            at_padding &= readout.valid.to(real.device)
        return Refusal("logits are read at padding") if bool(at_padding.any()) else None

    def serves(self, sites: Sequence[Site]) -> bool:
        """Whether states are stored for the point at which these edits begin."""
        return self._plan(tuple(sites)).start is not None

    def compute(self, rows: Tensor) -> Prefix:
        """Run some rows once without edits, and store states, keys and values."""
        data, schedule = self._data, self._schedule
        head, filled = data.backbone.head(), self._recurrent.empty_cache()
        assert head is not None and self._argument is not None
        columns, found = schedule.state_columns(rows), dict[int, Tensor]()

        def at_columns(value: Tensor) -> Tensor:
            return value.take_along_dim(columns.to(value.device)[..., None], 1)

        stop = Hook(head, "input", BEHIND_BLOCKS, lambda hidden: None)
        inputs = {**data.inputs(rows), self._argument: filled, "use_cache": True}
        with torch.no_grad():
            data.backbone.run(inputs, [stop, *data.chain.reading(found, at_columns)], stop=True)
        if not schedule.before:
            return Prefix(found)
        attending = (
            i for i in range(data.chain.lowest, len(data.chain.blocks)) if i not in self._recurrent.blocks
        )
        groups = grouped(keys_and_values_in(filled, attending), schedule.key_columns(rows))
        return Prefix(found, groups, self._recurrent.compute(rows))

    def resume(
        self, rows: Tensor, sites: Sequence[Site], readout: Readout, prefix: Prefix, at: Tensor
    ) -> Resumption:
        """A run of some rows with edits at sites, from the first edited block and token on."""
        plan, device, depth = self._plan(tuple(sites)), self._data.backbone.device, len(self._data.chain.blocks)
        # No block is left after the last one that could look back.
        suffix = plan.aligned.rows(rows, look_back=plan.boundary < depth)
        inputs: dict[str, Any] = {k: t.to(device, non_blocking=True) for k, t in suffix.inputs().items()}
        earlier = prefix.keys_and_values(at, suffix.earlier(), plan.boundary, device) if suffix.before else {}
        filled = filled_cache(earlier, depth, len(at), suffix.before, device)
        assert self._argument is not None and plan.start is not None
        inputs[self._argument] = self._recurrent.put_into(filled, prefix.recurrent, plan.start, at)
        inputs["use_cache"] = True
        states = prefix.states.get(plan.boundary)
        if states is not None:
            states = gather_tokens(states, at, suffix.stored(states.shape[1]), 0).to(device, non_blocking=True)
        read = replace(readout.rows(rows), index=suffix.reads)
        return Resumption(inputs, plan.boundary, states, self.resolved(rows, sites), read)

    def resolved(self, rows: Tensor, sites: Sequence[Site]) -> dict[Site, ResolvedSite]:
        """Positions are counted from the first token that runs."""
        return {site: place.rows(rows) for site, place in self._plan(tuple(sites)).resolved.items()}

    def tokens_of(self, sites: Sequence[Site]) -> object:
        """An object that is shared by sites with the same first tokens."""
        return id(self._plan(tuple(sites)).aligned)

    def length_of(self, sites: Sequence[Site]) -> float:
        """The tokens from the first edited one to the last that is read."""
        return float(self._plan(tuple(sites)).aligned.length.double().mean())

    def trial(self) -> tuple[list[Tensor], list[Site]]:
        """The rows, and the sites, with the earliest and the latest start."""
        starts, lowest = self._schedule.starts, self._schedule.lowest
        by_start = sorted(starts, key=lambda site: float(starts[site].double().mean()))
        return [lowest.argmin()[None], lowest.argmax()[None]], [by_start[0], by_start[-1]]

    def _plan(self, sites: tuple[Site, ...]) -> Plan:
        """How this set of sites is run. Cached, because training needs the same plan in each step."""
        if sites in self._plans:
            return self._plans[sites]
        with torch.inference_mode(False):
            first = self._schedule.first(sites)
            known = (plan.aligned for plan in self._plans.values())
            aligned = next((a for a in known if torch.equal(a.first, first)), None)
            aligned = aligned or self._schedule.aligned(first)
            resolved = {site: self._schedule.resolved_in(site, aligned) for site in sites}
        plan = Plan(self._data.chain.before(sites), aligned, resolved, self._recurrent.number(first))
        if len(self._plans) >= PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[sites] = plan
        return plan
