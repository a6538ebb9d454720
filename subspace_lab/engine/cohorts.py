"""Which edits had best run side by side.

A run of a block costs something however few rows it has: its weights are read, its kernels are started. Small batches
whose edits begin in neighbouring blocks share that, at the price of the blocks that the deeper ones need not have run.

    cost of a run = blocks that run · (fixed + tokens that run)

All rows of a run are counted from its first block on, as they are computed from there.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_ROWS = 1024  # of a run


def fixed_cost(width: int | None, device: str) -> float:
    """What a run of a block costs beside its tokens, in tokens.

    Measured on one thread in float32: at width 768 reading the weights takes as long as 17 tokens more; at width 64
    starting the block takes as long as 100. For an accelerator it is a cautious guess.
    """
    return 256.0 if device != "cpu" else 17.0 + 3e5 / (width or 768) ** 2


def cohorts_of(starts: Sequence[int], depth: int, rows: int, tokens: float, fixed: float) -> list[list[int]]:
    """The cheapest way to run some edits, as lists of their numbers; neighbours in depth stand together.

    Args:
        starts: for each the number of blocks before it.
        depth: the number of all blocks.
        rows: of each.
        tokens: of each row.
        fixed: what a run of a block costs beside its tokens, in tokens.
    """
    order = sorted(range(len(starts)), key=lambda i: starts[i])
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first so many, and where their last cohort begins
    for stop in range(1, len(order) + 1):
        ways = []
        for begin in range(stop):
            together = rows * (stop - begin)
            if begin < stop - 1 and together > MOST_ROWS:
                continue
            blocks = depth - starts[order[begin]] + 1  # the head is one more
            ways.append((best[begin][0] + blocks * (fixed + together * tokens), begin))
        best.append(min(ways))
    cohorts, stop = [], len(order)
    while stop:
        begin = best[stop][1]
        cohorts.append(order[begin:stop])
        stop = begin
    return cohorts[::-1]
