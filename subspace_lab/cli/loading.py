"""Models and tokenizers for the command line, from a folder, a GGUF file or the Hub, checked to be complete.

Loading files from outside can fail in any way; each failure is reported in one sentence. A checkpoint without all of
the model's weights is refused, because the missing ones would be random.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

SHIPPED = "tiny_decoder"
GGUF = ".gguf"
# RoBERTa and similar models count positions from the padding token's index on, so they have fewer positions.
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "mpnet",
    "longformer",
)
POOLER = "pooler"  # may be missing in a checkpoint: models trained without it are published without it


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: a folder, a .gguf file, a name on the Hub, or None for the model in this package.
        trust_remote_code: whether Python code that comes with the model is run.
    """

    name: str | None = None
    trust_remote_code: bool = False

    @property
    def where(self) -> str:
        return str(files("subspace_lab") / "assets" / SHIPPED) if self.name is None else self.name

    @property
    def gguf(self) -> bool:
        return self.where.lower().endswith(GGUF) and os.path.isfile(self.where)

    @property
    def local(self) -> bool:
        return self.gguf or os.path.isdir(self.where)  # unlike Path's, for a name of any length

    def arguments(self) -> dict[str, Any]:
        """The arguments for `from_pretrained`; a folder is read without contacting the Hub."""
        path = Path(self.where)
        found: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent) if self.gguf else self.where}
        if self.gguf:
            found["gguf_file"] = path.name
        # Without this argument transformers would ask on standard input, and wait.
        return {**found, "local_files_only": self.local, "trust_remote_code": self.trust_remote_code}


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    with _loading(source, "the tokenizer of this folder"):
        return AutoTokenizer.from_pretrained(**source.arguments())


def longest_text(source: Source, tokenizer: Any) -> int | None:
    """How many tokens a model accepts, according to its tokenizer and its configuration; None if neither says."""
    from transformers import AutoConfig

    with _loading(source):
        config = AutoConfig.from_pretrained(**source.arguments()).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.model_type in FROM_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    limits = (tokenizer.model_max_length, positions)
    # A tokenizer without a known limit gives 10³⁰.
    return min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)


def load_causal(source: Source, device: str, dtype: str) -> Any:
    """A causal language model whose weights are all in the checkpoint."""
    from transformers import AutoModelForCausalLM

    with _loading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_weights(source, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    network, report = loaded
    _check_whole(source, network, report, report["missing_keys"])
    return _ready(source, network, device)


def load_classifier(
    source: Source, device: str, dtype: str, classes: Sequence[str], seed: int
) -> tuple[Any, list[str]]:
    """A classifier of texts into these classes, and the paths of its modules that are not in the checkpoint.

    These modules (its head, and a pooler) are random, but always the same for one seed.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    with _loading(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, report = AutoModelForSequenceClassification.from_pretrained(
            **_weights(source, dtype),
            id2label=dict(enumerate(classes)),
            label2id={label: i for i, label in enumerate(classes)},
            problem_type="single_label_classification",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    trunk = f"{network.base_model_prefix}."
    needed = [key for key in report["missing_keys"] if key.startswith(trunk) and POOLER not in key]
    _check_whole(source, network, report, needed)
    fresh = dict.fromkeys(key.rpartition(".")[0] for key in sorted(report["missing_keys"]))
    return _ready(source, network, device), list(fresh)


def _weights(source: Source, dtype: str) -> dict[str, Any]:
    # The tensors of a GGUF file are unpacked to float32.
    return {**source.arguments(), "dtype": "float32" if source.gguf and dtype == "auto" else dtype}


def _ready(source: Source, network: Any, device: str) -> Any:
    if source.gguf:
        network = _plain(network)
        network.config._name_or_path = source.where
    return network.to(device).eval()


def _plain(network: Any) -> Any:
    """The same model without the mark of being quantised, which unpacked weights still have.

    A model with this mark can neither be saved nor copied as a randomly initialised twin.
    """
    import torch

    config = copy.deepcopy(network.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        plain = type(network)._from_config(config, dtype=network.dtype)
    plain.load_state_dict(network.state_dict())
    plain.tie_weights()
    if hasattr(network, "generation_config"):  # a classifier has none
        plain.generation_config = network.generation_config
    return plain


def _check_whole(source: Source, network: Any, report: Mapping[str, Any], needed: Iterable[str]) -> None:
    """ValueError, with the modules' names, if weights are missing, have another shape, or belong to missing layers."""
    kind = type(network).__name__
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"--model {source.where}: its weights and its configuration do not fit: {name} is "
            f"{'×'.join(map(str, found))} in the checkpoint, {'×'.join(map(str, wanted))} in a {kind} of this "
            f"configuration{_others(len(mismatched) - 1)}."
        )
    if lost := _modules(needed):
        raise ValueError(
            f"--model {source.where}: the checkpoint holds no weights of {_listed(lost)}: it is not one of a {kind} "
            "with this configuration, and the missing weights would be random."
        )
    unused = _unbuilt(network, report["unexpected_keys"])
    if len(unused) > (getattr(network.config.get_text_config(), "num_nextn_predict_layers", None) or 0):
        raise ValueError(
            f"--model {source.where}: the checkpoint holds {_listed(unused)}, which a {kind} with this configuration "
            "does not have: the configuration names fewer layers."
        )


def _unbuilt(network: Any, keys: Iterable[str]) -> list[str]:
    """Layers that only the checkpoint has, although the model has layers whose names differ only in the number."""
    have = {name for name, _ in network.named_modules()}
    beside = {name.rpartition(".")[0] for name in have if name.rpartition(".")[2].isdecimal()}
    found = (match[1] for key in keys if (match := re.match(r"(.+?\.\d+)\.", key)))
    return sorted(
        {path for path in found if path.rpartition(".")[0] in beside and path not in have}, key=_by_number
    )


def _modules(keys: Iterable[str]) -> list[str]:
    """The modules of some weights; a layer that is missing completely counts as one module."""
    paths = {match[1] if (match := re.match(r"(.+?\.\d+)\.", key)) else key.rpartition(".")[0] for key in keys}
    return sorted(paths, key=_by_number)


def _by_number(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + _others(len(names) - 3)


def _others(n: int) -> str:
    return f" and {n} more" if n > 0 else ""


@contextmanager
def _loading(source: Source, part: str = "the content of this folder") -> Iterator[None]:
    """Any exception inside the block becomes a ValueError with one sentence; transformers prints nothing."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from transformers.utils import logging

    _check_place(source)
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # for the loading of weights; our own bars follow
    logging.set_verbosity_error()  # no warnings about missing weights, which raise an error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd sizes, which raise an error a moment later
            yield
    except Exception as error:  # files from outside: anything can be wrong with them
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"--model {source.where}: it comes with its own Python code, which is only run with "
                "--trust-remote-code; read that code first."
            ) from None
        why = _reason(error)
        if source.local:
            what = "this file" if source.gguf else part
            raise ValueError(f"--model {source.where}: {what} could not be loaded. {why}") from None
        offline = " (offline: HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
        raise ValueError(
            f"--model {source.where}: there is no such folder, and it could not be loaded from the Hub{offline}. {why}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_place(source: Source) -> None:
    where = source.where
    if source.gguf:
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"--model {where}: to read it, install the extra: pip install 'subspace-lab[gguf]'.")
    elif os.path.isfile(where):
        raise ValueError(
            f"--model {where}: this is a file; possible are a folder, a {GGUF} file, a name on the Hub."
        )
    elif not source.local and (len(where) > 96 or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", where)):
        shown = where if len(where) <= 96 else f"{where[:96]}…"
        raise ValueError(f"--model {shown}: there is no such folder, and no model on the Hub has such a name.")
    elif source.local and not (Path(where) / "config.json").is_file():
        raise ValueError(
            f"--model {where}: this folder contains no model; a model has a config.json, weights, a tokenizer."
        )


def _reason(error: Exception) -> str:
    """The first line with text of an exception; with its type, if the text alone may not be clear."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if line.endswith(":"):  # what follows is a list
        line = " ".join(str(error).split())
    clear = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if clear else f"{type(error).__name__}{f': {line}' if line else '.'}"
