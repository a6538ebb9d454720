"""Searches without a result, and what a sweep refuses before it begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import PAIRS, QUICK, SITES, counterfactuals, pairs, swept, unedited

import subspace_lab
from subspace_lab.core.sites import Site
from subspace_lab.das import _places
from subspace_lab.das.methods import DAS, PCA, FullVector, Method, RandomSubspace
from subspace_lab.das.objectives import iia

TWO = ("v", "w")

# --- searches that fail -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusing(Method):
    """Cannot be fitted at one layer."""

    def learner(self, problem: Any) -> Any:
        if problem.sites["v"].layer == 0:
            raise ValueError("no\n  directions  here")
        return PCA(1).learner(problem)


def test_a_search_that_cannot_be_fitted_is_a_failure_and_the_others_stay() -> None:
    found = swept([PCA(3), PCA(PAIRS // 2 + 1), Refusing(), FullVector()], seeds=2,
                  pairs=pairs(train=counterfactuals(0, n=PAIRS // 2)))  # fmt: skip
    few = f"{PAIRS // 2 + 1} principal components asked of {PAIRS // 2} states: at most {PAIRS // 2 - 1} exist."
    assert [(f.method, f.place, f.seed, f.reason) for f in found.failures] == [
        (f"PCA {PAIRS // 2 + 1}", str(SITES[0]), 0, few),
        ("Refusing", str(SITES[0]), 0, "no directions here"),
        ("Refusing", str(SITES[0]), 1, "no directions here"),
        (f"PCA {PAIRS // 2 + 1}", str(SITES[1]), 0, few),
    ]
    assert len(found) == 2 * 2 + 2
    assert found.where(method=FullVector)[0].iia == swept(FullVector(), SITES[:1])[0].iia
    assert "No result: Refusing at block_output[0]@2, seed 0: no directions here" in repr(found)


def test_a_loss_that_is_no_number_ends_its_own_fit_alone() -> None:
    """The others begin again from their starts and end exactly as they end alone."""
    config = replace(QUICK, batch_size=12)  # five batches an epoch
    found = swept([DAS(2), _Marked(1), DAS(3), PCA(2)], SITES[1:], config=config, seeds=2)
    assert [(f.method, f.seed) for f in found.failures] == [("_Marked 1", 0), ("_Marked 1", 1)]
    assert all("The loss is [nan] at step 3 of 8" in f.reason for f in found.failures)
    for rank, seed in ((2, 1), (3, 0)):
        alone = swept(DAS(rank), SITES[1:], config=config, seeds=[seed])[0]
        together = found.where(method=f"DAS {rank}", seed=seed)[0]
        assert torch.equal(alone.subspace().basis(), together.subspace().basis())
        assert alone.losses == together.losses and alone.start_overlap == together.start_overlap
        assert alone.scores == together.scores
    assert len(found) == 5


@dataclass(frozen=True)
class _Marked(DAS):
    """DAS whose penalty is NaN from the fourth step on."""

    def learner(self, problem: Any) -> Any:
        learner = super().learner(problem)
        progress = [0.0]
        learner.advance = lambda p: progress.__setitem__(0, p)  # type: ignore[method-assign, assignment]
        learner.penalty = lambda: torch.tensor(torch.nan if progress[0] > 0.3 else 0.0)  # type: ignore[method-assign]
        return learner


def test_where_everything_fails_nothing_is_lost_silently() -> None:
    found = swept(_Marked(1), SITES[:1], seeds=2)
    assert len(found) == 0 and len(found.failures) == 2 and repr(found).startswith("No fits.")
    for shown in (repr(found), found._repr_html_()):
        assert "_Marked 1 at block_output[0]@2, seed 1: The loss is [nan]" in shown
    with pytest.raises(ValueError, match="There are no fits"):
        found.best()


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, "Nothing to search: 0 sites"),
        ({"methods": []}, "Nothing to search: 2 sites, 0 methods"),
        ({"seeds": []}, "0 seeds"),
        ({"seeds": 0}, "0 seeds"),
        ({"metrics": []}, "0 metrics"),
        ({"seeds": [1, 0, 1]}, r"Given twice.*seeds \[1\]"),
        ({"metrics": [iia, iia]}, r"Given twice.*metrics \['iia'\]"),
        ({"methods": [DAS([1, 2]), DAS(2)]}, r"Given twice.*methods \['DAS 2'\]"),
        ({"methods": [DAS(33)]}, r"DAS 33 at block_output\[0\]@2: rank 33 for 1 variable.*width 32.*1 to 32"),
        ({"methods": [PCA([4, 40])]}, "PCA 40 at .*1 to 32"),
        ({"methods": [RandomSubspace(40)]}, "RandomSubspace 40 at .*1 to 32"),
        ({"methods": [DAS(17)], "pairs": pairs(TWO)}, "rank 17 for 2 variable.*1 to 16"),
        (
            {"methods": [FullVector()], "pairs": pairs(TWO)},
            "variables that share a site cannot each have all of it",
        ),
        ({"sites": [{"v": SITES[0], "u": SITES[1]}]}, r"sites for \['v', 'u'\].*variables \['v'\]"),
        ({"sites": [{}]}, r"sites for \[\]"),
        ({"min_accuracy": 0.9}, "of 60 bases as the causal model does, less than the 0.9.*min_accuracy=None"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_work(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("a fit was begun")

    monkeypatch.setattr(_places, "fit", worked)
    monkeypatch.setattr(_places.Places, "at", worked)
    options: dict[str, Any] = {"methods": [DAS(4)], **changes}
    with pytest.raises(ValueError, match=message):
        swept(**options)


def test_a_site_that_does_not_exist_is_named() -> None:
    with pytest.raises(IndexError, match="9"):
        swept(DAS(1), [Site("block_output", 9, "last")])
    with pytest.raises(KeyError, match="subject"):
        swept(DAS(1), [Site("block_output", 0, "subject")])


def test_a_model_that_solves_the_task_is_not_refused() -> None:
    data = counterfactuals(1)
    solved = replace(data, base_answer=unedited(data).argmax(-1))
    found = swept(PCA(1), SITES[:1], pairs=pairs(test=solved), min_accuracy=1.0)
    assert found.floors["test"].accuracy.value == 1


WRONG = """
import json, sys
import torch
from tiny_sweeps import SITES, pairs, tiny, counterfactuals
from subspace_lab.das.methods import DAS, PCA, RandomSubspace
from subspace_lab.das.objectives import iia
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import sweep

lab, given, methods = tiny(), pairs(), [DAS(1)]
calls = {
    "model": lambda: sweep(lab.model, given, SITES, methods),
    "pairs": lambda: sweep(lab, counterfactuals(0), SITES, methods),
    "site": lambda: sweep(lab, given, SITES[0], methods),
    "text": lambda: sweep(lab, given, ["block_output[0]@2"], methods),
    "mapping": lambda: sweep(lab, given, [{"v": "block_output[0]@2"}], methods),
    "method": lambda: sweep(lab, given, SITES, DAS(1)),
    "class": lambda: sweep(lab, given, SITES, [DAS]),
    "name": lambda: sweep(lab, given, SITES, ["DAS"]),
    "seeds": lambda: sweep(lab, given, SITES, methods, seeds=2.5),
    "seed": lambda: sweep(lab, given, SITES, methods, seeds=["0"]),
    "config": lambda: sweep(lab, given, SITES, methods, config={"steps": 3}),
    "loss": lambda: sweep(lab, given, SITES, methods, loss="cross_entropy"),
    "metric": lambda: sweep(lab, given, SITES, methods, metrics=iia),
    "executor": lambda: sweep(lab, given, SITES, methods, executor=2),
    "out": lambda: sweep(lab, given, SITES, methods, out=True),
    "rank": lambda: DAS(2.5),
    "ranks": lambda: PCA(["2"]),
    "bool": lambda: PCA(True),
    "negative": lambda: DAS([2, -1]),
    "rate": lambda: DAS(learning_rate="fast"),
    "draws": lambda: RandomSubspace(draws=0),
    "empty": lambda: DAS([]),
    "search rank": lambda: search(lab, given, SITES, rank=2.5),
    "search site": lambda: search(lab, pairs(("v", "w")), SITES[0]),
    "search seed": lambda: search(lab, given, SITES, seeds=0.5),
    "search pairs": lambda: search(lab, counterfactuals(0), SITES),
}
told = {}
for name, call in calls.items():
    try:
        call()
        told[name] = "nothing was raised"
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def test_wrong_types_get_a_sentence() -> None:
    """In a process without the shape checks of the tests, as users have it."""
    here = Path(__file__).parent
    home = str(Path(subspace_lab.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([home, str(here)])}
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected = {
        "model": "TypeError: The model must be given as Backbone(model), found GPT2LMHeadModel.",
        "pairs": "TypeError: Pairs in three splits are needed, found Counterfactuals",
        "site": "TypeError: sites must be a list of Sites, found block_output[0]@2; put it in brackets.",
        "text": "no Site; write Site.parse('block_output[0]@2')",
        "mapping": "in which 'block_output[0]@2' is no Site.",
        "method": "TypeError: methods must be a list of Methods, found DAS(",
        "class": "no Method; write DAS()",
        "name": "TypeError: methods holds 'DAS', which is no Method.",
        "seeds": "TypeError: seeds must be a number of seeds or a list of seeds, whole numbers; found 2.5.",
        "seed": "found ['0']",
        "config": "TypeError: config must be a TrainingConfig, found {'steps': 3}.",
        "loss": "TypeError: loss must be a function and metrics a list of functions, found 'cross_entropy'",
        "metric": "TypeError: loss must be a function and metrics a list of functions",
        "executor": "TypeError: executor must be one of concurrent.futures, such as ProcessPoolExecutor(2); found 2.",
        "out": "TypeError: out must name a folder, as text or Path; found True.",
        "rank": "TypeError: DAS: rank=2.5: a whole number is needed, found float.",
        "ranks": "TypeError: PCA: rank='2': a whole number is needed",
        "bool": "TypeError: PCA: rank=True: a whole number is needed",
        "negative": "ValueError: DAS(rank=[2, -1]): needed is a value above 0.",
        "rate": "TypeError: DAS(learning_rate='fast'): needed is a number",
        "draws": "ValueError: RandomSubspace(draws=0): needed is a value above 0.",
        "empty": "ValueError: DAS(rank=[]): an empty list leaves nothing to run.",
        "search rank": "TypeError: DAS: rank=2.5: a whole number",
        "search site": "TypeError: sites must be a list of Sites",
        "search seed": "TypeError: seeds must be a number of seeds",
        "search pairs": "TypeError: Pairs in three splits are needed, found Counterfactuals",
    }
    assert set(told) == set(expected)
    for name, part in expected.items():
        assert part in told[name] and len(told[name]) < 400, (name, told[name])
