"""Pairs of one's own, from plain lists of texts."""

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
    given: dict[str, Any] = {
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
        ({"spans": {"amount": ["45", "45"]}}, "'amount' is the text '45'"),
        ({"answer": ["not a token", "yes"]}, "'not a token' cannot be written"),
        ({"base": [], "source": [], "answer": [], "base_answer": []}, "at least one"),
        ({"base": ["price : 45 dollars", ""]}, "Text 1 is '': it has no token"),
        (
            {"source_answer": {"other": ["no", "yes"]}},
            r"source_answer has \['other'\]; the variables are",
        ),
        ({"spans": {"amount": [[0, 1, 2], [0, 1]]}}, r"is \[0, 1, 2\]; needed is a piece of text, or its"),
        ({"answer": ["\ud800", "yes"]}, "half of a character"),
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
    # Plain text is what follows a space, unless the prompts end with one.
    assert answer_tokens(byte_level, ["S"], ["S"]).tolist() == [2]
    assert answer_tokens(byte_level, ["S"], ["S "]).tolist() == [1]
    with pytest.raises(ValueError, match="end all of them alike"):
        answer_tokens(byte_level, ["S"], ["S ", "S"])


def pieces(vocabulary: list[str], **options: Any) -> Any:
    """A tokenizer whose pieces carry the space before them as ▁."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    table = [(piece, float(len(piece))) for piece in ["<unk>", "<s>", "</s>", *vocabulary]]
    inner = Tokenizer(models.Unigram(table, unk_id=0))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Metaspace()
    template = options.pop("template", "<s> $A")
    special = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


WORDS = ["▁the", "▁girl", "▁boy", "▁smiled", "▁she", "▁he", "he", "▁Paris", "Rome", "▁Ann", "▁Bo"]


def test_answers_are_tokens_of_one_kind() -> None:
    """The vocabulary has "he" inside words as well; beside "▁she" only "▁he" is the same kind of token."""
    tokenizer = pieces(WORDS)
    she, he = tokenizer.convert_tokens_to_ids(["▁she", "▁he"])
    assert answer_tokens(tokenizer, ["she", "he"]).tolist() == [she, he]
    assert answer_tokens(tokenizer, ["he"]).tolist() == [he]
    made = from_texts(tokenizer, base=["the girl"], source=["the boy"], answer=["he"], base_answer=["she"])
    assert made.tokens is not None
    assert made.tokens.tolist() == [she, he]
    # Without a token for Rome behind a space, the space is one of its own.
    both = pieces([*WORDS, *dict.fromkeys("▁.ParisRome")])
    ids = answer_tokens(both, ["Paris", "Rome"]).tolist()
    assert both.convert_ids_to_tokens(ids[1]) == ["▁", "Rome"]
    assert both.convert_ids_to_tokens(ids[0][:1]) == ["▁Paris"] and ids[0][1] == -1


@pytest.mark.parametrize("text", ["the girl smiled", "<s> the girl smiled"])
def test_one_beginning_of_text_is_enough(text: str) -> None:
    tokenizer = pieces([*WORDS, "▁"])
    made = from_texts(tokenizer, base=[text], source=[text], answer=["he"], base_answer=["she"])
    ids = made.base.inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    bare = from_texts(
        tokenizer,
        base=["the girl"],
        source=["the boy"],
        answer=["he"],
        base_answer=["she"],
        add_special_tokens=False,
    )
    assert tokenizer.bos_token_id not in bare.base.inputs["input_ids"][0].tolist()


def test_an_end_of_text_behind_a_prompt_is_no_part_of_it() -> None:
    tokenizer = pieces(WORDS, template="<s> $A </s>")
    made = from_texts(
        tokenizer, base=["the girl", "the girl smiled"], source=["the boy", "the boy smiled"], answer=["he", "he"],
        base_answer=["she", "she"],
    )  # fmt: skip
    assert made.base.inputs["attention_mask"].sum(1).tolist() == [4, 5]
    assert made.base.prompt_lengths is not None and made.base.prompt_lengths.tolist() == [3, 4]
    index = made.readout.index
    assert index is not None
    read = made.base.inputs["input_ids"].gather(1, index)[:, 0].tolist()
    assert tokenizer.convert_ids_to_tokens(read) == ["▁girl", "▁smiled"]
    # The control: where the text itself ends so, that is its last token.
    own = from_texts(pieces(WORDS), base=["the</s>"], source=["the</s>"], answer=["he"], base_answer=["she"])
    assert own.base.prompt_lengths is None


def test_a_position_may_be_elsewhere_in_base_and_source(tokenizer: Any) -> None:
    texts: dict[str, Any] = {
        "base": ["price : 45 dollars", "the price : 9"],
        "source": ["the price : 7", "price : 80 dollars"],
    }
    by_hand = make(tokenizer, **texts, spans={"amount": {"base": ["45", "9"], "source": ["7", "80"]}})
    named = make(tokenizer, **texts, spans={"amount": {"base": ["45", "9"], "variable": ["7", "80"]}})
    for made in (by_hand, named):
        assert made.base.columns["amount"].tolist() == [2, 3]
        assert made.sources["variable"].columns["amount"].tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"'amount'.*missing are"):
        make(tokenizer, **texts, spans={"amount": {"base": ["45", "9"]}})
    with pytest.raises(ValueError, match="unknown"):
        make(
            tokenizer,
            **texts,
            spans={"amount": {"base": ["45", "9"], "source": ["7", "80"], "sorce": ["7", "80"]}},
        )


def test_a_position_at_what_differs(tokenizer: Any) -> None:
    texts: dict[str, Any] = {
        "base": ["price : 45 dollars .", "the price : 9"],
        "source": ["price : 7 dollars .", "the price : 80"],
    }
    made = make(tokenizer, **texts, spans={"changed": "difference"})
    assert made.base.columns["changed"].tolist() == [2, 3]
    assert made.sources["variable"].columns["changed"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="No word differs"):
        make(tokenizer, base=["price : 45", "a"], source=["price : 45", "b"], spans={"changed": "difference"})
    with pytest.raises(ValueError, match="a piece of text for each pair, or 'difference'"):
        make(tokenizer, **texts, spans={"changed": "diference"})
