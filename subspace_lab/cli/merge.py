"""`subspace-lab merge`: merge an adapter into the weights of its base model."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspace_lab.cli.common import (
    DeviceOption,
    DtypeOption,
    TrustOption,
    check_device,
    check_dtype,
    interruptible,
    refusing,
    threads,
)
from subspace_lab.cli.loading import Source, load_causal, load_classifier, load_tokenizer

if TYPE_CHECKING:
    from subspace_lab.reft.config import ReftConfig
    from subspace_lab.reft.model import ReftModel
else:  # names in annotations have to exist at run time as well, and importing these takes seconds
    ReftConfig = ReftModel = Any

MERGED = "merged_adapter.json"  # beside the merged weights: what is in them
PROBE = 16  # tokens on which the merged model is compared with the edited one


def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder with an adapter, or its name on the Hub.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the merged model.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a folder, a .gguf file, a name on the Hub.", show_default="as the adapter says"
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge an adapter into the weights of its base model, so that any tool for transformers models can serve it.

    The adapter has to edit every token at a projection: `finetune --every-token --positions all --component
    mlp_output`, with --no-bias if the model's projections have no bias. Other adapters are refused, with the reason.

    Writes the model and its tokenizer into --out.
    """
    with interruptible(), refusing(), ExitStack() as stack:
        from subspace_lab.core.files import taken_folder, write_json
        from subspace_lab.core.hub import local_folder
        from subspace_lab.reft.merging import refuse_config
        from subspace_lab.reft.model import ReftModel
        from subspace_lab.reft.storage import read_adapter

        folder = local_folder(adapter, "an adapter")
        config = read_adapter(folder, {}).config
        source = Source(model or _base_of(config, adapter), trust_remote_code)
        for what, taken in (("the adapter's", folder), ("the base model's", Path(source.where))):
            if os.path.exists(taken) and out.resolve() == taken.resolve():
                raise FileExistsError(f"--out {out}: this is {what} own folder; choose a new one.")
        _refuse_twice(Path(source.where), folder)
        into = stack.enter_context(taken_folder(out))
        refuse_config(config)
        device, dtype = check_device(device), check_dtype(dtype)
        tokenizer = load_tokenizer(source)
        network = _network(source, folder, device, dtype, tokenizer)
        with threads(network):
            reft = ReftModel.from_pretrained(network, folder)
            difference = _merged(reft)
        with _aside(into) as provisional:
            network.save_pretrained(provisional)
            tokenizer.save_pretrained(provisional)
            known = {"base": source.where, "method": config.method, "adapter": _digest(folder)}
            write_json(provisional / MERGED, known)
        typer.echo(
            f"{config.method}, rank {config.rank}, {config.component} of layers {_layers(config)}, was merged into the "
            f"weights of {source.where}.\n{difference}\nWritten to {out}; "
            f"{type(network).__name__}.from_pretrained({str(out)!r}) reads it, without this package."
        )


def _refuse_twice(base: Path, adapter: Path) -> None:
    """ValueError if the base is a merged model that holds this adapter already: the edit would act twice."""
    from subspace_lab.core.files import read_json

    known = read_json(base / MERGED) if (base / MERGED).is_file() else {}
    if known.get("adapter") == _digest(adapter):
        raise ValueError(
            f"{base} is {known.get('base')} with this adapter in its weights already; merged again the edit would act "
            "twice."
        )


def _digest(adapter: Path) -> str:
    """Tells one adapter from another."""
    from subspace_lab.reft.storage import WEIGHTS

    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()[:16]


def _base_of(config: ReftConfig, adapter: Path) -> str:
    if config.base_model_name_or_path is None:
        raise ValueError(f"{adapter} does not name its base model: give it with --model.")
    return config.base_model_name_or_path


def _network(source: Source, adapter: Path, device: str, dtype: str, tokenizer: Any) -> Any:
    """The base model: a classifier if the adapter was trained to classify, else a language model."""
    from subspace_lab.core.files import read_json
    from subspace_lab.reft.jobs import pad_token

    results = adapter / "results.json"
    classes = read_json(results).get("classes") if results.is_file() else None
    if not classes:
        return load_causal(source, device, dtype)
    # Its head is random here; the adapter brings the trained one.
    network, _ = load_classifier(source, device, dtype, list(classes.values()), seed=0)
    text_config = network.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = pad_token(tokenizer)
    return network


def _merged(reft: ReftModel) -> str:
    """Merge the adapter, and say how the merged model differs from the edited one on a few tokens."""
    import torch

    embeddings: Any = reft.get_input_embeddings()
    known = min(PROBE, embeddings.weight.shape[0])
    ids = torch.arange(known, device=reft.device)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reft.eval()
    with torch.no_grad(), reft.prompt_lengths("all"):
        edited = reft(**given).logits.float()
        with reft.disable_adapter():
            plain = reft(**given).logits.float()
        found = reft.merge_and_unload()(**given).logits.float()
    moved, apart = (float((one - edited).abs().max()) for one in (plain, found))
    if not moved:
        return f"Caution: on {known} tokens the adapter changes no logit, so the merged model is the base model there."
    return (
        f"On {known} tokens the edit changes logits by up to {moved:.2g}; the logits of the merged and the edited "
        f"model differ by at most {apart:.1e}."
    )


def _layers(config: ReftConfig) -> str:
    return config.layers if isinstance(config.layers, str) else ", ".join(map(str, config.layers))


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A provisional folder. When all its files are written they are moved to `folder`, the configuration last."""
    provisional = folder / f".merged.{os.getpid()}"
    provisional.mkdir()
    try:
        yield provisional
        # safetensors may write files that only their owner can read; a model is served by another user perhaps.
        readable = (provisional / "config.json").stat().st_mode & 0o777
        for path in sorted(provisional.iterdir(), key=lambda path: path.name == "config.json"):
            if path.is_file():
                path.chmod(readable)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(provisional, ignore_errors=True)
