"""The terminal: `subspace-lab search`.

Only the terminal's own libraries are imported here; torch and what needs it wait until a command runs, so that
`--help` answers at once. Results go to standard output, progress and complaints to standard error. What cannot
be done is said in one line before any long work, with exit code 2.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from subspace_lab.core.backbone import Backbone
    from subspace_lab.core.sites import Site
    from subspace_lab.das.counterfactuals import Task
else:  # names in annotations have to exist at run time as well, and importing these takes seconds
    Backbone = Site = Task = Any

SHIPPED = "tiny_decoder"
# Where the answer is made and, for contrast, tokens before it; a task that is not named here gives all its spans.
POSITIONS = {"price_tagging": "amount,unit,query,last"}
MIN_ACCURACY = 0.9
SMALL = 10_000_000  # parameters of a model that one thread runs fastest
LIBRARIES = ("subspace-lab", "torch", "transformers", "nnsight")

app = typer.Typer(
    help="Where in a model does a variable live, does it do anything there, and can it be edited?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which fills paragraphs
)


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="subspace-lab")


@app.callback()
def _commands() -> None:
    """With a callback typer keeps the name of a command also while there is only one."""


@app.command()
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
) -> None:
    """Search a model for the subspaces in which a causal variable is swapped.

    Every site, a layer and a position, is searched on its own and scored on held-out pairs: the share of them
    that the model answers as the causal model does once the subspace is exchanged (IIA). Beside it stand the
    training pairs, the exchange of the full vector, random subspaces and a randomly initialised twin.

    Writes into --out: results.json (settings, model, twin, comparison), subspaces.safetensors ("site/variable":
    a basis of shape rank × width), iia.png and overlap.png.
    """
    settings = {**locals(), "out": str(out)}
    with _nothing_left_behind(out):
        with _refusing():
            from subspace_lab.core.backbone import Backbone
            from subspace_lab.core.checkpoints import output_folder
            from subspace_lab.core.training import TrainingConfig
            from subspace_lab.das.search import search as search_sites

            folder = output_folder(out)
            config = TrainingConfig(steps=steps, learning_rate=learning_rate)
            chosen, variable = _task(task, variable)
            specs = _positions(positions or POSITIONS.get(task), _spans(chosen))
            network, tokenizer = _load(model, device)
            backbone = Backbone(network)
            sites = _sites(backbone, component, layers, specs, rank)
            splits = {"train": pairs, "test": test_pairs}
            data = [_encoded(chosen, n, split, seed, variable, tokenizer) for split, n in splits.items()]
            run = partial(search_sites, sites=sites, rank=rank, config=config, seed=seed, memory=memory)
        with _threads(network):
            with _refusing():
                bar = None if allow_failing_model else MIN_ACCURACY
                found = run(backbone, *data, min_accuracy=bar, label="model")
            control = None
            if twin:
                from subspace_lab.analysis.controls import reinitialised

                control = run(Backbone(reinitialised(network, seed)), *data, min_accuracy=None, label="twin ")
        settings |= {
            "model": model or SHIPPED,
            "variable": variable,
            "positions": ",".join(specs),
            "device": str(backbone.device),
            "batch_size": config.batch_size,
            "versions": {name.replace("-", "_"): _version(name) for name in LIBRARIES},
        }
        from subspace_lab.analysis.search_report import print_search, save_search

        comparison = save_search(folder, settings, found, control)
        print_search(folder, settings, found, control, comparison)


@contextmanager
def _refusing() -> Iterator[None]:
    """Say what cannot be done in one line, and exit with 2."""
    try:
        yield
    except (ValueError, IndexError, KeyError, OSError) as error:
        # The text of a KeyError is the repr of its message.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        line = " ".join(str(text).split()).replace("min_accuracy=None", "--allow-failing-model")
        typer.echo(f"subspace-lab: {line}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _nothing_left_behind(out: Path) -> Iterator[None]:
    """Remove the folders that were made on the way to `out` if nothing comes to stand in them."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _threads(network: Any) -> Iterator[None]:
    """One thread for a small model, unless the user has said how many.

    Its products are too small to share, and threads that wait for each other on busy cores made the search
    eight times slower.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in network.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _load(name: str | None, device: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer; a folder is read without asking the Hub."""
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    where = str(files("subspace_lab") / "assets" / SHIPPED) if name is None else name
    local = Path(where).is_dir()
    if not local and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", where):
        raise ValueError(f"--model {where}: there is no such folder, and no model on the Hub has such a name.")
    if local and not (Path(where) / "config.json").is_file():
        raise ValueError(
            f"--model {where}: this folder holds no model; one has a config.json, weights, a tokenizer."
        )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of the loading of weights; ours follow
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
        model: Any = AutoModelForCausalLM.from_pretrained(where, local_files_only=local)
        return model.to(device).eval(), tokenizer
    except (OSError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if local:
            raise ValueError(f"--model {where}: what this folder holds could not be loaded. {why}") from None
        offline = " (offline: HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
        raise ValueError(
            f"--model {where}: there is no such folder, and from the Hub it could not be loaded{offline}. {why}"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _sites(backbone: Backbone, component: str, layers: str, specs: list[str], rank: int) -> list[Site]:
    """Every layer at every position; checked to exist and to have room for the rank."""
    from subspace_lab.core.sites import Site
    from subspace_lab.core.subspaces import check_rank

    numbers: Sequence[int | None] = [None]
    if not component.endswith((".input", ".output")):
        Site(component, 0)  # an unknown component before the model's stacks are looked at
        numbers = _layers(layers, backbone.anatomy.depth(component.rpartition(".")[0]))
    elif layers != "all":
        raise ValueError(f"--layers {layers}: {component!r} names one module by its path and has no layers.")
    sites = [Site(component, number, spec) for number in numbers for spec in specs]
    widths = {site: backbone.width(site) for site in sites}
    for width in widths.values():
        check_rank(rank, width)
    if len(set(widths.values())) > 1:
        raise ValueError(f"Sites of different widths cannot be compared, search them apart: {widths}.")
    return sites


def _layers(text: str, depth: int) -> list[int]:
    if text == "all":
        return list(range(depth))
    chosen: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, -1)
        if not first <= last < depth:
            raise ValueError(
                f"--layers {text}: {part!r} is no layer or range of this model, which has layers 0 to "
                f"{depth - 1}; write 'all', '0,2' or '1-3'."
            )
        chosen += range(first, last + 1)
    return list(dict.fromkeys(chosen))


def _encoded(task: Task, n: int, split: str, seed: int, variable: str, tokenizer: Any) -> Any:
    from subspace_lab.das.counterfactuals import counterfactual_dataset
    from subspace_lab.das.encoding import encode

    dataset = counterfactual_dataset(task, n, split=split, seed=seed, variables=[variable])
    return encode(dataset, tokenizer, list(task.answers.values()))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout
        return None
