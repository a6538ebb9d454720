"""The frozen past: training that computes nothing twice.

While a subspace or an edit is trained, the base model does not change. So everything before the first edited
(layer, position) is constant for each row of the data set. It is computed once, and every step starts from there. The
losses and gradients are those of the plain run. One pass over the data serves all sites of a sweep.

There are several ways to do this, from the best to the most general; `describe()` says which one is used, and why no
better one:

    keys and values    causal decoders run only the tokens from the first edited one on (`engine/by_tokens.py`)
    layers             models that attend in both directions, and chains of modules, skip blocks (`engine/by_layers.py`)
    plain              models without blocks that can be skipped, or whose past is not frozen

A model may violate the assumptions of the first two, so each is compared with the plain run on a few rows before it is
used (`engine/trust.py`). Stored values are no longer used after the model or the data have changed
(`engine/fingerprint.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.engine.budget import budgets, placement
from subspace_lab.engine.by_layers import ByLayers
from subspace_lab.engine.by_tokens import ByTokens
from subspace_lab.engine.cohorts import cohorts_of, fixed_cost
from subspace_lab.engine.fingerprint import Fingerprint, tensors_of, why_not_frozen
from subspace_lab.engine.longest import depends_on_longest, reaches
from subspace_lab.engine.notices import say_once
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.prefix import Prefix
from subspace_lab.engine.protocol import Part
from subspace_lab.engine.readouts import Readout, expect_rows
from subspace_lab.engine.strategies import FrozenData, Refusal, Strategy
from subspace_lab.engine.trust import disagreement
from subspace_lab.model.arguments import expect_edits, expect_integer, expect_sites
from subspace_lab.model.backbone import Backbone, Hook, expect_backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits, Sources, edit_hooks, grouped
from subspace_lab.model.offloading import is_offloaded
from subspace_lab.model.resolved_sites import resolve
from subspace_lab.model.sources import Unmatched

STRATEGIES: tuple[type[Strategy], ...] = (ByTokens, ByLayers)


class FrozenPast:
    """A data set under a frozen model, from which edits at the given sites are trained and evaluated.

    Args:
        backbone: the model.
        batch: the whole data set.
        sites: every site that will be edited; sites in a tuple are edited together. Sites that are not in a tuple can
            also be edited together. This is slower only in models with blocks without attention (state-space layers,
            convolutions, linear attention), unless these are all of the given sites.
        readout: the logits to read.
        memory: how much may be stored, as bytes or as text ("8GiB"); by default half of the free memory. First the
            model's device is used, then the host. What does not fit is computed again for each batch, without
            gradients.
        chunk: how many rows are run at once in the pass over the data.

    Raises:
        TypeError: a model instead of a backbone, one site instead of several, a chunk that is not a whole number.
        ValueError: no site; a component or position that does not exist; a memory budget that cannot be read or
            cannot hold one chunk.
        IndexError: a layer that does not exist.
        RuntimeError: (from `logits`) the model or the data were changed after the pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        batch: Batch,
        sites: Iterable[Site | tuple[Site, ...]],
        readout: Readout,
        *,
        memory: int | str | None = None,
        chunk: int = 32,
    ) -> None:
        expect_backbone(backbone)
        listed, together = _sites_and_groups(sites)
        self.backbone, self.batch, self.readout = backbone, batch, readout
        self.chunk = expect_integer("chunk", chunk)
        self.prefix: Prefix | None = None
        self._strategy: Strategy | None = None
        self._where = ""
        budget = budgets(memory, backbone.device)
        with torch.inference_mode(
            False
        ):  # what is stored must be usable in training, also if made in inference mode
            self.plain = PlainEngine(backbone, batch, readout)
            self.sites = {site: resolve(backbone, batch, site) for site in listed}
            # Offloaded parameters are new objects in each run, so they must be looked up each time.
            offloaded = is_offloaded(backbone.model)
            self._weights = None if offloaded else list(backbone.model.parameters())
            self._data = FrozenData.of(backbone, batch, readout, self.sites, together)
            self.reason = self._choose(budget)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def mode(self) -> str:
        """What is stored, in words; "plain" if nothing is."""
        return "plain" if self._strategy is None else self._strategy.name

    def describe(self) -> str:
        """One line: what is stored, where, how much, and why not a better way."""
        if self._strategy is None:
            return f"plain run ({self.reason})"
        stored = (
            f"{self.prefix.nbytes() / 2**20:.1f} MiB {self._where}" if self.prefix else f"nothing, {self._where}"
        )
        because = f" ({self.reason})" if self.reason else ""
        return f"frozen past by {self.mode}: {stored}{because}"

    def logits(
        self,
        rows: Tensor,
        edits: Edits,
        sources: Sources | None = None,
        unmatched: Unmatched = "refuse",
        *,
        vocabulary: bool = False,
    ) -> Tensor:
        """(rows, reads, answers) logits with the edits; see `Engine.logits`.

        Raises:
            RuntimeError: the model or the data were changed after the pass.
            ValueError: a site that is not among those of this FrozenPast. Otherwise the errors of `Engine.logits`.
        """
        strategy = self._strategy_for([Part(rows, edits, sources)])
        if strategy is None:
            return self.plain.logits(rows, edits, sources, unmatched, vocabulary=vocabulary)
        readout = self.readout.over_vocabulary() if vocabulary else self.readout
        return self._resume(strategy, [Part(rows, edits, sources)], readout, unmatched)

    def side_by_side(self, parts: Sequence[Part], unmatched: Unmatched = "refuse") -> Tensor:
        """The logits of several parts, concatenated; see `Engine.side_by_side`. Errors as in `logits`."""
        if len(parts) == 1:
            return self.logits(parts[0].rows, parts[0].edits, parts[0].sources, unmatched)
        strategy = self._strategy_for(parts)
        if strategy is None or len({strategy.tokens_of(tuple(part.edits)) for part in parts}) > 1:
            return torch.cat([self.logits(part.rows, part.edits, part.sources, unmatched) for part in parts])
        return self._resume(strategy, parts, self.readout, unmatched)

    def cohorts(self, sets: Sequence[tuple[Site, ...]], rows: int) -> list[list[int]]:
        """Which sets of sites should run side by side; see `Engine.cohorts` and `engine/cohorts.py`."""
        if self._strategy is None or self.prefix is None:
            return [[i] for i in range(len(sets))]
        alike: dict[object, list[int]] = {}
        for i, sites in enumerate(sets):
            served = self._strategy.serves(sites)
            alike.setdefault(self._strategy.tokens_of(sites) if served else f"alone {i}", []).append(i)
        chain, found = self._data.chain, []
        widths = [state.shape[-1] for state in self.prefix.states.values()]
        fixed = fixed_cost(max(widths, default=None), self.backbone.device.type)
        for numbers in alike.values():
            starts = [chain.before(sets[i]) for i in numbers]
            tokens = self._strategy.length_of(sets[numbers[0]])
            cohorts = cohorts_of(starts, len(chain.blocks), rows, tokens, fixed)
            found += [[numbers[i] for i in cohort] for cohort in cohorts]
        return found

    def _strategy_for(self, parts: Sequence[Part]) -> Strategy | None:
        """The strategy by which these runs can start in the middle; None if they cannot. Errors as in `logits`."""
        for part in parts:
            expect_rows(part.rows)
            expect_edits(part.edits)
            unknown = [site for site in part.edits if site not in self.sites]
            if unknown:
                raise ValueError(
                    f"{unknown} were not named when this FrozenPast was made; it serves {list(self.sites)}."
                )
        if self._strategy is None:
            return None
        changed = self._fingerprint.changed()
        if changed:
            raise RuntimeError(
                f"The model or the data set was changed after its past was computed ({changed}); make a new FrozenPast."
            )
        for part in parts:
            if not self._strategy.serves(tuple(part.edits)):
                say_once(
                    f"edits at {list(part.edits)} together run the whole model at each step, which is slower: no "
                    "states are stored for the token at which they begin. Give them as a tuple to FrozenPast."
                )
                return None
        return self._strategy

    # --- which strategy ---------------------------------------------------------------------------------------

    def _choose(self, budget: tuple[int, int]) -> str:
        """Choose the first strategy that can be used. Returns why no better one can, in words."""
        refused = self._not_frozen()
        if refused is not None:
            _notify(refused, "plain runs of the whole model")
            return refused.reason
        for kind in STRATEGIES:
            failed = kind.refusal(self._data) or self._try(kind, budget)
            if failed is None:
                break
            refused = failed
        if refused is not None:
            _notify(
                refused, "plain runs of the whole model" if self._strategy is None else f"resuming by {self.mode}"
            )
        return "" if refused is None else refused.reason

    def _not_frozen(self) -> Refusal | None:
        """Why nothing before an edit can be computed once; None if it can."""
        varies = why_not_frozen(self.backbone.model)
        if varies:
            return Refusal(f"{varies}: the past is not frozen")
        if getattr(getattr(self.backbone.model, "config", None), "is_encoder_decoder", False):
            return Refusal("encoder-decoder", expected=True)
        if not self._data.chain.blocks:
            return Refusal("no chain of blocks below the sites", expected=True)
        real = self.batch.real_tokens()
        if real is not None and bool((real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any()):
            # The positions in such rows depend on the other rows of their batch.
            return Refusal("the attention mask has holes")
        longest = depends_on_longest(self.backbone.model, reaches(self._data.batch))
        return None if longest is None else Refusal(longest)

    # --- the pass over the data -------------------------------------------------------------------------------

    def _try(self, kind: type[Strategy], budget: tuple[int, int]) -> Refusal | None:
        """Compute the prefix by a strategy and check it. Returns why it cannot be used; None if it can."""
        try:
            strategy = kind(self._data)
            first = strategy.compute(torch.arange(min(len(self), self.chunk)))
        except Exception as failure:  # an unfamiliar model may raise anything with a cache or a skipped block
            return _failed_check(kind, _one_line(failure))
        rows = min(len(self), self.chunk)
        device, where = placement(first.nbytes(), rows, len(self), budget, self.backbone.device)
        if device is None and not strategy.recomputable:
            return Refusal(
                f"resuming by {kind.name} would cost more than it saves: its states would be {where}",
                notice=f"the states that resuming by {kind.name} needs do not fit the memory budget",
            )
        try:
            prefix = None if device is None else self._fill(strategy, first, device)
            # The lambda must not refer to self: this cycle would keep the stored tensors until garbage collection.
            batch, readout = self.batch, self.readout
            fingerprint = Fingerprint(
                self.backbone.model, lambda: tensors_of(batch, readout.index, readout.valid, readout.tokens)
            )
            self.prefix = prefix
            wrong = self._disagreement(strategy)
            fingerprint.settle()
            changed = fingerprint.changed()
            if wrong is None and changed:
                wrong = f"running the model changes it: {changed}"
        except Exception as failure:
            wrong = _one_line(failure)
        if wrong is not None:
            self.prefix = None
            return _failed_check(kind, wrong)
        self._strategy, self._fingerprint, self._where = strategy, fingerprint, where
        if device is None:
            say_once(
                "the computed prefix does not fit the memory budget, and is computed again for each batch, which is "
                "slower; describe() has the figures."
            )
        return None

    def _fill(self, strategy: Strategy, first: Prefix, device: torch.device) -> Prefix:
        """The prefix of the whole data set; that of the first chunk is already computed."""
        pinned = device.type == "cpu" and self.backbone.device.type == "cuda"
        whole = first.room_for(len(self), device, pinned)
        for start in range(0, len(self), self.chunk):
            rows = torch.arange(start, min(len(self), start + self.chunk))
            whole.put(start, first if start == 0 else strategy.compute(rows))
        return whole

    def _disagreement(self, strategy: Strategy) -> str | None:
        """Why resumed runs differ from plain ones; None if they agree on a few rows and the outermost sites."""
        real = self.batch.real_tokens()
        lengths = torch.zeros(len(self)) if real is None else real.sum(1).cpu()
        more_rows, more_sites = strategy.trial()
        rows = torch.cat([lengths.topk(min(2, len(self))).indices, lengths.argmin()[None], *more_rows]).unique()
        by_depth = sorted(self.sites, key=lambda site: self._data.chain.boundary[site])
        readout = self.readout.over_vocabulary()  # two logits may both be near 0, a whole vocabulary's are not
        plain = PlainEngine(self.backbone, self.batch, readout)

        def resumed(rows: Tensor, edits: Edits) -> Tensor:
            return self._resume(strategy, [Part(rows, edits)], readout)

        sites = [by_depth[0], by_depth[-1], *more_sites]
        # If lengths differ, the shortest row is also tried alone: what depends on the longest row differs there.
        alone = [lengths.argmin()[None]] if lengths.min() < lengths.max() else []
        for some in [rows, *alone]:
            valid = readout.rows(some).valid
            wrong = disagreement(resumed, plain.logits, some, sites, valid, writes=strategy.writes)
            if wrong is not None:
                return wrong if len(some) > 1 else f"{wrong}, of the shortest row alone"
        return None

    # --- resuming ---------------------------------------------------------------------------------------------

    def _resume(
        self, strategy: Strategy, parts: Sequence[Part], readout: Readout, unmatched: Unmatched = "refuse"
    ) -> Tensor:
        """One run, from the first block that any part edits. Rows of deeper parts also run the blocks before theirs.

        Before their own first edit these rows have their unedited states, so nothing must be inserted for them.
        """
        rows = torch.cat([part.rows.cpu() for part in parts])
        prefix, at = (
            (strategy.compute(rows), torch.arange(len(rows))) if self.prefix is None else (self.prefix, rows)
        )
        chain = self._data.chain
        lowest = min(parts, key=lambda part: chain.before(part.edits))
        run = strategy.resume(rows, tuple(lowest.edits), readout, prefix, at)
        hooks, start = [], 0
        for part in parts:
            resolved = run.resolved if len(parts) == 1 else strategy.resolved(part.rows.cpu(), tuple(part.edits))
            own = edit_hooks(part.edits, resolved, part.sources, unmatched)
            place = slice(start, start + len(part.rows))
            hooks += own if len(parts) == 1 else [_within(hook, place) for hook in own]
            start = place.stop
        hooks = chain.resuming(run.boundary, run.states, grouped(hooks))
        return self.plain.reader.run(run.inputs, hooks, run.readout, self._weights)


def _within(hook: Hook, place: slice) -> Hook:
    """A hook that sees only some rows of a batch."""

    def act(value: Tensor) -> Tensor | None:
        new = hook.act(value[place])
        return None if new is None else torch.cat([value[: place.start], new, value[place.stop :]])

    return replace(hook, act=act)


def _sites_and_groups(sites: Any) -> tuple[list[Site], list[tuple[Site, ...]]]:
    """All sites, each once, and the tuples of sites that are edited together."""
    if isinstance(sites, Site | str) or not isinstance(sites, Iterable):
        expect_sites(sites)  # raises the error
    items = list(sites)
    together = [tuple(expect_sites(item)) for item in items if isinstance(item, tuple)]
    single = [item for item in items if not isinstance(item, tuple)]
    listed = list(dict.fromkeys([*expect_sites(single), *(site for group in together for site in group)]))
    if not listed:
        raise ValueError("A frozen past needs the sites that will be edited; none were given.")
    return listed, together


def _notify(refused: Refusal, instead: str) -> None:
    if not refused.expected:
        say_once(f"{instead} instead of a faster way: {refused.notice or refused.reason}.")


def _failed_check(kind: type[Strategy], why: str) -> Refusal:
    refused = f"resuming by {kind.name} was refused by its check"
    return Refusal(f"{refused}: {why}", notice=f"{refused}; describe() says why")


def _one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
