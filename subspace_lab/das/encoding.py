"""Counterfactual pairs as tensors: what a search is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch


@dataclass(frozen=True)
class Counterfactuals:
    """Bases, a source for each variable, and the answers before and after the interchange.

    Attributes:
        base: the bases.
        sources: {variable: its sources}, row by row; a variable that a row leaves alone has the base there.
        base_answer, answer: (rows,) indices into the answers.
        answers: what the answers are, for people.
        tokens: (answers,) their token ids; None where the model's output is over the answers already.
    """

    base: Batch
    sources: Mapping[str, Batch]
    base_answer: Tensor
    answer: Tensor
    answers: tuple[str, ...]
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if len(source) != len(self.base):
                raise ValueError(
                    f"{len(self.base)} bases and {len(source)} sources for {name!r}: each base needs its own."
                )
        if not self.sources:
            raise ValueError("Counterfactuals need a source for at least one variable.")

    def __len__(self) -> int:
        return len(self.base)

    @property
    def readout(self) -> Readout:
        """The answers' logits after the last token of the base."""
        return Readout.at(self.base, "last", self.tokens)

    def rows(self, rows: Tensor) -> Counterfactuals:
        """Some of the pairs."""
        return replace(
            self,
            base=self.base.rows(rows),
            sources={name: s.rows(rows) for name, s in self.sources.items()},
            base_answer=self.base_answer[rows],
            answer=self.answer[rows],
        )

    def to(self, device: torch.device | str) -> Counterfactuals:
        """The pairs on a device."""
        return replace(
            self,
            base=self.base.to(device),
            sources={name: s.to(device) for name, s in self.sources.items()},
            base_answer=self.base_answer.to(device),
            answer=self.answer.to(device),
        )


def encode(dataset: Dataset, tokenizer: Any, answers: Sequence[str]) -> Counterfactuals:
    """Tokenise a counterfactual data set (`das/counterfactuals.py`).

    Rows are padded on the right, whatever the tokenizer's own habit, which is not touched; the input ids of a
    row are the tokenizer's, nothing is added. A named span becomes a position column: its last token.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        answers: the answers' tokens as they stand in the vocabulary.

    Raises:
        ValueError: an answer that is not one token of the vocabulary, or not among `answers`; a tokenizer without
            offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text; a fast one does."
        )
    tokens = answer_tokens(tokenizer, answers)
    number = {answer: i for i, answer in enumerate(answers)}
    variables = list(dataset[0]["sources"])
    rows = dataset[:]
    unlisted = sorted({*rows["base_answer"], *rows["answer"]} - set(answers))
    if unlisted:
        raise ValueError(
            f"The data set has the answers {unlisted}, which are not among those given, {list(answers)}."
        )
    return Counterfactuals(
        base=_batch(tokenizer, rows["base"], rows["base_spans"]),
        sources={
            v: _batch(tokenizer, [s[v] for s in rows["sources"]], [s[v] for s in rows["source_spans"]])
            for v in variables
        },
        base_answer=torch.tensor([number[a] for a in rows["base_answer"]]),
        answer=torch.tensor([number[a] for a in rows["answer"]]),
        answers=tuple(answers),
        tokens=tokens,
    )


def from_texts(
    tokenizer: Any,
    *,
    base: Sequence[str],
    source: Sequence[str] | Mapping[str, Sequence[str]],
    answer: Sequence[str],
    base_answer: Sequence[str],
    spans: Mapping[str, Sequence[str]] | None = None,
) -> Counterfactuals:
    """PreparedPairs of one's own, from plain lists of texts.

    Args:
        base: the prompts.
        source: for each the prompt that the variable's value is taken from; several variables as a mapping.
        answer: for each the answer expected after the interchange, one token, as text (" Paris") or as it
            stands in the vocabulary ("ĠParis").
        base_answer: the answer before it.
        spans: {position name: for each row a piece of text that the base and its sources contain}; the position
            is the last token of its last occurrence, in each of them.

    Raises:
        ValueError: lists of different length, an answer of several tokens, or a piece that a text lacks.
    """
    sources = {"variable": source} if not isinstance(source, Mapping) else dict(source)
    pieces = dict(spans or {})
    lists = {"base": base, "answer": answer, "base_answer": base_answer, **sources, **pieces}
    lengths = {name: len(rows) for name, rows in lists.items()}
    if len(set(lengths.values())) != 1 or not base:
        raise ValueError(f"Every list needs one entry a pair, and at least one; their lengths are {lengths}.")
    answers = list(dict.fromkeys([*base_answer, *answer]))

    def found(texts: Sequence[str]) -> list[Mapping[str, list[int]]]:
        return [
            {name: _span(texts[i], piece[i], name) for name, piece in pieces.items()} for i in range(len(base))
        ]

    return Counterfactuals(
        base=_batch(tokenizer, list(base), found(base)),
        sources={name: _batch(tokenizer, list(texts), found(texts)) for name, texts in sources.items()},
        base_answer=torch.tensor([answers.index(a) for a in base_answer]),
        answer=torch.tensor([answers.index(a) for a in answer]),
        answers=tuple(answers),
        tokens=answer_tokens(tokenizer, answers),
    )


def _span(text: str, piece: str, name: str) -> list[int]:
    start = text.rfind(piece)
    if not piece or start < 0:
        raise ValueError(f"The position {name!r} is at {piece!r}, which is not in {text!r}.")
    return [start, start + len(piece)]


def answer_tokens(tokenizer: Any, answers: Sequence[str]) -> Tensor:
    """The ids of answers given as tokens of the vocabulary (ValueError for one that is none)."""
    ids = [_answer_token(tokenizer, answer) for answer in answers]
    if len(set(ids)) < len(ids):
        raise ValueError(f"Several of the answers {list(answers)} are one and the same token.")
    return torch.tensor(ids)


def _answer_token(tokenizer: Any, answer: str) -> int:
    vocabulary = tokenizer.get_vocab()
    word = answer.lstrip(" ▁Ġ")
    # "▁She", "ĠShe" and " She" are one word after a space, whichever mark the vocabulary has for it.
    marked = [mark + word for mark in "▁Ġ"] if word != answer else []
    for form in (answer, *marked):
        if form in vocabulary:
            return vocabulary[form]
    pieces = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"The answer {answer!r} is not one token of this tokenizer, which splits it into "
            f"{tokenizer.convert_ids_to_tokens(pieces)}; an answer must be one token, as text or written as it "
            "stands in the vocabulary ('▁She', 'Ġyes')."
        )
    return pieces[0]


def _batch(tokenizer: Any, texts: list[str], spans: list[Mapping[str, list[int]]]) -> Batch:
    encoded = [tokenizer(text, return_offsets_mapping=True) for text in texts]
    longest = max(len(e["input_ids"]) for e in encoded)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(texts), longest), fill)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    names = list(spans[0]) if spans else []
    columns = {name: torch.zeros(len(texts), dtype=torch.long) for name in names}
    for i, (row, span) in enumerate(zip(encoded, spans, strict=True)):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        mask[i, :n] = 1
        for name in names:
            columns[name][i] = _last_token(row["offset_mapping"], span[name], name, texts[i])
    return Batch({"input_ids": ids, "attention_mask": mask}, columns=columns)


def _last_token(offsets: list[tuple[int, int]], span: Sequence[int], name: str, text: str) -> int:
    start, end = span
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"No token stands in the span {name!r} ({start} to {end}) of {text!r}.")
    return inside[-1]
