"""Which pairs go into which split, and which pairs are kept to balance the answers.

Plain functions of lists, in which a pair is an index.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

SPLITS = ("train", "dev", "test")
HARMLESS = 20  # a cell with at most one pair in so many is not made smaller


def assigned(values: Sequence[frozenset[Hashable]], shares: Mapping[str, float], seed: int) -> list[str | None]:
    """A split for each pair, so that no value is in two splits; None for a pair whose values are in different splits.

    Values are assigned one after the other in random order: to test until it has its share of the pairs, then to dev,
    and the rest to train. Each split gets at least one value.

    Args:
        values: for each pair the values (entities, templates, words) that it must not share with another split.
        shares: shares of the pairs, such as {"dev": 0.15, "test": 0.25}.
        seed: seed of the random order.

    Raises:
        ValueError: fewer than three values, or a split without pairs.
    """
    count = Counter(value for own in values for value in own)
    order = sorted(count, key=str)
    if len(order) < len(SPLITS):
        raise ValueError(
            f"{len(order)} different values ({', '.join(map(str, order))}) for three splits: each split needs one."
        )
    random.Random(seed).shuffle(order)
    total = sum(count.values())
    place: dict[Hashable, str] = {}
    for name, left_for_others in (("test", 2), ("dev", 1)):
        got = 0
        while len(order) > left_for_others and (not got or got + count[order[0]] / 2 <= shares[name] * total):
            got += count[order[0]]
            place[order.pop(0)] = name
    place |= dict.fromkeys(order, "train")
    found = [{place[value] for value in own} for own in values]
    splits = [names.pop() if len(names) == 1 else None for names in found]
    if empty := [name for name in SPLITS if name not in splits]:
        raise ValueError(
            f"No pair has all its values in the {empty[0]} split: {splits.count(None)} of {len(splits)} pairs have "
            f"values of several splits ({len(count)} different values). Take other shares, another seed, or more pairs."
        )
    return splits


def balanced(cells: Sequence[Hashable], seed: int) -> list[int]:
    """Indices of the pairs that are kept, so that the cells are about equally large; at least half of all pairs.

    Surplus pairs are dropped at random, from the largest cell first. This ends when all cells have the same size, when
    half of the pairs is dropped, or when no cell holds more than a twentieth of the pairs: a constant answer then gains
    nothing.

    Args:
        cells: for each pair its cell: its answer and whether it changes.
        seed: seed of the random choice.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        members[cell].append(i)
    sizes = [len(own) for own in members.values()]
    most = min(sizes, default=0)
    while sum(min(size, most) for size in sizes) * 2 < len(cells):
        most += 1
    while most < max(sizes, default=0) and (most + 1) * HARMLESS <= sum(min(size, most + 1) for size in sizes):
        most += 1
    rng = random.Random(seed)
    return sorted(i for own in members.values() for i in rng.sample(own, min(len(own), most)))
