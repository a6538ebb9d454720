"""One HTML file that says what a search found: question, data, table, pictures, controls, verdict, how to repeat it.

The file stands alone: pictures are in it as data URIs, and nothing is fetched from elsewhere. Every text that comes
from a model, a task or a user is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from subspace_lab.analysis._html import STYLE, figure_of, listed, nulls, number, paragraph, section, table
from subspace_lab.analysis.plots.canvas import FRAME
from subspace_lab.analysis.plots.curves import iia_by_rank, methods_beside, training_curves
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.core.files import package_version, read_json, write_text
from subspace_lab.das.fits import Fit, Fits, answered_in_words

RESULTS, VERDICT, MODEL = "results.json", "verdict.json", "model"
OWN = ("iia.png",)  # pictures of a search that are drawn anew here, with all that the report knows
CAPTIONS = {"overlap.png": "Overlap of the subspaces found", "verdict.png": "The model against its twins"}


@dataclass(frozen=True)
class Run:
    """What a search left in a folder.

    Attributes:
        folder: where it lies.
        fits: of the model.
        twins: of its randomly initialised twins.
        settings: how the command was called; empty for a sweep that was saved from Python.
        verdict: as JSON; None where none was given.
        pictures: {file: PNG} that others have left there.
    """

    folder: Path
    fits: Fits
    twins: tuple[Fits, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def read_run(folder: str | Path) -> Run:
    """What `subspace-lab search` left in a folder, or `Fits.save` and a sweep with `out`.

    Raises:
        FileNotFoundError: nothing of that kind there.
        ValueError: files that are broken, or of something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; needed is one that `subspace-lab search` left.")
    if not (folder / RESULTS).is_file():
        return Run(folder, Fits.load(folder), verdict=_verdict(folder, {}))
    results = read_json(folder / RESULTS)
    if not isinstance(results, dict) or "settings" not in results or not (folder / MODEL).is_dir():
        raise ValueError(
            f"{folder / RESULTS} is of no search: needed is a folder that `subspace-lab search` left, with its "
            f"{MODEL}/ inside."
        )
    twins = [path for path in sorted(folder.glob("twin*")) if path.is_dir()]
    pictures = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png")) if path.name not in OWN}
    return Run(
        folder,
        Fits.load(folder / MODEL),
        tuple(Fits.load(path) for path in twins),
        results["settings"],
        _verdict(folder, results),
        pictures,
    )


def report(run: Run, command: str | None = None) -> str:
    """The report as HTML.

    Args:
        run: as `read_run` gives it.
        command: what runs the search again, as one types it.

    Raises:
        ValueError: no fits.
    """
    if not run.fits:
        raise ValueError(f"{run.folder} holds no fits: there is nothing to report.")
    best, facts = run.fits.best(), run.fits.facts
    title = f"{facts.get('task') or 'Search'!s}: where is {' and '.join(run.fits.variables)}?"
    parts = [
        section("Question", _question(run, best)),
        section("Verdict", _told_verdict(run.verdict)),
        section("Data", _data(run)),
        section("Scores", _scores(run)),
        section("Pictures", _pictures(run, best)),
        section("Controls", _controls(run, best)),
        section("How to repeat it", _again(run, command)),
    ]
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{''.join(parts)}</main></body></html>\n"
    )


def save_report(run: Run, path: str | Path, command: str | None = None) -> None:
    """Write the report, aside and renamed; errors as of `report`, and OSError."""
    text = report(run, command)
    write_text(Path(path), text)


# --- sections -----------------------------------------------------------------------------------------------


def _question(run: Run, best: Fit) -> str:
    model = run.fits.facts.get("model", {})
    name = model.get("name") or model.get("class") or "the model"
    floor, iia = run.fits.floors["test"].highest, best.score(run.fits.metric)
    what = (
        f"Where in {name} does {' and '.join(run.fits.variables)} stand? At each of {len(run.fits.places)} sites a "
        "subspace was searched whose exchange between two inputs changes the answer as the causal model says."
    )
    found = (
        f"Dev pairs choose {best.method.label} at {best.place}. On {iia.n} test pairs its {_metric(run)} is "
        f"{iia.value:.2f}, 95 % interval {iia.low:.2f} to {iia.high:.2f}; the higher floor is {floor:.2f}"
        f"{_twin(run, best)}."
    )
    return paragraph(what, "lead") + paragraph(found, "lead")


def _told_verdict(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return paragraph(
            "None was given: the numbers below are no claim by themselves. The command subspace-lab check gives one."
        )
    conclusion = str(verdict.get("conclusion", verdict.get("verdict", "unknown")))
    preliminary = " (preliminary)" if verdict.get("preliminary") else ""
    kind = "verdict" if conclusion == "supported" else "verdict no"
    said = f'<div class="{kind}"><p><b>{escape(conclusion)}{preliminary}</b></p>'
    if reason := verdict.get("reason"):
        said += paragraph(str(reason))
    said += "</div>"
    checks = [one for one in verdict.get("checks", []) if isinstance(one, Mapping)]
    if checks:
        rows = [
            [
                str(one.get("name", "")),
                number(one.get("observed")),
                nulls(one.get("null")),
                number(one.get("p")),
                "yes" if one.get("passed") is True else "no" if one.get("passed") is False else "–",
                str(one.get("because", "")),
            ]
            for one in checks
        ]
        said += table(["check", "observed", "null", "p", "passed", "because"], rows)
    return said


def _data(run: Run) -> str:
    facts = run.fits.facts
    sizes = facts.get("pairs", {})
    shown = {
        "task": facts.get("task"),
        "variables": ", ".join(run.fits.variables),
        "pairs": ", ".join(f"{name} {size}" for name, size in sizes.items()),
        "left out": "; ".join(f"{n} {what}" for what, n in facts.get("dropped", {}).items()) or None,
        "fingerprint of the pairs": facts.get("data"),
        "intervals": facts.get("intervals"),
    }
    told = listed({name: value for name, value in shown.items() if value})
    return told + "".join(paragraph(line, "small") for line in answered_in_words(facts))


def _scores(run: Run) -> str:
    # Escaped by the table itself.
    return f'<div class="wide scores">{run.fits._repr_html_()}</div>'


def _pictures(run: Run, best: Fit) -> str:
    here = run.fits.where(site=best.place)
    whole = tuple(twin for twin in run.twins if twin.places == run.fits.places)
    drawn: list[tuple[str, Callable[[], Figure]]] = [
        ("Scores by layer and position", lambda: iia_heatmap(run.fits, _joined(whole), metric=run.fits.metric)),
        ("Methods beside each other at the site that dev chose", lambda: methods_beside(here)),
        ("Score by rank at that site", lambda: iia_by_rank(here)),
        ("Training at that site", lambda: training_curves(here)),
    ]
    found = []
    for caption, draw in drawn:
        try:
            figure = draw()
        except ValueError:  # one rank, nothing trained, places without a layer
            continue
        into = BytesIO()
        figure.savefig(into, format="png", **FRAME)
        found.append(figure_of(into.getvalue(), caption))
    found += [figure_of(png, CAPTIONS.get(name, name)) for name, png in run.pictures.items()]
    return "".join(found) or paragraph("None can be drawn of these fits.")


def _controls(run: Run, best: Fit) -> str:
    metric, floors = run.fits.metric, run.fits.floors["test"]
    rows = [
        ["no intervention", f"{floors.no_intervention}", "all test pairs"],
        ["best constant answer", f"{floors.constant}", "all test pairs"],
    ]
    for mean in run.fits.where(site=best.place).mean(metric=metric):
        if mean.method.control:
            spread = f"{mean.low:.2f} to {mean.high:.2f}, {mean.n} draws" if mean.n > 1 else ""
            rows.append(
                [mean.method.label, f"{mean.value:.2f}", f"at {best.place}{f', {spread}' if spread else ''}"]
            )
    for i, twin in enumerate(run.twins):
        same = [f for f in twin if f.place == best.place and f.method.label == best.method.label]
        if same:
            value = sum(f.score(metric).value for f in same) / len(same)
            rows.append(
                [f"twin {i + 1}: {best.method.label}", f"{value:.2f}", f"at {best.place}, weights drawn anew"]
            )
    told = table(["control", _metric(run), "of"], rows)
    if not run.twins:
        told += paragraph(
            "No randomly initialised twin was searched: what the architecture alone gives is not known."
        )
    return told


def _again(run: Run, command: str | None) -> str:
    facts = run.fits.facts
    model = facts.get("model", {})
    training = ", ".join(f"{k} {v}" for k, v in facts.get("training", {}).items())
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    shown = {
        "model": ", ".join(f"{k} {v}" for k, v in model.items() if v),
        "methods": ", ".join(run.fits.methods),
        "seeds": ", ".join(map(str, facts.get("seeds", []))),
        "training": training,
        "versions": versions,
    }
    told = listed({name: value for name, value in shown.items() if value})
    if command is not None:
        told += f"<pre>{escape(command)}</pre>"
    else:
        told += paragraph("The search was called from Python: `fits.facts` is its recipe.")
    return told + paragraph(f"Written by subspace_lab {package_version()}.", "small")


def _metric(run: Run) -> str:
    return "IIA" if run.fits.metric == "iia" else run.fits.metric


def _twin(run: Run, best: Fit) -> str:
    values = [
        fit.score(run.fits.metric).value
        for twin in run.twins
        for fit in twin
        if fit.place == best.place and fit.method.label == best.method.label
    ]
    if not values:
        return ""
    several = f"the highest of {len(run.twins)} randomly initialised twins" if len(run.twins) > 1 else "its twin's"
    return f", {several} {max(values):.2f}"


def _joined(twins: Sequence[Fits]) -> Fits | None:
    """Several twins as the seeds of one."""
    if not twins:
        return None
    fits = tuple(fit for twin in twins for fit in twin)
    return Fits(fits, twins[0].floors, facts=twins[0].facts, screened=twins[0].screened)


def _verdict(folder: Path, results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a full check has said, else what the search itself has said."""
    found = read_json(folder / VERDICT) if (folder / VERDICT).is_file() else results.get("verdict")
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(
            f"The verdict in {folder} is {type(found).__name__}; needed is an object with a conclusion."
        )
    return found
