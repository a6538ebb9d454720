"""Adapters on disk: the same bits for every method and dtype, refusals, and saves that are cut short."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import build, fresh, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_lab.reft import METHODS, ReftConfig, ReftModel, get_reft_model, storage

ROOT = Path(__file__).resolve().parents[1]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VARIANTS: dict[str, Any] = {
    **{method: {"method": method} for method in METHODS},
    "fixed": {"basis": "fixed"},
    "parts": {"parts": {"a": 1, "b": 2}},
    "relu": {"activation": "relu", "start": "paper"},
    "untied": {"tied": "group", "positions": "f2+l1", "dropout": 0.1, "layers": (-1, 0)},
}


def stirred(model: ReftModel, seed: int = 0) -> ReftModel:
    """The model with every adapter's parameters moved off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits(model: ReftModel, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ReftModel]:
    """A folder with an adapter for the Llama of the tests, and the model that wrote it."""
    model = stirred(get_reft_model(build("llama"), ReftConfig(rank=3)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reloaded_adapter_gives_the_same_bits(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, given = build("llama", dtype), inputs("llama", lengths=(11, 5, 9))
    model = stirred(get_reft_model(base, ReftConfig(**{"rank": 3, **VARIANTS[variant]})))
    expected = logits(model, given)
    assert expected.dtype == dtype and not torch.equal(expected, logits(base, given))
    assert all(p.dtype == torch.float32 for p in model.adapters.parameters())
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(fresh("llama", dtype), tmp_path)
    assert torch.equal(logits(again, given), expected)
    assert again.adapter("default").config == model.adapter("default").config
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training
    further = ReftModel.from_pretrained(fresh("llama", dtype), tmp_path, is_trainable=True)
    assert further.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


ELSEWHERE = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from subspace_lab.reft import ReftModel
torch.set_num_threads(1)
folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
given, found = load_file(folder / "given.safetensors"), {}
for path in sorted(folder.glob("adapter-*")):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    with torch.no_grad():
        found[path.name] = ReftModel.from_pretrained(base, path)(**given).logits
save_file(found, folder / "found.safetensors")
"""


def test_a_reloaded_adapter_gives_the_same_bits_in_another_process(tmp_path: Path) -> None:
    dtype = "bfloat16"
    given = inputs("llama", lengths=(11, 5, 9))
    build("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))
    save_file(given, tmp_path / "given.safetensors")
    expected = {}
    for variant, options in VARIANTS.items():
        model = stirred(get_reft_model(base, ReftConfig(**{"rank": 3, **options})))
        model.save_pretrained(tmp_path / f"adapter-{variant}")
        expected[f"adapter-{variant}"] = logits(model, given)
    program = [sys.executable, "-c", ELSEWHERE, str(tmp_path), dtype]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_heads_and_several_adapters_are_saved(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(3)
    base = transformers.BertForSequenceClassification(config).eval()
    given = inputs("bert")
    model = get_reft_model(base, ReftConfig(rank=2, positions="first", modules_to_save="classifier"))
    model.add_adapter("other", ReftConfig("RED", positions="last"))
    stirred(model).save_pretrained(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    names = ["README.md", CONFIG, WEIGHTS]
    assert files == sorted([*names, *(f"other/{name}" for name in names)])
    again = ReftModel.from_pretrained(base, tmp_path)
    again.load_adapter(tmp_path / "other", "another")
    assert again.active_adapters == ["default"] and again.names == ["default", "another"]
    assert torch.equal(logits(again, given), logits(model, given))
    for mine, theirs in (("another", "other"), (["default", "another"], ["default", "other"])):
        again.set_adapter(mine)
        model.set_adapter(theirs)
        assert torch.equal(logits(again, given), logits(model, given))


def test_nothing_of_size_d_by_d_is_written_and_the_config_tells_all(saved: tuple[Path, ReftModel]) -> None:
    folder, model = saved
    shapes = {k: tuple(v.shape) for k, v in load_file(folder / WEIGHTS).items()}
    assert sum(torch.Size(s).numel() for s in shapes.values()) == model.get_nb_trainable_parameters()[0]
    written = json.loads((folder / CONFIG).read_text())
    assert written["peft_type"] == "REFT" and written["format"] == 1
    assert written.keys() >= model.adapter("default").config.as_dict().keys()
    card = (folder / "README.md").read_text()
    assert "LoReFT" in card and "LlamaForCausalLM" in card and f"interventions: {3 * 195}" in card


def test_an_adapter_saved_over_another_one_replaces_it(saved: tuple[Path, ReftModel]) -> None:
    folder, _ = saved
    other = stirred(get_reft_model(build("llama"), ReftConfig("DiReFT", rank=2, positions="last")), 1)
    other.save_pretrained(folder)
    again = ReftModel.from_pretrained(build("llama"), folder)
    given = inputs("llama")
    assert torch.equal(logits(again, given), logits(other, given))


def test_an_adapter_is_not_saved_where_it_would_hide_or_replace_something_else(
    saved: tuple[Path, ReftModel], tmp_path: Path
) -> None:
    """transformers takes a folder with an adapter_config.json for an adapter, even if a model is in it."""
    model: Any
    _, model = saved
    model.base_model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="holds a model"):
        model.save_pretrained(tmp_path / "model")
    type(model.base_model).from_pretrained(tmp_path / "model")
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    kept = (tmp_path / "lora" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="holds a LORA adapter"):
        model.save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == kept
    (tmp_path / "lora" / CONFIG).write_text("broken")
    model.save_pretrained(tmp_path / "lora")


# --- refusals -----------------------------------------------------------------------------------------------


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(changes.pop("seed", 1234))
    facts = build("llama").config.to_dict() | changes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts))


def test_adapters_of_other_base_models_are_refused(saved: tuple[Path, ReftModel]) -> None:
    folder, _ = saved
    for base, message in (
        (llama(hidden_size=64), "hidden_size 32, here 64"),
        (llama(num_hidden_layers=2), "num_hidden_layers 3, here 2"),
        (fresh("mistral"), "model_type 'llama', here 'mistral'"),
        (llama(seed=1), r"embeddings are different \(cosine"),
    ):
        with pytest.raises(ValueError, match=message):
            ReftModel.from_pretrained(base, folder)
        assert all(p.requires_grad for p in base.parameters())


def test_a_base_model_may_change_dtype_grow_its_vocabulary_and_train_a_little(
    saved: tuple[Path, ReftModel],
) -> None:
    folder, _ = saved
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.resize_token_embeddings(m.config.vocab_size + 3) and m,
        lambda m: [p.data.mul_(1.02) for p in m.parameters()] and m,
    ):
        ReftModel.from_pretrained(change(fresh("llama")), folder)  # type: ignore[arg-type]


def edited(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in facts.items() if v is not ...}))


def test_folders_that_are_no_adapter_are_refused(saved: tuple[Path, ReftModel], tmp_path: Path) -> None:
    folder, _ = saved
    base = build("llama")

    def refused(error: type[Exception] | tuple[type[Exception], ...], message: str) -> None:
        with pytest.raises(error, match=message):
            ReftModel.from_pretrained(base, folder)

    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{CONFIG} and {WEIGHTS} missing"):
        ReftModel.from_pretrained(base, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a folder nor an adapter on the Hub"):
        ReftModel.from_pretrained(base, tmp_path / "nowhere")
    text, numbers = (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()
    for name in (CONFIG, WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(FileNotFoundError, f"not a whole adapter: {name} missing")
        (folder / name).write_bytes(content)
    edited(folder, rotation="free")
    refused(ValueError, r"Unknown keys \['rotation'\]")
    (folder / CONFIG).write_text(text)
    edited(folder, format=2)
    refused(ValueError, "format 2; this version reads 'REFT', 1")
    (folder / CONFIG).write_text(text)
    edited(folder, peft_type="LORA")
    refused(ValueError, "type 'LORA'")
    (folder / CONFIG).write_text(text)
    edited(folder, positions="last")  # would be another function, and no number tells
    refused(ValueError, "one of them was changed")
    (folder / CONFIG).write_text(text)
    edited(folder, rank=1.5)
    refused((ValueError, TypeError), "rank")
    (folder / CONFIG).write_text(text[: len(text) // 2])
    refused(ValueError, "is not JSON")
    (folder / CONFIG).write_text("[]")
    refused(ValueError, "type None")
    for broken in (b"\xff\xfe\x00", b"[" * 100_000):
        (folder / CONFIG).write_bytes(broken)
        refused(ValueError, f"{CONFIG} is not JSON")
    wrong: Any
    for name, wrong in itertools.product(("base", "alignment"), (3, None, [])):
        (folder / CONFIG).write_text(text)
        edited(folder, **{name: wrong})
        refused(ValueError, f"'{name}' is ")
    (folder / CONFIG).write_text(text)
    edited(folder, base_model_name_or_path="renamed/model")
    ReftModel.from_pretrained(base, folder)
    (folder / WEIGHTS).write_bytes(numbers[: len(numbers) // 2])
    refused(ValueError, "not a whole safetensors file")


def test_numbers_that_do_not_fit_are_refused(saved: tuple[Path, ReftModel]) -> None:
    folder, model = saved
    state = {k.replace("adapters.default.", ""): v.contiguous() for k, v in model.state_dict().items()}
    metadata = {"config": storage.digest(model.adapter("default").config)}
    wrong: dict[str, Any] = {k: v for k, v in state.items() if not k.endswith("bias")}
    base = fresh("llama")
    for tensors, message in ((wrong, "Missing key"), ({**state, "more": torch.ones(2)}, "Unexpected key")):
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            ReftModel.from_pretrained(base, folder)
        assert all(p.requires_grad for p in base.parameters())
        model.save_pretrained(folder)
    save_file(wrong, folder / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match="Missing key"):
        model.load_adapter(folder, "second")
    assert model.names == ["default"]


class Malice:
    """What would run code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_runs_nothing(saved: tuple[Path, ReftModel], tmp_path: Path) -> None:
    folder, _ = saved
    trap = tmp_path / "ran"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Malice(trap)))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ReftModel.from_pretrained(build("llama"), folder)
    assert not trap.exists()
    pickle.loads((folder / WEIGHTS).read_bytes()).close()
    assert trap.exists(), "the trap is none"


# --- saves that are cut short -------------------------------------------------------------------------------


def two_adapters(folder: Path) -> tuple[ReftModel, ReftModel]:
    """(old, new) models of one base whose configurations differ too, the old one saved."""
    base = build("llama")
    old = stirred(get_reft_model(base, ReftConfig(rank=3, positions="last")))
    new = stirred(get_reft_model(base, ReftConfig(rank=3, positions="first")), 1)
    old.save_pretrained(folder)
    return old, new


def interrupted(monkeypatch: pytest.MonkeyPatch, model: ReftModel, folder: Path, step: int) -> bool:
    """Save, with the disk full after so many files; whether it was done."""
    count, replaced = 0, os.replace

    def failing(a: Any, b: Any) -> None:
        nonlocal count
        count += 1
        if count > step:
            raise OSError("no space left")
        replaced(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        try:
            model.save_pretrained(folder)
        except OSError:
            return False
    return True


def test_whichever_step_of_a_save_fails_one_whole_adapter_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs("llama")
    old, new = two_adapters(tmp_path)
    third = stirred(get_reft_model(build("llama"), ReftConfig(rank=2, positions="all")), 2)
    expected = {name: logits(m, given) for name, m in (("old", old), ("new", new), ("third", third))}

    def read() -> str:
        found = logits(ReftModel.from_pretrained(build("llama"), tmp_path), given)
        (name,) = [name for name, e in expected.items() if torch.equal(found, e)]
        return name

    outcomes = []
    for first in range(6):
        for second in range(3):
            old.save_pretrained(tmp_path)
            done = interrupted(monkeypatch, new, tmp_path, first)
            outcomes.append((read(), done))
            interrupted(monkeypatch, third, tmp_path, second)  # nor does a second one, cut short after it
            assert read() in ((outcomes[-1][0], "third") if second else (outcomes[-1][0],))
    assert outcomes[0] == ("old", False) and outcomes[-1] == ("new", True) and ("new", False) in outcomes
    assert [o[0] for o in outcomes] == sorted((o[0] for o in outcomes), reverse=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_a_process_killed_while_it_saves_leaves_one_whole_adapter(tmp_path: Path) -> None:
    """Killed before each thing that a save does in its folder, and at a few moments between."""
    given = inputs("llama")
    old, new = two_adapters(tmp_path)
    expected = [logits(old, given), logits(new, given)]

    def read() -> int:
        found = logits(ReftModel.from_pretrained(build("llama"), tmp_path), given)
        (which,) = [i for i, e in enumerate(expected) if torch.equal(found, e)]
        return which

    outcomes = []
    for step in itertools.count():
        killed = saved_elsewhere(new, tmp_path, step)
        outcomes.append(read())
        if not killed:
            break
        old.save_pretrained(tmp_path)
        assert read() == 0, f"what the kill before step {step} left spoiled the next save"
    assert len(outcomes) > 4 and outcomes[0] == 0 and outcomes[-1] == 1 and outcomes == sorted(outcomes)

    for milliseconds in range(12):
        child = os.fork()
        if not child:
            while True:
                for model in (old, new):
                    model.save_pretrained(tmp_path)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        read()


def saved_elsewhere(model: ReftModel, folder: Path, step: int) -> bool:
    """Save in a process that is killed before it does something in the folder for the `step`-th time, from 0 on.

    False if the save was done before that.
    """
    child = os.fork()
    if not child:
        seen = itertools.count()

        def kill(event: Any, arguments: Any) -> None:
            if any(str(a).startswith(str(folder)) for a in arguments) and next(seen) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        failed = True
        try:
            model.save_pretrained(folder)
            failed = False
        finally:
            os._exit(failed)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed"
    return os.WIFSIGNALED(status)


# --- the Hub ------------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_what_save_writes(
    saved: tuple[Path, ReftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    _, model = saved
    calls: list[tuple[Any, ...]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id: Any, folder_path: Any) -> str:
            calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
            return "https://address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model.push_to_hub("me/adapter", private=True, token="t") == "https://address"
    assert calls == [("token", "t"), ("me/adapter", True, True), ("me/adapter", ["README.md", CONFIG, WEIGHTS])]
