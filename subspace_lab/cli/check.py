"""`subspace-lab check`: should what a search found be believed?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_lab.cli.asked import Asked, of_data, of_task
from subspace_lab.cli.common import (
    INTERRUPTED,
    DeviceOption,
    TrustOption,
    check_device,
    check_dtype,
    interruptible,
    refusing,
    say,
    threads,
)
from subspace_lab.cli.loading import SHIPPED, Source, load_causal, load_tokenizer
from subspace_lab.cli.searching import CHECK, MODEL, RESULTS, VERDICT, VERDICT_PICTURE, resumable, twin_folder

if TYPE_CHECKING:
    from subspace_lab.das.fits import Fits
else:  # names in annotations have to exist at run time as well, and importing these takes seconds
    Fits = Any


def check(
    folder: Annotated[Path, typer.Argument(help="The folder that `subspace-lab search --out` wrote.")],
    twins: Annotated[
        int, typer.Option(help="How many randomly initialised twins are searched; p ≤ .05 needs 19.")
    ] = 19,
    seeds: Annotated[
        int | None,
        typer.Option(help="How many random starts each search has.", show_default="those of the search"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a check that was begun here, or add to it.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for computed states, as '2GiB'.", show_default="half of what is free"),
    ] = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare what a search found with its controls, and say whether to believe it.

    The method that the search chose is searched again at the site that it chose: on randomly initialised twins, on
    pairs with arbitrary labels, and, if no effect is seen, on a planted variable. The conclusion is one of
    supported, memorised, expressive, non-specific, underpowered and not found. With fewer than 19 twins it is
    preliminary.

    Writes into the folder: verdict.json, verdict.png, and the searches (in check), with which --resume goes on.
    """
    with interruptible(), ExitStack() as stack:
        with refusing():
            from subspace_lab.analysis.evidence import check_number
            from subspace_lab.core.files import taken_folder
            from subspace_lab.das.answered import only_answered
            from subspace_lab.das.fits import Fits
            from subspace_lab.model.backbone import Backbone

            settings = settings_of(folder)
            check_number(twins, None)
            if seeds is not None and seeds < 1:
                raise ValueError(f"--seeds {seeds}: it has to be 1 or more.")
            stack.enter_context(taken_folder(folder, say, resumable))
            if not resume and (begun := [name for name in (VERDICT, CHECK) if (folder / name).exists()]):
                raise FileExistsError(
                    f"{folder} already has {begun[0]!r}: --resume goes on with it, or adds to it."
                )
            if (before := _twins_of_check(folder / CHECK)) > twins:
                say(f"{before} twins were searched here before: the verdict counts all of them, not only {twins}.")
                twins = before
            fits = Fits.load(folder / MODEL)
            asked = asked_again(settings)
            source = Source(None if settings["model"] == SHIPPED else settings["model"], trust_remote_code)
            network = load_causal(source, check_device(device), check_dtype(settings["dtype"]))
            pairs = asked.pairs(load_tokenizer(source))
            backbone = Backbone(network)
        with threads(network), refusing():
            if not settings["count_all"] and not settings["allow_failing_model"]:
                pairs = only_answered(backbone, pairs)
            from subspace_lab.analysis.checking import check as check_fits
            from subspace_lab.analysis.plots.verdicts import verdict_plot

            try:
                verdict = check_fits(
                    backbone,
                    pairs,
                    fits,
                    twins=twins,
                    searched=_twins(folder, fits),
                    seeds=seeds,
                    seed=fits.facts["seeds"][0],
                    memory=memory,
                    out=folder / CHECK,
                )
            except KeyboardInterrupt:
                say(f"Interrupted: what was finished is saved in {folder / CHECK}. --resume goes on.")
                raise typer.Exit(INTERRUPTED) from None
            verdict.save(folder / VERDICT)
            verdict_plot(verdict, folder / VERDICT_PICTURE)
        from subspace_lab.analysis.plots.canvas import console
        from subspace_lab.core.texts import printable

        terminal = console()
        for one in verdict.checks:
            terminal.print(printable(str(one)), markup=False)
        terminal.print(f"Written to {folder}: {VERDICT}, {VERDICT_PICTURE}, {CHECK}.", markup=False)
        terminal.print(printable(str(verdict)), markup=False)


def _twins_of_check(folder: Path) -> int:
    """How many twins an earlier check finished. A verdict must not choose among them."""
    number = 0
    while (folder / f"twin_{number + 1}" / "fits.json").is_file():
        number += 1
    return number


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The settings of the search in a folder (FileNotFoundError or ValueError if there is no search)."""
    from subspace_lab.core.files import read_json

    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder; give one that `subspace-lab search --out` wrote."
        )
    if not (folder / RESULTS).is_file() or not (folder / MODEL).is_dir():
        raise FileNotFoundError(
            f"{folder} holds no finished search: {RESULTS} or the folder {MODEL!r} is missing."
        )
    found = read_json(folder / RESULTS)
    settings = found.get("settings") if isinstance(found, dict) else None
    needed = ("model", "task", "variable", "seed", "answers", "chat", "dtype", "count_all", "allow_failing_model")
    if not isinstance(settings, dict) or not set(needed) <= set(settings):
        raise ValueError(
            f"{folder / RESULTS} does not say how its search was made: settings of this version are missing."
        )
    return settings


def asked_again(settings: Mapping[str, Any]) -> Asked:
    """The task or the data of the search."""
    seed = int(str(settings["seed"]).split(",")[0])
    answers, chat, split_by = settings["answers"], settings["chat"], settings.get("split_by")
    variable: str = settings["variable"]
    if settings.get("data") is None:
        numbers = {"train": settings["pairs"], "dev": settings["dev_pairs"], "test": settings["test_pairs"]}
        return of_task(settings["task"], variable, numbers, seed, answers, chat, split_by, True)
    nothing = dict.fromkeys(("train", "dev", "test"))
    one = None if ", " in variable else variable
    return of_data(
        settings["data"], None, one, nothing, seed, answers, chat, split_by, settings.get("balance", True)
    )


def _twins(folder: Path, fits: Fits) -> list[Fits]:
    """The twins that the search finished, at all sites of the model."""
    from subspace_lab.das.fits import Fits

    found: list[Fits] = []
    while (there := folder / twin_folder(len(found))).is_dir():
        twin = Fits.load(there)
        if twin.places != fits.places:
            break
        found.append(twin)
    return found
