"""Many searches in one call: sites × methods × ranks × seeds.

The model runs once over the data for all sites. All fits of a place (a site, or a site for each variable) train
together, and so do those of a few places where that is cheaper. Such a cohort is what an executor is given; each of its
places is written to a folder once it is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path

from subspace_lab.core.sites import Site
from subspace_lab.das._arguments import check_types, searches_of
from subspace_lab.das._fits_files import searched
from subspace_lab.das._places import Places
from subspace_lab.das._preparing import prepare
from subspace_lab.das._recipe import recipe_of
from subspace_lab.das._running import InTurn, OnExecutor
from subspace_lab.das._sweep_files import SweepFiles, SweepUnsaved
from subspace_lab.das.fits import Fits
from subspace_lab.das.methods.method import Method
from subspace_lab.das.objectives import Loss, Metric, cross_entropy, iia
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.screens import Screen
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.identity import model_facts, versions
from subspace_lab.model.sources import Unmatched

__all__ = ["SweepInterrupted", "SweepUnsaved", "sweep"]


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C in a sweep some of whose places were finished.

    Attributes:
        fits: those of the finished places.
    """

    def __init__(self, fits: Fits, places: int) -> None:
        super().__init__(f"Interrupted: {searched(len(fits.places), places)}.")
        self.fits = fits


def sweep(
    backbone: Backbone,
    pairs: Pairs,
    sites: Sequence[Site | Mapping[str, Site]],
    methods: Sequence[Method],
    *,
    seeds: int | Sequence[int] = 1,
    config: TrainingConfig | None = None,
    loss: Loss = cross_entropy,
    metrics: Sequence[Metric] = (iia,),
    min_accuracy: float | None = 0.9,
    memory: int | str | None = None,
    unmatched: Unmatched = "refuse",
    screen: Screen | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    quiet: bool = False,
    label: str = "sweep",
) -> Fits:
    """Fit every method at every site, with every seed.

    Args:
        backbone: of the model.
        pairs: in three splits: fits are trained on `train`, chosen by `dev`, and reported on `test`.
        sites: each is searched on its own. A site holds all variables, as parts of one basis; a mapping {variable:
            site} gives each variable a site of its own, all exchanged at once. For one variable at
            several sites see `at_several_sites`.
        methods: a setting that is a list, such as `DAS(rank=[1, 4])`, runs once for each of its values.
        seeds: how many, or which: of random starts and of the order of the pairs.
        config: of the training; its `seed` is replaced by each of the seeds.
        loss: minimised by methods that train.
        metrics: functions of an `Outcome`; the first is the one that tables show.
        min_accuracy: a model that answers the test split's bases worse than this is refused; None allows any.
        memory: budget of the frozen past, as in `FrozenPast`.
        unmatched: what becomes of positions that a base has and its source has not, or the other way round: "refuse"
            raises, "keep_base" leaves them as they are in the base.
        screen: spend training only where a cheap first pass leaves hope; cells that are spared are told in
            `screened` and in the table. None trains at every site.
        out: a folder in which every site is kept as soon as it is searched. A new or empty one; or that of the same
            sweep, which then goes on where it ended, however it ended. `Fits.load` reads it at any time.
        executor: of `concurrent.futures`, such as a `ProcessPoolExecutor` or Dask's `client.get_executor()`, whose
            workers search a site at a time. `memory` is then the budget of each worker. Without one the sites are
            searched in this process, one after the other. In a process the model is run by one thread at a time.
        quiet: say nothing of the progress.

    Raises:
        TypeError: an argument of another kind; something that other processes cannot be sent.
        ValueError: nothing to search, a rank above a site's width, the same method twice, a pair whose base and
            source have different numbers of positions, or a model that fails the task. All this before anything is
            trained.
        FileExistsError, BlockingIOError: `out` holds something else, or another process is at it.
        ValueError: `out` is the folder of another sweep, of another model or other data; the message says what
            differs.
        RuntimeError: a worker died.
        SweepUnsaved: an OSError that has the fits, which could not be written to `out`.
        SweepInterrupted: a KeyboardInterrupt that has the fits of the sites which were finished before it.
    """
    config = config or TrainingConfig()
    check_types(backbone, pairs, sites, methods, seeds, config, loss, metrics)
    if executor is not None and not isinstance(executor, Executor):
        raise TypeError(
            f"executor is one of concurrent.futures, such as ProcessPoolExecutor(2); found {executor!r}."
        )
    if out is not None and not isinstance(out, str | Path):
        raise TypeError(f"out names a folder, as text or Path; found {out!r}.")
    if screen is not None and not isinstance(screen, Screen):
        raise TypeError(f"screen is a Screen, such as Screen(); found {screen!r}.")
    assignments, variants, asked, widths = searches_of(backbone, pairs, sites, methods, seeds, metrics)
    places = Places(
        backbone, pairs, assignments, variants, asked, config, loss, metrics, widths, memory, unmatched, screen
    )
    model = model_facts(backbone.model)
    with ExitStack() as stack:
        files: SweepFiles | None = None
        if out is not None:
            recipe = recipe_of(places, model, versions())
            files = stack.enter_context(SweepFiles.taken(out, recipe, variants, _say(quiet)))
            if files.whole:
                return files.read()
        found = {} if files is None else files.finished()
        prepare(places, model, min_accuracy, train=executor is None)
        run = (
            InTurn(places, found, label, quiet, files)
            if executor is None
            else stack.enter_context(OnExecutor.of(executor, places, found, label, quiet, files))
        )
        try:
            run.go(screen)
        except KeyboardInterrupt:
            if not found:
                raise
            raise SweepInterrupted(_joined(places, found), len(assignments)) from None
        fits = _joined(places, found)
        if files is not None:
            files.finish(fits)
        return fits


def _joined(places: Places, found: Mapping[int, Fits]) -> Fits:
    """The fits of several places, in the order of the places."""
    parts = [found[number] for number in sorted(found)]
    facts = dict(places.facts)
    if len(parts) < len(places.assignments):
        facts["interrupted"] = searched(len(parts), len(places.assignments))
    return Fits(
        tuple(fit for part in parts for fit in part),
        places.floors,
        tuple(failure for part in parts for failure in part.failures),
        facts,
        places.labels,
        tuple(one for part in parts for one in part.screened),
    )


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else (lambda text: print(text, file=sys.stderr))
