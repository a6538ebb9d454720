"""The subject of a `subspace-lab search`: a task, or the user's own pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from subspace_lab.das.pairs import Pairs
else:  # names in annotations must exist at run time too, but importing these takes seconds
    Pairs = Any

Answers = Literal["token", "sequence"]
TASK = "price_tagging"
PAIRS = {"train": 1000, "dev": 200, "test": 400}
OPTIONS = {"train": "--pairs", "dev": "--dev-pairs", "test": "--test-pairs"}
MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Asked:
    """The subject of a search.

    Attributes:
        name: the name of the task, or of the file.
        variables: the variables that are exchanged.
        spans: the named positions.
        pairs: tokenizer → the pairs.
        settings: what the results say about this.
    """

    name: str
    variables: list[str]
    spans: list[str]
    pairs: Callable[[Any], Pairs]
    settings: Mapping[str, Any]


def of_task(
    task: str | None,
    variable: str | None,
    numbers: Mapping[str, int | None],
    seed: int,
    answers: Answers,
    chat: bool,
    split_by: str | None,
    balance: bool,
) -> Asked:
    """A task of this package. ValueError for an unknown task, or a task without the variable."""
    from subspace_lab.tasks import load_task

    if split_by is not None:
        raise ValueError(f"--split-by {split_by} is for --data: the splits of a task share no names or entities.")
    if not balance:
        raise ValueError("--no-balance is for --data: a task draws its pairs balanced.")
    n = {name: PAIRS[name] if given is None else given for name, given in numbers.items()}
    if (most := max(n.values())) > MOST_PAIRS:
        raise ValueError(f"{most} pairs are more than a task is sampled for: possible are {MOST_PAIRS:,}.")
    chosen = load_task(TASK if task is None else task)
    possible = [*chosen.causal_model.inputs, *chosen.causal_model.variables]
    if variable is not None and variable not in possible:
        raise ValueError(f"--variable {variable}: the task {chosen.name!r} has {possible}.")
    name = variable or chosen.variable
    return Asked(
        chosen.name,
        [name],
        list(chosen.prompt(chosen.sample(random.Random(0), "train")).spans),  # the same in all prompts
        lambda tokenizer: chosen.pairs(
            tokenizer,
            train=n["train"],
            dev=n["dev"],
            test=n["test"],
            seed=seed,
            variables=[name],
            answers=answers,
            chat=chat,
        ),
        {"pairs": n["train"], "dev_pairs": n["dev"], "test_pairs": n["test"]},
    )


def of_data(
    data: str,
    task: str | None,
    variable: str | None,
    numbers: Mapping[str, int | None],
    seed: int,
    answers: Answers,
    chat: bool,
    split_by: str | None,
    balance: bool,
) -> Asked:
    """Pairs from a file, which is read and checked at once."""
    from subspace_lab.das.datafiles import described, load_pairs

    if task is not None:
        raise ValueError(f"--task {task} and --data {data}: give one of the two, not both.")
    if given := [OPTIONS[name] for name, n in numbers.items() if n is not None]:
        raise ValueError(f"{', '.join(given)}: numbers of pairs are for --task; with --data all pairs are used.")
    variables, spans = described(data)
    if variable is not None and variable not in variables:
        raise ValueError(f"--variable {variable}: the data have {variables}.")
    return Asked(
        Path(data).stem,
        variables if variable is None else [variable],
        spans or ["last"],
        lambda tokenizer: load_pairs(
            data,
            tokenizer,
            variable=variable,
            by=split_by,
            seed=seed,
            balance=balance,
            answers=answers,
            chat=chat,
            drop=True,
        ),
        {},
    )
