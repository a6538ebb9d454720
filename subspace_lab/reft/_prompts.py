"""Finds the end of each example's prompt, because positions are counted in the prompt.

In a call of a causal language model the end is given, in this order of priority, by the argument `prompt_lengths`, by
`ReftModel.prompt_lengths` around the call, or by the labels. Without any of them every token counts as prompt. That is
right for prompts alone. It is wrong for prompts with answers, if positions are counted from the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.arguments import instance
from subspace_lab.core.positions import names, select
from subspace_lab.reft.data import beginnings, prompt_lengths_of, refuse_packed

Lengths = Tensor | Sequence[int] | int | Callable[[Tensor], Any]
FAR = 4096  # tokens, longer than any prompt whose positions are named one by one


def lengths_from_labels(given: Mapping[str, Any], positions: Iterable[str]) -> Tensor | None:
    """The prompt lengths according to the labels of a call; None if there are no labels.

    Args:
        positions: the positions of the edits. Examples with several answers are refused if the positions in their
            prompts differ.

    Raises:
        ValueError: labels without a prompt or without an answer, packed texts, several answers.
    """
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None and shifted is not None:  # each label is already at the token before it
        labels = torch.cat([shifted.new_full((*shifted.shape[:-1], 1), -100), shifted[..., :-1]], -1)
    if labels is None:
        return None
    mask = given.get("attention_mask")
    if labels.ndim == 3:  # (batch, choices, sequence) of models that choose between continuations
        labels, mask = labels.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    lengths = prompt_lengths_of(labels, mask)
    refuse_turns(labels, mask, lengths, positions)
    return lengths


def refuse_turns(labels: Tensor, attention_mask: Tensor | None, lengths: Tensor, positions: Iterable[str]) -> None:
    """ValueError if an example has several answers whose prompts have edits at different positions.

    `generate` edits one prompt: the whole conversation up to the answer that it writes. An example with one answer is
    trained in the same way. With several answers, each of them would need a run of its own.
    """
    begins = beginnings(labels)
    several = (begins.sum(1) > 1).nonzero().flatten().tolist()
    real = torch.ones_like(begins) if attention_mask is None else attention_mask.bool()
    for i in several:
        last = int(begins[i].nonzero()[-1])
        ends = [int(lengths[i]), int(real[i, :last].sum())]
        if any(_differ(p, *ends) for p in positions):
            raise ValueError(
                f"Row {i} has {int(begins[i].sum())} answers, and edits are made in the prompt of one: make an "
                "example of each answer, with the conversation up to it as its prompt (all labels before it −100); "
                "or give prompt_lengths, which edits only the first prompt."
            )


def moves_with_the_end(positions: str) -> bool:
    """Whether the tokens at these positions depend on where the prompt ends."""
    return not names(positions) and _differ(positions, FAR, FAR + 1)


def _differ(positions: str, one: int, other: int) -> bool:
    try:
        chosen = select(positions, torch.tensor([one, other]), {})
    except IndexError:  # a single position that one of them does not have
        return True
    return not torch.equal(chosen[0], chosen[1])


def warn_of_whole_examples(positions: Iterable[str]) -> None:
    """Warn that every token counts as prompt, if the positions depend on that."""
    moving = sorted({p for p in positions if moves_with_the_end(p)})
    if moving:
        warnings.warn(
            f"A call without labels and prompt_lengths: every token is taken as prompt, and the positions {moving} "
            "depend on its end. If the call also contains answers (for example to score them), give prompt_lengths, or "
            "make the call inside `with model.prompt_lengths(…)`. If it contains only prompts, this is right; "
            "`with model.prompt_lengths('all')` says so.",
            stacklevel=4,
        )


def expect_lengths(lengths: Lengths | str) -> Lengths | str:
    """Prompt lengths that a user gave. TypeError or ValueError unless they are numbers, a function or "all"."""
    if not callable(lengths):
        instance(lengths, (Tensor, Sequence, int), "prompt_lengths", "numbers, a function or 'all'")
    if isinstance(lengths, str) and lengths != "all":
        raise ValueError(f"prompt_lengths={lengths!r}; the only possible text is 'all'.")
    return lengths


def lengths_inside(given_lengths: Lengths | str, given: Mapping[str, Any]) -> Tensor:
    """The prompt lengths that were given around a call or in it, for the examples of the call.

    Raises:
        ValueError: not one length for each example.
    """
    first = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(first, Tensor):
        raise ValueError(f"prompt_lengths of a call without tokens; it has {sorted(given)}.")
    rows = first.shape[:-1] if "input_ids" in given else first.shape[:-2]
    mask = given.get("attention_mask")
    real = torch.full(rows, first.shape[len(rows)]) if mask is None else mask.sum(-1)
    if isinstance(given_lengths, str):
        return real.flatten().to(first.device)
    found = given_lengths(first) if callable(given_lengths) else given_lengths
    lengths = torch.as_tensor(found, device=first.device)
    lengths = lengths.expand(rows) if lengths.ndim == 0 else lengths
    if lengths.numel() != real.numel():
        raise ValueError(
            f"prompt_lengths were given for {lengths.numel()} examples, and the call has {real.numel()}."
        )
    return lengths.flatten()


def refuse_packed_call(given: Mapping[str, Any]) -> None:
    """ValueError if the rows of a call contain several texts one after the other."""
    if any(given.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        refuse_packed(torch.tensor([[1, 0]]), None)
    refuse_packed(given.get("position_ids"), given.get("attention_mask"))
