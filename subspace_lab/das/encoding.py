"""From texts to counterfactual pairs: tokens, answers, and named positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.model.batches import Batch

COLUMNS = ("base", "base_spans", "sources", "source_spans", "base_answer", "answer")
LABELS = ("entity", "template", "kind")  # columns that a data set may have beside
DIFFERENCE = "difference"  # a span: what differs between a base and its source
OPENING = "([{=/$#@"  # after these marks no space is written

Pieces = Sequence[str] | Mapping[str, Sequence[str]] | str


def encode(
    dataset: Dataset, tokenizer: Any, answers: Sequence[str], *, add_special_tokens: bool = True
) -> Counterfactuals:
    """Tokenise a counterfactual data set (`das/counterfactuals.py`).

    Texts are padded on the right, whatever the tokenizer's own setting, which is not touched. The input ids are the
    tokenizer's own, with two exceptions: a text that begins with the beginning-of-text token does not get a second
    one, and an end-of-text token that the tokenizer puts behind a text is no part of the prompt, so that position
    `last` is the text's own last token. A named span becomes a named position: its last token.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        answers: the possible answers, see `answer_tokens`.
        add_special_tokens: as of the tokenizer.

    Raises:
        ValueError: rows of another format; an answer that is no token, or not among `answers`; a tokenizer without
            offsets.
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
    number = {answer: i for i, answer in enumerate(answers)}
    variables = list(dataset[0]["sources"])
    rows = dataset[:]
    unlisted = sorted({*rows["base_answer"], *rows["answer"]} - set(answers))
    if unlisted:
        raise ValueError(f"The data set has the answers {unlisted}, which are not among those given, {answers}.")
    values = rows.get("source_values") or [{} for _ in rows["base"]]
    batch = partial(_batch, tokenizer, add_special_tokens)
    sources = {v: batch([s[v] for s in rows["sources"]], [s[v] for s in rows["source_spans"]]) for v in variables}
    return Counterfactuals(
        base=batch(rows["base"], rows["base_spans"]),
        sources=sources,
        base_answer=torch.tensor([number[a] for a in rows["base_answer"]]),
        answer=torch.tensor([number[a] for a in rows["answer"]]),
        answers=tuple(answers),
        tokens=answer_tokens(tokenizer, answers, rows["base"]),
        values={v: _numbered([of[v] for of in values]) for v in variables if v in values[0]},
        labels={name: tuple(rows[name]) for name in LABELS if name in columns},
    )


def from_texts(
    tokenizer: Any,
    *,
    base: Sequence[str],
    source: Sequence[str] | Mapping[str, Sequence[str]],
    answer: Sequence[str],
    base_answer: Sequence[str],
    spans: Mapping[str, Pieces] | None = None,
    add_special_tokens: bool = True,
) -> Counterfactuals:
    """Counterfactual pairs of your own, from plain lists of texts.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        base: the prompts.
        source: for each the prompt that the variable's value is taken from; several variables as a mapping.
        answer: for each the answer expected after the interchange, see `answer_tokens`.
        base_answer: the answer before it.
        spans: {position name: where it is}; the position is the last token of the span. Possible are: for each pair
            a piece of text that the base and its sources contain, of which the last occurrence counts;
            {"base": pieces, "source": other pieces} (or the name of a variable instead of "source"); or
            "difference", the words that differ between the base and its source.
        add_special_tokens: as of the tokenizer.

    Raises:
        ValueError: lists of different length, an answer that is no token, a piece that a text lacks, or a base that
            equals its source where their difference is asked for.
    """
    sources = (
        {"variable": list(source)} if not isinstance(source, Mapping) else {k: list(v) for k, v in source.items()}
    )
    texts = {"base": list(base), **sources}
    given = {"base": base, "answer": answer, "base_answer": base_answer, **sources}
    where = {name: _pieces(name, pieces, texts) for name, pieces in (spans or {}).items()}
    for name, of in where.items():
        given |= {f"{name} ({which})": pieces for which, pieces in of.items()}
    lengths = {name: len(rows) for name, rows in given.items()}
    if len(set(lengths.values())) != 1 or not len(base):
        raise ValueError(f"Every list needs one entry a pair, and at least one; their lengths are {lengths}.")
    answers = list(dict.fromkeys([*base_answer, *answer]))

    def encoded(which: str) -> Batch:
        found = [
            {name: _span(text, of[which][i], name) for name, of in where.items()}
            for i, text in enumerate(texts[which])
        ]
        return _batch(tokenizer, add_special_tokens, texts[which], found)

    return Counterfactuals(
        base=encoded("base"),
        sources={name: encoded(name) for name in sources},
        base_answer=torch.tensor([answers.index(a) for a in base_answer]),
        answer=torch.tensor([answers.index(a) for a in answer]),
        answers=tuple(answers),
        tokens=answer_tokens(tokenizer, answers, texts["base"]),
    )


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


def _span(text: str, piece: str | Sequence[int], name: str) -> Sequence[int]:
    if not isinstance(piece, str):
        return piece
    start = text.rfind(piece)
    if not piece or start < 0:
        raise ValueError(f"The position {name!r} is at {piece!r}, which is not in {text!r}.")
    return [start, start + len(piece)]


def answer_tokens(tokenizer: Any, answers: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
    """The ids of the answers' tokens, (answers,): all of one kind, as the model would write them after the prompts.

    An answer is written as it is in the vocabulary ("ĠParis", "▁She"), or as text. Text with a space before it
    (" Paris") is the token after a space. Plain text ("Paris") is that too, unless the prompts end with a space or an
    opening mark, or the vocabulary has some of the answers only without a space before them.

    Raises:
        ValueError: an answer of several tokens, answers of which some exist only after a space and some only without
            one, two answers that are one token, or prompts of which some end with a space and some do not.
    """
    ids = {a: _marked(tokenizer, a) for a in answers if a[:1] in " ▁Ġ" and a}
    plain = [answer for answer in answers if answer not in ids]
    if plain:
        ids |= _plain(tokenizer, plain, prompts)
    unknown = [answer for answer in answers if ids[answer] is None]
    if unknown:
        raise _no_token(tokenizer, unknown[0])
    found = [ids[answer] for answer in answers]
    if len(set(found)) < len(found):
        raise ValueError(f"Several of the answers {list(answers)} are one and the same token.")
    return torch.tensor(found)


def _plain(tokenizer: Any, answers: list[str], prompts: Sequence[str]) -> dict[str, int | None]:
    """Answers as plain text: read after a space, or all of them without one."""
    ends = {bool(prompt[-1:].isspace() or prompt[-1:] in OPENING) for prompt in prompts if prompt}
    if len(ends) > 1:
        raise ValueError(
            "Some prompts end with a space (or an opening mark) and some do not, so that their answers would be "
            "different tokens; end all of them alike."
        )
    vocabulary = tokenizer.get_vocab()
    after_space = {a: _marked(tokenizer, f" {a}") for a in answers}
    bare = {a: vocabulary[a] if a in vocabulary else _unmarked(tokenizer, a) for a in answers}
    readings = [bare, after_space] if True in ends else [after_space, bare]
    for reading in readings:
        if None not in reading.values():
            return reading
    first, second = readings
    if any(first[a] is not None or second[a] is not None for a in answers) and len(answers) > 1:
        lacking = {
            name: [a for a in answers if of[a] is None] for name, of in (("after", after_space), ("bare", bare))
        }
        if not set(lacking["after"]) & set(lacking["bare"]):
            raise ValueError(
                f"The answers {answers} are no tokens of one kind: after a space {lacking['after']} are no single "
                f"token, without one {lacking['bare']} are none. Choose other answers, or write each as it stands in "
                "the vocabulary."
            )
    return first


def _marked(tokenizer: Any, answer: str) -> int | None:
    """The token of a word after a space, or of an entry of the vocabulary; None where there is none."""
    vocabulary, word = tokenizer.get_vocab(), answer.lstrip(" ▁Ġ")
    # "▁She", "ĠShe" and " She" are one word after a space, whichever mark the vocabulary has for it.
    for form in (answer, f"▁{word}", f"Ġ{word}"):
        if form in vocabulary:
            return vocabulary[form]
    # Of a vocabulary without marks: what is added behind another word.
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (".", f". {word}"))
    if before and after[: len(before)] == before and len(after) == len(before) + 1:
        return None if after[-1] == tokenizer.unk_token_id else after[-1]
    return _single(tokenizer, answer) if answer != word else None


def _single(tokenizer: Any, text: str) -> int | None:
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    return pieces[0] if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id else None


def _unmarked(tokenizer: Any, text: str) -> int | None:
    """The single token of a text, unless the tokenizer puts a space before it by itself."""
    token = _single(tokenizer, text)
    return None if token is None or tokenizer.convert_ids_to_tokens(token)[:1] in "▁Ġ" else token


def _no_token(tokenizer: Any, answer: str) -> ValueError:
    pieces = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ValueError(
        f"The answer {answer!r} is not one token of this tokenizer, which splits it into "
        f"{tokenizer.convert_ids_to_tokens(pieces)}; an answer must be one token, as text or written as it stands in "
        "the vocabulary ('▁She', 'Ġyes')."
    )


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
    end = tokenizer.eos_token_id
    return end is not None and len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token)


def _last_token(offsets: list[tuple[int, int]], span: Sequence[int], name: str, text: str) -> int:
    start, end = span
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"No token stands in the span {name!r} ({start} to {end}) of {text!r}.")
    return inside[-1]
