"""Fits as a table: one line for each place, one column for each method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from textwrap import fill
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table

from subspace_lab.core.sites import Site

# The types of das/fits.py, which imports this file.
Fit: TypeAlias = Any
Fits: TypeAlias = Any
Mean: TypeAlias = Any

MOST_ROWS = 60
NAMES = {"iia": "Interchange intervention accuracy (IIA)"}


def table_of(
    fits: Fits, *, metric: str | None = None, title: str | None = None, more: Mapping[str, Any] | None = None
) -> Table:
    """The table for the terminal. The line of the place chosen on dev is bold and marked with a star.

    Args:
        more: further columns, such as those of a twin: {heading: fits of one method at the same places, or {place:
            text}}.
    """
    metric = metric or fits.metric
    means = fits.mean(metric=metric)
    others = {
        name: of if isinstance(of, dict) else {m.place: _mean_cell(m, metric) for m in of.mean(metric=metric)}
        for name, of in (more or {}).items()
    }
    chosen = _chosen(fits, metric)
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    names = _names(fits)
    for name in names:
        table.add_column(name)
    for method in _methods(fits):
        table.add_column(_folded(_heading(method, means)), justify="right", no_wrap=True)
    for name in others:
        table.add_column(_folded(name), justify="right", no_wrap=True)
    screened = _screened(fits)
    for place in _places(fits)[:MOST_ROWS]:
        cells = [_cell(means, place, method, metric, screened) for method in _methods(fits)]
        cells += [of.get(place, "–") for of in others.values()]
        style = "bold" if place == chosen else None
        table.add_row(*_marked(_parts(fits, place, names), place == chosen), *cells, style=style)
    return table


def _places(fits: Fits) -> list[str]:
    """The places with fits, then the places where a screen skipped everything, because all methods train."""
    return list(dict.fromkeys([*fits.places, *(one.place for one in fits.screened)]))


def _methods(fits: Fits) -> list[str]:
    return list(dict.fromkeys([*fits.methods, *(one.method for one in fits.screened)]))


def _screened(fits: Fits) -> dict[tuple[str, str], str]:
    """{(place, method): text of its cell}: the score of the site in the screen, marked as not the cell's own score."""
    return {(one.place, one.method): f"screened ({one.score:.2f})" for one in fits.screened}


def _folded(heading: str) -> str:
    """A long heading in several lines, with breaks between words: DifferenceOfMeans, RandomSubspace 8."""
    if len(heading) < 10:
        return heading
    lines = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=:) | (?=\(×)", "\n", heading).split("\n")
    return "\n".join(fill(line, 24, break_long_words=False, break_on_hyphens=False) for line in lines)


def _names(fits: Fits) -> list[str]:
    """The columns that identify a place: layer and position, if the component is the same everywhere."""
    places = {fit.place: fit.sites for fit in fits}
    sites = {site for of in places.values() for site in of.values()}
    one_each = all(len(set(of.values())) == 1 for of in places.values())
    components, heads = {site.component for site in sites}, {site.heads for site in sites}
    if one_each and len(components) == 1 and None not in {site.layer for site in sites}:
        if len(heads) == 1:
            return ["layer", "position"]
        if all(of is not None and len(of) == 1 for of in heads):
            return ["layer", "head", "position"]
    return ["site"]


def _parts(fits: Fits, place: str, names: list[str]) -> list[str]:
    if names == ["site"]:
        return [place]
    site = next((fit.site for fit in fits if fit.place == place), None) or Site.parse(place)
    head = map(str, site.heads or ()) if "head" in names else ()
    return [str(site.layer), *head, site.positions]


def _marked(parts: list[str], chosen: bool) -> list[str]:
    """The parts of a place, with the star that the notes explain."""
    return [*parts[:-1], parts[-1] + " *"] if chosen else parts


def notes_of(fits: Fits, *, metric: str | None = None) -> list[str]:
    """Notes that are needed to read the table."""
    if not fits:
        return ["No fits.", *_failures(fits)]
    metric = metric or fits.metric
    floors, n = fits.floors.get("test"), fits[0].score(metric).n
    lines = [f"{NAMES.get(metric, metric)} on {n} test pairs. {_what_cells_hold(fits, metric)}"]
    chosen = _best(fits, metric)
    if chosen is not None:
        lines.append(
            f"*: chosen on dev, {chosen.method.label} at {chosen.place}. On test: {chosen.score(metric)}."
        )
    if floors is not None:
        right = f"Without any intervention the model answers {floors.accuracy} of the bases right."
        if metric == "iia":
            lines.append(
                f"Floors on these pairs: no intervention {floors.no_intervention.value:.2f}, best constant answer "
                f"{floors.constant.value:.2f}. {right}"
            )
        else:
            without = fits.facts.get("without_edit", {}).get(metric)
            lines.append(right if without is None else f"{right} Without it {metric} is {without:.2f}.")
        lines += _doubts(fits, chosen, floors.highest, metric)
        lines += _suspicion(fits, chosen, floors.highest, metric)
    lines += _by_kind(fits, chosen, metric)
    lines += dict.fromkeys(fit.method.caution for fit in fits if fit.method.caution)
    if others := [name for name in fits.facts.get("metrics", ()) if name != metric]:
        lines.append(f"Scored too: {', '.join(others)}. See `mean(metric=…)` and `records()`.")
    lines += _left_out(fits.facts)
    if fits.screened:
        cells, sites = {(one.place, one.method) for one in fits.screened}, {one.place for one in fits.screened}
        lines.append(
            f"Screened: {len(cells)} cells of the table at {len(sites)} sites were skipped, because a cheap first pass "
            "scored low there. In brackets: the site's dev score in that pass, not a score of the cell. See `screened`."
        )
    if len(_places(fits)) > MOST_ROWS:
        lines.append(f"The first {MOST_ROWS} of {len(_places(fits))} sites are shown; `records()` has all.")
    if "interrupted" in fits.facts:
        lines.append(f"Not finished: {fits.facts['interrupted']}.")
    return lines + _failures(fits)


def _left_out(facts: Mapping[str, Any]) -> list[str]:
    """What is left out: words that cannot be answers, and pairs that the model answers wrong."""
    dropped = [f"{n} {what}" for what, n in facts.get("dropped", {}).items()]
    lines = [f"Left out: {'; '.join(dropped)}."] if dropped else []
    if dropped and (left := {name: n for name, n in facts.get("pairs", {}).items() if n is not None}):
        lines.append(f"Pairs that are left: {', '.join(f'{n} {name}' for name, n in left.items())}.")
    return lines + answered_in_words(facts)


def answered_in_words(facts: Mapping[str, Any]) -> list[str]:
    """How many test pairs are used, if those that the model answers wrong were left out."""
    if (test := facts.get("answered", {}).get("test")) is None:
        return []
    return [
        f"Only pairs whose base and sources the model answers right are used: {test['pair']} of {test['of']} test "
        f"pairs. Of these {test['of']} bases it answers {test['base']} right."
    ]


def _doubts(fits: Fits, chosen: Fit | None, floor: float, metric: str) -> list[str]:
    """Why the score that dev chose may say nothing."""
    lines = []
    if chosen is not None and metric == "iia" and chosen.iia.low <= floor:
        lines.append(
            "The interval at the site that dev chose is not above the floors: these pairs show no effect there."
        )
    if seen := fits.facts.get("test pairs in training"):
        lines.append(
            f"Caution: {seen} of the test pairs are training pairs too. Their scores say what was memorised; search "
            "with splits that share no pair, as Pairs.split makes them."
        )
    return lines


def _suspicion(fits: Fits, chosen: Fit | None, floor: float, metric: str) -> list[str]:
    """A caution if a subspace works where the whole state does not: the model may not use such directions itself."""
    if chosen is None or metric != "iia" or chosen.iia.low <= floor:
        return []
    whole = [f.iia.value for f in fits if f.place == chosen.place and type(f.method).__name__ == "FullVector"]
    if not whole or whole[0] > floor:
        return []
    return [
        f"Caution: at {chosen.place} the interchange of the full vector is at its floor ({whole[0]:.2f}), but a "
        "subspace scores higher. It may act through directions that the model itself does not use (an illusion, "
        "Makelov et al. 2023). A site where the full vector works too is better evidence."
    ]


def _by_kind(fits: Fits, chosen: Fit | None, metric: str) -> list[str]:
    """The score of the chosen fit for each kind of pair, because one number can hide differences between kinds."""
    if chosen is None or metric not in chosen.pair_scores or len(set(fits.labels.get("kind", ()))) < 2:
        return []
    lines = fits.where(method=chosen.method, site=chosen.place, seed=chosen.seed).by_kind(metric)
    parts = [f"{line['kind']} {line['value']:.2f} ({line['n']} pairs)" for line in lines]
    return [f"Its score by kind of pair: {', '.join(parts)}."] if len(parts) > 1 else []


def _failures(fits: Fits) -> list[str]:
    lines = [f"No result: {f.method} at {f.place}, seed {f.seed}: {f.reason}" for f in fits.failures[:5]]
    if len(fits.failures) > 5:
        lines.append(f"No result of {len(fits.failures) - 5} more searches; `failures` has all.")
    return lines


def text(fits: Fits) -> str:
    """The table and its notes as plain text."""
    if not fits:
        return "\n".join(notes_of(fits))
    # Plain text everywhere: in a notebook rich would display the table itself, with colours.
    headings = [_folded(method).split("\n") for method in _methods(fits)]
    width = max(100, 24 + sum(max(18, 2 + max(map(len, lines))) for lines in headings))
    console = Console(file=StringIO(), width=width, highlight=False, color_system=None, force_jupyter=False)
    console.print(table_of(fits))
    for line in notes_of(fits):
        console.print(line, markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def html(fits: Fits) -> str:
    """The table and its notes for a notebook."""
    if not fits:
        return "".join(f"<div>{escape(line)}</div>" for line in notes_of(fits))
    means, chosen, metric = fits.mean(), _chosen(fits, fits.metric), fits.metric
    lowest = fits.floors["test"].highest if "test" in fits.floors else 0.0
    names = _names(fits)
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in names)
    head += "".join(f"<th>{escape(_heading(m, means))}</th>" for m in _methods(fits))
    body = []
    screened = _screened(fits)
    for place in _places(fits)[:MOST_ROWS]:
        weight = "bold" if place == chosen else "normal"
        cells = "".join(_html_cell(means, place, method, metric, lowest, screened) for method in _methods(fits))
        parts = _marked(_parts(fits, place, names), place == chosen)
        label = "".join(f'<td style="text-align:left">{escape(part)}</td>' for part in parts)
        body.append(f'<tr style="font-weight:{weight}">{label}{cells}</tr>')
    remarks = "".join(f"<div>{escape(line)}</div>" for line in notes_of(fits))
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        f"</table><div style='font-size:85%;color:#555'>{remarks}</div>"
    )


def _html_cell(
    means: Sequence[Mean],
    place: str,
    method: str,
    metric: str,
    lowest: float,
    screened: Mapping[tuple[str, str], str],
) -> str:
    """A cell shaded by the IIA above the floor, so that a score at the floor or below has no colour."""
    value = next((m.value for m in means if m.place == place and m.method.label == method), None)
    share = (
        0.0 if value is None or metric != "iia" else max(0.0, min(1.0, (value - lowest) / max(1e-9, 1 - lowest)))
    )
    content = escape(_cell(means, place, method, metric, screened))
    return f'<td style="text-align:right;background:rgba(79,130,160,{0.55 * share:.2f})">{content}</td>'


def _cell(
    means: Sequence[Mean], place: str, method: str, metric: str, screened: Mapping[tuple[str, str], str]
) -> str:
    found = next((m for m in means if m.place == place and m.method.label == method), None)
    return screened.get((place, method), "–") if found is None else _mean_cell(found, metric)


def _mean_cell(found: Mean | None, metric: str) -> str:
    if found is None:
        return "–"
    if found.n > 1 or not found.fits[0].losses:
        return str(found)
    one = found.fits[0].score(metric)
    low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{limit:.2f}") for limit in (one.low, one.high))
    return f"{one.value:.2f} [{low}, {high}]"


def _heading(label: str, means: Sequence[Mean]) -> str:
    most = max((mean.n for mean in means if mean.method.label == label), default=1)
    return label if most == 1 else f"{label} (×{most})"


def _what_cells_hold(fits: Fits, metric: str) -> str:
    means = fits.mean(metric=metric)
    parts = []
    if any(mean.n == 1 and mean.fits[0].losses for mean in means):
        parts.append("Brackets: the 95 % interval; methods without training have intervals of similar width.")
    if any(mean.n > 1 for mean in means):
        parts.append("±: standard deviation over seeds or draws (×); the sampling of the pairs is not included.")
    return " ".join(parts)


def _best(fits: Fits, metric: str) -> Fit | None:
    try:
        return fits.best(metric)
    except ValueError:
        return None


def _chosen(fits: Fits, metric: str) -> str | None:
    found = _best(fits, metric)
    return None if found is None else found.place
