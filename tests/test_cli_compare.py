"""`subspace-lab compare`: what it reads, says and writes, and how bad input is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import made_fit, made_fits
from typer.testing import CliRunner

from subspace_lab.analysis.comparisons import compare
from subspace_lab.cli import app
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, RandomSubspace

SITES = [Site("block_output", layer, position) for layer in (0, 1, 2) for position in ("amount", "last")]


def run(*options: str | Path) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, options)])


def refused(*options: str | Path) -> str:
    """The line on standard error."""
    result = run(*options)
    assert result.exit_code == 2 and not result.stdout, (result.stdout, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("subspace-lab: ")]) == len(lines), result.stderr
    return lines[-1]


def searched(
    folder: Path,
    weights: str = "aa",
    seeds: tuple[int, ...] = (0, 1),
    twins: int = 0,
    test: float = 0.9,
    **facts: Any,
) -> Path:
    """A folder such as a search leaves."""

    def fits(first: int, test: float, weights: str = weights) -> Fits:
        found = []
        for site in SITES:
            found += [made_fit(site, DAS(3), first + seed, test=test) for seed in seeds]
            found += [made_fit(site, PCA(3)), made_fit(site, RandomSubspace(3))]
        return made_fits(found, facts={"task": "prices", "model": {"weights": weights}, **facts})

    folder.mkdir(parents=True)
    fits(0, test).save(folder / "model")
    for i in range(twins):
        fits(100 * (i + 1), 0.3, f"twin{i}").save(folder / ("twin" if i == 0 else f"twin{i + 1}"))
    (folder / "results.json").write_text("{}")
    return folder


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return found


def test_layers_of_one_search_beside_seeds_chance_and_twin(tmp_path: Path) -> None:
    folder = searched(tmp_path / "a", twins=2)
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "compare.png", "angles.png"}
    trained = Fits.load(folder / "model").where(method="DAS")
    expected = compare(trained, across="layer", within="seed")
    found = told(tmp_path / "out")
    assert expected.across is not None
    assert found["across"]["mean"] == pytest.approx(expected.across.mean) and found["labels"] == list(
        expected.labels
    )
    assert found["nulls"]["2 random twins"]["draws"] == 2 * 24  # whatever their own scores
    assert found["settings"]["across"] == "layer" and found["settings"]["within"] == "seed"
    said = " ".join(result.stdout.split())
    for part in (
        "across layers",
        "two seeds at one site",
        "random subspaces",
        "2 random twins",
        "24 pairs of 12 fits",
    ):
        assert part in said, part
    assert found["sentence"] in said and "Written to" in said
    assert not result.stderr


def test_a_folder_of_fits_alone_and_options_that_choose(tmp_path: Path) -> None:
    folder = searched(tmp_path / "a") / "model"
    result = run(
        folder, "--positions", "last", "--method", "DAS 3", "--measure", "geodesic", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = told(tmp_path / "out")
    assert found["measure"] == "geodesic" and len(found["labels"]) == 6 and found["across"]["mean"] > 1


def test_models_and_searches_of_one_model(tmp_path: Path) -> None:
    ours, theirs = searched(tmp_path / "a"), searched(tmp_path / "b", "bb", seeds=(5, 6))
    assert run(ours, theirs, "--out", tmp_path / "models").exit_code == 0
    found = told(tmp_path / "models")
    assert found["facets"] == ["model", "seed"] and len(found["across"]["values"]) == 6 * 4
    more = searched(tmp_path / "c", seeds=(7,))
    assert run(ours, more, "--across", "seed", "--out", tmp_path / "seeds").exit_code == 0
    assert len(told(tmp_path / "seeds")["across"]["values"]) == 6 * 3
    assert told(tmp_path / "seeds")["labels"][-1].startswith("c, block_output[2]@last")


def test_one_twin_of_two_runs_is_one_twin_and_different_pairs_are_named(tmp_path: Path) -> None:
    ours = searched(tmp_path / "a", twins=1, data="11")
    more = searched(tmp_path / "b", seeds=(7,), twins=1, data="22")
    result = run(ours, more, "--across", "seed", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert list(told(tmp_path / "out")["nulls"]) == ["random twin"]
    assert "a, b: one model, searched with different pairs" in " ".join(result.stderr.split())
    alone = run(ours, "--across", "seed", "--out", tmp_path / "alone")
    assert "different pairs" not in alone.stderr


def test_one_seed_has_no_yardstick_and_says_so(tmp_path: Path) -> None:
    result = run(searched(tmp_path / "a", seeds=(0,)), "--out", tmp_path / "out")
    assert result.exit_code == 0 and "Search with --seed 0,1,2" in result.stderr
    assert told(tmp_path / "out")["within"] is None


def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path: Path) -> None:
    folder, out = searched(tmp_path / "a"), ("--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    options: Any
    for options, message in [
        ([tmp_path / "none"], "is no folder; give one that subspace-lab search wrote"),
        ([tmp_path / "empty"], "There is no fits.json"),
        ([folder, folder], "One folder was given twice"),
        ([folder, "--measure", "angle"], "--measure angle: possible are overlap, containment"),
        ([folder, "--method", "LDA"], "No fit of method 'LDA'"),
        ([folder, "--rank", "7"], "rank=7"),
        ([folder, "--across", "rank"], "across='rank'"),
        ([folder, searched(tmp_path / "same", "bb")], "--same-start"),
        ([folder, searched(tmp_path / "other", task="colours")], "different tasks"),
        ([folder, searched(tmp_path / "third", "cc", seeds=(8,)), "--across", "layer"], "--across model"),
        ([searched(tmp_path / "floor", test=0.3)], "All 12 fits are at their floor"),
    ]:
        assert message in refused(*options, *out), message
        assert not (tmp_path / "out").exists()
    broken = searched(tmp_path / "broken") / "model" / "fits.json"
    broken.write_text(broken.read_text()[:100])
    assert "is not JSON" in refused(tmp_path / "broken", *out)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    assert "is not empty" in refused(folder, "--out", tmp_path / "taken")


def test_a_full_disk_costs_only_what_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_lab.analysis.plots import canvas

    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(canvas, "whole_file", full)
    result = run(searched(tmp_path / "a"), "--out", tmp_path / "out")
    assert result.exit_code == 2 and "compare.png, angles.png (No space left on device)" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json"}
    assert "across layers" in result.stdout
