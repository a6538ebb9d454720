"""One adapter: its interventions at the sites of a model, and the modules that are trained along."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import COMPONENTS, Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.backbone import Backbone, Hook
from subspace_lab.reft.config import ReftConfig

SAMPLE = 64  # entries of the embeddings by which a base model is known again


class Adapter(nn.Module):
    """The interventions of one adapter and the modules that are trained along."""

    def __init__(
        self, config: ReftConfig, backbone: Backbone, subspaces: Mapping[Site, Subspace] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.sites = adapter_sites(config, backbone)
        given = {} if subspaces is None else _matched(subspaces, self.sites, config.rank)
        self.edits = nn.ModuleList(
            config.intervention(backbone.width(site), config.seed * 100_003 + i, given.get(site))
            for i, site in enumerate(self.sites)
        ).to(backbone.device)
        self.saved = nn.ModuleDict()
        for name in config.modules_to_save:
            paths = [p for p in backbone.anatomy.modules if p == name or p.endswith(f".{name}")]
            if not paths:
                raise ValueError(
                    f"modules_to_save names {name!r}; the model's own parts are "
                    f"{[n for n, _ in backbone.model.named_children()]}."
                )
            for path in paths:
                # A copy, so that the base model stays what it was.
                self.saved[_key(path)] = copy.deepcopy(backbone.anatomy.modules[path]).requires_grad_(True)

    def by_site(self) -> dict[Site, Intervention]:
        """{site: intervention}."""
        return dict(zip(self.sites, self.edits, strict=True))  # type: ignore[arg-type]

    def train_parts(self, names: Sequence[str]) -> None:
        """Of the bases in parts put these in use, and train them alone from now on."""
        self.use_parts(names)
        for edit in self.by_site().values():
            edit.subspace.train_parts(names)
        self.asks_for_gradient(True)

    def use_parts(self, names: Sequence[str]) -> None:
        """Of the bases in parts put these in use (ValueError for a name that is none of theirs)."""
        for edit in self.by_site().values():
            edit.value.use_parts(names)

    def asks_for_gradient(self, asks: bool) -> None:
        """Let the adapter be trained, or not; of bases in parts only those parts that train."""
        self.saved.requires_grad_(asks)
        for edit in self.by_site().values():
            edit.asks_for_gradient(asks)

    def hooks(self, backbone: Backbone) -> list[Hook]:
        """The modules that stand in for those of the base model."""
        position = backbone.anatomy.position
        # Behind everything inside blocks: such modules are heads.
        return [
            Hook(_path(key), "replace", (position[_path(key)], len(COMPONENTS)), module)
            for key, module in self.saved.items()
        ]


def adapter_sites(config: ReftConfig, backbone: Backbone) -> list[Site]:
    """The sites of an adapter, checked against the model: layers in their order, and in each its groups.

    Raises:
        IndexError: a layer that the model has not.
        ValueError: a layer named twice, a component that it has not, a rank above the width.
    """
    stack = config.component.rpartition(".")[0]
    depth = backbone.anatomy.depth(stack)
    layers = tuple(range(depth)) if isinstance(config.layers, str) else config.layers
    if not all(-depth <= layer < depth for layer in layers):
        raise IndexError(f"layers={config.layers}: the model has layers 0 to {depth - 1}.")
    chosen = [layer % depth for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={config.layers} name one of the model's {depth} layers twice.")
    sites = [Site(config.component, layer, group) for layer in chosen for group in config.groups()]
    width = backbone.width(sites[0])
    if config.rank > width:
        raise ValueError(f"rank={config.rank} at {sites[0]}, which has width {width}.")
    return sites


def _matched(subspaces: Mapping[Site, Subspace], sites: list[Site], rank: int) -> dict[Site, Subspace]:
    given = dict(subspaces)
    if set(given) != set(sites):
        raise ValueError(f"Subspaces given for {list(given)}; the adapter's sites are {sites}.")
    ranks = {str(site): s.rank for site, s in given.items() if s.rank != rank}
    if ranks:
        raise ValueError(f"Subspaces of ranks {ranks} for an adapter of rank {rank}.")
    return given


def base_facts(model: nn.Module) -> dict[str, Any]:
    """What an adapter must find again in its base model: its type, its sizes, and a sample of its embeddings."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(text, "hidden_size", None),
        "num_hidden_layers": getattr(text, "num_hidden_layers", None),
        "embedding_sample": _embedding_sample(model),
    }


def differences(made_for: dict[str, Any], here: dict[str, Any]) -> str:
    """In which facts two base models differ, as text; empty where they are one.

    The samples agree by direction (cosine ≥ 0.9), so that another dtype, or further training, is no other model.
    """
    keys = [k for k in here if k != "embedding_sample" and k in made_for and made_for[k] != here[k]]
    found = [f"{k} {made_for[k]!r}, here {here[k]!r}" for k in keys]
    one, other = made_for.get("embedding_sample"), here.get("embedding_sample")
    if one and other and len(one) == len(other) and any(one) and any(other):
        cosine = torch.cosine_similarity(torch.tensor(one), torch.tensor(other), dim=0)
        if not cosine >= 0.9:
            found.append(f"its embeddings are others (cosine {cosine:.2f} of a sample)")
    return ", ".join(found)


def _embedding_sample(model: nn.Module) -> list[float] | None:
    """A few entries of the input embeddings, of tokens that stay where they are when the vocabulary grows."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2 or weight.numel() < SAMPLE:
        return None
    i = torch.arange(SAMPLE, device=weight.device)
    spread = 7 if len(weight) >= 7 * SAMPLE else 1
    sample = weight.detach()[(spread * i) % len(weight), (37 * i) % weight.shape[1]]
    return [round(x, 6) for x in sample.float().tolist()]


def _key(path: str) -> str:
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
