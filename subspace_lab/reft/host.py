"""A base model and the adapters that it hosts: which there are, which are in force, what they edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace
from subspace_lab.model.backbone import Hook
from subspace_lab.reft.adapter import Adapter
from subspace_lab.reft.config import ReftConfig
from subspace_lab.reft.facade import Facade


class Host(Facade):
    """A frozen base model with adapters.

    Attributes:
        active_adapters: the adapters in force. Several at once need disjoint positions.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ReftConfig,
        adapter_name: str = "default",
        subspaces: Mapping[Site, Subspace] | None = None,
    ) -> None:
        if isinstance(model, Facade):
            raise TypeError("This model has ReFT adapters already: use its `add_adapter`.")
        super().__init__(model)
        self.adapters = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.add_adapter(adapter_name, config, subspaces)
        for p in self._asked:
            p.requires_grad_(False)
        self.set_adapter(adapter_name)

    def add_adapter(
        self, adapter_name: str, config: ReftConfig, subspaces: Mapping[Site, Subspace] | None = None
    ) -> None:
        """Add an untrained adapter, not yet active (ValueError for a name that is taken or has a dot).

        Args:
            subspaces: one for each of its sites, to start in (or to stay in, with `basis="fixed"`).
        """
        if adapter_name in self.adapters or hasattr(self.adapters, adapter_name) or "." in adapter_name:
            raise ValueError(f"Adapter name {adapter_name!r} is taken or has a dot; there are {self.names}.")
        name = getattr(self.config, "_name_or_path", "") or None
        if config.base_model_name_or_path is None and name is not None:
            config = replace(config, base_model_name_or_path=name)
        adapter = Adapter(config, self.backbone, subspaces).train(self.training)
        adapter.asks_for_gradient(False)
        self.adapters[adapter_name] = adapter

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or several, the active and trainable ones (ValueError if two share a site)."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._merged(names)
        self.active_adapters = names
        for name in self.names:
            self.adapter(name).asks_for_gradient(name in names)

    def train_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Of a basis in parts, put some in force and train them alone; the other parts rest as they are."""
        self._in_parts(adapter_name).train_parts([parts] if isinstance(parts, str) else parts)

    def use_parts(self, parts: str | Sequence[str], adapter_name: str | None = None) -> None:
        """Of a basis in parts, put some in force."""
        self._in_parts(adapter_name).use_parts([parts] if isinstance(parts, str) else parts)

    def _in_parts(self, name: str | None) -> Adapter:
        found = [self.adapter(n) for n in (self.active_adapters if name is None else [name])]
        found = [adapter for adapter in found if adapter.config.parts]
        if len(found) != 1:
            raise ValueError(f"{len(found)} of the adapters {name or self.active_adapters} have parts; name one.")
        return found[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.adapter(adapter_name)
        del self.adapters[adapter_name]
        self.active_adapters = [n for n in self.active_adapters if n != adapter_name]

    def adapter(self, name: str) -> Adapter:
        """One adapter (ValueError where there is none of that name)."""
        if name not in self.adapters:
            raise ValueError(f"No adapter {name!r}; there are {self.names}.")
        return self.adapters[name]  # type: ignore[return-value]

    @property
    def names(self) -> list[str]:
        """Of all adapters, active or not."""
        return list(self.adapters)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model."""
        active, self.active_adapters = self.active_adapters, []
        try:
            yield
        finally:
            self.active_adapters = active

    def edits(self) -> dict[Site, Intervention]:
        """{site: intervention} of the active adapters."""
        return self._merged(self.active_adapters)

    def _merged(self, names: Sequence[str]) -> dict[Site, Intervention]:
        merged: dict[Site, Intervention] = {}
        for name in names:
            for site, edit in self.adapter(name).by_site().items():
                if site in merged:
                    raise ValueError(f"Two of the adapters {names} edit {site}; their positions must be disjoint.")
                merged[site] = edit
        return merged

    def fold(self) -> dict[Site, Intervention]:
        """The active adapters' edits in plain matrices, to serve from: h + Dᵀ(M h + v), M = W − R for LoReFT.

        What is not affine (RED, an activation other than linear) is a copy. `core.intervene` runs them.
        """
        return {site: edit.folded() for site, edit in self.edits().items()}

    def merge_and_unload(self) -> nn.Module:
        """Refused: no weights do what an edit does."""
        raise TypeError(
            "A ReFT edit cannot be merged into the weights: it changes the hidden states of some positions of the "
            "prompt, and weights treat all positions, also those that are generated, alike. `fold()` gives the "
            "edits as plain matrices, `unload()` the base model."
        )

    def subspace(self, site: Site | str) -> Subspace:
        """The subspace that the active adapters edit at a site, for DAS and for analysis."""
        site = Site.parse(site) if isinstance(site, str) else site
        edits = self.edits()
        if site not in edits:
            raise ValueError(f"No active adapter edits {site}; edited are {list(map(str, edits))}.")
        return edits[site].edited()

    def hooks(self) -> list[Hook]:
        """The modules of the active adapters that stand in for those of the base model."""
        return [v for name in self.active_adapters for v in self.adapter(name).hooks(self.backbone)]
