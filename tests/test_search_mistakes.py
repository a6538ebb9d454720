"""Slips of a first search: a name in the place of a value, a path in the place of a twin, a share in per cent.

The checks of types that other tests run under would speak first, so what is of a wrong type is called in another
process, without them. Every message says what was found and what helps.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tiny_sweeps import QUICK, SITES, made_fit, made_fits, pairs, score, swept, tiny
from torch import Tensor

from subspace_lab.analysis.comparisons import compare
from subspace_lab.analysis.plots.curves import methods_beside
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.search_report import save_search
from subspace_lab.core.files import whole_file
from subspace_lab.core.sites import Site
from subspace_lab.das.answers import Speller, serving
from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.fits import notes_of
from subspace_lab.das.methods import DAS, FullVector
from subspace_lab.das.screens import Screened
from subspace_lab.das.search import search

HERE = Path(__file__).resolve().parent

PROGRAM = """
import json
from tiny_sweeps import made_fit, made_fits, pairs, tiny
from subspace_lab.analysis.plots.curves import methods_beside
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.plots.matrices import overlap_heatmap
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.encoding import from_texts
from subspace_lab.das.hypotheses import Hypothesis, rival_pairs
from subspace_lab.tasks import load_task

fits = made_fits([made_fit()])
model = CausalModel({"ab": lambda a: a})
texts = {"base": ["a"], "source": ["b"], "answer": ["c"], "base_answer": ["d"]}
found = {}
for name, call in {
    "path as twin": lambda: iia_heatmap(fits, "g.png"),
    "list as twin": lambda: iia_heatmap(fits, [fits[0]]),
    "fit as fits": lambda: iia_heatmap(fits[0]),
    "text as fits": lambda: methods_beside("model"),
    "fits as comparison": lambda: overlap_heatmap(fits),
    "backbone as model": lambda: reinitialised(tiny(), 0),
    "name as task": lambda: rival_pairs("price_tagging", [], None),
    "text as variables": lambda: Hypothesis("h", model, "ab"),
    "name as causal model": lambda: Hypothesis("h", "price_tagging", ("ab",)),
    "name as tokenizer": lambda: from_texts("gpt2", **texts),
    "no tokenizer": lambda: from_texts(3, **texts),
    "name as tokenizer of a file": lambda: load_pairs([{**texts}], "gpt2", chat=True, drop=True),
    "name as tokenizer of a task": lambda: load_task("price_tagging").pairs("gpt2", chat=True),
}.items():
    try:
        call()
        found[name] = "nothing"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

SAYS = {
    "path as twin": "TypeError: twin, the second argument, is of type str; needed is Fits: .* path='",
    "list as twin": "TypeError: twin, the second argument, is of type list; needed is Fits",
    "fit as fits": "TypeError: The first argument is of type Fit; needed is Fits",
    "text as fits": "TypeError: The first argument is of type str; needed is Fits",
    "fits as comparison": r"TypeError: .* compare\(fits\); found Fits",
    "backbone as model": r"TypeError: .* of type Backbone; needed is Module: .* reinitialised\(backbone\.model",
    "name as task": r"TypeError: task is of type str; needed is Task: .* load_task\('price_tagging'\)",
    "text as variables": r"TypeError: .* variables is a tuple of names; write \('ab',\)",
    "name as causal model": "TypeError: .* causal_model is of type str; needed is CausalModel",
    "name as tokenizer": r"TypeError: .* AutoTokenizer\.from_pretrained\('gpt2'\)",
    "no tokenizer": r"TypeError: A tokenizer is needed, found int; .* AutoTokenizer",
    "name as tokenizer of a file": r"TypeError: .* AutoTokenizer\.from_pretrained\('gpt2'\)",
    "name as tokenizer of a task": r"TypeError: .* AutoTokenizer\.from_pretrained\('gpt2'\)",
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SAYS)
def test_a_wrong_type_is_told(name: str, found: dict[str, str]) -> None:
    assert re.match(SAYS[name], found[name]), found[name]


@pytest.mark.parametrize("draw", [iia_heatmap, methods_beside])
def test_where_a_picture_cannot_go_is_told_before_it_is_drawn(draw: Callable[..., Figure], tmp_path: Path) -> None:
    fits = made_fits([made_fit()])
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        draw(fits, path=tmp_path / "nowhere" / "x.png")
    with pytest.raises(ValueError, match=r"tw\.foo.*must end in '\.png'"):
        draw(fits, path=str(tmp_path / "tw.foo"))
    assert not list(tmp_path.iterdir())
    draw(fits, path=tmp_path / "x.PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.PNG"]


def test_a_file_in_a_folder_that_does_not_exist_names_the_folder(tmp_path: Path) -> None:
    where = tmp_path / "nowhere" / "scores.txt"
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere, in which scores\.txt"), whole_file(where):
        pass


def test_a_metric_that_was_not_scored_is_answered_with_those_that_were() -> None:
    scores = {split: {"log_odds": score(0.5)} for split in ("dev", "test")}
    fits = made_fits([replace(made_fit(), scores=scores)])
    for call in (lambda: fits.best("foo"), lambda: iia_heatmap(fits), lambda: fits.mean(metric="foo")):
        with pytest.raises((ValueError, KeyError), match="log_odds"):
            call()
    assert iia_heatmap(fits, metric="log_odds") is not None


@pytest.mark.parametrize("wrong", [90, -0.1, 1.01, float("nan")])
def test_an_accuracy_is_a_share(wrong: float) -> None:
    with pytest.raises(ValueError, match="needed is a share from 0 to 1"):
        swept(FullVector(), min_accuracy=wrong)
    with pytest.raises(ValueError, match="needed is a share from 0 to 1"):
        search(tiny(), pairs(), SITES, config=QUICK, min_accuracy=wrong)


def nan(outcome: Any) -> Tensor:
    return torch.full((len(outcome.logits),), torch.nan)


def test_a_metric_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="by the metric 'nan' on dev: all are NaN"):
        swept(FullVector(), metrics=[nan])


def test_answers_that_are_all_the_same_are_told() -> None:
    with pytest.raises(ValueError, match="All answers are the same, 'him'"):
        serving(Speller(lambda _: None), ["him", "him"], ["He saw"])


def test_a_span_that_a_text_lacks_is_told_in_words() -> None:
    texts = {"base": "Ann saw", "source": "Bob saw", "answer": "yes", "base_answer": "no"}
    for there, lacking in ("source", "base"), ("base", "source"):
        with pytest.raises(ValueError, match=f"does not say where the span 'name' is in the {lacking}\\."):
            load_pairs([{**texts, "span": {"name": {there: texts[there][:3]}}}], lambda _: None)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_another_separator_is_named(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "\n".join(mark.join(cells) for cells in (("base", "source", "answer"), ("one, two", "b", "c")))
    )
    with pytest.raises(ValueError, match=r"line 1: .* separated by (semicolons|tabs); needed are commas"):
        load_pairs(path, lambda _: None)


def test_one_site_by_two_names_is_refused() -> None:
    both = [Site("block_output", 2, "last"), Site("block_output", -1, "last")]
    with pytest.raises(ValueError, match=r"block_output\[2\]@last and block_output\[-1\]@last are the same one"):
        swept(FullVector(), both)
    assert len(swept(FullVector(), [both[0], Site("block_output", -1, "2"), both[0]]).places) == 2


def test_a_screen_counts_the_cells_of_the_table() -> None:
    left = tuple(Screened("DAS 4", str(SITES[1]), seed, 0.4, "left out") for seed in range(3))
    (line,) = (line for line in notes_of(made_fits([made_fit()], screened=left)) if line.startswith("Screened"))
    assert "Screened: 1 cells of the table at 1 sites" in line


def test_one_start_is_told_in_words() -> None:
    fits = made_fits([made_fit(site=site, start=2477372351) for site in SITES])
    with pytest.raises(ValueError, match=r"Trained from one start .*: .* and ") as refused:
        compare(fits)
    assert "2477372351" not in str(refused.value) and all(str(site) in str(refused.value) for site in SITES)


@pytest.mark.parametrize(("rank", "sites", "drawn"), [(3, 2, True), (3, 1, False), (16, 2, False)])
def test_a_picture_of_overlaps_is_written_where_two_subspaces_can_differ(
    rank: int, sites: int, drawn: bool, tmp_path: Path
) -> None:
    method = DAS(rank) if rank == 3 else FullVector()
    fits = made_fits([made_fit(site=site, method=method, rank=rank, test=0.9) for site in SITES[:sites]])
    saves = save_search(tmp_path, {}, fits, [], compare(fits), "none", {})
    assert ("overlap.png" in saves.written) == (tmp_path / "overlap.png").exists() == drawn, saves.errors
