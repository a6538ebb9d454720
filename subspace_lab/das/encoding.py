"""From texts to counterfactual pairs: tokens, answers, and named positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.das.answers import ANSWERS, Answers, AnswerTable, Speller, as_spelled, check_apart, ending
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.model.batches import Batch

COLUMNS = ("base", "base_spans", "sources", "source_spans", "base_answer", "answer")
LABELS = ("entity", "template", "kind")  # columns that a data set may have beside
DIFFERENCE = "difference"  # a span: what differs between a base and its source

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

    Texts are padded on the right, whatever the tokenizer's own setting, which is not touched. The input ids are the
    tokenizer's own, with two exceptions: a text that begins with the beginning-of-text token does not get a second
    one, and an end-of-text token that the tokenizer puts behind a text is no part of the prompt, so that position
    `last` is the text's own last token. A named span becomes a named position: its last token.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        answers: the possible answers, see `answer_tokens`. Each pair's own are what the tokenizer puts behind its
            prompt.
        whole: score answers of several tokens whole, not by the first token that tells them apart.
        chat: make each text a user's message by the tokenizer's chat template, to which the model answers.
        add_special_tokens: as of the tokenizer; a chat template brings its own.

    Raises:
        ValueError: rows of another format; an answer that the tokenizer cannot write, or not among `answers`; answers
            that no token tells apart; a tokenizer without offsets, or without the chat template that is asked for.
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
        raise ValueError(f"The data set has the answers {unlisted}, which are not among those given, {answers}.")
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
    """Counterfactual pairs of your own, from plain lists of texts.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        base: the prompts.
        source: for each the prompt that the variable's value is taken from; several variables as a mapping.
        answer: for each the answer expected after the interchange, see `answer_tokens`.
        base_answer: the answer before it.
        source_answer: the answer to the source, where it is known; several variables as a mapping.
        spans: {position name: where it is}; the position is the last token of the span. Possible are: for each pair
            a piece of text that the base and its sources contain, of which the last occurrence counts;
            {"base": pieces, "source": other pieces} (or the name of a variable instead of "source"); or
            "difference", the words that differ between the base and its source. A piece may be a pair of numbers, the
            characters [start, end) of the text.
        labels: {name: for each pair a text}, such as "entity", "template" and "kind" (see `Counterfactuals`).
        answers: of answers that are several tokens, "token" scores the first ones up to the token that tells an
            answer from all others, "sequence" the whole answer, by the sum of its tokens' log probabilities.
        chat: make each text a user's message by the tokenizer's chat template, to which the model answers.
        add_special_tokens: as of the tokenizer; a chat template brings its own.

    Raises:
        TypeError: text in the place of a list of texts, or something else in the place of a text.
        ValueError: lists of different length, an answer that the tokenizer cannot write, answers that no token tells
            apart, a piece that a text lacks, or a base that equals its source where their difference is asked for.
    """
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r}; possible are {' and '.join(map(repr, ANSWERS))}.")
    sources = (
        {"variable": list(source)} if not isinstance(source, Mapping) else {k: list(v) for k, v in source.items()}
    )
    if "base" in sources:
        raise ValueError(
            "A variable cannot be called 'base', which is what the base is called in spans; rename it."
        )
    told = source_answer or {}
    told = dict(told) if isinstance(told, Mapping) else dict.fromkeys(sources, told)
    if unknown := sorted(set(told) - set(sources)):
        raise ValueError(f"source_answer has {unknown}; the variables are {list(sources)}.")
    texts = {"base": list(base), **sources}
    given = {"base": base, "answer": answer, "base_answer": base_answer, **sources, **(labels or {})}
    given |= {f"source_answer of {name}": of for name, of in told.items()}
    for name, rows in given.items():
        _check_texts(name, rows)
    where = {name: _pieces(name, pieces, texts) for name, pieces in (spans or {}).items()}
    for name, of in where.items():
        given |= {f"{name} ({which})": pieces for which, pieces in of.items()}
    lengths = {name: len(rows) for name, rows in given.items()}
    if len(set(lengths.values())) != 1 or not len(base):
        raise ValueError(f"Every list needs one entry a pair, and at least one; their lengths are {lengths}.")
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
        source_answers=told,
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
    """Texts, spans and answers, all of them lists by pair, as tensors.

    Args:
        texts, spans: of "base" and of each variable.
        listed: the possible answers, in the order in which they are numbered.
        others: as of `encode` and `from_texts`.
    """
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
    """A text as a user's message, up to where the model's answer begins, and its spans in there.

    Raises:
        ValueError: a tokenizer without a chat template, or one whose template changes the message's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template: its model is asked with plain prompts."
        )
    said = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    core = text.strip()  # which templates do as well, some of them
    at = whole.rfind(core)
    if not core or at < 0:
        raise ValueError(
            f"The chat template does not give the text {text!r} as it is; where its words are is unknown."
        )
    shift = at - (len(text) - len(text.lstrip()))
    return whole, {name: (start + shift, end + shift) for name, (start, end) in spans.items()}


def _check_texts(name: str, rows: Any) -> None:
    """TypeError where a list of texts is something else."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise TypeError(f"{name} is a list of texts, one for each pair; found {type(rows).__name__}.")
    for i, one in enumerate(rows):
        if not isinstance(one, str):
            raise TypeError(f"{name}[{i}] is {one!r} ({type(one).__name__}); needed is text.")
        try:
            one.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}[{i}] is {one!a}, which holds half of a character: no text.") from None


def _pieces(name: str, pieces: Pieces, texts: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    """{"base" or a variable: for each of its texts the piece, or the span, of one named position}."""
    if pieces == DIFFERENCE:
        sources = [which for which in texts if which != "base"]
        if len(sources) > 1:
            raise ValueError(
                f"spans={{{name!r}: 'difference'}}: with the variables {sources} there is more than one."
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
    """The spans of the words that differ between two texts: between their common beginning and their common end."""
    one, other = ([m.span() for m in re.finditer(r"\S+", text)] for text in (base, source))
    a, b = base.split(), source.split()
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    end = min(end, len(a) - start, len(b) - start)
    spans = [words[start : len(words) - end] for words in (one, other)]
    if not all(spans):
        raise ValueError(
            f"No word differs in both of {base!r} and {source!r}: the position 'difference' is nowhere."
        )
    first, second = ([words[0][0], words[-1][1]] for words in spans)
    return first, second


def _numbered(values: Sequence[str]) -> Tensor:
    """Each value as its place in the sorted list of distinct values."""
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return torch.tensor([number[value] for value in values])


def span_of(text: str, piece: str | Sequence[int], name: str) -> Sequence[int]:
    """The characters [start, end) of a piece of a text, of which the last occurrence counts, or of given characters.

    Raises:
        ValueError: a piece that the text does not contain, or characters that are outside of it.
    """
    if not isinstance(piece, str):
        if len(piece) != 2 or not all(isinstance(one, int) for one in piece):
            raise ValueError(
                f"The position {name!r} is at {piece!r}; needed is a piece of text, or its [start, end)."
            )
        start, end = piece
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"The position {name!r} is at characters {start} to {end} of {text!r}, which has {len(text)}; possible "
                f"are spans that hold something, from 0 to {len(text)}."
            )
        return piece
    start = text.rfind(piece)
    if not piece or start < 0:
        raise ValueError(f"The position {name!r} is at {piece!r}, which is not in {text!r}.")
    return [start, start + len(piece)]


def answer_tokens(tokenizer: Any, answers: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
    """The ids of the answers, (answers,), or (answers, longest) filled with −1 where some are several tokens.

    They are what this tokenizer has more for a prompt with its answer than for the prompt alone. Plain text ("Paris")
    is written behind a space, unless the prompts end with one, with an opening mark or quotation mark, or it is itself
    a closing mark ("."). Text with a space before it (" Paris"), and an answer as it stands in the vocabulary
    ("ĠParis", "▁She"), is always what follows a space.

    Raises:
        ValueError: an answer that the tokenizer cannot write, two answers that are the same tokens, or prompts of which
            some end with a space and some do not.
    """
    prompts = list(prompts) or ["."]
    if len({ending(prompt) for prompt in prompts}) > 1:
        raise ValueError(
            "Some prompts end with a space (or an opening mark) and some do not, so that their answers would be "
            "different tokens; end all of them alike."
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
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text; a fast one does."
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
            raise ValueError(f"Text {i} is {texts[i]!r}: it has no token at which anything could be read.")
        for name in names:
            columns[name][i] = _last_token(offsets, span[name], name, texts[i])
    shorter = bool((lengths != mask.sum(1)).any())
    return Batch({"input_ids": ids, "attention_mask": mask}, lengths if shorter else None, columns)


def _encoded(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids and offsets of a text; without special tokens where it brings its own beginning."""
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids, start = found["input_ids"], tokenizer.bos_token_id
    if start is not None and ids[:2] == [start, start]:
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return list(found["input_ids"]), list(found["offset_mapping"])


def _ends_by_itself(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Whether the tokenizer put an end-of-text token behind a text that has none."""
    ends = {tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.sep_token_id: tokenizer.sep_token}
    ends.pop(None, None)
    return len(ids) > 1 and ids[-1] in ends and not text.endswith(ends[ids[-1]])


def _last_token(offsets: list[tuple[int, int]], span: Sequence[int], name: str, text: str) -> int:
    start, end = span
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"No token stands in the span {name!r} ({start} to {end}) of {text!r}.")
    return inside[-1]
