"""Every fenced block of README.md, CONTRIBUTING.md and of some pages of docs/ runs as it is printed.

Other pages have a test file of their own, which names them as its `PAGE`; each page has one or the other.

Python blocks are executed from top to bottom in one namespace, with trainings of `STEPS` steps. What the text
takes from its reader (a model, prompts) is in that namespace from the start: the objects of `yours`. Of bash
blocks the commands of `subspace-lab` are executed, with models and data that stand in for those that have to be
fetched (`STAND_INS`) and with `SMALL` settings added; `.ci/run` executes the others (`ELSEWHERE`).
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from subspace_lab.cli import app
from subspace_lab.das.counterfactuals import counterfactual_dataset
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("searching", "finetuning", "how_it_works")),
)
SHIPPED = Path(str(files("subspace_lab"))) / "assets" / "tiny_decoder"
STEPS = 3
LAYERS = 17  # more than any layer that the text names
# Languages of blocks that are not executed: what a command prints, the map of the house.
SHOWN = ("", "text")
# Commands that `.ci/run` executes. It reads the installing ones from the README, word for word.
ELSEWHERE = (
    r"pip install -c constraints\.txt (-e )?\"?\.(\[\w+\])?\"?",
    "pytest",
    r"python docs/site/build\.py",
    "ruff check .",
    "ruff format .",
    "mypy",
)
# Added to the commands of the README, so that each takes seconds. What stands in for a model has learned nothing.
SMALL = {
    "search": "--layers 1 --positions last --steps 2 --pairs 40 --test-pairs 40",
    "search --model": "--layers 4,12 --steps 2 --pairs 8 --test-pairs 8 --no-twin --allow-failing-model",
    "search --model --data": "--layers 4,12 --steps 2 --no-twin --allow-failing-model",
    "finetune": "--epochs 1",
}
# Names in commands that stand for what has to be fetched → which function below makes what stands in for it.
STAND_INS = {
    "EleutherAI/pythia-410m": "pythia",
    "stories260K": "decoder",
    "style.jsonl": "answers",
    "pairs.jsonl": "pairs",
}


def blocks(page: str) -> list[tuple[str, int, str]]:
    """Language, line number and text of each fenced block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(m[1], text[: m.start()].count("\n") + 2, m[2]) for m in found]


def commands(page: str) -> list[str]:
    lines = [line for language, _, text in blocks(page) if language == "bash" for line in text.splitlines()]
    return [command.strip() for line in lines for command in line.split(" && ") if line.strip()]


# --- what the text calls yours ------------------------------------------------------------------------------


def prices(n: int, seed: int = 0) -> Any:
    return counterfactual_dataset(load_task("price_tagging"), n, split="train", seed=seed)


def deep_decoder() -> Any:
    """The decoder that comes with the package, with layers above that change nothing.

    So that it has every layer that the text names, and still does its task.
    """
    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHIPPED, num_hidden_layers=LAYERS))
    missing, unexpected = model.load_state_dict(shipped.state_dict(), strict=False)
    assert missing and not unexpected
    for layer in model.model.layers[shipped.config.num_hidden_layers :]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model.eval()


def yours() -> dict[str, Any]:
    """The objects that the README's Python blocks take from their reader, by name."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)

    pairs = prices(40)
    prompts = list(pairs["base"][:8])

    def batch(texts: list[str]) -> Any:
        return tokenizer(texts, return_tensors="pt", padding=True)

    return {
        "model": deep_decoder(),
        "tokenizer": tokenizer,
        "base": list(pairs["base"]),
        "source": [text for one in pairs["sources"] for text in one.values()],
        "answer": list(pairs["answer"]),
        "base_answer": list(pairs["base_answer"]),
        "base_inputs": batch(prompts[:4]),
        "source_inputs": batch(prompts[4:]),
        "rows": [
            {"prompt": p, "answer": f" {answer} ."} for p, answer in zip(prompts, prices(8)["answer"], strict=True)
        ],
        "prompt": prompts[0],
    }


# --- what stands in for what has to be fetched --------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stand_ins")
    return {name: str(MAKERS[maker](folder / maker)) for name, maker in STAND_INS.items()}


def pythia(folder: Path) -> Path:
    """Pythia's architecture and depth, and a byte-level tokenizer as is its own, in the words of number_agreement."""
    task = load_task("number_agreement")
    texts = [" is are"] * 50
    for split in ("train", "test"):
        texts += counterfactual_dataset(task, 200, split=split, seed=0)["base"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=24,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def decoder(folder: Path) -> Path:
    """The decoder that comes with the package."""
    return SHIPPED


def answers(path: Path) -> Path:
    """Prompts and answers in the words of that decoder."""
    rows = [{"prompt": p, "answer": " yes ."} for p in prices(16)["base"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.rename(path.with_suffix(".jsonl"))


def pairs(path: Path) -> Path:
    """The row that the page on searching prints, and others like it."""
    printed = [
        text
        for language, _, text in blocks("docs/searching.md")
        if language == "text" and text.startswith('{"base"')
    ]
    rows = [json.loads(line) for line in printed[0].splitlines()]
    for one in counterfactual_dataset(load_task("number_agreement"), 40, split="train", seed=0):
        source, spans = one["sources"]["number"], one["source_spans"]["number"]
        subject = {
            who: text[slice(*place["subject"])]
            for who, text, place in (("base", one["base"], one["base_spans"]), ("source", source, spans))
        }
        row = {name: one[name].strip() for name in ("base", "answer", "base_answer", "entity")}
        rows.append({**row, "source": source, "span": {"subject": subject}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.rename(path.with_suffix(".jsonl"))


MAKERS = {"pythia": pythia, "decoder": decoder, "answers": answers, "pairs": pairs}


def shorten_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every training that is configured from now on end after a few steps."""
    check = TrainingConfig.__post_init__

    def checked_and_shortened(config: TrainingConfig) -> None:
        check(config)
        object.__setattr__(config, "steps", min(config.steps, STEPS))

    monkeypatch.setattr(TrainingConfig, "__post_init__", checked_and_shortened)


# --- the tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shorten_training(monkeypatch)
    space = yours()
    for language, line, text in blocks(page):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, ROOT / page, "exec"), space)


@pytest.mark.parametrize(
    "command", dict.fromkeys(c for page in PAGES for c in commands(page)), ids=lambda c: c[:40]
)
def test_commands_run(
    command: str, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
        return
    monkeypatch.chdir(tmp_path)
    program, *words = (stand_ins.get(word, word) for word in shlex.split(command))
    assert program == "subspace-lab", f"nothing here runs {command!r}; see ELSEWHERE"
    kind = max((key for key in SMALL if set(key.split()) <= set(words)), key=lambda key: len(key.split()))
    done = CliRunner().invoke(app, [*words, *SMALL[kind].split()])
    assert done.exit_code == 0, (done.output, done.exception)
    assert any((tmp_path / words[words.index("--out") + 1]).iterdir())


def test_there_are_blocks_and_every_language_is_known() -> None:
    found = [language for page in PAGES for language, _, _ in blocks(page)]
    assert found.count("python") >= 3 and found.count("bash") >= 4
    assert set(found) <= {"python", "bash", *SHOWN}
    fences = sum((ROOT / page).read_text(encoding="utf-8").count("\n```") for page in PAGES)
    assert fences == 2 * len(found), "a fence is indented, or opened and not closed"


def pages_run_elsewhere() -> set[str]:
    """The pages that another test file names as its `PAGE`, and whose blocks it executes."""
    found = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        named = re.search(r'^PAGE = "(.*)"$', text, re.MULTILINE)
        if named and "exec" in {
            getattr(n.func, "id", "") for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)
        }:
            found.add(named[1])
    return found


def test_every_page_with_python_is_run() -> None:
    """Also one that somebody adds later."""
    pages = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]]
    python = {page for page in pages if "python" in {language for language, _, _ in blocks(page)}}
    assert len(python) >= 6 and python <= {*PAGES, *pages_run_elsewhere()}


def test_nothing_stands_in_for_a_name_that_the_text_does_not_use() -> None:
    python = "\n".join(text for page in PAGES for language, _, text in blocks(page) if language == "python")
    assert {name for name in yours() if not re.search(rf"\b{name}\b", python)} == set()
    words = {word for page in PAGES for command in commands(page) for word in shlex.split(command)}
    assert set(STAND_INS) <= words
