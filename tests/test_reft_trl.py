"""TRL's trainers over a model with adapters: log-probabilities, references, packed and many-turned examples."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from families import fresh
from test_reft_data import make_tokenizer
from test_reft_trainer import CHECKPOINTING, answers, apart, collate, decoder, numbers
from torch import Tensor

from subspace_lab.core.interventions import Intervention
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import forward
from subspace_lab.reft import PromptCollator, ReftConfig, ReftModel, get_reft_model

fused = pytest.importorskip("trl.trainer.utils")
if not hasattr(fused, "add_fused_lm_head"):
    pytest.skip("before TRL 1.9 trainers read the logits", allow_module_level=True)
EVERY = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def given(rows: int = 5) -> dict[str, Tensor]:
    return collate(list(answers(rows)))


def scored(model: ReftModel, batch: dict[str, Any], **options: Any) -> Any:
    fused.add_fused_lm_head(model, outputs=EVERY, **options)
    return model(**batch, fused_lm_head=True)


# --- log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_labels_numbers_are_those_of_the_logits_at_any_temperature(name: str, temperature: float) -> None:
    """Every number that TRL reads, with the edits in force, and the gradient of the adapter."""
    model = get_reft_model(fresh(name), ReftConfig(rank=4, positions="f1+l1", start="paper"))
    batch = given()
    plain = model(**batch)
    wanted, mask = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    known = torch.distributions.Categorical(logits=plain.logits[:, :-1] / temperature)
    expected = {
        "log_probs": known.log_prob(wanted.clamp(min=0)),
        "entropy": known.entropy(),
        "mean_logits": (plain.logits[:, :-1] / temperature).mean(-1),
        "is_top1": (plain.logits[:, :-1].argmax(-1) == wanted).float(),
        "log_sum_sq_probs": known.probs.square().sum(-1).log(),
    }
    found = scored(model, batch, temperature=temperature)
    assert torch.equal(found.label_mask, mask)
    for field, value in expected.items():
        torch.testing.assert_close(found[field].float(), value.where(mask, 0), atol=2e-4, rtol=1e-4)
    gradients = []
    for loss in (-expected["log_probs"][mask].mean(), found.loss):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.adapters.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_without_an_adapter_they_are_the_bare_models(temperature: float) -> None:
    model, bare, batch = decoder(start="paper"), fresh("llama"), given()
    with torch.no_grad(), model.disable_adapter():
        found = scored(model, batch, temperature=temperature)
    with torch.no_grad():
        expected = scored(bare, batch, temperature=temperature)
        edited = model(**batch, fused_lm_head=True)
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.loss, expected.loss)
    assert (edited.log_probs - expected.log_probs).abs().max() > 1e-3
    assert model.base_model.__class__ is bare.__class__, "the stand-in is gone after the call"


def test_a_head_put_into_the_base_model_before_it_is_wrapped() -> None:
    """As TRL's documentation says for PEFT."""
    bare, batch = fresh("llama"), given()
    fused.add_fused_lm_head(bare, temperature=0.7)
    model = get_reft_model(bare, ReftConfig(rank=4, positions="f1+l1", start="paper", seed=3))
    with torch.no_grad():
        found = model(**batch, fused_lm_head=True)
        expected = scored(decoder(start="paper"), batch, temperature=0.7)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-6, rtol=1e-5)


def test_shifted_labels_and_a_number_of_items() -> None:
    model, batch = decoder(start="paper"), given()
    labels = batch.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
    fused.add_fused_lm_head(model, temperature=0.7)
    with torch.no_grad():
        one = model(**batch, labels=labels, fused_lm_head=True, num_items_in_batch=7)
        other = model(**batch, shift_labels=shifted, fused_lm_head=True, num_items_in_batch=7)
    torch.testing.assert_close(one.log_probs, other.log_probs[:, :-1])
    torch.testing.assert_close(one.loss, -one.log_probs.sum() / 7)


def test_a_trained_head_is_the_one_that_counts() -> None:
    model = get_reft_model(fresh("neox"), ReftConfig(rank=2, positions="last", modules_to_save=("lm_head",)))
    head: Any = next(iter(model.adapter("default").saved.values()))
    with torch.no_grad():
        head.weight.mul_(1.5)
    batch = given()
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
        found = scored(model, batch, temperature=0.8)
    mask = found.label_mask
    expected = torch.log_softmax(logits / 0.8, -1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[
        ..., 0
    ]
    torch.testing.assert_close(found.log_probs[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_without_trls_head_it_says_so() -> None:
    with pytest.raises(TypeError, match="add_fused_lm_head"):
        decoder()(**given(), fused_lm_head=True)


# --- trainers with a reference ------------------------------------------------------------------------------

TEXTS = ["say hi now", "say yes please now", "hi : say no", "no now say"]


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A base model on disk, since TRL loads its references from there."""
    folder = tmp_path / "base"
    base = fresh("llama")
    base.save_pretrained(folder)
    return type(base).from_pretrained(folder)


def arguments(kind: type[Any], out: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        learning_rate=1e-2,
        **{CHECKPOINTING: False},
        **options,
    )


def preferences() -> Any:
    return Dataset.from_list([{"prompt": t, "chosen": " hi yes", "rejected": " no now"} for t in TEXTS * 2])


def reward(completions: Any, **_: Any) -> list[Any]:
    return [float(len(set(c))) + i % 2 for i, c in enumerate(completions)]


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_trainer_with_a_reference_model(kind: str, saved: Any, tmp_path: Path) -> None:
    model = get_reft_model(saved, ReftConfig(rank=4, positions="f1+l1", start="paper"))
    before, tokenizer = numbers(model), make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    base = {k: v.clone() for k, v in saved.state_dict().items()}
    if kind == "DPO":
        settings = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=2)
        run: Any = trl.DPOTrainer(model, args=settings, train_dataset=preferences(), processing_class=tokenizer)  # type: ignore[arg-type]
    elif kind == "KTO":
        data = [{"prompt": t, "completion": " hi yes", "label": i % 2 == 0} for i, t in enumerate(TEXTS * 2)]
        settings = arguments(trl.KTOConfig, tmp_path, per_device_train_batch_size=2)
        run = trl.KTOTrainer(
            model,  # type: ignore[arg-type]
            args=settings,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
    else:
        settings = arguments(
            getattr(trl, f"{kind}Config"),
            tmp_path,
            beta=0.1,
            temperature=0.8,
            num_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=4,
        )
        run = getattr(trl, f"{kind}Trainer")(
            model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": t} for t in TEXTS]),
            processing_class=tokenizer,
        )
    assert run.ref_model is not None
    run.train()
    logged = [log for log in run.state.log_history if "loss" in log]
    assert len(logged) == 2 and all(torch.isfinite(torch.tensor(log["loss"])) for log in logged)
    assert apart(numbers(model), before) > 1e-5
    assert all(torch.equal(v, base[k]) for k, v in saved.state_dict().items())


def test_the_reference_of_dpo_is_the_base_model(saved: Any, tmp_path: Path) -> None:
    """At the identity the policy is the reference, so that no answer has a reward; with another start it is not."""
    rewards = []
    for start in ("identity", "paper"):
        model = get_reft_model(saved, ReftConfig(rank=4, positions="f1+l1", start=start))
        settings = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=4, loss_type="sigmoid", beta=5.0)
        run = trl.DPOTrainer(model, args=settings, train_dataset=preferences(), processing_class=make_tokenizer())  # type: ignore[arg-type]
        run.train()
        rewards.append(next(log["rewards/chosen"] for log in run.state.log_history if "loss" in log))
        saved = model.unload()
    assert abs(rewards[0]) < 1e-6 < 1e-2 < abs(rewards[1])


# --- examples that hold several texts or turns --------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}]
)
def test_packed_texts_of_todays_trainer_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    data = Dataset.from_list([{"prompt": t, "completion": " hi yes"} for t in TEXTS * 4])
    settings = arguments(trl.SFTConfig, tmp_path, per_device_train_batch_size=4, **options)
    run = trl.SFTTrainer(decoder(), args=settings, train_dataset=data, processing_class=make_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed"):
        run.train()


def test_texts_are_known_as_packed_by_their_limits_too() -> None:
    ids = torch.arange(3, 11)[None]
    labels = ids.where(torch.arange(8) > 5, -100)
    limits = torch.tensor([0, 4, 8], dtype=torch.int32)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        with pytest.raises(ValueError, match="packed"):
            decoder()(input_ids=ids, labels=labels, **{name: limits})


def turns(*spans: Any, length: int = 14) -> dict[Any, Any]:
    ids = torch.arange(3, 3 + length)[None]
    labels = torch.full_like(ids, -100)
    for start, stop in spans:
        labels[:, start:stop] = ids[:, start:stop]
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "all", "-2", ":-1"])
def test_several_answers_in_one_example_are_refused(positions: str) -> None:
    with pytest.raises(ValueError, match=r"has 2 answers.*an example of each answer"):
        decoder(positions)(**turns((4, 6), (10, 14)))
    decoder(positions)(**turns((4, 14)))
    decoder(positions)(**turns((4, 6), (10, 14)), prompt_lengths=torch.tensor([4]))


@pytest.mark.parametrize("positions", ["f2", "first", "1", "0:3"])
def test_where_each_answers_prompt_has_the_same_edits_they_are_trained_together(positions: str) -> None:
    """The loss is that of the examples split by answer."""
    model = decoder(positions, start="paper")
    both = model(**turns((4, 6), (10, 14))).loss
    first, second = model(**turns((4, 6))).loss, model(**turns((10, 14))).loss
    torch.testing.assert_close(both, (2 * first + 4 * second) / 6)


def test_an_example_for_each_answer_is_what_generation_does() -> None:
    """The prompt is the whole conversation up to the answer, in training and in `generate`."""
    model = decoder("l2", start="paper")
    whole = turns((10, 14))
    with torch.no_grad():
        logits = model(**whole).logits[:, 9]
    out = model.generate(
        whole["input_ids"][:, :10], max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(out.logits[0], logits, atol=1e-5, rtol=1e-4)


def test_several_answers_are_refused_where_the_past_is_kept() -> None:
    data = Dataset.from_list([{k: v[0].tolist() for k, v in turns((4, 6), (10, 14)).items()}])
    with pytest.raises(ValueError, match="has 2 answers"):
        decoder("l1").keep_past(data)


def test_several_answers_are_refused_where_a_collator_counts_prompts() -> None:
    rows = [{k: v[0].tolist() for k, v in turns((4, 6), (10, 14)).items()}]
    PromptCollator(make_tokenizer())(rows)
    collator = PromptCollator(make_tokenizer(), prompt_lengths=True)
    with pytest.raises(ValueError, match="Row 0 has several answers"):
        collator(rows)
    assert collator([{**rows[0], "prompt_lengths": 4}])["prompt_lengths"].tolist() == [4]


def test_assistant_only_loss_of_a_conversation_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} "
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    talk = [
        {"role": "user", "content": "say hi"},
        {"role": "assistant", "content": "hi yes"},
        {"role": "user", "content": "say no"},
        {"role": "assistant", "content": "no now"},
    ]
    settings = arguments(trl.SFTConfig, tmp_path, assistant_only_loss=True, per_device_train_batch_size=2)
    data = Dataset.from_list([{"messages": talk}] * 4)
    run = trl.SFTTrainer(decoder("l1"), args=settings, train_dataset=data, processing_class=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 2 answers"):
        run.train()


def test_edits_in_one_run_are_those_of_the_forward_below_it() -> None:
    """The states that the head is given are the last ones of the run with the edits."""
    model, batch = decoder(start="paper"), given()
    lengths = (batch["labels"] == -100).sum(1) - (batch["attention_mask"] == 0).sum(1)
    inner = Batch({k: v for k, v in batch.items() if k != "labels"}, lengths)
    assert all(isinstance(edit, Intervention) for edit in model.edits().values())
    with torch.no_grad():
        logits = forward(model.backbone, inner, model.edits()).logits
        torch.testing.assert_close(model(**batch).logits, logits)
