"""Answers as the tokens that a tokenizer would put after a prompt, for any kind of tokenizer.

The tokenizer itself is used, without assumptions about it: it splits the prompt alone, and the prompt with its answer.
The tokens that only the second has are the answer. So an answer has a space before it where one belongs, it may be a
punctuation mark, and it may have several tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Answers = Literal["token", "sequence"]
"""How answers are scored: by the first tokens that distinguish them, or whole."""

ANSWERS = ("token", "sequence")

Spelled = tuple[int, ...]
"""The token ids of an answer."""

NONE = -1
"""Fills the table of the answers' tokens after the end of shorter answers."""
MARKS = " ▁Ġ"  # a space, and the characters that mean a space in vocabularies
OPENING = "([{=/$#@_“‘«¿¡"  # no space is written after these
CLOSING = ".,;:!?)]}%…”’»"  # no space is written before these
ANCHORS = ("\n", "(", '"', ".")  # a word after these has no space before it
LEFT_OUT_AT_MOST_ONE_IN = 4  # at most one in so many words of a list is left out, so that one token is enough


def check_tokenizer(tokenizer: Any) -> None:
    """TypeError for the name of a model, or anything else that is called in vain for the tokens of a text."""
    if not callable(tokenizer):
        named = isinstance(tokenizer, str | Path)
        raise TypeError(
            f"A tokenizer is needed, found {repr(str(tokenizer)) if named else type(tokenizer).__name__}; transformers "
            f"gives it: AutoTokenizer.from_pretrained({repr(str(tokenizer)) if named else '…'})."
        )


class Speller:
    """The tokens of answers after prompts, for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._found: dict[tuple[str, str], Spelled | None] = {}

    def __call__(self, prompt: str, answer: str) -> Spelled:
        """The token ids of an answer after a prompt.

        Raises:
            ValueError: an answer without any text, or with a piece that the tokenizer does not know.
        """
        ids = self.find(prompt, answer)
        if ids is None:
            pieces = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
            raise ValueError(
                f"The answer {answer!r} cannot be written with this tokenizer, which makes "
                f"{self._tokenizer.convert_ids_to_tokens(pieces)} of it; an answer is text whose tokens are all "
                "known, or a token written as in the vocabulary ('▁She', 'Ġyes')."
            )
        return ids

    def find(self, prompt: str, answer: str) -> Spelled | None:
        """The same, but None if the tokenizer cannot write the answer."""
        # The last word is enough: no tokenizer joins tokens across several words, and each call costs time.
        tail = "".join(re.findall(r"\s*\S+\s*$|\s+$", prompt)[-1:]) or prompt[-40:]
        key = (tail + ("'" if opens_quote(prompt) else ""), answer)
        if key not in self._found:
            self._found[key] = self._ask(prompt, tail, answer)
        return self._found[key]

    def _ask(self, prompt: str, tail: str, answer: str) -> Spelled | None:
        if not isinstance(answer, str):
            raise TypeError(f"An answer is text, found {answer!r} ({type(answer).__name__}).")
        if answer[:1] in MARKS[1:] and answer and (literal := self._tokenizer.get_vocab().get(answer)) is not None:
            return (literal,)
        marked, word = answer[:1] in MARKS and bool(answer.strip(MARKS)), answer
        if answer.strip(MARKS).strip():
            word = (answer.lstrip(MARKS) if marked else answer).rstrip()
        if not word:
            return None
        spaced = marked or not follows_directly(prompt, word)
        for form in (True, False) if spaced else (False,):
            ids = self._behind(tail, f" {word}" if form else word) or self._ids(word)
            if ids and self._tokenizer.unk_token_id not in ids:
                return ids
        return None

    def _behind(self, before: str, text: str) -> Spelled | None:
        """The tokens that only the text with its continuation has, compared with the text alone.

        Sometimes the tokenizer would join the two (a space at the end of the prompt, and the next word). A model that
        is given the prompt cannot do that. Then the continuation is taken after a mark that joins with nothing.
        """
        for start in (before, *ANCHORS):
            alone, joined = self._ids(start), self._ids(start + text)
            if alone and len(joined) > len(alone) and joined[: len(alone)] == alone:
                return joined[len(alone) :]
        return None

    def _ids(self, text: str) -> Spelled:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def opens_quote(prompt: str) -> bool:
    """Whether a prompt ends with an opening quotation mark."""
    last = prompt[-1:]
    return last in ('"', "'", "`") and (prompt.count(last) % 2 == 1 or prompt[-2:-1].isspace())


def follows_directly(prompt: str, word: str) -> bool:
    """Whether a word is written directly after a prompt, without a space."""
    if not prompt or prompt[-1].isspace() or prompt[-1] in OPENING or opens_quote(prompt):
        return True
    return word[0] in CLOSING or word[0].isspace() or (_unspaced(prompt[-1]) and _unspaced(word[0]))


def _unspaced(character: str) -> bool:
    """Whether a character belongs to a script that has no spaces between words."""
    name = unicodedata.name(character, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "FULLWIDTH", "IDEOGRAPHIC", "THAI", "LAO", "KHMER"))


class AnswerTable:
    """The answers of a data set, each once, with their tokens.

    If some prompts need a space before the answer and others do not, an answer has an entry for each form, and all
    entries are alternatives in all pairs.

    Args:
        speller: gives the tokens of an answer.
        listed: the possible answers, in the order in which they are numbered.
        prompts: the prompts of the answers.
    """

    def __init__(self, speller: Speller, listed: Sequence[str], prompts: Sequence[str]) -> None:
        self._speller = speller
        self._number: dict[Spelled, int] = {}
        self._names: list[str] = []
        ends: dict[bool, str] = {}
        for prompt in prompts:
            ends.setdefault(takes_no_space(prompt), prompt)
        for end, prompt in ends.items():
            seen: dict[Spelled, str] = {}
            for answer in listed:
                ids = speller(prompt, answer)
                if seen.setdefault(ids, answer).strip(MARKS) != answer.strip(MARKS):
                    raise ValueError(
                        f"Several of the answers {list(listed)} are one and the same token: {seen[ids]!r} and "
                        f"{answer!r}."
                    )
                self._add(ids, answer if len(ends) == 1 or end else f" {answer.strip(MARKS)}")

    def index(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """(pairs,): the numbers of the answers that are expected after the prompts."""
        pairs = zip(prompts, answers, strict=True)
        return torch.tensor([self._add(self._speller(p, a), a) for p, a in pairs], dtype=torch.long)

    @property
    def names(self) -> tuple[str, ...]:
        """The answers as text, for people."""
        return tuple(self._names)

    @property
    def tokens(self) -> Tensor:
        """(answers,) their token ids, or (answers, longest) if some have several tokens."""
        return as_tensor(list(self._number))

    def _add(self, ids: Spelled, name: str) -> int:
        if ids not in self._number:
            self._number[ids] = len(self._names)
            self._names.append(name)
        return self._number[ids]


def takes_no_space(prompt: str) -> bool:
    """Whether a word is written directly after a prompt, without a space."""
    return follows_directly(prompt, "a")


def as_tensor(spelled: Sequence[Spelled]) -> Tensor:
    """Answers as (answers,) token ids, or (answers, longest) filled with −1 if some have several tokens."""
    longest = max(map(len, spelled), default=1)
    rows = [[*one, *[NONE] * (longest - len(one))] for one in spelled]
    table = torch.tensor(rows, dtype=torch.long).reshape(len(spelled), longest)
    return table[:, 0] if longest == 1 else table


def as_spelled(tokens: Tensor) -> list[Spelled]:
    """The inverse of `as_tensor`."""
    rows = tokens.tolist() if tokens.ndim == 2 else [[one] for one in tokens.tolist()]
    return [tuple(token for token in row if token != NONE) for row in rows]


def check_apart(names: Sequence[str], spelled: Sequence[Spelled]) -> None:
    """ValueError if one answer is the beginning of another: no token distinguishes these two."""
    if clash := clashes(spelled):
        pairs = ", ".join(f"{names[a]!r} from {names[b]!r}" for a, b in clash[:3])
        raise ValueError(
            f"No token tells {pairs}{' and others' if len(clash) > 3 else ''}: with this tokenizer the tokens of the "
            "first are the beginning of the second. Leave one of them out, as load_pairs(…, drop=True) does, or "
            "choose other answers."
        )


def clashes(spelled: Sequence[Spelled]) -> list[tuple[int, int]]:
    """Pairs of answers in which the first is the beginning of the second, or equal to it."""
    order = sorted(range(len(spelled)), key=lambda i: (spelled[i], i))
    found: list[tuple[int, int]] = []
    open_: list[int] = []
    for i in order:  # in sorted order, all answers that begin with an answer follow directly after it
        while open_ and spelled[i][: len(spelled[open_[-1]])] != spelled[open_[-1]]:
            open_.pop()
        if open_:
            found.append((open_[-1], i))
        open_.append(i)
    return found


def distinguishing(spelled: Sequence[Spelled]) -> list[Spelled]:
    """Each answer up to the first token that distinguishes it from all others with the same beginning."""
    shared: dict[Spelled, int] = {}
    for one in spelled:
        for n in range(1, len(one) + 1):
            shared[one[:n]] = shared.get(one[:n], 0) + 1
    return [next((one[:n] for n in range(1, len(one) + 1) if shared[one[:n]] == 1), one) for one in spelled]


def serving(
    speller: Speller, answers: Collection[str], prompts: Iterable[str], answered: Answers = "token"
) -> tuple[list[str], dict[str, str]]:
    """Which answers of a word list can be used, and why the others cannot.

    Left out are words that the tokenizer cannot write, and words that begin with another word of the list. If answers
    are scored by one token, words that share their first token with another word are left out as well, as long as they
    are few. If they are many, as with numbers of several digits, more tokens are read instead.

    Returns:
        (the usable answers, {other answer: why it cannot be used}).

    Raises:
        ValueError: fewer than two answers are left.
    """
    if len(set(answers)) < 2:
        raise ValueError(
            f"All answers are the same, {next(iter(answers), None)!r}; needed are two different ones."
        )
    left: dict[str, str] = {}
    prompts = list({takes_no_space(prompt): prompt for prompt in prompts}.values())
    by_prompt = [{answer: speller.find(prompt, answer) for answer in answers} for prompt in prompts]
    for answer in answers:
        if any(of[answer] is None for of in by_prompt):
            left[answer] = "not known to the tokenizer"
    for of in by_prompt:
        names = [answer for answer in answers if answer not in left]
        for _, longer in clashes([of[answer] or () for answer in names]):
            left[names[longer]] = "begins with another answer"
    if answered == "token":
        more = {name for of in by_prompt for name in _sharing([a for a in answers if a not in left], of)}
        if len(more) * LEFT_OUT_AT_MOST_ONE_IN <= len(answers):
            left |= dict.fromkeys(more, "first token shared with another")
    kept = [answer for answer in answers if answer not in left]
    if len(kept) < 2:
        for answer in answers:
            if any(of[answer] is None for of in by_prompt):
                speller(prompts[0], answer)
        raise ValueError(
            f"Of the answers {list(answers)} only {kept} can serve with this tokenizer; at least two are needed. "
            f"Left out: {left}."
        )
    return kept, left


def _sharing(names: Sequence[str], of: Mapping[str, Spelled | None]) -> list[str]:
    """Answers that share their first token (after a beginning common to all) with a shorter answer."""
    spelled = {name: of[name] or () for name in names}
    common = 0
    while len({one[common : common + 1] for one in spelled.values()}) == 1 and len(spelled) > 1:
        common += 1
    taken: set[int] = set()
    shared = []
    for name in sorted(names, key=lambda name: len(spelled[name])):
        token = spelled[name][common]
        if token in taken:
            shared.append(name)
        taken.add(token)
    return shared
