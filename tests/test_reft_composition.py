"""One basis in parts, trained one after the other and used together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import build, editing, fresh, hooked, spots
from test_reft_trainer import trainer
from torch import Tensor

from subspace_lab.core.interventions import Intervention
from subspace_lab.core.parts import PartedSubspace
from subspace_lab.core.sites import Site
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.reft import ReftConfig, ReftModel, finetune, get_reft_model
from subspace_lab.reft.data import pad

SIZES: dict[str, Any] = {"one": 3, "two": 2, "three": 1}
SITE = Site("block_output", 1, "last")


def answering(token: int, rows: int = 16) -> list[dict[str, list[Any]]]:
    """Prompts of 3 to 6 tokens that all have the same answer."""
    generator = torch.Generator().manual_seed(token)
    made = []
    for i in range(rows):
        prompt = torch.randint(20, 60, (3 + i % 4,), generator=generator).tolist()
        ids = [*prompt, token]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + [token]})
    return made


def parted(method: str = "LoReFT", **options: Any) -> ReftModel:
    config = ReftConfig(method, **{"rank": 6, "parts": SIZES, "layers": (1,), "positions": "last", **options})
    return get_reft_model(fresh("llama"), config)


def vectors(edit: Intervention) -> dict[Any, Any]:
    """{part: its basis vectors}, of all parts."""
    return dict(zip(SIZES, edit.subspace.basis().detach().split(list(SIZES.values())), strict=True))


def said(model: ReftModel, rows: list[dict[str, list[Any]]]) -> Any:
    """The share of prompts that are answered with the wanted token."""
    batch = pad([{k: v[:-1] for k, v in row.items() if k != "labels"} for row in rows], 0)
    with torch.no_grad():
        logits = model(**batch).logits
    last = batch["attention_mask"].sum(1) - 1
    wanted = torch.tensor([row["labels"][-1] for row in rows])
    return (logits[torch.arange(len(rows)), last].argmax(-1) == wanted).float().mean().item()


def logits(model: ReftModel) -> Tensor:
    batch = pad([{k: v for k, v in row.items() if k != "labels"} for row in answering(9)], 0)
    with torch.no_grad():
        return model(**batch).logits


QUICK = TrainingConfig(steps=60, learning_rate=0.1, batch_size=16)


def test_parts_are_trained_apart_and_used_apart_or_together() -> None:
    """What one part learned stays its own to the bit while another one learns, and all stay orthogonal."""
    model = parted()
    base = logits(model)
    edit: Any
    (edit,) = model.edits().values()
    model.train_parts("one")
    finetune(model, answering(7), QUICK, quiet=True)
    assert said(model, answering(7)) == 1
    first = logits(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train_parts("two")
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)  # an untrained part is the identity
    finetune(model, answering(11), QUICK, quiet=True)
    assert said(model, answering(11)) == 1 and said(model, answering(7)) == 0
    second = logits(model)
    assert set(edit.value.in_use) == {"two"} and model.subspace(SITE).rank == 2

    model.use_parts("one")
    assert torch.equal(logits(model), first)
    after = model.state_dict()
    assert not any(".three" in k or ".one.weight" in k for k in before if not torch.equal(before[k], after[k]))

    model.use_parts(["one", "two", "three"])
    rows = model.subspace(SITE).basis()
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)
    both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    where = spots("llama", 1)["block_output"]
    last = [[len(row["input_ids"]) - 1] for row in answering(9)]
    batch = pad([{k: v for k, v in row.items() if k != "labels"} for row in answering(9)], 0)

    def formula(h: Tensor) -> Tensor:
        total, x = h.double(), h.double()
        for name, r in vectors(edit).items():
            value = edit.value.values[name]
            z = x @ value.weight.double().T + value.bias.double() - x @ r.double().T
            total = total + z @ r.double()
        return total.to(h.dtype)

    with torch.no_grad(), hooked(model.base_model, {where: editing(formula, last, where)}):
        expected = model.base_model(**batch).logits
    torch.testing.assert_close(both, expected, atol=2e-4, rtol=2e-4)


def test_a_part_that_learned_before_may_learn_more_without_moving_the_others() -> None:
    model = parted()
    for part, token in (("one", 7), ("two", 11)):
        model.train_parts(part)
        finetune(model, answering(token), QUICK, quiet=True)
    second = logits(model)
    model.train_parts("one")
    finetune(model, answering(5), QUICK, quiet=True)
    assert said(model, answering(5)) == 1
    model.use_parts("two")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-5)
    model.use_parts(list(SIZES))
    rows = model.subspace(SITE).basis()
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["LoReFT", "ConsReFT", "LobiReFT"])
def test_parts_that_rest_stay_under_weight_decay_and_another_optimiser(method: str, tmp_path: Path) -> None:
    model = parted(method)
    model.train_parts("two")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".two" in n for n in trained)
    (edit,) = model.edits().values()
    rows = {k: v.clone() for k, v in vectors(edit).items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = Dataset.from_list(answering(7))
    trainer(model, tmp_path, data, max_steps=5, weight_decay=0.5, learning_rate=0.05).train()
    found = vectors(edit)
    assert torch.equal(found["one"], rows["one"]) and torch.equal(found["three"], rows["three"])
    assert not torch.equal(found["two"], rows["two"])
    stays = [k for k in state if ".one" in k or ".three" in k]
    assert len(stays) >= 4 and all(torch.equal(model.state_dict()[k], state[k]) for k in stays)
    # Activating the adapter again asks for gradients of the moving part alone.
    model.set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("trained", [["one"], ["three", "one"], list(SIZES)], ids=str)
def test_saved_in_the_middle_of_its_trainings(trained: list[str], tmp_path: Path) -> None:
    model = parted()
    model.train_parts("two")
    finetune(model, answering(11), QUICK, quiet=True)
    model.train_parts(trained)
    finetune(model, answering(7), TrainingConfig(steps=5, learning_rate=0.1, batch_size=16), quiet=True)
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(fresh("llama"), tmp_path)
    for names in ("one", "two", ["two", "three"], list(SIZES)):
        model.use_parts(names)
        again.use_parts(names)
        assert torch.equal(logits(again), logits(model))


def test_counts_starts_and_refusals() -> None:
    model = parted()
    assert model.get_nb_trainable_parameters()[0] == 2 * 32 * 6 + 6
    model.train_parts("three")
    assert model.get_nb_trainable_parameters()[0] == 2 * 32 + 1
    weights = [v.weight for v in parted(start="paper").adapter("default").edits[0].value.values.values()]  # type: ignore[union-attr, operator]
    assert not torch.equal(weights[1][:1], weights[2])
    for verb in (model.train_parts, model.use_parts):
        with pytest.raises(ValueError, match=r"Parts \['four'\] asked for; there are \['one', 'two', 'three'\]"):
            verb("four")
        with pytest.raises(ValueError, match=r"Parts \[\]"):
            verb([])
    plain = get_reft_model(build("llama"), ReftConfig(rank=2))
    with pytest.raises(ValueError, match="0 of the adapters"):
        plain.use_parts("one")
    with pytest.raises(ValueError, match="rank 6 asked for a stream of width 4"):
        PartedSubspace(4, SIZES)
    incomplete = {k: v for k, v in model.state_dict().items() if not k.endswith("moving")}
    with pytest.raises(RuntimeError, match="moving"):
        model.load_state_dict(incomplete)
