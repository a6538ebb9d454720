"""PreparedPairs of one's own, from plain lists of texts."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
from transformers import AutoTokenizer

from subspace_lab.das.encoding import answer_tokens, from_texts
from subspace_lab.das.pairs import Counterfactuals


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(files("subspace_lab") / "assets" / "tiny_decoder"))


def make(tokenizer: Any, **changes: Any) -> Counterfactuals:
    given = {
        "base": ["price : 45 dollars . answer :", "price : 9 dollars ."],
        "source": ["price : 7 dollars . answer :", "price : 80 dollars ."],
        "answer": ["no", "yes"],
        "base_answer": ["yes", "yes"],
        "spans": None,
    }
    return from_texts(tokenizer, **{**given, **changes})


def test_texts_become_pairs(tokenizer: Any) -> None:
    pairs = make(tokenizer)
    assert len(pairs) == 2 and list(pairs.sources) == ["variable"]
    assert [pairs.answers[i] for i in pairs.answer] == ["no", "yes"]
    assert [pairs.answers[i] for i in pairs.base_answer] == ["yes", "yes"]
    ids = pairs.base.inputs["input_ids"][0]
    assert tokenizer.decode(ids) == "price : 45 dollars . answer :"
    assert pairs.base.inputs["attention_mask"].sum(1).tolist() == [7, 5]


def test_positions_by_a_piece_of_text(tokenizer: Any) -> None:
    pairs = make(tokenizer, base=["price : 45 dollars", "the price : 9"], source=["price : 7", "price : 8"],
                 spans={"price": ["price", "price"]})  # fmt: skip
    assert pairs.base.columns["price"].tolist() == [0, 1]
    assert pairs.sources["variable"].columns["price"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"source": ["price : 7"]}, "'variable': 1"),
        ({"spans": {"amount": ["45", "45"]}}, "'amount' is at '45'"),
        ({"answer": ["not a token", "yes"]}, "not one token"),
        ({"base": [], "source": [], "answer": [], "base_answer": []}, "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(tokenizer: Any, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(tokenizer, **changes)


def test_answers_as_text_or_as_they_stand_in_the_vocabulary(tokenizer: Any) -> None:
    assert answer_tokens(tokenizer, ["yes", " no"]).tolist() == tokenizer.convert_tokens_to_ids(["yes", "no"])
    with pytest.raises(ValueError, match="one and the same token"):
        answer_tokens(tokenizer, ["yes", " yes"])


def test_the_mark_of_a_space_is_the_vocabularys_own() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"Ġ": 0, "S": 1, "ĠS": 2, "<unk>": 3}, [("Ġ", "S")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for answer in ("▁S", " S", "ĠS"):
        assert answer_tokens(byte_level, [answer]).tolist() == [2]
    assert answer_tokens(byte_level, ["S"]).tolist() == [1]
