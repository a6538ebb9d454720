"""The terminal: what a search leaves, and how bad input is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from subspace_lab.analysis.geometry import overlap
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.cli import app
from subspace_lab.das.fits import Fits
from subspace_lab.tasks import PRICE_TAGGING

PAIRS = ["--pairs", "40", "--dev-pairs", "20", "--test-pairs", "40"]
TINY = ["--layers", "1", "--steps", "5", *PAIRS]
FILES = {"results.json", "model", "twin", "iia.png", "overlap.png"}
SITES = ["block_output[1]@amount", "block_output[1]@last"]
SHIPPED = Path(str(files("subspace_lab"))) / "assets" / "tiny_decoder"


DAS_ALONE = ["--method", "DAS"]


def search(*options: str | Path) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, options)])


def offline(**extra: str) -> dict[str, str]:
    plain = {n: v for n, v in os.environ.items() if n not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    return {**plain, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "100", **extra}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Any]:
    folder = tmp_path_factory.mktemp("cli") / "nested" / "search"
    result = search(*TINY, "--positions", "amount,last", "--seed", "3", "--out", folder)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, result, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_all_files_are_written_and_nothing_else(done: tuple[Path, Result, Any]) -> None:
    folder, _, _ = done
    assert {path.name for path in folder.iterdir()} == FILES
    for who in ("model", "twin"):
        assert {path.name for path in (folder / who).iterdir()} == {
            "sweep.json",
            "fits.json",
            "subspaces.safetensors",
        }
    for name in ("iia.png", "overlap.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and (folder / name).stat().st_size > 10_000


def test_results_have_the_documented_keys(done: tuple[Path, Result, Any]) -> None:
    _, _, results = done
    assert set(results) == {"settings", "model", "twin", "comparison", "verdict"}
    settings = results["settings"]
    expected = {
        "model": "tiny_decoder", "task": "price_tagging", "variable": PRICE_TAGGING.variable, "layers": "1",
        "positions": "amount,last", "component": "block_output", "steps": 5, "pairs": 40, "dev_pairs": 20,
        "test_pairs": 40, "rank": "8", "seed": "3", "twin": True, "twins": 1, "screen": False,
        "allow_failing_model": False, "memory": None,
        "method": "DAS,DifferenceOfMeans,PCA,RandomSubspace,FullVector",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    for who in ("model", "twin"):
        told = results[who]
        assert set(told) == {"facts", "floors", "fits", "failures"} and told["failures"] == []
        facts = told["facts"]
        assert facts["engine"].startswith("frozen past by keys and values")
        assert facts["task"] == "price_tagging" and facts["pairs"] == {"train": 40, "dev": 20, "test": 40}
        assert set(facts["versions"]) == {"subspace_lab", "torch", "transformers", "nnsight"}
        assert facts["versions"]["torch"] == torch.__version__
        assert list(dict.fromkeys(one["site"] for one in told["fits"])) == SITES
        assert [one["label"] for one in told["fits"]] == 2 * [
            "DAS 8", "DifferenceOfMeans", "PCA 8", *5 * ["RandomSubspace 8"], "FullVector",
        ]  # fmt: skip
        for one in told["fits"]:
            assert 0 <= one["iia_test_low"] <= one["iia_test"] <= one["iia_test_high"] <= 1 and "iia_dev" in one
            assert (one["rank"] == 8) == (one["method"] not in ("DifferenceOfMeans", "FullVector"))
            assert one["seed"] == (3 if one["method"] == "DAS" else one["seed"])
    of_model, of_twin = (results[who]["floors"]["test"]["accuracy"] for who in ("model", "twin"))
    assert of_model["value"] > 0.9 > of_twin["value"] and of_model["n"] == 40
    assert results["model"]["fits"] != results["twin"]["fits"]
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    drawn = PRICE_TAGGING.pairs(tokenizer, train=40, dev=20, test=40, seed=3).fingerprint()
    assert results["model"]["facts"]["data"] == results["twin"]["facts"]["data"] == drawn


def test_fits_reload_and_are_those_compared(done: tuple[Path, Result, Any]) -> None:
    folder, _, results = done
    fits, compared = Fits.load(folder / "model"), results["comparison"]
    assert fits.records() == results["model"]["fits"] and Fits.load(folder / "twin").places == fits.places
    assert compared["labels"] == SITES
    first, second = (fits.where(method="DAS", site=site)[0].subspace("above_lower") for site in SITES)
    assert first.rank == 8 and first.width == compared["width"] == 64
    assert overlap(first, second) == pytest.approx(compared["matrix"][0][1], abs=1e-9)
    (chance,) = compared["chance"]
    assert chance["mean"] == pytest.approx(first.rank / 64) and chance["low"] < chance["mean"] < chance["high"]


def test_output_is_the_table_and_progress_goes_aside(done: tuple[Path, Result, Any]) -> None:
    folder, result, _ = done
    told, fits = " ".join(result.stdout.split()), Fits.load(folder / "model")
    best = fits.best()
    chosen = f"*: chosen on dev, {best.method.label} at {best.place}. On test: {best.iia}."
    for part in ("amount", "last", "twin", chosen, "no intervention", "on 40 test pairs", "Written to"):
        assert part in told, part
    for mean in fits.mean():
        assert f"{mean.value:.2f}" in result.stdout
    assert "model" in result.stderr and "twin" in result.stderr
    assert "━" not in result.stdout


def test_a_result_is_a_function_of_its_settings(done: tuple[Path, Result, Any], tmp_path: Path) -> None:
    _, _, results = done
    again = search(*TINY, "--positions", "amount,last", "--seed", "3", "--out", tmp_path / "again")
    assert again.exit_code == 0
    repeated = json.loads((tmp_path / "again" / "results.json").read_text(encoding="utf-8"))
    repeated["settings"]["out"] = results["settings"]["out"]
    assert repeated == results


def test_a_small_model_takes_one_thread_and_gives_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    seen: Any = set()
    module = import_module("subspace_lab.das.search")  # `subspace_lab.das.search` itself is the function
    search_sites = module.search
    monkeypatch.setattr(
        module, "search", lambda *a, **k: seen.add(torch.get_num_threads()) or search_sites(*a, **k)
    )
    assert search(*TINY, "--positions", "last", "--out", tmp_path).exit_code == 0
    assert seen == {1} and torch.get_num_threads() == 2


def test_without_a_twin_in_half_precision(tmp_path: Path) -> None:
    result = search(*TINY, "--positions", "amount", "--no-twin", "--dtype", "bfloat16", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert told["settings"]["dtype"] == "bfloat16"
    assert told["model"]["floors"]["test"]["accuracy"]["value"] > 0.8
    # One site has nothing to be compared with.
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"twin", "overlap.png"}
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["twin"] is None
    assert "twin" not in result.stdout.partition("Written to")[0]


def test_a_search_that_finds_nothing_says_so(tmp_path: Path) -> None:
    """At the amount the model has not compared anything yet; at the last token of layer 1 it has."""
    options = ["--layers", "1", "--steps", "20", "--pairs", "100", "--test-pairs", "100", "--no-twin", *DAS_ALONE]
    nothing = search(*options, "--positions", "amount", "--out", tmp_path / "amount")
    something = search(*options, "--positions", "last", "--out", tmp_path / "last")
    assert "show no effect" in nothing.stdout and "show no effect" not in something.stdout


def test_several_methods_ranks_and_seeds(tmp_path: Path) -> None:
    """All with all, each once; pairs and twin belong to the first seed."""
    options = ["--method", "das, RandomSubspace", "--rank", "2,4", "--seed", "5,0,1", "--positions", "amount,last"]
    result = search(*TINY, *options, "--out", tmp_path)
    assert result.exit_code == 0, (result.stderr, result.exception)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    expected = [("DAS", rank, seed) for rank in (2, 4) for seed in (5, 0, 1)]
    expected += [("RandomSubspace", rank, draw) for rank in (2, 4) for draw in range(5)]
    for who in ("model", "twin"):
        fits = results[who]["fits"]
        assert [(f["method"], f["rank"], f["seed"]) for f in fits] == 2 * expected
        assert [f["site"] for f in fits] == [site for site in SITES for _ in expected]
    assert len(results["comparison"]["labels"]) == len(set(results["comparison"]["labels"])) == 12
    settings = results["settings"]
    drawn = PRICE_TAGGING.pairs(AutoTokenizer.from_pretrained(SHIPPED), train=40, dev=20, test=40, seed=5)
    assert results["model"]["facts"]["data"] == drawn.fingerprint()
    assert (settings["method"], settings["rank"], settings["seed"]) == ("DAS,RandomSubspace", "2,4", "5,0,1")
    told = " ".join(result.stdout.split())
    assert "(×3)" in told and "(×5)" in told and "±" in told and "DAS 2" in told and "DAS 4" in told
    one = search(*TINY, "--method", "DAS", "--rank", "4", "--seed", "5", "--positions", "amount,last", "--no-twin",
                 "--out", tmp_path / "one")  # fmt: skip
    assert one.exit_code == 0
    alone, together = Fits.load(tmp_path / "one" / "model"), Fits.load(tmp_path / "model")
    for fit in alone:
        (same,) = together.where(method="DAS 4", seed=5, site=fit.site)
        torch.testing.assert_close(fit.subspace().basis(), same.subspace().basis(), rtol=0, atol=1e-3)


def test_every_method_is_searched_by_its_name(tmp_path: Path) -> None:
    names = "BoundlessDAS,MDAS,Mask,LDA,Probe,KMeans,RevNet"
    result = search(*TINY, "--method", names, "--rank", "2", "--no-twin", "--out", tmp_path)
    assert result.exit_code == 0, (result.stderr, result.exception)
    fits = Fits.load(tmp_path / "model")
    labels = ["BoundlessDAS", "MDAS 2", "Mask", "LDA", "Probe", "KMeans", "RevNet 2"]
    assert "randomly initialised twin scores far lower" in " ".join(result.output.split())
    assert [fit.method.label for fit in fits] == labels * len(fits.places)


@pytest.mark.parametrize("method", ["PCA", "DifferenceOfMeans", "FullVector,RandomSubspace"])
def test_methods_without_training_are_searched_alone(method: str, tmp_path: Path) -> None:
    result = search(*TINY, "--method", method, "--rank", "2", "--no-twin", "--out", tmp_path)
    assert result.exit_code == 0, (result.stderr, result.exception)
    fits = Fits.load(tmp_path / "model")
    assert {type(fit.method).__name__ for fit in fits} == set(method.split(",")) and fits.best().losses == ()


@pytest.mark.parametrize("layers", ["0,2-3", "3,1-2", "all"])
def test_layers_are_lists_and_ranges(layers: str, tmp_path: Path) -> None:
    options = ["--layers", layers, *TINY[2:], "--positions", "last", "--no-twin", *DAS_ALONE]
    result = search(*options, "--out", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["model"]["fits"]
    numbers = {"0,2-3": [0, 2, 3], "3,1-2": [3, 1, 2], "all": [0, 1, 2, 3]}[layers]
    assert result.exit_code == 0 and [one["site"] for one in found] == [f"block_output[{n}]@last" for n in numbers]


def test_heads_are_searched_each_alone(tmp_path: Path) -> None:
    options = ["--component", "head_output", "--layers", "1-2", "--heads", "3,0-1", "--positions", "last", *PAIRS]
    paths = ["--method", "FullVector,PathPatching", "--receiver", "mlp_output[3]@last", "--no-twin"]
    result = search(*options, *paths, "--out", tmp_path)
    assert result.exit_code == 0, (result.stderr, result.exception)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    places = [f"head_output[{i}].heads({h})@last" for i in (1, 2) for h in (3, 0, 1)]
    labels = ["FullVector", "PathPatching to mlp_output[3]@last"]
    assert [(one["site"], one["label"]) for one in results["model"]["fits"]] == [
        (p, m) for p in places for m in labels
    ]
    assert results["settings"]["heads"] == "3,0-1" and results["settings"]["receiver"] == "mlp_output[3]@last"
    assert "head" in result.stdout and "mlp_output[3]@last" in result.stdout
    assert (tmp_path / "iia.png").stat().st_size > 10_000


def test_all_heads(tmp_path: Path) -> None:
    options = ["--component", "query_output", "--heads", "all", "--positions", "last", "--method", "FullVector"]
    result = search(*TINY, *options, "--no-twin", "--out", tmp_path)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert [fit.place for fit in Fits.load(tmp_path / "model")] == [
        f"query_output[1].heads({h})@last" for h in range(4)
    ]


BAD = {
    "task": (["--task", "prices"], ["'prices'", "price_tagging", "story_gender"]),
    "variable": (["--variable", "price"], ["price", "above_lower", "below_upper"]),
    "component": (["--component", "block"], ["'block'", "block_output", "mlp_output"]),
    "submodule": (["--component", "model.nothing.output", "--layers", "all"], ["model.nothing", "model.norm"]),
    "heads of a block": (["--heads", "all"], ["'block_output'", "no heads", "head_output"]),
    "head": (["--component", "head_output", "--heads", "1,4"], ["--heads 1,4", "'4'", "0 to 3"]),
    "heads of a submodule": (
        ["--component", "lm_head.input", "--layers", "all", "--heads", "0"],
        ["--heads 0", "no heads"],
    ),
    "rank of a head": (["--component", "head_output", "--heads", "0", "--rank", "17"], ["17", "1 to 16"]),
    "no receiver": (["--method", "PathPatching"], ["--receiver", "mlp_output[5]@last"]),
    "receiver of nothing": (["--receiver", "mlp_output[2]@last"], ["--method PathPatching"]),
    "receiver": (["--method", "PathPatching", "--receiver", "mlp[2]@last"], ["Unknown component 'mlp'"]),
    "receiver in front": (
        ["--method", "PathPatching", "--receiver", "mlp_output[0]@last"],
        ["block_output[1]@amount", "mlp_output[0]@last", "must come after"],
    ),
    "receiver nowhere": (["--method", "PathPatching", "--receiver", "mlp_output[2]@price"], ["'price'", "unit"]),
    "layers of a submodule": (["--component", "lm_head.output"], ["lm_head.output", "no layers"]),
    "layer": (["--layers", "4"], ["'4'", "0 to 3", "1-3"]),
    "layers": (["--layers", "3-1"], ["'3-1'", "0 to 3"]),
    "no layers": (["--layers", ""], ["''", "0 to 3"]),
    "span": (["--positions", "amount,price"], ["'price'", "lower", "unit", "first", "2:5"]),
    "grammar": (["--positions", "a?b"], ["a?b", "first", "2:5", "unit"]),
    "position": (["--positions", "40"], ["'40'", "0 to"]),
    "rank": (["--rank", "65"], ["65", "1 to 64"]),
    "no rank": (["--rank", "0"], ["DAS(rank=[0])", "above 0"]),
    "one rank of two": (["--rank", "2,65"], ["65", "1 to 64"]),
    "rank as text": (["--rank", "two"], ["--rank two", "2,4,8"]),
    "rank twice": (["--rank", "2,2"], ["--rank 2,2", "different"]),
    "negative rank": (["--rank", "-1"], ["--rank -1", "whole number"]),
    "seed": (["--seed", "1.5"], ["--seed 1.5", "whole number"]),
    "seed twice": (["--seed", "0,1,0"], ["--seed 0,1,0", "different"]),
    "no seed": (["--seed", ""], ["--seed", "whole number"]),
    "method": (
        ["--method", "DAS,ICA"],
        [
            "ICA",
            "DAS",
            "BoundlessDAS",
            "LDA",
            "MDAS",
            "Mask",
            "Probe",
            "KMeans",
            "DifferenceOfMeans",
            "FullVector",
            "PCA",
            "RandomSubspace",
        ],
    ),
    "map alone": (["--method", "RevNet"], ["RevNet", "not evidence", "DAS,RevNet"]),
    "no method": (["--method", ""], ["--method", "RandomSubspace"]),
    "method twice": (["--method", "PCA,pca"], ["twice", "PCA 8"]),
    "dev pairs": (["--dev-pairs", "0"], ["0 pairs", "1 or more"]),
    "steps": (["--steps", "0"], ["steps=0", "at least 1"]),
    "rate": (["--learning-rate", "0"], ["learning_rate=0", "> 0"]),
    "pairs": (["--pairs", "0"], ["0 pairs", "1 or more"]),
    "folder": (["--model", "/no/such/folder"], ["/no/such/folder", "no such folder"]),
    "name": (["--model", "no-such-model-anywhere"], ["no-such-model-anywhere", "no such folder", "offline"]),
    "tokenizer": (["--task", "story_gender"], ["▁She", "cannot be written with this tokenizer"]),
    "memory": (["--memory", "lots"], ["'lots'", "8GiB"]),
    "little memory": (["--memory", "10"], ["cannot hold one batch"]),
    "device": (["--device", "abacus"], ["abacus"]),
    "dtype": (["--dtype", "int4"], ["int4", "float32, bfloat16, float16"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_one_line(name: str, tmp_path: Path) -> None:
    options, parts = BAD[name]
    out = tmp_path / "made" / "for it"
    result = search(*TINY, *options, "--out", out)
    assert result.exit_code == 2, result.exception
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("subspace-lab: ")
    assert all(part in result.stderr for part in parts), result.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    result = search(*TINY, "--model", model, "--out", out)
    assert result.exit_code == 2 and "config.json" in result.stderr and not out.exists()
    (model / "config.json").write_text("{}")
    result = search(*TINY, "--model", model, "--out", out)
    assert result.exit_code == 2 and "could not be loaded" in result.stderr and not out.exists()
    assert result.stderr.count("\n") == 1


def test_results_are_never_mixed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        result = search(*TINY, "--model", "/not/even/looked/at", "--out", out)
        assert result.exit_code == 2 and "not empty" in result.stderr and result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    assert search(*TINY, "--rank", "0", "--out", out).exit_code == 2
    assert out.is_dir()


def test_a_model_that_fails_its_task_is_refused_unless_allowed(tmp_path: Path) -> None:
    model = tmp_path / "untrained"
    reinitialised(AutoModelForCausalLM.from_pretrained(SHIPPED), 0).save_pretrained(model)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(model)
    options: list[str | Path] = [
        *TINY,
        "--positions",
        "last",
        "--no-twin",
        "--model",
        model,
        "--out",
        tmp_path / "out",
    ]
    result = search(*options)
    assert result.exit_code == 2 and "--allow-failing-model" in result.stderr and "40 bases" in result.stderr
    assert not (tmp_path / "out").exists()
    assert search(*options, "--allow-failing-model").exit_code == 0


def test_an_option_that_does_not_exist_is_no_option(tmp_path: Path) -> None:
    result = search("--rnak", "3", "--out", tmp_path)
    assert result.exit_code == 2 and "--rnak" in result.stderr and not any(tmp_path.iterdir())


def test_help_needs_neither_torch_nor_a_model() -> None:
    program = (
        "import sys; from subspace_lab.cli import main; sys.argv = ['subspace-lab', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print(*{'torch', 'transformers', 'nnsight', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    for options, expected in (([], "search"), (["search"], "--allow-failing-model"), (["finetune"], "--held-out")):
        done = subprocess.run(
            [sys.executable, "-c", program, *options, "--help"],
            capture_output=True, text=True, timeout=60, env=offline(),
        )  # fmt: skip
        assert done.returncode == 0 and expected in done.stdout and "Usage: subspace-lab" in done.stdout
        assert done.stderr.split() == [], done.stderr


def test_the_shipped_model_is_searched_without_a_network(tmp_path: Path) -> None:
    """`python -m subspace_lab`, in a process that may open no connection and was not told that it is offline."""
    program = (
        "import runpy, socket, sys\n"
        "def refuse(*_, **__): raise RuntimeError('a connection was tried')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "runpy.run_module('subspace_lab', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "search", *TINY, "--positions", "amount", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, env=offline(HF_HOME=str(tmp_path / "cache")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"overlap.png"}
    assert "Traceback" not in done.stderr and "connection" not in done.stderr
