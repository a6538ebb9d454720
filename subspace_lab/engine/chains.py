"""Chains of modules that run one after the other, of which the first ones may be skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.model.backbone import Hook
from subspace_lab.model.families import Anatomy
from subspace_lab.model.resolved_sites import ResolvedSite


@dataclass(frozen=True)
class Chain:
    """A chain of modules, and which of them come before each site.

    Attributes:
        blocks: the paths of the modules.
        boundary: {site: how many of them come before it}.
        position: {path: its index among all modules of the model, in the order of registration}.
    """

    blocks: list[str]
    boundary: dict[Site, int]
    position: dict[str, int]

    @classmethod
    def of(cls, anatomy: Anatomy, resolved: Mapping[Site, ResolvedSite]) -> Chain:
        """The first chain of a model that contains every site; an empty chain if there is none."""
        sequences = {path: m for path, m in anatomy.modules.items() if isinstance(m, nn.Sequential)}
        below = [[f"{path}.{name}" if path else name for name in m._modules] for path, m in sequences.items()]
        for blocks in [*anatomy.stacks.values(), *below]:
            found = {site: cls._before(place, blocks) for site, place in resolved.items()}
            boundary = {site: count for site, count in found.items() if count is not None}
            if len(boundary) == len(resolved):
                return cls(blocks, boundary, anatomy.position)
        return cls([], {}, anatomy.position)

    @property
    def lowest(self) -> int:
        """How many blocks come before every site."""
        return min(self.boundary.values())

    def before(self, sites: Iterable[Site]) -> int:
        """How many blocks come before all of some sites; without sites, as many as before the deepest known site."""
        return min((self.boundary[site] for site in sites), default=max(self.boundary.values()))

    def reading(self, found: dict[int, Tensor], take: Callable[[Tensor], Tensor]) -> list[Hook]:
        """Hooks that apply `take` to the states at each boundary and put the results into `found`."""
        boundaries = sorted(set(self.boundary.values()) - {0})
        return [self._reader(boundary, found, take) for boundary in boundaries]

    def resuming(self, boundary: int, states: Tensor | None, hooks: list[Hook]) -> list[Hook]:
        """The hooks of a run that starts at a boundary and skips the blocks before it.

        Args:
            states: the output of the last skipped block.
            hooks: the hooks of the run; those that edit this output are included.
        """
        if not boundary:
            return hooks
        *below, last = self.blocks[:boundary]
        at_last = [hook for hook in hooks if hook.path == last and hook.side == "output"]

        def resume(_: None) -> Tensor | None:
            value = states
            for hook in at_last:
                value = hook.act(value)
            return value

        skips = [Hook(block, "skip", (self.position[block], -1), lambda _: states) for block in below]
        skips.append(Hook(last, "skip", (self.position[last], -1), resume))
        return [*skips, *(hook for hook in hooks if hook not in at_last)]

    def _reader(self, boundary: int, found: dict[int, Tensor], take: Callable[[Tensor], Tensor]) -> Hook:
        def read(value: Tensor) -> None:
            found[boundary] = take(value.detach())

        block = self.blocks[boundary - 1]
        return Hook(block, "output", (self.position[block], 10**6), read)

    @staticmethod
    def _before(place: ResolvedSite, blocks: list[str]) -> int | None:
        for i, block in enumerate(blocks):
            if place.hook_point.path == block:
                return i + (place.hook_point.side == "output")
            if place.hook_point.path.startswith(f"{block}."):
                return i
        return None
