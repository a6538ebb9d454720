"""The terminal: what a finetuning leaves, that it is what was trained, and how bad input is answered."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from test_cli import SHIPPED
from test_reft_data import WORDS, make_tokenizer
from test_reft_stories import NAMES, OPENINGS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from subspace_lab.cli import app
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model, jobs, tokenise
from subspace_lab.reft.classification_job import ClassificationJob
from subspace_lab.reft.datafiles import read_examples

FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "results.json", "loss.png"}
TINY = ["--steps", "3", "--samples", "1", "--max-new-tokens", "3"]
ANSWERS = [  # in words that the shipped model has
    {"prompt": f"a fair price is from {n} to {n + 9} dollars .", "answer": f" this one costs {n + 3} dollars ."}
    for n in range(20, 36)
]
STYLE = [{"prompt": o.format(n), "answer": f" {n} was happy. The end."} for n in NAMES for o in OPENINGS]


def finetuned(*options: object) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, options)])


def written(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(one: dict[str, Any], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that the command trained, as they were when it was done with them."""
    kept: Any = []
    for job in (jobs.GenerationJob, ClassificationJob):
        measure = job.measure
        monkeypatch.setattr(
            job, "measure", lambda self, model, n, measure=measure: kept.append(model) or measure(self, model, n)
        )
    return kept


# --- answers, on a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(assets: Path) -> Path:
    return assets / "models" / "stories260K"


@pytest.fixture(scope="module")
def done(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result, dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("finetune")
    data = written(folder / "rows.jsonl", STYLE)
    out = folder / "nested" / "adapter"
    options = [
        "--epochs",
        "15",
        "--batch-size",
        "6",
        "--learning-rate",
        "0.02",
        "--no-end",
        "--max-new-tokens",
        "8",
        "--seed",
        "1",
    ]
    result = finetuned(
        "--model", stories, "--data", data, *options, "--held-out", "8", "--samples", "3", "--out", out
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    return data, out, result, results_of(out)


def test_all_files_are_written_and_nothing_else(done: tuple[Path, Path, Result, dict[Any, Any]]) -> None:
    _, out, result, _ = done
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    assert all(name in result.stdout for name in FILES - {"README.md"})


def test_results_tell_the_run(done: tuple[Path, Path, Result, dict[Any, Any]], stories: Path) -> None:
    _, out, result, results = done
    assert set(results) == {"settings", "parameters", "rows", "losses", "held_out", "classes", "samples"}
    steps = 15 * -(-(len(STYLE) - 8) // 6)
    assert results["settings"]["steps"] == len(results["losses"]) == steps
    assert results["rows"] == {"training": len(STYLE) - 8, "held_out": 8, "shortened": 0, "repeated": 0}
    expected = {"model": str(stories), "method": "LoReFT", "positions": "f3+l3", "rank": 4, "layers": "all"}
    assert {name: results["settings"][name] for name in expected} == expected
    assert (
        results["parameters"]["trained"] == sum(t.numel() for t in numbers(out).values()) == 5 * (2 * 64 * 4 + 4)
    )
    for sample in results["samples"]:
        assert all(set(sample[name].split()) <= set(result.stdout.split()) for name in ("before", "after"))
    assert "━" not in result.stdout and f"{steps}/" in result.stderr


def test_it_learns_what_is_held_out(done: tuple[Path, Path, Result, dict[Any, Any]]) -> None:
    _, _, _, results = done
    loss = results["held_out"]["loss"]
    assert loss["after"] < 0.1 * loss["before"]
    assert results["losses"][-1] < 0.1 * results["losses"][0]
    assert all("was happy. The" in sample["after"] for sample in results["samples"])
    assert not any("was happy. The" in sample["before"] for sample in results["samples"])


def test_samples_are_what_base_model_and_reloaded_adapter_generate(
    done: tuple[Path, Path, Result, dict[Any, Any]], stories: Path
) -> None:
    _, out, _, results = done
    base = AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    plain = [continued(base, tokenizer, sample["prompt"]) for sample in results["samples"]]
    assert [sample["before"] for sample in results["samples"]] == plain
    model = ReftModel.from_pretrained(base, out)
    edited = [continued(model, tokenizer, sample["prompt"]) for sample in results["samples"]]
    assert [sample["after"] for sample in results["samples"]] == edited != plain


def continued(
    model: ReftModel, tokenizer: transformers.TokenizersBackend | transformers.SentencePieceBackend, prompt: Any
) -> str | list[str]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def test_held_out_losses_are_means_over_all_answer_tokens(
    done: tuple[Path, Path, Result, dict[Any, Any]], stories: Path
) -> None:
    """By hand: one row at a time, the log-probability of each token of its answer."""
    data, out, _, results = done
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = ReftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories).eval(), out)
    kept, held = read_examples(data).split(8, 1)
    assert len(kept) == len(STYLE) - 8 and not [row for row in held if row in kept]
    total, count = torch.zeros(()), 0
    for row in tokenise(held, tokenizer, end=False):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            scores = model(ids, prompt_lengths=(labels == -100).sum(1)).logits[0, :-1].log_softmax(-1)
        answer = labels[0, 1:] != -100
        total -= scores[answer, ids[0, 1:][answer]].sum()
        count += int(answer.sum())
    assert results["held_out"]["loss"]["after"] == pytest.approx(float(total / count), rel=1e-4)


# --- answers, on the shipped model --------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl", ANSWERS)


def test_what_is_written_is_what_was_trained(rows: Path, tmp_path: Path, keeping: list[Any]) -> None:
    """Bit for bit, and it is what the library trains on the same rows."""
    out = tmp_path / "out"
    assert finetuned("--data", rows, *TINY, "--layers", "1-2", "--seed", "5", "--out", out).exit_code == 0
    before, after = keeping
    assert before is after
    reloaded = ReftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), out)
    ids = torch.tensor([[5, 9, 4, 7, 3, 8, 6, 11]])
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, after(ids).logits)
        assert not torch.equal(reloaded(ids).logits, reloaded.base_model(ids).logits)
    alone = get_reft_model(AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), ReftConfig(layers=(1, 2), seed=5))
    kept, _ = read_examples(rows).split(2, 5)
    config = TrainingConfig(steps=3, batch_size=16, learning_rate=4e-3, seed=5)
    losses = finetune(alone, tokenise(kept, AutoTokenizer.from_pretrained(SHIPPED)), config, quiet=True)
    assert equal({k: v.detach() for k, v in alone.adapter("default").state_dict().items()}, numbers(out))
    assert losses == results_of(out)["losses"]


def test_a_result_is_a_function_of_its_settings(rows: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        assert finetuned("--data", rows, *TINY, "--seed", seed, "--out", tmp_path / name).exit_code == 0
        found[name] = numbers(tmp_path / name), results_of(tmp_path / name)
    assert equal(found["one"][0], found["again"][0]) and not equal(found["one"][0], found["other"][0])
    found["again"][1]["settings"]["out"] = found["one"][1]["settings"]["out"]
    assert found["one"][1] == found["again"][1]


def test_a_model_in_half_precision(rows: Path, tmp_path: Path, keeping: list[Any]) -> None:
    """The model computes in it; the edits stay in float32, and bits come back."""
    out = tmp_path / "out"
    assert finetuned("--data", rows, *TINY, "--dtype", "bfloat16", "--out", out).exit_code == 0
    assert results_of(out)["settings"]["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in numbers(out).values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16).eval()
    ids = torch.tensor([[5, 9, 4, 7, 3, 8, 6, 11]])
    with torch.no_grad():
        logits = ReftModel.from_pretrained(base, out)(ids).logits
        assert logits.dtype == torch.bfloat16 and torch.equal(logits, keeping[-1](ids).logits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_held_out_loss_that_is_no_number_is_said(
    when: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is there all the same."""
    measure, calls = jobs.over, []

    def broken(model: Any, *args: Any) -> tuple[float | None, list[Tensor]]:
        calls.append(1)
        if len(calls) == (1 if when == "before" else 2):
            torch.nn.init.constant_(model.base_model.lm_head.weight, torch.nan)
        return measure(model, *args)

    monkeypatch.setattr(jobs, "over", broken)
    result = finetuned("--data", rows, *TINY, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "held-out examples is nan" in result.stderr, result.stderr
    assert (tmp_path / "out").exists() == (when == "after")
    if when == "after":
        assert str(tmp_path / "out") in result.stderr and numbers(tmp_path / "out")


@pytest.mark.parametrize("method", ["NoReFT", "direft", "ConsReFT", "LobiReFT", "RED"])
def test_other_methods(method: str, rows: Path, tmp_path: Path) -> None:
    result = finetuned("--data", rows, *TINY, "--method", method, "--positions", "last", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    results = results_of(tmp_path / "out")
    assert told["method"].lower() == method.lower() == results["settings"]["method"].lower()
    # Some methods do not start as the identity; what stands before the training is the base model all the same.
    base = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    _, held = read_examples(rows).split(2, 0)
    encoded = tokenise(held, AutoTokenizer.from_pretrained(SHIPPED)).with_format("torch")
    with torch.no_grad():
        losses = [float(base(row["input_ids"][None], labels=row["labels"][None]).loss) for row in encoded]
    assert results["held_out"]["loss"]["before"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_no_row_held_out(rows: Path, tmp_path: Path) -> None:
    result = finetuned("--data", rows, *TINY, "--held-out", "0", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    results = results_of(tmp_path / "out")
    assert results["rows"]["training"] == len(ANSWERS) and results["held_out"]["loss"] == dict(
        before=None, after=None
    )
    assert results["samples"][0]["prompt"] == ANSWERS[0]["prompt"] and "No held-out loss" in result.stdout


def test_conversations_and_short_prompts_and_a_tokenizer_without_pad_token(tmp_path: Path) -> None:
    """One word is a prompt, shorter than f3+l3; what batches are filled up with does not matter."""
    trained = {}
    for pad in ("<pad>", None):
        model = local_model(tmp_path / f"model {pad}", transformers.LlamaForCausalLM, pad=pad)
        rows = [("say", "hi"), ("say now please", "now"), ("hi", "please now hi"), ("hi please", "say")] * 2
        talks = [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in rows
        ]
        kinds = {"talk": talks, "plain": [{"prompt": p, "answer": a} for p, a in rows]}
        for kind, data in kinds.items():
            out = tmp_path / f"{kind} {pad}"
            path = written(tmp_path / f"{kind}.jsonl", data)
            result = finetuned("--model", model, "--data", path, *TINY, "--batch-size", 4, "--out", out)
            assert result.exit_code == 0, (result.stderr, result.exception)
            trained[kind, pad] = numbers(out)
    for kind in ("talk", "plain"):
        assert equal(trained[kind, "<pad>"], trained[kind, None])
    assert not equal(trained["talk", None], trained["plain", None])


def local_model(
    folder: Path,
    kind: type[Any],
    pad: str | None = "<pad>",
    **options: Any,
) -> Path:
    """A tiny random model with a tokenizer of words, in a folder."""
    torch.manual_seed(7)
    common: dict[str, Any] = dict(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, **options,
    )  # fmt: skip
    if kind is not transformers.LlamaForCausalLM:
        common |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kind(kind.config_class(**common)).save_pretrained(folder)
    make_tokenizer(pad).save_pretrained(folder)
    return folder


def test_long_rows_lose_their_end_and_that_is_said(tmp_path: Path) -> None:
    model = local_model(tmp_path / "model", transformers.LlamaForCausalLM)
    data = written(tmp_path / "rows.jsonl", [{"prompt": "say hi", "answer": " now" * n} for n in (3, 40, 2, 50)])
    result = finetuned("--model", model, "--data", data, *TINY, "--held-out", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert results_of(tmp_path / "out")["rows"]["shortened"] == 2 and "2 rows were longer" in result.stdout


def test_an_interrupt_saves_what_was_trained(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step
    made: list[int] = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    out = tmp_path / "out"
    result = finetuned("--data", rows, *TINY, "--out", out)
    assert result.exit_code == 0 and "2 of 3 steps" in result.stderr and "2 of 3 steps" in result.stdout
    assert len(results_of(out)["losses"]) == 2 and {path.name for path in out.iterdir()} == FILES
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    untrained = get_reft_model(base, ReftModel.from_pretrained(base, out).adapter("default").config)
    assert not equal(untrained.adapter("default").state_dict(), numbers(out))
    made[:] = [1, 1]  # now before the first step has ended
    nothing = finetuned("--data", rows, *TINY, "--out", tmp_path / "nothing")
    assert nothing.exit_code != 0 and not (tmp_path / "nothing").exists()


def test_an_early_end_keeps_the_best_and_says_so(rows: Path, tmp_path: Path) -> None:
    """It is the library's, with the held-out rows; gradients in parts give the same step."""
    options = ["--steps", "60", "--samples", "0", "--batch-size", "4", "--learning-rate", "0.5", "--seed", "5"]
    options += ["--patience", "1", "--accumulate", "2", "--layers", "1"]
    result = finetuned("--data", rows, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    kept, held = (
        tokenise(part, AutoTokenizer.from_pretrained(SHIPPED)) for part in read_examples(rows).split(2, 5)
    )
    alone = get_reft_model(AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), ReftConfig(layers=(1,), seed=5))
    config = TrainingConfig(steps=60, batch_size=4, learning_rate=0.5, seed=5)
    history = finetune(alone, kept, config, held_out=held, patience=1, accumulate=2, quiet=True)
    assert len(history) < 60, "the test needs a training that ends early"
    assert equal(
        {k: v.detach() for k, v in alone.adapter("default").state_dict().items()}, numbers(tmp_path / "out")
    )
    assert f"that of step {history.kept} of {len(history)}" in " ".join(result.stdout.split())
    assert results_of(tmp_path / "out")["losses"] == history and "Interrupted" not in result.stdout


def test_suggested_settings_are_those_that_are_trained(rows: Path, tmp_path: Path) -> None:
    result = finetuned("--data", rows, *TINY, "--suggest", "--rank", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    settings = results_of(tmp_path / "out")["settings"]
    (chosen,) = [one for one in settings["suggestion"] if one["chosen"]]
    written_config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("positions", "rank", "component", "every_token", "bias", "layers"):
        assert written_config[name] == chosen["config"][name] == settings[name], name
    assert settings["learning_rate"] == chosen["learning_rate"]
    assert len(settings["suggestion"]) >= 8 and "the model without edits" in result.stdout
    assert chosen["setting"] in " ".join(result.stdout.split())
    tokens = AutoTokenizer.from_pretrained(SHIPPED)
    alone = get_reft_model(
        AutoModelForCausalLM.from_pretrained(SHIPPED).eval(), ReftConfig.from_dict(chosen["config"])
    )
    config = TrainingConfig(steps=3, batch_size=16, learning_rate=chosen["learning_rate"])
    finetune(alone, tokenise(read_examples(rows).split(2, 0)[0], tokens), config, quiet=True)
    assert equal(
        {k: v.detach() for k, v in alone.adapter("default").state_dict().items()}, numbers(tmp_path / "out")
    )


# --- classes ------------------------------------------------------------------------------------------------

# The deciding word stands first, where BERT pools, and last, where a decoder's head looks.
POLITE = [bool(i % 4) for i in range(32)]
TEXTS = [
    {
        "text": " ".join([word, *[["say", "hi", "no", "yes"][i // 4**place % 4] for place in range(3)], word]),
        "label": "polite" if polite else "blunt",
    }
    for i, polite in enumerate(POLITE)
    for word in ["please" if polite else "now"]
]


@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.LlamaForCausalLM])
def test_classes_of_texts(
    kind: type[Any],
    tmp_path: Path,
    keeping: list[Any],
) -> None:
    """The head is trained and saved; with it all that the checkpoint did not hold, so that bits come back."""
    model = local_model(tmp_path / "model", kind, pad="<pad>" if kind is transformers.BertForMaskedLM else None)
    data = written(tmp_path / "rows.jsonl", TEXTS)
    options: list[object] = ["--positions", "all", "--steps", "60", "--learning-rate", "0.03", "--held-out", "8"]
    options += ["--model", model, "--data", data, "--batch-size", "8"]
    out = tmp_path / "out"
    result = finetuned(*options, "--out", out)
    assert result.exit_code == 0, (result.stderr, result.exception)
    results = results_of(out)
    assert results["classes"] == {"0": "blunt", "1": "polite"} and results["samples"] == []
    told = results["held_out"]
    _, held = read_examples(data).split(8, 0)
    assert told["constant"] == sum(row["label"] == 1 for row in held) / 8 < 1
    assert told["accuracy"]["after"]["value"] == 1 > told["constant"]
    assert told["loss"]["after"] < 0.3 * told["loss"]["before"]
    assert "always the most frequent class" in result.stdout and f"{told['constant']:.2f}" in result.stdout

    saved = {name.split(".")[1] for name in numbers(out) if name.startswith("saved.")}
    assert saved == ({"classifier", "bert/pooler/dense"} if kind is transformers.BertForMaskedLM else {"score"})
    torch.manual_seed(99)  # another head, and another pooler
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).eval()
    reloaded, trained = ReftModel.from_pretrained(base, out), keeping[-1]
    ids = torch.tensor([[4, 5, 6, 4]])
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trained(ids).logits)
        with trained.disable_adapter():
            assert not torch.allclose(reloaded(ids).logits, trained(ids).logits)
    assert finetuned(*options, "--out", tmp_path / "again").exit_code == 0
    assert equal(numbers(tmp_path / "again"), numbers(out))


def test_classes_end_early_too(tmp_path: Path) -> None:
    """The adapter and the head are those of the epoch with the lowest held-out loss, bit for bit."""
    model = local_model(tmp_path / "model", transformers.BertForMaskedLM)
    data = written(tmp_path / "rows.jsonl", TEXTS)
    options = ["--model", model, "--data", data, "--held-out", "8", "--batch-size", "8", "--accumulate", "2"]
    options += ["--learning-rate", "0.3", "--steps", "60"]
    result = finetuned(*options, "--patience", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    told = " ".join(result.stdout.split())
    found = re.search(r"that of step (\d+) of (\d+)", told)
    assert found is not None
    kept, made = map(int, found.groups())
    results = results_of(tmp_path / "out")
    assert 0 < kept < made == len(results["losses"]) < 60
    whole = finetuned(*options, "--out", tmp_path / "whole")
    assert whole.exit_code == 0 and results_of(tmp_path / "whole")["losses"][:made] == results["losses"]


def test_a_training_that_shows_nothing_says_so(tmp_path: Path) -> None:
    model = local_model(tmp_path / "model", transformers.BertForMaskedLM)
    data = written(tmp_path / "rows.jsonl", TEXTS)
    result = finetuned(
        "--model", model, "--data", data, "--steps", 1, "--learning-rate", 1e-9, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0 and "not above the constant answer" in result.stdout


def test_positions_that_are_counted_from_the_padding_token(tmp_path: Path) -> None:
    """RoBERTa with 24 positions and padding token 1 takes 22 tokens; its tokenizer here states no length."""
    model = local_model(tmp_path / "model", transformers.RobertaForMaskedLM, pad_token_id=1)
    data = written(tmp_path / "rows.jsonl", [{"text": "say " * n, "label": n % 2} for n in (3, 22, 23, 60)])
    options = ["--model", model, "--data", data, "--steps", 1, "--held-out", "0"]
    result = finetuned(*options, "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert results_of(tmp_path / "out")["rows"]["shortened"] == 2


def test_long_texts_keep_their_last_special_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_bos_token = tokenizer.add_eos_token = True  # type: ignore[misc]
    job = ClassificationJob(
        [{"text": "say " * 40, "label": 0}, {"text": "hi", "label": 1}], [], tokenizer, longest=10
    )
    assert job.shortened == 1 and len(job.training[0]["input_ids"]) == 10
    short = ClassificationJob([{"text": "say", "label": 0}], [], tokenizer, longest=10).training[0]["input_ids"]
    assert job.training[0]["input_ids"][-1] == short[-1]


# --- rows of a file -----------------------------------------------------------------------------------------


def test_every_format_holds_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 5 =", "answer": "007"}, {"prompt": 'say "a, b"\nnow', "answer": "None"}]
    written(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "answer"])
        table.writeheader()
        table.writerows(rows)
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"):
        assert list(read_examples(tmp_path / name).examples) == rows, name


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([0, 1, 0], ("0", "1"), [0, 1, 0]),
        ([10, 2, 2], ("2", "10"), [1, 0, 0]),
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_become_classes(
    labels: list[Any], classes: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    found = read_examples(written(tmp_path / "rows.jsonl", [{"text": "hi", "label": label} for label in labels]))
    assert found.classes == classes and [row["label"] for row in found.examples] == numbers


# --- bad input ----------------------------------------------------------------------------------------------

PAIR = '{"prompt": "say", "answer": "hi"}\n'
BAD_FILES = {
    "empty": ("", ["is empty"]),
    "broken line": (PAIR + '{"prompt": "say", "answ\n', ["line 2", "not JSON"]),
    "no object": (PAIR + "[1, 2]\n", ["line 2"]),
    "columns": ('{"question": "say", "answer": "hi"}\n', ["'prompt'", "'label'", "'question'"]),
    "two kinds": ('{"prompt": "a", "answer": "b", "text": "c", "label": 1}\n', ["more than one"]),
    "empty prompt": (PAIR + '{"prompt": " ", "answer": "hi"}\n', ["example 1", "'prompt'"]),
    "no answer": (PAIR + '{"prompt": "say"}\n', ["example 1", "None", "'answer'"]),
    "no conversation": ('{"messages": []}\n', ["example 0", "conversation"]),
    "user last": (
        "".join(f'{{"messages": [{{"role": "user", "content": "{text}"}}]}}\n' for text in ("hi", "no")),
        ["Example 0", "assistant"],
    ),
    "one class": ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', ["'x'", "two classes"]),
    "no label": ('{"text": "a", "label": "x"}\n{"text": "b"}\n', ["example 1", "'label'"]),
    "half a label": ('{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n', ["0.5", "whole number"]),
}
BAD = {
    "no file": (["--data", "/no/such/rows.jsonl"], ["/no/such/rows.jsonl"]),
    "folder": (["--model", "/no/such/folder"], ["/no/such/folder", "no such folder"]),
    "method": (["--method", "LoRA"], ["'LoRA'", "LoReFT", "RED"]),
    "rank": (["--rank", "65"], ["65", "width 64"]),
    "no rank": (["--rank", "0"], ["rank=0"]),
    "layer": (["--layers", "4"], ["'4'", "0 to 3"]),
    "layers": (["--layers", "3-1"], ["'3-1'", "0 to 3"]),
    "component": (["--component", "block"], ["'block'", "block_output"]),
    "grammar": (["--positions", "a?b"], ["a?b", "first", "2:5"]),
    "position": (["--positions", "400"], ["'400'", "0 to"]),
    "span": (["--positions", "subject"], ["'subject'"]),
    "steps": (["--steps", "0"], ["steps=0"]),
    "epochs": (["--epochs", "2"], ["--epochs", "--steps"]),
    "batch": (["--batch-size", "0"], ["batch_size=0"]),
    "rate": (["--learning-rate", "0"], ["learning_rate=0"]),
    "diverging": (["--learning-rate", "1e30", "--steps", "9"], ["nan", "lower --learning-rate"]),
    "patience": (["--patience", "0"], ["--patience 0"]),
    "patience without rows": (["--patience", "1", "--held-out", "0"], ["--patience 1", "--held-out"]),
    "parts": (["--accumulate", "0"], ["--accumulate 0"]),
    "held out": (["--held-out", "some"], ["some", "0.1", "50"]),
    "all held out": (["--held-out", "16"], ["16 rows", "none"]),
    "samples": (["--samples", "-1"], ["-1"]),
    "new tokens": (["--max-new-tokens", "0"], ["0"]),
    "memory": (["--memory", "lots"], ["'lots'", "8GiB"]),
    "little memory": (["--memory", "10"], ["cannot hold"]),
    "device": (["--device", "abacus"], ["abacus"]),
    "dtype": (["--dtype", "int4"], ["int4", "float32, bfloat16, float16"]),
}


def check_refused(result: Result, parts: list[str], folder: Path, left: set[Any]) -> None:
    assert result.exit_code == 2, (result.exception, result.stdout)
    lines = [line for line in result.stderr.splitlines() if "━" not in line]
    assert result.stdout == "" and len(lines) == 1 and lines[0].startswith("subspace-lab: "), result.stderr
    assert all(part in lines[0] for part in parts), lines
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_answered_in_one_line(name: str, rows: Path, tmp_path: Path) -> None:
    options, parts = BAD[name]
    result = finetuned("--data", rows, *TINY, *options, "--out", tmp_path / "made" / "for it")
    check_refused(result, parts, tmp_path, {"rows.jsonl"})


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_answered_in_one_line(name: str, tmp_path: Path) -> None:
    text, parts = BAD_FILES[name]
    (tmp_path / "rows.jsonl").write_text(text)
    # Nothing of the model is needed to see it, except how a conversation is written.
    model = ["--model", "/not/even/looked/at"] if name != "user last" else []
    result = finetuned("--data", tmp_path / "rows.jsonl", *model, *TINY, "--out", tmp_path / "out")
    check_refused(result, parts, tmp_path, {"rows.jsonl"})


def test_a_prompt_that_fills_the_model_and_a_broken_checkpoint(tmp_path: Path) -> None:
    model = local_model(tmp_path / "model", transformers.BertForMaskedLM)
    texts = written(tmp_path / "texts.jsonl", TEXTS)
    weights = load_file(model / "model.safetensors")
    lost = {k: v for k, v in weights.items() if ".layer.1." not in k}
    transformers.BertForMaskedLM.from_pretrained(model).save_pretrained(model, state_dict=lost)
    result = finetuned("--model", model, "--data", texts, *TINY, "--out", tmp_path / "out")
    check_refused(result, ["holds no weights", "layer.1"], tmp_path, {"model", "texts.jsonl"})
    model = local_model(tmp_path / "model", transformers.LlamaForCausalLM)
    rows = written(tmp_path / "texts.jsonl", [{"prompt": "say " * n, "answer": "hi"} for n in (30, 31)])
    result = finetuned("--model", model, "--data", rows, *TINY, "--out", tmp_path / "out")
    check_refused(result, ["Example 0", "max_length=24"], tmp_path, {"model", "texts.jsonl"})


def test_results_are_never_mixed(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = finetuned("--data", rows, "--model", "/not/even/looked/at", "--out", tmp_path)
    check_refused(result, ["not empty"], tmp_path, {"rows.jsonl", "notes.txt"})


def test_a_class_whose_logit_is_no_number_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_lab.reft import classification_job

    model = get_reft_model(AutoModelForCausalLM.from_pretrained(SHIPPED), ReftConfig(rank=1))
    logits = torch.tensor([[float("nan"), 0.0], [1.0, float("nan")], [1.0, 0.0]])
    monkeypatch.setattr(classification_job, "over", lambda *_: (0.5, [logits]))
    job = ClassificationJob.__new__(ClassificationJob)
    job.held_out, job._pad = [{"input_ids": [1], "labels": 0}] * 3, 0
    measured = job.measure(model, 3)
    assert measured.right is not None
    assert measured.right.tolist() == [False, False, True]
