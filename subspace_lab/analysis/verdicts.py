"""A claim, its checks, and what is concluded from them.

The claim is the fit that the dev split chose: its method at its site changes the variable, as its interchange
intervention accuracy (IIA) on the test split says. It is held against what the same search finds where nothing is.
What is concluded is the first line of this table that is true:

    underpowered   the test pairs, or the entities that they are about, are too few: an effect of half of what is
                   possible would not be told from the floor with a power of .8
    memorised      the held-out effect is not above its floor, that of the training pairs is well above theirs
    underpowered   the held-out effect is not above its floor, and a planted variable is not found either
    not found      the held-out effect is not above its floor
    expressive     there is an effect, but twins, or pairs with arbitrary labels, have it as well: p is above .05, or
                   half of the effect is there without anything learned
    non-specific   there is an effect, but random subspaces of this rank have it as well, or the answer changes too
                   when all but the subspace is exchanged
    supported      none of these

Too few pairs come first: what they show by luck would be believed, and what they miss would be denied. Whether
there is an effect comes before whether others have it. A twin that does as well comes before the question of the
subspace, since that question is idle where nothing was learned. Other checks are told and decide nothing:
selection (dev against test), the spread over seeds, baselines (difference of means, principal components), twins
that keep a part of what was learned, twins over the whole grid of sites, and whether the subspace reads and writes what
the model does (`illusions.py`): the site can be right where the span is not.

    effect = (IIA − floor) / (ceiling − floor) − the twins' mean effect

The floor is the higher of two: what the model says without an intervention, and the most frequent expected answer.
The ceiling is 1, which is what the causal model itself reaches, and not the swap of the full state: that one
exchanges all other variables with it, and a subspace that holds the variable alone can be better.

p = (1 + number of twins whose effect is not smaller) / (1 + number of twins), at the site that dev chose. It is
.05 at best with 19 twins; with fewer a verdict is *preliminary*, and asks that the model's interval lies above all
of them. The p over the grid takes of each twin the site that its own dev pairs choose, as was done with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from subspace_lab.core.estimates import Estimate
from subspace_lab.core.files import read_json, write_json

FORMAT = 1
CONCLUSIONS = ("supported", "memorised", "expressive", "non-specific", "underpowered", "not found")


@dataclass(frozen=True)
class Claim:
    """What is claimed: that a method's subspace at a place holds a variable.

    Attributes:
        variable: its name; several, joined by commas, that are exchanged together.
        place: where, as `Fit.place`.
        method: its label.
        iia: on the test pairs.
        floor: of the test pairs.
        pairs: how many there are to train on (None where they are drawn afresh) and to test on.
        model, task: which.
    """

    variable: str
    place: str
    method: str
    iia: Estimate
    floor: float
    pairs: Mapping[str, int | None]
    model: str | None = None
    task: str = ""

    def __str__(self) -> str:
        return f"{self.variable} is exchanged at {self.place} by {self.method}: IIA {self.iia}, floor {self.floor:.2f}"


@dataclass(frozen=True)
class Check:
    """One thing that the claim is held against.

    Attributes:
        name: what is asked, such as "twins".
        observed: the claim's own value in this question.
        null: the values of what it is held against.
        p: where the check is a test of rank.
        passed: False where it speaks against the claim; None where it decides nothing.
        because: in words.
    """

    name: str
    observed: float | None
    null: tuple[float, ...]
    p: float | None
    passed: bool | None
    because: str

    def __str__(self) -> str:
        mark = {True: "passed", False: "failed", None: "told"}[self.passed]
        return f"{mark:6}  {self.name}: {self.because}"


@dataclass(frozen=True)
class Verdict:
    """What is concluded of a claim.

    Attributes:
        claim: what is claimed.
        checks: in the order in which they were made.
        conclusion: one of `CONCLUSIONS`.
        reason: a sentence for people.
        effect: of the claim, less the twins' mean; 1 is what the causal model would reach.
        interval: of the effect, from the interval of the IIA; the twins' spread is no part of it.
        p: rank of the effect among the twins' at the same site.
        grid_p: the same where each twin's site is chosen by its own dev pairs; None where twins were not searched
            over the grid.
        preliminary: whether the twins are too few for p ≤ .05.
    """

    claim: Claim
    checks: tuple[Check, ...]
    conclusion: str
    reason: str
    effect: float
    interval: tuple[float, float]
    p: float
    grid_p: float | None
    preliminary: bool

    @property
    def supported(self) -> bool:
        """Whether the claim stands."""
        return self.conclusion == "supported"

    @property
    def headline(self) -> str:
        """The conclusion, and whether it is preliminary."""
        return f"Verdict: {self.conclusion}{' (preliminary)' if self.preliminary else ''}"

    def check(self, name: str) -> Check:
        """The check of a name (KeyError naming those that there are)."""
        for one in self.checks:
            if one.name == name:
                return one
        raise KeyError(f"No check {name!r}; there are {[one.name for one in self.checks]}.")

    def __str__(self) -> str:
        """The verdict as one paragraph."""
        return f"{self.headline}. {self.reason}"

    def __repr__(self) -> str:
        return "\n".join([str(self), *(f"  {one}" for one in self.checks)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape({True: 'passed', False: 'failed', None: 'told'}[one.passed])}</td>"
            f"<td>{escape(one.name)}</td><td style='text-align:left'>{escape(one.because)}</td></tr>"
            for one in self.checks
        )
        return f"<p><b>{escape(str(self))}</b></p><table>{rows}</table>"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        flat = {one.name: getattr(self, one.name) for one in fields(self)}
        return flat | {
            "claim": asdict(self.claim) | {"pairs": dict(self.claim.pairs)},
            "checks": [asdict(one) | {"null": list(one.null)} for one in self.checks],
            "interval": list(self.interval),
        }

    def save(self, path: str | Path) -> None:
        """Write the verdict as a JSON file."""
        write_json(Path(path), {"format": FORMAT, **self.as_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """The verdict that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that holds no verdict of this format.
        """
        found = read_json(Path(path))
        try:
            if found.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls.from_dict(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a verdict: {type(error).__name__}: {error}") from error

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Verdict:
        """The verdict of which `as_dict` gave this."""
        if found["conclusion"] not in CONCLUSIONS:
            raise ValueError(f"conclusion {found['conclusion']!r}; possible are {', '.join(CONCLUSIONS)}")
        low, high = found["interval"]
        claim = Claim(**{**found["claim"], "iia": Estimate(**found["claim"]["iia"])})
        checks = tuple(Check(**{**one, "null": tuple(one["null"])}) for one in found["checks"])
        return cls(**{**found, "claim": claim, "checks": checks, "interval": (low, high)})
