"""From texts to counterfactual pairs: tokens, answers, and named positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.das.answers import (
    ANSWERS,
    Answers,
    AnswerTable,
    Speller,
    as_spelled,
    check_apart,
    check_tokenizer,
    takes_no_space,
)
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.model.batches import Batch

COLUMNS = ("base", "base_spans", "sources", "source_spans", "base_answer", "answer")
LABELS = ("entity", "template", "kind")  # further columns that a data set may have
DIFFERENCE = "difference"  # a span: the words that differ between a base and its source

Places = Sequence[str | Sequence[int]]
Pieces = Places | Mapping[str, Places] | str


def encode(
    dataset: Dataset,
    tokenizer: Any,
    answers: Sequence[str],
    *,
    whole: bool = False,
    chat: bool = False,
    add_special_tokens: bool = True,
) -> Counterfactuals:
    """Tokenise a counterfactual data set (`das/counterfactuals.py`).

    Texts are padded on the right, whatever the tokenizer's own padding side is; the tokenizer is not changed. The
    input ids are those of the tokenizer, with two exceptions. A text that already begins with the beginning-of-text
    token does not get a second one. If the tokenizer appends an end-of-text token, this token is not part of the
    prompt, so that position `last` is the last token of the text itself. A named span becomes a named position: the
    last token of the span.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        answers: the possible answers, see `answer_tokens`. The tokens of an answer are those that the tokenizer
            gives after the prompt of the pair.
        whole: score answers of several tokens whole, not only up to the first token that distinguishes them.
        chat: turn each text into a user's message with the tokenizer's chat template; the model answers this message.
        add_special_tokens: passed to the tokenizer; with `chat` the template adds its own special tokens.

    Raises:
        ValueError: rows of another format; an answer that the tokenizer cannot write, or that is not in `answers`;
            answers that no token distinguishes; a tokenizer without offsets, or without the chat template that `chat`
            needs.
    """
    columns = set(getattr(dataset, "column_names", None) or [])
    if missing := [name for name in COLUMNS if name not in columns]:
        raise ValueError(
            f"A counterfactual data set has the columns {', '.join(COLUMNS)}; this one lacks {', '.join(missing)} and "
            f"has {', '.join(sorted(columns)) or 'none'}. Pairs of plain texts are encoded by `from_texts`."
        )
    if not len(dataset):
        raise ValueError("A counterfactual data set without rows.")
    answers = list(answers)
    variables = list(dataset[0]["sources"])
    rows = dataset[:]
    unlisted = sorted({*rows["base_answer"], *rows["answer"]} - set(answers))
    if unlisted:
        raise ValueError(f"The data set has the answers {unlisted}, which are not in `answers`: {answers}.")
    values = rows.get("source_values") or [{} for _ in rows["base"]]
    of_sources = rows.get("source_answers") or [{} for _ in rows["base"]]
    return encoded_pairs(
        tokenizer,
        texts={"base": rows["base"], **{v: [s[v] for s in rows["sources"]] for v in variables}},
        spans={"base": rows["base_spans"], **{v: [s[v] for s in rows["source_spans"]] for v in variables}},
        answer=rows["answer"],
        base_answer=rows["base_answer"],
        source_answers={v: [of[v] for of in of_sources] for v in variables if v in of_sources[0]},
        listed=answers,
        values={v: _numbered([of[v] for of in values]) for v in variables if v in values[0]},
        labels={name: tuple(rows[name]) for name in LABELS if name in columns},
        whole=whole,
        chat=chat,
        special=add_special_tokens,
    )


def from_texts(
    tokenizer: Any,
    *,
    base: Sequence[str],
    source: Sequence[str] | Mapping[str, Sequence[str]],
    answer: Sequence[str],
    base_answer: Sequence[str],
    source_answer: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    spans: Mapping[str, Pieces] | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    answers: Answers = "token",
    chat: bool = False,
    add_special_tokens: bool = True,
) -> Counterfactuals:
    """Your own counterfactual pairs, from plain lists of texts.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        base: the base prompts.
        source: for each base the prompt from which the variable's value is taken. Several variables: a mapping
            {variable: prompts}.
        answer: for each base the answer that is expected after the interchange, see `answer_tokens`.
        base_answer: the answer before the interchange.
        source_answer: the answer to the source, if it is known. Several variables: a mapping {variable: answers}.
        spans: {position name: the span}; the position is the last token of the span. A span is one of: a list with a
            piece of text for each pair, which the base and its sources contain (the last occurrence counts);
            {"base": pieces, "source": other pieces} (or the name of a variable instead of "source");
            "difference", the words that differ between the base and its source. Instead of text, a piece may be a
            pair of numbers: the characters [start, end) of the text.
        labels: {name: a text for each pair}, such as "entity", "template" and "kind" (see `Counterfactuals`).
        answers: how answers of several tokens are scored. "token": by the first tokens, up to the one that
            distinguishes the answer from all others. "sequence": whole, by the sum of the tokens' log probabilities.
        chat: turn each text into a user's message with the tokenizer's chat template; the model answers this message.
        add_special_tokens: passed to the tokenizer; with `chat` the template adds its own special tokens.

    Raises:
        TypeError: a text instead of a list of texts, or an entry that is not text, or a name instead of a tokenizer.
        ValueError: lists of different lengths, an answer that the tokenizer cannot write, answers that no token
            distinguishes, a text without the piece of a span, or "difference" where a base equals its source.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}; possible are {' and '.join(map(repr, ANSWERS))}.")
    sources = (
        {"variable": list(source)} if not isinstance(source, Mapping) else {k: list(v) for k, v in source.items()}
    )
    if "base" in sources:
        raise ValueError(
            "A variable cannot be called 'base', because spans use this name for the base; rename the variable."
        )
    source_answers = source_answer or {}
    source_answers = (
        dict(source_answers) if isinstance(source_answers, Mapping) else dict.fromkeys(sources, source_answers)
    )
    if unknown := sorted(set(source_answers) - set(sources)):
        raise ValueError(f"source_answer has {unknown}; the variables are {list(sources)}.")
    texts = {"base": list(base), **sources}
    given = {"base": base, "answer": answer, "base_answer": base_answer, **sources, **(labels or {})}
    given |= {f"source_answer of {name}": of for name, of in source_answers.items()}
    for name, rows in given.items():
        _check_texts(name, rows)
    where = {name: _pieces(name, pieces, texts) for name, pieces in (spans or {}).items()}
    for name, of in where.items():
        given |= {f"{name} ({which})": pieces for which, pieces in of.items()}
    lengths = {name: len(rows) for name, rows in given.items()}
    if len(set(lengths.values())) != 1 or not len(base):
        raise ValueError(f"Every list needs one entry for each pair, and at least one; the lengths are {lengths}.")
    found = {
        which: [
            {name: span_of(text, of[which][i], name) for name, of in where.items()} for i, text in enumerate(own)
        ]
        for which, own in texts.items()
    }
    return encoded_pairs(
        tokenizer,
        texts=texts,
        spans=found,
        answer=answer,
        base_answer=base_answer,
        source_answers=source_answers,
        listed=list(dict.fromkeys([*base_answer, *answer])),
        labels={name: tuple(of) for name, of in (labels or {}).items()},
        whole=answers == "sequence",
        chat=chat,
        special=add_special_tokens,
    )


def encoded_pairs(
    tokenizer: Any,
    *,
    texts: Mapping[str, Sequence[str]],
    spans: Mapping[str, Sequence[Mapping[str, Sequence[int]]]],
    answer: Sequence[str],
    base_answer: Sequence[str],
    source_answers: Mapping[str, Sequence[str]],
    listed: Sequence[str],
    values: Mapping[str, Tensor] | None = None,
    labels: Mapping[str, tuple[str, ...]] | None = None,
    whole: bool = False,
    chat: bool = False,
    special: bool = True,
) -> Counterfactuals:
    """Texts, spans and answers (lists with one entry for each pair) as tensors.

    Args:
        texts, spans: of "base" and of each variable.
        listed: the possible answers, in the order in which they are numbered.
        others: as in `encode` and `from_texts`.
    """
    check_tokenizer(tokenizer)
    if chat:
        wrapped = {
            which: [as_message(tokenizer, text, span) for text, span in zip(own, spans[which], strict=True)]
            for which, own in texts.items()
        }
        texts = {which: [text for text, _ in own] for which, own in wrapped.items()}
        spans = {which: [span for _, span in own] for which, own in wrapped.items()}
    batches = {which: _batch(tokenizer, special and not chat, own, spans[which]) for which, own in texts.items()}
    table = AnswerTable(Speller(tokenizer), listed, texts["base"])
    before, after = (table.index(texts["base"], own) for own in (base_answer, answer))
    of_sources = {name: table.index(texts[name], own) for name, own in source_answers.items()}
    check_apart(table.names, as_spelled(table.tokens))
    return Counterfactuals(
        base=batches.pop("base"),
        sources=batches,
        base_answer=before,
        answer=after,
        answers=table.names,
        tokens=table.tokens,
        values=values or {},
        labels=labels or {},
        source_answers=of_sources,
        whole=whole,
    )


def as_message(
    tokenizer: Any, text: str, spans: Mapping[str, Sequence[int]]
) -> tuple[str, dict[str, tuple[int, int]]]:
    """A text as a user's message, up to the point where the model's answer begins, and the spans in this message.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that changes the text of the message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{type(tokenizer).__name__} has no chat template: use plain prompts for its model.")
    messages = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    core = text.strip()  # as some templates do
    at = whole.rfind(core)
    if not core or at < 0:
        raise ValueError(
            f"The chat template changes the text {text!r}, so that the spans of its words are unknown."
        )
    shift = at - (len(text) - len(text.lstrip()))
    return whole, {name: (start + shift, end + shift) for name, (start, end) in spans.items()}


def _check_texts(name: str, rows: Any) -> None:
    """TypeError if an argument is not a list of texts."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise TypeError(f"{name} must be a list of texts, one for each pair; found {type(rows).__name__}.")
    for i, one in enumerate(rows):
        if not isinstance(one, str):
            raise TypeError(f"{name}[{i}] is {one!r} ({type(one).__name__}); needed is text.")
        try:
            one.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}[{i}] is {one!a}, which contains half of a character and is not text."
            ) from None


def _pieces(name: str, pieces: Pieces, texts: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    """{"base" or a variable: for each of its texts the piece or the span} of one named position."""
    if pieces == DIFFERENCE:
        sources = [which for which in texts if which != "base"]
        if len(sources) > 1:
            raise ValueError(
                f"spans={{{name!r}: 'difference'}} needs a single variable; the variables are {sources}."
            )
        both = [_difference(b, s) for b, s in zip(texts["base"], texts[sources[0]], strict=False)]
        return {"base": [b for b, _ in both], sources[0]: [s for _, s in both]}
    if isinstance(pieces, str):
        raise ValueError(
            f"spans={{{name!r}: {pieces!r}}}: needed is a piece of text for each pair, or 'difference'."
        )
    if not isinstance(pieces, Mapping):
        return {which: list(pieces) for which in texts}
    found = {which: pieces.get(which, pieces.get("base" if which == "base" else "source")) for which in texts}
    missing = [which for which, of in found.items() if of is None]
    unknown = sorted(set(pieces) - {*texts, "source"})
    if missing or unknown:
        raise ValueError(
            f"spans={{{name!r}: …}} has {sorted(pieces)}; missing are {missing}, unknown {unknown}. Needed are 'base' "
            f"and 'source', or the variables {[which for which in texts if which != 'base']}."
        )
    return {which: list(of) for which, of in found.items() if of is not None}


def _difference(base: str, source: str) -> tuple[list[int], list[int]]:
    """The spans of the words that differ between two texts: without their common beginning and their common end."""
    one, other = ([m.span() for m in re.finditer(r"\S+", text)] for text in (base, source))
    a, b = base.split(), source.split()
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    end = min(end, len(a) - start, len(b) - start)
    spans = [words[start : len(words) - end] for words in (one, other)]
    if not all(spans):
        raise ValueError(
            f"No word differs between {base!r} and {source!r} in both texts: there is no position 'difference'."
        )
    first, second = ([words[0][0], words[-1][1]] for words in spans)
    return first, second


def _numbered(values: Sequence[str]) -> Tensor:
    """For each value its index in the sorted list of distinct values."""
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values])


def span_of(text: str, piece: str | Sequence[int], name: str) -> Sequence[int]:
    """The characters [start, end) of a piece of text; its last occurrence counts. [start, end) itself is checked.

    Raises:
        ValueError: a piece that the text does not contain, or characters that are outside of it.
    """
    if not isinstance(piece, str):
        if len(piece) != 2 or not all(isinstance(one, int) for one in piece):
            raise ValueError(
                f"The position {name!r} is {piece!r}; needed is a piece of text, or its characters [start, end)."
            )
        start, end = piece
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"The position {name!r} is at characters {start} to {end} of {text!r}, which has {len(text)}; possible "
                f"are spans that are not empty, from 0 to {len(text)}."
            )
        return piece
    start = text.rfind(piece)
    if not piece or start < 0:
        raise ValueError(f"The position {name!r} is the text {piece!r}, which is not in {text!r}.")
    return [start, start + len(piece)]


def answer_tokens(tokenizer: Any, answers: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
    """The token ids of the answers: (answers,), or (answers, longest) filled with −1 if some have several tokens.

    These are the tokens that the tokenizer adds when the answer is appended to the prompt. A space is put before plain
    text ("Paris"), unless the prompts end with a space, an opening bracket or an opening quotation mark, or the answer
    is a closing mark ("."). Text with a space before it (" Paris"), and an answer written as in the vocabulary
    ("ĠParis", "▁She"), is always what follows a space.

    Raises:
        ValueError: an answer that the tokenizer cannot write, two answers with the same tokens, or prompts of which
            some end with a space and others do not.
    """
    prompts = list(prompts) or ["."]
    if len({takes_no_space(prompt) for prompt in prompts}) > 1:
        raise ValueError(
            "Some prompts end with a space (or an opening mark) and others do not, so that the tokens of the answers "
            "would differ; end all of them alike."
        )
    table = AnswerTable(Speller(tokenizer), answers, prompts)
    if len(table.names) < len(answers):
        raise ValueError(f"Several of the answers {list(answers)} are one and the same token.")
    return table.tokens


def _batch(
    tokenizer: Any, special: bool, texts: Sequence[str], spans: Sequence[Mapping[str, Sequence[int]]]
) -> Batch:
    """Texts as a batch padded on the right, with their named positions."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not give the places of its tokens in the text; a fast tokenizer does."
        )
    encoded = [_encoded(tokenizer, text, special) for text in texts]
    longest = max(len(ids) for ids, _ in encoded)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(texts), longest), fill)
    mask = torch.zeros(len(texts), longest, dtype=torch.long)
    lengths = torch.tensor([len(own) for own, _ in encoded])
    names = list(spans[0]) if spans else []
    columns = {name: torch.zeros(len(texts), dtype=torch.long) for name in names}
    for i, ((own, offsets), span) in enumerate(zip(encoded, spans, strict=True)):
        ids[i, : len(own)] = torch.tensor(own)
        mask[i, : len(own)] = 1
        if _ends_by_itself(tokenizer, own, texts[i]):
            lengths[i] -= 1
        if not texts[i] or not lengths[i]:
            raise ValueError(f"Text {i} is {texts[i]!r}: it has no token at which the model could be read.")
        for name in names:
            columns[name][i] = _last_token(offsets, span[name], name, texts[i])
    shorter = bool((lengths != mask.sum(1)).any())
    return Batch({"input_ids": ids, "attention_mask": mask}, lengths if shorter else None, columns)


def _encoded(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids and offsets of a text. No special tokens are added if the text begins with its own."""
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids, start = found["input_ids"], tokenizer.bos_token_id
    if start is not None and ids[:2] == [start, start]:
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return list(found["input_ids"]), list(found["offset_mapping"])


def _ends_by_itself(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Whether the tokenizer appended an end-of-text token to a text that does not end with one."""
    ends = {tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.sep_token_id: tokenizer.sep_token}
    ends.pop(None, None)
    return len(ids) > 1 and ids[-1] in ends and not text.endswith(ends[ids[-1]])


def _last_token(offsets: list[tuple[int, int]], span: Sequence[int], name: str, text: str) -> int:
    start, end = span
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"No token is in the span {name!r} ({start} to {end}) of {text!r}.")
    return inside[-1]
