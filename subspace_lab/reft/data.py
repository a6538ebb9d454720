"""Prompts and answers as token ids, and as batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.model.passes import setting

PER_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")


def tokenise(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    messages: str = "messages",
    end: bool = True,
    max_length: int | None = None,
) -> Dataset:
    """Prompts and their answers as `input_ids`, `attention_mask` and `labels` (−100 for the prompt).

    An example with `messages` goes through the tokenizer's chat template. Its last message, which must be the
    assistant's, is the answer.

    Args:
        prompt, answer, messages: the names of the columns. The answer is appended to the prompt as it is. If a space
            belongs between the two, one of them must contain it ({"prompt": "It is", "answer": " blue"}).
        end: put the end-of-text token after each answer, so that the model learns to stop.
        max_length: longer examples lose the end of their answer.

    Raises:
        ValueError: an empty prompt or answer, or an example without an answer after it was cut to `max_length`.
    """
    names = (prompt, answer, messages)
    encoded = [_tokenised(i, one, tokenizer, names, end, max_length) for i, one in enumerate(examples)]
    if not encoded:
        raise ValueError("No examples to learn from.")
    return Dataset.from_list(encoded)


def _tokenised(
    i: int,
    example: Mapping[str, Any],
    tokenizer: Any,
    names: tuple[str, str, str],
    end: bool,
    max_length: int | None,
) -> dict[str, list[int]]:
    prompt, answer, messages = names
    if messages in example:
        talk = list(example[messages])
        if not talk or talk[-1].get("role") != "assistant":
            raise ValueError(f"Example {i}: the last of the messages must be the assistant's answer.")
        before = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        if whole[: len(before)] != before:
            raise ValueError(
                f"Example {i}: the chat template changes the beginning when the answer is added, so that it is not "
                "clear where the answer begins; give input_ids and labels instead."
            )
    else:
        missing = [name for name in (prompt, answer) if not example.get(name)]
        if missing:
            raise ValueError(f"Example {i} has no text in {missing}; it has the columns {sorted(example)}.")
        before = tokenizer(example[prompt])["input_ids"]
        whole = tokenizer(example[prompt] + example[answer])["input_ids"]
        if whole[: len(before)] != before:
            # The tokenizer joins the prompt's last word and the answer's first; in generation it cannot do that.
            whole = before + tokenizer(example[answer], add_special_tokens=False)["input_ids"]
        if end and tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
            whole = [*whole, tokenizer.eos_token_id]
    if not before or len(whole) <= len(before):
        raise ValueError(
            f"Example {i} has {len(before)} tokens of the prompt and {len(whole) - len(before)} of the answer; both "
            "need at least one."
        )
    whole = whole if max_length is None else whole[:max_length]
    if len(whole) <= len(before):
        start = str(example.get(prompt, ""))[:40]
        raise ValueError(
            f"Example {i}{f' ({start!r} …)' if start else ''}: its prompt has {len(before)} tokens, which leave no "
            f"room for an answer (max_length={max_length}): shorten the prompt, or leave it out."
        )
    return {
        "input_ids": list(whole),
        "attention_mask": [1] * len(whole),
        "labels": [-100] * len(before) + list(whole[len(before) :]),
    }


def tokenised(examples: Iterable[Mapping[str, Any]], what: str = "examples") -> list[dict[str, Any]]:
    """Examples as lists of numbers, also if they are tensors or arrays.

    Raises:
        TypeError: anything else than several examples.
        ValueError: no examples; an example without token ids or labels, with other columns than the first one, or with
            a label too many or too few.
    """
    hint = "make them with tokenise(rows, tokenizer)."
    if isinstance(examples, Mapping | str) or not isinstance(examples, Iterable):
        raise TypeError(f"The {what} are of type {type(examples).__name__}; needed is a list of examples: {hint}")
    listed = [_as_lists(one, what) for one in examples]
    if not listed:
        raise ValueError(f"No {what} to learn from." if what == "examples" else f"No {what}.")
    for i, one in enumerate(listed):
        missing = [name for name in ("input_ids", "labels") if name not in one]
        if missing:
            raise ValueError(f"The {what} have {sorted(one)} and no {missing[0]}: {hint}")
        if one.keys() != listed[0].keys():
            raise ValueError(f"The {what} have {sorted(listed[0])}, but example {i} has {sorted(one)}.")
        sizes = {n: len(one[n]) for n in PER_TOKEN if isinstance(one.get(n), list)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Example {i} of the {what} has {sizes}: each token needs one of each.")
    return listed


def _as_lists(example: Any, what: str = "examples") -> dict[str, Any]:
    if not isinstance(example, Mapping):
        raise TypeError(
            f"One of the {what} is of type {type(example).__name__}; needed is {{'input_ids': …, 'labels': …}}."
        )
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}


def expect_known_tokens(tokens: Iterable[Iterable[int]], model: Any) -> None:
    """ValueError for a token for which the model has no embedding."""
    known = model.get_input_embeddings().weight.shape[0]
    unknown = next((t for row in tokens for t in row if not (isinstance(t, int) and 0 <= t < known)), None)
    if unknown is not None:
        raise ValueError(
            f"These rows have the token {unknown!r}, but the model has {known} tokens: the tokenizer and the model do "
            "not belong together."
        )


def pad(examples: Sequence[Mapping[str, Any]], pad_token_id: int | None) -> dict[str, Tensor]:
    """Examples of different lengths as one batch, padded on the right: ids with the pad token, labels with −100."""
    if not examples:
        raise ValueError("No examples to learn from.")
    examples = [_as_lists(one) for one in examples]
    longest = max(len(one["input_ids"]) for one in examples)
    if "attention_mask" not in examples[0]:
        examples = [{**one, "attention_mask": [1] * len(one["input_ids"])} for one in examples]
    fill = {
        "input_ids": 0 if pad_token_id is None else pad_token_id,
        "attention_mask": 0,
        "token_type_ids": 0,
        "labels": -100,
    }
    batch = {}
    for name in examples[0]:
        values = [one[name] for one in examples]
        if isinstance(values[0], Sequence) and not isinstance(values[0], str):
            values = [[*v, *[fill.get(name, 0)] * (longest - len(v))] for v in values]
        batch[name] = torch.tensor(values)
    return batch


@dataclass(frozen=True)
class PromptCollator:
    """A data collator for `transformers.Trainer`: makes a batch of tokenised examples or of text.

    Examples with `input_ids` are padded as they are. Examples with `prompt` and `answer`, or with `messages`, go
    through `tokenise` first (these need `remove_unused_columns=False` in the Trainer).

    Attributes:
        tokenizer: the model's tokenizer.
        end, max_length: as in `tokenise`.
        prompt_lengths: add the number of prompt tokens to the batch, for training without labels.
    """

    tokenizer: Any
    end: bool = True
    max_length: int | None = None
    prompt_lengths: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("No examples to make a batch of.")
        if "input_ids" not in examples[0]:
            examples = list(tokenise(examples, self.tokenizer, end=self.end, max_length=self.max_length))
        batch = pad(examples, self.tokenizer.pad_token_id)
        if self.prompt_lengths and "prompt_lengths" not in batch:
            batch["prompt_lengths"] = prompt_lengths_of(batch["labels"], batch.get("attention_mask"))
            several = (beginnings(batch["labels"]).sum(1) > 1).nonzero()
            if len(several):
                raise ValueError(
                    f"Row {int(several[0])} has several answers, and prompt_lengths would be those of the first one: "
                    "make an example of each answer, or put prompt_lengths into the data."
                )
        return batch


def prompt_lengths_of(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """For each row, how many real tokens come before the first label that is not −100.

    Raises:
        ValueError: a row without a label, or without a prompt.
    """
    if labels.ndim != 2:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} for a language model; needed is (batch, sequence)."
        )
    answered = labels != -100
    if not bool(answered.any(1).all()):
        row = int((~answered.any(1)).nonzero()[0])
        raise ValueError(f"Row {row} has no label but −100: nothing is left to learn from in it.")
    first = answered.long().argmax(1)
    real = torch.ones_like(labels) if attention_mask is None else attention_mask
    before = torch.arange(labels.shape[1], device=labels.device) < first[:, None]
    lengths = (real.bool() & before).sum(1)
    if not bool((lengths > 0).all()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"Row {row} has an empty prompt: its first token has a label already. Set the labels of the prompt "
            "to −100, or give prompt_lengths."
        )
    return lengths


def beginnings(labels: Tensor) -> Tensor:
    """(batch, sequence) True where an answer begins: at a label that is not −100 after one that is."""
    answered = labels != -100
    return answered & ~torch.nn.functional.pad(answered[:, :-1], (1, 0))


def refuse_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """ValueError if a row contains several texts one after the other: its position ids start again from 0."""
    if position_ids is None or attention_mask is not None:
        return
    if bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
        raise ValueError(
            "Rows contain several packed texts, of which only the first one's prompt is known. Train without packing "
            "and padding_free."
        )


def padding_mask(ids: Tensor, model: Any, generation: Mapping[str, Any]) -> Tensor | None:
    """The mask that `generate` makes for ids without one: pad tokens are padding, unless they also end texts."""
    pad, ends = (setting(model, generation, name) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()
