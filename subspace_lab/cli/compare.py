"""`subspace-lab compare`: how similar are the subspaces that searches found?"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_lab.cli.common import interruptible, refusing, say
from subspace_lab.cli.searching import MODEL, TWIN

if TYPE_CHECKING:
    from subspace_lab.analysis.comparisons import Comparison
    from subspace_lab.das.fits import Fits
else:  # names in annotations have to exist at run time as well, and importing these takes seconds
    Comparison = Fits = Any

MEASURES = ("overlap", "containment", "chordal", "geodesic")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that subspace-lab search or a sweep wrote.")],
    across: Annotated[
        str | None,
        typer.Option(
            help="What differs: layer, seed, method or model.",
            show_default="layers of one model, models of several",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Only this method: DAS, or with its rank 'DAS 4'.", show_default="all that are trained"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Only subspaces of this rank.", show_default="all")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Only sites at these positions.", show_default="all")
    ] = None,
    variable: Annotated[
        str | None, typer.Option(help="Only this variable, if there are several.", show_default="each with itself")
    ] = None,
    measure: Annotated[str, typer.Option(help=f"One of {', '.join(MEASURES)}.")] = "overlap",
    min_effect: Annotated[
        float,
        typer.Option(
            help="A fit counts if the interval of its IIA is above this share of the way from floor to 1."
        ),
    ] = 0.0,
    same_start: Annotated[
        bool,
        typer.Option(
            "--same-start", help="Also compare fits from one random start, which overlap for this reason."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="A new or empty folder.")] = Path("subspace_compare"),
) -> None:
    """Compare the subspaces that searches found: across layers, seeds, methods, or models.

    They are compared with two seeds at one site (search with --seed 0,1,2), with random subspaces, and with the fits of
    the randomly initialised twin if one was searched. Fits at their floor do not count.

    Writes into --out: compare.json, compare.png (every pair, and the means), angles.png (principal angles).
    """
    with interruptible(), ExitStack() as stack:
        with refusing({"same_start=True": "--same-start", "across='model'": "--across model"}):
            from subspace_lab.analysis import geometry
            from subspace_lab.analysis.comparisons import compare as compare_fits
            from subspace_lab.analysis.comparisons import spectra
            from subspace_lab.analysis.plots.matrices import angle_spectrum, overlap_heatmap
            from subspace_lab.analysis.saves import Saves
            from subspace_lab.core.files import taken_folder, write_json

            if measure not in MEASURES:
                raise ValueError(f"--measure {measure}: possible are {', '.join(MEASURES)}.")
            choose = partial(_chosen, method=method, rank=rank, positions=positions)
            fits = {name: choose(_fits(folder)) for name, folder in _named(runs).items()}
            twins = [choose(one) for folder in runs for one in _twins(folder)]
            asked = across or _question(fits)
            within = "seed" if asked != "seed" and _several_seeds(fits) else None
            if asked != "seed" and within is None:
                say("Each site has only one seed, so there is no yardstick. Search with --seed 0,1,2 to get one.")
            options: dict[str, Any] = {
                "across": asked,
                "within": within,
                "same_start": same_start,
                "min_effect": min_effect,
                "variable": variable,
            }
            given: Any = fits if len(fits) > 1 else next(iter(fits.values()))
            null = {_called(twins): twins} if twins else None
            if note := _different_pairs(fits):
                say(note)
            found = compare_fits(given, measure=getattr(geometry, measure), null=null, **options)
            folder = stack.enter_context(taken_folder(out, say))
        saves = Saves(folder)
        saves.save("compare.png", lambda: overlap_heatmap(found, folder / "compare.png"))
        if len(set(found.ranks)) == 1:
            angles = spectra(given, **options)
            saves.save("angles.png", lambda: angle_spectrum(angles.angles, angles.null, folder / "angles.png"))
        results = {
            "runs": [str(run) for run in runs],
            "settings": options | {"measure": measure},
            **found.as_dict(),
        }
        saves.save("compare.json", lambda: write_json(folder / "compare.json", results))
        _print(found)
        say_saved(saves.line())
        with refusing():
            saves.finish()


def say_saved(line: str) -> None:
    """Print where the files are, on standard output."""
    from subspace_lab.analysis.plots.canvas import console
    from subspace_lab.core.texts import printable

    console().print(printable(line), markup=False)


def _named(runs: list[Path]) -> dict[str, Path]:
    """The folders by their names, or by their paths if two have the same name."""
    names = [run.resolve().name for run in runs]
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"One folder was given twice: {', '.join(map(str, runs))}.")
    return {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs, strict=True)}


def _fits(folder: Path) -> Fits:
    from subspace_lab.das.fits import Fits

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one that subspace-lab search wrote.")
    inside = folder / MODEL
    return Fits.load(inside if inside.is_dir() else folder)


def _twins(folder: Path) -> list[Fits]:
    from subspace_lab.das.fits import Fits

    inside = sorted(path for path in folder.iterdir() if TWIN.fullmatch(path.name))
    return [Fits.load(path) for path in inside if (path / "fits.json").is_file()]


def _chosen(fits: Fits, method: str | None, rank: int | None, positions: str | None) -> Fits:
    trained = fits if method is None else fits.where(method=method)
    return trained.where(rank=rank, positions=positions)


def _question(fits: dict[str, Fits]) -> str:
    """What to compare across if --across was not given."""
    weights = {_weights(one) for one in fits.values()}
    if len(fits) > 1 and len(weights) > 1:
        return "model"
    layers = {site.layer for one in fits.values() for fit in one for site in fit.sites.values()}
    return "layer" if len(layers) > 1 else "seed"


def _weights(fits: Fits) -> str | None:
    return (fits.facts.get("model") or {}).get("weights")


def _called(twins: list[Fits]) -> str:
    """The name of the null; a twin that was searched in two runs is one twin."""
    known = [_weights(one) for one in twins]
    number = len({weights for weights in known if weights}) + known.count(None)
    return "random twin" if number == 1 else f"{number} random twins"


def _different_pairs(fits: dict[str, Fits]) -> str | None:
    """A note if runs of one model were searched with different pairs: they are compared like one search."""
    data: dict[str | None, dict[str, str]] = {}
    for name, one in fits.items():
        if one.facts.get("data"):
            data.setdefault(_weights(one), {})[name] = one.facts["data"]
    mixed = [name for of in data.values() if len(set(of.values())) > 1 for name in of]
    if not mixed:
        return None
    found = f"{', '.join(mixed)}: one model, searched with different pairs."
    return f"{found} Their fits are compared like those of one search."


def _several_seeds(fits: dict[str, Fits]) -> bool:
    """Whether two trained fits of one model differ only in their seed."""
    found: dict[tuple[Any, ...], set[int]] = {}
    for one in fits.values():
        weights = _weights(one)
        for fit in one:
            if fit.start is not None and not fit.method.control:
                found.setdefault((weights, fit.place, fit.method.label), set()).add(fit.seed)
    return any(len(seeds) > 1 for seeds in found.values())


def _print(found: Comparison) -> None:
    from rich.table import Table

    from subspace_lab.analysis._comparison import range_text
    from subspace_lab.analysis.plots.canvas import console
    from subspace_lab.core.texts import counted, printable

    terminal = console()
    table = Table(title=printable(f"{found.measure} of {len(found.labels)} subspaces"))
    for column in ("pairs", "mean", "95 %", "n"):
        table.add_column(column, justify="left" if column == "pairs" else "right")
    what, yardstick = found.facets
    for name, level in ((f"across {what}s", found.across), (f"two {yardstick}s at one site", found.within)):
        if level is not None:
            interval = "" if level.low is None else f"interval {level.low:.2f} to {level.high:.2f}"
            table.add_row(
                name,
                f"{level.mean:.2f}",
                interval,
                f"{counted(level.pairs, 'pair', 'pairs')} of {level.fits} fits",
            )
    nulls = {} if found.null is None else {"random subspaces": found.null}
    for name, null in {**nulls, **found.nulls}.items():
        table.add_row(
            printable(name),
            f"{null.mean:.2f}",
            range_text(null),
            counted(null.draws, "pair", "pairs"),
        )
    terminal.print(table)
    terminal.print(printable(found.sentence), markup=False)
