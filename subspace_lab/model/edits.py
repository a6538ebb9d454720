"""Edits, `{site: intervention}`, as hooks of a model; they are checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.values import Source
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.batches import Batch
from subspace_lab.model.resolved_sites import ResolvedSite, check_disjoint
from subspace_lab.model.sources import Unmatched, expect_unmatched, filled, fitted, has_missing

Edit = Callable[..., Tensor]
"""(states) → states of the same shape and dtype, or (states, source) → states; usually an intervention."""
Edits = Mapping[Site, Edit]
Groups = Sequence[tuple[Tensor, Edits]]
"""Edits of some examples of a batch: (the examples' numbers, {site: intervention})."""
Sources = Mapping[Site, Source]


def edit_hooks(
    edits: Edits,
    resolved: Mapping[Site, ResolvedSite],
    sources: Sources | None = None,
    unmatched: Unmatched = "refuse",
) -> list[Hook]:
    """The edits as hooks, one for each stream that is edited.

    Args:
        edits: {site: intervention}.
        resolved: {site: its resolved form in the rows that are run}, for all sites of the edits; others are ignored.
        sources: {site: states of these rows} for interchange interventions.
        unmatched: for positions that only a base or only its source has: "refuse" raises, "keep_base" does not change
            the base's states there.

    Raises:
        TypeError: an edit that cannot be called.
        ValueError: overlapping sites; a source that is missing, not needed, or of a wrong shape; a wrong width; a row
            whose number of positions is not that of its source.
    """
    expect_unmatched(unmatched)
    sources = dict(sources or {})
    unknown = [s for s in sources if s not in edits]
    if unknown:
        raise ValueError(f"Sources for {unknown}, but the edits are at {list(edits)}.")
    check_disjoint([resolved[site] for site in edits])
    hooks = []
    for site, edit in edits.items():
        if isinstance(edit, Intervention):
            width = resolved[site].hook_point.width
            if width is not None and edit.width != width:
                raise ValueError(f"{site} has width {width}; its intervention was made for {edit.width}.")
            if edit.needs_source != (site in sources):
                raise ValueError(
                    f"{site}: an interchange needs the source's states, and no other intervention takes them; "
                    f"there are sources for {list(sources)}."
                )
        elif not callable(edit):
            raise TypeError(f"{site}: an edit must be an intervention or a function of states, not {edit!r}.")
        source = fitted(resolved[site], sources.get(site), unmatched)
        # If all rows have all positions, and base and source were matched, no entry is missing.
        ragged = resolved[site].present is not None or unmatched != "refuse"
        fill = ragged and has_missing(source)
        hooks.append(_edit_hook(resolved[site], edit, source, site in sources, fill))
    return grouped(hooks)


def checked_groups(groups: Groups, batch: Batch) -> Groups:
    """Checked groups of examples with their own edits. ValueError for an example in two groups or not in the batch."""
    chosen = [i for rows, _ in groups for i in rows.tolist()]
    if len(set(chosen)) < len(chosen) or any(not 0 <= i < len(batch) for i in chosen):
        raise ValueError(f"Groups of examples {sorted(chosen)} of a batch of {len(batch)}: each at most once.")
    return groups


def of_rows(
    edits: Edits, resolved: Mapping[Site, ResolvedSite], rows: Tensor, count: int, new_too: bool = False
) -> dict[Site, Edit]:
    """The edits, restricted to some rows if the site alone does not say which rows it is in.

    Args:
        rows: the numbers of these rows.
        count: how many rows there are in all.
        new_too: for generated tokens too, about which a site says nothing.
    """
    return {
        site: _OfRows(edit, rows, count) if new_too or resolved[site].index is None else edit
        for site, edit in edits.items()
    }


@dataclass(frozen=True)
class _OfRows:
    """An edit of some rows' states. With beam search each row occurs once for each of its beams, one after the
    other."""

    edit: Edit
    rows: Tensor
    count: int

    def __call__(self, states: Tensor) -> Tensor:
        beams = len(states) // self.count
        rows = self.rows.to(states.device)[:, None] * beams + torch.arange(beams, device=states.device)
        return states.index_copy(0, rows.flatten(), self.edit(states[rows.flatten()]))


def new_token_hooks(backbone: Backbone, batch: Batch, site: Site, edit: Edit, cached: bool) -> list[Hook]:
    """Hooks for the edit of the tokens that a generation adds after the batch.

    Args:
        cached: whether a pass runs only the new tokens, as with a key-value cache, or all tokens again. The first pass
            runs the prompt, and in assisted generation also tokens that were guessed after it.

    Raises:
        ValueError: an interchange, because its source has no such tokens.
    """
    if isinstance(edit, Intervention) and edit.needs_source:
        raise ValueError(f"{site}: the source has no tokens to swap with those that are being generated.")
    hook_point = backbone.hook_point(site)
    real = batch.real_tokens(hook_point.stack)
    # 1 for a decoder's start token
    prompt = 1 if real is None else real.shape[1] - (0 if hook_point.stack else batch.cached)
    everything = ResolvedSite(site, hook_point, len(batch))

    def act(value: Tensor) -> Tensor:
        return everything.put(value, edit(everything.read(value)))

    def act_on_new(value: Tensor) -> Tensor | None:
        new = value[:, prompt:]
        return torch.cat([value[:, :prompt], act(new)], 1) if new.shape[1] else None

    place = (hook_point.path, hook_point.side, hook_point.order)
    if not cached:
        return [Hook(*place, act_on_new, "every")]
    return [Hook(*place, act_on_new, "first"), Hook(*place, act, "later")]


def grouped(hooks: list[Hook]) -> list[Hook]:
    """One hook for each stream. Several edits of a stream act one after the other on the same value."""
    streams: dict[tuple[str, str, str], list[Hook]] = {}
    for hook in hooks:
        streams.setdefault((hook.path, hook.side, hook.steps), []).append(hook)
    return [group[0] if len(group) == 1 else _in_sequence(group) for group in streams.values()]


def _in_sequence(group: list[Hook]) -> Hook:
    def act(value: Tensor) -> Tensor | None:
        changed = False
        for hook in group:
            new = hook.act(value)
            value, changed = (value, changed) if new is None else (new, True)
        return value if changed else None

    return replace(group[0], order=min(hook.order for hook in group), act=act)


def _edit_hook(resolved: ResolvedSite, edit: Edit, source: Source, with_source: bool, fill: bool) -> Hook:
    def act(value: Tensor) -> Tensor:
        states = resolved.read(value)
        if with_source:
            own = _repeated(source, len(states))
            new = edit(states, filled(own, states) if fill else own)
        else:
            new = edit(states)
        if new.shape != states.shape or new.dtype != states.dtype:
            raise ValueError(
                f"{resolved.site}: the edit of states {tuple(states.shape)} {states.dtype} gave "
                f"{tuple(new.shape)} {new.dtype}; shape and dtype must stay."
            )
        return resolved.put(value, new)

    return Hook(resolved.hook_point.path, resolved.hook_point.side, resolved.hook_point.order, act)


def _repeated(source: Source, rows: int) -> Source:
    """A source, repeated for each beam of its row."""
    if isinstance(source, Mapping):
        return {name: _repeated(states, rows) for name, states in source.items()}  # type: ignore[misc]
    if source is None or len(source) == rows:
        return source
    return source.repeat_interleave(rows // len(source), 0)
