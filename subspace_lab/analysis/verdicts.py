"""A claim, its checks, and what is concluded from them.

The claim is about the fit that the dev split chose: exchanging its subspace at its site changes the variable. The
measure is its interchange intervention accuracy (IIA) on the test split. The claim is compared with what the same
search finds where there is nothing to find. The conclusion is the first line of this table that is true:

    underpowered   there are too few test pairs, or they are about too few entities: an effect of half of what is
                   possible could not be distinguished from the floor with a power of .8
    memorised      the held-out effect is not above its floor, but the effect on the training pairs is well above theirs
    underpowered   the held-out effect is not above its floor, and a planted variable is not found either
    not found      the held-out effect is not above its floor
    expressive     there is an effect, but twins, or pairs with arbitrary labels, have it as well: p is above .05, or
                   they have half of the effect although they learned nothing
    non-specific   there is an effect, but random subspaces of this rank have it as well, or the answer also changes
                   when everything but the subspace is exchanged
    supported      none of these

The number of pairs comes first, since too few pairs can show an effect by luck, and can miss one that is there. Next
comes whether there is an effect, and then whether others have it too. Twins come before the subspace: where nothing
was learned, it does not matter which subspace it is. Other checks are reported for information, and decide nothing:
selection (dev against test), the spread over seeds, baselines (difference of means, principal components), the
exchange of the whole state if it was searched (a subspace that does no better may carry the answer), twins that keep
a part of what was learned, twins over the whole grid of sites, and whether the subspace reads and writes what the
model itself reads and writes (`illusions.py`): the site can be right although the span is not.

    effect = (IIA − floor) / (ceiling − floor) − the twins' mean effect

The floor is the higher of two scores: the model without an intervention, and the most frequent expected answer.
The ceiling is 1, the score of the causal model itself. It is not the score of exchanging the full state: this
exchanges all other variables too, so a subspace that holds only the variable can score higher.

p = (1 + number of twins whose effect is not smaller) / (1 + number of twins), at the site that dev chose. With 19
twins it is .05 at best. With fewer twins the verdict is *preliminary*, and the model's interval has to lie above the
effects of all of them. For the p over the grid, the dev pairs of each twin choose its site, as they did for the model.
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
_MARKS = {True: "passed", False: "failed", None: "info"}  # of a check; None: it decides nothing


@dataclass(frozen=True)
class Claim:
    """What is claimed: the subspace that a method found at a place holds a variable.

    Attributes:
        variable: its name; if several are exchanged together, their names joined by commas.
        place: the site, as `Fit.place`.
        method: the label of the method.
        iia: IIA on the test pairs.
        floor: the floor of the test pairs.
        pairs: {"train": number of training pairs, "test": number of test pairs}; None for training pairs if new ones
            are drawn in each step.
        model, task: their names.
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
    """One thing with which the claim is compared.

    Attributes:
        name: what is checked, such as "twins".
        observed: the value of the claim.
        null: the values with which it is compared.
        p: the rank of the observed value among the null; None if the check has no p.
        passed: False if the check speaks against the claim; None if it decides nothing.
        because: the reason in words.
    """

    name: str
    observed: float | None
    null: tuple[float, ...]
    p: float | None
    passed: bool | None
    because: str

    def __str__(self) -> str:
        return f"{_MARKS[self.passed]:6}  {self.name}: {self.because}"


@dataclass(frozen=True)
class Verdict:
    """What is concluded about a claim.

    Attributes:
        claim: what is claimed.
        checks: all checks, in the order in which they were made.
        conclusion: one of `CONCLUSIONS`.
        reason: why, in a few sentences.
        effect: effect of the claim minus the mean effect of the twins; the effect of the causal model is 1.
        interval: 95 % interval of the effect, from the interval of the IIA; without the spread of the twins.
        p: rank of the effect among the effects of the twins at the same site.
        grid_p: the same if each twin's site is chosen by its own dev pairs; None if no twin was searched over the grid.
        preliminary: whether there are too few twins for p ≤ .05.
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
        """Whether the conclusion is "supported"."""
        return self.conclusion == "supported"

    @property
    def headline(self) -> str:
        """The conclusion, and whether it is preliminary."""
        return f"Verdict: {self.conclusion}{' (preliminary)' if self.preliminary else ''}"

    def check(self, name: str) -> Check:
        """The check with this name (KeyError that lists the names of all checks)."""
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
            f"<tr><td>{escape(_MARKS[one.passed])}</td>"
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
        """The verdict from what its `as_dict` returned."""
        if found["conclusion"] not in CONCLUSIONS:
            raise ValueError(f"conclusion {found['conclusion']!r}; possible are {', '.join(CONCLUSIONS)}")
        low, high = found["interval"]
        claim = Claim(**{**found["claim"], "iia": Estimate(**found["claim"]["iia"])})
        checks = tuple(Check(**{**one, "null": tuple(one["null"])}) for one in found["checks"])
        return cls(**{**found, "claim": claim, "checks": checks, "interval": (low, high)})
