"""Counterfactual pairs as tensors, in three splits: the data of a search."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.arguments import whole_number
from subspace_lab.das._pair_keys import keys_of
from subspace_lab.das.answers import Spelled, as_spelled, as_tensor, check_apart, distinguishing
from subspace_lab.das.splits import assigned
from subspace_lab.das.splits import balanced as even
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch

SURPLUS = "pairs, so that each answer is about as frequent as the others (balance=False keeps them)"


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactuals:
    """Bases, a source for each variable, and the answers before and after the interchange.

    Attributes:
        base: the base inputs.
        sources: {variable: its source inputs}, one source for each base. Where a pair does not exchange a variable,
            the source of that variable is the base itself.
        base_answer, answer: (pairs,) indices into the answers, before and after the interchange.
        answers: the answers as text, for people.
        tokens: (answers,) the token ids of the answers, or (answers, longest) filled with −1 if some answers have
            several tokens; None if the model's output already has one logit for each answer.
        values: {variable: (pairs,) the value of the variable in its source, as a number}. Methods that compare the
            mean states of these values use it. Without it they use the expected answers instead.
        labels: {name: a text for each pair}, further facts about the pairs. "entity" and "template" are the clusters
            of intervals and can be held out; "kind" is the kind of the pair, and scores can be split by it.
        source_answers: {variable: (pairs,) the answer to its source}, if it is known.
        whole: score an answer of several tokens whole, by the sum of its tokens' log probabilities. By default it is
            scored only up to the first token that distinguishes it from all other answers (`scored`).
    """

    base: Batch
    sources: Mapping[str, Batch]
    base_answer: Tensor
    answer: Tensor
    answers: tuple[str, ...]
    tokens: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source_answers: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Counterfactuals need a source for at least one variable.")
        for name, source in self.sources.items():
            if len(source) != len(self.base):
                raise ValueError(
                    f"{len(self.base)} bases and {len(source)} sources for {name!r}: each base needs its own."
                )
        of_sources = ((f"source_answers[{name!r}]", answer) for name, answer in self.source_answers.items())
        for which, answer in (("base_answer", self.base_answer), ("answer", self.answer), *of_sources):
            if answer.shape != (len(self.base),) or not _between(answer, len(self.answers)):
                raise ValueError(
                    f"{which} has shape {tuple(answer.shape)}; needed is for each of the {len(self.base)} pairs an "
                    f"index into the {len(self.answers)} answers, from 0 to {len(self.answers) - 1}."
                )
        if unknown := sorted(set(self.source_answers) - set(self.sources)):
            raise ValueError(f"source_answers for {unknown}; the variables are {list(self.sources)}.")
        if self.tokens is not None:
            if self.tokens.ndim not in (1, 2) or len(self.tokens) != len(self.answers):
                raise ValueError(
                    f"{tuple(self.tokens.shape)} tokens for {len(self.answers)} answers: each needs one id or several."
                )
            if self.tokens.ndim == 2:
                check_apart(self.answers, as_spelled(self.tokens))
        for name, values in self.values.items():
            if name not in self.sources or values.shape != (len(self.base),):
                raise ValueError(
                    f"Values of shape {tuple(values.shape)} for {name!r}; needed is one value for each of the "
                    f"{len(self.base)} pairs, for the variables {list(self.sources)}."
                )
        for name, labels in self.labels.items():
            if len(labels) != len(self.base):
                raise ValueError(f"{len(labels)} labels {name!r} for {len(self.base)} pairs: each pair needs one.")

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"Counterfactuals({len(self)} pairs of {', '.join(self.sources)}; {len(self.answers)} answers)"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each pair: its label "kind"; without this label "changes" or "stays", as the answer does."""
        if "kind" in self.labels:
            return self.labels["kind"]
        changed = (self.answer != self.base_answer).tolist()
        return tuple("changes" if one else "stays" for one in changed)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The variables that each pair exchanges, as "a, b": those whose source is not the base itself."""
        keys = keys_of((self.base, *self.sources.values()))
        names = list(self.sources)
        return tuple(
            ", ".join(name for name, own in zip(names, sources, strict=True) if own != base)
            for base, *sources in keys
        )

    @property
    def scored(self) -> Tensor | None:
        """The token ids of the answers that are read: (answers,), or (answers, most) filled with −1.

        For an answer of several tokens these are the first ones, up to the token that distinguishes it from all other
        answers; with `whole` they are all of its tokens. None if the model's output already has one logit for each
        answer.
        """
        if self.tokens is None or self.tokens.ndim == 1 or self.whole:
            return self.tokens
        return as_tensor(distinguishing(as_spelled(self.tokens))).to(self.tokens.device)

    @property
    def readout(self) -> Readout:
        """The answers' logits after the last token of the base.

        Raises:
            ValueError: several tokens of the answers are read; `answer_engine` can do that.
        """
        scored = self.scored
        if scored is not None and scored.ndim == 2:
            raise ValueError(
                f"{scored.shape[1]} tokens of each answer are read, not one: this needs several reads."
            )
        return Readout.at(self.base, "last", scored)

    def rows(self, rows: Tensor) -> Counterfactuals:
        """The pairs with these indices."""
        picked = torch.arange(len(self))[rows.cpu()].tolist() if self.labels else []
        return replace(
            self,
            base=self.base.rows(rows),
            sources={name: s.rows(rows) for name, s in self.sources.items()},
            base_answer=self.base_answer[rows],
            answer=self.answer[rows],
            values={name: v[rows] for name, v in self.values.items()},
            labels={name: tuple(of[i] for i in picked) for name, of in self.labels.items()},
            source_answers={name: answer[rows] for name, answer in self.source_answers.items()},
        )

    def balanced(self, seed: int = 0) -> Counterfactuals:
        """Fewer pairs, in which the expected answers, and pairs that change and pairs that stay, are about as frequent.

        A group is one expected answer in pairs that change, or in pairs that stay. Pairs are dropped from the largest
        group first. This ends when all groups have the same size, when half of the pairs is dropped (if one answer is
        rare, equal groups would cost nearly all others), or when no group holds more than a twentieth of the pairs,
        so that a constant answer gains nothing.

        Args:
            seed: seed of the random choice of the dropped pairs.
        """
        changed = (self.answer != self.base_answer).tolist()
        return self.rows(torch.tensor(even(list(zip(self.answer.tolist(), changed, strict=True)), seed)))

    def to(self, device: torch.device | str) -> Counterfactuals:
        """The same pairs on a device."""
        return replace(
            self,
            base=self.base.to(device),
            sources={name: s.to(device) for name, s in self.sources.items()},
            base_answer=self.base_answer.to(device),
            answer=self.answer.to(device),
            source_answers={name: answer.to(device) for name, answer in self.source_answers.items()},
        )


Stream = Callable[[int], Counterfactuals]
"""step → fresh pairs for this training step. The same step gives the same pairs."""


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Counterfactual pairs in three splits.

    A method is fitted on `train`. Sites, ranks and learning rates are chosen on `dev`. `test` gives the reported
    scores and takes no part in any choice.

    Attributes:
        train: the pairs to fit on, or a function step → fresh pairs, so that no pair is seen twice.
        dev, test: held-out pairs.
        task: a short description of the pairs, for people.
        dropped: {what was left out and why: how many}: words that a tokenizer cannot distinguish, pairs with a name
            that would be in two splits, pairs that the model answers wrong.
        answered: {split: {"base": number of bases that the model answers right, "pair": number of pairs in which it
            answers the base and all sources right, "of": number of all pairs}}, counted by `only_answered` before it
            leaves out pairs.

    Raises:
        ValueError: (at construction) an empty split, splits with different variables, or splits whose answers are
            different outputs of the model.
    """

    train: Counterfactuals | Stream
    dev: Counterfactuals
    test: Counterfactuals
    task: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    answered: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, split in self._fixed():
            if not isinstance(split, Counterfactuals):
                raise TypeError(f"The {name} split is a {type(split).__name__}; needed are Counterfactuals.")
            if not len(split):
                raise ValueError(f"The {name} split has no pairs.")
            if list(split.sources) != self.variables:
                raise ValueError(
                    f"The {name} split has the variables {list(split.sources)}, the test split {self.variables}."
                )
        self._join_answers()

    @classmethod
    def split(
        cls,
        pairs: Counterfactuals,
        *,
        by: str | Sequence[str] | None = None,
        dev: float = 0.15,
        test: float = 0.25,
        seed: int = 0,
        balance: bool = False,
        task: str = "",
    ) -> Pairs:
        """Draw three splits at random from one set of pairs.

        Equal pairs (with the same base and the same sources) go into the same split. A name or an entity may still
        occur in several splits and can then be memorised; `by` holds it out. With `by`, a pair whose values belong to
        different splits is left out and counted in `dropped`.

        Args:
            by: what no two splits share: "entity", "template" or another label ("entity" and "source_entity" count as
                one list of values), "answer" (the words before and after the interchange), or several of these.
            dev, test: shares of the pairs.
            seed: seed of the random draw.
            balance: leave out surplus pairs, so that in each split the answers, and pairs that change and pairs that
                stay, are about equally frequent; at most half of the pairs is left out
                (`Counterfactuals.balanced`). Without it one answer may be more frequent, which raises the floor of
                the best constant answer.

        Raises:
            TypeError: the pairs are not Counterfactuals.
            ValueError: shares that leave a split empty, or a label that the pairs do not have.
        """
        if not isinstance(pairs, Counterfactuals):
            raise TypeError(f"Needed are Counterfactuals, found {type(pairs).__name__}; `from_texts` makes them.")
        whole_number(seed, "seed")
        for name, share in (("dev", dev), ("test", test)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
                raise ValueError(f"{name}={share!r}: needed is a share of the pairs, such as 0.2.")
        places, dropped = _drawn(pairs, {"dev": dev, "test": test}, seed), {}
        if by is not None:
            names = [by] if isinstance(by, str) else list(by)
            held_out = [assigned(_values_of(pairs, name), {"dev": dev, "test": test}, seed) for name in names]
            places = [one[0] if len(set(one)) == 1 else None for one in zip(*held_out, strict=True)]
            if lost := places.count(None):
                dropped[f"pairs with values of {' or '.join(names)} that are in several splits"] = lost
        chosen = {
            name: [i for i, place in enumerate(places) if place == name] for name in ("train", "dev", "test")
        }
        if empty := [name for name, own in chosen.items() if not own]:
            raise ValueError(
                f"dev={dev} and test={test} of {len(pairs)} pairs, with {by!r} held out, leave the {empty[0]} split "
                "without pairs; each of train, dev and test needs at least one."
            )
        splits = {name: pairs.rows(torch.tensor(own)) for name, own in chosen.items()}
        if balance:
            even = {name: split.balanced(seed) for name, split in splits.items()}
            if surplus := sum(len(splits[name]) - len(even[name]) for name in splits):
                dropped[SURPLUS] = surplus
            splits = even
        return cls(splits["train"], splits["dev"], splits["test"], task=task, dropped=dropped)

    def __repr__(self) -> str:
        train = "fresh at every step" if callable(self.train) else len(self.train)
        sizes = f"train: {train}, dev: {len(self.dev)}, test: {len(self.test)}"
        left_out = "".join(f"; left out: {n} {what}" for what, n in self.dropped.items())
        return f"Pairs({self.task or 'no task'}; {sizes}; of {', '.join(self.variables)}{left_out})"

    @property
    def variables(self) -> list[str]:
        return list(self.test.sources)

    def fingerprint(self) -> str:
        """A digest of all inputs and answers. Training pairs that are drawn at each step are not part of it."""
        digest = hashlib.sha256()
        for name, split in self._fixed():
            digest.update(f"{name}{', whole answers' * split.whole}".encode())
            for what, tensor in _tensors(split).items():
                digest.update(str((what, tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            if split.labels:
                digest.update(json.dumps({k: list(v) for k, v in split.labels.items()}, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def _fixed(self) -> Iterator[tuple[str, Any]]:
        if not callable(self.train):
            yield "train", self.train
        yield "dev", self.dev
        yield "test", self.test

    def _join_answers(self) -> None:
        """Give all splits the same list of answers, so that each is scored against the same alternatives."""
        splits = dict(self._fixed())
        first = self.test
        if len({split.whole for split in splits.values()}) > 1:
            raise ValueError(
                "Some splits score their answers whole and some by the first token that tells them apart: "
                f"{ {name: split.whole for name, split in splits.items()} }."
            )
        if all(_same_answers(split, first) for split in splits.values()):
            return
        if any(split.tokens is None for split in splits.values()):
            lists = {name: list(split.answers) for name, split in splits.items()}
            raise ValueError(f"The splits have different answers: {lists}.")
        joined: dict[Spelled, str] = {}
        for split in splits.values():
            for spelled, answer in zip(_spelled(split), split.answers, strict=True):
                joined.setdefault(spelled, answer)
        number = {spelled: i for i, spelled in enumerate(joined)}
        for name, split in splits.items():
            renumbered = torch.tensor([number[spelled] for spelled in _spelled(split)])
            changed = replace(
                split,
                base_answer=renumbered[split.base_answer.cpu()],
                answer=renumbered[split.answer.cpu()],
                answers=tuple(joined.values()),
                tokens=as_tensor(list(joined)),
                source_answers={v: renumbered[answer.cpu()] for v, answer in split.source_answers.items()},
            )
            object.__setattr__(self, name, changed)


def _drawn(pairs: Counterfactuals, shares: Mapping[str, float], seed: int) -> list[str | None]:
    """A random split for each pair; equal pairs get the same split."""
    keys = keys_of((pairs.base, *pairs.sources.values()))
    distinct = list(dict.fromkeys(keys))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    n_dev, n_test = round(shares["dev"] * len(distinct)), round(shares["test"] * len(distinct))
    if min(n_dev, n_test, len(distinct) - n_dev - n_test) < 1:
        raise ValueError(
            f"dev={shares['dev']} and test={shares['test']} of {len(distinct)} different pairs leave a split without "
            "pairs; each of train, dev and test needs at least one."
        )
    name_of: dict[Any, str | None] = dict.fromkeys(distinct, "train")
    name_of |= {distinct[i]: "dev" for i in order[:n_dev]}
    name_of |= {distinct[i]: "test" for i in order[n_dev : n_dev + n_test]}
    return [name_of[key] for key in keys]


def _values_of(pairs: Counterfactuals, by: str) -> list[frozenset[Any]]:
    """For each pair the values that it must not share with another split."""
    if by == "answer":
        words = [pairs.answers[i].strip() for i in range(len(pairs.answers))]
        both = zip(pairs.base_answer.tolist(), pairs.answer.tolist(), strict=True)
        return [frozenset(words[i] for i in own) for own in both]
    names = [name for name in ((by, f"source_{by}") if by == "entity" else (by,)) if name in pairs.labels]
    if by not in names:
        raise ValueError(
            f"by={by!r}: the pairs have the labels {list(pairs.labels) or 'none'}; possible are these or 'answer'."
        )
    return [frozenset(own) for own in zip(*(pairs.labels[name] for name in names), strict=True)]


def _same_answers(one: Counterfactuals, other: Counterfactuals) -> bool:
    if one.tokens is None or other.tokens is None:
        return one.tokens is other.tokens and one.answers == other.answers
    return _spelled(one) == _spelled(other)


def _spelled(split: Counterfactuals) -> list[Spelled]:
    return [] if split.tokens is None else as_spelled(split.tokens)


def _between(answer: Tensor, n: int) -> bool:
    """Whether all indices are valid. Checked on the CPU only, because an accelerator would have to synchronise."""
    looked_at = answer.device.type == "cpu" and len(answer) > 0
    return not looked_at or bool((answer.min() >= 0) & (answer.max() < n))


def _tensors(pairs: Counterfactuals) -> dict[str, Tensor]:
    """{name: tensor} of everything that a method or a score depends on."""
    found: dict[str, Any] = {"base answer": pairs.base_answer, "answer": pairs.answer, "tokens": pairs.tokens}
    found |= {f"value of {name}": values for name, values in pairs.values.items()}
    batches = {"base": pairs.base, **{f"source of {name}": source for name, source in pairs.sources.items()}}
    for who, batch in batches.items():
        found |= {f"{who}, input": batch.positional, f"{who}, prompt lengths": batch.prompt_lengths}
        found |= {f"{who}, input {name}": value for name, value in batch.inputs.items()}
        found |= {f"{who}, position {name}": value for name, value in batch.columns.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
