"""Rival hypotheses ordered by their scores, with the evidence for the order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from subspace_lab.core.estimates import Clusters, Estimate, estimate
from subspace_lab.core.files import read_json, taken_folder, write_json
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.pairs import Counterfactuals, Pairs

RECORD, FORMAT = "ranking.json", 1
COLUMNS = (
    "hypothesis",
    "at",
    "IIA",
    "IIA where they differ",
    "floor there",
    "ceiling there",
    "rank",
    "first − this",
)


@dataclass(frozen=True)
class Standing:
    """One hypothesis and its scores.

    Attributes:
        name: the name of the hypothesis.
        method, place: the method and the place chosen on dev.
        iia: IIA on all test pairs, the mean over seeds.
        differing: IIA on the test pairs on which not all hypotheses agree.
        floor: the share of these differing pairs that is right without any intervention, or with the best constant
            answer, whichever is higher.
        ceiling: the share of the differing pairs on which the first hypothesis expects the same answer. This
            hypothesis would have this score with the subspaces of the first one, if the network did exactly what the
            first one says.
        rank: the smallest rank (of each variable's subspace) whose fits come within the margin of the best on dev.
        behind: how much more often the first hypothesis is right, where the two expect different answers (a mean over
            pairs); None for the first hypothesis itself, and if the two never differ.
    """

    name: str
    method: str
    place: str
    iia: Estimate
    differing: Estimate
    floor: float
    ceiling: float
    rank: int
    behind: Estimate | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rival hypotheses in the order of their scores.

    Attributes:
        standings: the hypotheses; the network follows the first one best.
        agreement: {hypothesis: {hypothesis: share of the test pairs on which both expect the same answer}}.
        n, n_differing: the number of test pairs, and of those on which not all hypotheses agree.
        within: a difference in IIA up to this margin counts as equal.
        fits: {hypothesis: the fits of its sweep}.
    """

    standings: tuple[Standing, ...]
    agreement: Mapping[str, Mapping[str, float]]
    n: int
    n_differing: int
    within: float
    fits: Mapping[str, Fits]

    @property
    def best(self) -> Standing:
        return self.standings[0]

    def records(self) -> list[dict[str, Any]]:
        """Each hypothesis as one flat record: `pandas.DataFrame(ranking.records())`."""
        lines = []
        for place, one in enumerate(self.standings, 1):
            flat: dict[str, Any] = {"order": place}
            for name, value in vars(one).items():
                if isinstance(value, Estimate):
                    flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                else:
                    flat[name] = value
            lines.append(flat)
        return lines

    @property
    def notes(self) -> list[str]:
        """Notes that are needed to read the table."""
        lines = [
            f"{self.n} test pairs; on {self.n_differing} of them not all hypotheses expect the same answer, and only "
            "these distinguish the hypotheses. Brackets: the 95 % interval.",
            "ceiling: the score that the hypothesis would have on these pairs with the subspaces of the first one, if "
            f"the network did what the first one says. rank: the smallest rank within {self.within:g} of the best on "
            "dev.",
            "first − this: how much more often the first hypothesis is right where the two differ.",
        ]
        tied = [one.name for one in self.standings[1:] if one.behind is not None and one.behind.low <= 0]
        if tied:
            lines.append(f"Not distinguishable from the first on these pairs: {', '.join(tied)}.")
        low = [one.name for one in self.standings if one.differing.low <= one.floor]
        if low:
            lines.append(f"Not above the floor: {', '.join(low)}.")
        return lines

    def __repr__(self) -> str:
        console = Console(file=StringIO(), width=150, highlight=False, color_system=None, force_jupyter=False)
        table = Table(box=box.SIMPLE_HEAD)
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if i < 2 else "right")
        for cells in self._cells():
            table.add_row(*cells)
        console.print(table)
        for line in self.notes:
            console.print(line, markup=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        remarks = "".join(f"<div>{escape(line)}</div>" for line in self.notes)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<div style='font-size:85%;color:#555'>{remarks}</div>"
        )

    def _cells(self) -> list[list[str]]:
        return [
            [
                one.name,
                f"{one.method}, {one.place}",
                str(one.iia),
                str(one.differing),
                f"{one.floor:.2f}",
                f"{one.ceiling:.2f}",
                str(one.rank),
                "–" if one.behind is None else str(one.behind),
            ]
            for one in self.standings
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the fits, as JSON."""
        return {
            "format": FORMAT,
            "standings": [asdict(one) for one in self.standings],
            "agreement": {name: dict(of) for name, of in self.agreement.items()},
            "n": self.n,
            "n_differing": self.n_differing,
            "within": self.within,
            "hypotheses": list(self.fits),
        }

    def save(self, folder: str | Path) -> None:
        """Write ranking.json and the fits of each hypothesis (folders fits-0, fits-1, …) into a new or empty folder.

        Raises:
            FileExistsError: the folder is not empty.
        """
        with taken_folder(Path(folder)) as folder:
            for i, fits in enumerate(self.fits.values()):
                fits.save(folder / f"fits-{i}")
            write_json(folder / RECORD, self.as_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Ranking:
        """Read the ranking that `save` wrote.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: files that are broken or have another format.
        """
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"There is no {RECORD} in {folder}: it is not a folder of Ranking.save.")
        found = read_json(folder / RECORD)
        try:
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}; this version reads {FORMAT}")
            standings = tuple(Standing(**{k: _estimate(v) for k, v in one.items()}) for one in found["standings"])
            fits = {name: Fits.load(folder / f"fits-{i}") for i, name in enumerate(found["hypotheses"])}
            return cls(standings, found["agreement"], found["n"], found["n_differing"], found["within"], fits)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be read as a ranking: {type(error).__name__}: {error}") from error


def rank_hypotheses(rivals: Mapping[str, Pairs], fits: Mapping[str, Fits], *, within: float = 0.02) -> Ranking:
    """Order hypotheses by how well the network follows them, using the searches for each.

    For each hypothesis the place and the method are chosen on dev. Its smallest rank is that of the fits, at any place,
    that come within `within` of this choice on dev. Hypotheses are ordered by their IIA on the test pairs on which not
    all of them agree. Those within `within` of the highest IIA are ordered among themselves by their smallest rank;
    then the same is done with the rest.

    Args:
        rivals: {hypothesis: its pairs}, from `rival_pairs` or made by hand; all must have the same bases.
        fits: {hypothesis: the fits of a sweep over its pairs}, all of one model, with the metric `iia`.
        within: a difference in IIA up to this margin counts as equal.

    Raises:
        ValueError: different hypotheses in `rivals` and `fits`, fewer than two hypotheses, fits of other pairs or of
            several models, hypotheses whose test bases differ or that expect the same answers in all test pairs, fits
            that were not scored by `iia`.
    """
    names = list(rivals)
    if set(names) != set(fits) or len(names) < 2:
        raise ValueError(f"fits of {list(fits)} for pairs of {names}: needed are two or more, the same in both")
    for name, pairs in rivals.items():
        if fits[name].facts.get("data") != pairs.fingerprint():
            raise ValueError(f"the fits of {name!r} are of other pairs than those given for it")
        if not _same_bases(rivals[names[0]].test, pairs.test):
            raise ValueError(f"{names[0]!r} and {name!r} have other test bases: draw the bases once for all")
    models = {str(fits[name].facts.get("model")) for name in names}
    if len(models) > 1:
        raise ValueError(f"the fits are of {len(models)} models, but a ranking is of one: {sorted(models)}")
    expected = {name: _texts(pairs.test, pairs.test.answer) for name, pairs in rivals.items()}
    agree = {a: {b: _equal(expected[a], expected[b]) for b in names} for a in names}
    differ = ~torch.stack([agree[names[0]][name] for name in names]).all(0)
    if not bool(differ.any()):
        raise ValueError(f"the hypotheses {names} expect the same of all {len(differ)} test pairs")
    found = {name: _Found.of(name, fits[name], within) for name in names}
    differing = {name: found[name].score(differ) for name in names}
    order = _ordered(
        {name: differing[name].value for name in names}, {name: found[name].rank for name in names}, within
    )
    first, standings = order[0], []
    for name in order:
        own, apart = found[name], ~agree[first][name]
        base = _texts(rivals[name].test, rivals[name].test.base_answer)
        behind = None
        if bool(apart.any()):
            behind = replace(own, values=found[first].values - own.values).score(apart)
        standings.append(
            Standing(
                name=name,
                method=own.fit.method.label,
                place=own.fit.place,
                iia=own.score(torch.ones_like(differ)),
                differing=differing[name],
                floor=_floor(base, expected[name], differ),
                ceiling=agree[first][name][differ].double().mean().item(),
                rank=own.rank,
                behind=behind,
            )
        )
    shares = {a: {b: agree[a][b].double().mean().item() for b in names} for a in names}
    return Ranking(
        tuple(standings), shares, len(differ), int(differ.sum()), within, {name: fits[name] for name in names}
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """The result for one hypothesis: one of the chosen fits, its score for each pair (mean over seeds), its rank."""

    fit: Fit
    values: Tensor
    rank: int
    clusters: Clusters | None

    @classmethod
    def of(cls, name: str, fits: Fits, within: float) -> _Found:
        searched = [fit for fit in fits if not fit.method.control]
        if not searched or any("iia" not in fit.pair_scores or "iia" not in fit.scores["dev"] for fit in searched):
            raise ValueError(f"the {len(fits)} fits of {name!r} hold no search that was scored by `iia`")
        means = replace(fits, fits=tuple(searched)).mean(metric="iia", split="dev")
        best = max(means, key=lambda mean: mean.value)
        rank = min(mean.fits[0].rank for mean in means if mean.value >= best.value - within)
        values = torch.stack([fit.pair_scores["iia"].double() for fit in best.fits]).mean(0)
        return cls(best.fits[0], values, rank, Clusters.of(fits.labels))

    def score(self, there: Tensor) -> Estimate:
        """The mean over some of the pairs."""
        return estimate(self.values[there], None if self.clusters is None else self.clusters.where(there))


def _ordered(scores: Mapping[str, float], ranks: Mapping[str, int], within: float) -> list[str]:
    """Names by score; names within a margin of the highest score are ordered by rank, then the same with the rest."""
    left, order = dict(scores), []
    while left:
        highest = max(left.values())
        group = [name for name, score in left.items() if score >= highest - within]
        order += sorted(group, key=lambda name: (ranks[name], -left[name]))
        left = {name: score for name, score in left.items() if name not in group}
    return order


def _floor(base: Sequence[str], expected: Sequence[str], there: Tensor) -> float:
    """The share of some pairs that is right with the base's answer, or with the most frequent expected answer."""
    pairs = [(b, e) for b, e, used in zip(base, expected, there.tolist(), strict=True) if used]
    unedited = sum(b == e for b, e in pairs)
    return max(unedited, *Counter(e for _, e in pairs).values()) / len(pairs)


def _texts(data: Counterfactuals, answers: Tensor) -> list[str]:
    return [data.answers[i] for i in answers.tolist()]


def _equal(one: Sequence[str], other: Sequence[str]) -> Tensor:
    return torch.tensor([a == b for a, b in zip(one, other, strict=True)])


def _same_bases(one: Counterfactuals, other: Counterfactuals) -> bool:
    mine, others = ({"": data.base.positional, **data.base.inputs} for data in (one, other))
    if len(one) != len(other) or set(mine) != set(others):
        return False
    tensors = [(a, others[name]) for name, a in mine.items() if isinstance(a, Tensor)]
    return all(isinstance(b, Tensor) and torch.equal(a, b) for a, b in tensors)


def _estimate(value: Any) -> Any:
    return Estimate(**value) if isinstance(value, dict) else value
