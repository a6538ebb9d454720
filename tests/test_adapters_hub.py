"""Adapters of pyreft 0.1 and adapters 1.3, read from files that these libraries wrote and computed with."""

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.reft import ReftConfig, ReftModel, from_adapters, from_pyreft, get_reft_model, to_pyreft

HERE = Path(__file__).resolve().parent / "fixtures"
spec = importlib.util.spec_from_file_location("make_foreign", HERE / "make_foreign.py")
assert spec is not None
make_foreign = importlib.util.module_from_spec(spec)
assert spec.loader is not None
spec.loader.exec_module(make_foreign)
CLASSIFIER = transformers.LlamaForSequenceClassification


def base_model(name: str = "LoReFT") -> Any:
    return make_foreign.base_model(CLASSIFIER if name == "head" else transformers.LlamaForCausalLM)


PYREFT = {  # folder: (positions, method here, further options)
    "LoReFT": ("f2+l1", "LoReFT", {}),
    "LoReFT_untied": ("f2+l2", "LoReFT", {}),
    "LoReFT_bf16": ("last", "LoReFT", {}),
    "LoReFT_relu": ("last", "LoReFT", {"activation": "relu"}),
    "LoReFT_path": ("last", "LoReFT", {}),
    "NoReFT": ("last", "NoReFT", {}),
    "NoReFT_bias": ("last", "NoReFT", {}),
    "ConsReFT": ("last", "ConsReFT", {}),
    "LobiReFT": ("last", "LobiReFT", {}),
    "DiReFT": ("last", "DiReFT", {}),
    "DiReFT_orthonormal": ("last", "DiReFT", {}),
    "head": ("f2+l1", "LoReFT", {}),
}
ADAPTERS = {
    "LoReFT": ("f2+l1", "LoReFT", {}),
    "tied": ("f2+l1", "LoReFT", {}),
    "prefix": ("f3", "LoReFT", {}),
    "binary": ("f2+l1", "NoReFT", {"method": "NoReFT"}),
    "NoReFT": ("f2+l1", "NoReFT", {"method": "NoReFT"}),
    "DiReFT": ("f2+l1", "DiReFT", {"method": "DiReFT"}),
    "head": ("f2+l1", "LoReFT", {}),
}


def read(library: str, name: str, base: Any = None) -> ReftModel:
    options: Any
    positions, _, options = (PYREFT if library == "pyreft" else ADAPTERS)[name]
    base = base_model(name) if base is None else base
    if library == "pyreft":
        return from_pyreft(base, HERE / f"pyreft_{name}", positions, **options)
    return from_adapters(base, HERE / f"adapters_{name}", **options)


def logits(model: ReftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


EVERY = [("pyreft", name) for name in PYREFT] + [("adapters", name) for name in ADAPTERS]


@pytest.mark.parametrize(("library", "name"), EVERY)
def test_what_is_read_is_the_same_function(library: str, name: str) -> None:
    positions, method, _ = (PYREFT if library == "pyreft" else ADAPTERS)[name]
    model = read(library, name)
    config = model.adapter("default").config
    assert config.method == method and config.positions == positions and config.rank == make_foreign.RANK
    expected = load_file(HERE / f"{library}_{name}" / "phi.safetensors")
    h = expected.pop("h")
    half = h.dtype == torch.bfloat16
    assert half == (name == "LoReFT_bf16")
    compared = 0
    for site, edit in model.edits().items():
        group = config.groups().index(site.positions)
        for key, phi in expected.items():
            one = key.rpartition("_unit_")[0].removeprefix("layer_").removeprefix("comp_model_layers[")
            here = key.split(".") if library == "adapters" else (one[0], key[-1])
            if [int(x) for x in here] == [site.layer, group]:
                with torch.no_grad():
                    found = edit(h)
                torch.testing.assert_close(found, phi, atol=3e-2 if half else 2e-6, rtol=2e-2 if half else 1e-5)
                assert (found - h).abs().max() > 0.1
                compared += 1
    assert compared == len(model.edits())
    # All parameters are float32, and nothing of size d × d is among them.
    state = model.adapters.state_dict()
    assert all(v.dtype == torch.float32 for v in state.values())
    assert not any(tuple(v.shape) == (make_foreign.WIDTH,) * 2 for v in state.values())
    assert not any(p.requires_grad for p in model.parameters())


WITH_LOGITS = [(lib, n) for lib, n in EVERY if (HERE / f"{lib}_{n}" / "logits.safetensors").exists()]


@pytest.mark.parametrize(("library", "name"), WITH_LOGITS)
def test_a_model_with_what_is_read_gives_the_same_logits(library: str, name: str) -> None:
    base = base_model(name)
    expected = load_file(HERE / f"{library}_{name}" / "logits.safetensors")
    before = logits(base, expected["ids"])
    model = read(library, name, base)
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], atol=5e-5, rtol=1e-4)
    assert (before - expected["logits"]).abs().max() > 0.1
    assert len(WITH_LOGITS) == 3 + len(ADAPTERS)
    saved = set(model.adapter("default").saved)
    assert saved == ({"score"} if name == "head" else set())
    with model.disable_adapter():
        assert torch.equal(logits(model, expected["ids"]), before)


def test_what_is_read_can_be_saved_and_trained(tmp_path: Path) -> None:

    model = from_pyreft(base_model(), HERE / "pyreft_LoReFT", "f2+l1", is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * 2 * 16 + 2)
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(again, make_foreign.IDS), logits(model, make_foreign.IDS))


# --- written for pyreft -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoReFT", "LoReFT_untied", "NoReFT", "ConsReFT", "LobiReFT", "DiReFT", "head"])
def test_pyrefts_layout_is_written_as_pyreft_writes_it(name: str, tmp_path: Path) -> None:
    base = base_model(name)
    model = read("pyreft", name, base)
    to_pyreft(model, tmp_path)
    original = HERE / f"pyreft_{name}"
    beside = {"phi.safetensors", "logits.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in original.iterdir()} - beside
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, original))
    theirs.pop("transformers_version")
    assert mine == theirs
    for path in original.glob("*.bin"):
        here, there = (torch.load(f / path.name, weights_only=True) for f in (tmp_path, original))
        unused = {"proj_layer.bias"}  # of pyreft's NodireftIntervention
        assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items() if k not in unused}
    options: Any
    positions, _, options = PYREFT[name]
    again = from_pyreft(base_model(name), tmp_path, positions, **options)
    for site, edit in again.edits().items():
        h = make_foreign.states()
        with torch.no_grad():
            torch.testing.assert_close(edit(h), model.edits()[site](h), atol=2e-6, rtol=1e-5)
    assert set(again.adapter("default").saved) == set(model.adapter("default").saved)


def test_what_pyreft_has_no_form_for_is_not_written(tmp_path: Path) -> None:
    base = base_model()
    options: Any
    for options, message in (
        ({"method": "RED"}, "cannot hold RED"),
        ({"tied": "position", "positions": "f2+l2"}, "tied='position'"),
        ({"activation": "relu", "start": "paper"}, "activation 'relu'"),
        ({"parts": {"a": 1, "b": 1}}, "parts"),
        ({"component": "query_output"}, "no component 'query_output'"),
    ):
        model = get_reft_model(base, ReftConfig(**{"rank": 2, **options}))
        with pytest.raises(ValueError, match=message):
            to_pyreft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.add_adapter("second", ReftConfig(rank=1, positions="l1"))
    model.set_adapter(["second"])
    to_pyreft(model, tmp_path / "out")
    with model.disable_adapter(), pytest.raises(ValueError, match="0 adapters are active"):
        to_pyreft(model, tmp_path / "out")


# --- refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a folder of the fixtures."""
    return lambda name: Path(shutil.copytree(HERE / name, tmp_path / name))


class Malice:
    """What would run code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_files_that_hold_more_than_tensors_are_refused_and_run_nothing(
    copied: Callable[..., Path], tmp_path: Path
) -> None:
    trap = tmp_path / "ran"
    for library, name, file in (
        ("pyreft", "ConsReFT", "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"),
        ("pyreft", "head", "pytorch_model.bin"),
        ("adapters", "binary", "pytorch_adapter.bin"),
    ):
        folder = copied(f"{library}_{name}")
        positions = PYREFT[name][0] if library == "pyreft" else None

        def reading(
            library: str = library, name: str = name, folder: Path = folder, positions: str | None = positions
        ) -> ReftModel:
            if library == "pyreft":
                assert positions is not None
                return from_pyreft(base_model(name), folder, positions)
            return from_adapters(base_model(name), folder, method="NoReFT")

        assert (folder / file).exists()
        (folder / file).write_bytes(pickle.dumps(Malice(trap), protocol=2))
        with pytest.raises(ValueError, match="not a file of plain tensors"):
            reading()
        torch.save([1, 2], folder / file)
        with pytest.raises(ValueError, match="holds list"):
            reading()
    assert not trap.exists()


def test_folders_of_pyreft_that_cannot_be_read(copied: Callable[..., Path], tmp_path: Path) -> None:
    base = base_model()

    def refused(
        folder: Path, message: str, error: type[Exception] = ValueError, positions: str = "last", **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            from_pyreft(base, folder, positions, **options)
        assert all(p.requires_grad for p in base.parameters())

    refused(tmp_path, "config.json is missing", FileNotFoundError)
    folder = copied("pyreft_LoReFT")
    refused(HERE / "pyreft_LoReFT_untied", "not a prefix and a suffix", positions="all")
    refused(HERE / "pyreft_NoReFT_bias", "add_bias and an activation", activation="relu")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("pyreft.interventions.Loreft", "__main__.Loreft"))
    refused(folder, "interventions of .*__main__.Loreft")
    (folder / "config.json").write_text(text.replace("Loreft", "Subloreft"))
    refused(folder, "SubloreftIntervention")
    (folder / "config.json").write_text(text.replace("0_comp_block_output", "0_comp_head_query"))
    refused(folder, "'layer_0_comp_head_query_unit_pos_nunit_1#0' is not a site")
    (folder / "config.json").write_text(text)
    one = folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    numbers = torch.load(one, weights_only=True)
    torch.save({**numbers, "rotate_layer": 2 * numbers["rotate_layer"]}, one)
    refused(folder, "not orthonormal")
    torch.save({k: v for k, v in numbers.items() if k != "bias"}, one)
    refused(folder, "'bias'")
    one.unlink()
    refused(folder, "nunit_1#0.bin is missing", FileNotFoundError)
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**base.config.to_dict(), "hidden_size": 32}))
    with pytest.raises(ValueError, match="Made for a width of 16; this model has 32"):
        from_pyreft(wide, HERE / "pyreft_LoReFT", "last")
    assert all(p.requires_grad for p in wide.parameters())
    with pytest.raises(ValueError, match=r"no parameters \['score.weight'\]"):
        from_pyreft(base, HERE / "pyreft_head", "last")


def test_folders_of_adapters_that_cannot_be_read(copied: Callable[..., Path], tmp_path: Path) -> None:
    base = base_model()

    def refused(folder: Path, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            from_adapters(base, folder, **options)

    refused(tmp_path, "adapter_config.json is missing", FileNotFoundError)
    refused(HERE / "adapters_NoReFT", "the same files for NoReFT and DiReFT")
    refused(HERE / "adapters_NoReFT", "the same files", method="LoReFT")
    refused(HERE / "adapters_NoReFT", "the same files", method="RED")
    folder = copied("adapters_LoReFT")
    facts = json.loads((folder / "adapter_config.json").read_text())

    def changed(**config: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**facts, "config": {**facts["config"], **config}}))

    changed(architecture="lora")
    refused(folder, "no ReFT adapter of adapters' but 'lora'")
    changed(non_linearity="prelu")
    refused(folder, "'prelu' has no counterpart")
    changed()
    state = load_file(folder / "adapter.safetensors")
    save_file({**state, "lora_A": torch.ones(2)}, folder / "adapter.safetensors")
    refused(folder, "'lora_A' does not belong to a ReFT layer")
    twice = {**state, **{k.replace("model.layers", "encoder.layers"): v.clone() for k, v in state.items()}}
    save_file(twice, folder / "adapter.safetensors")
    refused(folder, r"\['encoder.layers', 'model.layers'\]")
    few = {k: v for k, v in state.items() if ".0.reft_layer" not in k or "units.0" in k}
    save_file(few, folder / "adapter.safetensors")
    refused(folder, r"Interventions at \(layer, group\) \[\(0, 0\), \(1, 0\), \(1, 1\)\]")


def test_an_adapter_of_a_library_goes_on_as_one_of_ours() -> None:
    """Its basis goes to analysis, and it takes a second adapter beside it."""
    model = read("pyreft", "ConsReFT")
    rows = model.subspace(Site("block_output", 1, "last")).basis()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-5, rtol=0)
    model.add_adapter("more", ReftConfig(rank=1, positions="f1"))
    model.set_adapter(["default", "more"])
    assert len(model.edits()) == 3
