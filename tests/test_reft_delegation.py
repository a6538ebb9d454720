"""What a wrapped model does as the base model does: attributes, signatures, pipelines, noise, mixed batches."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import build, fresh, inputs
from test_reft_data import make_tokenizer
from test_reft_generate import adapted, written
from test_reft_trainer import answers, classes, classifier, collate, decoder, encoder, losses, numbers, trainer
from torch import nn
from transformers import Trainer
from transformers.utils.generic import can_return_loss, find_labels

from subspace_lab.core.interventions import Intervention
from subspace_lab.reft import ReftConfig, ReftModel, get_reft_model

# Every public name that peft 0.21's PeftModel hands to its base model and that calls of other libraries read.
READ = (
    "dtype",
    "name_or_path",
    "main_input_name",
    "framework",
    "base_model_prefix",
    "supports_gradient_checkpointing",
    "vocab_size",
    "warnings_issued",
    "lm_head",
    "model",
    "_no_split_modules",
    "_supports_sdpa",
)
CALLED = ("can_generate", "get_decoder", "get_position_embeddings", "tie_weights", "prepare_inputs_for_generation")


def test_what_the_wrapper_lacks_is_the_base_models() -> None:
    base: Any = fresh("llama")
    model = get_reft_model(base, ReftConfig(rank=2))
    for name in READ:
        assert hasattr(model, name) == hasattr(base, name), name
        if hasattr(base, name):
            assert getattr(model, name) is getattr(base, name) or getattr(model, name) == getattr(base, name), name
    for name in CALLED:
        assert getattr(model, name, None) == getattr(base, name, None), name
    assert model.can_generate() and model.get_base_model() is base
    assert (
        model.get_input_embeddings() is base.model.embed_tokens and model.get_output_embeddings() is base.lm_head  # type: ignore[union-attr]
    )


def test_counts_are_of_both() -> None:
    base = fresh("llama")
    sizes = base.num_parameters(), base.get_memory_footprint(), base.num_parameters(exclude_embeddings=True)
    model = get_reft_model(base, ReftConfig(rank=2))
    trained = model.get_nb_trainable_parameters()[0]
    extra = trained + sum(b.numel() for b in model.adapters.buffers())
    assert model.num_parameters() == sizes[0] + trained
    assert model.num_parameters(only_trainable=True) == trained
    assert model.num_parameters(exclude_embeddings=True) == sizes[2] + trained
    assert sizes[1] < model.get_memory_footprint() <= sizes[1] + 8 * extra
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()


def test_mistakes_stay_mistakes() -> None:
    model = decoder()
    with pytest.raises(AttributeError, match=r"Neither ReftModel\[LlamaForCausalLM\] nor its base model has"):
        model.set_adaptr("default")

    class Wrong(ReftModel):
        @property
        def dtype(self) -> Any:
            return self.no_such_thing

    wrong = Wrong(fresh("llama"), ReftConfig(rank=2))
    with pytest.raises(AttributeError):
        _ = wrong.dtype
    for name in ("generate_batch", "init_continuous_batching"):
        with pytest.raises(AttributeError, match="would run the base model without edits"):
            getattr(model, name)
        assert not hasattr(model, name)
    with pytest.raises(AttributeError, match="resize the base model before"):
        model.resize_token_embeddings(70)
    model.base_model._hf_hook = object()  # type: ignore[assignment]
    assert not hasattr(model, "_hf_hook")
    empty = ReftModel.__new__(ReftModel)
    with pytest.raises(AttributeError):
        _ = empty.base_model


def test_a_plain_module_delegates_too() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    base.note = "kept"  # type: ignore[assignment]
    from subspace_lab.core.sites import Site
    from subspace_lab.model.backbone import Backbone

    assert Backbone(base).width(Site.parse("0.output")) == 4


# --- signatures ---------------------------------------------------------------------------------------------


def question_answering() -> Any:
    torch.manual_seed(0)
    config = classifier().config
    return transformers.BertForQuestionAnswering(config).eval()


def clip() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 20},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize(
    "make",
    [lambda: fresh("llama"), lambda: fresh("gpt2"), classifier, question_answering, lambda: fresh("t5"), clip],
    ids=["llama", "gpt2", "classes", "spans", "t5", "clip"],
)
def test_trainer_reads_the_base_models_signature(make: Callable[..., Any]) -> None:
    base = make()
    stack = {"t5": "decoder.block_output"}.get(base.config.model_type, "block_output")
    if base.config.model_type == "clip":
        from subspace_lab.model.backbone import Backbone

        stack = f"{next(iter(Backbone(base).anatomy.stacks))}.block_output"
    model = get_reft_model(base, ReftConfig(rank=2, positions="all", component=stack))
    kind = type(base)
    assert isinstance(model, ReftModel)
    assert find_labels(model.__class__) == find_labels(kind)
    assert can_return_loss(model.__class__) == can_return_loss(kind)
    theirs = list(inspect.signature(kind.forward).parameters)[1:]
    ours = inspect.signature(model.forward).parameters
    assert [n for n in ours if n in theirs] == theirs and {"prompt_lengths", "row", "adapter_names"} <= set(ours)
    assert type(get_reft_model(make(), ReftConfig(rank=2, positions="all", component=stack))) is type(model)


def test_columns_that_the_model_does_not_take_are_removed(tmp_path: Path) -> None:
    data = answers().map(lambda row: {"note": [1, 2], "token_type_ids": [0] * len(row["input_ids"])})
    run = trainer(decoder(), tmp_path, data, max_steps=1)
    run.train()
    assert set(run._signature_columns or ()) >= {"input_ids", "labels", "prompt_lengths", "row"}
    assert not {"note", "token_type_ids"} & set(run._signature_columns or ())


def test_spans_are_trained_and_evaluated(tmp_path: Path) -> None:
    model = get_reft_model(
        question_answering(), ReftConfig(rank=4, positions="all", modules_to_save=("qa_outputs",))
    )
    data = classes().remove_columns("labels").map(lambda row: {"start_positions": 1, "end_positions": 2})
    run = trainer(model, tmp_path, data, data.select(range(8)), max_steps=20)
    assert run.label_names == ["start_positions", "end_positions"]
    run.train()
    assert sum(losses(run)[-3:]) < 0.7 * sum(losses(run)[:3])
    found = run.evaluate()
    assert found["eval_loss"] < losses(run)[0]
    assert run.predict(data.select(range(4))).label_ids[0].tolist() == [1] * 4  # type: ignore[index]


# --- other arguments ----------------------------------------------------------------------------------------


def images() -> Any:
    config = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()


def by_hand(base: Any, layer: nn.Module, edit: Intervention, call: Callable[..., Any]) -> Any:
    """The output with an edit of a whole block's output, by torch's own hook."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        return (edit(states), *output[1:]) if isinstance(output, tuple) else edit(states)

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        found = call(base)
    handle.remove()
    return found


def test_images_are_classified_and_trained(tmp_path: Path) -> None:
    base = images()
    model = get_reft_model(
        base, ReftConfig(rank=4, layers=[1], positions="all", start="paper", modules_to_save=("classifier",))
    ).eval()
    pixels = torch.randn(3, 3, 8, 8)
    edit = next(iter(model.edits().values()))
    layer = model.backbone.anatomy.modules[model.backbone.hook_point(next(iter(model.edits()))).path]
    expected = by_hand(images(), layer, edit, lambda _: base(pixel_values=pixels).logits)
    for found in (model(pixels), model(pixel_values=pixels, interpolate_pos_encoding=False)):
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match=r"\['pixel_value'\]"):
        model(pixel_value=pixels)

    def collator(rows: Any) -> dict[Any, Any]:
        return {"pixel_values": torch.stack([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}

    data = [(torch.randn(3, 8, 8) + 2 * (i % 2), i % 2) for i in range(16)]
    run = trainer(model, tmp_path, data, collator=collator, max_steps=30, remove_unused_columns=False)
    run.train()
    assert sum(losses(run)[-3:]) < 0.5 * sum(losses(run)[:3])


def llava() -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=fresh("llama").config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        image_token_index=50,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_model_that_sees_reads_and_writes_text() -> None:
    model = get_reft_model(llava(), ReftConfig(rank=4, positions="l1", start="paper"))
    ids = torch.tensor([[5, 50, 50, 50, 50, 9, 8]])
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    with torch.no_grad():
        found = model(**given, prompt_lengths=torch.tensor([7])).logits
        other = model(
            **{**given, "pixel_values": 1 - given["pixel_values"]}, prompt_lengths=torch.tensor([7])
        ).logits
        with model.disable_adapter():
            plain = model(**given).logits
    assert torch.equal(found[:, :6], plain[:, :6])
    assert (found[:, 6] - plain[:, 6]).abs().max() > 1e-3 and not torch.allclose(found, other)
    out = model.generate(
        **given, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(out.logits[0], found[:, -1], atol=1e-4, rtol=1e-4)
    model(**given, labels=ids.where(torch.arange(7) > 5, -100)).loss.backward()


def test_sounds_are_written_down() -> None:
    from test_reft_passes import whisper

    base = whisper()
    sound, mask = torch.randn(2, 8, 60), torch.ones(2, 60, dtype=torch.long)
    labels = torch.tensor([[3, 9, 8, 7], [3, 4, 5, -100]])
    for component, positions in (("encoder.block_output", "all"), ("decoder.block_output", "last")):
        model = get_reft_model(base, ReftConfig(rank=2, component=component, positions=positions, start="paper"))
        found = model(input_features=sound, attention_mask=mask, labels=labels)
        found.loss.backward()
        assert all(p.grad is not None for p in model.adapters.parameters())
        with model.disable_adapter():
            plain = model(input_features=sound, attention_mask=mask, labels=labels)
        assert not torch.allclose(found.loss, plain.loss)
        model.generate(sound, attention_mask=mask, max_new_tokens=3)
        model.generate(input_features=sound, max_new_tokens=3)
        base = model.unload()
    # Positions of an encoder of sounds are its frames; what follows the last block goes frame by frame.
    last = ReftConfig(
        rank=2,
        component="encoder.block_output",
        layers=(base.config.encoder_layers - 1,),
        positions="f2",
        start="paper",
    )
    model = get_reft_model(base, last)
    with torch.no_grad():
        found = model(input_features=sound, attention_mask=mask, labels=labels).encoder_last_hidden_state
        with model.disable_adapter():
            plain = model(input_features=sound, attention_mask=mask, labels=labels).encoder_last_hidden_state
    changed = (found != plain).any(-1)
    assert changed[:, :2].all() and not changed[:, 2:].any()


def double() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=40, num_labels=1)  # type: ignore[call-arg]
    return transformers.GPT2DoubleHeadsModel(config).eval()


def test_two_heads_over_several_continuations() -> None:
    """The choices of an example are rows of the model, each with its own prompt."""
    model = get_reft_model(double(), ReftConfig(rank=2, positions="l1", start="paper"))
    ids = torch.randint(3, 60, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    last = torch.full((2, 3), 6)
    lengths = torch.tensor([[2, 3, 4], [5, 6, 7]])
    with torch.no_grad():
        found = model(input_ids=ids, mc_token_ids=last, prompt_lengths=lengths)
        for i in range(2):
            for j in range(3):
                alone = model(
                    input_ids=ids[i, j][None, None],
                    mc_token_ids=torch.tensor([[6]]),
                    prompt_lengths=lengths[i, j][None, None],
                )
                torch.testing.assert_close(alone.logits[0, 0], found.logits[i, j], atol=1e-5, rtol=1e-4)
    labels = ids.where(torch.arange(7) > 3, -100)
    both = model(input_ids=ids, mc_token_ids=last, labels=labels, mc_labels=torch.tensor([0, 2]))
    (both.loss + both.mc_loss).backward()
    assert find_labels(model.__class__) == ["labels", "mc_labels"]
    with torch.no_grad():
        assert torch.equal(
            both.logits, model(input_ids=ids, mc_token_ids=last, prompt_lengths=4 + 0 * lengths).logits
        )


def test_choices_of_an_encoder() -> None:
    torch.manual_seed(0)
    base = transformers.BertForMultipleChoice(classifier().config).eval()
    model = get_reft_model(base, ReftConfig(rank=2, positions="f1+l1", start="paper"))
    ids = torch.randint(3, 60, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[:1, 1:2, :4], attention_mask=mask[:1, 1:2, :4]).logits
    torch.testing.assert_close(alone[0, 0], found[0, 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_nothing_is_swallowed(name: str) -> None:
    stack = "decoder.block_output" if name == "t5" else "block_output"
    model = get_reft_model(fresh(name), ReftConfig(rank=2, positions="all", component=stack))
    for wrong in ("noise_level", "attention_masks", "label", "input_id"):
        with pytest.raises(TypeError, match=wrong):
            model(**inputs(name), **{wrong: torch.ones(3, 11)})
    ids = inputs(name)["input_ids"]
    with pytest.raises(TypeError, match="given twice"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="positional"):
        model(*[ids] * 40)
    model(
        ids,
        **{k: v for k, v in inputs(name).items() if k != "input_ids"},
        output_hidden_states=True,
        return_dict=True,
    )


# --- pipelines, noise, inputs -------------------------------------------------------------------------------


def test_a_pipeline_writes_what_generate_writes(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = adapted("llama"), make_tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")  # type: ignore[call-overload]
    text = "say hi now"
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    found = pipe(text, **options)[0]["generated_token_ids"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert found == model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    with model.disable_adapter():
        assert pipe(text, **options)[0]["generated_token_ids"] != found
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]


def test_noise_on_the_embeddings(tmp_path: Path) -> None:
    found = []
    for alpha in (None, 50.0):
        model = decoder(start="paper")
        run = trainer(model, tmp_path, answers(), max_steps=2, neftune_noise_alpha=alpha)
        run.train()
        found.append(numbers(model))
        embedding = model.get_input_embeddings()
        assert not embedding._forward_hooks and not hasattr(embedding, "neftune_noise_alpha")
    assert any(not torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_inputs_is_the_main_input() -> None:
    model, given = adapted("gpt2"), inputs("gpt2", padding="left")
    expected = written(model, given)
    mask: dict[str, Any] = {"attention_mask": given["attention_mask"], "max_new_tokens": 6, "do_sample": False}
    ids = given["input_ids"]
    for found in (
        model.generate(inputs=ids, **mask),
        model.generate(ids, **mask),
        model.generate(input_ids=ids, **mask),
    ):
        assert torch.equal(found[:, ids.shape[1] :], expected)
    with pytest.raises(ValueError, match="the same argument"):
        model.generate(ids, input_ids=ids)


NAMES = [("default", "end", "same"), ("__base__", "end", "end"), ("same", "__base__", "default")]
WAYS = [{}, {"use_cache": False}, {"num_beams": 2}, {"every_token": True}, {"every_token": True, "num_beams": 2}]


# --- an adapter for each example ----------------------------------------------------------------------------


def mixture(name: str = "llama", **options: Any) -> ReftModel:
    """Adapters with sites in common, sites that overlap in short prompts, and other layers."""
    model = get_reft_model(build(name), ReftConfig(rank=3, positions="f2+l2", start="paper", seed=1))
    model.add_adapter("end", ReftConfig(rank=2, positions="last", start="paper", seed=2, **options))
    model.add_adapter("same", ReftConfig(rank=3, positions="f2+l2", start="paper", seed=3, layers=[0]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def alone(model: ReftModel, name: str, call: Callable[..., Any]) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return call()
    before = model.active_adapters
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_example_has_its_own_adapter(names: tuple[str, ...], padding: str) -> None:
    model, given = mixture(), inputs("llama", lengths=(11, 5, 9), padding=padding)
    lengths = given["attention_mask"].sum(1)
    with torch.no_grad():
        found = model(**given, adapter_names=list(names), prompt_lengths=lengths).logits
        for i, name in enumerate(names):
            expected = alone(model, name, lambda: model(**given, prompt_lengths=lengths).logits)
            torch.testing.assert_close(found[i], expected[i], atol=1e-5, rtol=1e-4)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("options", WAYS)
def test_each_example_of_a_generation_has_its_own_adapter(options: Any) -> None:
    names = ["end", "__base__", "same"]
    model, given = mixture(), inputs("llama", lengths=(11, 5, 9), padding="left")
    found = written(model, given, adapter_names=names, **options)
    every = []
    for i, name in enumerate(names):
        every.append(alone(model, name, lambda: written(model, given, **options)))
        assert torch.equal(found[i], every[-1][i])
    assert any(not torch.equal(found, one) for one in every)


def test_mixed_batches_are_trained_by_their_labels() -> None:
    model, batch = mixture(), collate(list(answers(3)))
    names = ["default", "end", "__base__"]
    for name in model.names:
        model.adapter(name).asks_for_gradient(True)
    model(**batch, adapter_names=names).loss.backward()
    with_gradient = {
        n for n in model.names for p in model.adapter(n).parameters() if p.grad is not None and p.grad.any()
    }
    assert with_gradient == {"default", "end"}


def test_one_examples_positions_are_not_anothers_matter() -> None:
    """A position that the examples of another adapter do not have."""
    model = mixture()
    model.add_adapter("tenth", ReftConfig(rank=2, positions="10", start="paper", seed=4))
    given = inputs("llama", lengths=(11, 5, 9), padding="left")
    lengths = given["attention_mask"].sum(1)
    with torch.no_grad():
        model(**given, adapter_names=["tenth", "end", "__base__"], prompt_lengths=lengths)
        with pytest.raises(IndexError, match="'10'"):
            model(**given, adapter_names=["end", "tenth", "__base__"], prompt_lengths=lengths)


def test_what_mixed_batches_do_not_take() -> None:
    model, given = mixture(), inputs("llama")
    with pytest.raises(ValueError, match="No adapter 'other'"):
        model(**given, adapter_names=["other"] * 3)
    with pytest.raises(ValueError, match="2 names for 3 examples"):
        model(**given, adapter_names=["end"] * 2)
    with pytest.raises(ValueError, match="2 names for 3 examples"):
        model.generate(**given, adapter_names=["end"] * 2)
    with pytest.raises(TypeError, match="adapter_names"):
        model(**given, adapter_names="end")
    model.add_adapter("head", ReftConfig(rank=2, modules_to_save=("lm_head",)))
    with pytest.raises(ValueError, match="modules_to_save"):
        model(**given, adapter_names=["head", "end", "end"])


def test_trainer_is_not_subclassed() -> None:
    assert Trainer.__module__.startswith("transformers") and encoder().config is not None
