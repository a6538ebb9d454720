"""Sweeps in a folder: killed at any moment they go on where they were, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import QUICK, SITES, counterfactuals, pairs, swept, tiny
from torch import Tensor, nn

from subspace_lab.core import files
from subspace_lab.core._locks import LOCK
from subspace_lab.core.sites import Site
from subspace_lab.das import _places, _recipe
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods import DAS, PCA, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import iia, log_odds
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import SweepInterrupted, SweepUnsaved, sweep

METHODS: list[Method] = [DAS([1, 2]), PCA(2), RandomSubspace(1, draws=2)]
PLACES = [Site("block_output", 0, "2"), Site("block_output", 1, "last"), Site("block_output", 0, "last")]
WHOLE = {"sweep.json", "fits.json", "subspaces.safetensors"}


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(one: Fits, other: Fits) -> bool:
    """Bit for bit: records, losses, bases, the score of every pair."""
    for a, b in zip(one, other, strict=True):
        if a.record() != b.record() or a.losses != b.losses or dict(a.alignment.facts) != dict(b.alignment.facts):
            return False
        if not all(torch.equal(a.subspace(v).basis(), b.subspace(v).basis()) for v in a.alignment.variables):
            return False
        if any(not torch.equal(a.pair_scores[name], b.pair_scores[name]) for name in a.pair_scores):
            return False
    return one.as_dict() == other.as_dict()


class _Counted:
    """Counts searches of a place, and ends at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end_at: int | None = None, how: Any = None) -> None:
        self.at: list[str] = []
        at = _places.Places.at

        def counted(places: Any, assignment: Any, on_step: Any) -> Any:
            if len(self.at) + 1 == end_at:
                how()
            self.at.append(str(next(iter(assignment.values()))))
            return at(places, assignment, on_step)

        monkeypatch.setattr(_places.Places, "at", counted)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def alone() -> Fits:
    """What a sweep gives that nothing disturbs."""
    return swept(METHODS, PLACES)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That sweep in a folder: whole, and interrupted at its third site. Copy it, or leave it as it is."""
    root = tmp_path_factory.mktemp("states")
    swept(METHODS, PLACES, out=root / "whole")
    with pytest.MonkeyPatch.context() as patched:
        counted = _Counted(patched, end_at=3, how=interrupt)
        with pytest.raises(SweepInterrupted, match="2 of 3 sites") as stopped:
            swept(METHODS, PLACES, out=root / "unfinished")
    assert counted.at == [str(site) for site in PLACES[:2]] == stopped.value.fits.places
    assert same(stopped.value.fits, Fits.load(root / "unfinished"))
    return {name: root / name for name in ("whole", "unfinished")}


@pytest.fixture
def unfinished(states: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(states["unfinished"], tmp_path / "unfinished"))


# --- a whole sweep ------------------------------------------------------------------------------------------


def test_a_sweep_into_a_folder_is_the_sweep_and_can_be_read(states: dict[str, Path], alone: Fits) -> None:
    assert same(Fits.load(states["whole"]), alone) and kept(states["whole"]) == WHOLE


def test_a_finished_sweep_is_read_and_not_searched_again(
    states: dict[str, Path], alone: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreparedPairs, "of", lambda *_, **__: 1 / 0)  # not even a pass over the data
    assert same(swept(METHODS, PLACES, out=states["whole"]), alone)


def test_an_interrupted_sweep_goes_on_without_repeating_a_place(
    unfinished: Path, alone: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Fits.load(unfinished)
    assert part.places == [str(site) for site in PLACES[:2]]
    assert part.facts["interrupted"] == "2 of 3 sites were searched" and "2 of 3 sites" in repr(part)
    counted = _Counted(monkeypatch)
    assert same(swept(METHODS, PLACES, out=unfinished), alone)
    assert counted.at == [str(PLACES[2])] and kept(unfinished) == WHOLE
    assert "interrupted" not in Fits.load(unfinished).facts


def test_of_a_sweep_that_searched_nothing_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="less than"):
        swept(METHODS, PLACES, min_accuracy=1.0, out=tmp_path / "out")
    _Counted(monkeypatch, end_at=1, how=interrupt)
    with pytest.raises(KeyboardInterrupt):
        swept(METHODS, PLACES, out=tmp_path / "out")
    assert kept(tmp_path) == set()


def test_failures_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = pairs(train=counterfactuals(0, n=20))
    alone = swept([PCA([2, 21])], PLACES[:3], pairs=few)
    assert len(alone.failures) == 3
    with monkeypatch.context() as patched:
        _Counted(patched, end_at=3, how=interrupt)
        with pytest.raises(SweepInterrupted):
            swept([PCA([2, 21])], PLACES[:3], pairs=few, out=tmp_path)
    assert same(swept([PCA([2, 21])], PLACES[:3], pairs=few, out=tmp_path), alone)


# --- kills --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from test_sweep_folders import PLACES, METHODS
from tiny_sweeps import swept
print("ready", flush=True)
swept(METHODS, PLACES, out=sys.argv[1])
print("done", flush=True)
"""


def begun(out: Path) -> subprocess.Popen[str]:
    """The sweep in a process of its own, which has imported what it needs."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.stderr
    return process


def test_a_sweep_that_is_killed_three_times_ends_as_an_undisturbed_one(tmp_path: Path, alone: Fits) -> None:
    """By SIGKILL, at random moments: in its first place, after the first, and after the second."""
    out, draw = tmp_path / "out", random.Random(3)
    for n in (0, 1, 2):
        process = begun(out)
        while process.poll() is None and len(list(out.glob("places/*/fits.json"))) < n:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    assert same(swept(METHODS, PLACES, out=out), alone) and kept(out) == WHOLE


def test_a_kill_between_the_whole_and_its_parts_costs_nothing(
    states: dict[str, Path], alone: Fits, tmp_path: Path
) -> None:
    shutil.copytree(states["whole"], tmp_path / "out")
    shutil.copytree(states["unfinished"] / "places", tmp_path / "out" / "places")
    assert same(swept(METHODS, PLACES, out=tmp_path / "out"), alone) and kept(tmp_path / "out") == WHOLE


def test_a_place_of_which_only_half_was_written_is_searched_again(unfinished: Path, alone: Fits) -> None:
    (unfinished / "places" / "0001" / "fits.json").unlink()
    (unfinished / "places" / "0001" / ".fits.json.12345").write_text("half")
    assert same(swept(METHODS, PLACES, out=unfinished), alone) and kept(unfinished) == WHOLE


@pytest.mark.parametrize("name", ["fits.json", "subspaces.safetensors"])
def test_a_broken_file_of_a_place_is_named_with_what_to_do(name: str, unfinished: Path) -> None:
    broken = unfinished / "places" / "0001"
    content = (broken / name).read_bytes()
    for bad in (content[: len(content) // 2], content.replace(b"0", b"1", 1)):
        (broken / name).write_bytes(bad)
        with pytest.raises(ValueError, match=f"Remove {broken}, and this site is searched again"):
            swept(METHODS, PLACES, out=unfinished)


# --- folders that are not this sweep's ----------------------------------------------------------------------


def squared(logits: Tensor, answer: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, answer, reduction="none").square()


@dataclass(frozen=True)
class Weighted:
    weight: float

    def __call__(self, logits: Tensor, answer: Tensor) -> Tensor:
        return self.weight * squared(logits, answer)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "sites": ({"sites": PLACES[:2]}, "sites: 3 there, 2 asked, not asked "),
    "order": ({"sites": [PLACES[1], PLACES[0], PLACES[2]]}, "sites: "),
    "methods": ({"methods": [DAS([1, 4]), *METHODS[1:]]}, r"methods: of DAS rank \d there, \d asked"),
    "seeds": ({"seeds": 2}, r"seeds: \[0\] there, \[0, 1\] asked"),
    "training": ({"config": replace(QUICK, steps=9)}, "training: steps 8 there, 9 asked"),
    "loss": ({"loss": squared}, "loss: .*cross_entropy.*squared"),
    "metrics": ({"metrics": (iia, log_odds)}, "metrics: "),
    "data": ({"pairs": pairs(test=counterfactuals(7))}, "data: the pairs are others"),
    "labels": ({"pairs": pairs(test=replace(counterfactuals(1), answer=counterfactuals(9).answer))}, "data: "),
    "task": ({"pairs": replace(pairs(), task="another")}, 'task: "" there, "another" asked'),
    "unmatched": ({"unmatched": "keep_base"}, "unmatched: "),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("state", ["whole", "unfinished"])
def test_the_folder_of_another_sweep_is_refused(
    name: str, state: str, states: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = states[state]
    counted = _Counted(monkeypatch)
    changes, message = OTHERS[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"folder of another sweep .*{message}"):
        swept(**{"methods": METHODS, "sites": PLACES, **changes}, out=folder)
    assert counted.at == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_folder_of_another_model_is_refused(states: dict[str, Path]) -> None:
    weight: Any = tiny().model.get_parameter("transformer.h.2.mlp.c_fc.weight")
    before = weight.detach().clone()
    try:
        weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=r"model: the model's weights are others"):
            swept(METHODS, PLACES, out=states["whole"])
    finally:
        weight.data.copy_(before)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        swept(PCA(2), SITES, out=tmp_path)
    swept(PCA(2), SITES).save(tmp_path / "fits")
    with pytest.raises(FileExistsError, match="not empty"):
        swept(PCA(2), SITES, out=tmp_path / "fits")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sweep.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="no recipe of a sweep that this version can read"):
        swept(PCA(2), SITES, out=tmp_path / "old")


def test_of_two_sweeps_into_one_folder_one_is_refused(tmp_path: Path) -> None:
    with files.taken_folder(tmp_path / "out"):
        with pytest.raises(BlockingIOError, match=f"written to by process {os.getpid()}"):
            swept(PCA(2), SITES, out=tmp_path / "out")
        assert kept(tmp_path / "out") == {LOCK}


def test_a_sweep_without_a_place_cannot_be_read_yet(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"sites": ["a", "b"]}))
    with pytest.raises(FileNotFoundError, match="none of its 2 sites yet"):
        Fits.load(tmp_path)


def test_what_json_cannot_hold_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _Counted(monkeypatch)
    with pytest.raises(TypeError, match="a setting that JSON does not hold"):
        swept(_Odd(torch.ones(2)), SITES, out=tmp_path / "out")
    assert counted.at == [] and kept(tmp_path) == set()


@dataclass(frozen=True, eq=False)
class _Odd(FullVector):
    what: Any = None


# --- pairs that are drawn afresh ----------------------------------------------------------------------------


def test_a_stream_is_known_by_its_first_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_places, "POOL", 60)
    first = swept(DAS(2), SITES, pairs=pairs(train=counterfactuals), out=tmp_path)
    assert same(swept(DAS(2), SITES, pairs=pairs(train=lambda step: counterfactuals(step)), out=tmp_path), first)
    with pytest.raises(ValueError, match=r"another sweep .*data: "):
        swept(DAS(2), SITES, pairs=pairs(train=lambda step: counterfactuals(step + 1)), out=tmp_path)
    with pytest.raises(ValueError, match=r"another sweep .*data: "):
        swept(DAS(2), SITES, pairs=pairs(), out=tmp_path)


def test_where_a_method_starts_is_part_of_the_recipe() -> None:
    found = swept(DAS(2), SITES[:1])[0].alignment
    starts = [None, found, torch.eye(32)[:2], torch.eye(32)[1:3]]
    told = [json.dumps(_recipe.hidden(DAS(2, start=start))) for start in starts]
    assert told[0] == "{}" and len(set(told)) == 4
    assert told[1] == json.dumps(_recipe.hidden(DAS(2, start=found)))


def test_functions_are_told_apart() -> None:
    told = _recipe.identity_of
    assert told(iia) == "subspace_lab.das.objectives.iia" != told(log_odds)
    assert told(lambda a: a + 1) != told(lambda a: a + 2) and told(lambda a: a.one) != told(lambda a: a.two)
    once, again = ((lambda a: a + 1) for _ in range(2))
    assert told(once) == told(again)
    assert told(partial(squared, answer=1)) != told(partial(squared, answer=2))  # type: ignore[arg-type]
    assert told(Weighted(1.0)) == told(Weighted(1.0)) != told(Weighted(2.0))
    assert told(nn.CrossEntropyLoss()) == "CrossEntropyLoss"


# --- a full disk --------------------------------------------------------------------------------------------


def fill(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """A disk on which a file of this name finds no room, so many times."""
    whole, left = files.whole_file, [times]

    def full(path: Any) -> Any:
        if os.path.basename(path) == name and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device", str(path))
        return whole(path)

    monkeypatch.setattr("subspace_lab.core.files.whole_file", full)


@pytest.mark.parametrize("name", ["fits.json", "subspaces.safetensors"])
def test_a_full_disk_costs_no_result(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = swept(PCA(2), PLACES[:2])
    with monkeypatch.context() as patched:
        fill(patched, name, 99)
        with pytest.raises(SweepUnsaved, match="No space left on device") as stopped:
            swept(PCA(2), PLACES[:2], out=tmp_path / "full")
    assert same(stopped.value.fits, alone) and isinstance(stopped.value, OSError) and kept(tmp_path) == set()
    with monkeypatch.context() as patched:
        fill(patched, name, 1)  # there is room again when the sweep ends
        assert same(swept(PCA(2), PLACES[:2], out=tmp_path / "again"), alone)
    assert kept(tmp_path / "again") == WHOLE


def test_variables_at_several_sites_are_kept(tmp_path: Path) -> None:
    two: list[Any] = [{"v": SITES[0], "w": SITES[1]}, SITES[1]]
    given = pairs(("v", "w"))
    first = sweep(tiny(), given, two, [DAS(2)], config=QUICK, min_accuracy=None, quiet=True, out=tmp_path)
    assert same(Fits.load(tmp_path), first) and len(first.places) == 2
