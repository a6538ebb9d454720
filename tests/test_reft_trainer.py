"""Training: `transformers.Trainer` as it is, with nothing subclassed, and the core's own loop."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from families import fresh
from safetensors.torch import load_file
from test_reft_data import make_tokenizer
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model
from subspace_lab.reft.data import pad

# transformers 5.24 gives it a new name.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"

ROOT = Path(__file__).resolve().parents[1]
ROWS = 24


def answers(rows: int = ROWS, seed: int = 0) -> Any:
    """Prompts of 3 to 8 tokens, each with an answer of 1 to 3 tokens, always the same ones."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        prompt = torch.randint(3, 60, (3 + i % 6,), generator=generator).tolist()
        answer = [7, 11, 5][: 1 + i % 3]
        made.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * (len(prompt) + len(answer)),
                "labels": [-100] * len(prompt) + answer,
            }
        )
    return Dataset.from_list(made)


def classes(rows: int = ROWS, seed: int = 0) -> Any:
    """Texts of 3 to 8 tokens of one half of the vocabulary or the other."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        ids = torch.randint(3, 30, (3 + i % 6,), generator=generator) + 30 * (i % 2)
        made.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": i % 2})
    return Dataset.from_list(made)


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return pad(rows, 0)


def classifier(kind: str = "bert") -> Any:
    torch.manual_seed(5)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config).eval()
    config = fresh("llama").config
    config.num_labels = 2
    return transformers.LlamaForSequenceClassification(config).eval()


def decoder(positions: str = "f1+l1", **options: Any) -> ReftModel:
    return get_reft_model(fresh("llama"), ReftConfig(**{"rank": 4, "positions": positions, "seed": 3, **options}))


def encoder(kind: str = "bert", head: str = "classifier") -> ReftModel:
    config = ReftConfig(rank=4, positions="all", modules_to_save=(head,), seed=3)
    return get_reft_model(classifier(kind), config)


def trainer(
    model: ReftModel,
    folder: Path,
    data: Any,
    evaluation: Any = None,
    *,
    metrics: Any = None,
    collator: Callable[..., Any] = collate,
    **options: Any,
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-2,
        "max_steps": 10,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 7,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=evaluation,
        data_collator=collator,
        compute_metrics=metrics,
    )


def numbers(model: ReftModel) -> dict[Any, Any]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k != "_extra_state"}


def equal(one: dict[str, Any], other: dict[str, Tensor]) -> Any:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart(one: dict[str, Tensor], other: dict[Any, Any]) -> Any:
    return max((one[k] - other[k]).abs().max().item() for k in one)


def losses(run: Trainer) -> list[Any]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


# --- plain Trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_plain_trainer(kind: str, tmp_path: Path) -> None:
    """The loss falls, the base model stays, checkpoints hold the adapter alone and resume to the same weights."""
    make: Any
    make, data = (decoder, answers()) if kind == "decoder" else (encoder, classes())
    model = make()
    base = {k: v.clone() for k, v in model.base_model.state_dict().items()}
    whole = trainer(model, tmp_path, data, max_steps=30, save_strategy="steps", save_steps=15)
    whole.train()
    assert sum(losses(whole)[-3:]) < 0.7 * sum(losses(whole)[:3])
    assert equal(model.base_model.state_dict(), base)
    kept = load_file(tmp_path / "checkpoint-15" / "model.safetensors")
    assert kept.keys() == model.state_dict().keys()
    assert all(k.startswith("adapters.default.") for k in kept if k != "_extra_state")
    parameters = sum(v.numel() for k, v in kept.items() if k != "_extra_state")
    assert parameters == model.get_nb_trainable_parameters()[0]

    again = make()
    assert not equal(numbers(again), numbers(model))
    resumed = trainer(again, tmp_path, data, max_steps=30)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert equal(numbers(again), numbers(model)), "resumed is not what was uninterrupted"
    short = make()
    trainer(short, tmp_path / "short", data, max_steps=15).train()
    assert not equal(numbers(short), numbers(model)), "the last 15 steps did nothing"
    whole.save_model(str(tmp_path / "final"))
    third = make()
    third.load_state_dict(load_file(tmp_path / "final" / "model.safetensors"))
    assert equal(numbers(third), numbers(model))
    model.save_pretrained(tmp_path / "adapter")
    fourth = ReftModel.from_pretrained(fresh("llama") if kind == "decoder" else classifier(), tmp_path / "adapter")
    assert equal(numbers(fourth), numbers(model))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_best_model_is_loaded_at_the_end(kind: str, tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[Any, Any]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model, data = (decoder(), answers()) if kind == "decoder" else (encoder(), classes())
    run = trainer(
        model,
        tmp_path,
        data,
        data.select(range(8)),
        metrics=accuracy if kind == "encoder" else None,
        learning_rate=0.02,
        lr_scheduler_type="constant_with_warmup",
        max_steps=12,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=kind
        == "encoder",  # whichever is not the last: the worst for the one that only gets better
    )
    run.train()
    found = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert len(found) == 4
    best = (max if kind == "encoder" else min)(found, key=lambda step: found[step])
    assert run.state.best_model_checkpoint is not None
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert kind == "decoder" or best != 12
    evaluated = run.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(found[best], rel=1e-6)
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert equal(model.state_dict(), kept)
    others = [s for s in found if s != best]
    assert not any(equal(kept, load_file(tmp_path / f"checkpoint-{s}" / "model.safetensors")) for s in others)
    if kind == "encoder":
        assert 0 <= evaluated["eval_accuracy"] <= 1


@pytest.mark.parametrize("past", [False, True])
def test_trainer_ends_early_with_the_best(past: bool, tmp_path: Path) -> None:
    """The library's own callback; the adapter is bit for bit the checkpoint of the lowest evaluation."""
    model, data = decoder(start="paper"), answers()
    held = answers(8, seed=1)
    if past:  # one past for both, since rows are found by their number
        both = model.keep_past(Dataset.from_list([*data, *held]))
        data, held = both.select(range(ROWS)), both.select(range(ROWS, ROWS + 8))
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    run = trainer(
        model, tmp_path, data, held, max_steps=40, learning_rate=0.5, prediction_loss_only=True, **options
    )
    run.add_callback(EarlyStoppingCallback(2))
    run.train()
    found = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    best = min(found, key=lambda step: found[step])
    assert max(found) == best + 2 < 40, "the test needs a training that ends early"
    assert equal(model.state_dict(), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert not equal(model.state_dict(), load_file(tmp_path / f"checkpoint-{best + 2}" / "model.safetensors"))
    assert run.evaluate()["eval_loss"] == found[best]


def test_a_decoder_that_classifies(tmp_path: Path) -> None:
    model = encoder("llama", "score")
    run = trainer(model, tmp_path, classes(), max_steps=40, learning_rate=2e-2)
    run.train()
    assert sum(losses(run)[-5:]) < 0.6 * sum(losses(run)[:5])


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_accumulated_gradients_are_those_of_the_big_batch(kind: str, tmp_path: Path) -> None:
    """Rows have different numbers of answer tokens, so means of means would be another loss."""
    make: Any
    make, data = (decoder, answers()) if kind == "decoder" else (encoder, classes())
    found: list[Any] = []
    for size, accumulate in ((12, 1), (3, 4), (12, 1)):
        model = make(start="paper") if kind == "decoder" else make()
        options: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        if len(found) == 2:
            options["seed"] = 8
        run = trainer(model, tmp_path, data, max_steps=3, optim="sgd", learning_rate=0.3, **options)
        run.train()
        found.append(numbers(model))
    assert apart(found[0], found[1]) < 1e-5 < 1e-3 < apart(found[0], found[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_at_block_outputs_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = decoder(start="paper")
        run = trainer(
            model,
            tmp_path,
            answers(),
            max_steps=3,
            **{CHECKPOINTING: checkpointing},  # type: ignore[arg-type]
            **({f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}),  # type: ignore[arg-type]
        )
        run.train()
        found.append((numbers(model), losses(run)))
        assert any(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")) == (
            checkpointing
        )
        model.gradient_checkpointing_disable()
        assert not model.base_model.get_input_embeddings()._forward_hooks
    assert apart(found[0][0], found[1][0]) < 1e-6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_gradient_checkpointing_is_refused_where_it_would_lose_gradients(tmp_path: Path) -> None:
    model = decoder(component="mlp_output")
    run = trainer(model, tmp_path, answers(), **{CHECKPOINTING: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inside them: \['mlp_output\[0\]@f1\+l1'"):
        run.train()
    model = get_reft_model(fresh("llama"), ReftConfig(rank=2, modules_to_save=("mlp",)))
    model.train()
    model.gradient_checkpointing_enable()
    batch = collate(list(answers(2)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)


def test_bf16(tmp_path: Path) -> None:
    """Autocast takes no product of an edit to a half precision, and parameters stay float32."""
    found = []
    for bf16 in (False, True):
        model = decoder()
        run = trainer(model, tmp_path, answers(), max_steps=30, bf16=bf16)
        run.train()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        found.append(losses(run))
    assert all(math.isfinite(x) for x in found[1])
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-2) and found[1] != found[0]
    assert sum(found[1][-3:]) < 0.8 * sum(found[1][:3])


def test_a_base_model_in_bf16(tmp_path: Path) -> None:
    model = get_reft_model(fresh("llama", torch.bfloat16), ReftConfig(rank=4, positions="f1+l1"))
    run = trainer(model, tmp_path, answers(), max_steps=30)
    run.train()
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    assert sum(losses(run)[-3:]) < 0.8 * sum(losses(run)[:3])


# --- where the prompt ends ----------------------------------------------------------------------------------


def with_lengths(data: Any) -> Any:
    return data.map(lambda row: {"prompt_lengths": sum(label == -100 for label in row["labels"])})


def test_a_column_of_prompt_lengths(tmp_path: Path) -> None:
    """It reaches the model through Trainer, and says what labels without −100 do not."""
    by_labels, by_column = decoder("last", start="paper"), decoder("last", start="paper")
    trainer(by_labels, tmp_path, answers(), max_steps=3).train()
    trainer(by_column, tmp_path, with_lengths(answers()), max_steps=3).train()
    assert equal(numbers(by_labels), numbers(by_column))
    everywhere = with_lengths(answers()).map(lambda row: {"labels": row["input_ids"]})
    run = trainer(decoder("last", start="paper"), tmp_path, everywhere, max_steps=1)
    run.train()
    with pytest.raises(ValueError, match=r"empty prompt.*give prompt_lengths"):
        trainer(decoder("last"), tmp_path, everywhere.remove_columns("prompt_lengths"), max_steps=1).train()


def test_label_smoothing_needs_the_column_and_then_shifts_the_labels(tmp_path: Path) -> None:
    smooth: dict[str, Any] = {"label_smoothing_factor": 0.1, "max_steps": 1}
    with pytest.raises(ValueError, match="Training needs labels or prompt_lengths"):
        trainer(decoder("last"), tmp_path, answers(), **smooth).train()
    model, data = decoder("last", start="paper"), with_lengths(answers(8))
    batch = collate(list(data))
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    run = trainer(model, tmp_path, data, **smooth)
    run.train()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)


# --- several processes --------------------------------------------------------------------------------------

# An interpreter that ends while gloo's threads still hold tensors aborts now and then, whatever was trained
# (github.com/pytorch/pytorch/pull/179291), so both processes leave without ending theirs.
PARALLEL = """
import os
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from test_reft_trainer import answers, decoder, trainer
torch.set_num_threads(1)
model = decoder(start="paper")
options = dict(optim="sgd", learning_rate=0.3, max_steps=3, save_strategy="steps", save_steps=3)
run = trainer(model, sys.argv[1], answers(), per_device_train_batch_size=6, ddp_backend="gloo", **options)
assert run.accelerator.num_processes == 2
run.train()
torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PARALLEL.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(program), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=400,
        env=surroundings,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    model = decoder(start="paper")
    before = numbers(model)
    trainer(
        model,
        tmp_path / "one",
        answers(),
        per_device_train_batch_size=12,
        optim="sgd",
        learning_rate=0.3,
        max_steps=3,
    ).train()
    there.pop("_extra_state")
    assert apart(there, numbers(model)) < 1e-5 < 1e-2 < apart(there, before)


# --- TRL ----------------------------------------------------------------------------------------------------


def sft(model: ReftModel, out: Path, data: Any, **options: Any) -> trl.SFTTrainer:
    losses_known: Any = {"loss_type": "nll"} if hasattr(trl.SFTConfig, "loss_type") else {}
    arguments = trl.SFTConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        logging_steps=1,
        **{CHECKPOINTING: False},  # type: ignore[arg-type]
        completion_only_loss=True,
        **losses_known,
        **options,
    )
    data = data.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]})
    data = data.remove_columns("labels")
    return trl.SFTTrainer(
        model,  # type: ignore[arg-type]
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
    )


def test_sft_trainer_learns_what_trainer_learns(tmp_path: Path) -> None:
    model, again = decoder(start="paper"), decoder(start="paper")
    options: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "seed": 3,
    }
    options |= {"learning_rate": 3e-2, "average_tokens_across_devices": False}
    run = sft(model, tmp_path / "sft", answers(), **options)
    run.train()
    plain = trainer(again, tmp_path / "plain", answers(), **options)
    plain.train()
    assert losses(run)[-1] < losses(run)[0]
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
    assert apart(numbers(model), numbers(again)) < 1e-3 < apart(numbers(model), numbers(decoder(start="paper")))
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate(answers())["eval_loss"], rel=1e-3)


def test_packed_texts_are_refused() -> None:
    model = decoder()
    ids = torch.arange(3, 11)[None]
    labels = torch.where(torch.arange(8)[None] % 4 > 1, ids, -100)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, labels=labels, position_ids=packed)
    model(input_ids=ids, labels=labels.where(torch.arange(8) > 4, -100), position_ids=torch.arange(8)[None])


# --- the core's own loop ------------------------------------------------------------------------------------


def test_the_frozen_past_trains_as_trainer_does(tmp_path: Path) -> None:
    """Same losses and weights: whole batches, AdamW at a constant rate, no decay."""
    model, again = decoder(start="paper"), decoder(start="paper")
    options: dict[str, Any] = {
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 5,
    }
    run = trainer(model, tmp_path, answers(), per_device_train_batch_size=ROWS, learning_rate=3e-3, **options)
    run.train()
    config = TrainingConfig(steps=5, learning_rate=3e-3, batch_size=ROWS, warmup=0.0, schedule="constant")
    found = finetune(again, answers(), config, quiet=True)
    assert found == pytest.approx(losses(run), rel=2e-4)
    assert (
        apart(numbers(model), numbers(again))
        < 2e-3
        < 1e-2
        < apart(numbers(model), numbers(decoder(start="paper")))
    )
    third = decoder(start="paper")
    assert finetune(third, with_lengths(answers()), config, quiet=True) == found


def test_what_the_loop_refuses() -> None:
    with pytest.raises(ValueError, match="train modules_to_save with"):
        finetune(decoder(modules_to_save=("lm_head",)), answers())
    with pytest.raises(ValueError, match="No examples"):
        finetune(decoder(), [])
    model = decoder()
    with model.disable_adapter(), pytest.raises(ValueError, match="No active adapter"):
        finetune(model, answers())
    silent = answers().map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="Row 0 has no label but −100"):
        finetune(model, silent)
    with pytest.raises(ValueError, match="empty prompt"):
        finetune(model, answers().map(lambda row: {"labels": row["input_ids"]}))
