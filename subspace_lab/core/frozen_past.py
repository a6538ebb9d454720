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

    keys and values    causal decoders
    layers             models that attend both ways: skipped blocks alone; chains of modules likewise
    plain              whatever has no block that can be skipped, or whose past is not frozen
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.backbone import Backbone, Visit
from subspace_lab.core.batches import Batch
from subspace_lab.core.intervene import Edits, Place, Sources, edit_visits, model_inputs, place
from subspace_lab.core.runs import LAST, PlainRun, Readout
from subspace_lab.core.sites import Site

DECODER_INPUTS = {"input_ids", "attention_mask", "position_ids"}


@dataclass(frozen=True)
class Tokens:
    """The rows of a data set without their padding: token j of a row in column j.

    ids, position_ids: (rows, longest); column: where a token stood in the padded batch; lengths: (rows,).
    """

    ids: Tensor
    position_ids: Tensor
    column: Tensor
    number: Tensor  # the inverse of `column`: which token stands in a column
    lengths: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        real = batch.real_tokens()
        assert real is not None
        column = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        number = real.long().cumsum(1) - 1
        given = batch.inputs.get("position_ids")
        steps = torch.arange(real.shape[1], device=real.device).expand_as(column)
        positions = steps if given is None else given.expand_as(column).gather(1, column)
        return cls(batch.inputs["input_ids"].gather(1, column), positions, column, number, real.sum(1))


@dataclass
class Past:
    """What a pass over some rows kept: states by boundary, keys and values by block."""

    states: dict[int, Tensor]  # (rows, tokens from `first` on, width)
    keys: dict[int, Tensor]  # (rows, heads, tokens, head width)
    values: dict[int, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.states.values(), *self.keys.values(), *self.values.values()]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


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
        self.plain = PlainRun(backbone, batch, readout)
        self.places = {site: place(backbone, batch, site, growing=True) for site in dict.fromkeys(sites)}
        if not self.places:
            raise ValueError("A frozen past needs the sites that will be edited; none were given.")
        self.past: Past | None = None
        self.where = ""
        self.mode, self.reason = self._choose()
        if self.mode == "keys and values":
            self._plan_tokens()
        if self.mode != "plain":
            self._keep(_bytes(memory, backbone.device))
            self._verify()
        self._state = self._fingerprint()

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
        """(rows, reads, answers) with the edits in force; see `core/runs.py`."""
        if self._fingerprint() != self._state:
            raise RuntimeError(
                "The model or the data set was changed after its past was kept (weights, train mode, dtype, "
                "device or inputs); make a new FrozenPast."
            )
        strange = [s for s in edits if s not in self.places]
        if strange:
            raise ValueError(f"{strange} were not named when the past was kept; it serves {list(self.places)}.")
        if self.mode == "plain":
            return self.plain.logits(rows, edits, sources)
        rows = rows.to(self.backbone.device)
        past, at = (self._pass(rows), torch.arange(len(rows))) if self.past is None else (self.past, rows)
        boundary = min((self._boundary(s) for s in edits), default=max(past.states, default=0))
        boundary = max((b for b in [0, *past.states] if b <= boundary), default=0)
        if self.mode == "layers":
            return self._resume_layers(rows, past, at, boundary, edits, sources)
        return self._resume_tokens(rows, past, at, boundary, edits, sources)

    # --- what is frozen -------------------------------------------------------------------------------

    def _choose(self) -> tuple[str, str]:
        model = self.backbone.model
        active = _active_dropout(model)
        if active:
            return "plain", f"dropout is active in {active}: the past is not frozen"
        blocks = self._blocks()
        if not blocks:
            return "plain", "no chain of blocks below the sites"
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            return "plain", "encoder-decoder"
        by_path = any(site.layer is None for site in self.places)
        tokens = self.batch.real_tokens() is not None and "input_ids" in self.batch.inputs
        if by_path or not tokens:
            return "layers", "sites are named by path"
        reads = self.readout.index is not None and self.backbone.head() is not None
        extra = set(self.batch.inputs) - DECODER_INPUTS
        if not hasattr(model, "generate") or extra or not reads:
            return "layers", f"inputs {sorted(extra)}" if extra else "no causal language model"
        return "keys and values", ""

    def _blocks(self) -> list[str]:
        """The chain of modules that can be skipped one after the other."""
        anatomy = self.backbone.anatomy
        if all(site.layer is not None for site in self.places):
            stacks = {place.tap.stack for place in self.places.values()}
            return anatomy.stacks[stacks.pop()] if len(stacks) == 1 else []
        if any(site.layer is not None for site in self.places):
            return []
        for path, module in anatomy.modules.items():
            if isinstance(module, nn.Sequential) and all(self._child(path, s) is not None for s in self.places):
                return [f"{path}.{name}" if path else name for name in module._modules]
        return []

    def _child(self, chain: str, site: Site) -> int | None:
        """Which module of a chain a site by path is on the outside of."""
        path = site.component.rpartition(".")[0]
        children = self.backbone.anatomy.modules[chain]._modules
        for i, name in enumerate(children):
            if path == (f"{chain}.{name}" if chain else name):
                return i
        return None

    def _boundary(self, site: Site) -> int:
        """How many blocks of the chain lie wholly before the edit: block b is the first that runs."""
        if site.layer is None:
            path, _, side = site.component.rpartition(".")
            return self._blocks().index(path) + (side == "output")
        depth = len(self._blocks())
        layer = site.layer % depth
        return layer + (site.component.rpartition(".")[2] == "block_output")

    def _plan_tokens(self) -> None:
        """For every site the first edited token of each row; for every row what it must run."""
        tokens = Tokens.of(self.batch)
        assert self.readout.index is not None
        reads = tokens.number.gather(1, self.readout.index.to(tokens.number.device))
        far = torch.iinfo(torch.long).max
        valid = self.readout.valid
        first_read = reads if valid is None else reads.masked_fill(~valid, far)
        last_read = reads if valid is None else reads.masked_fill(~valid, -1)
        self.tokens, self.reads = tokens, reads
        self.stop = last_read.amax(1) + 1
        self.first_read = first_read.amin(1)
        self.edited: dict[Site, Tensor] = {}
        for site, spot in self.places.items():
            assert spot.index is not None
            number = tokens.number.gather(1, spot.index)
            if spot.valid is not None:
                number = number.masked_fill(~spot.valid, far)
            self.edited[site] = number
        self.lowest = self._first(self.places)

    def _first(self, sites: Iterable[Site]) -> Tensor:
        """The first token of each row that has to run when these sites are edited."""
        starts = [self.edited[s].amin(1) for s in sites if self.edited[s].shape[1]]
        return torch.stack([self.first_read, *starts]).amin(0).clamp_max(self.stop.max() - 1)

    # --- the pass over the data -------------------------------------------------------------------------

    def _keep(self, budget: tuple[int, int]) -> None:
        on_device, on_host = budget
        n = len(self.batch)
        probe = self._pass(torch.arange(min(n, self.chunk)))
        one = probe.nbytes()
        if one > max(on_device, on_host):
            raise ValueError(
                f"A memory budget of {max(on_device, on_host) / 2**20:.1f} MiB cannot hold one batch of "
                f"{min(n, self.chunk)} rows, which needs {one / 2**20:.1f} MiB; give more or a smaller chunk."
            )
        total = one * n // max(1, min(n, self.chunk))
        if total <= on_device:
            device, self.where = self.backbone.device, f"on {self.backbone.device}"
        elif total <= on_host:
            device, self.where = torch.device("cpu"), "in host memory"
        else:
            self.where = f"recomputed a batch ({total / 2**20:.0f} MiB would not fit)"
            return

        def room(like: Tensor) -> Tensor:
            pinned = device.type == "cpu" and self.backbone.device.type == "cuda"
            return torch.empty(n, *like.shape[1:], dtype=like.dtype, device=device, pin_memory=pinned)

        kept = Past(*({k: room(t) for k, t in part.items()} for part in (probe.states, probe.keys, probe.values)))
        for start in range(0, n, self.chunk):
            rows = torch.arange(start, min(n, start + self.chunk))
            part = probe if start == 0 else self._pass(rows)
            for into, piece in zip(kept.tensors(), part.tensors(), strict=True):
                into[start : start + len(rows)].copy_(piece)
        self.past = kept

    def _pass(self, rows: Tensor) -> Past:
        """Run some rows once, plainly, and keep what resuming needs."""
        part = self.batch.rows(rows)
        blocks = self._blocks()
        boundaries = sorted({self._boundary(s) for s in self.places} - {0})
        found: dict[int, Tensor] = {}
        by_tokens = self.mode == "keys and values"

        def keeper(boundary: int) -> Any:
            def keep(value: Tensor) -> None:
                if by_tokens:
                    value = _take(value, self._columns(rows))
                found[boundary] = value.detach().clone()

            return keep

        position = self.backbone.anatomy.position
        visits = [Visit(blocks[b - 1], "output", (position[blocks[b - 1]], 10**6), keeper(b)) for b in boundaries]
        inputs: Any = model_inputs(self.backbone.model, part)
        cache = None
        if by_tokens:
            from transformers import DynamicCache

            # Without a configuration every layer keeps all its keys, also those with a sliding window.
            cache = DynamicCache()
            inputs = {**inputs, "past_key_values": cache, "use_cache": True}
            head = self.backbone.head()
            assert head is not None
            visits.append(Visit(head, "input", LAST, lambda hidden: None))
        with torch.no_grad():
            self.backbone.run(inputs, visits, stop=True)
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        longest = int(self.lowest_keys()) if by_tokens else 0
        if cache is not None and longest:
            column = self.tokens.column[rows.to(self.tokens.column.device)][:, :longest]
            for layer in range(min([self._boundary(s) for s in self.places]), len(blocks)):
                keys[layer] = _take_keys(cache.layers[layer].keys, column)
                values[layer] = _take_keys(cache.layers[layer].values, column)
        return Past(found, keys, values)

    def lowest_keys(self) -> Tensor:
        """How many tokens' keys are kept: those before the latest first edit of any site."""
        return torch.stack([self._first([s]) for s in self.places]).max()

    def _columns(self, rows: Tensor) -> Tensor:
        """The columns of the tokens from the first edited one on, for each of some rows."""
        rows = rows.to(self.lowest.device)
        length = int((self.stop - self.lowest).max())
        number = self.lowest[rows][:, None] + torch.arange(length, device=rows.device)
        number = torch.minimum(number, self.tokens.lengths[rows][:, None] - 1)
        return self.tokens.column[rows].gather(1, number)

    # --- resuming ---------------------------------------------------------------------------------------

    def _resume_tokens(
        self, rows: Tensor, past: Past, at: Tensor, boundary: int, edits: Edits, sources: Sources | None
    ) -> Tensor:
        device = self.backbone.device
        tokens = self.tokens
        here = rows.to(tokens.ids.device)
        first, stop = self._first(edits)[here], self.stop[here]
        length, before = int((stop - first).max()), int(first.max())
        steps = torch.arange(length, device=here.device)
        number = torch.minimum(first[:, None] + steps, tokens.lengths[here][:, None] - 1)
        real = first[:, None] + steps < tokens.lengths[here][:, None]
        even = bool((first == before).all())
        seen = torch.arange(before, device=here.device) >= (before - first)[:, None]
        mask = torch.cat([seen, real], 1).long()
        inputs = {
            "input_ids": tokens.ids[here].gather(1, number).to(device),
            "position_ids": tokens.position_ids[here].gather(1, number).to(device),
            "attention_mask": mask.to(device),
            "past_key_values": self._cache(past, at, boundary, first, before, even),
            "use_cache": True,
        }
        moved = {site: self._moved(site, here, first, length) for site in edits}
        part = Batch({"input_ids": inputs["input_ids"]})
        visits = edit_visits(self.backbone, part, edits, sources, places=moved)
        states = None
        if boundary:
            offset = first - self.lowest[here]
            states = past.states[boundary][at.to(past.states[boundary].device)]
            span = (offset[:, None] + steps).clamp_max(states.shape[1] - 1).to(states.device)
            same = states.shape[1] == length and not bool(offset.any())
            states = (states if same else _take(states, span)).to(device, non_blocking=True)
        readout = replace(self.readout.rows(here), index=(self.reads[here] - first[:, None]).clamp(0, length - 1))
        return self.plain.finish(inputs, self._skipping(boundary, states, visits), readout)

    def _resume_layers(
        self, rows: Tensor, past: Past, at: Tensor, boundary: int, edits: Edits, sources: Sources | None
    ) -> Tensor:
        part = self.batch.rows(rows.to(next(iter(past.states.values())).device) if past.states else rows)
        visits = edit_visits(self.backbone, part, edits, sources)
        states = None
        if boundary:
            kept = past.states[boundary]
            states = kept[at.to(kept.device)].to(self.backbone.device, non_blocking=True)
        inputs = model_inputs(self.backbone.model, part)
        return self.plain.finish(inputs, self._skipping(boundary, states, visits), self.readout.rows(rows))

    def _skipping(self, boundary: int, states: Tensor | None, visits: list[Visit]) -> list[Visit]:
        """The visits of a run that starts at a boundary: its blocks below give way to the kept states."""
        if not boundary:
            return visits
        blocks = self._blocks()
        last = blocks[boundary - 1]
        position = self.backbone.anatomy.position
        at_last = [v for v in visits if v.path == last and v.side == "output"]

        def resume(_: None) -> Tensor:
            value = states
            for visit in at_last:
                value = visit.act(value)
            assert value is not None
            return value

        skips = [Visit(b, "skip", (position[b], -1), lambda _: states) for b in blocks[: boundary - 1]]
        skips.append(Visit(last, "skip", (position[last], -1), resume))
        return [*skips, *(v for v in visits if v not in at_last)]

    def _moved(self, site: Site, rows: Tensor, first: Tensor, length: int) -> Place:
        """A site's place in a batch that starts at each row's first edited token."""
        spot = self.places[site]
        index = self.edited[site][rows] - first[:, None]
        # Edits behind the last logit that is read have no effect on it, and no column here.
        valid = (index >= 0) & (index < length)
        return replace(spot, index=index.clamp(0, length - 1), valid=None if bool(valid.all()) else valid)

    def _cache(self, past: Past, at: Tensor, boundary: int, first: Tensor, before: int, even: bool) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        if not before:
            return cache
        device = self.backbone.device
        # Each row's earlier tokens, pushed right so that they end where its edits begin.
        span = (torch.arange(before, device=first.device) - (before - first)[:, None]).clamp_min(0)
        start = min(past.keys)
        for layer in range(max(past.keys) + 1):
            filled = DynamicLayer()
            kept = past.keys[max(layer, start)], past.values[max(layer, start)]
            if layer < boundary:  # never run; asked for its length alone
                shape = (len(at), kept[0].shape[1], before, kept[0].shape[3])
                pair = [k.new_zeros(1).expand(shape).to(device) for k in kept]
            else:
                pair = []
                for k in kept:
                    k = k[at.to(k.device)]
                    k = k[:, :, :before] if even else _take_keys(k, span.to(k.device))
                    pair.append(k.to(device, non_blocking=True))
            filled.keys, filled.values = pair
            filled.dtype, filled.device, filled.is_initialized = pair[0].dtype, pair[0].device, True
            cache.layers.append(filled)
        return cache

    # --- trust ------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Resume a few rows and compare with the plain run; an unfamiliar model may break an assumption."""
        real = self.batch.real_tokens()
        lengths = real.sum(1) if real is not None else torch.zeros(len(self.batch))
        rows = torch.cat([lengths.topk(min(2, len(lengths))).indices, lengths.argmin()[None]]).unique().cpu()
        self._state = self._fingerprint()
        with torch.no_grad():
            expected = self.plain.logits(rows, {})
            error: float | str
            try:
                found = [self._try(rows, site) for site in self._extremes()]
                error = max(float((f - expected).float().norm() / expected.float().norm()) for f in found)
            except Exception as failure:  # whatever an unfamiliar model does with a cache or a skipped block
                error = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        half = expected.dtype in (torch.float16, torch.bfloat16)
        if isinstance(error, float) and error <= (5e-2 if half else 1e-4):
            return
        told = error if isinstance(error, str) else f"its logits differ by {error:.1e}"
        refused = f"resuming by {self.mode} was refused by its check: {told}"
        if self.mode == "keys and values":
            self.mode, self.reason, self.past = "layers", refused, None
            self._keep(_bytes(None, self.backbone.device))
            self._verify()
            return
        self.mode, self.reason, self.past = "plain", refused, None

    def _try(self, rows: Tensor, site: Site) -> Tensor:
        return self.logits(rows, {site: lambda states: states})

    def _extremes(self) -> Sequence[Site]:
        ordered = sorted(self.places, key=self._boundary)
        return list(dict.fromkeys([ordered[0], ordered[-1]]))

    def _fingerprint(self) -> tuple:
        """Changes whenever weights, flags or inputs are changed in place or replaced."""
        model = self.backbone.model
        weights = tuple((p.data_ptr(), p._version, p.dtype) for p in model.parameters())
        data = tuple(
            (t.data_ptr(), t._version)
            for t in (*self.batch.inputs.values(), self.batch.positional)
            if isinstance(t, Tensor)
        )
        return weights, data, tuple(m.training for m in model.modules())


def _take(states: Tensor, index: Tensor) -> Tensor:
    """(rows, tokens, width) → (rows, index, width)."""
    return states.gather(1, index.to(states.device)[..., None].expand(-1, -1, states.shape[-1]))


def _take_keys(keys: Tensor, index: Tensor) -> Tensor:
    """(rows, heads, tokens, head width) → (rows, heads, index, head width)."""
    return keys.gather(2, index.to(keys.device)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[-1]))


def _active_dropout(model: nn.Module) -> str | None:
    """The first module that would drop something at random now."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        for attribute in ("attention_dropout", "dropout", "dropout_p"):  # functional dropout in attention
            given = getattr(module, attribute, 0)
            rate = max(rate, given if isinstance(given, float) else 0)
        if rate:
            return name or type(module).__name__
    return None


_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(memory: int | str | None, device: torch.device) -> tuple[int, int]:
    """(on the device, on the host): a stated budget holds for each, by default half of what is free."""
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B?)\s*", memory, re.IGNORECASE)
        if found is None or found[2].upper() not in _UNITS:
            raise ValueError(f"memory={memory!r}: write bytes or, say, '8GiB' or '500MB'.")
        memory = int(float(found[1]) * _UNITS[found[2].upper()])
    if memory is not None:
        return memory, memory
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2, host
    return host, host
