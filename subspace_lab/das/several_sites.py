"""One variable at several sites at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from subspace_lab.das.pairs import Counterfactuals, Pairs

Of = TypeVar("Of")


def at_several_sites(pairs: Pairs, variable: str, names: Sequence[str]) -> Pairs:
    """The pairs with a variable under several names, all with the same sources.

    A search at {name: site} then exchanges the variable at all these sites at once, with its own subspace at each:

        both = at_several_sites(pairs, "gender", ["gender at the name", "gender at the end"])
        search(backbone, both, [{"gender at the name": site, "gender at the end": other}])

    The expected answers do not change, so they are not right for an exchange of only one of the names.

    Args:
        pairs: pairs with this variable; their other variables do not change.
        names: two or more names that no other variable has.

    Raises:
        ValueError: no such variable, or names that are too few, equal or taken.
    """
    if variable not in pairs.variables:
        raise ValueError(f"Unknown variable {variable!r}; the pairs have {pairs.variables}.")
    others = [name for name in pairs.variables if name != variable]
    if isinstance(names, str) or len(set(names)) < max(2, len(list(names))) or set(names) & set(others):
        raise ValueError(f"names={names!r}: needed are two or more different names, none of them among {others}.")

    def renamed(of: Mapping[str, Of]) -> dict[str, Of]:
        return {name: value for own, value in of.items() for name in (names if own == variable else [own])}

    def repeated(data: Counterfactuals) -> Counterfactuals:
        return replace(
            data,
            sources=renamed(data.sources),
            values=renamed(data.values),
            source_answers=renamed(data.source_answers),
        )

    train: Counterfactuals | Callable[[int], Counterfactuals]
    if callable(pairs.train):
        stream = pairs.train
        train = lambda step: repeated(stream(step))  # noqa: E731
    else:
        train = repeated(pairs.train)
    return replace(pairs, train=train, dev=repeated(pairs.dev), test=repeated(pairs.test))
