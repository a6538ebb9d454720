"""`subspace-lab search`: where in a model does a variable live?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_lab.cli.common import (
    SHIPPED,
    check_device,
    check_dtype,
    layer_numbers,
    load_causal,
    load_tokenizer,
    nothing_left_behind,
    refusing,
    threads,
    versions,
)

if TYPE_CHECKING:
    from subspace_lab.core.sites import Site
    from subspace_lab.das.counterfactuals import Task
    from subspace_lab.model.backbone import Backbone
else:  # names in annotations have to exist at run time as well, and importing these takes seconds
    Backbone = Site = Task = Any

# Where the answer is made and, for contrast, tokens before it; a task that is not named here gives all its spans.
POSITIONS = {"price_tagging": "amount,unit,query,last"}
MIN_ACCURACY = 0.9


def search(
    model: Annotated[
        str | None,
        typer.Option(help="A folder or a name on the Hub.", show_default="a small decoder that comes along"),
    ] = None,
    task: Annotated[str, typer.Option(help="A wrong name is answered with those that exist.")] = "price_tagging",
    variable: Annotated[
        str | None, typer.Option(help="Of the task's causal model.", show_default="the task's")
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
    rank: Annotated[int, typer.Option(help="Dimensions of each subspace.")] = 8,
    steps: Annotated[int, typer.Option(help="Training steps at each site.")] = 60,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at its highest.")] = 5e-2,
    pairs: Annotated[int, typer.Option(help="Counterfactual pairs to train on.")] = 1000,
    test_pairs: Annotated[int, typer.Option(help="Held-out pairs, on which everything is scored.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the pairs, the random starts and the twin.")] = 0,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the results.")] = Path("subspace_search"),
    twin: Annotated[bool, typer.Option(help="Search a randomly initialised twin too, as a control.")] = True,
    allow_failing_model: Annotated[
        bool, typer.Option("--allow-failing-model", help="Also where the model fails at the task.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="What may be kept of computed states, as '2GiB'.", show_default="half of what is free"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="As torch names it.", show_default="cuda if there is one, else cpu")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model: float32, bfloat16, float16.", show_default="the checkpoint's")
    ] = None,
) -> None:
    """Search a model for the subspaces in which a causal variable is swapped.

    Every site, a layer and a position, is searched on its own and scored on held-out pairs: the share of them
    that the model answers as the causal model does once the subspace is exchanged (IIA). Beside it stand the
    training pairs, the exchange of the full vector, random subspaces and a randomly initialised twin.

    Writes into --out: results.json (settings, model, twin, comparison), subspaces.safetensors ("site/variable":
    a basis of shape rank × width), iia.png and overlap.png.
    """
    settings = {**locals(), "out": str(out)}
    with nothing_left_behind(out):
        with refusing():
            from subspace_lab.core.files import output_folder
            from subspace_lab.das.search import search as search_sites
            from subspace_lab.engine.training import TrainingConfig
            from subspace_lab.model.backbone import Backbone

            folder = output_folder(out)
            config = TrainingConfig(steps=steps, learning_rate=learning_rate)
            chosen, variable = _task(task, variable)
            specs = _positions(positions or POSITIONS.get(task), _spans(chosen))
            device, dtype = check_device(device), check_dtype(dtype)
            tokenizer, network = load_tokenizer(model), load_causal(model, device, dtype)
            backbone = Backbone(network)
            sites = _sites(backbone, component, layers, specs, rank)
            splits = {"train": pairs, "test": test_pairs}
            data = [_encoded(chosen, n, split, seed, variable, tokenizer) for split, n in splits.items()]
            run = partial(search_sites, sites=sites, rank=rank, config=config, seed=seed, memory=memory)
        with threads(network):
            with refusing({"min_accuracy=None": "--allow-failing-model"}):
                bar = None if allow_failing_model else MIN_ACCURACY
                found = run(backbone, *data, min_accuracy=bar, label="model")
            control = None
            if twin:
                from subspace_lab.analysis.twins import reinitialised

                control = run(Backbone(reinitialised(network, seed)), *data, min_accuracy=None, label="twin ")
        settings |= {
            "model": model or SHIPPED,
            "variable": variable,
            "positions": ",".join(specs),
            "device": str(backbone.device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "batch_size": config.batch_size,
            "versions": versions(),
        }
        from subspace_lab.analysis.search_report import print_search, save_search

        comparison = save_search(folder, settings, found, control)
        print_search(folder, settings, found, control, comparison)


def _task(name: str, variable: str | None) -> tuple[Task, str]:
    from subspace_lab.tasks import load_task

    task = load_task(name)
    possible = [*task.causal_model.inputs, *task.causal_model.variables]
    if variable is not None and variable not in possible:
        raise ValueError(f"--variable {variable}: the task {name!r} has {possible}.")
    return task, variable or task.variable


def _spans(task: Task) -> list[str]:
    """The named positions of a task's prompts, which are the same in all of them."""
    return list(task.prompt(task.sample(random.Random(0), "train")).spans)


def _positions(text: str | None, spans: list[str]) -> list[str]:
    """The position specs asked for, all spans by default."""
    from subspace_lab.core.positions import names, normalise

    specs = []
    for part in spans if text is None else text.split(","):
        try:
            spec = normalise(part)
        except ValueError as error:
            raise ValueError(f"--positions: {error} This task's spans are {spans}.") from None
        unknown = [name for name in names(spec) if name not in spans]
        if unknown:
            raise ValueError(
                f"--positions {part}: no span of this task is called {unknown[0]!r}; its spans are {spans}. Also "
                "possible: all, first, last, f3, l2, an integer, a slice like 2:5; '+' joins several."
            )
        specs.append(spec)
    return list(dict.fromkeys(specs))


def _sites(backbone: Backbone, component: str, layers: str, specs: list[str], rank: int) -> list[Site]:
    """Every layer at every position; checked to exist and to have room for the rank."""
    from subspace_lab.core.orthonormal import check_rank
    from subspace_lab.core.sites import Site

    numbers: Sequence[int | None] = [None]
    if not component.endswith((".input", ".output")):
        Site(component, 0)  # an unknown component before the model's stacks are looked at
        numbers = layer_numbers(layers, backbone.anatomy.depth(component.rpartition(".")[0]))
    elif layers != "all":
        raise ValueError(f"--layers {layers}: {component!r} names one module by its path and has no layers.")
    sites = [Site(component, number, spec) for number in numbers for spec in specs]
    widths = {site: backbone.width(site) for site in sites}
    for width in widths.values():
        check_rank(rank, width)
    if len(set(widths.values())) > 1:
        raise ValueError(f"Sites of different widths cannot be compared, search them apart: {widths}.")
    return sites


def _encoded(task: Task, n: int, split: str, seed: int, variable: str, tokenizer: Any) -> Any:
    from subspace_lab.das.counterfactuals import counterfactual_dataset
    from subspace_lab.das.encoding import encode

    dataset = counterfactual_dataset(task, n, split=split, seed=seed, variables=[variable])
    return encode(dataset, tokenizer, list(task.answers.values()))
