"""One HTML file that says what a search found: question, data, table, pictures, controls, verdict, how to repeat it.

The file needs no other files: pictures are inside it as data URIs, and nothing is loaded from the network. Every text
that comes from a model, a task or a user is escaped.
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
OWN = ("iia.png",)  # pictures of a search that are drawn again here, since the report knows more
CAPTIONS = {"overlap.png": "Overlap of the subspaces found", "verdict.png": "The model against its twins"}


@dataclass(frozen=True)
class Run:
    """The results of a search in a folder.

    Attributes:
        folder: the folder.
        fits: the fits of the model.
        twins: the fits of its randomly initialised twins.
        settings: how the command was called; empty for a sweep that was saved from Python.
        verdict: the verdict as JSON; None if there is none.
        pictures: {name: PNG} of the other pictures in the folder.
    """

    folder: Path
    fits: Fits
    twins: tuple[Fits, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def read_run(folder: str | Path) -> Run:
    """Read a folder that was written by `subspace-lab search`, `Fits.save` or a sweep with `out`.

    Raises:
        FileNotFoundError: there are no such results.
        ValueError: the files are broken, or are no results of a search.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one that `subspace-lab search` wrote.")
    if not (folder / RESULTS).is_file():
        return Run(folder, Fits.load(folder), verdict=_verdict(folder, {}))
    results = read_json(folder / RESULTS)
    if not isinstance(results, dict) or "settings" not in results or not (folder / MODEL).is_dir():
        raise ValueError(
            f"{folder / RESULTS} is not the result of a search: needed is a folder that `subspace-lab search` wrote, "
            f"with {MODEL}/ inside."
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
        run: from `read_run`.
        command: the command that runs the search again.

    Raises:
        ValueError: no fits.
    """
    if not run.fits:
        raise ValueError(f"{run.folder} holds no fits, so there is nothing to report.")
    best, facts = run.fits.best(), run.fits.facts
    title = f"{facts.get('task') or 'Search'!s}: where is {' and '.join(run.fits.variables)}?"
    parts = [
        section("Question", _question(run, best)),
        section("Verdict", _verdict_section(run.verdict)),
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
    """Write the report under a provisional name, then rename it. Errors as `report`, and OSError."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {Path(path) / 'report.html'}.")
    text = report(run, command)
    write_text(Path(path), text)


# --- sections -----------------------------------------------------------------------------------------------


def _question(run: Run, best: Fit) -> str:
    model = run.fits.facts.get("model", {})
    name = model.get("name") or model.get("class") or "the model"
    floor, iia = run.fits.floors["test"].highest, best.score(run.fits.metric)
    what = (
        f"Where in {name} is the variable {' and '.join(run.fits.variables)}? The search looked at "
        f"{len(run.fits.places)} sites for a subspace that holds it: exchanging this subspace between two inputs "
        "changes the answer as the causal model says."
    )
    found = (
        f"The dev pairs chose {best.method.label} at {best.place}. On {iia.n} test pairs its {_metric(run)} is "
        f"{iia.value:.2f}, 95 % interval {iia.low:.2f} to {iia.high:.2f}; the higher floor is {floor:.2f}"
        f"{_twin(run, best)}."
    )
    return paragraph(what, "lead") + paragraph(found, "lead")


def _verdict_section(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return paragraph(
            "There is no verdict yet. Without one the numbers below support no claim. The command subspace-lab check "
            "makes one."
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
        said += table(["check", "observed", "compared with", "p", "passed", "because"], rows)
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
    entries = listed({name: value for name, value in shown.items() if value})
    return entries + "".join(paragraph(line, "small") for line in answered_in_words(facts))


def _scores(run: Run) -> str:
    # Escaped by the table itself.
    return f'<div class="wide scores">{run.fits._repr_html_()}</div>'


def _pictures(run: Run, best: Fit) -> str:
    here = run.fits.where(site=best.place)
    whole = tuple(twin for twin in run.twins if twin.places == run.fits.places)
    drawn: list[tuple[str, Callable[[], Figure]]] = [
        ("Scores by layer and position", lambda: iia_heatmap(run.fits, _joined(whole), metric=run.fits.metric)),
        ("All methods at the site that the dev pairs chose", lambda: methods_beside(here)),
        ("Score by rank at that site", lambda: iia_by_rank(here)),
        ("Training loss at that site", lambda: training_curves(here)),
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
    return "".join(found) or paragraph("These fits have no picture.")


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
            rows.append([f"twin {i + 1}: {best.method.label}", f"{value:.2f}", f"at {best.place}, random weights"])
    lines = table(["control", _metric(run), "where"], rows)
    if not run.twins:
        lines += paragraph(
            "No randomly initialised twin was searched, so the score of the untrained architecture is not known."
        )
    return lines


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
    entries = listed({name: value for name, value in shown.items() if value})
    if command is not None:
        entries += f"<pre>{escape(command)}</pre>"
    else:
        entries += paragraph("The search was called from Python; `fits.facts` holds its settings.")
    return entries + paragraph(f"Written by subspace_lab {package_version()}.", "small")


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
    several = f"the best of {len(run.twins)} randomly initialised twins" if len(run.twins) > 1 else "its twin"
    return f", and {several} has {max(values):.2f}"


def _joined(twins: Sequence[Fits]) -> Fits | None:
    """The fits of several twins, as if they were the seeds of one twin."""
    if not twins:
        return None
    fits = tuple(fit for twin in twins for fit in twin)
    return Fits(fits, twins[0].floors, facts=twins[0].facts, screened=twins[0].screened)


def _verdict(folder: Path, results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The verdict of `subspace-lab check`, or else the verdict of the search itself."""
    found = read_json(folder / VERDICT) if (folder / VERDICT).is_file() else results.get("verdict")
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(
            f"The verdict in {folder} is a {type(found).__name__}; needed is an object with a conclusion."
        )
    return found
