"""Positions: a small language for tokens of a prompt, which does not depend on padding.

Positions are counted in the *prompt* of a row: its real tokens (attention mask 1), without padding on either side, and
without the answer if the length of the prompt is known. Positions are one term, or several terms joined by "+" (their
union, each position once, in ascending order):

    all            every prompt token
    first, last    the first, the last
    f3, l2         the first 3, the last 2
    7, -2          one token, counted from the start or (negative) from the end
    2:5, :-1       a slice, as in Python
    subject        a named column of the data set, with positions counted from the first real token of the row
    f3(l2), l2(f3) only one side of f3+l2, shortened in short prompts in the same way as there
    f3[0], l2[1]   the first of the first 3, the second of the last 2; also f3[0](l2)

In prompts of n < p + s tokens f{p}+l{s} follows Wu et al. 2024: p ← min(p, ⌊n/2⌋), s ← min(s, ⌈n/2⌉). A term f3[i] or
l2[i] whose position this removes edits nothing there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import index

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_END = re.compile(r"([fl])(\d+)(?:\[(\d+)\])?(?:\(([fl])(\d+)\))?")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")
_NAME = re.compile(r"[A-Za-z_]\w*")
_WORDS = ("all", "first", "last")
NEEDED = "needed is all, first, last, f3, l2, f3(l2), an integer, a slice like 2:5, or the name of a column"


def normalise(positions: str | int | slice | Sequence[int]) -> str:
    """Positions as their canonical text. ValueError, with the possible forms; TypeError for other types."""
    if isinstance(positions, bool):
        raise ValueError(f"positions={positions!r} is not a position.")
    if hasattr(positions, "__index__"):  # numpy's integers too
        return str(index(positions))
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise ValueError(f"{positions}: slices of positions have no step.")
        start = "" if positions.start is None else positions.start
        return f"{start}:{'' if positions.stop is None else positions.stop}"
    if not isinstance(positions, str | Iterable):
        raise TypeError(f"positions={positions!r} is of type {type(positions).__name__}; {NEEDED}.")
    text = positions if isinstance(positions, str) else "+".join(normalise(p) for p in positions)
    text = text.replace(" ", "")
    for term in text.split("+"):
        if not (_is_int(term) or _SLICE.fullmatch(term) or _NAME.fullmatch(term) or _is_end(term)):
            raise ValueError(
                f"positions={positions!r}: {term!r} is not understood; {NEEDED}, or several joined by '+'."
            )
    if all(_is_empty(term) for term in text.split("+")):
        raise ValueError(f"positions={positions!r} select nothing in any prompt.")
    return text


def expect_some(positions: str, present: Bool[Tensor, "batch position"], lengths: Tensor) -> None:
    """IndexError if slices select nothing in any row of a batch. (Terms like f3[2] may be empty in short prompts.)"""
    if bool(present.any()) or not all(_SLICE.fullmatch(term) or _is_empty(term) for term in positions.split("+")):
        return
    raise IndexError(
        f"Positions {positions!r} select nothing in any of the {len(lengths)} rows, whose prompts have "
        f"{int(lengths.min())} to {int(lengths.max())} tokens."
    )


def names(positions: str) -> tuple[str, ...]:
    """The named columns that positions refer to."""
    return tuple(
        t for t in positions.split("+") if _NAME.fullmatch(t) and t not in _WORDS and not _END.fullmatch(t)
    )


def prompt_columns(
    real: Bool[Tensor, "batch sequence"], prompt_lengths: Int[Tensor, " batch"] | None
) -> tuple[Int[Tensor, "batch sequence"], Int[Tensor, " batch"]]:
    """For each row, the column of its j-th real token in the padded batch, and the length of its prompt."""
    order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
    lengths = real.sum(1)
    if prompt_lengths is not None:
        prompt_lengths = prompt_lengths.to(lengths.device)
        odd = prompt_lengths.is_floating_point() or prompt_lengths.shape != lengths.shape
        if odd or bool(((prompt_lengths > lengths) | (prompt_lengths < 0)).any()):
            raise ValueError(
                f"Prompt lengths {prompt_lengths.tolist()[:8]} for rows of {lengths.tolist()[:8]} real tokens: "
                "each must be a whole number from 0 to the row's own number of tokens."
            )
        lengths = prompt_lengths
    return order, lengths


def select(
    positions: str,
    lengths: Int[Tensor, " batch"],
    columns: Mapping[str, Tensor],
) -> Bool[Tensor, "batch longest"]:
    """The positions of each row as a mask over its prompt, 0 … longest − 1.

    Raises:
        IndexError: a single position (or a named one) outside of some row.
        KeyError: a column that the data set does not have.
    """
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=lengths.device)[None]
    n = lengths[:, None]
    terms = positions.split("+")
    ends = [m for t in terms if (m := _END.fullmatch(t))]
    reach = {side: max([0, *(_count(m, side) for m in ends)]) for side in "fl"}
    short = n < reach["f"] + reach["l"]
    chosen = torch.zeros(len(lengths), longest, dtype=torch.bool, device=lengths.device)
    for term in terms:
        if term == "all":
            chosen |= steps < n
        elif end := _END.fullmatch(term):
            count = torch.full_like(n, int(end[2]))
            start = torch.zeros_like(n) if end[1] == "f" else n - count  # where the whole term would begin
            half = n // 2 if end[1] == "f" else (n + 1) // 2
            count = torch.where(short, torch.minimum(count, half), count)
            inside = (steps < count) if end[1] == "f" else (steps >= n - count)
            if end[3] is not None:
                inside = inside & (steps == start + int(end[3]))
            chosen |= inside & (steps < n)
        elif part := _SLICE.fullmatch(term):
            start = _bound(part[1], n, torch.zeros_like(n))
            stop = _bound(part[2], n, n)
            chosen |= (steps >= start) & (steps < stop)
        else:
            chosen |= _single(term, positions, steps, lengths, columns)
    return chosen


def locate(
    positions: str,
    real: Bool[Tensor, "batch sequence"],
    prompt_lengths: Int[Tensor, " batch"] | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
    """The columns of a padded batch at which the positions are.

    Args:
        positions: in canonical form, as `normalise` returns them.
        real: the attention mask as booleans.
        prompt_lengths: how many real tokens of each row belong to the prompt, by default all.
        columns: {name: one or several positions for each row}, counted from the row's first real token; −1 for none.

    Returns:
        (index, valid): the columns of the batch, ascending in each row. Rows with fewer positions than others are
        filled up with entries that are marked as not valid.
    """
    order, lengths = prompt_columns(real, prompt_lengths)
    chosen = select(positions, lengths, columns or {})
    most = int(chosen.sum(1).max()) if chosen.numel() else 0
    # A stable sort of the mask brings the chosen positions to the front, in ascending order.
    front = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :most]
    return order.gather(1, front), chosen.gather(1, front)


def match(
    positions: str, base: Int[Tensor, " batch"], source: Int[Tensor, " batch"], slots: int
) -> Int[Tensor, "batch position"]:
    """For each position of a base, the number of the corresponding position of its source; −1 if there is none.

    Terms that count from the start of a prompt (all, f3, 2:5, a name) are matched from their first position on. Terms
    that count from its end (l3, -2:) are matched from their last position, and f3+l2 each from its own end.

    Args:
        positions: in canonical form.
        base, source: how many positions each row has.
        slots: how many positions a row of the base has, at most.

    Raises:
        ValueError: the numbers of positions differ, and it is not clear which position belongs to which term.
    """
    slot = torch.arange(slots, device=base.device)[None]
    b, s = base[:, None], source[:, None]
    shifted, here = slot + s - b, slot < b
    from_start = torch.where(here & (slot < s), slot, -1)
    from_end = torch.where(here & (shifted >= 0), shifted, -1)
    terms = positions.split("+")
    sides = {_side(term, alone=len(terms) == 1) for term in terms}
    if sides == {"f"} or bool((base == source).all()):
        return from_start
    if sides == {"l"}:
        return from_end
    ends = [end for term in terms if (end := _END.fullmatch(term)) and end[3] is None]
    if len(ends) < len(terms):
        raise ValueError(
            f"Positions {positions!r} of rows that have different numbers of them: it is not clear which position of "
            "one row corresponds to which of another. Use a site for each term, or f3+l2."
        )
    most = {side: max(int(end[2]) for end in ends if end[1] == side) for side in "fl"}

    def front(count: Tensor) -> Tensor:  # a prompt with so few tokens is divided between the two ends
        return torch.maximum((count // 2).clamp_max(most["f"]), count - most["l"])

    in_front = slot < front(b)
    matched = torch.where(in_front, slot < front(s), b - 1 - slot < s - front(s))
    return torch.where(here & matched, torch.where(in_front, slot, shifted), -1)


def _side(term: str, *, alone: bool) -> str:
    """The end of the prompt from which a term counts, "f" or "l"; "" if that is not clear."""
    if end := _END.fullmatch(term):
        return end[1]
    if term in ("all", "first"):
        return "f"
    if term == "last":
        return "l"
    if part := _SLICE.fullmatch(term):
        sides = {"l" if text.startswith("-") else "f" for text in (part[1] or "0", part[2]) if text}
        if len(sides) == 1:
            return sides.pop()
        return "f" if alone and not (part[1] or "").startswith("-") else ""
    if _is_int(term):
        return "l" if term.startswith("-") else "f"
    return "f" if alone else ""


def _single(term: str, positions: str, steps: Tensor, lengths: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """A term that selects one position for each row (or the positions of a column)."""
    if term in ("first", "last") or _is_int(term):
        offset = {"first": 0, "last": -1}.get(term) if not _is_int(term) else int(term)
        assert offset is not None
        at = torch.full_like(lengths, offset)[:, None]
    elif term in columns:
        at = columns[term].to(lengths.device).reshape(len(lengths), -1)
    else:
        raise KeyError(
            f"Positions {positions!r} name the column {term!r}; the columns are {sorted(columns)}. Named positions "
            "come with the batch, as Batch(inputs, columns={name: positions}) or by spans= of from_texts; always "
            "possible are all, first, last, f3, l2, 7, -2 and 2:5."
        )
    n = lengths[:, None]
    # In a named column −1 fills up rows with fewer positions; elsewhere negative numbers count from the end.
    named = term in columns and term not in _WORDS  # reserved words have priority over a column of that name
    absent = (at == -1) if named else torch.zeros_like(at, dtype=torch.bool)
    at = at if named else torch.where(at < 0, at + n, at)
    outside = ((at < 0) | (at >= n)) & ~absent
    if bool(outside.any()):
        row = int(outside.any(1).nonzero()[0])
        raise IndexError(
            f"Position {term!r} is outside row {row}, whose prompt has {int(lengths[row])} tokens; possible "
            f"are 0 to {int(lengths.min()) - 1} (or −{int(lengths.min())} to −1) for every row of this batch."
        )
    return ((at[:, :, None] == steps[:, None]) & ~absent[:, :, None]).any(1)


def _bound(text: str | None, n: Tensor, default: Tensor) -> Tensor:
    if not text:
        return default
    value = int(text)
    return torch.minimum(torch.full_like(n, value), n) if value >= 0 else (n + value).clamp_min(0)


def _count(end: re.Match[str], side: str) -> int:
    """How many positions a term uses at one side of the prompt, for itself or for its partner."""
    if end[1] == side:
        return int(end[2])
    return int(end[5]) if end[4] == side else 0


def _is_empty(term: str) -> bool:
    """Whether a term selects nothing in every prompt: f0, 5:2, -2:-4."""
    if end := _END.fullmatch(term):
        return int(end[2]) == 0
    if (part := _SLICE.fullmatch(term)) and part[2]:
        start, stop = part[1] or "0", part[2]
        same_end = start.startswith("-") == stop.startswith("-")
        return int(stop) == 0 or (same_end and int(start) >= int(stop))
    return False


def _is_end(term: str) -> bool:
    end = _END.fullmatch(term)
    return bool(end and end[1] != end[4] and (end[3] is None or int(end[3]) < int(end[2])))


def _is_int(term: str) -> bool:
    return re.fullmatch(r"-?\d+", term) is not None
