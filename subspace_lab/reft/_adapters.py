"""Adapters: interventions at the sites of a model, and the modules that are trained with them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import instance
from subspace_lab.core.files import package_version
from subspace_lab.core.interventions import Intervention
from subspace_lab.core.parts import spans
from subspace_lab.core.sites import COMPONENTS, Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.model.offloading import is_unloaded
from subspace_lab.reft._alignment_start import Start, started
from subspace_lab.reft.config import ReftConfig

SAMPLE = 64  # entries of the embeddings that identify a base model


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as a file contains it: its configuration, its tensors and the alignment from which it started."""

    config: ReftConfig
    state: Mapping[str, Tensor]
    origin: Mapping[str, Any]


class Adapter(nn.Module):
    """The interventions of one adapter, and the modules that are trained with them.

    Attributes:
        config: the configuration of the adapter.
        sites: the sites that it edits.
        edits: its interventions, one for each site.
        saved: copies of modules of the base model that are trained with the edits and saved.
        origin: the alignment from which the adapter started, as JSON ({"variables": {site: variable}, "facts"}); empty
            if it started from random subspaces.
    """

    def __init__(self, config: ReftConfig, backbone: Backbone, start: Start | None = None) -> None:
        super().__init__()
        self.config = config
        self.sites = adapter_sites(config, backbone)
        self.origin: dict[str, Any] = {}
        if start is not None:
            names = dict(zip(map(str, self.sites), start.variables, strict=False))
            self.origin = {"variables": names, "facts": dict(start.facts)}
        found = {} if start is None else start.at(self.sites, backbone)
        self.edits = nn.ModuleList(
            config.intervention(backbone.width(site), config.seed * 100_003 + i, found.get(site))
            for i, site in enumerate(self.sites)
        ).to("meta" if is_unloaded(backbone.model) else backbone.device)
        self.saved = nn.ModuleDict()
        together: dict[int, Any] = {}  # one memo for all copies, so that tied parameters stay tied
        copied: list[str] = []
        for name in config.modules_to_save:
            paths = [p for p in backbone.anatomy.modules if p == name or p.endswith(f".{name}")]
            if not paths:
                raise ValueError(
                    f"modules_to_save names {name!r}; the model's own parts are "
                    f"{[n for n, _ in backbone.model.named_children()]}."
                )
            for path in paths:
                # A copy, so that the base model does not change.
                twin = copy.deepcopy(backbone.anatomy.modules[path], together)
                self.saved[_key(path)] = twin.requires_grad_(True)
                copied.append(path)
        _refuse_untying(copied, backbone.anatomy.modules)
        self._tied = _tied(self.saved)
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)

    def by_site(self) -> dict[Site, Intervention]:
        """{site: intervention}."""
        return dict(zip(self.sites, self.edits, strict=True))  # type: ignore[arg-type]

    def variables(self) -> dict[str, tuple[Site, Subspace]]:
        """{variable: (site, subspace that is edited there)}; a basis in parts gives one variable for each used part.

        The names are those of the alignment from which the adapter started, or of the parts, otherwise of the sites.
        """
        named, found = self.origin.get("variables", {}), {}
        for site, edit in self.by_site().items():
            if not self.config.parts:
                found[named.get(str(site), str(site))] = (site, edit.edited())
                continue
            for name, (start, stop) in spans(self.config.sizes).items():
                if set(range(start, stop)) <= set(edit.value.coordinates(edit.subspace.rank)):
                    shown = name if len(self.sites) == 1 else f"{site}/{name}"
                    found[shown] = (site, edit.subspace.sliced(start, stop))
        return found

    def train_parts(self, names: Sequence[str]) -> None:
        """Use only these parts of the bases in parts, and train only them from now on."""
        self.use_parts(names)
        for edit in self.by_site().values():
            edit.subspace.train_parts(names)
        self.asks_for_gradient(True)

    def use_parts(self, names: Sequence[str]) -> None:
        """Use only these parts of the bases in parts. ValueError for a name that is not one of their parts."""
        for edit in self.by_site().values():
            edit.value.use_parts(names)

    def asks_for_gradient(self, asks: bool) -> None:
        """Switch the training of the adapter on or off; of bases in parts only the trained parts are affected."""
        self.saved.requires_grad_(asks)
        for edit in self.by_site().values():
            edit.asks_for_gradient(asks)

    def expect_same_function(self, config: ReftConfig, backbone: Backbone) -> None:
        """ValueError if tensors of an adapter with another configuration would mean something else in this one."""
        same = ("method", "activation", "bias", "basis", "parts", "modules_to_save", "every_token")
        there, here = ({n: getattr(c, n) for n in same} for c in (config, self.config))
        there |= {"sites": list(map(str, adapter_sites(config, backbone)))}
        here |= {"sites": list(map(str, self.sites))}
        found = [f"{n} {there[n]!r}, here {here[n]!r}" for n in here if there[n] != here[n]]
        if found:
            raise ValueError(f"The tensors belong to an adapter with another configuration: {'; '.join(found)}.")

    def saved_at(self, path: str) -> nn.Module | None:
        """The trained copy of the base model's module at a path; None if there is none."""
        key = _key(path)
        return self.saved[key] if key in self.saved else None  # noqa: SIM401 (a ModuleDict has no get)

    def hooks(self, backbone: Backbone) -> list[Hook]:
        """The modules that replace modules of the base model."""
        position = backbone.anatomy.position
        # Such modules are heads, so they come after everything inside of the blocks.
        return [
            Hook(_path(key), "replace", (position[_path(key)], len(COMPONENTS)), module)
            for key, module in self.saved.items()
        ]


class Adapters(nn.ModuleDict):
    """The adapters of a model, by name."""

    def add(
        self,
        name: str,
        config_or_alignment: ReftConfig | Alignment,
        config: ReftConfig | None,
        backbone: Backbone,
    ) -> Adapter:
        """A new adapter, which does not require gradients yet. Errors as in `ReftModel.add_adapter`."""
        hint = "get_reft_model(model, ReftConfig(…)) or get_reft_model(model, alignment, config=ReftConfig(…))"
        instance(config_or_alignment, (ReftConfig, Alignment), "config_or_alignment", hint)
        instance(config, (ReftConfig, type(None)), "config", hint)
        start = None
        if isinstance(config_or_alignment, Alignment):
            config, start = started(config_or_alignment, config)
        elif config is not None:
            raise TypeError(f"Two configurations: config= is only for an alignment. Write {hint}.")
        else:
            config = config_or_alignment
        if name in self or hasattr(self, name) or "." in name:
            raise ValueError(f"Adapter name {name!r} is taken or has a dot; there are {list(self)}.")
        base = getattr(getattr(backbone.model, "config", None), "_name_or_path", "") or None
        if config.base_model_name_or_path is None and base is not None:
            config = replace(config, base_model_name_or_path=base)
        self[name] = adapter = Adapter(config, backbone, start)
        adapter.asks_for_gradient(False)
        return adapter

    def fill(self, name: str, saved: SavedAdapter, is_trainable: bool) -> None:
        """Load the saved tensors of an adapter. If they do not fit, the adapter is removed and ValueError raised."""
        adapter = self.find(name)
        try:
            adapter.load_state_dict(saved.state, strict=True)
        except RuntimeError as error:
            del self[name]
            raise ValueError(f"The saved tensors do not fit their configuration: {error}") from error
        adapter.origin = dict(saved.origin)
        adapter.asks_for_gradient(is_trainable)

    def find(self, name: str) -> Adapter:
        """The adapter of this name; ValueError if there is none."""
        if name not in self:
            raise ValueError(f"No adapter {name!r}; there are {list(self)}.")
        return self[name]  # type: ignore[return-value]

    def edits(self, names: Sequence[str]) -> dict[Site, Intervention]:
        """{site: intervention} of some adapters together; ValueError if two of them share a site."""
        merged: dict[Site, Intervention] = {}
        for name in names:
            for site, edit in self.find(name).by_site().items():
                if site in merged:
                    raise ValueError(f"Two of the adapters {names} edit {site}; their positions must be disjoint.")
                merged[site] = edit
        return merged

    def with_parts(self, names: Sequence[str]) -> Adapter:
        """The only one of these adapters with a basis in parts; ValueError if there is not exactly one."""
        found = [adapter for adapter in map(self.find, names) if adapter.config.parts]
        if len(found) != 1:
            raise ValueError(f"{len(found)} of the adapters {list(names)} have parts; name one.")
        return found[0]


def adapter_sites(config: ReftConfig, backbone: Backbone) -> list[Site]:
    """The sites of an adapter, checked against the model, ordered by layer and then by group.

    Raises:
        IndexError: a layer that the model does not have.
        ValueError: the same layer twice, a component that the model does not have, a rank above the width.
    """
    stack = config.component.rpartition(".")[0]
    depth = backbone.anatomy.depth(stack)
    layers = tuple(range(depth)) if isinstance(config.layers, str) else config.layers
    if not all(-depth <= layer < depth for layer in layers):
        raise IndexError(f"layers={config.layers}: the model has layers 0 to {depth - 1}.")
    chosen = [layer % depth for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={config.layers} name one of the model's {depth} layers twice.")
    heads = [of for _, of in config.heads] or [None] * len(chosen)  # type: ignore[misc]
    sites = [
        Site(config.component, layer, group, of)
        for layer, of in zip(chosen, heads, strict=True)
        for group in config.groups()
    ]
    narrow = min(sites, key=backbone.width)
    if config.rank > backbone.width(narrow):
        raise ValueError(f"rank={config.rank} at {narrow}, which has width {backbone.width(narrow)}.")
    return sites


def alignment_of(adapters: Mapping[str, Adapter], model: nn.Module) -> Alignment:
    """The subspaces that adapters edit in a base model, with the facts that `ReftModel.alignment` describes."""
    found = [(name, *item) for name, adapter in adapters.items() for item in adapter.variables().items()]
    taken = Counter(variable for _, variable, _ in found)
    variables = {v if taken[v] == 1 else f"{name}/{v}": where for name, v, where in found}
    configs = {name: adapter.config for name, adapter in adapters.items()}
    facts = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "method": " and ".join(dict.fromkeys(config.method for config in configs.values())),
        "seed": next(iter(configs.values())).seed,
        "start": {n: adapter.origin["facts"] for n, adapter in adapters.items() if adapter.origin} or "random",
        "versions": {"subspace_lab": package_version(), "torch": torch.__version__},
        "adapters": {name: config.as_dict() for name, config in configs.items()},
        "base": base_facts(model),
    }
    return Alignment(variables, facts)


def base_facts(model: nn.Module) -> dict[str, Any]:
    """The facts by which an adapter recognises its base model: its type, its sizes, a sample of its embeddings."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        "embedding_sample": _embedding_sample(model),
    }


def differences(made_for: dict[str, Any], here: dict[str, Any]) -> str:
    """The facts in which two base models differ, as text; empty if they are the same model.

    Two samples agree if their cosine is at least 0.9. So a model in another dtype, or one that was trained a little
    further, still counts as the same model.
    """
    keys = [k for k in here if k != "embedding_sample" and k in made_for and made_for[k] != here[k]]
    found = [f"{k} {made_for[k]!r}, here {here[k]!r}" for k in keys]
    one, other = made_for.get("embedding_sample"), here.get("embedding_sample")
    if one and other and len(one) == len(other) and any(one) and any(other):
        cosine = torch.cosine_similarity(torch.tensor(one), torch.tensor(other), dim=0)
        if not cosine >= 0.9:
            found.append(f"its embeddings are different (cosine {cosine:.2f} of a sample)")
    return ", ".join(found)


def _embedding_sample(model: nn.Module) -> list[float] | None:
    """Some entries of the input embeddings, of tokens whose index does not change when the vocabulary grows."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2 or weight.numel() < SAMPLE:
        return None
    i = torch.arange(SAMPLE, device=weight.device)
    spread = 7 if len(weight) >= 7 * SAMPLE else 1
    sample = weight.detach()[(spread * i) % len(weight), (37 * i) % weight.shape[1]]
    return [round(x, 6) for x in sample.float().tolist()]


def _refuse_untying(copied: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """ValueError if a parameter of a trained copy is shared with a module that is not copied."""
    inside = {p for p in modules if any(p == c or p.startswith(f"{c}.") for c in copied)}
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for paths in owners.values():
        left = [p for p in paths if p not in inside]
        if left and len(left) < len(paths):
            of_these = [p for p in paths if p in inside]
            raise ValueError(
                f"modules_to_save names {of_these[0]!r}, whose weights are those of {left[0]!r} too: if only "
                f"one is trained, they are no longer tied. Name all of {paths}, or untie them in the base model first."
            )


def _tied(saved: nn.ModuleDict) -> dict[str, str]:
    """{name of a parameter in the state: name of an earlier parameter that is the same object}."""
    first: dict[int, str] = {}
    twins = {}
    for name, parameter in saved.named_parameters(prefix="saved", remove_duplicate=False):
        if id(parameter) in first:
            twins[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return twins


def _without_tied(adapter: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Save a tied parameter once only, because files of tensors refuse shared memory."""
    for name in adapter._tied:
        state.pop(f"{prefix}{name}", None)


def _with_tied(adapter: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, same in adapter._tied.items():
        if f"{prefix}{same}" in state:
            state.setdefault(f"{prefix}{name}", state[f"{prefix}{same}"])


def _key(path: str) -> str:
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
