"""Which edits should run side by side.

Running a block has a fixed cost, however few rows it has: its weights are read and its kernels are started. Small
batches whose edits begin in neighbouring blocks can share this cost. The price is that the deeper edits also run blocks
that they would skip alone.

    cost of a run = blocks that run · (fixed cost + tokens that run)

All rows of a run are computed from its first block on, so all of them count in every block.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_ROWS = 1024  # rows in one run, at most


def fixed_cost(width: int | None, device: str) -> float:
    """The fixed cost of running a block, in tokens that could run in the same time.

    Measured on one thread in float32. At width 768 reading the weights takes as long as 17 tokens; at width 64 starting
    the block takes as long as 100 tokens. The value for an accelerator is a cautious guess.
    """
    return 256.0 if device != "cpu" else 17.0 + 3e5 / (width or 768) ** 2


def cohorts_of(starts: Sequence[int], depth: int, rows: int, tokens: float, fixed: float) -> list[list[int]]:
    """The cheapest grouping of some edits, as lists of their numbers; a group contains neighbours in depth.

    Args:
        starts: for each edit the number of blocks before it.
        depth: the number of all blocks.
        rows: rows of each edit.
        tokens: tokens of each row.
        fixed: the fixed cost of running a block, in tokens.
    """
    order = sorted(range(len(starts)), key=lambda i: starts[i])
    # For each number of edits: the lowest cost, and the first edit of the last cohort.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        ways = []
        for begin in range(stop):
            together = rows * (stop - begin)
            if begin < stop - 1 and together > MOST_ROWS:
                continue
            blocks = depth - starts[order[begin]] + 1  # the head counts as one more
            ways.append((best[begin][0] + blocks * (fixed + together * tokens), begin))
        best.append(min(ways))
    cohorts, stop = [], len(order)
    while stop:
        begin = best[stop][1]
        cohorts.append(order[begin:stop])
        stop = begin
    return cohorts[::-1]
