"""Positions: the grammar, and `locate` against a slow oracle in plain Python for any padding."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given, settings
from torch import Tensor

from subspace_lab.core.positions import locate, names, normalise, prompt_columns

# --- the oracle: every term as its text and as the set of token numbers it means in a prompt of n tokens -----


class Outside(Exception):
    """A single position that a row has not."""


def one(at: int, n: int) -> set[Any]:
    if not -n <= at < n:
        raise Outside
    return {at % n}


def shortened(p: int, s: int, n: int) -> tuple[int, int]:
    """Wu et al. 2024 for prompts shorter than p + s."""
    return (min(p, n // 2), min(s, -(-n // 2))) if n < p + s else (p, s)


def ends(
    side: str, count: int, item: Any = None, partner: int = 0
) -> tuple[str, Callable[..., set[Any]], tuple[int, ...]]:
    """(text, meaning, claims): claims are the lengths of prefix and suffix that the term speaks of."""
    other = "l" if side == "f" else "f"
    text = f"{side}{count}" + ("" if item is None else f"[{item}]") + (f"({other}{partner})" if partner else "")
    claims = (count, partner) if side == "f" else (partner, count)

    def meaning(n: int, row: int, claimed: tuple[int, int]) -> set[Any]:
        p, s = shortened(*claimed, n)
        if n >= sum(claimed):
            p, s = (count, count)
        left = range(min(count, p, n)) if side == "f" else range(max(0, n - min(count, s)), n)
        if item is None:
            return set(left)
        at = item if side == "f" else n - count + item
        return {at} & set(left)

    return text, meaning, claims


def simple(text: str, meaning: Callable[..., Any]) -> tuple[str, Callable[..., Any], tuple[int, int]]:
    return text, lambda n, row, claimed: meaning(n, row), (0, 0)


NUMBERS = st.integers(-9, 9)
COUNTS = st.integers(0, 9)
COLUMNS = ("subject", "verbs")


def slices(bounds: Any) -> tuple[str, Callable[..., Any], tuple[int, int]]:
    start, stop = bounds
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    return simple(text, lambda n, row: set(range(n)[start:stop]))


TERMS = st.one_of(
    st.just(simple("all", lambda n, row: set(range(n)))),
    st.just(simple("first", lambda n, row: one(0, n))),
    st.just(simple("last", lambda n, row: one(-1, n))),
    st.builds(ends, st.sampled_from("fl"), COUNTS),
    st.builds(ends, st.sampled_from("fl"), COUNTS, st.none(), st.integers(1, 9)),
    st.tuples(st.sampled_from("fl"), st.integers(1, 9), COUNTS, COUNTS)
    .filter(lambda t: t[2] < t[1])
    .map(lambda t: ends(*t)),
    NUMBERS.map(lambda i: simple(str(i), lambda n, row: one(i, n))),
    st.tuples(st.none() | NUMBERS, st.none() | NUMBERS).map(slices),
    st.sampled_from(COLUMNS).map(lambda name: simple(name, lambda n, row: set(row[name]))),
)


@st.composite
def batches(
    draw: Callable[..., Any],
) -> tuple[Tensor, Tensor | None, dict[str, Tensor], list[dict[str, set[Any]]]]:
    """Masks of any pattern, prompts, and two columns: (rows,) with −1 for none, and (rows, 3)."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["right", "left", "mixed", "any"]))
    masks = []
    for _ in range(rows):
        n = draw(st.integers(1, width))
        side = draw(st.sampled_from(["right", "left"])) if kind == "mixed" else kind
        if kind == "any":
            masks.append(draw(st.permutations([True] * n + [False] * (width - n))))
        else:
            masks.append(
                [True] * n + [False] * (width - n) if side == "right" else [False] * (width - n) + [True] * n
            )
    lengths = [sum(mask) for mask in masks]
    prompts = [draw(st.integers(1, n)) for n in lengths] if draw(st.booleans()) else None
    ns = prompts or lengths
    subject = [draw(st.integers(-1, n - 1)) for n in ns]
    verbs = [[draw(st.integers(-1, n - 1)) for _ in range(3)] for n in ns]
    columns = {"subject": torch.tensor(subject), "verbs": torch.tensor(verbs)}
    named = [{"subject": {subject[r]} - {-1}, "verbs": set(verbs[r]) - {-1}} for r in range(rows)]
    return torch.tensor(masks), None if prompts is None else torch.tensor(prompts), columns, named


def expected(
    terms: list[Any], real: Tensor, prompts: Tensor | None, named: list[dict[str, set[Any]]]
) -> list[list[Any]]:
    """For each row, the columns of the padded batch."""
    claimed = (max(t[2][0] for t in terms), max(t[2][1] for t in terms))
    found = []
    for row, mask in enumerate(real.tolist()):
        standing = [column for column, is_real in enumerate(mask) if is_real]
        n = len(standing) if prompts is None else int(prompts[row])
        tokens = set().union(*(meaning(n, named[row], claimed) for _, meaning, _ in terms))
        found.append([standing[t] for t in sorted(tokens)])
    return found


@settings(max_examples=400)
@given(batches(), st.lists(TERMS, min_size=1, max_size=4))
def test_locate_agrees_with_the_oracle(
    batch: tuple[Tensor, Tensor | None, dict[str, Tensor], list[dict[str, set[Any]]]], terms: list[Any]
) -> None:
    real, prompts, columns, named = batch
    text = "+".join(term[0] for term in terms)
    try:
        assert normalise(text) == text
    except ValueError as refusal:
        assert "select nothing in any prompt" in str(refusal)
        assert not any(expected(terms, real, prompts, named))
        return
    try:
        rows = expected(terms, real, prompts, named)
    except Outside:
        with pytest.raises(IndexError, match=r"is outside row \d"):
            locate(text, real, prompts, columns)
        return
    index, valid = locate(text, real, prompts, columns)
    assert index.shape == valid.shape == (len(rows), max(len(row) for row in rows))
    assert [index[r][valid[r]].tolist() for r in range(len(rows))] == rows
    # Real entries stand before the filling, and the filling points into the batch.
    assert torch.equal(valid, valid.sort(dim=1, descending=True, stable=True).values)
    assert bool(((index >= 0) & (index < real.shape[1])).all())


def test_the_oracle_sees_differences() -> None:
    """Specs whose meanings are close: the oracle (and so the test above) tells them apart."""
    real = torch.tensor([[True, True, True, False], [False, False, True, True]])
    seen = {}
    for text in ("f1", "l1", "0:2", "-2:", "f2", "l2", "f2+l1", "f2(l1)", "l1(f2)", "f2[1]", "all", "1"):
        index, valid = locate(text, real)
        seen[text] = [index[r][valid[r]].tolist() for r in range(2)]
    assert seen == {
        "f1": [[0], [2]],
        "l1": [[2], [3]],
        "0:2": [[0, 1], [2, 3]],
        "-2:": [[1, 2], [2, 3]],
        "f2": [[0, 1], [2, 3]],
        "l2": [[1, 2], [2, 3]],
        "f2+l1": [[0, 1, 2], [2, 3]],
        "f2(l1)": [[0, 1], [2]],  # two tokens for 2 + 1: one and one
        "l1(f2)": [[2], [3]],
        "f2[1]": [[1], [3]],
        "all": [[0, 1, 2], [2, 3]],
        "1": [[1], [3]],
    }


def test_the_papers_rule_for_short_prompts() -> None:
    """n 1 to 40 in one batch; p and s 0 to 11, of which the authors use up to 7 + 7 and 11."""
    real = torch.arange(40)[None] < torch.arange(1, 41)[:, None]
    for p in range(12):
        for s in range(12):
            index, valid = locate(f"f{p}+l{s}", real)
            for n in range(1, 41):
                first, last = (p, s) if n >= p + s else (min(p, n // 2), min(s, (n + 1) // 2))
                tokens = sorted({*range(first), *range(n - last, n)})
                assert index[n - 1][valid[n - 1]].tolist() == tokens, (p, s, n)
            prefix, suffix = (locate(term, real) for term in (f"f{p}(l{s})", f"l{s}(f{p})"))
            apart = [
                sorted([*prefix[0][r][prefix[1][r]].tolist(), *suffix[0][r][suffix[1][r]].tolist()])
                for r in range(40)
            ]
            assert apart == [index[r][valid[r]].tolist() for r in range(40)], (p, s)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(TERMS, min_size=1, max_size=3))
def test_left_and_right_padding_mean_the_same_tokens(lengths: list[int], terms: list[Any]) -> None:
    width = max(lengths) + 2
    steps, n = torch.arange(width)[None], torch.tensor(lengths)[:, None]
    right, left = steps < n, steps >= width - n
    ids = torch.randint(1, 1000, (len(lengths), width))
    text = "+".join(term[0] for term in terms)
    columns = {"subject": torch.zeros(len(lengths), dtype=torch.long), "verbs": n - 1}
    try:
        index, valid = locate(text, right, columns=columns)
    except IndexError:
        assume(False)
    other, also_valid = locate(text, left, columns=columns)
    assert torch.equal(valid, also_valid)
    moved = torch.zeros_like(ids)
    moved[left] = ids[right]
    assert torch.equal(ids.gather(1, index)[valid], moved.gather(1, other)[valid])


# --- prompts, columns ---------------------------------------------------------------------------------------


def test_last_is_the_last_token_of_the_prompt() -> None:
    """Not the answer's, not the one before it: with prompts of 2, 4 and 1 tokens and answers behind them."""
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    prompts = torch.tensor([2, 4, 1])
    for text in ("l1", "last", "-1"):
        assert locate(text, real, prompts)[0].tolist() == [[1], [3], [3]]
        assert locate(text, real)[0].tolist() == [[4], [5], [5]]
    index, valid = locate("all", real, prompts)
    assert [index[r][valid[r]].tolist() for r in range(3)] == [[0, 1], [0, 1, 2, 3], [3]]
    order, lengths = prompt_columns(real, prompts)
    assert lengths.tolist() == [2, 4, 1] and order[2, :3].tolist() == [3, 4, 5]


def test_named_columns() -> None:
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    columns = {"subject": torch.tensor([2, 0]), "words": torch.tensor([[1, 0], [1, -1]])}
    index, valid = locate("subject", real, columns=columns)
    assert index.tolist() == [[3], [0]] and bool(valid.all())
    index, valid = locate("words", real, columns=columns)
    assert index[0].tolist() == [1, 2] and valid.tolist() == [[True, True], [True, False]]
    assert index[1, 0] == 1
    index, valid = locate("words+subject", real, columns=columns)
    assert [index[r][valid[r]].tolist() for r in range(2)] == [[1, 2, 3], [0, 1]]
    # Nobody has one: an empty set, no error.
    index, valid = locate("subject", real, columns={"subject": torch.tensor([-1, -1])})
    assert index.shape == (2, 0) == valid.shape
    # The words of the grammar are not hidden by columns of their name.
    index, _ = locate("last", real, columns={"last": torch.tensor([0, -1])})
    assert index.tolist() == [[3], [1]]


# --- the grammar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "text"),
    [
        (3, "3"),
        (-1, "-1"),
        (slice(2, 5), "2:5"),
        (slice(None, -1), ":-1"),
        (slice(0, None, 1), "0:"),
        (slice(None), ":"),
        ([2, 3], "2+3"),
        ((0, -1), "0+-1"),
        ("f3 + l2", "f3+l2"),
        ("all", "all"),
        ("subject+verb_2", "subject+verb_2"),
        ("f7(l7)", "f7(l7)"),
        ("l2[1]", "l2[1]"),
    ],
)
def test_what_people_write_has_one_text(given_as: Any, text: str) -> None:
    assert normalise(given_as) == text
    assert normalise(text) == text


@given(st.lists(TERMS, min_size=1, max_size=5), st.text(" ", max_size=3))
def test_text_of_a_spec_is_stable(terms: list[Any], space: str) -> None:
    text = "+".join(term[0] for term in terms)
    assert normalise(f"{space}+{space}".join(term[0] for term in terms)) == text == normalise(normalise(text))
    assert names(text) == tuple(term[0] for term in terms if term[0] in COLUMNS)


@given(st.text("fl0123456789:+-[]() _aZ", max_size=8))
@example("-:")
@example(":-")
@example("f3(f2)")
@example("f3[3]")
@example("f1()")
@example("+")
@example("1:2:3")
def test_text_is_refused_or_understood(text: str) -> None:
    """Nothing that `normalise` lets through fails later for want of a meaning."""
    try:
        spec = normalise(text)
    except ValueError as refusal:
        assert repr(text) in str(refusal)
        return
    real = torch.ones(1, 1200, dtype=torch.bool)
    try:
        locate(spec, real, columns={name: torch.tensor([0]) for name in names(spec)})
    except IndexError as outside:
        assert "is outside row 0" in str(outside)  # as it is for "9999"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "-",
        "-:",
        ":-",
        "1:2:3",
        "f3(f2)",
        "l1(l1)",
        "f3[3]",
        "f3]",
        "first,last",
        "a b-c",
        "f3++l2",
        "3.5",
        [],
    ],
)
def test_what_is_no_spec_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"is not understood; needed is all, first, last, f3"):
        normalise(wrong)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="True is not a position"):
        normalise(True)
    with pytest.raises(ValueError, match="slices of positions have no step"):
        normalise(slice(0, 5, 2))
    real = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    for text in ("2", "-3", "subject"):
        with pytest.raises(IndexError, match=r"outside row 1, whose prompt has 2 tokens; possible are 0 to 1"):
            locate(text, real, columns={"subject": torch.tensor([2, 2])})
    assert locate("1", real)[0].tolist() == [[1], [2]]
    with pytest.raises(IndexError, match="outside row 0, whose prompt has 1 tokens"):
        locate("1", real, torch.tensor([1, 2]))
    with pytest.raises(IndexError, match="outside row 0"):  # a column counts from the start; −1 alone is special
        locate("subject", real, columns={"subject": torch.tensor([-2, 0])})
    with pytest.raises(KeyError, match=r"'first_name'; the columns are \['subject'\]"):
        locate("f1+first_name", real, columns={"subject": torch.tensor([0, 0])})
    for prompts in ([3, 3], [-1, 2]):
        with pytest.raises(ValueError, match=r"Prompt lengths .* for rows of \[3, 2\] real tokens"):
            locate("all", real, torch.tensor(prompts))
