"""The report: one file that stands alone, says what the results say, and shows texts of others as texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_sweeps import made_fit, made_fits
from typer.testing import CliRunner

from subspace_lab.analysis._html import nulls
from subspace_lab.analysis.report import Run, read_run, report, save_report
from subspace_lab.cli import app
from subspace_lab.cli.report import command_of
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, Method, RandomSubspace

PLACES = [Site("block_output", layer, position) for layer in (0, 1) for position in ("amount", "last")]
METHODS = (
    (DAS(1), 1, 1),
    (DAS(4), 4, 2),
    (PCA(4), 4, 1),
    (RandomSubspace(4, draws=2), 4, 2),
    (FullVector(), 16, 1),
)
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too' </td></main>"


def fits(**changes: Any) -> Fits:
    best = {PLACES[3]: 0.94}

    def high(site: Site, method: Method, otherwise: float) -> float:
        return best.get(site, otherwise) if isinstance(method, DAS) else 0.4

    each = [
        made_fit(site, method, seed, test=high(site, method, 0.42), dev=high(site, method, 0.4), rank=rank)
        for site in PLACES
        for method, rank, seeds in METHODS
        for seed in range(seeds)
    ]  # fmt: skip
    return made_fits(each, **changes)


def twin() -> Fits:
    return made_fits([made_fit(site, DAS(rank), test=0.45) for site in PLACES for rank in (1, 4)], 0.2)


VERDICT = {
    "conclusion": "supported",
    "preliminary": True,
    "reason": "At block_output[1]@last it holds.",
    "checks": [
        {"name": "twins", "observed": 0.94, "null": [0.41, 0.45, 0.39], "p": 0.05, "passed": True, "because": ""},
        {"name": "power", "observed": None, "null": [], "p": None, "passed": None, "because": "not asked"},
    ],
}  # fmt: skip


class Page(HTMLParser):
    """The tags that are open, all that are met, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self._heading = data
            self.sections[data] = ""
        elif self._heading and self.open:
            self.sections[self._heading] += data


def page(run: Run, command: str | None = None) -> Page:
    found = Page(report(run, command))
    assert not found.open  # every tag is closed
    return found


def test_all_that_a_reader_asks_for_is_there() -> None:
    run = Run(Path("runs/a"), fits(), (twin(),), {"task": "prices"}, VERDICT, {"overlap.png": b"\x89PNG"})
    found = page(run, "subspace-lab search --task prices")
    sections = {name: " ".join(text.split()) for name, text in found.sections.items()}
    assert list(sections) == ["Question", "Verdict", "Data", "Scores", "Pictures", "Controls", "How to repeat it"]
    assert "DAS 1 at block_output[1]@last" in sections["Question"] or "DAS 4 at" in sections["Question"]
    assert "On 321 test pairs its IIA is 0.94, 95 % interval 0.91 to 0.96" in sections["Question"]
    assert "the higher floor is 0.38" in sections["Question"]
    assert "supported (preliminary)" in sections["Verdict"] and "0.39 to 0.45 (n = 3)" in sections["Verdict"]
    assert sections["Scores"].count("0.94") >= 2 and "chosen on dev" in sections["Scores"]
    for control in ("no intervention", "best constant answer", "RandomSubspace 4", "FullVector"):
        assert control in sections["Controls"]
    assert "subspace-lab search --task prices" in sections["How to repeat it"]
    captions = [attrs["alt"] for tag, attrs in found.tags if tag == "img"]
    assert (
        captions[0] == "Scores by layer and position"
        and captions[-1] == "Overlap of the subspaces found"
        and len(captions) == 5
    )


def test_the_file_stands_alone() -> None:
    """No script, no link, no source but data inside."""
    found = page(Run(Path("runs/a"), fits(), (twin(),)))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    sources = [attrs["src"] or "" for tag, attrs in found.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    text = report(Run(Path("runs/a"), fits()))
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "@import" not in text and "url(" not in text


def test_one_value_is_no_range_and_the_chosen_site_has_its_star() -> None:
    assert nulls([0.5]) == "0.50" and nulls([0.4, 0.5]) == "0.40 to 0.50 (n = 2)"
    text = report(Run(Path("run"), fits(), verdict=VERDICT))
    assert "compared with" in text and "<th>null</th>" not in text
    starred = [line for line in re.findall(r"<tr style=.*?</tr>", text) if " *</td>" in line]
    assert len(starred) == 1 and "font-weight:bold" in starred[0] and "*: chosen on dev" in text


def test_texts_of_others_are_shown_as_texts() -> None:
    """In the task, the variable, the model, the verdict, the names of files, and the command."""
    hostile = [
        replace(fit, alignment=type(fit.alignment)({HOSTILE: fit.alignment.variables["above"]})) for fit in fits()
    ]
    facts = {
        "task": HOSTILE, "model": {"name": HOSTILE, "class": HOSTILE}, "data": HOSTILE, "dropped": {HOSTILE: 2},
        "versions": {HOSTILE: HOSTILE}, "training": {HOSTILE: HOSTILE}, "intervals": HOSTILE,
    }  # fmt: skip
    verdict = {
        "conclusion": HOSTILE, "reason": HOSTILE,
        "checks": [{"name": HOSTILE, "observed": HOSTILE, "null": HOSTILE, "p": HOSTILE, "because": HOSTILE}],
    }  # fmt: skip
    run = Run(Path("runs/a"), made_fits(hostile, facts=facts), (), {}, verdict, {HOSTILE: b"\x89PNG"})
    found = page(run, HOSTILE)
    assert not [tag for tag, _ in found.tags if tag == "script"]
    text = report(run, HOSTILE)
    assert "<script" not in text and text.count("</main>") == 1
    shown = [name for name, content in found.sections.items() if "<script>alert(1)</script>" in content]
    assert set(shown) == {"Question", "Verdict", "Data", "Scores", "Pictures", "How to repeat it"}
    assert {"alt": HOSTILE}.items() <= dict([a for t, a in found.tags if t == "img"][-1]).items()


def test_what_is_not_there_is_said() -> None:
    sections = page(Run(Path("runs/a"), fits())).sections
    assert "There is no verdict yet" in sections["Verdict"] and "subspace-lab check" in sections["Verdict"]
    assert "No randomly initialised twin was searched" in sections["Controls"]
    assert "called from Python" in sections["How to repeat it"]
    with pytest.raises(ValueError, match="holds no fits"):
        report(Run(Path("runs/a"), made_fits([])))


def left(folder: Path, **results: Any) -> Path:
    """A folder as a search leaves it."""
    folder.mkdir()
    fits().save(folder / "model")
    twin().save(folder / "twin")
    (folder / "iia.png").write_bytes(b"old")
    (folder / "overlap.png").write_bytes(b"\x89PNG")
    settings = {"model": "tiny_decoder", "task": "prices", "twin": True, "batch_size": 32, "out": str(folder)}
    (folder / "results.json").write_text(json.dumps({"settings": settings, "model": {}, **results}))
    return folder


def test_a_folder_of_a_search_is_read_and_the_full_check_has_the_last_word(tmp_path: Path) -> None:
    folder = left(tmp_path / "a", verdict={"conclusion": "not found"})
    run = read_run(folder)
    assert run.fits == fits() and run.twins == (twin(),) and list(run.pictures) == ["overlap.png"]
    assert run.verdict == {"conclusion": "not found"}
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    assert read_run(folder).verdict == VERDICT
    save_report(run, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report(run)
    fits().save(tmp_path / "b")
    assert read_run(tmp_path / "b") == Run(tmp_path / "b", fits())


def test_the_command_writes_the_file_and_refuses_other_folders_in_a_line(tmp_path: Path) -> None:
    folder = left(tmp_path / "a")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0 and f"Written to {folder / 'report.html'}" in done.stderr
    assert "<pre>subspace-lab search --task prices</pre>" in (folder / "report.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "other.html")])
    assert done.exit_code == 0 and (tmp_path / "other.html").is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "results.json").write_text('{"settings": {}}')
    left(tmp_path / "odd", verdict=["supported"])
    for name, said in (
        ("nowhere", "is no folder"),
        ("empty", "There is no fits.json"),
        ("adapter", "is not the result of a search"),
        ("odd", "needed is an object with a conclusion"),
    ):
        done = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / name / "report.html").exists()
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        save_report(Run(tmp_path, fits()), tmp_path)


SETTINGS = {
    "model": "some folder", "task": "price_tagging", "data": None, "split_by": None, "variable": "above_lower",
    "layers": "0,2", "positions": "amount,last", "component": "block_output", "heads": None, "method": "DAS,PCA",
    "receiver": None, "rank": "1,4", "steps": 7, "learning_rate": 0.05, "pairs": 40, "dev_pairs": 20, "test_pairs": 40,
    "seed": "0,1", "twin": False, "twins": 1, "screen": True, "answers": "token", "chat": False, "count_all": True,
    "allow_failing_model": False, "memory": None, "device": "cpu", "dtype": "float32", "trust_remote_code": False,
}  # fmt: skip


def test_the_command_in_the_report_is_the_search_that_was_run() -> None:
    """What the terminal makes of it are the settings that it was made of."""
    import shlex

    made = {"batch_size": 32, "out": "runs/a"}
    command = command_of({**SETTINGS, **made})
    words = shlex.split(command)
    assert words[:2] == ["subspace-lab", "search"] and "--no-twin" in words and "--batch-size" not in words
    search = typer.main.get_command(app).commands["search"]  # type: ignore[attr-defined]
    parsed = search.make_context("search", words[2:]).params
    assert {name: parsed[name] for name in SETTINGS} == SETTINGS
    assert "--model" not in command_of({**SETTINGS, "model": "tiny_decoder"})
    assert "--twin" not in shlex.split(command_of({**SETTINGS, "twin": True}))
