"""Running a model with edits: `forward`, `generate`, `collect`.

A model with edits is a model and `{site: intervention}`. Everything is checked before anything runs: that the
sites exist, that two edits of one stream have disjoint positions or columns, that widths and sources fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.values import Source
from subspace_lab.model.backbone import Backbone, Hook, frozen
from subspace_lab.model.batches import Batch
from subspace_lab.model.resolved_sites import ResolvedSite, check_disjoint, resolve

Edit = Callable[..., Tensor]
Edits = Mapping[Site, Edit]
Sources = Mapping[Site, Source]


def forward(
    backbone: Backbone,
    batch: Batch | Mapping[str, Any] | Tensor,
    edits: Edits,
    *,
    sources: Sources | None = None,
    train_base: bool = False,
    also: Sequence[Hook] = (),
) -> Any:
    """The model's own output with the edits in force.

    Args:
        backbone: of the model.
        batch: the model's inputs, with prompt lengths and position columns where the sites ask for them.
        edits: {site: intervention}; any callable (states) → states serves as an intervention.
        sources: {site: states, as `collect` gives them} for interchange interventions; {variable: states}
            where several variables share the site's basis.
        train_base: let gradients reach the model's own parameters too (those that ask for them).
        also: further hooks.

    Raises:
        ValueError: overlapping sites, a missing, superfluous or misshapen source, a wrong width.
        IndexError: a layer or a position that does not exist.
    """
    batch = Batch.of(batch)
    hooks = [*edit_hooks(backbone, batch, edits, sources), *also]
    inputs = model_inputs(backbone.model, batch)
    if train_base:
        return backbone.run(inputs, hooks)
    with frozen(backbone.model):
        return backbone.run(inputs, hooks)


def collect(
    backbone: Backbone, batch: Batch | Mapping[str, Any] | Tensor, sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """The states at the sites in a plain run: {site: (batch, positions, width)}, without gradient.

    A stream without positions gives (batch, width). The run ends after the last site.
    """
    batch = Batch.of(batch)
    resolved = [resolve(backbone, batch, site) for site in dict.fromkeys(sites)]
    found: dict[Site, Tensor] = {}
    hooks = [Hook(p.hook_point.path, p.hook_point.side, p.hook_point.order, _keeper(p, found)) for p in resolved]
    with torch.no_grad():
        backbone.run(model_inputs(backbone.model, batch), _grouped(hooks), stop=True)
    return found


def generate(
    backbone: Backbone,
    batch: Batch | Mapping[str, Any] | Tensor,
    edits: Edits,
    *,
    sources: Sources | None = None,
    every_token: bool = False,
    also: Sequence[Hook] = (),
    **generation: Any,
) -> Any:
    """The model's own `generate`, its prompt edited.

    The edits happen once, in the pass over the prompt, and live on in the key-value cache: decoding runs at
    the model's own speed. With `use_cache=False` the prompt is run again at each step, and so is the edit; both
    give the same tokens. Beams, sampling and streamers are `generate`'s own.

    Args:
        backbone, batch, edits, sources: as in `forward`.
        every_token: edit each generated token as well, where it stands.
        also: further hooks, at the steps that each of them names.
        generation: keyword arguments of the model's `generate`, which checks them. With `past_key_values` the
            prompt is the whole conversation; of its positions those in the cache stay as they were cached.
    """
    batch = Batch.of(batch).continuing(generation.pop("past_key_values", None))
    run = getattr(backbone.model, "generate", None)
    if run is None:
        raise TypeError(f"{type(backbone.model).__name__} has no generate.")
    cached = setting(backbone.model, generation, "use_cache") is not False
    prompt = edit_hooks(backbone, batch, edits, sources, growing=True)
    # The encoder runs once.
    encoder = {point.path for point in map(backbone.hook_point, edits) if point.stack == "encoder"}
    hooks = [replace(v, steps="first" if cached or v.path in encoder else "every") for v in prompt]
    if any(backbone.hook_point(site).stack == "decoder" for site in edits):
        _check_start(batch, setting(backbone.model, generation, "decoder_start_token_id"))
    if every_token:
        hooks += [
            _new_tokens(backbone, batch, site, edit, cached)
            for site, edit in edits.items()
            if backbone.hook_point(site).path not in encoder
        ]
    with torch.no_grad():
        inputs = {**batch.inputs, **generation}
        return backbone.run(inputs, [*_grouped(hooks), *also], call=run, every_step=True)


def setting(model: nn.Module, generation: Mapping[str, Any], name: str) -> Any:
    """What `generate` goes by: its keyword, else the configuration it was given, else the model's own."""
    configs = (generation.get("generation_config"), getattr(model, "generation_config", None))
    wishes = (generation.get(name), *(getattr(config, name, None) for config in configs))
    return next((wish for wish in wishes if wish is not None), None)


def _check_start(batch: Batch, start: int | None) -> None:
    """Refuse decoder inputs before which `generate` would put a token, and so move every position."""
    ids = batch.inputs.get("decoder_input_ids")
    if isinstance(ids, Tensor) and start is not None and bool((ids[:, 0] != start).any()):
        raise ValueError(
            f"Generation puts the start token {start} before decoder_input_ids that do not begin with it, and "
            "positions of the decoder would no longer be those of the batch: begin each row with it."
        )


def _new_tokens(backbone: Backbone, batch: Batch, site: Site, edit: Edit, cached: bool) -> Hook:
    """The edit of the tokens that generation adds."""
    if isinstance(edit, Intervention) and edit.needs_source:
        raise ValueError(f"{site}: the source has no tokens to swap with those that are being generated.")
    hook_point = backbone.hook_point(site)
    real = batch.real_tokens(hook_point.stack)
    prompt = 1 if real is None else real.shape[1]  # 1: a decoder's start token
    whole = ResolvedSite(site, hook_point, None, None)

    def act(value: Tensor) -> Tensor | None:
        new = value if cached else value[:, prompt:]
        if not new.shape[1]:
            return None
        edited = whole.put(new, edit(whole.read(new)))
        return edited if cached else torch.cat([value[:, :prompt], edited], 1)

    return Hook(hook_point.path, hook_point.side, hook_point.order, act, "later" if cached else "every")


def edit_hooks(
    backbone: Backbone,
    batch: Batch,
    edits: Edits,
    sources: Sources | None = None,
    *,
    growing: bool = False,
    resolved: Mapping[Site, ResolvedSite] | None = None,
) -> list[Hook]:
    """The edits as hooks of the backbone, checked; `resolved` where they are known already."""
    sources = dict(sources or {})
    unknown = [s for s in sources if s not in edits]
    if unknown:
        raise ValueError(f"Sources for {unknown}, but the edits are at {list(edits)}.")
    if resolved is None:
        resolved = {site: resolve(backbone, batch, site, growing=growing) for site in edits}
    check_disjoint(list(resolved.values()))
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
        source = sources.get(site)
        _check_source(resolved[site], source, batch)
        hooks.append(_edit_hook(resolved[site], edit, source, site in sources))
    return _grouped(hooks)


def model_inputs(model: nn.Module, batch: Batch) -> Mapping[str, Any] | Sequence[Any]:
    """The keyword arguments of the forward pass.

    A decoder given a left-padded batch counts its positions from the padding; `generate` mends that, a plain
    forward does not, so it is mended here: position_ids from the attention mask, as `generate` makes them.
    """
    if batch.positional is not None:
        return [batch.positional]
    inputs = dict(batch.inputs)
    mask = inputs.get("attention_mask")
    if (
        mask is None
        or mask.ndim != 2
        or "position_ids" in inputs
        or "past_key_values" in inputs
        or "position_ids" not in inspect.signature(model.forward).parameters
        or bool(mask[:, 0].all())
        or _counts_from_padding(model)
    ):
        return inputs
    inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return inputs


def _counts_from_padding(model: nn.Module) -> bool:
    """RoBERTa and its kin find positions by the padding token, and count them from its index."""
    return any(
        path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for path, module in model.named_modules()
    )


def _keeper(resolved: ResolvedSite, found: dict[Site, Tensor]) -> Callable[[Tensor], None]:
    def keep(value: Tensor) -> None:
        found[resolved.site] = resolved.read(value).detach().clone()

    return keep


def _edit_hook(resolved: ResolvedSite, edit: Edit, source: Source, with_source: bool) -> Hook:
    def act(value: Tensor) -> Tensor:
        states = resolved.read(value)
        given = _repeated(source, len(states)) if with_source else None
        new = edit(states, given) if with_source else edit(states)
        if new.shape != states.shape or new.dtype != states.dtype:
            raise ValueError(
                f"{resolved.site}: the edit of states {tuple(states.shape)} {states.dtype} gave "
                f"{tuple(new.shape)} {new.dtype}; shape and dtype must stay."
            )
        return resolved.put(value, new)

    return Hook(resolved.hook_point.path, resolved.hook_point.side, resolved.hook_point.order, act)


def _repeated(source: Source, rows: int) -> Source:
    if isinstance(source, Mapping):
        return {name: _repeated(states, rows) for name, states in source.items()}  # type: ignore[misc]
    if source is None or len(source) == rows:
        return source
    return source.repeat_interleave(rows // len(source), 0)


def _grouped(hooks: list[Hook]) -> list[Hook]:
    """One hook a stream: several edits of it act one after the other on one value."""
    streams: dict[tuple[str, str, str], list[Hook]] = {}
    for hook in hooks:
        streams.setdefault((hook.path, hook.side, hook.steps), []).append(hook)
    return [group[0] if len(group) == 1 else _chain(group) for group in streams.values()]


def _chain(group: list[Hook]) -> Hook:
    def act(value: Tensor) -> Tensor | None:
        changed = False
        for hook in group:
            new = hook.act(value)
            value, changed = (value, changed) if new is None else (new, True)
        return value if changed else None

    return Hook(group[0].path, group[0].side, min(v.order for v in group), act, group[0].steps)


def _check_source(resolved: ResolvedSite, source: Source, batch: Batch) -> None:
    real = batch.real_tokens(resolved.hook_point.stack)
    axis = real if resolved.index is None else resolved.index
    by_path = (
        resolved.site.layer is None and resolved.site.positions == "all"
    )  # what shape is there the run will tell
    for states in source.values() if isinstance(source, Mapping) else [source]:
        if states is None:
            continue
        if len(states) != len(batch):
            raise ValueError(
                f"{resolved.site}: {len(states)} source states for {len(batch)} base rows; each row of the base "
                "needs its own source."
            )
        if resolved.hook_point.width is not None and states.shape[-1] != resolved.hook_point.width:
            raise ValueError(
                f"{resolved.site} has width {resolved.hook_point.width}; its source has {states.shape[-1]}."
            )
        if axis is None or by_path:
            continue
        if states.ndim != 3 or states.shape[1] != axis.shape[1]:
            raise ValueError(
                f"{resolved.site}: a source of shape {tuple(states.shape)} (batch, positions, width); "
                f"the base has {axis.shape[1]} positions a row."
            )
