"""Tasks, and the data sets of counterfactual pairs that are drawn from them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from subspace_lab.das.answers import ANSWERS, Answers, Speller, check_tokenizer, serving
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.encoding import as_message, encode
from subspace_lab.das.pairs import Pairs

SPLITS = ("train", "dev", "test")
Values = Mapping[str, Any]
Keep = Callable[[Values, Mapping[str, Values], Values], bool]
"""(values of every variable in the base, {variable: values in its source}, values after the interchange) → keep it?"""

# So many draws, for each answer of a task, until a kind of pair that has not come up counts as impossible.
DRAWS_PER_ANSWER = 100
PROMPTS_TRIED = 20  # prompts of each split, to see what the answers follow (a space, a quotation mark, ...)


@dataclass(frozen=True)
class Prompt:
    """A text and named character spans [start, end) in it. As a position, a name means the last token of its span."""

    text: str
    spans: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Task:
    """A causal model, prompts that pose its problem to a language model, and the answers.

    Attributes:
        name, description: for people.
        causal_model: the hypothesis.
        variable: the variable searched for by default.
        answers: {value of the causal model's output: the answer}, as text or as written in a vocabulary. Words that a
            tokenizer cannot distinguish are left out with this tokenizer.
        sample: (random generator, "train", "dev" or "test") → a setting: the inputs of the causal model and, if there
            are several wordings, `template`. The splits share no names, entities or amounts.
        prompt: setting → prompt. All prompts of a task have the same span names.
        entity: the key of a setting that says what the prompt is about (a city, a noun), for splits and intervals by
            entity.
        kind: (setting of a base, variables exchanged, whether the answer changes) → the kind of the pair, if there
            are more kinds than "changes" and "stays"; see `cause_or_isolate`.
    """

    name: str
    description: str
    causal_model: CausalModel
    variable: str
    answers: Mapping[Any, str]
    sample: Callable[[random.Random, str], dict[str, Any]]
    prompt: Callable[[Mapping[str, Any]], Prompt]
    entity: str | None = None
    kind: Callable[[Mapping[str, Any], Sequence[str], bool], str] | None = None

    def inputs(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `setting` that the causal model reads, without the wording."""
        return {name: setting[name] for name in self.causal_model.inputs}

    def answer(self, setting: Mapping[str, Any]) -> str:
        """The answer that the causal model gives to `setting`."""
        return self.answers[self.causal_model.run(self.inputs(setting))[self.causal_model.output]]

    def pairs(
        self,
        tokenizer: Any,
        *,
        train: int = 1000,
        dev: int = 200,
        test: int = 400,
        seed: int = 0,
        variables: Sequence[str] | None = None,
        keep: Keep | None = None,
        answers: Answers = "token",
        chat: bool = False,
    ) -> Pairs:
        """Counterfactual pairs of this task in three splits that share no names, entities or amounts.

        Words that cannot be answers with this tokenizer are not used, neither as answers nor in prompts;
        `Pairs.dropped` has their number.

        Args:
            tokenizer: the model's tokenizer, a fast Hugging Face tokenizer.
            train, dev, test: how many pairs each split gets.
            seed: seed of the random draw.
            variables: the variables to exchange; by default the task's variable.
            keep: which pairs to keep, as in `counterfactual_dataset`.
            answers: "token" scores answers by the first token that distinguishes them, "sequence" scores them whole.
            chat: turn each prompt into a user's message with the tokenizer's chat template.

        Raises:
            TypeError: a name instead of a tokenizer.
            ValueError: as in `counterfactual_dataset` and `encode`; fewer than two usable answers.
        """
        kept, left = self.serving(tokenizer, seed=seed, answers=answers, chat=chat)
        found = {}
        for split, n in (("train", train), ("dev", dev), ("test", test)):
            dataset = counterfactual_dataset(
                self, n, split=split, seed=seed, variables=variables, keep=keep, without=list(left)
            )
            found[split] = encode(dataset, tokenizer, kept, whole=answers == "sequence", chat=chat)
        return Pairs(found["train"], found["dev"], found["test"], task=self.name, dropped=counted(left))

    def serving(
        self, tokenizer: Any, *, seed: int = 0, answers: Answers = "token", chat: bool = False
    ) -> tuple[list[str], dict[str, str]]:
        """(the answers that this tokenizer can use, {other answer: why not}); the arguments are those of `pairs`."""
        if answers not in ANSWERS:
            raise ValueError(f"answers={answers!r}; possible are {' and '.join(map(repr, ANSWERS))}.")
        check_tokenizer(tokenizer)
        rng = random.Random(seed)
        drawn = [self.prompt(self.sample(rng, split)) for split in SPLITS for _ in range(PROMPTS_TRIED)]
        prompts = [as_message(tokenizer, one.text, {})[0] if chat else one.text for one in drawn]
        return serving(Speller(tokenizer), list(dict.fromkeys(self.answers.values())), prompts, answers)


def cause_or_isolate(base: Mapping[str, Any], exchanged: Sequence[str], changes: bool) -> str:
    """The kind of a pair whose base asks for an `attribute` (RAVEL, Huang et al. 2024, arXiv 2402.17700).

    "cause": the attribute is exchanged, and the answer must become the source's. "isolate": another attribute is
    exchanged, and the answer must stay. "same": base and source have the same value, so that the pair says little.
    """
    if base["attribute"] not in exchanged:
        return "isolate"
    return "cause" if changes else "same"


def counted(left: Mapping[str, str]) -> dict[str, int]:
    """{what was left out and why: how many}, from {answer that cannot be used: why}."""
    reasons = {why: [answer for answer in left if left[answer] == why] for why in left.values()}
    return {f"answers, {why} ({', '.join(of)})": len(of) for why, of in reasons.items()}


def check_split(split: str) -> None:
    """ValueError unless `split` is "train", "dev" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; possible are {list(SPLITS)}")


def counterfactual_dataset(
    task: Task,
    n: int,
    *,
    split: str,
    seed: int,
    variables: Sequence[str] | None = None,
    keep: Keep | None = None,
    without: Collection[str] = (),
) -> Dataset:
    """`n` pairs: a base, a source for each of `variables`, and the answer of the causal model after the interchange.

    Columns: `base` and `base_spans`; `sources`, `source_spans` and `source_values` ({variable: text, spans, or the
    value that the variable has in its source, as text}) and `source_answers`; `base_answer`; `answer`, expected after
    each variable took the value of its source; `changes`, whether the two answers differ; and, if the task defines
    them, the labels `entity` and `template` of the base and the `kind` of the pair.

    With one variable (default: the task's), the answer changes in every second pair. Among the pairs that change, and
    among those that stay, all answers are equally frequent, so that no constant answer does better than another. With
    several variables, each pair exchanges a random non-empty subset of them; a variable outside of the subset has the
    base as its source. Base and sources have the same template.

    `keep` selects pairs by the values of the causal model. For example, `lambda base, sources, after: after["left"] !=
    after["right"]` keeps the pairs in which two variables differ after the interchange.

    The answers in `without` are never expected of a base, a source or an interchange, and their values are in no
    setting: a name that cannot be an answer does not occur at all.

    Raises:
        ValueError: an unknown split or variable, n < 1, a task in which the variable never (or always) changes the
            answer, or a `keep` or `without` that leaves no pairs or too few.
    """
    check_split(split)
    if n < 1:
        raise ValueError(f"n = {n} pairs asked for; possible are 1 or more")
    variables = (task.variable,) if variables is None else tuple(variables)
    possible = [*task.causal_model.inputs, *task.causal_model.variables]
    if not variables or len(set(variables)) < len(variables) or not set(variables) <= set(possible):
        raise ValueError(
            f"variables {list(variables)} asked for; possible are one or more, each once, of {possible}"
        )

    rng = random.Random(seed)
    patience = max(1000, DRAWS_PER_ANSWER * len(task.answers))
    draw = _Draw(task, rng, split, keep, patience, frozenset(without))
    if len(variables) > 1:
        masks = range(1, 1 << len(variables))
        subsets = [[v for bit, v in enumerate(variables) if mask >> bit & 1] for mask in masks]
        pairs = (draw.kept(lambda: rng.choice(subsets)) for _ in range(n))
        return Dataset.from_list([pair.row(task, variables) for pair in pairs])

    # It is not known beforehand which answers a split can give: these draws find out, the loop below balances them.
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for _ in range(draw.patience):
        pair = draw.kept(lambda: variables)
        found[pair.changes][pair.answer] = 0
    for changes, counts in found.items():
        if not counts:
            kind = "never" if changes else "always"
            raise ValueError(
                f"task {task.name!r}: {variables[0]!r} {kind} changed the answer in {draw.patience} pairs of "
                f"the {split} split; half of the pairs must change it and half must not"
            )
    rows = []
    for index in range(n):
        changes = index % 2 == 0
        counts = found[changes]
        for _ in range(draw.patience):
            pair = draw.kept(lambda: variables)
            if pair.changes == changes and counts[pair.answer] == min(counts.values()):
                break
        else:
            rare = [answer for answer, count in counts.items() if count == min(counts.values())]
            raise ValueError(
                f"task {task.name!r}: no pair with an answer of {rare} in {draw.patience} draws, too rare"
            )
        counts[pair.answer] += 1
        rows.append(pair.row(task, variables))
    return Dataset.from_list(rows)


@dataclass
class _Draw:
    """Draws pairs of one split, one at a time."""

    task: Task
    rng: random.Random
    split: str
    keep: Keep | None
    patience: int
    without: frozenset[str] = frozenset()

    def kept(self, exchanged: Callable[[], Sequence[str]]) -> CounterfactualPair:
        """The next pair that `keep` accepts; ValueError if it accepts none of many."""
        for _ in range(self.patience):
            pair = CounterfactualPair.draw(self.task, self.rng, self.split, exchanged())
            if self.without and not pair.avoids(self.task, self.without):
                continue
            if self.keep is None or self.keep(pair.values, pair.source_values, pair.after):
                return pair
        if self.without:
            raise ValueError(
                f"task {self.task.name!r}: without the answers {sorted(self.without)} none of {self.patience} pairs of "
                f"the {self.split} split in a row can be used{' and is accepted by `keep`' if self.keep else ''}"
            )
        raise ValueError(
            f"task {self.task.name!r}: `keep` took 0 of {self.patience} pairs of the {self.split} split in a row; such "
            "pairs are too rare, or do not exist"
        )


def _as_lists(spans: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    return {name: list(span) for name, span in spans.items()}


@dataclass(frozen=True)
class CounterfactualPair:
    """Settings of a base and its sources, with the values of the causal model. Only accepted pairs become prompts.

    Attributes:
        values, source_values: the value of every variable in the base, and in the source of each exchanged variable.
        after: the value of every variable of the base after the interchange.
    """

    base: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]
    values: Values
    source_values: Mapping[str, Values]
    after: Values
    base_answer: str
    answer: str

    @classmethod
    def draw(cls, task: Task, rng: random.Random, split: str, exchanged: Sequence[str]) -> CounterfactualPair:
        base = task.sample(rng, split)
        return cls.of(task, base, {variable: task.sample(rng, split) for variable in exchanged})

    @classmethod
    def of(
        cls, task: Task, base: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
    ) -> CounterfactualPair:
        """The pair of these settings; the sources get the template of the base."""
        if "template" in base:  # so that every named position of the base exists in its sources
            sources = {name: {**source, "template": base["template"]} for name, source in sources.items()}
        model = task.causal_model
        values, inputs = model.run(task.inputs(base)), {name: task.inputs(of) for name, of in sources.items()}
        source_values = {name: model.run(of) for name, of in inputs.items()}
        after = model.run(task.inputs(base), {name: of[name] for name, of in source_values.items()})
        answers = (task.answers[of[model.output]] for of in (values, after))
        return cls(base, sources, values, source_values, after, *answers)

    @property
    def changes(self) -> bool:
        """Whether the interchange changes the answer."""
        return self.answer != self.base_answer

    def avoids(self, task: Task, without: Collection[str]) -> bool:
        """Whether some answers do not occur in the pair: they answer none of its prompts and are in none of them."""
        words = {value for value, answer in task.answers.items() if answer in without}
        settings = [self.base, *self.sources.values()]
        inputs = {value for one in settings for value in task.inputs(one).values() if isinstance(value, str)}
        answers = {self.answer, *map(task.answer, settings)}
        return not words & inputs and not answers & set(without)

    def row(self, task: Task, variables: Sequence[str]) -> dict[str, Any]:
        """The pair as a row of a data set; a variable that is not exchanged has the base as its source."""
        settings = {name: self.sources.get(name, self.base) for name in variables}
        base, sources = task.prompt(self.base), {name: task.prompt(found) for name, found in settings.items()}
        values = {name: self.source_values.get(name, self.values)[name] for name in variables}
        row = {
            "base": base.text,
            "base_spans": _as_lists(base.spans),
            "sources": {name: source.text for name, source in sources.items()},
            "source_spans": {name: _as_lists(source.spans) for name, source in sources.items()},
            "source_values": {name: str(value) for name, value in values.items()},
            "source_answers": {name: task.answer(found) for name, found in settings.items()},
            "base_answer": self.base_answer,
            "answer": self.answer,
            "changes": self.changes,
        }
        if task.entity is not None:
            row["entity"] = str(self.base[task.entity])
        if "template" in self.base:
            row["template"] = str(self.base["template"])
        if task.kind is not None:
            row["kind"] = task.kind(self.base, list(self.sources), self.changes)
        return row
