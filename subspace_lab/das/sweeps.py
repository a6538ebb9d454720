"""Many searches in one call: sites × methods × ranks × seeds.

The model runs once over the data for all sites. All fits of a place (a site, or a site for each variable) train
together. Several places train together too (a cohort), if that is cheaper. Each task of an executor is one
cohort. Each place is written to the folder as soon as it is finished.
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
from subspace_lab.das.answered import check_min_accuracy
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
    """Ctrl-C in a sweep, after at least one place was finished.

    Attributes:
        fits: the fits of the finished places.
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
        backbone: the model.
        pairs: in three splits: fits are trained on `train`, chosen on `dev`, and reported on `test`.
        sites: the places; each is searched separately. At a site, the subspaces of all variables are parts of one
            basis. A mapping {variable: site} gives each variable a site of its own; all are exchanged at once. For one
            variable at several sites see `at_several_sites`.
        methods: a setting that is a list, such as `DAS(rank=[1, 4])`, runs once for each of its values.
        seeds: how many seeds, or which ones. A seed sets the random start and the order of the pairs.
        config: settings of the training; its `seed` is replaced by each of the seeds.
        loss: the loss that trained methods minimise.
        metrics: functions of an `Outcome`; tables show the first one.
        min_accuracy: a model with a lower accuracy on the bases of the test split is refused; None allows any model.
        memory: memory budget of the frozen past, as in `FrozenPast`.
        unmatched: what happens at positions that only the base or only its source has: "refuse" raises, "keep_base"
            leaves the state of the base.
        screen: a cheap first pass that selects the sites at which methods are trained. The table and `screened` show
            which cells were skipped. None trains at every site.
        out: a folder in which every site is saved as soon as it is finished. The folder is new or empty, or it is the
            folder of the same sweep, which then continues where it stopped, for whatever reason. `Fits.load` can read
            it at any time.
        executor: an executor of `concurrent.futures`, such as a `ProcessPoolExecutor` or Dask's
            `client.get_executor()`. Its workers search one site at a time, and `memory` is the budget of each worker.
            Without an executor the sites are searched in this process, one after the other. Within one process, only
            one thread at a time runs the model.
        quiet: show no progress.

    Raises:
        TypeError: an argument of the wrong type; something that cannot be sent to other processes.
        ValueError: nothing to search, a rank above a site's width, the same method twice, a pair whose base and
            source have different numbers of positions, or a model that fails the task. All of these are raised before
            any training.
        FileExistsError, BlockingIOError: `out` contains something else, or another process is using it.
        ValueError: `out` is the folder of another sweep, or of another model or other data; the message says what
            differs.
        RuntimeError: a worker died.
        SweepUnsaved: an OSError with the fits, which could not be written to `out`.
        SweepInterrupted: a KeyboardInterrupt with the fits of the sites that were finished before it.
    """
    config = config or TrainingConfig()
    check_types(backbone, pairs, sites, methods, seeds, config, loss, metrics)
    check_min_accuracy(min_accuracy)
    if executor is not None and not isinstance(executor, Executor):
        raise TypeError(
            f"executor must be one of concurrent.futures, such as ProcessPoolExecutor(2); found {executor!r}."
        )
    if out is not None and not isinstance(out, str | Path):
        raise TypeError(f"out must name a folder, as text or Path; found {out!r}.")
    if screen is not None and not isinstance(screen, Screen):
        raise TypeError(f"screen must be a Screen, such as Screen(); found {screen!r}.")
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
