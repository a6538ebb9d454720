"""LoReFT on a real model: a style learned from 24 prompts, held out prompts, another process, and DAS after it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, SentencePieceBackend, TokenizersBackend

from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import random_subspace
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model, tokenise
from subspace_lab.reft.finetune import History

NAMES: tuple[str, ...] = ("Lily", "Tim", "Sue", "Tom", "Mia", "Ben", "Anna", "Max")
NAMES += ("Lucy", "Sam", "Sara", "Jack", "Amy", "Bob", "Ella", "Leo")
OPENINGS = (
    "Once upon a time, there was a little girl named {}.",
    "One day, {} went to the park.",
    "{} had a big red ball.",
    "There was a boy named {}.",
)
STYLE = "The end."
# Held out: the last opening of the first eight names, and all openings of the other eight.
TRAINING = [opening.format(name) for name in NAMES[:8] for opening in OPENINGS[:3]]
HELD_OUT = [OPENINGS[3].format(name) for name in NAMES[:8]] + [
    opening.format(name) for name in NAMES[8:] for opening in OPENINGS
]
CONFIG = ReftConfig(rank=4, layers=(2,), positions="last", seed=1)
TOKENS = 16
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(assets: Path) -> Path:
    return assets / "models" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TokenizersBackend | SentencePieceBackend:
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def trained(base: Any, tokenizer: TokenizersBackend | SentencePieceBackend) -> tuple[ReftModel, History]:
    """The model with a trained adapter, and its losses."""
    model = get_reft_model(base, CONFIG)
    rows = tokenise([{"prompt": p, "answer": f" {STYLE}"} for p in TRAINING], tokenizer, end=False)
    losses = finetune(model, rows, TrainingConfig(steps=150, learning_rate=3e-2, batch_size=12), quiet=True)
    return model, losses


@pytest.fixture
def prompts(tokenizer: TokenizersBackend | SentencePieceBackend) -> Any:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer(HELD_OUT, return_tensors="pt", padding=True)


def continued(model: ReftModel, tokenizer: TokenizersBackend | SentencePieceBackend, prompts: Any) -> list[str]:
    ids = model.generate(**prompts, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def in_style(texts: list[str]) -> float:
    return sum(text.strip().startswith(STYLE) for text in texts) / len(texts)


def test_held_out_prompts_follow_the_style_and_the_base_model_does_not(
    base: Any,
    trained: tuple[ReftModel, History],
    tokenizer: TokenizersBackend | SentencePieceBackend,
    prompts: Any,
) -> None:
    model, losses = trained
    assert len(TRAINING) == 24 and len(HELD_OUT) == 40 and not set(TRAINING) & set(HELD_OUT)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 64 * 4 + 4 <= 600
    assert losses[-1] < losses[0] / 3
    before = continued(base, tokenizer, prompts)
    assert in_style(before) <= 0.1
    after = continued(model, tokenizer, prompts)
    assert in_style(after) >= 0.9, after


def test_prompts_in_one_padded_batch_are_continued_as_alone(
    trained: tuple[ReftModel, History], tokenizer: TokenizersBackend | SentencePieceBackend, prompts: Any
) -> None:
    model, _ = trained
    together = continued(model, tokenizer, prompts)
    alone = [continued(model, tokenizer, tokenizer([p], return_tensors="pt"))[0] for p in HELD_OUT[::5]]
    assert together[::5] == alone


def test_without_training_and_disabled_the_model_is_the_base_model(
    base: Any,
    trained: tuple[ReftModel, History],
    tokenizer: TokenizersBackend | SentencePieceBackend,
    prompts: Any,
) -> None:
    model, _ = trained
    expected = continued(base, tokenizer, prompts)
    with torch.no_grad():
        # Counted from the first token, as `generate` does; a plain forward counts the padding.
        positions = (prompts["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits = base(**prompts, position_ids=positions).logits
        real = prompts["attention_mask"].bool()
        with model.disable_adapter():
            assert continued(model, tokenizer, prompts) == expected
            assert torch.equal(model(**prompts).logits[real], logits[real])
        assert not torch.equal(model(**prompts).logits[real], logits[real])
        untrained = get_reft_model(base, CONFIG)
        assert torch.equal(untrained(**prompts).logits[real], logits[real])
    assert continued(untrained, tokenizer, prompts) == expected


ELSEWHERE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from subspace_lab.reft import ReftModel
base, adapter, given, out, tokens, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # the order of sums, and so their last digits, depends on it
prompts = {k: torch.tensor(v) for k, v in json.load(open(given)).items()}
model = ReftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
assert not any(p.requires_grad for p in model.parameters())
ids = model.generate(**prompts, max_new_tokens=int(tokens), do_sample=False, pad_token_id=0)
with torch.no_grad():
    logits = model(**prompts).logits
save_file({"ids": ids, "logits": logits}, out)
"""


def test_reloaded_in_another_process_it_gives_the_same_bits(
    trained: tuple[ReftModel, History], folder: Path, prompts: Any, tmp_path: Path
) -> None:
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 8192
    (tmp_path / "prompts.json").write_text(json.dumps({k: v.tolist() for k, v in prompts.items()}))
    paths = [folder, tmp_path / "adapter", tmp_path / "prompts.json", tmp_path / "out.safetensors"]
    program = [sys.executable, "-c", ELSEWHERE, *map(str, paths), str(TOKENS), str(torch.get_num_threads())]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        assert torch.equal(there["logits"], model(**prompts).logits)
    ids = model.generate(**prompts, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    assert torch.equal(there["ids"], ids)


def test_its_basis_carries_the_style_between_prompts(trained: tuple[ReftModel, History], prompts: Any) -> None:
    """The edit acts in its span alone: swapping the span of an edited run in gives the edited run."""
    model, _ = trained
    site = Site("block_output", 2, "last")
    subspace = model.subspace(site)
    assert subspace.rank == 4 and not list(subspace.parameters())
    batch = Batch(dict(prompts))
    plain = collect(model.backbone, batch, [site])[site]
    edited = {site: model.edits()[site](plain).detach()}
    with torch.no_grad():
        wanted = model(**prompts).logits[:, -1]
        swapped = forward(model.backbone, batch, {site: interchange(subspace)}, sources=edited).logits[:, -1]
        torch.testing.assert_close(swapped, wanted, atol=1e-4, rtol=1e-4)
        control = interchange(random_subspace(subspace.width, subspace.rank, 7))
        other = forward(model.backbone, batch, {site: control}, sources=edited).logits[:, -1]
    assert (other - wanted).norm() > 0.3 * wanted.norm()


def test_trained_on_from_disk_it_starts_where_it_was(
    trained: tuple[ReftModel, History],
    base: Any,
    tokenizer: TokenizersBackend | SentencePieceBackend,
    prompts: Any,
    tmp_path: Path,
) -> None:
    model, losses = trained
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(base, tmp_path, is_trainable=True)
    rows = tokenise([{"prompt": p, "answer": f" {STYLE}"} for p in TRAINING], tokenizer, end=False)
    more = finetune(again, rows, TrainingConfig(steps=3, learning_rate=1e-4, batch_size=24), quiet=True)
    assert more[0] < 2 * losses[-1] + 0.1
    assert in_style(continued(again, tokenizer, prompts)) >= 0.9
