"""Small programs for torchwright's compiler, each with one variable that the answer depends on.

A program reads x and y, forms a variable of both, and answers with a function of the variable and of z. There are
two layouts of a text, with or without tokens that say nothing before z:

    at the end     x y z =        the last position looks at x, y and z, forms the variable, then the answer
    on the way     x y ; z =      the position of the mark forms the variable; the last one fetches it and answers

`PROGRAMS` are twelve; `variants` are those and eight more, in other layouts, some with longer texts and wider models.

The answer is no function of the variable alone, so where only the answer is left no interchange can pass for the
variable. Values are coded as one column, +1 or −1, where there are two, else one-hot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.model.batches import Batch
from subspace_lab.tasks.compiled import Compiled, load

WIDTH, HEAD_WIDTH, LONGEST = 128, 16, 32
MARK, END, FILLER = ";", "=", "_"


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: of its variable.
        x, y, z: the tokens, one character each, that may stand there.
        value: (x, y) → the variable's value.
        answer: (value, z) → the token that answers.
        on_the_way: the layout.
        fillers: how many tokens that say nothing stand before z.
        width: of the residual stream.
    """

    name: str
    x: str
    y: str
    z: str
    value: Callable[[str, str], Any]
    answer: Callable[[Any, str], str]
    on_the_way: bool = False
    fillers: int = 0
    width: int = WIDTH

    @property
    def values(self) -> list[Any]:
        return sorted({self.value(x, y) for x, y in product(self.x, self.y)})

    @property
    def vocabulary(self) -> list[str]:
        answers = "".join(self.answer(v, z) for v, z in product(self.values, self.z))
        return list(dict.fromkeys(self.x + self.y + self.z + answers + MARK + END + FILLER * bool(self.fillers)))

    @property
    def positions(self) -> tuple[str, ...]:
        """Where the variable is at some time."""
        return ("2", str(4 + self.fillers)) if self.on_the_way else (str(3 + self.fillers),)

    def text(self, x: str, y: str, z: str) -> str:
        fillers = FILLER * self.fillers
        return f"{x}{y}{MARK}{fillers}{z}{END}" if self.on_the_way else f"{x}{y}{fillers}{z}{END}"

    def sites(self, layers: int) -> list[Site]:
        return [Site("block_output", layer, where) for layer in range(layers) for where in self.positions]

    def compiled(self, folder: Path) -> Compiled:
        """The program as a model."""
        from torchwright import compile_hf_bundle
        from torchwright.ops.attention_ops import attend_to_offset
        from torchwright.ops.inout_nodes import create_onehot_embedding, create_rope_config
        from torchwright.ops.linear import concat

        embedding = create_onehot_embedding(self.vocabulary)
        rope = create_rope_config(d_head=HEAD_WIDTH, max_positions=LONGEST)
        tables = _Tables(self, embedding)
        back = (-2, -1) if self.on_the_way else (-3 - self.fillers, -2 - self.fillers)
        x, y = (attend_to_offset(rope, embedding, delta) for delta in back)
        variable = tables.variable(concat([x, y]))
        variable.name = self.name
        homes = {self.name: self.positions[0]}
        if self.on_the_way:
            variable = attend_to_offset(rope, variable, -2 - self.fillers)
            variable.name = f"fetched {self.name}"
            homes[variable.name] = self.positions[1]
        z = attend_to_offset(rope, embedding, -1)
        compile_hf_bundle(
            tables.answers(concat([variable, z])),
            embedding,
            folder,
            d=self.width,
            d_head=HEAD_WIDTH,
            max_seq_len=LONGEST,
            bos_token=None,
            eos_token=None,
            add_bos_token=False,
            schematic_metadata={"variables": {self.name: homes}},
        )
        return load(folder)

    def pairs(self, tokenizer: Any, *, train: int = 300, dev: int = 150, test: int = 300, seed: int = 0) -> Pairs:
        """Pairs in three splits that share no input; each value of the variable is equally frequent."""
        rng = random.Random(seed)
        sizes = {"train": train, "dev": dev, "test": test}
        parts: dict[str, list[list[tuple[str, ...]]]] = {name: [] for name in sizes}
        for value in self.values:
            mine = [one for one in product(self.x, self.y, self.z) if self.value(*one[:2]) == value]
            rng.shuffle(mine)
            first, second = round(0.6 * len(mine)), round(0.75 * len(mine))
            for name, some in zip(parts, (mine[:first], mine[first:second], mine[second:]), strict=True):
                parts[name].append(some)
        return Pairs(
            **{name: self._drawn(tokenizer, parts[name], sizes[name], rng) for name in parts}, task=self.name
        )

    def _drawn(
        self, tokenizer: Any, inputs: Sequence[Sequence[tuple[str, ...]]], n: int, rng: random.Random
    ) -> Counterfactuals:
        """n pairs of the inputs that a split has of each value."""
        drawn = [[rng.choice(rng.choice(inputs)) for _ in range(n)] for _ in range(2)]
        answers = sorted({self.answer(v, z) for v, z in product(self.values, self.z)})
        base, source = drawn
        before = [self.answer(self.value(x, y), z) for x, y, z in base]
        after = [self.answer(self.value(*s[:2]), b[2]) for b, s in zip(base, source, strict=True)]

        def batch(some: Sequence[tuple[str, ...]]) -> Batch:
            ids = torch.tensor([tokenizer(self.text(*one))["input_ids"] for one in some])
            return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

        return Counterfactuals(
            base=batch(base),
            sources={self.name: batch(source)},
            base_answer=torch.tensor([answers.index(one) for one in before]),
            answer=torch.tensor([answers.index(one) for one in after]),
            answers=tuple(answers),
            tokens=torch.tensor(tokenizer.convert_tokens_to_ids(answers)),
            values={self.name: torch.tensor([self.values.index(self.value(*s[:2])) for s in source])},
        )


class _Tables:
    """A program's lookup tables as nodes, and the codes that they are made of."""

    def __init__(self, program: Program, embedding: Any) -> None:
        self.program, self.embedding = program, embedding

    def token(self, token: str) -> Tensor:
        return self.embedding.get_embedding(token)

    def code(self, value: Any) -> Tensor:
        values = self.program.values
        if len(values) == 2:
            return torch.tensor([1.0 if value == values[1] else -1.0])
        return torch.eye(len(values))[values.index(value)]

    def variable(self, xy: Any) -> Any:
        """The node of the variable, from x and y in a row."""
        p = self.program
        table = {torch.cat([self.token(x), self.token(y)]): self.code(p.value(x, y)) for x, y in product(p.x, p.y)}
        return self._lookup(xy, table)

    def answers(self, vz: Any) -> Any:
        """The node of the answer, from the variable and z in a row."""
        p = self.program
        table = {
            torch.cat([self.code(v), self.token(z)]): self.token(p.answer(v, z)) for v, z in product(p.values, p.z)
        }
        return self._lookup(vz, table)

    @staticmethod
    def _lookup(node: Any, table: dict[Tensor, Tensor]) -> Any:
        from torchwright.ops.swiglu import map_to_table

        width = len(next(iter(table.values())))
        return map_to_table(node, table, torch.zeros(width))


DIGITS, FIVE, LETTERS = "0123456789", "01234", "abcdef"


def shifted(value: int, z: str, modulus: int = 5) -> str:
    return str((value + int(z)) % modulus)


PROGRAMS = (
    Program("carry", DIGITS, DIGITS, DIGITS, lambda x, y: int(x) + int(y) >= 10, lambda v, z: shifted(v, z, 10)),
    Program(
        "parity", DIGITS, DIGITS, DIGITS, lambda x, y: (int(x) + int(y)) % 2, lambda v, z: shifted(3 * v, z, 10)
    ),
    Program("greater", DIGITS, DIGITS, FIVE, lambda x, y: int(x) > int(y), shifted),
    Program(
        "table", LETTERS, LETTERS, FIVE, lambda x, y: (LETTERS.index(x) ** 2 + 3 * "bdfaec".index(y)) % 4, shifted
    ),
    Program("equal", LETTERS, LETTERS, FIVE, lambda x, y: x == y, lambda v, z: shifted(2 * v, z), on_the_way=True),
    Program("both", LETTERS, LETTERS, FIVE, lambda x, y: x in "ace" and y in "abc", shifted),
    Program("either", LETTERS, LETTERS, FIVE, lambda x, y: x in "ae" or y in "ae", shifted, on_the_way=True),
    Program("maximum", FIVE, FIVE, FIVE, lambda x, y: max(int(x), int(y)), shifted),
    Program("copy", FIVE, FIVE, FIVE, lambda x, y: int(x), shifted, on_the_way=True),
    Program("modular sum", FIVE, FIVE, FIVE, lambda x, y: (int(x) + int(y)) % 5, shifted, on_the_way=True),
    Program("distance", FIVE, FIVE, FIVE, lambda x, y: abs(int(x) - int(y)), shifted),
    Program("product sign", "+-0", "+-0", LETTERS, lambda x, y: _sign(x) * _sign(y), lambda v, z: _letter(v, z)),
)


MORE = (
    Program("sum mod 2", FIVE, FIVE, FIVE, lambda x, y: (int(x) + int(y)) % 2, shifted),
    Program("sum mod 3", FIVE, FIVE, FIVE, lambda x, y: (int(x) + int(y)) % 3, shifted),
    Program("sum mod 4", FIVE, FIVE, FIVE, lambda x, y: (int(x) + int(y)) % 4, shifted),
    Program("difference mod 3", FIVE, FIVE, FIVE, lambda x, y: (int(x) - int(y)) % 3, shifted),
    Program("product mod 3", FIVE, FIVE, FIVE, lambda x, y: int(x) * int(y) % 3, shifted),
    Program("minimum", FIVE, FIVE, FIVE, lambda x, y: min(int(x), int(y)), shifted),
    Program("order", FIVE, FIVE, LETTERS, lambda x, y: _sign_of(int(x) - int(y)), lambda v, z: _letter(v, z)),
    Program("one of both", LETTERS, LETTERS, FIVE, lambda x, y: (x in "abc") != (y in "ace"), shifted),
)


def variants() -> list[Program]:
    """Fifty-two programs: twenty functions in both layouts, and twelve of them with longer texts and wider models."""
    found = []
    for i, program in enumerate([*PROGRAMS, *MORE]):
        found += [program, replace(program, on_the_way=not program.on_the_way)]
        if program in PROGRAMS:
            found.append(replace(program, fillers=1 + i % 3, width=(128, 256)[i % 2], on_the_way=i % 4 < 2))
    return found


def _sign_of(number: int) -> int:
    return (number > 0) - (number < 0)


def _sign(token: str) -> int:
    return {"+": 1, "-": -1, "0": 0}[token]


def _letter(value: int, z: str) -> str:
    """The letter after z, before it, or z itself."""
    return LETTERS[(LETTERS.index(z) + value) % len(LETTERS)]
