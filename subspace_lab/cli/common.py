"""What the commands share: loading a model, saying what cannot be done, leaving nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

SHIPPED = "tiny_decoder"
SMALL = 10_000_000  # parameters of a model that one thread runs fastest
DTYPES = ("float32", "bfloat16", "float16")
# RoBERTa and models like it count positions from the padding token's index on, and have as many fewer.
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "mpnet",
    "longformer",
)


@contextmanager
def refusing(spelled: Mapping[str, str] | None = None) -> Iterator[None]:
    """Say what cannot be done in one line, and exit with 2.

    Args:
        spelled: {what the library calls something: what the terminal calls it}.
    """
    try:
        yield
    except (ValueError, IndexError, KeyError, OSError, FloatingPointError) as error:
        # The text of a KeyError is the repr of its message.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        line = " ".join(str(text).split())
        for inside, here in (spelled or {}).items():
            line = line.replace(inside, here)
        typer.echo(f"subspace-lab: {line}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def nothing_left_behind(out: Path) -> Iterator[None]:
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
def threads(network: Any) -> Iterator[None]:
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


def check_device(device: str | None) -> str:
    """The device asked for, a GPU by default where there is one."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def check_dtype(dtype: str | None) -> str:
    """The dtype asked for, as transformers takes it; by default the checkpoint's."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: possible are {', '.join(DTYPES)}.")
    return dtype or "auto"


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a model; a folder is read without asking the Hub."""
    from transformers import AutoTokenizer

    with _loading(name) as (where, local):
        return AutoTokenizer.from_pretrained(where, local_files_only=local)


def longest_text(name: str | None, tokenizer: Any) -> int | None:
    """How many tokens a model takes, as its tokenizer and its configuration say; None where neither does."""
    from transformers import AutoConfig

    with _loading(name) as (where, local):
        config = AutoConfig.from_pretrained(where, local_files_only=local).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.model_type in FROM_PADDING:
        positions -= config.pad_token_id + 1
    said = (tokenizer.model_max_length, positions)
    # A tokenizer that does not know says 10³⁰.
    return min((n for n in said if isinstance(n, int) and 0 < n < 10**9), default=None)


def load_causal(name: str | None, device: str, dtype: str) -> Any:
    """A causal language model."""
    from transformers import AutoModelForCausalLM

    with _loading(name) as (where, local):
        network: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=local)
        return network.to(device).eval()


def load_classifier(
    name: str | None, device: str, dtype: str, classes: Sequence[str], seed: int
) -> tuple[Any, list[str]]:
    """A classifier of texts into these classes, and the paths of its modules that the checkpoint did not hold.

    Those are drawn at random, always the same ones for one seed.
    """
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of a head without weights, which is told to the caller instead
    try:
        with _loading(name) as (where, local), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, told = AutoModelForSequenceClassification.from_pretrained(
                where,
                dtype=dtype,
                local_files_only=local,
                id2label=dict(enumerate(classes)),
                label2id={label: i for i, label in enumerate(classes)},
                problem_type="single_label_classification",
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    fresh = dict.fromkeys(key.rpartition(".")[0] for key in sorted(told["missing_keys"]))
    return network.to(device).eval(), list(fresh)


@contextmanager
def _loading(name: str | None) -> Iterator[tuple[str, bool]]:
    """Where a model is and whether that is a folder; what cannot be loaded is said as a ValueError."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers.utils import logging

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
        yield where, local
    except (OSError, ValueError, RuntimeError) as error:
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


def layer_numbers(text: str, depth: int) -> list[int]:
    """The layers that 'all', '0,2' or '1-3' names in a model of this depth."""
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
