"""The package's own loop: epochs, held-out rows, an early end that gives the best back, gradients in parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import fresh
from test_reft_trainer import answers, apart, decoder, equal, numbers
from test_suggest import loss_of

from subspace_lab.engine import notices
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import FinetuneInterrupted, ReftConfig, ReftModel, finetune, get_reft_model

CONFIG = TrainingConfig(steps=12, batch_size=8, learning_rate=2e-2, seed=5)


def exact(**options: Any) -> ReftModel:
    return get_reft_model(
        fresh("llama", torch.float64), ReftConfig(**{"rank": 2, "positions": "f1+l1", "start": "paper", **options})
    ).double()


def test_epochs_are_steps() -> None:
    by_epochs, by_steps = decoder(), decoder()
    history = finetune(by_epochs, answers(20), CONFIG, epochs=2, quiet=True)
    assert history == finetune(by_steps, answers(20), replace(CONFIG, steps=6), quiet=True)
    assert len(history) == history.kept == 6 and equal(numbers(by_epochs), numbers(by_steps))


def test_held_out_losses_are_those_of_the_model() -> None:
    model, held = decoder(dropout=0.2), answers(7, seed=1)
    start = loss_of(model, held)
    history = finetune(model, answers(), CONFIG, held_out=held, evaluate_every=5, quiet=True)
    assert [step for step, _ in history.held_out] == [0, 5, 10, 12]
    assert history.held_out[0][1] == pytest.approx(start, rel=1e-5)
    assert history.held_out[-1][1] == pytest.approx(loss_of(model, held), rel=1e-5) != pytest.approx(start)
    assert [s for s, _ in finetune(decoder(), answers(20), CONFIG, held_out=held, quiet=True).held_out] == [
        0, 3, 6, 9, 12,
    ]  # fmt: skip


def test_evaluating_changes_nothing() -> None:
    plain, watched = decoder(start="paper"), decoder(start="paper")
    losses = finetune(plain, answers(), CONFIG, quiet=True)
    assert losses == finetune(
        watched, answers(), CONFIG, held_out=answers(7, seed=1), evaluate_every=1, quiet=True
    )
    assert equal(numbers(plain), numbers(watched))


def test_an_early_end_gives_the_best_back() -> None:
    """Rows whose answers contradict those of the training get worse; what is kept is what training to there gives."""
    rows, held = (
        answers(),
        answers(6, seed=1).map(lambda row: {"labels": [x if x < 0 else 40 for x in row["labels"]]}),
    )
    config = replace(CONFIG, schedule="constant", warmup=0.0, steps=40)
    model = decoder(start="paper")
    history = finetune(model, rows, config, held_out=held, evaluate_every=1, patience=3, quiet=True)
    found = [loss for _, loss in history.held_out]
    best = min(range(len(found)), key=found.__getitem__)
    assert history.kept == best and len(history) == best + 3 < 40
    straight = decoder(start="paper")
    if best:
        finetune(straight, rows, replace(config, steps=best), quiet=True)
    assert equal(numbers(model), numbers(straight))
    assert loss_of(model, held) == pytest.approx(found[best], rel=1e-5)


def test_a_best_in_the_middle_is_given_back_after_the_whole_training() -> None:
    rows = answers()
    config = replace(CONFIG, schedule="constant", warmup=0.0, learning_rate=0.5, steps=20, batch_size=2)
    model = decoder(start="paper")
    history = finetune(model, rows, config, held_out=rows, evaluate_every=1, patience=100, quiet=True)
    best = min(history.held_out, key=lambda one: one[1])
    assert 0 < best[0] == history.kept < 20, "the test needs a training that does not end at its lowest loss"
    straight = decoder(start="paper")
    finetune(straight, rows, replace(config, steps=best[0]), quiet=True)
    assert equal(numbers(model), numbers(straight))
    last = decoder(start="paper")
    assert finetune(last, rows, config, held_out=rows, evaluate_every=1, quiet=True).kept == 20
    assert not equal(numbers(last), numbers(model))


def test_ctrl_c_with_patience_keeps_the_lowest_held_out_loss_so_far() -> None:
    """Held-out rows that contradict the training get worse, so that what is kept is not the last."""
    rows = answers()
    held = answers(6, seed=1).map(lambda row: {"labels": [x if x < 0 else 40 for x in row["labels"]]})
    config = replace(CONFIG, schedule="constant", warmup=0.0, steps=20)
    given: dict[str, Any] = {"held_out": held, "evaluate_every": 1, "quiet": True}

    def stop(step: int, _: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    model, last = decoder(start="paper"), decoder(start="paper")
    with pytest.raises(FinetuneInterrupted) as stopped:
        finetune(model, rows, config, patience=100, on_step=stop, **given)
    with pytest.raises(FinetuneInterrupted) as ended:
        finetune(last, rows, config, on_step=stop, **given)
    history = stopped.value.history
    best = min(history.held_out, key=lambda one: one[1])[0]
    assert len(history) == ended.value.history.kept == 7 and best == history.kept < 6
    straight = decoder(start="paper")
    if best:
        finetune(straight, rows, replace(config, steps=best), quiet=True)
    assert equal(numbers(model), numbers(straight)) and not equal(numbers(last), numbers(model))


def test_gradients_in_parts_are_those_of_the_whole() -> None:
    """Answers have different lengths, so that a mean of means would be another loss."""
    found, losses = [], []
    for accumulate in (1, 2, 3, 100):
        model = exact()
        losses.append(finetune(model, answers(), CONFIG, accumulate=accumulate, quiet=True))
        found.append(numbers(model))
    for other, loss in zip(found[1:], losses[1:], strict=True):
        assert apart(found[0], other) < 1e-9 and loss == pytest.approx(losses[0], rel=1e-9)
    assert apart(found[0], numbers(exact())) > 1e-3


def test_a_step_holds_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_lab.reft._past import AnswersPast

    sizes: Any
    sizes, loss = [], AnswersPast.loss
    monkeypatch.setattr(
        AnswersPast, "loss", lambda self, rows, *a: sizes.append(len(rows)) or loss(self, rows, *a)
    )
    finetune(exact(), answers(), replace(CONFIG, steps=2), accumulate=4, quiet=True)
    assert sizes == [2] * 8


def test_on_step_ends_the_training() -> None:
    assert len(finetune(decoder(), answers(), CONFIG, on_step=lambda step, _: step == 4, quiet=True)) == 5


def test_numbers_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"epochs": 0}, "epochs=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"patience": 0, "held_out": answers()}, "patience=0"),
        ({"patience": 2}, "patience=2 needs held-out examples"),
        ({"evaluate_every": 2}, "evaluate_every=2 needs held-out examples"),
        ({"held_out": []}, "No held-out examples"),
        ({"held_out": [{"prompt": "a"}]}, "held-out examples have .*no input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(decoder(), answers(), CONFIG, quiet=True, **options)


def with_lora() -> ReftModel:
    """ReFT on a model with a LoRA, whose parameters are switched on again after wrapping."""
    torch.manual_seed(0)
    inner = peft.get_peft_model(fresh("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = get_reft_model(inner, ReftConfig(rank=2, layers=(1,), positions="f1+l1", start="paper"))
    assert not model.trained_base_parameters()
    for name, p in inner.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def test_a_lora_beside_the_edits_is_trained_by_the_same_call_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(notices, "_printed", set())
    model = with_lora()
    before = copy.deepcopy(model.base_model.state_dict())
    losses = finetune(model, answers(), CONFIG, accumulate=2, held_out=answers(6, seed=1), quiet=True)
    assert losses[-1] < losses[0]
    moved = {k for k, v in model.base_model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and moved == {k for k in before if "lora_" in k}
    said = capsys.readouterr().err
    assert "6 parameters of the base model require gradients" in said and "save_pretrained" in said
    assert losses.held_out[-1][1] == pytest.approx(loss_of(model, answers(6, seed=1)), rel=1e-5)

    by_hand = with_lora()
    parameters = [*by_hand.adapters.parameters(), *by_hand.trained_base_parameters().values()]
    assert len(parameters) == 6 + 3
    monkeypatch.setattr(notices, "_printed", set())
    model.save_pretrained(tmp_path)
    assert "not saved with it" in capsys.readouterr().err


def test_the_best_of_edits_and_lora_is_given_back() -> None:
    rows, held, model, straight = answers(), answers(4, seed=1), with_lora(), with_lora()
    config = replace(CONFIG, schedule="constant", warmup=0.0, learning_rate=0.5, steps=12, batch_size=2, seed=6)
    history = finetune(model, rows, config, held_out=held, evaluate_every=1, patience=100, quiet=True)
    assert 0 < history.kept < 12, "the test needs a training that does not end at its lowest loss"
    finetune(straight, rows, replace(config, steps=history.kept), quiet=True)
    assert equal(numbers(model), numbers(straight))
    assert equal(dict(model.trained_base_parameters()), dict(straight.trained_base_parameters()))
