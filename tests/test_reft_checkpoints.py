"""Folders that trainers write, read by `from_pretrained` with nothing but the base model; tied modules in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import fresh
from safetensors.torch import load_file, save_file
from test_reft_trainer import answers, classes, classifier, decoder, encoder, numbers, sft, trainer

from subspace_lab.reft import ReftConfig, ReftModel, get_reft_model


def same(one: ReftModel, other: ReftModel, given: dict[str, Any]) -> bool:
    with torch.no_grad():
        return torch.equal(one(**given).logits, other(**given).logits)


def batch(lengths: tuple[int, ...] = (5, 7)) -> dict[Any, Any]:
    ids = torch.arange(3, 3 + max(lengths))[None].repeat(len(lengths), 1)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("folder", ["checkpoint-2", "checkpoint-4", "final"])
def test_every_folder_of_trainer(kind: str, folder: str, tmp_path: Path) -> None:
    made, data = (decoder(start="paper"), answers()) if kind == "decoder" else (encoder(), classes())
    run = trainer(made, tmp_path, data, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    base = fresh("llama") if kind == "decoder" else classifier()
    read = ReftModel.from_pretrained(base, tmp_path / folder).eval()
    made.eval()
    if folder == "checkpoint-2":  # two steps back
        made.load_state_dict(load_file(tmp_path / folder / "model.safetensors"))
    assert read.adapter("default").config == made.adapter("default").config
    assert read.active_adapters == ["default"] and same(read, made, batch())
    with made.disable_adapter():
        assert not same(read, made, batch())
    read.save_pretrained(tmp_path / "kept")
    again = ReftModel.from_pretrained(fresh("llama") if kind == "decoder" else classifier(), tmp_path / "kept")
    assert same(again.eval(), made, batch())


def test_every_folder_of_trls_trainer(tmp_path: Path) -> None:
    made = decoder(start="paper")
    run = sft(made, tmp_path, answers(), max_steps=2, learning_rate=3e-2, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(tmp_path / "final"))
    folders = sorted(p.name for p in tmp_path.iterdir() if (p / "model.safetensors").exists())
    assert "final" in folders and len(folders) > 1
    for folder in folders:
        ReftModel.from_pretrained(fresh("llama"), tmp_path / folder)
    assert same(ReftModel.from_pretrained(fresh("llama"), tmp_path / "final").eval(), made.eval(), batch())


def test_the_adapter_of_a_name_and_under_another_name(tmp_path: Path) -> None:
    made = decoder("f1", start="paper")
    made.add_adapter("late", ReftConfig(rank=2, positions="l1", start="paper", seed=9))
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    for name in ("default", "late"):
        read = ReftModel.from_pretrained(fresh("llama"), tmp_path, name)
        made.set_adapter(name)
        assert read.names == [name] and same(read, made, batch())
    with pytest.raises(ValueError, match=r"holds the adapters \['default', 'late'\]; name one"):
        ReftModel.from_pretrained(fresh("llama"), tmp_path, "third")
    made.delete_adapter("default")
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    read = decoder()
    read.load_adapter(tmp_path, "mine")
    read.set_adapter("mine")
    assert same(read, made, batch())


def test_what_a_checkpoint_does_not_fit_is_refused(tmp_path: Path) -> None:
    made = decoder("f2", start="paper")
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another base model"):
        ReftModel.from_pretrained(fresh("gpt2"), tmp_path)
    other = decoder("l2", start="paper")
    with pytest.raises(ValueError, match=r"another configuration: sites \['block_output\[0\]@f2'"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    decoder("f2", seed=8).load_state_dict(load_file(tmp_path / "model.safetensors"))
    old = {k: v for k, v in made.state_dict().items() if k != "_extra_state"}
    decoder("f2").load_state_dict(old)
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no ReFT adapter"):
        ReftModel.from_pretrained(fresh("llama"), tmp_path)
    save_file({**old, "_extra_state": torch.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the configurations"):
        ReftModel.from_pretrained(fresh("llama"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole file"):
        ReftModel.from_pretrained(fresh("llama"), tmp_path)


def test_a_folder_that_was_saved_into_in_two_ways(tmp_path: Path) -> None:
    made = decoder(start="paper")
    made.save_pretrained(tmp_path)
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    ReftModel.from_pretrained(fresh("llama"), tmp_path)
    with torch.no_grad():
        next(made.adapters.parameters()).add_(0.1)
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="hold different adapters"):
        ReftModel.from_pretrained(fresh("llama"), tmp_path)


def test_a_file_of_torch_is_read_without_unpickling_anything_else(tmp_path: Path) -> None:
    made = decoder(start="paper")
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(ReftModel.from_pretrained(fresh("llama"), tmp_path), made, batch())


# --- tied modules -------------------------------------------------------------------------------------------


def tied(*modules: Any) -> ReftModel:
    base = fresh("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    return get_reft_model(base, ReftConfig(rank=2, positions="f1", modules_to_save=modules))


@pytest.mark.parametrize("name", ["wte", "transformer.wte", "lm_head"])
def test_one_of_two_tied_modules_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no longer tied. Name all of \['transformer.wte', 'lm_head'\]"):
        tied(name)


def test_tied_modules_stay_tied_in_training_and_on_disk(tmp_path: Path) -> None:
    made = tied("wte", "lm_head")
    saved: Any = made.adapter("default").saved
    assert saved["transformer/wte"].weight is saved["lm_head"].weight
    assert (
        made.get_input_embeddings() is saved["transformer/wte"]
        and made.get_output_embeddings() is saved["lm_head"]
    )
    assert saved["lm_head"] is not None
    before = saved["lm_head"].weight.detach().clone()
    run = trainer(made, tmp_path, answers(), max_steps=2)
    run.train()
    assert saved["transformer/wte"].weight is saved["lm_head"].weight
    assert not torch.equal(before, saved["lm_head"].weight)
    run.save_model(str(tmp_path / "final"))
    made.save_pretrained(tmp_path / "adapter")
    for folder in ("final", "adapter"):
        read = ReftModel.from_pretrained(fresh("gpt2"), tmp_path / folder)
        again = read.adapter("default").saved
        assert again["transformer/wte"].weight is again["lm_head"].weight
        assert same(read.eval(), made.eval(), batch())
    expected = fresh("gpt2")
    with torch.no_grad():
        expected.lm_head.weight.copy_(saved["lm_head"].weight)
    made.adapters["default"].edits.requires_grad_(False)
    plain = get_reft_model(expected, ReftConfig(rank=2, positions="f1"))
    plain.adapter("default").edits.load_state_dict(made.adapter("default").edits.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch()).logits, made(**batch()).logits)


def test_numbers_without_their_configuration_do_not_count() -> None:
    assert "_extra_state" in decoder().state_dict() and "_extra_state" not in numbers(decoder())
