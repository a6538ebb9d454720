"""Counterfactual pairs in three splits: what is one split's own, one list of answers, and what identifies the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_sweeps import ANSWERS, LETTERS, PAIRS, batch_of, counterfactuals, pairs
from torch import Tensor

from subspace_lab.das.pairs import SURPLUS, Counterfactuals, Pairs
from subspace_lab.model.batches import Batch


def small(n: int = 4, **changes: Any) -> Counterfactuals:
    """Pairs of a plain module."""
    numbers = torch.arange(2.0 * n).view(n, 2)
    zeros = torch.zeros(n, dtype=torch.long)
    made = Counterfactuals(Batch.of(numbers), {"v": Batch.of(-numbers)}, zeros, zeros, ("a", "b"))
    return replace(made, **changes)


def keys(data: Counterfactuals) -> list[tuple[int, ...]]:
    """Each pair as the ids of its base and its sources."""
    batches = [data.base, *data.sources.values()]
    return [tuple(x for b in batches for x in b.inputs["input_ids"][i].tolist()) for i in range(len(data))]


# --- one split ----------------------------------------------------------------------------------------------


def test_pairs_are_cut_with_all_they_hold() -> None:
    data = counterfactuals(0, ("v", "w"))
    index = torch.tensor([5, 5, 0])
    cut = data.rows(index)
    assert len(cut) == 3 and cut.answers == data.answers and cut.tokens is data.tokens
    for whole, part in ((data.base, cut.base), *zip(data.sources.values(), cut.sources.values(), strict=True)):
        assert torch.equal(part.inputs["input_ids"], whole.inputs["input_ids"][index])
    for name in ("answer", "base_answer"):
        assert torch.equal(getattr(cut, name), getattr(data, name)[index])
    assert all(torch.equal(cut.values[name], data.values[name][index]) for name in ("v", "w"))


def test_pairs_move_to_a_device_whole() -> None:
    moved = counterfactuals(0).to("meta")
    found = [
        moved.answer,
        moved.base_answer,
        moved.base.inputs["input_ids"],
        moved.sources["v"].inputs["input_ids"],
    ]
    assert all(tensor.is_meta for tensor in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "at least one variable"),
        ({"sources": {"v": Batch.of(torch.zeros(3, 2))}}, "4 bases and 3 sources for 'v'"),
        ({"values": {"v": torch.zeros(3)}}, r"Values of shape \(3,\) for 'v'.*each of the 4 pairs"),
        ({"values": {"u": torch.zeros(4)}}, r"for 'u'.*variables \['v'\]"),
        (
            {"answer": torch.zeros(3, dtype=torch.long)},
            r"^answer has shape \(3,\).*each of the 4 pairs.*from 0 to 1",
        ),
        ({"base_answer": torch.tensor([0, 1, 2, 0])}, "base_answer has shape .*2 answers"),
        ({"answer": torch.tensor([0, 1, -1, 0])}, "^answer has shape .*from 0 to 1"),
        ({"tokens": torch.tensor([7])}, r"\(1,\) tokens for 2 answers"),
    ],
)
def test_pairs_that_do_not_pair_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


# --- three splits -------------------------------------------------------------------------------------------


def test_splits_keep_what_they_were_given() -> None:
    given = pairs(("v", "w"), task="letters")
    assert given.variables == ["v", "w"] and given.task == "letters"
    assert isinstance(given.train, Counterfactuals)
    assert torch.equal(given.train.answer, counterfactuals(0, ("v", "w")).answer)
    assert torch.equal(given.dev.answer, counterfactuals(2, ("v", "w")).answer)
    assert torch.equal(given.test.answer, counterfactuals(1, ("v", "w")).answer)
    stream = lambda step: counterfactuals(step)  # noqa: E731
    assert pairs(train=stream).train is stream


@pytest.mark.parametrize("which", ["train", "dev", "test"])
def test_splits_that_do_not_belong_together_are_refused(which: str) -> None:
    with pytest.raises(ValueError, match=f"The {which} split has no pairs"):
        pairs(**{which: counterfactuals(0).rows(torch.tensor([], dtype=torch.long))})  # type: ignore[arg-type]
    other = "train" if which == "test" else which
    with pytest.raises(ValueError, match=f"The {other} split has the variables"):
        pairs(**{which: counterfactuals(0, ("u",))})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"The (train|dev) split has the variables"):
        pairs(("v", "w"), **{which: counterfactuals(0, ("w", "v"))})  # their order is that of the parts


def test_another_kind_of_split_is_refused() -> None:
    with pytest.raises(TypeError, match=r"The dev split is a function; needed are Counterfactuals"):
        Pairs.__post_init__(_unchecked(dev=lambda step: counterfactuals(step)))


def _unchecked(**splits: object) -> Pairs:
    """Splits past the shape checks of the tests, which would refuse them first."""
    made = object.__new__(Pairs)
    for name, value in {**vars(pairs()), **splits}.items():
        object.__setattr__(made, name, value)
    return made


# --- one list of answers ------------------------------------------------------------------------------------


def told(data: Counterfactuals, index: Tensor) -> list[tuple[str, int]]:
    """Answers as (text, token)."""
    assert data.tokens is not None
    return [(data.answers[i], int(data.tokens[i])) for i in index]


def test_splits_with_other_answers_get_one_list() -> None:
    """The meaning of each answer stays; what it is scored against is the same in all splits."""
    train = replace(counterfactuals(0), answers=LETTERS[::-1], tokens=ANSWERS.flip(0))
    dev = counterfactuals(2)
    few = torch.randint(0, 3, (PAIRS,), generator=torch.Generator().manual_seed(0))
    test = replace(counterfactuals(1), base_answer=few, answer=few.flip(0), answers=("c", "x", "a"),
                   tokens=torch.tensor([9, 40, 7]))  # fmt: skip
    joined = Pairs(train, dev, test)
    assert isinstance(joined.train, Counterfactuals)
    assert joined.train.answers == joined.dev.answers == joined.test.answers == (*LETTERS[::-1], "x")
    for before, after in ((train, joined.train), (dev, joined.dev), (test, joined.test)):
        assert after.tokens is not None
        assert isinstance(after, Counterfactuals)
        assert after.tokens.tolist() == [*range(18, 6, -1), 40]
        assert told(after, after.answer) == told(before, before.answer)
        assert told(after, after.base_answer) == told(before, before.base_answer)
        assert torch.equal(after.base.inputs["input_ids"], before.base.inputs["input_ids"])
    assert test.tokens is not None
    assert train.answers == LETTERS[::-1] and test.tokens.tolist() == [
        9,
        40,
        7,
    ]  # the caller's own are as they were


def test_equal_answers_are_left_alone() -> None:
    dev = counterfactuals(2)
    assert pairs(dev=dev).dev is dev


def test_answers_that_are_no_tokens_cannot_be_joined() -> None:
    one, other = small(), replace(small(), answers=("b", "a"))
    assert Pairs(one, one, one).test is one
    with pytest.raises(ValueError, match=r"different answers: .*'dev': \['b', 'a'\].*'test': \['a', 'b'\]"):
        Pairs(one, other, one)
    with pytest.raises(ValueError, match="different answers"):
        Pairs(one, replace(one, tokens=torch.tensor([3, 4])), one)


# --- one set drawn into three -------------------------------------------------------------------------------


def doubled() -> Counterfactuals:
    """60 pairs, of which the first ten stand there three times."""
    whole = counterfactuals(0)
    return whole.rows(torch.tensor([*range(PAIRS), *range(10), *range(10)]))


def test_a_split_shares_no_pair_and_loses_none() -> None:
    data = doubled()
    found = Pairs.split(data, dev=0.2, test=0.3, seed=1, task="t")
    assert isinstance(found.train, Counterfactuals)
    parts = [set(keys(split)) for split in (found.train, found.dev, found.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [len(part) for part in parts] == [30, 12, 18]
    assert isinstance(found.train, Counterfactuals)
    every = [key for split in (found.train, found.dev, found.test) for key in keys(split)]
    assert sorted(every) == sorted(keys(data)) and found.task == "t"


def test_a_split_is_its_seed() -> None:
    data = counterfactuals(0)
    one, same, other = (Pairs.split(data, seed=seed) for seed in (0, 0, 1))
    assert keys(one.dev) == keys(same.dev) != keys(other.dev)
    assert isinstance(one.train, Counterfactuals)
    assert [len(one.train), len(one.dev), len(one.test)] == [36, 9, 15]


def test_padding_makes_no_pair_another() -> None:
    """The same text, padded to another length or with another token, is the same pair."""
    ids = torch.tensor([[5, 6, 0], [5, 6, 9], [5, 6, 7], [4, 4, 4]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    batch = Batch({"input_ids": ids, "attention_mask": mask})
    zeros = torch.zeros(4, dtype=torch.long)
    data = Counterfactuals(batch, {"v": batch_of(torch.ones(4, 3, dtype=torch.long))}, zeros, zeros, ("a",))
    for seed in range(4):
        found = Pairs.split(data, dev=1 / 3, test=1 / 3, seed=seed)
        masks = [
            split.base.inputs["attention_mask"].sum(1).tolist()  # type: ignore[union-attr]
            for split in (found.train, found.dev, found.test)
        ]
        assert sorted(masks) == [[2, 2], [3], [3]]


def test_pairs_of_a_plain_module_and_of_embeddings_are_split() -> None:
    found = Pairs.split(small(10), dev=0.2, test=0.2)
    assert isinstance(found.train, Counterfactuals)
    every = torch.cat([s.base.positional for s in (found.train, found.dev, found.test)])  # type: ignore[misc]
    assert torch.equal(every.sort(0).values, small(10).base.positional)  # type: ignore[arg-type]
    states = torch.arange(60.0).view(10, 3, 2)
    batch = Batch({"inputs_embeds": states})
    data = replace(small(10), base=batch, sources={"v": batch})
    found = Pairs.split(data, dev=0.2, test=0.2)
    assert isinstance(found.train, Counterfactuals)
    assert [len(found.train), len(found.dev), len(found.test)] == [6, 2, 2]


@pytest.mark.parametrize(
    ("dev", "test"), [(0.0, 0.3), (0.3, 0.0), (0.5, 0.5), (0.9, 0.9), (-0.5, 0.2), (0.001, 0.2)]
)
def test_shares_that_leave_a_split_empty_are_refused(dev: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"dev={dev} and test={test} of 60 different pairs leave a split without"):
        Pairs.split(counterfactuals(0), dev=dev, test=test)


# --- fingerprint --------------------------------------------------------------------------------------------


def changed(tensor: Tensor) -> Tensor:
    """One number of a tensor changed."""
    new = tensor.clone()
    flat = new.view(-1)
    flat[-1] = ~flat[-1] if new.dtype == torch.bool else flat[-1] - 1 if flat[-1] > 0 else flat[-1] + 1
    return new


def variants(data: Counterfactuals) -> dict[str, Counterfactuals]:
    """The pairs with each of their tensors changed in one number."""

    def in_batch(batch: Batch, **fields: Any) -> Batch:
        return replace(batch, **fields)

    ids, mask = data.base.inputs["input_ids"], data.base.inputs["attention_mask"]
    at = torch.ones(len(data), dtype=torch.long)
    source = data.sources["v"]
    named = replace(data, base=in_batch(data.base, columns={"name": at}))
    assert data.tokens is not None
    return {
        "base ids": replace(
            data, base=in_batch(data.base, inputs={"input_ids": changed(ids), "attention_mask": mask})
        ),
        "base mask": replace(
            data, base=in_batch(data.base, inputs={"input_ids": ids, "attention_mask": changed(mask)})
        ),
        "source": replace(
            data,
            sources={
                **data.sources,
                "v": in_batch(source, inputs={**source.inputs, "input_ids": changed(source.inputs["input_ids"])}),
            },
        ),
        "sources turned round": replace(data, sources={"v": data.sources["w"], "w": data.sources["v"]}),
        "answer": replace(data, answer=changed(data.answer)),
        "base answer": replace(data, base_answer=changed(data.base_answer)),
        "tokens": replace(data, tokens=changed(data.tokens)),
        "value": replace(data, values={**data.values, "v": changed(data.values["v"])}),
        "no values": replace(data, values={}),
        "prompt lengths": replace(data, base=in_batch(data.base, prompt_lengths=at)),
        "position": named,
        "other position": replace(named, base=in_batch(named.base, columns={"name": changed(at)})),
        "position's name": replace(named, base=in_batch(named.base, columns={"title": at})),
    }


@pytest.mark.parametrize("which", ["train", "dev", "test"])
def test_a_fingerprint_changes_with_every_tensor(which: str) -> None:
    data = counterfactuals(3, ("v", "w"))
    whole = pairs(("v", "w"))
    given: dict[str, Any] = {"train": whole.train, "dev": whole.dev, "test": whole.test, which: data}
    found = {"as it is": Pairs(**given).fingerprint()}
    found |= {what: Pairs(**{**given, which: one}).fingerprint() for what, one in variants(data).items()}
    assert len(set(found.values())) == len(found), found
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in found.values())


def test_a_fingerprint_is_of_the_data_alone() -> None:
    one, again = pairs(), pairs(task="another name")
    assert one.fingerprint() == again.fingerprint()
    moved: dict[str, Any] = {"train": one.dev, "dev": one.train, "test": one.test}
    assert Pairs(**moved).fingerprint() != one.fingerprint()
    stream = pairs(train=lambda step: counterfactuals(step))
    assert stream.fingerprint() == pairs(train=lambda step: counterfactuals(9)).fingerprint() != one.fingerprint()
    plain = Pairs(small(), small(), small())
    assert Pairs(small(), small(), small(base=Batch.of(torch.ones(4, 2)))).fingerprint() != plain.fingerprint()


def test_labels_follow_their_pairs_and_are_part_of_the_fingerprint() -> None:
    one = small(labels={"entity": ("a", "b", "a", "c")})
    assert one.rows(torch.tensor([3, 0])).labels == {"entity": ("c", "a")}
    plain, labelled = Pairs(small(), small(), small()), Pairs(one, small(), small())
    assert plain.fingerprint() != labelled.fingerprint()


def test_kinds_are_the_labels_or_whether_the_answer_changes() -> None:
    data = small(answer=torch.tensor([0, 1, 0, 1]))
    assert set(data.kinds) <= {"changes", "stays"}
    assert [kind == "changes" for kind in data.kinds] == (data.answer != data.base_answer).tolist()
    assert replace(data, labels={"kind": ("x", "y", "x", "y")}).kinds == ("x", "y", "x", "y")


def test_labels_of_another_number_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 labels 'entity' for 4 pairs"):
        small(labels={"entity": ("a", "b")})


# --- held out and even --------------------------------------------------------------------------------------


def crossed(n: int = 90, entities: int = 12) -> Counterfactuals:
    """Pairs whose base and source have an entity each."""
    g = torch.Generator().manual_seed(5)
    data = counterfactuals(4, n=n)
    both = torch.randint(0, entities, (2, n), generator=g).tolist()
    labels = {"entity": tuple(f"e{i}" for i in both[0]), "source_entity": tuple(f"e{i}" for i in both[1])}
    return replace(data, labels={**labels, "template": tuple(f"t{i % 5}" for i in range(n))})


@pytest.mark.parametrize("by", ["entity", "template", "answer", ("entity", "template")])
@pytest.mark.parametrize("seed", range(3))
def test_splits_share_no_value_that_is_held_out(by: str | tuple[str, ...], seed: int) -> None:
    data = crossed(600)
    made = Pairs.split(data, by=by, seed=seed)
    assert isinstance(made.train, Counterfactuals)
    splits = (made.train, made.dev, made.test)

    def values(split: Counterfactuals, name: str) -> set[str]:
        if name == "answer":
            return {split.answers[i] for i in (*split.answer.tolist(), *split.base_answer.tolist())}
        return set(split.labels[name]) | set(split.labels["source_entity"] if name == "entity" else ())

    for name in (by,) if isinstance(by, str) else by:
        found = [values(split, name) for split in splits]
        assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    assert sum(made.dropped.values()) == 600 - sum(map(len, splits))
    assert (sum(made.dropped.values()) > 0) == (by != "template")
    original = set(keys(data))
    assert all(set(keys(split)) <= original for split in splits)


def test_what_cannot_be_held_out_is_refused() -> None:
    data = crossed()
    with pytest.raises(ValueError, match=r"by='colour': the pairs have the labels \['entity', 'source_"):
        Pairs.split(data, by="colour")
    two = replace(data, labels={"entity": tuple("ab"[i % 2] for i in range(90))})
    with pytest.raises(ValueError, match=r"2 different values \(a, b\) for three splits"):
        Pairs.split(two, by="entity")


@pytest.mark.parametrize("seed", range(3))
def test_balanced_pairs_are_as_even_as_half_of_them_allows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 200
    few = (torch.rand(n, generator=g) < 0.3).long()
    data = replace(counterfactuals(seed, n=n), base_answer=(torch.rand(n, generator=g) < 0.4).long(), answer=few)

    def cells(of: Counterfactuals) -> list[int]:
        both = list(zip(of.answer.tolist(), (of.answer != of.base_answer).tolist(), strict=True))
        return sorted(both.count(cell) for cell in set(both))

    made = data.balanced(seed)
    before, after = cells(data), cells(made)
    assert len(after) == len(before) == 4 and len(made) >= n / 2
    level = after[-1]
    assert after == sorted(min(size, level) for size in before)  # the fullest gave, no other
    assert level == before[0] or sum(min(size, level - 1) for size in before) < n / 2
    assert keys(made) == [key for key in keys(data) if key in set(keys(made))]
    assert keys(data.balanced(seed)) == keys(made) != keys(data.balanced(seed + 1))


def test_a_split_can_be_balanced_and_counts_what_leaves() -> None:
    data = replace(counterfactuals(0, n=200), answer=(torch.arange(200) % 5 == 0).long())
    made = Pairs.split(data, balance=True)
    lost = made.dropped[SURPLUS]
    assert isinstance(made.train, Counterfactuals)
    assert lost == 200 - sum(map(len, (made.train, made.dev, made.test))) > 0
    assert f"left out: {lost} pairs, so that each answer" in repr(made) and "balance=False keeps them" in repr(
        made
    )


def test_many_answers_are_left_as_they_are() -> None:
    """Of 100 answers none is worth anything as a constant one: evenness would only cost pairs."""
    n = 300
    g = torch.Generator().manual_seed(0)
    data = replace(
        counterfactuals(0, n=n), answers=tuple(map(str, range(100))), tokens=None,
        base_answer=torch.randint(0, 100, (n,), generator=g), answer=torch.randint(0, 100, (n,), generator=g),
    )  # fmt: skip
    assert len(data.balanced()) == n
    often = replace(data, answer=torch.where(torch.arange(n) % 2 == 0, 0, data.answer))
    kept = often.balanced()
    share = (kept.answer == 0).float().mean().item()
    assert len(kept) >= n / 2 and share < 0.5 * (often.answer == 0).float().mean().item()


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="needed is a share of the pairs"):
        Pairs.split(counterfactuals(0), dev=share)
