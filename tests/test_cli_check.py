"""`subspace-lab check`: the folder that a search left gets a verdict; and the last paragraph of a search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import FILES, PAIRS, search
from typer.testing import CliRunner, Result

from subspace_lab.analysis import checking
from subspace_lab.analysis.verdicts import Verdict
from subspace_lab.cli import app
from subspace_lab.das.fits import Fits

OPTIONS = ["--layers", "1", "--positions", "amount,last", "--steps", "20", "--pairs", "120", "--dev-pairs", "60",
           "--test-pairs", "100"]  # fmt: skip


def check(*options: str | Path) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, options)])


def last_paragraph(text: str) -> str:
    return " ".join(text.rstrip().rpartition("\n\n")[2].split())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("searched") / "out"
    result = search(*OPTIONS, "--seed", "3", "--out", folder)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, result


@pytest.fixture
def folder(done: tuple[Path, Result], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[0], tmp_path / "out"))


def test_the_last_paragraph_of_a_search_is_its_verdict(done: tuple[Path, Result]) -> None:
    folder, result = done
    told = json.loads((folder / "results.json").read_text(encoding="utf-8"))["verdict"]
    verdict = Verdict.from_dict(told)
    assert verdict.preliminary and verdict.claim.place == Fits.load(folder / "model").best().place
    assert last_paragraph(result.stdout).startswith(
        f"Verdict: {verdict.conclusion} (preliminary). At block_output[1]@"
    )
    assert "`subspace-lab check " in last_paragraph(result.stdout)
    assert verdict.p == 0.5 and verdict.grid_p in (0.5, 1.0) and verdict.check("complement")


def test_without_a_twin_there_is_no_verdict(tmp_path: Path) -> None:
    result = search(*OPTIONS[:-6], *PAIRS, "--no-twin", "--out", tmp_path)
    assert result.exit_code == 0 and last_paragraph(result.stdout).startswith(
        "No verdict. Without twins no verdict"
    )
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["verdict"] is None


def test_a_folder_gets_its_verdict_and_can_be_checked_further(folder: Path) -> None:
    result = check(folder, "--twins", "1", "--seeds", "1")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert {path.name for path in folder.iterdir()} == FILES | {"check", "verdict.json", "verdict.png"}
    verdict = Verdict.load(folder / "verdict.json")
    told = " ".join(result.stdout.split())
    assert f"Verdict: {verdict.conclusion} (preliminary)." in told and verdict.grid_p is not None
    for one in verdict.checks:
        assert one.name in told
    assert (folder / "verdict.png").read_bytes().startswith(b"\x89PNG")
    again = check(folder, "--twins", "2", "--seeds", "1")
    assert again.exit_code == 2 and "--resume" in again.stderr and "Traceback" not in again.stderr
    more = check(folder, "--twins", "2", "--seeds", "1", "--resume")
    assert more.exit_code == 0, (more.stderr, more.exception)
    assert len(Verdict.load(folder / "verdict.json").check("twins").null) == 2
    # Fewer twins would choose among those that were searched.
    fewer = check(folder, "--twins", "1", "--seeds", "1", "--resume")
    assert fewer.exit_code == 0 and "2 twins were searched here before" in fewer.stderr
    assert len(Verdict.load(folder / "verdict.json").check("twins").null) == 2
    # The search itself can go on in its folder, which has a check now.
    resumed = search(*OPTIONS, "--seed", "3", "--resume", "--out", folder)
    assert resumed.exit_code == 0 and "finished" in resumed.stderr, resumed.stderr


def test_an_interrupted_check_says_how_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checking, "judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = check(folder, "--twins", "1")
    assert result.exit_code == 130 and "--resume goes on" in result.stderr
    assert not (folder / "verdict.json").exists() and (folder / "check" / "twin_1" / "fits.json").is_file()
    assert check(folder, "--twins", "1", "--resume").exit_code == 0


def test_folders_that_cannot_be_checked_are_refused_in_a_line(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, *options: str | Path) -> None:
        result = check(*options)
        assert result.exit_code == 2, (result.stdout, result.exception)
        line = result.stderr.strip()
        assert match in line and "\n" not in line, line

    refused("no such folder", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    refused("no finished search", tmp_path / "empty")
    refused("Without twins", folder, "--twins", "0")
    refused("--seeds 0", folder, "--seeds", "0")
    (folder / "notes.txt").write_text("mine")
    refused("notes.txt", folder)
    (folder / "notes.txt").unlink()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["settings"]["pairs"] = 130
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    refused("not the pairs of the fits", folder)
    for broken, match in (
        ("{", "not JSON"),
        ("[]", "settings of this version"),
        ('{"settings": {}}', "settings of this version"),
    ):
        (folder / "results.json").write_text(broken, encoding="utf-8")
        refused(match, folder)
    assert not (folder / "check").exists() and not (folder / "verdict.json").exists()
