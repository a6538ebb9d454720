"""Counterfactual texts as tensors: padding, positions by name, answers, and the tokenizer as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from subspace_lab.das.counterfactuals import counterfactual_dataset
from subspace_lab.das.encoding import answer_tokens, encode
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.model.batches import Batch
from subspace_lab.tasks.story_gender import STORY_GENDER

TEXT = "Once a girl named Maya sat ."
LONGER = "Once upon a time a boy named Jo sat here ."
PIECES = [
    "Once",
    "upon",
    "a",
    "time",
    "g",
    "irl",
    "boy",
    "named",
    "M",
    "aya",
    "Jo",
    "sat",
    "here",
    ".",
    "She",
    "He",
]
NAMED = ("word", "name", "end")


def sentencepiece_like(**options: Any) -> PreTrainedTokenizerFast:
    """Pieces that carry the space before them as ▁ and begin every text with <s>, as Llama's do."""
    starts = [f"▁{piece}" for piece in PIECES]
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *starts, *PIECES, *"girlboyMaya."])
    table = [(piece, 0.0 if len(piece) == 1 else float(len(piece))) for piece in vocabulary]
    tokenizer = Tokenizer(models.Unigram(table, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


def word_level(**options: Any) -> PreTrainedTokenizerFast:
    words = dict.fromkeys(["<unk>", "<pad>", *TEXT.split(), *LONGER.split(), "She", "He"])
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


KINDS = {"pieces": (sentencepiece_like, "▁She", "▁He"), "words": (word_level, "She", "He")}


def spans(text: str, *words: str) -> dict[str, list[int]]:
    return {
        name: [text.index(word), text.index(word) + len(word)] for name, word in zip(NAMED, words, strict=True)
    }


def pairs(she: str, he: str) -> Dataset:
    """Two pairs, the longer text once as the base and once as the source."""
    girl = (TEXT, spans(TEXT, "girl", "Maya", "."), she)
    boy = (LONGER, spans(LONGER, "boy", "Jo", "."), he)
    return Dataset.from_list(
        [
            {
                "base": base[0],
                "base_spans": base[1],
                "sources": {"gender": source[0]},
                "source_spans": {"gender": source[1]},
                "base_answer": base[2],
                "answer": source[2],
                "changes": True,
            }
            for base, source in ((girl, boy), (boy, girl))
        ]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tokenizers_own_and_padded_on_the_right(kind: str, side: str) -> None:
    build, she, he = KINDS[kind]
    tokenizer = build(padding_side=side, pad_token="</s>" if kind == "pieces" else "<pad>")
    tokenizer.model_max_length = 4  # nothing is cut
    before = (tokenizer.padding_side, tokenizer.pad_token_id, len(tokenizer))
    made = encode(pairs(she, he), tokenizer, [he, she])
    for batch, texts in ((made.base, (TEXT, LONGER)), (made.sources["gender"], (LONGER, TEXT))):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        own = [tokenizer(text)["input_ids"] for text in texts]
        assert len(own[0]) != len(own[1])
        for i, row in enumerate(own):
            assert ids[i, : len(row)].tolist() == row
            assert mask[i].tolist() == [1] * len(row) + [0] * (ids.shape[1] - len(row))
            assert (ids[i, len(row) :] == tokenizer.pad_token_id).all()
    assert (tokenizer.padding_side, tokenizer.pad_token_id, len(tokenizer)) == before
    # Answers are numbers of the list given, in its order, whatever order the rows have.
    assert (made.base_answer.tolist(), made.answer.tolist(), made.answers) == ([1, 0], [0, 1], (he, she))
    assert made.tokens is not None
    assert made.tokens.tolist() == tokenizer.convert_tokens_to_ids([he, she])


def test_a_tokenizer_without_padding_token_keeps_none() -> None:
    tokenizer = word_level()
    made = encode(pairs("She", "He"), tokenizer, ["She", "He"])
    assert tokenizer.pad_token is None
    assert made.base.inputs["attention_mask"].sum(1).tolist() == [7, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_the_last_token_of_its_span(kind: str) -> None:
    build, she, he = KINDS[kind]
    tokenizer = build()
    made = encode(pairs(she, he), tokenizer, [she, he])
    # Written down by hand: the pieces of the longer words are two, and <s> is a token like any other.
    expected = {
        "pieces": {"word": ["irl", "▁boy"], "name": ["aya", "▁Jo"], "end": ["▁.", "▁."]},
        "words": {"word": ["girl", "boy"], "name": ["Maya", "Jo"], "end": [".", "."]},
    }[kind]
    for name in NAMED:
        at = made.base.columns[name]
        ids = made.base.inputs["input_ids"].gather(1, at[:, None])[:, 0]
        assert tokenizer.convert_ids_to_tokens(ids.tolist()) == expected[name]
        of_source = made.sources["gender"].columns[name]
        assert of_source.tolist() == at.flip(0).tolist()
    number = {"pieces": [4, 6], "words": [2, 5]}[kind]
    assert made.base.columns["word"].tolist() == number
    assert made.base.columns["end"].tolist() == [n - 1 for n in made.base.inputs["attention_mask"].sum(1).tolist()]


def test_a_span_without_a_token_is_refused() -> None:
    data = pairs("She", "He").to_list()
    data[1]["base_spans"]["name"] = [4, 5]  # a space, to which no word belongs
    with pytest.raises(ValueError, match=r"No token is in the span 'name' \(4 to 5\) of 'Once upon"):
        encode(Dataset.from_list(data), word_level(), ["She", "He"])


def test_an_answer_of_several_pieces_is_all_of_them() -> None:
    tokenizer = sentencepiece_like()
    found = answer_tokens(tokenizer, ["▁She", "▁Maya", "girl"])
    pieces = [
        [p for p in tokenizer.convert_ids_to_tokens(row) if p != "<unk>"] for row in found.clamp_min(0).tolist()
    ]
    assert pieces == [["▁She"], ["▁M", "aya"], ["▁g", "irl"]] and (found == -1).sum() == 1


@pytest.mark.parametrize("build", [sentencepiece_like, word_level])
def test_an_unknown_word_is_no_answer(build: Any) -> None:
    with pytest.raises(ValueError, match=r"'Zebra' cannot be written with this tokenizer.*<unk>"):
        answer_tokens(build(), ["She", "Zebra"])


def test_an_answer_of_the_data_that_was_not_listed_is_named() -> None:
    with pytest.raises(ValueError, match=r"the answers \['He'\].*\['She', 'girl'\]"):
        encode(pairs("She", "He"), word_level(), ["She", "girl"])


def test_a_tokenizer_that_cannot_tell_positions_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ByT5Tokenizer does not give the places of its tokens.*a fast tokenizer does"
    ):
        encode(pairs("She", "He"), ByT5Tokenizer(), ["She", "He"])


def test_a_task_is_encoded_as_its_rows_say() -> None:
    rows = counterfactual_dataset(STORY_GENDER, 12, split="train", seed=0)
    words = {
        w for row in rows for t in (row["base"], row["sources"]["gender"]) for w in t.replace(".", " .").split()
    }
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "▁She", "▁He", *sorted(words)])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    made = encode(rows, fast, list(STORY_GENDER.answers.values()))
    assert len(made) == 12
    for i, row in enumerate(rows):
        ids = made.sources["gender"].inputs["input_ids"][i]
        at = made.sources["gender"].columns["gender_word"][i]
        start, end = row["source_spans"]["gender"]["gender_word"]
        assert fast.convert_ids_to_tokens(int(ids[at])) == row["sources"]["gender"][start:end]
        assert made.answers[int(made.answer[i])] == row["answer"]
        assert bool(made.answer[i] != made.base_answer[i]) == row["changes"]


# --- the container ------------------------------------------------------------------------------------------


def test_pairs_are_cut_row_by_row() -> None:
    made = encode(pairs("She", "He"), word_level(), ["She", "He"])
    cut = made.rows(torch.tensor([1, 1, 0]))
    assert len(cut) == 3
    for whole, part in ((made.base, cut.base), (made.sources["gender"], cut.sources["gender"])):
        assert torch.equal(part.inputs["input_ids"], whole.inputs["input_ids"][[1, 1, 0]])
        assert torch.equal(part.columns["name"], whole.columns["name"][[1, 1, 0]])
    assert cut.answer.tolist() == made.answer[[1, 1, 0]].tolist()
    assert cut.base_answer.tolist() == made.base_answer[[1, 1, 0]].tolist()


def test_answers_are_read_after_the_last_real_token() -> None:
    made = encode(pairs("She", "He"), word_level(), ["She", "He"])
    assert made.readout.index is not None
    assert made.readout.index.tolist() == [[6], [10]]
    assert made.readout.tokens is not None
    assert made.tokens is not None
    assert made.readout.tokens.tolist() == made.tokens.tolist()


def test_pairs_that_do_not_pair_are_refused() -> None:
    batch, short, answer = (
        Batch.of(torch.zeros(4, 2)),
        Batch.of(torch.zeros(3, 2)),
        torch.zeros(4, dtype=torch.long),
    )
    with pytest.raises(ValueError, match="4 bases and 3 sources for 'v'"):
        Counterfactuals(batch, {"v": short}, answer, answer, ("a", "b"))
    with pytest.raises(ValueError, match="at least one variable"):
        Counterfactuals(batch, {}, answer, answer, ("a", "b"))
