"""Prompts and answers as rows of token ids, and rows as batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from subspace_lab.model.intervene import setting


def tokenise(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    messages: str = "messages",
    end: bool = True,
    max_length: int | None = None,
) -> Dataset:
    """Rows of a prompt and its answer as `input_ids`, `attention_mask` and `labels` (−100 over the prompt).

    A row with `messages` goes through the tokenizer's chat template: its last message, which must be the
    assistant's, is the answer.

    Args:
        prompt, answer, messages: the names of the columns.
        end: put the end-of-text token behind each answer, so that the model learns to stop.
        max_length: longer rows lose the end of their answer.

    Raises:
        ValueError: an empty prompt or answer, or a row that max_length leaves without an answer.
    """
    encoded = [_row(i, row, tokenizer, (prompt, answer, messages), end, max_length) for i, row in enumerate(rows)]
    if not encoded:
        raise ValueError("No rows to learn from.")
    return Dataset.from_list(encoded)


def _row(
    i: int,
    row: Mapping[str, Any],
    tokenizer: Any,
    names: tuple[str, str, str],
    end: bool,
    max_length: int | None,
) -> dict[str, list[int]]:
    prompt, answer, messages = names
    if messages in row:
        talk = list(row[messages])
        if not talk or talk[-1].get("role") != "assistant":
            raise ValueError(f"Row {i}: the last of the messages must be the assistant's answer.")
        before = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        if whole[: len(before)] != before:
            raise ValueError(
                f"Row {i}: the chat template writes the whole conversation otherwise than its beginning, so that "
                "prompt and answer cannot be told apart by length; give input_ids and labels instead."
            )
    else:
        missing = [name for name in (prompt, answer) if not row.get(name)]
        if missing:
            raise ValueError(f"Row {i} has no text in {missing}; it has the columns {sorted(row)}.")
        before = tokenizer(row[prompt])["input_ids"]
        whole = tokenizer(row[prompt] + row[answer])["input_ids"]
        if whole[: len(before)] != before:
            # The tokenizer joins the prompt's last word and the answer's first; at generation it cannot.
            whole = before + tokenizer(row[answer], add_special_tokens=False)["input_ids"]
        if end and tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
            whole = [*whole, tokenizer.eos_token_id]
    whole = whole if max_length is None else whole[:max_length]
    if not before or len(whole) <= len(before):
        raise ValueError(
            f"Row {i}: {len(before)} prompt tokens and {len(whole) - len(before)} of the answer (max_length="
            f"{max_length}); both need at least one."
        )
    return {
        "input_ids": list(whole),
        "attention_mask": [1] * len(whole),
        "labels": [-100] * len(before) + list(whole[len(before) :]),
    }


def pad(rows: Sequence[Mapping[str, Any]], pad_token_id: int | None) -> dict[str, Tensor]:
    """Rows of different length as one batch, padded on the right: ids by the pad token, labels by −100."""
    if not rows:
        raise ValueError("No rows to learn from.")
    longest = max(len(row["input_ids"]) for row in rows)
    if "attention_mask" not in rows[0]:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    fill = {
        "input_ids": 0 if pad_token_id is None else pad_token_id,
        "attention_mask": 0,
        "token_type_ids": 0,
        "labels": -100,
    }
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], Sequence) and not isinstance(values[0], str):
            values = [[*v, *[fill.get(name, 0)] * (longest - len(v))] for v in values]
        batch[name] = torch.tensor(values)
    return batch


@dataclass(frozen=True)
class PromptCollator:
    """A data collator for `transformers.Trainer`: pads rows, and tokenises those that are text still.

    Rows with `input_ids` are padded as they are; rows with `prompt` and `answer`, or with `messages`, go
    through `tokenise` first (give the Trainer `remove_unused_columns=False` for these).
    """

    tokenizer: Any
    end: bool = True
    max_length: int | None = None
    prompt_lengths: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if "input_ids" not in rows[0]:
            rows = list(tokenise(rows, self.tokenizer, end=self.end, max_length=self.max_length))
        batch = pad(rows, self.tokenizer.pad_token_id)
        if self.prompt_lengths and "prompt_lengths" not in batch:
            batch["prompt_lengths"] = prompt_lengths_of(batch["labels"], batch.get("attention_mask"))
        return batch


def prompt_lengths_of(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How many real tokens stand before the first label that is not −100, in each row.

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


def refuse_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise ValueError where a row holds several texts one behind another: its positions begin anew."""
    if position_ids is None or attention_mask is not None:
        return
    if bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
        raise ValueError(
            "Rows of several packed texts: only the first one's prompt could be told. Train without packing and "
            "padding_free."
        )


def padding_mask(ids: Tensor, model: Any, generation: Mapping[str, Any]) -> Tensor | None:
    """The mask that `generate` makes of ids without one: pad tokens are padding unless they also end texts."""
    pad, ends = (setting(model, generation, name) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()
