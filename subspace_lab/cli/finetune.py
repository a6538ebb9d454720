"""`subspace-lab finetune`: train an adapter on the rows of a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    refusing,
    say,
    threads,
    undisturbed,
)
from subspace_lab.cli.loading import SHIPPED, Source, load_causal, load_classifier, load_tokenizer, longest_text
from subspace_lab.cli.suggested import CHOSEN, suggested

if TYPE_CHECKING:
    from subspace_lab.engine.training import TrainingConfig
    from subspace_lab.reft.config import ReftConfig
    from subspace_lab.reft.datafiles import Examples
    from subspace_lab.reft.jobs import TrainingJob
    from subspace_lab.reft.model import ReftModel
else:  # names in annotations must exist at run time too, but importing these takes seconds
    TrainingJob = ReftConfig = ReftModel = Examples = TrainingConfig = Any

EPOCHS = 10


def finetune(
    data: Annotated[
        Path,
        typer.Option(
            help="A .jsonl, .json, .csv or .parquet file with the columns prompt and answer, or messages, or "
            "text and label."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a .gguf file, a name on the Hub.", show_default="a small decoder that comes along"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="For a wrong name the error lists all methods.")] = "LoReFT",
    positions: Annotated[
        str, typer.Option(help="In the prompt: all, first, last, f3, l2, 7, 2:5; '+' joins several.")
    ] = "f3+l3",
    rank: Annotated[int, typer.Option(help="Dimensions of each intervention.")] = 4,
    layers: Annotated[str, typer.Option(help="'all', '0,2' or '1-3'.")] = "all",
    component: Annotated[str, typer.Option(help="The component of a block.")] = "block_output",
    every_token: Annotated[
        bool,
        typer.Option(
            "--every-token",
            help="Edit answers and generated tokens too, so that the adapter can be merged. Needs --positions all.",
        ),
    ] = False,
    bias: Annotated[
        bool,
        typer.Option(
            "--bias/--no-bias", help="Whether edits have a b. Without b they can be merged into any model."
        ),
    ] = True,
    epochs: Annotated[
        int | None, typer.Option(help="How often each row is seen.", show_default=f"{EPOCHS}, or see --steps")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one step.")] = 16,
    accumulate: Annotated[
        int, typer.Option(help="In how many parts the rows of a step are computed, to need less memory.")
    ] = 1,
    patience: Annotated[
        int | None,
        typer.Option(
            help="End after so many epochs without a lower held-out loss, and keep the best.",
            show_default="no end",
        ),
    ] = None,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="First try a handful of settings near these ones on the training rows, and go on with the suggested "
            "one. For answers.",
        ),
    ] = False,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate of Adam.")] = 4e-3,
    held_out: Annotated[
        str,
        typer.Option(help="Rows that are not trained on: a share ('0.1') or a number ('50'); '0' for none."),
    ] = "0.1",
    samples: Annotated[int, typer.Option(help="Prompts to generate from, before and after.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each generation, at most.")] = 32,
    end: Annotated[
        bool,
        typer.Option(
            help="Learn to stop: put the end-of-text token after each answer (messages end as in their template)."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the held-out rows, the order and the random starts.")] = 0,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the adapter.")] = Path("finetuned"),
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for computed states, such as '2GiB'; for answers.",
            show_default="half of what is free",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train a frozen model to answer, or to classify, by edits of its hidden states (ReFT).

    Rows with prompt and answer, or with messages, train a language model's edits; the held-out loss and greedy
    generations are shown before and after. Rows with text and label train a classifier with its head; the held-out
    accuracy is shown together with that of the most frequent class. Ctrl-C ends the training early and saves.

    Writes into --out the adapter, which `ReftModel.from_pretrained` and `load_adapter` can read, with results.json
    (settings, losses, held-out scores, samples) and loss.png.
    """
    settings: dict[str, Any] = {**locals(), "data": str(data), "out": str(out)}
    with interruptible(), refusing(), ExitStack() as stack:
        from subspace_lab.core.files import taken_folder
        from subspace_lab.model.identity import versions
        from subspace_lab.reft.config import ReftConfig
        from subspace_lab.reft.data import expect_known_tokens
        from subspace_lab.reft.datafiles import read_examples
        from subspace_lab.reft.jobs import pad_token
        from subspace_lab.reft.model import get_reft_model

        folder = stack.enter_context(taken_folder(out, say))
        check_numbers(positions)
        if not 0 <= seed < 2**32:
            raise ValueError(f"--seed {seed}: possible are whole numbers from 0 to 2**32 - 1.")
        config = ReftConfig(
            method=method,
            rank=rank,
            positions=positions,
            component=component,
            seed=seed,
            every_token=every_token,
            bias=bias,
        )
        if min(samples, max_new_tokens - 1) < 0:
            raise ValueError(f"--samples {samples}, --max-new-tokens {max_new_tokens}: needed are ≥ 0 and ≥ 1.")
        rows = read_examples(data)
        split = rows.split(_held_out(held_out, len(rows)), seed)
        _check_ends(patience, accumulate, split[1])
        training = _training(epochs, steps, len(split[0]), batch_size, learning_rate, seed)
        device, dtype = check_device(device), check_dtype(dtype)
        _check_memory(memory, device, rows)
        if suggest and rows.classes is not None:
            raise ValueError("--suggest tries edits of language models, but these rows have text and label.")
        source = Source(model, trust_remote_code)
        tokenizer = load_tokenizer(source)
        generating = {"samples": samples, "max_new_tokens": max_new_tokens, "end": end}
        job = _job(rows, split, tokenizer, longest_text(source, tokenizer), generating)
        job.check_positions(config)
        network, saved = _network(source, device, dtype, rows, seed, pad_token(tokenizer))
        expect_known_tokens((row["input_ids"] for row in (*job.training, *job.held_out)), network)
        config = replace(config, layers=_layers(layers, network, component), modules_to_save=saved)
        if suggest:
            with threads(network):
                config, training, found = suggested(network, job, config, training, memory)
            settings |= {name: getattr(config, name) for name in CHOSEN}
            settings |= {"learning_rate": training.learning_rate, "suggestion": found}
        reft = get_reft_model(network, config)
        settings |= {
            "model": model or SHIPPED,
            "method": config.method,
            "positions": config.positions,
            "steps": training.steps,
            "device": str(reft.device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "versions": versions(),
        }
        with threads(network):
            _run(folder, settings, rows, job, reft, training)


def _run(
    folder: Path,
    settings: dict[str, Any],
    rows: Examples,
    job: TrainingJob,
    reft: ReftModel,
    training: TrainingConfig,
) -> None:
    """Measure, train, save, measure again, and report."""
    from subspace_lab.analysis.finetune_report import Finetuned, print_finetuned, save_adapter, save_finetuned
    from subspace_lab.reft.finetune import FinetuneInterrupted

    with reft.disable_adapter():
        before = job.measure(reft, training.batch_size)
    losses: list[float] = []
    kept: int | None = None
    given = {name: settings[name] for name in ("patience", "accumulate", "memory")}
    try:
        history = job.train(reft, training, on_step=lambda _, loss: losses.append(loss), **given)
        kept = None if settings["patience"] is None else history.kept
    except KeyboardInterrupt as stopped:
        if not losses:
            raise
        which = "trained adapter"
        if settings["patience"] is not None and isinstance(stopped, FinetuneInterrupted):
            kept = stopped.history.kept
            which = f"adapter of step {kept}, with the lowest held-out loss,"
        say(f"Interrupted after {len(losses)} of {training.steps} steps: the {which} is saved.")
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} Try a lower --learning-rate than {training.learning_rate}.") from None
    # Saved at once, so that the adapter is there whatever ends the process after this point.
    with undisturbed() as came:
        saves = save_adapter(folder, reft)
    try:
        if came:
            raise KeyboardInterrupt
        after = job.measure(reft, training.batch_size)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} The adapter is saved in {folder}.") from None
    except KeyboardInterrupt:
        saves.finish()
        say(f"Interrupted before the adapter was measured: it is saved in {folder}, without results.json.")
        raise typer.Exit(INTERRUPTED) from None
    trained, parameters = reft.get_nb_trainable_parameters()
    counts = {"training": len(job.training), "held_out": len(job.held_out)}
    done = Finetuned(
        tuple(losses),
        before,
        after,
        trained,
        parameters,
        {**counts, "shortened": job.shortened, "repeated": rows.repeated},
        job.samples(),
        rows.classes,
        job.constant,
        kept,
    )
    with undisturbed() as came:
        save_finetuned(saves, settings, done)
        print_finetuned(saves, settings, done)
        saves.finish()
    if came:
        raise typer.Exit(INTERRUPTED)


def _held_out(text: str, n: int) -> int:
    """How many of n rows '0.1' or '50' holds out."""
    if not re.fullmatch(r"\d+|\d*\.\d+", text):
        raise ValueError(f"--held-out {text}: write a share such as '0.1', or a number of rows such as '50'.")
    count = max(1, round(float(text) * n)) if "." in text and float(text) > 0 else int(float(text))
    if count >= n:
        raise ValueError(f"--held-out {text}: of {n} rows none would be left to train on; '0' holds none out.")
    return count


def _training(
    epochs: int | None, steps: int | None, n: int, batch_size: int, learning_rate: float, seed: int
) -> TrainingConfig:
    """The training configuration for n rows."""
    from subspace_lab.engine.training import TrainingConfig

    if epochs is not None and steps is not None:
        raise ValueError(f"--epochs {epochs} and --steps {steps} both set how long to train: give one of them.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"--epochs {epochs}: needed is 1 or more.")
    if steps is None:
        steps = (epochs or EPOCHS) * -(-n // max(1, batch_size))
    return TrainingConfig(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)


def _check_ends(patience: int | None, accumulate: int, held_out: Sequence[Any]) -> None:
    """Check the settings of an early end and of gradients in parts."""
    for option, value in (("--patience", patience), ("--accumulate", accumulate)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: needed is 1 or more.")
    if patience is not None and not held_out:
        raise ValueError(f"--patience {patience} needs held-out rows: give --held-out.")


def _check_memory(memory: str | None, device: str, rows: Examples) -> None:
    """Check that this job can use the memory budget and the device."""
    import torch

    from subspace_lab.engine.budget import budgets

    budgets(memory, torch.device(device))
    if rows.classes is None:
        return
    if memory is not None:
        raise ValueError(f"--memory {memory}: with labels the head is trained too, so that no states are stored.")
    if torch.device(device).index:
        raise ValueError(
            f"--device {device}: with labels Trainer uses the first GPU; choose it by CUDA_VISIBLE_DEVICES."
        )


def _job(
    rows: Examples, split: tuple[list, list], tokenizer: Any, longest: int | None, generating: dict[str, Any]
) -> TrainingJob:
    """The rows, for training and held out, as token ids."""
    if rows.classes is not None:
        from subspace_lab.reft.classification_job import ClassificationJob

        return ClassificationJob(*split, tokenizer, longest=longest)
    from subspace_lab.reft.jobs import GenerationJob

    return GenerationJob(*split, tokenizer, longest=longest, **generating)


def _network(
    source: Source, device: str, dtype: str, rows: Examples, seed: int, pad: int
) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of its modules that are trained and saved with the adapter."""
    if rows.classes is None:
        return load_causal(source, device, dtype), ()
    from subspace_lab.reft.classification_job import heads

    network, fresh = load_classifier(source, device, dtype, rows.classes, seed)
    # A decoder's classification head uses the last token that is not padding; without a pad token it refuses batches.
    text_config = network.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad
    return network, heads(network, fresh)


def _layers(text: str, network: Any, component: str) -> str | list[int]:
    if text == "all":
        return text
    from subspace_lab.model.backbone import Backbone

    return layer_numbers(text, Backbone(network).anatomy.depth(component.rpartition(".")[0]))
