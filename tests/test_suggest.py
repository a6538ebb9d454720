"""Settings that are tried: they are those of `finetune`, the model stays as it was, and noise is called noise."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import fresh
from test_reft_trainer import answers
from torch import nn

from subspace_lab.core.estimates import Estimate
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model, suggest, suggesting
from subspace_lab.reft._past import AnswersPast
from subspace_lab.reft.suggestions import Suggestion, Trial

SHORT = TrainingConfig(steps=4, batch_size=6, seed=3)
SETTINGS = [
    ReftConfig(rank=2, layers=(1,), positions="last"),
    ReftConfig(rank=2, positions="f1+l1"),
    ReftConfig(rank=2, layers=(0, 2), component="mlp_output", positions="all", every_token=True, bias=False),
]


def tried(model: Any, **options: Any) -> Suggestion:
    given: dict[str, Any] = {
        "settings": SETTINGS,
        "training": SHORT,
        "learning_rates": [3e-3, 3e-2],
        "quiet": True,
    }
    return suggest(model, answers(), **{**given, **options})


def state(
    model: Any,
) -> tuple[
    dict[Any, tuple[Any, list[Any], int, int, type[Any]]], list[tuple[Any, Any, bool]], list[Any], list[Any]
]:
    """All that a model holds: tensors, modes, gradient flags and the attributes of its modules."""
    own = {
        name: (m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
        for name, m in model.named_modules()
    }
    flags = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return own, flags, torch.get_rng_state().tolist(), list(model.state_dict())


def mixed(kind: str = "gpt2") -> Any:
    """A model whose modes and flags are mixed, as a user may have set them."""
    model = fresh(kind)
    Backbone(model)  # nnsight's own attributes stay with a model from its first use on
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    model.get_decoder().h[1].train()
    return model


def test_the_losses_are_those_of_finetune_by_hand() -> None:
    base = fresh("llama", torch.float64)
    found = tried(base)
    rows = answers()
    assert not set(found.training_rows) & set(found.held_out_rows)
    assert len(found.training_rows) + len(found.held_out_rows) == len(rows)
    held = [rows[i] for i in found.held_out_rows]
    for trial in found.trials:
        by_hand = get_reft_model(fresh("llama", torch.float64), trial.config)
        finetune(by_hand, [rows[i] for i in found.training_rows], trial.training, quiet=True)
        assert loss_of(by_hand, held) == pytest.approx(trial.loss.value, rel=1e-6)
        assert trial.parameters == by_hand.get_nb_trainable_parameters()[0]
        other = {3e-3: 3e-2, 3e-2: 3e-3}[trial.training.learning_rate]
        again = get_reft_model(fresh("llama", torch.float64), trial.config)
        slower = replace(trial.training, learning_rate=other)
        finetune(again, [rows[i] for i in found.training_rows], slower, quiet=True)
        assert loss_of(again, held) > trial.loss.value
    plain = get_reft_model(base, ReftConfig(rank=1))
    with plain.disable_adapter():
        assert loss_of(plain, held) == pytest.approx(found.untrained.value, rel=1e-6)


def loss_of(model: ReftModel, rows: list[Any]) -> float:
    """The mean over all answers' tokens, one row at a time, by the wrapped model's own forward."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(ids, prompt_lengths=(labels == -100).sum(1)).logits[0, :-1].double().log_softmax(-1)
        there = labels[0, 1:] != -100
        total -= float(logits[there, labels[0, 1:][there]].sum())
        count += int(there.sum())
    return total / count


def test_the_same_seeds_give_the_same_table() -> None:
    one, again = tried(fresh("llama")), tried(fresh("llama"))
    other = tried(fresh("llama"), training=TrainingConfig(steps=4, batch_size=6, seed=4))
    told = [
        [{k: v for k, v in r.items() if k not in ("seconds", "chosen")} for r in s.records()] for s in (one, again)
    ]
    assert told[0] == told[1] and json.dumps(told[0])
    assert one.held_out_rows != other.held_out_rows


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was(failure: type[Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    weights, before = copy.deepcopy(model.state_dict()), state(model)
    if failure is None:
        tried(model, settings=None, config=ReftConfig(rank=2, dropout=0.1))
    else:
        step = torch.optim.AdamW.step
        made = []

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(1)
            if len(made) == 6:
                raise failure("in the middle")
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(failure, match="middle"):
            tried(model)
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_failure_while_the_adapter_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    before = state(model)

    def failing(*_: Any) -> None:
        for p in model.parameters():
            p.requires_grad_(False)
        raise KeyboardInterrupt

    monkeypatch.setattr(suggesting, "get_reft_model", failing)
    with pytest.raises(KeyboardInterrupt):
        tried(model)
    assert state(model) == before


def test_the_usual_settings_fit_the_model() -> None:
    found = tried(fresh("llama"), settings=None, config=ReftConfig(rank=4), learning_rates=[1e-2])
    configs = [trial.config for trial in found.trials]
    assert ReftConfig(rank=4) in configs and len(configs) == len(set(configs)) >= 8
    assert {trial.mergeable for trial in found.trials} == {True, False}
    assert all(t.mergeable == (t.config.component == "mlp_output") for t in found.trials)
    ranks = {c.rank for c in suggesting.usual_settings(Backbone(fresh("llama")), ReftConfig(rank=20))}
    assert ranks == {1, 20}, "80 is above the width"
    red = suggesting.usual_settings(Backbone(fresh("llama")), ReftConfig(method="RED"))
    assert {c.rank for c in red} == {4}


def made(values: list[Any], parameters: list[Any], seconds: list[Any], lows: list[Any]) -> Suggestion:
    trials = []
    for v, p, s, low in zip(values, parameters, seconds, lows, strict=True):
        behind = Estimate(v - values[0], low, v - values[0] + 1, 40)
        trials.append(Trial(ReftConfig(rank=p), SHORT, p, Estimate(v, v, v, 40), behind, s, False))
    one = Estimate(1.0, 0.5, 1.5, 40)
    return Suggestion(tuple(trials), one, one, tuple(range(9)), tuple(range(40)))


def test_the_smallest_within_noise_is_taken() -> None:
    found = made([1.0, 1.1, 1.2, 1.3, 2.0], [9, 5, 5, 7, 1], [1.0, 3.0, 2.0, 1.0, 0.1], [0, -0.1, 0.0, -0.2, 0.5])
    assert found.chosen is found.trials[2] and found.best.rank == 5
    assert "The first 4 settings cannot be told apart on 40 held-out rows" in str(found)
    clear = made([1.0, 1.1, 1.2], [9, 5, 4], [1.0, 1.0, 1.0], [0, 0.05, 0.1])
    assert clear.chosen is clear.trials[0] and "is better than each of the others" in str(clear)
    gap = made([1.0, 1.1, 1.2], [9, 5, 4], [1.0, 1.0, 1.0], [0, 0.05, -0.1])
    assert gap.chosen is gap.trials[2] and "The 2 settings marked * and ≈" in str(gap)


def test_intervals_are_paired_over_rows() -> None:
    """Rows differ much in their losses, and settings by the same amount in each row: the difference is sure."""
    owners = torch.arange(30).repeat_interleave(2)
    level = torch.linspace(0, 20, 30).double().repeat_interleave(2)
    runs = [
        suggesting._Run(ReftConfig(rank=r), SHORT, r, level + shift, 1.0, False)
        for r, shift in ((3, 0.1), (2, 0.0), (1, 0.3))
    ]
    found = suggesting._suggestion(runs, (level + 0.2, owners), (range(9), range(30)))
    assert [t.config.rank for t in found.trials] == [2, 3, 1] and found.best.rank == 2
    assert found.trials[1].loss.low < found.trials[0].loss.value
    assert found.trials[1].behind.low == pytest.approx(0.1) and found.gain.low == pytest.approx(0.2)
    assert found.trials[0].loss.n == 30
    assert found.trials[0].behind == Estimate(0.0, 0.0, 0.0, 30)  # of itself: no interval


def test_a_rate_that_diverges_counts_for_nothing_and_all_that_diverge_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = AnswersPast.loss
    high: list[Any] = []

    def diverging(self: Any, rows: Any, edits: Any, items: Any = None) -> Any:
        found, logits = loss(self, rows, edits, items)
        return (found * float("nan") if high[-1](edits) else found), logits

    monkeypatch.setattr(AnswersPast, "loss", diverging)
    high.append(lambda _: True)
    with pytest.raises(FloatingPointError, match="No setting gave a finite loss"):
        tried(fresh("llama"))
    high.append(lambda edits: len(edits) == 3)
    found = tried(fresh("llama"))
    assert found.trials[-1].config == SETTINGS[1] and found.trials[-1].loss.n == 0 and not found.trials[-1].tied
    assert "not finite" in str(found) and json.dumps(found.records(), allow_nan=False)


def test_nothing_learned_is_said() -> None:
    found = tried(fresh("llama"), learning_rates=[1e-9])
    assert "No setting is better than the model without edits" in str(found)


def test_what_cannot_be_tried_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fresh("llama")
    monkeypatch.setattr(suggesting, "AnswersPast", None)  # the first work
    rows = answers()
    same = [rows[0]] * 5
    for options, error, message in (
        ({"settings": [ReftConfig(rank=33)]}, ValueError, "width 32"),
        ({"settings": [ReftConfig(layers=(0, 9))]}, IndexError, "layers 0 to 2"),
        ({"settings": [*SETTINGS, ReftConfig(positions="7")]}, IndexError, "7"),
        ({"settings": [ReftConfig(modules_to_save=("lm_head",))]}, ValueError, "modules_to_save"),
        ({"settings": []}, ValueError, "0 settings"),
        ({"config": ReftConfig()}, ValueError, "one of the two"),
        ({"learning_rates": []}, ValueError, "0 learning rates"),
        ({"learning_rates": [-1.0]}, ValueError, "learning_rate"),
        ({"held_out": 24}, ValueError, "24 rows are too few to hold out 24"),
        ({"held_out": 0}, ValueError, "held_out=0"),
    ):
        with pytest.raises(error, match=message):
            tried(base, **options)
    with pytest.raises(ValueError, match="1 rows are too few"):
        suggest(base, rows.select([0]))
    with pytest.raises(ValueError, match="No examples"):
        suggest(base, [])
    with pytest.raises(ValueError, match="5 rows are the same"):
        suggest(base, same)
    with pytest.raises(ValueError, match="no input_ids"):
        suggest(base, [{"prompt": "a", "answer": "b"}] * 9)
    with pytest.raises(TypeError, match="unload"):
        suggest(get_reft_model(base, ReftConfig(rank=2)), rows)
    assert isinstance(base, nn.Module)
