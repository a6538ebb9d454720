"""`subspace-lab search`: where in a model is a variable represented?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from subspace_lab.cli.asked import Asked, of_data, of_task
from subspace_lab.cli.common import (
    INTERRUPTED,
    DeviceOption,
    DtypeOption,
    TrustOption,
    check_device,
    check_dtype,
    check_numbers,
    interruptible,
    layer_numbers,
    numbers_below,
    refusing,
    say,
    threads,
    undisturbed,
)
from subspace_lab.cli.loading import SHIPPED, Source, load_causal, load_tokenizer
from subspace_lab.cli.searching import (
    MODEL,
    Searched,
    fresh,
    how_many_twins,
    is_finished,
    resumable,
    twin_folder,
    workers_of,
    written,
)

if TYPE_CHECKING:
    from subspace_lab.analysis.verdicts import Verdict
    from subspace_lab.core.sites import Site
    from subspace_lab.das.fits import Fits
    from subspace_lab.das.methods import Method
    from subspace_lab.das.pairs import Pairs
    from subspace_lab.model.backbone import Backbone
else:  # names in annotations must exist at run time too, but importing these takes seconds
    Backbone = Fits = Method = Pairs = Site = Verdict = Any

# The positions around the answer and, for contrast, before it. For a task that is not named here: all its spans.
POSITIONS = {"price_tagging": "amount,unit,query,last"}
MIN_ACCURACY = 0.9


def search(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a .gguf file, a name on the Hub.", show_default="a small decoder that comes along"
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="For a wrong name the error lists all tasks.", show_default="price_tagging"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Your own pairs instead of a task: .jsonl, .json, .csv, .parquet.", show_default="none"),
    ] = None,
    split_by: Annotated[
        str | None,
        typer.Option(help="With --data: what no two splits share, entity, template, answer.", show_default="none"),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(help="Of --data, leave out pairs until each answer is about as frequent as the others."),
    ] = True,
    variable: Annotated[
        str | None, typer.Option(help="Of the task's causal model, or of the data.", show_default="the task's")
    ] = None,
    layers: Annotated[str, typer.Option(help="'all', '0,2' or '1-3'.")] = "all",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: the task's spans, or all, first, last, f3, l2, 7, 2:5; '+' joins several.",
            show_default="a few spans of the task",
        ),
    ] = None,
    component: Annotated[str, typer.Option(help="Of a block, or 'path.of.a.module.output'.")] = "block_output",
    heads: Annotated[
        str | None,
        typer.Option(
            help="For a component with heads, each a separate site: 'all', '0,2' or '1-3'.",
            show_default="together",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, such as DAS,PCA; for a wrong name the error lists all methods.",
            show_default="DAS,DifferenceOfMeans,PCA,RandomSubspace,FullVector",
        ),
    ] = None,
    receiver: Annotated[
        str | None,
        typer.Option(
            help="For PathPatching: the site that the effect goes through, 'mlp_output[5]@last'.",
            show_default="none",
        ),
    ] = None,
    rank: Annotated[str, typer.Option(help="Dimensions of each subspace: 8, or several such as 2,4,8.")] = "8",
    steps: Annotated[int, typer.Option(help="Training steps at each site.")] = 60,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate of Adam.")] = 5e-2,
    pairs: Annotated[
        int | None, typer.Option(help="With a task: counterfactual pairs to train on.", show_default="1000")
    ] = None,
    dev_pairs: Annotated[
        int | None,
        typer.Option(help="With a task: held-out pairs on which sites and ranks are chosen.", show_default="200"),
    ] = None,
    test_pairs: Annotated[
        int | None,
        typer.Option(
            help="With a task: held-out pairs on which the reported scores are computed.", show_default="400"
        ),
    ] = None,
    seed: Annotated[
        str,
        typer.Option(
            help="Of the random starts: 0, or several such as 0,1,2. The first also draws pairs and twin."
        ),
    ] = "0",
    out: Annotated[Path, typer.Option(help="A new or empty folder for the results.")] = Path("subspace_search"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the same search in --out, wherever it stopped.")
    ] = False,
    twin: Annotated[bool, typer.Option(help="Search a randomly initialised twin too, as a control.")] = True,
    twins: Annotated[int, typer.Option(help="How many randomly initialised twins.")] = 1,
    screen: Annotated[
        bool, typer.Option("--screen", help="Train only at sites that are promising in a short first pass.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that search sites side by side.")] = 1,
    answers: Annotated[
        str,
        typer.Option(help="For answers of several tokens: 'token' reads the first that differ, 'sequence' all."),
    ] = "token",
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template for prompts.")] = False,
    count_all: Annotated[
        bool, typer.Option("--count-all", help="Also use pairs whose base or source the model answers wrong.")
    ] = False,
    allow_failing_model: Annotated[
        bool, typer.Option("--allow-failing-model", help="Search even if the model fails at the task.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for computed states, such as '2GiB'.", show_default="half of what is free"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Search a model for the subspaces that represent a causal variable.

    Every site (a layer and a position) is searched separately by several methods: a trained subspace (DAS), and for
    comparison the difference of means, principal components, random subspaces and the full vector. The score (IIA) is
    the share of held-out pairs in which the model gives the causal model's answer after the subspace was exchanged.
    Sites are chosen on dev pairs and reported on test pairs. The same search runs on a randomly initialised twin.
    The last lines are a verdict: whether to believe what was found (`check` gives a complete one).
    Every site is saved when it is finished: after Ctrl-C or a kill, --resume continues.

    Writes into --out: results.json (settings, model, twin, comparison, verdict), the fits with their subspaces (model,
    twin), iia.png and overlap.png.
    """
    settings = {**locals(), "out": str(out)}
    del settings["resume"], settings["workers"]  # they do not change any result
    with interruptible(), ExitStack() as stack:
        with refusing():
            from subspace_lab.core.files import taken_folder
            from subspace_lab.das.answered import only_answered
            from subspace_lab.das.screens import Screen
            from subspace_lab.das.search import search as search_sites
            from subspace_lab.engine.training import TrainingConfig
            from subspace_lab.model.backbone import Backbone

            folder = stack.enter_context(taken_folder(out, say, resumable if resume else fresh))
            number = how_many_twins(twin, twins)
            scored = _answers(answers)
            config = TrainingConfig(steps=steps, learning_rate=learning_rate)
            ranks, seeds = _integers("--rank", rank), _integers("--seed", seed)
            numbers = {"train": pairs, "dev": dev_pairs, "test": test_pairs}
            if data is None:
                asked: Asked = of_task(task, variable, numbers, seeds[0], scored, chat, split_by, balance)
            else:
                asked = of_data(data, task, variable, numbers, seeds[0], scored, chat, split_by, balance)
            methods = _methods(method, ranks, receiver, several=len(asked.variables) > 1)
            check_numbers(positions or "")
            specs = _positions(positions or POSITIONS.get(asked.name), asked.spans)
            device, dtype = check_device(device), check_dtype(dtype)
            source = Source(model, trust_remote_code)
            tokenizer, network = load_tokenizer(source), load_causal(source, device, dtype)
            backbone = Backbone(network)
            sites = _sites(backbone, component, layers, specs, heads, max(ranks))
            made = asked.pairs(tokenizer)
        finished = resume and is_finished(folder, number)
        searched = Searched()
        with (
            threads(network),
            refusing({"min_accuracy=None": "--allow-failing-model", "right_only=False": "--count-all"}),
        ):
            bar = None if allow_failing_model else MIN_ACCURACY
            if not count_all and not allow_failing_model:
                made = only_answered(backbone, made, min_accuracy=bar)
            options = stack.enter_context(workers_of(workers, network, memory, device))
            run: Callable[..., Fits] = partial(
                search_sites,
                pairs=made,
                sites=sites,
                methods=methods,
                config=config,
                seeds=seeds,
                screen=Screen() if screen else None,
                right_only=False,  # the pairs that the model answers right are used for its twins too
                **options,
            )

            def of_twin(folder: Path, seed: int) -> Fits:
                from subspace_lab.analysis.twins import reinitialised

                label = f"{folder.name} "
                return run(Backbone(reinitialised(network, seed)), min_accuracy=None, label=label, out=folder)

            searched.model = searched.run(
                folder / MODEL, lambda there: run(backbone, min_accuracy=bar, label="model", out=there)
            )
            for i in range(number):
                if not searched.interrupted:
                    one = searched.run(folder / twin_folder(i), partial(of_twin, seed=seeds[0] + i))
                    searched.twins += [] if one is None else [one]
        found = searched.model
        if found is None:
            raise KeyboardInterrupt
        settings |= {
            "model": model or SHIPPED,
            "task": asked.name,
            "variable": ", ".join(asked.variables),
            **asked.settings,
            "positions": ",".join(specs),
            "device": str(backbone.device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "batch_size": config.batch_size,
            "method": ",".join(dict.fromkeys(type(one).__name__ for one in methods)),
        }
        from subspace_lab.analysis.comparisons import compare
        from subspace_lab.analysis.saves import Saves
        from subspace_lab.analysis.search_report import print_search, save_search

        with undisturbed() as came, threads(network):
            comparison = compare(found)
            verdict = _verdict(backbone, made, found, searched.twins)
            saves = (
                Saves(folder, written(folder))
                if finished
                else save_search(folder, settings, found, searched.twins, comparison, verdict, searched.unsaved)
            )
            print_search(settings, found, searched.twins, comparison, verdict, saves)
            with refusing():
                saves.finish()
        if finished:
            say(f"{folder} contains this search already, finished: nothing is left to do.")
        if searched.interrupted:
            what = found.facts.get("interrupted", "the model was searched, its twins not completely")
            say(f"Interrupted: {what}; finished results are saved in {folder}. --resume continues.")
        if searched.interrupted or came:
            raise typer.Exit(INTERRUPTED)


def _verdict(backbone: Backbone, pairs: Pairs, fits: Fits, twins: list[Fits]) -> Verdict | str:
    """What the search allows to conclude, or why it allows nothing."""
    from subspace_lab.analysis.checking import of_search

    try:
        return of_search(backbone, pairs, fits, twins)
    except ValueError as error:
        return str(error)


def _integers(option: str, text: str) -> list[int]:
    """The numbers in '8' or '2,4,8'."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} {text}: needed is a whole number, or several different ones such as 2,4,8.")
    return [int(part) for part in parts]


def _answers(text: str) -> Literal["token", "sequence"]:
    if text not in ("token", "sequence"):
        raise ValueError(f"--answers {text}: possible are token and sequence.")
    return "token" if text == "token" else "sequence"


def _methods(names: str | None, ranks: list[int], receiver: str | None, *, several: bool) -> list[Method]:
    """The methods from the options, those with a rank once for each rank. `several`: more than one variable."""
    from dataclasses import fields

    from subspace_lab.das import methods
    from subspace_lab.das.search import default_methods

    if receiver is not None and "pathpatching" not in (names or "").lower():
        raise ValueError(
            f"--receiver {receiver} belongs to a method that is not in --method; add --method PathPatching."
        )
    if names is None:
        return default_methods(ranks, shared_site=several)
    known = {
        name.lower(): kind
        for name, kind in vars(methods).items()
        if isinstance(kind, type) and issubclass(kind, methods.Method) and kind is not methods.Method
    }
    found: list[Method] = []
    for name in names.split(","):
        kind = known.get(name.strip().lower())
        if kind is None:
            raise ValueError(
                f"--method {name}: possible are {', '.join(sorted(k.__name__ for k in known.values()))}."
            )
        if kind is methods.PathPatching:
            if receiver is None:
                raise ValueError(
                    f"--method {name} needs the site through which the effect goes: --receiver 'mlp_output[5]@last'."
                )
            found.append(methods.PathPatching(receiver))
            continue
        # If a method's rank is only an upper limit, its whole span is used.
        ranked = any(f.name == "rank" and f.default is not None for f in fields(kind))
        found.append(kind(**({"rank": ranks} if ranked else {})))
    if all(method.caution for method in found):
        raise ValueError(f"--method {names}: {found[0].caution} Add another method for comparison: DAS,{names}.")
    return found


def _positions(text: str | None, spans: list[str]) -> list[str]:
    """The positions from the option, by default all spans."""
    from subspace_lab.core.positions import names, normalise

    specs = []
    for part in spans if text is None else text.split(","):
        try:
            spec = normalise(part)
        except ValueError as error:
            raise ValueError(f"--positions: {error} The spans are {spans}.") from None
        unknown = [name for name in names(spec) if name not in spans]
        if unknown:
            raise ValueError(
                f"--positions {part}: no span is called {unknown[0]!r}; the spans are {spans}. Also "
                "possible: all, first, last, f3, l2, an integer, a slice like 2:5; '+' joins several."
            )
        specs.append(spec)
    return list(dict.fromkeys(specs))


def _sites(
    backbone: Backbone, component: str, layers: str, specs: list[str], heads: str | None, rank: int
) -> list[Site]:
    """Every layer, or every head separately, at every position. Checks that they exist and that the rank fits."""
    from subspace_lab.core.orthonormal import check_rank
    from subspace_lab.core.sites import Site
    from subspace_lab.model.site_lists import list_sites

    if component.endswith((".input", ".output")):
        for option, given, default in (("layers", layers, "all"), ("heads", heads, None)):
            if given != default:
                raise ValueError(
                    f"--{option} {given}: {component!r} names one module by its path and has no {option}."
                )
        found = list_sites(backbone, component, positions=specs)
    else:
        Site(component, 0)  # raises for an unknown component before the model's stacks are searched
        anatomy = backbone.anatomy
        numbers = layer_numbers(layers, anatomy.depth(component.rpartition(".")[0]))
        alone: Literal["all"] | list[int] | None = None
        if heads is not None:
            most = max(anatomy.head_count(Site(component, number, heads=0)) for number in numbers)
            alone = "all" if heads == "all" else numbers_below(most, heads, "--heads", "head")
        found = list_sites(backbone, component, layers=numbers, positions=specs, heads=alone)
    widths = {site: backbone.width(site) for site in found}
    for width in widths.values():
        check_rank(rank, width)
    if len(set(widths.values())) > 1:
        raise ValueError(f"Sites of different widths cannot be compared; search them separately: {widths}.")
    return found
