"""Path patching: the interchange of the whole state, of which one receiver alone takes the effect to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from subspace_lab.core.sites import Site
from subspace_lab.das.methods.full_vector import expect_apart, whole_states
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.paths import Path


@dataclass(frozen=True)
class PathPatching(Method):
    """Exchange all of the state at the site, the sender, and take its effect to the answer through one receiver only.

    Which paths that includes is said in `das/paths.py`: all ways from the sender to the receiver but those through the
    sites in `hold`, and everything from the receiver on. With the sender as receiver it is `FullVector`, and so it is
    wherever all ways to the answer pass the receiver, such as a later block's output at all positions. A receiver at
    a position in front of the sender's, or one that no path reaches, scores what no intervention scores.

    It is a method, and the sites of a sweep are the senders: what reaches one receiver from every layer, position or
    head then has the floors, intervals, files and pictures that everything else has. What is saved as the alignment is
    the exchange at the sender, without its path.

    Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Attributes:
        receiver: a site, or the text of one, behind every sender. A list runs once for each.
        hold: sites that stay as they are in the base between sender and receiver, such as
            `list_sites(backbone, "head_output", positions="all")`: then the sender's effect arrives straight or through
            MLPs, not through other heads.

    Raises:
        TypeError: a receiver that is no site.
        ValueError: no receiver; text that is not a site's. From a sweep: a receiver that no path from a sender reaches.
    """

    control: ClassVar[bool] = True

    receiver: Site | str | Sequence[Site | str]
    hold: Site | str | Sequence[Site | str] = ()

    def __post_init__(self) -> None:
        several = isinstance(self.receiver, list | tuple)
        receivers = _sites("receiver", self.receiver)
        if not receivers:
            raise ValueError("PathPatching(receiver=[]): an empty list leaves nothing to run.")
        object.__setattr__(self, "receiver", receivers if several else receivers[0])
        object.__setattr__(self, "hold", _sites("hold", self.hold))

    @property
    def path(self) -> Path:
        assert isinstance(self.receiver, Site), "a list is run by its variants"
        return Path(self.receiver, _sites("hold", self.hold))

    def variants(self) -> list[Method]:
        return [replace(self, receiver=one) for one in _sites("receiver", self.receiver)]

    @property
    def label(self) -> str:
        held = [site.component for site in _sites("hold", self.hold)]
        parts = [f"{held.count(component)} {component}" for component in dict.fromkeys(held)]
        receivers = " or ".join(map(str, _sites("receiver", self.receiver)))
        held_too = f", holding {' and '.join(parts)}" if parts else ""
        return f"PathPatching to {receivers}{held_too}"

    def as_dict(self) -> dict[str, Any]:
        receivers = [str(site) for site in _sites("receiver", self.receiver)]
        return {
            "method": type(self).__name__,
            "receiver": receivers if isinstance(self.receiver, tuple) else receivers[0],
            "hold": [str(site) for site in _sites("hold", self.hold)],
        }

    def seeds(self, asked: Sequence[int]) -> list[int]:
        return [0]

    def check(self, sites: Mapping[str, Site], widths: Mapping[Site, int]) -> None:
        expect_apart(self, sites)

    def learner(self, problem: Problem) -> Learner:
        return Learner(whole_states(problem))


def _sites(name: str, given: Any) -> tuple[Site, ...]:
    """One site or several, as sites or as text."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    for one in several:
        if not isinstance(one, Site | str):
            raise TypeError(
                f"PathPatching({name}={given!r}): needed are sites, such as Site('block_output', 3, 'last')."
            )
    return tuple(Site.parse(one) if isinstance(one, str) else one for one in several)
