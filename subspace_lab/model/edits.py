"""Edits as hooks of a model: `{site: intervention}`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

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
"""(states) → states of the same shape and dtype, or (states, source) → states: an intervention, as a rule."""
Edits = Mapping[Site, Edit]
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
        resolved: {site: where it is in the rows that are run}, of the edits' sites and perhaps of others.
        sources: {site: states of these rows} for interchange interventions.
        unmatched: "refuse" a source that has more or fewer positions than its base, or "keep_base" there.

    Raises:
        TypeError: an edit that cannot be called.
        ValueError: overlapping sites, a missing, superfluous or misshapen source, a wrong width, a row with another
            number of positions than its source.
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
                    f"{site}: an interchange needs the source's states and no other intervention takes them; "
                    f"sources given for {list(sources)}."
                )
        elif not callable(edit):
            raise TypeError(f"{site}: an edit is an intervention or a function of states, not {edit!r}.")
        source = fitted(resolved[site], sources.get(site), unmatched)
        # Of positions that all rows have and that were matched nothing is missing.
        ragged = resolved[site].present is not None or unmatched != "refuse"
        fill = ragged and has_missing(source)
        hooks.append(_edit_hook(resolved[site], edit, source, site in sources, fill))
    return grouped(hooks)


def new_token_hook(backbone: Backbone, batch: Batch, site: Site, edit: Edit, cached: bool) -> Hook:
    """The edit of the tokens that a generation adds behind the batch.

    Args:
        cached: whether a step runs the new token alone, as with a key-value cache, or all tokens again.

    Raises:
        ValueError: an interchange, whose source has no such tokens.
    """
    if isinstance(edit, Intervention) and edit.needs_source:
        raise ValueError(f"{site}: the source has no tokens to swap with those that are being generated.")
    hook_point = backbone.hook_point(site)
    real = batch.real_tokens(hook_point.stack)
    prompt = 1 if real is None else real.shape[1]  # 1: a decoder's start token
    everything = ResolvedSite(site, hook_point, len(batch))

    def act(value: Tensor) -> Tensor | None:
        new = value if cached else value[:, prompt:]
        if not new.shape[1]:
            return None
        edited = everything.put(new, edit(everything.read(new)))
        return edited if cached else torch.cat([value[:, :prompt], edited], 1)

    return Hook(hook_point.path, hook_point.side, hook_point.order, act, "later" if cached else "every")


def grouped(hooks: list[Hook]) -> list[Hook]:
    """One hook for each stream: several edits of it act one after the other on one value."""
    streams: dict[tuple[str, str, str], list[Hook]] = {}
    for hook in hooks:
        streams.setdefault((hook.path, hook.side, hook.steps), []).append(hook)
    return [group[0] if len(group) == 1 else _one_after_the_other(group) for group in streams.values()]


def _one_after_the_other(group: list[Hook]) -> Hook:
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
    """A source for each beam of its row."""
    if isinstance(source, Mapping):
        return {name: _repeated(states, rows) for name, states in source.items()}  # type: ignore[misc]
    if source is None or len(source) == rows:
        return source
    return source.repeat_interleave(rows // len(source), 0)
