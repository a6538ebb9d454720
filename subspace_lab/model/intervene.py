"""Running a model with edits: `forward`, `generate`, `collect`.

A model with edits is a model and `{site: intervention}`. Everything is checked before anything runs: the sites exist,
two edits of one stream have disjoint positions or columns, and widths and sources fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.model.arguments import expect_edits, expect_sites
from subspace_lab.model.backbone import Backbone, Hook, expect_backbone, frozen
from subspace_lab.model.batches import Batch, model_inputs
from subspace_lab.model.cache_argument import generate_name, given_cache, named_for, without_cache
from subspace_lab.model.edits import (
    Edits,
    Groups,
    Sources,
    checked_groups,
    edit_hooks,
    grouped,
    new_token_hooks,
    of_rows,
)
from subspace_lab.model.passes import check_passes, setting
from subspace_lab.model.resolved_sites import ResolvedSite, resolve, resolve_prompt
from subspace_lab.model.sources import MISSING, Unmatched, expect_numbers


def forward(
    backbone: Backbone,
    batch: Batch | Mapping[str, Any] | Tensor,
    edits: Edits,
    *,
    sources: Sources | None = None,
    unmatched: Unmatched = "refuse",
    train_base: bool = False,
    also: Sequence[Hook] = (),
    groups: Groups = (),
    call: Callable[..., Any] | None = None,
) -> Any:
    """The model's own output with the edits.

    Args:
        backbone: the model.
        batch: the model's inputs, with prompt lengths and position columns if the sites need them.
        edits: {site: intervention}; any callable (states) → states can be used as an intervention.
        sources: {site: (batch, positions, width) states, as `collect` returns them} for interchange interventions;
            {variable: states} if several variables share the site's basis.
        unmatched: for positions that only a row or only its source has: "refuse" raises, "keep_base" does not change
            the base there. f- and l-terms are matched from their own end.
        train_base: also compute gradients for the model's own parameters (those that require them).
        also: further hooks.
        groups: further edits, each for some examples of the batch: (their numbers, {site: intervention}). No example is
            in two groups.
        call: what is run with these inputs, a part of the model that takes them; by default the model.

    Raises:
        TypeError: a model instead of a backbone, or another argument of the wrong type.
        ValueError: overlapping sites; a source that is missing, not needed, or of a wrong shape; a wrong width; a row
            whose number of positions is not that of its source.
        IndexError: a layer or a position that does not exist.
    """
    expect_backbone(backbone)
    expect_edits(edits)
    batch = Batch.of(batch)
    resolved = {site: resolve(backbone, batch, site) for site in edits}
    hooks = [*edit_hooks(edits, resolved, sources, unmatched)]
    for rows, some in checked_groups(groups, batch):
        within = {site: resolve(backbone, batch.rows(rows), site).among(rows, len(batch)) for site in some}
        hooks += edit_hooks(of_rows(some, within, rows, len(batch)), within)
    inputs = model_inputs(backbone.model, batch)
    hooks = [*grouped(hooks), *also]
    if train_base:
        return backbone.run(inputs, hooks, call=call)
    with frozen(backbone.model):
        return backbone.run(inputs, hooks, call=call)


def collect(
    backbone: Backbone, batch: Batch | Mapping[str, Any] | Tensor, sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """The states at the sites in a run without edits: {site: (batch, positions, width)}, without gradients.

    Rows with fewer positions than others are filled up at the end with NaN, so that a mean over these entries is NaN
    too. A stream without positions gives (batch, width). The run ends after the last site.

    Raises:
        TypeError: a model instead of a backbone, or one site instead of several.
        ValueError, IndexError: sites that the model or the batch does not have.
        ValueError: states that are NaN although the row has this position.
    """
    expect_backbone(backbone)
    batch = Batch.of(batch)
    resolved = [resolve(backbone, batch, site) for site in dict.fromkeys(expect_sites(sites))]
    return states_at(backbone, batch, resolved)


def states_at(
    backbone: Backbone, batch: Batch, resolved: Sequence[ResolvedSite], also: Sequence[Hook] = ()
) -> dict[Site, Tensor]:
    """The states at sites that are resolved in this batch. Otherwise, and in its errors, like `collect`.

    Args:
        also: hooks, as `edit_hooks` returns them. What they change on a site's stream is changed before it is read.
    """
    found: dict[Site, Tensor] = {}
    readers = [Hook(p.hook_point.path, p.hook_point.side, p.hook_point.order, _reader(p, found)) for p in resolved]
    with torch.no_grad():
        backbone.run(model_inputs(backbone.model, batch), grouped([*also, *readers]), stop=True)
    for place in resolved:
        expect_numbers(place, found[place.site])
    return found


def generate(
    backbone: Backbone,
    batch: Batch | Mapping[str, Any] | Tensor,
    edits: Edits,
    *,
    sources: Sources | None = None,
    unmatched: Unmatched = "refuse",
    every_token: bool = False,
    also: Sequence[Hook] = (),
    groups: Groups = (),
    **generation: Any,
) -> Any:
    """The model's own `generate` with an edited prompt.

    The edits are made once, in the prefill (the pass over the prompt), and their effect stays in the key-value cache:
    decoding runs at the model's own speed. With `use_cache=False` the prompt is run again in each step, with the edits;
    both give the same tokens. Beams, sampling and streamers are those of `generate`.

    Args:
        backbone, batch, edits, sources, unmatched: as in `forward`.
        every_token: edit each generated token as well.
        also: further hooks, at the steps that each of them names.
        groups: as in `forward`.
        generation: keyword arguments of the model's `generate`, which checks them. With `cache` (or its older name
            `past_key_values`) the prompt is the whole conversation; positions that are in the cache stay as they were
            cached.

    Assisted generation checks several tokens in one pass; tokens of the prompt and tokens after it are distinguished.
    It needs an assistant whose passes are not the model's own.

    Raises:
        TypeError: a model without `generate`; otherwise as in `forward`.
        ValueError: an edit of generated tokens that needs a source; an assistant that runs the model's own layers; a
            prompt in chunks; any other setting with which the first pass is not over the prompt; otherwise as in
            `forward`.
        IndexError: as in `forward`.
    """
    expect_backbone(backbone)
    expect_edits(edits)
    run = getattr(backbone.model, "generate", None)
    if run is None:
        raise TypeError(f"{type(backbone.model).__name__} has no generate.")
    batch = Batch.of(batch).continuing(given_cache(generation))
    generation = without_cache(generation)
    cached = setting(backbone.model, generation, "use_cache") is not False
    resolved = {site: resolve_prompt(backbone, batch, site) for site in edits}
    prompt = edit_hooks(edits, resolved, sources, unmatched)
    new = [(site, edit, resolved[site]) for site, edit in edits.items()]
    for rows, some in checked_groups(groups, batch):
        within = {site: resolve_prompt(backbone, batch.rows(rows), site).among(rows, len(batch)) for site in some}
        edited = of_rows(some, within, rows, len(batch), new_too=True)
        prompt += edit_hooks(of_rows(some, within, rows, len(batch)), within)
        new += [(site, edit, within[site]) for site, edit in edited.items()]
    if prompt or also:
        check_passes(backbone.model, generation, every_token, cached, batch.cached)
    # The encoder runs once.
    encoder = {p.hook_point.path for _, _, p in new if p.hook_point.stack == "encoder"}
    hooks = [replace(hook, steps="first" if cached or hook.path in encoder else "every") for hook in prompt]
    if any(p.hook_point.stack == "decoder" for _, _, p in new):
        _check_start(batch, setting(backbone.model, generation, "decoder_start_token_id"))
    if every_token:
        hooks += [
            hook
            for site, edit, at in new
            if at.hook_point.path not in encoder
            for hook in new_token_hooks(backbone, batch, site, edit, cached)
        ]
    with torch.no_grad():
        inputs = {**named_for(generate_name(backbone.model), batch.inputs), **generation}
        return backbone.run(inputs, [*grouped(hooks), *also], call=run, every_step=True)


def _check_start(batch: Batch, start: int | None) -> None:
    """ValueError for decoder inputs before which `generate` would put a token, so that all positions would change."""
    ids = batch.inputs.get("decoder_input_ids")
    if isinstance(ids, Tensor) and start is not None and bool((ids[:, 0] != start).any()):
        raise ValueError(
            f"Generation puts the start token {start} before decoder_input_ids that do not begin with it, and "
            "positions of the decoder would no longer be those of the batch: begin each row with it."
        )


def _reader(resolved: ResolvedSite, found: dict[Site, Tensor]) -> Callable[[Tensor], None]:
    def read(value: Tensor) -> None:
        found[resolved.site] = resolved.read(value, MISSING).detach().clone()

    return read
