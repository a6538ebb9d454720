"""Counterfactual pairs as tensors, and their three splits: what a search is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactuals:
    """Bases, a source for each variable, and the answers before and after the interchange.

    Attributes:
        base: the bases.
        sources: {variable: its sources}, one for each base; a variable that a pair leaves alone has the base there.
        base_answer, answer: (pairs,) indices into the answers, before and after the interchange.
        answers: what the answers are, for people.
        tokens: (answers,) their token ids; None where the model's output is over the answers already.
        values: {variable: (pairs,) which value the variable has in its source, as a number}. Methods that compare
            the means of these values use it; where it is missing they use the expected answers instead.
        labels: {name: for each pair a text}, what is known of the pairs beside their answers: "entity" and
            "template" are the clusters of intervals and can be held out, "kind" (of pair) splits the scores.
    """

    base: Batch
    sources: Mapping[str, Batch]
    base_answer: Tensor
    answer: Tensor
    answers: tuple[str, ...]
    tokens: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Counterfactuals need a source for at least one variable.")
        for name, source in self.sources.items():
            if len(source) != len(self.base):
                raise ValueError(
                    f"{len(self.base)} bases and {len(source)} sources for {name!r}: each base needs its own."
                )
        for which, answer in (("base_answer", self.base_answer), ("answer", self.answer)):
            if answer.shape != (len(self.base),) or not _between(answer, len(self.answers)):
                raise ValueError(
                    f"{which} has shape {tuple(answer.shape)}; needed is for each of the {len(self.base)} pairs an "
                    f"index into the {len(self.answers)} answers, from 0 to {len(self.answers) - 1}."
                )
        if self.tokens is not None and self.tokens.shape != (len(self.answers),):
            raise ValueError(f"{tuple(self.tokens.shape)} tokens for {len(self.answers)} answers: each needs one.")
        for name, values in self.values.items():
            if name not in self.sources or values.shape != (len(self.base),):
                raise ValueError(
                    f"Values of shape {tuple(values.shape)} for {name!r}; needed is one for each of the "
                    f"{len(self.base)} pairs, of the variables {list(self.sources)}."
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
        """The kind of each pair: its label "kind", or else "changes" and "stays" by whether the answer changes."""
        if "kind" in self.labels:
            return self.labels["kind"]
        changed = (self.answer != self.base_answer).tolist()
        return tuple("changes" if one else "stays" for one in changed)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Which variables each pair exchanges, as "a, b": those whose source is not the base itself."""
        keys = [_key(self, i) for i in range(len(self))]
        names = list(self.sources)
        return tuple(
            ", ".join(name for name, own in zip(names, sources, strict=True) if own != base)
            for base, *sources in keys
        )

    @property
    def readout(self) -> Readout:
        """The answers' logits after the last token of the base."""
        return Readout.at(self.base, "last", self.tokens)

    def rows(self, rows: Tensor) -> Counterfactuals:
        """Some of the pairs."""
        picked = torch.arange(len(self))[rows.cpu()].tolist() if self.labels else []
        return replace(
            self,
            base=self.base.rows(rows),
            sources={name: s.rows(rows) for name, s in self.sources.items()},
            base_answer=self.base_answer[rows],
            answer=self.answer[rows],
            values={name: v[rows] for name, v in self.values.items()},
            labels={name: tuple(of[i] for i in picked) for name, of in self.labels.items()},
        )

    def to(self, device: torch.device | str) -> Counterfactuals:
        """The pairs on a device."""
        return replace(
            self,
            base=self.base.to(device),
            sources={name: s.to(device) for name, s in self.sources.items()},
            base_answer=self.base_answer.to(device),
            answer=self.answer.to(device),
        )


Stream = Callable[[int], Counterfactuals]
"""step → fresh pairs of one training step; the same step gives the same pairs."""


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Counterfactual pairs in three splits.

    A method is fitted on `train`. Sites, ranks and learning rates are chosen on `dev`. `test` gives the scores that
    are reported, and takes no part in any choice.

    Attributes:
        train: the pairs to fit on, or a function step → fresh pairs, of which none is seen twice.
        dev, test: held-out pairs.
        task: what the pairs are about, for people.

    Raises:
        ValueError: (at construction) an empty split, other variables in one split than in another, or answers that
            are not the same model outputs.
    """

    train: Counterfactuals | Stream
    dev: Counterfactuals
    test: Counterfactuals
    task: str = ""

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
        cls, pairs: Counterfactuals, *, dev: float = 0.15, test: float = 0.25, seed: int = 0, task: str = ""
    ) -> Pairs:
        """Draw three splits from one set of pairs at random.

        Pairs that are equal (in their base and in all sources) come into one split. Names or entities may still
        occur in several splits; where they can be memorised, make the splits by hand, by name. Answers are not
        balanced: of few pairs a split may hold one answer more often, which raises its constant floor.

        Args:
            dev, test: shares of the pairs.
            seed: of the draw.

        Raises:
            ValueError: shares that leave a split empty.
        """
        keys = [_key(pairs, i) for i in range(len(pairs))]
        distinct = list(dict.fromkeys(keys))
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
        n_dev, n_test = round(dev * len(distinct)), round(test * len(distinct))
        if min(n_dev, n_test, len(distinct) - n_dev - n_test) < 1:
            raise ValueError(
                f"dev={dev} and test={test} of {len(distinct)} different pairs leave a split without pairs; each "
                "of train, dev and test needs at least one."
            )
        name_of = dict.fromkeys(distinct, "train")
        name_of |= {distinct[i]: "dev" for i in order[:n_dev]}
        name_of |= {distinct[i]: "test" for i in order[n_dev : n_dev + n_test]}
        chosen = {
            name: torch.tensor([i for i, key in enumerate(keys) if name_of[key] == name])
            for name in ("train", "dev", "test")
        }
        return cls(**{name: pairs.rows(rows) for name, rows in chosen.items()}, task=task)

    def __repr__(self) -> str:
        train = "fresh at every step" if callable(self.train) else len(self.train)
        sizes = f"train: {train}, dev: {len(self.dev)}, test: {len(self.test)}"
        return f"Pairs({self.task or 'no task'}; {sizes}; of {', '.join(self.variables)})"

    @property
    def variables(self) -> list[str]:
        return list(self.test.sources)

    def fingerprint(self) -> str:
        """A digest of all inputs and answers (of dev and test alone where training pairs are drawn afresh)."""
        digest = hashlib.sha256()
        for name, split in self._fixed():
            digest.update(name.encode())
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
        """Give all splits one list of answers, so that each is scored against the same alternatives."""
        splits = dict(self._fixed())
        first = self.test
        if all(_same_answers(split, first) for split in splits.values()):
            return
        if any(split.tokens is None for split in splits.values()):
            lists = {name: list(split.answers) for name, split in splits.items()}
            raise ValueError(f"The splits have different answers: {lists}.")
        joined: dict[int, str] = {}
        for split in splits.values():
            for token, answer in zip(_ids(split), split.answers, strict=True):
                joined.setdefault(token, answer)
        number = {token: i for i, token in enumerate(joined)}
        for name, split in splits.items():
            renumbered = torch.tensor([number[token] for token in _ids(split)])
            changed = replace(
                split,
                base_answer=renumbered[split.base_answer.cpu()],
                answer=renumbered[split.answer.cpu()],
                answers=tuple(joined.values()),
                tokens=torch.tensor(list(joined)),
            )
            object.__setattr__(self, name, changed)


def _same_answers(one: Counterfactuals, other: Counterfactuals) -> bool:
    if one.tokens is None or other.tokens is None:
        return one.tokens is other.tokens and one.answers == other.answers
    return _ids(one) == _ids(other)


def _ids(split: Counterfactuals) -> list[int]:
    return [] if split.tokens is None else split.tokens.tolist()


def _between(answer: Tensor, n: int) -> bool:
    """Whether all indices are possible; looked at on the CPU alone, since an accelerator would have to wait."""
    looked_at = answer.device.type == "cpu" and len(answer) > 0
    return not looked_at or bool((answer.min() >= 0) & (answer.max() < n))


def _tensors(pairs: Counterfactuals) -> dict[str, Tensor]:
    """Everything that a method or a score depends on, by name."""
    found: dict[str, Any] = {"base answer": pairs.base_answer, "answer": pairs.answer, "tokens": pairs.tokens}
    found |= {f"value of {name}": values for name, values in pairs.values.items()}
    batches = {"base": pairs.base, **{f"source of {name}": source for name, source in pairs.sources.items()}}
    for who, batch in batches.items():
        found |= {f"{who}, input": batch.positional, f"{who}, prompt lengths": batch.prompt_lengths}
        found |= {f"{who}, input {name}": value for name, value in batch.inputs.items()}
        found |= {f"{who}, position {name}": value for name, value in batch.columns.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _key(pairs: Counterfactuals, i: int) -> tuple[Any, ...]:
    """What makes one pair equal to another: the inputs of its base and sources, without padding."""
    parts: list[Any] = []
    for batch in (pairs.base, *pairs.sources.values()):
        ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
        if batch.positional is not None:
            parts.append(tuple(batch.positional[i].flatten().tolist()))
        elif isinstance(ids, Tensor):
            parts.append(tuple((ids[i] if mask is None else ids[i][mask[i].bool()]).tolist()))
        else:
            tensors = [t[i] for t in batch.inputs.values() if isinstance(t, Tensor)]
            parts.append(tuple(x for t in tensors for x in t.flatten().tolist()))
    return tuple(parts)
