"""Path patching: the interchange of the whole state, with an effect on the answer through one receiver only."""

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
    """Exchange the whole state at the site (the sender), and let only the effect through one receiver reach the answer.

    `das/paths.py` says which paths this includes: all paths from the sender to the receiver that avoid the sites in
    `hold`, and everything after the receiver. If the receiver is the sender, or if all paths to the answer go through
    the receiver (such as a later block's output at all positions), the result is that of `FullVector`. A receiver at a
    position before the sender's, or one that no path reaches, gives the score without intervention.

    This is a method, and the sites of a sweep are the senders. So the effects of all layers, positions or heads on one
    receiver have floors, intervals, files and plots like every other method. The saved alignment is the exchange at the
    sender, without the path.

    Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Attributes:
        receiver: a site, or its text, after every sender. A list runs once for each entry.
        hold: sites between sender and receiver that keep their states in the base. With
            `list_sites(backbone, "head_output", positions="all")`, for example, the sender's effect arrives directly or
            through MLPs, not through other heads.

    Raises:
        TypeError: a receiver that is not a site.
        ValueError: no receiver; text that is not a site. In a sweep: a receiver that no path from a sender reaches.
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
        assert isinstance(self.receiver, Site), "a list is run as its variants"
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
