"""The frozen past: training that computes nothing twice.

While a subspace or an edit is trained the base model does not change, so everything before the first edited
(layer, position) is a constant of the data set. It is computed once:

    states    entering the first block after the edited layer's frozen part, at the tokens from the first edited
              one on
    keys,     of all earlier tokens, in the blocks above
    values

and every step starts from there: the blocks below are skipped, the earlier tokens come through
`past_key_values`, only the logits that the loss reads are multiplied out. Losses and gradients are those of the
plain run. One pass over the data serves all the sites of a sweep.

Rows are re-aligned so that their first edited tokens stand in one column: a batch of ragged rows, whichever
side its padding is on, runs only the tokens after its edits. Inside a row the distance of tokens is kept, which
is all that positions (passed explicitly) and sliding windows go by.

What is chosen, from best to most general, and why a better one was refused, is told by `describe()`:

    keys and values    causal decoders; of blocks without attention the states (`engine/recurrent.py`)
    layers             models that attend both ways: skipped blocks alone; chains of modules likewise
    plain              whatever has no block that can be skipped, or whose past is not frozen

A model may keep none of the assumptions behind the first two, so each is tried on a few rows, with edits that
change something, against the plain run before it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.engine.budget import budgets, home
from subspace_lab.engine.fingerprint import Fingerprint, restless, tensors_of
from subspace_lab.engine.kept import Aligned, Chain, Past, Schedule, cached, take
from subspace_lab.engine.plain import LAST, NEEDLESS, PlainEngine, Readout, resolved_rows
from subspace_lab.engine.recurrent import Recurrent, unknown_states, without_attention
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import Edits, Sources, edit_hooks, model_inputs
from subspace_lab.model.resolved_sites import ResolvedSite, resolve

DECODER_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", *NEEDLESS}
LESSER = {"keys and values": "layers", "layers": "plain"}
PLANS_KEPT = 16


@dataclass(frozen=True)
class Plan:
    """How one set of edits is run: from which block, on which tokens, and where the edits stand in those.

    `start`: which of the starts it begins at, where blocks keep states; None where none was kept for it.
    """

    boundary: int
    aligned: Aligned | None  # None: on all tokens
    resolved: dict[Site, ResolvedSite]
    start: int | None = None


class FrozenPast:
    """A data set under a frozen model, from which edits at the given sites are trained and evaluated.

    Args:
        backbone: of the model.
        batch: the whole data set.
        sites: every site that will be edited, alone or together.
        readout: the logits that are wanted.
        memory: how much may be kept, as bytes or "8GiB"; by default half of what is free. First the model's
            device is used, then the host; what does not fit is recomputed batch by batch, without gradient.
        chunk: rows a pass.

    Raises:
        ValueError: a budget that cannot hold one batch; sites that do not exist.
        RuntimeError: (from `logits`) the model or the data were changed after the pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch: Batch,
        sites: Iterable[Site],
        readout: Readout,
        *,
        memory: int | str | None = None,
        chunk: int = 32,
    ) -> None:
        self.backbone, self.batch, self.readout, self.chunk = backbone, batch, readout, chunk
        self.past: Past | None = None
        self.where = ""
        budget = budgets(memory, backbone.device)
        with torch.inference_mode(False):  # what is kept must serve training, wherever it is made
            self.plain = PlainEngine(backbone, batch, readout)
            self.resolved = {site: resolve(backbone, batch, site, growing=True) for site in dict.fromkeys(sites)}
            if not self.resolved:
                raise ValueError("A frozen past needs the sites that will be edited; none were given.")
            self._weights = nn.ParameterList(backbone.model.parameters())
            self._plans: dict[tuple[Site, ...], Plan] = {}
            chain = Chain.of(backbone.anatomy, self.resolved)
            self._chain, self._boundary = chain.blocks, chain.boundary
            self.mode, self.reason = self._best()
            while self.mode != "plain":
                refused = self._try(budget)
                if refused is None:
                    break
                self.reason = f"resuming by {self.mode} was refused by its check: {refused}"
                self.mode, self.past = LESSER[self.mode], None

    def __len__(self) -> int:
        return len(self.batch)

    def describe(self) -> str:
        """One line: what is kept, where, how much, and why no more."""
        if self.mode == "plain":
            return f"plain run ({self.reason})"
        kept = f"{self.past.nbytes() / 2**20:.1f} MiB {self.where}" if self.past else f"nothing, {self.where}"
        because = f" ({self.reason})" if self.reason else ""
        return f"frozen past by {self.mode}: {kept}{because}"

    def logits(self, rows: Tensor, edits: Edits, sources: Sources | None = None) -> Tensor:
        """(rows, reads, answers) with the edits in force; see `engine/plain.py`."""
        strange = [s for s in edits if s not in self.resolved]
        if strange:
            raise ValueError(f"{strange} were not named when the past was kept; it serves {list(self.resolved)}.")
        if self.mode == "plain":
            return self.plain.logits(rows, edits, sources)
        if self._fingerprint.changed():
            raise RuntimeError(
                "The model or the data set was changed after its past was kept (weights, modules, train mode, "
                "dtype, device, autocast or inputs); make a new FrozenPast."
            )
        return self._resume(rows, edits, sources, self.readout)

    # --- what is frozen -------------------------------------------------------------------------------

    def _best(self) -> tuple[str, str]:
        """The best mode that what is known of the model and the data allows, and why no better one."""
        moving = restless(self.backbone.model)
        if moving:
            return "plain", f"{moving}: the past is not frozen"
        if getattr(getattr(self.backbone.model, "config", None), "is_encoder_decoder", False):
            return "plain", "encoder-decoder"
        if not self._chain:
            return "plain", "no chain of blocks below the sites"
        real = self.batch.real_tokens()
        if real is not None and bool((real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any()):
            # The positions of such rows depend on the rows beside them.
            return "plain", "the attention mask has holes"
        worse = self._no_keys(real)
        return ("layers", worse) if worse else ("keys and values", "")

    def _no_keys(self, real: Tensor | None) -> str:
        """Why earlier tokens cannot come through a cache, if they cannot."""
        inputs, readout = self.batch.inputs, self.readout
        if any(site.layer is None for site in self.resolved):
            return "sites are named by path"
        extra = sorted(set(inputs) - DECODER_INPUTS)
        if extra:
            return f"inputs {extra}"
        if not hasattr(self.backbone.model, "generate") or self.backbone.head() is None:
            return "no causal language model"
        stateful = without_attention(self.backbone, self._chain)
        if max(stateful, default=-1) >= min(self._boundary.values()) and unknown_states(
            self.backbone, self._chain
        ):
            return "blocks without attention, whose past is no part of the model's cache"
        if real is None or "input_ids" not in inputs or readout.index is None:
            return "no tokens, or no positions at which logits are read"
        counted = [inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None]
        if any(not isinstance(t, Tensor) or t.ndim != 2 for t in counted):
            return "a mask or positions with more axes than (row, token)"
        given = inputs.get("position_ids")
        if given is not None and "attention_mask" not in inputs and bool((given.diff(dim=1) != 1).any()):
            return "positions that begin anew: several texts in a row"
        at_padding = ~real.gather(1, readout.index.to(real.device))
        if readout.valid is not None:
            at_padding &= readout.valid.to(real.device)
        return "logits are read at padding" if bool(at_padding.any()) else ""

    def _prepare(self) -> None:
        """What every resumption by this mode needs to know of the data."""
        inputs = model_inputs(self.backbone.model, self.batch)
        self._whole = replace(self.batch, inputs=inputs) if isinstance(inputs, Mapping) else self.batch
        self._plans.clear()
        by_tokens = self.mode == "keys and values"
        self._schedule = Schedule(self._whole, self.resolved, self.readout) if by_tokens else None
        self._recurrent = None
        stateful = by_tokens and without_attention(self.backbone, self._chain)
        if self._schedule is not None and stateful and not unknown_states(self.backbone, self._chain):
            each = [(), tuple(self.resolved), *((site,) for site in self.resolved)]
            starts = (self._schedule.first(key) for key in each)
            self._recurrent = Recurrent(self.backbone, self._chain, self._schedule, starts)

    def _plan(self, edits: Edits) -> Plan:
        """How this set of edits is run; kept, as training asks for the same one at each step."""
        key = tuple(edits)
        if key in self._plans:
            return self._plans[key]
        boundary = min((self._boundary[s] for s in key), default=max(self._boundary.values()))
        with torch.inference_mode(False):
            if self._schedule is None:
                plan = Plan(boundary, None, {s: self.resolved[s] for s in key})
            else:
                first = self._schedule.first(key)
                others = (p.aligned for p in self._plans.values())
                aligned = next((a for a in others if a is not None and torch.equal(a.first, first)), None)
                aligned = aligned or self._schedule.aligned(first)
                start = self._recurrent.number(first) if self._recurrent is not None else None
                plan = Plan(boundary, aligned, {s: self._schedule.moved(s, aligned) for s in key}, start)
        if len(self._plans) >= PLANS_KEPT:
            self._plans.pop(next(iter(self._plans)))
        self._plans[key] = plan
        return plan

    # --- the pass over the data -------------------------------------------------------------------------

    def _try(self, budget: tuple[int, int]) -> str | None:
        """Keep the past and check it; why it cannot be trusted, if it cannot."""
        try:
            self._prepare()
            probe = self._pass(torch.arange(min(len(self), self.chunk)))
        except Exception as failure:  # whatever an unfamiliar model does with a cache or a skipped block
            return _told(failure)
        device, self.where = home(
            probe.nbytes(), min(len(self), self.chunk), len(self), budget, self.backbone.device
        )
        if device is None and self._recurrent is not None:
            return f"its states would be {self.where}, which costs more than it saves"
        try:
            self._keep(probe, device)
            self._fingerprint = Fingerprint(
                self.backbone.model,
                lambda: tensors_of(self.batch, self.readout.index, self.readout.valid, self.readout.tokens),
            )
            return self._difference()
        except Exception as failure:
            return _told(failure)

    def _keep(self, probe: Past, device: torch.device | None) -> None:
        if device is None:
            return
        pinned = device.type == "cpu" and self.backbone.device.type == "cuda"
        kept = probe.room_for(len(self), device, pinned)
        for start in range(0, len(self), self.chunk):
            rows = torch.arange(start, min(len(self), start + self.chunk))
            kept.put(start, probe if start == 0 else self._pass(rows))
        self.past = kept

    def _pass(self, rows: Tensor) -> Past:
        """Run some rows once, plainly, and keep what resuming needs."""
        inputs: Any = self._inputs(rows)
        found: dict[int, Tensor] = {}
        schedule, cache, columns, hooks = self._schedule, None, None, []
        if schedule is not None:
            from transformers import DynamicCache

            # Without a configuration every layer keeps all its keys, also those with a sliding window.
            cache = DynamicCache() if self._recurrent is None else self._recurrent.cache()
            inputs = {**inputs, "past_key_values": cache, "use_cache": True}
            head = self.backbone.head()
            assert head is not None
            hooks.append(Hook(head, "input", LAST, lambda hidden: None))
            columns = schedule.kept_states(rows)

        def keeper(boundary: int) -> Any:
            def keep(value: Tensor) -> None:
                value = value.detach()
                found[boundary] = value.clone() if columns is None else take(value, columns)

            return keep

        position = self.backbone.anatomy.position
        for boundary in sorted(set(self._boundary.values()) - {0}):
            block = self._chain[boundary - 1]
            hooks.append(Hook(block, "output", (position[block], 10**6), keeper(boundary)))
        if hooks:
            with torch.no_grad():
                self.backbone.run(inputs, hooks, stop=True)
        if schedule is None or cache is None or not schedule.before:
            return Past(found, [])
        kept = self._recurrent
        states = [] if kept is None else [kept.after(rows, start) for start in kept.starts]
        without = () if kept is None else kept.blocks
        layers = [i for i in range(min(self._boundary.values()), len(self._chain)) if i not in without]
        pairs = {(i, side): getattr(cache.layers[i], side) for i in layers for side in ("keys", "values")}
        return replace(Past.of(found, pairs, schedule.kept_keys(rows)), recurrent=states)

    def _inputs(self, rows: Tensor) -> Any:
        part = self._whole.rows(rows)
        return part.inputs if part.positional is None else [part.positional]

    # --- resuming ---------------------------------------------------------------------------------------

    def _resume(self, rows: Tensor, edits: Edits, sources: Sources | None, readout: Readout) -> Tensor:
        rows = rows.cpu()
        plan = self._plan(edits)
        if self._recurrent is not None and plan.start is None:
            return self.plain.logits(rows, edits, sources)
        past, at = (self._pass(rows), torch.arange(len(rows))) if self.past is None else (self.past, rows)
        resolved = {site: resolved_rows(spot, rows) for site, spot in plan.resolved.items()}
        device, boundary = self.backbone.device, plan.boundary
        kept = past.states.get(boundary)
        inputs: Any
        if plan.aligned is None:
            inputs, readout = self._inputs(rows), readout.rows(rows)
            states = None if kept is None else kept[at.to(kept.device)].to(device, non_blocking=True)
        else:
            # Above the last block nothing looks back.
            suffix = plan.aligned.rows(rows, look_back=boundary < len(self._chain))
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in suffix.inputs().items()}
            cache = cached(past.groups, at, suffix, boundary, len(self._chain), device)
            if self._recurrent is not None and plan.start is not None:
                cache = self._recurrent.put(cache, past.recurrent[plan.start] if past.recurrent else {}, at)
            inputs |= {"past_key_values": cache, "use_cache": True}
            readout = replace(readout.rows(rows), index=suffix.reads)
            states = None if kept is None else suffix.states(kept, at).to(device, non_blocking=True)
        hooks = edit_hooks(self.backbone, Batch({"input_ids": rows}), edits, sources, resolved=resolved)
        return self.plain.finish(inputs, self._skipping(boundary, states, hooks), readout, self._weights)

    def _skipping(self, boundary: int, states: Tensor | None, hooks: list[Hook]) -> list[Hook]:
        """The hooks of a run that starts at a boundary: the blocks below it give way to the kept states."""
        if not boundary:
            return hooks
        *below, last = self._chain[:boundary]
        position = self.backbone.anatomy.position
        at_last = [v for v in hooks if v.path == last and v.side == "output"]

        def resume(_: None) -> Tensor | None:
            value = states
            for hook in at_last:
                value = hook.act(value)
            return value

        skips = [Hook(b, "skip", (position[b], -1), lambda _: states) for b in below]
        skips.append(Hook(last, "skip", (position[last], -1), resume))
        return [*skips, *(v for v in hooks if v not in at_last)]

    # --- trust ------------------------------------------------------------------------------------------

    def _difference(self) -> str | None:
        """Why resumed runs are not plain ones, if they are not: tried on a few rows and the outermost sites.

        The edits must change something: a model that attends both ways resumes rightly as long as nothing is
        edited. And the rows come in another order: a block that leaves something for a later one aside from
        its output would otherwise find what the plain run just left.
        """
        real = self.batch.real_tokens()
        lengths = torch.zeros(len(self)) if real is None else real.sum(1).cpu()
        extremes = [lengths.topk(min(2, len(self))).indices, lengths.argmin()[None]]
        sites = sorted(self.resolved, key=lambda s: self._boundary[s])
        sites = [sites[0], sites[-1]]
        if self._schedule is not None:
            starts = self._schedule.starts
            extremes += [self._schedule.lowest.argmin()[None], self._schedule.lowest.argmax()[None]]
            by_start = sorted(self.resolved, key=lambda s: float(starts[s].double().mean()))
            sites += [by_start[0], by_start[-1]]
        rows = torch.cat(extremes).unique()
        readout = replace(self.readout, tokens=None)  # two logits may be near 0, a vocabulary's are not
        valid = readout.rows(rows).valid
        plain = PlainEngine(self.backbone, self.batch, readout)
        for site in dict.fromkeys(sites):
            edits = {site: _stirred}
            with torch.no_grad():
                expected = plain.logits(rows, edits)
                found = self._resume(rows.flip(0), edits, None, readout).flip(0)
            if valid is not None:
                expected, found = expected[valid.to(expected.device)], found[valid.to(found.device)]
            if self._recurrent is not None:
                # A model may write over states that a gradient still needs: found out here, not in training.
                scale = torch.ones((), device=expected.device, requires_grad=True)
                scaled = self._resume(rows, {site: lambda h, scale=scale: h * scale}, None, readout)
                torch.autograd.grad(scaled.float().sum(), scale)
            error = float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
            half = expected.dtype in (torch.float16, torch.bfloat16)
            if not error <= (5e-2 if half else 1e-4):
                return f"its logits differ by {error:.1e} with an edit at {site}"
        return "running the model changes it" if self._fingerprint.changed() else None


def _stirred(states: Tensor) -> Tensor:
    return -states.roll(1, -1)


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
