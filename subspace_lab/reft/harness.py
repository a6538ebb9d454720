"""Scores of lm-evaluation-harness, for models with adapters.

The harness scores an answer in a call with prompt and answer but without labels. In such a call every token would count
as prompt, and the answer would be edited. `with_prompts` tells the model where each prompt ends:

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from subspace_lab.reft.harness import with_prompts

    lm = with_prompts(HFLM(pretrained=reft, tokenizer=tokenizer))
    simple_evaluate(model=lm, tasks=["arc_easy"])

Generation needs no such help, because `generate` gets prompts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core.arguments import instance
from subspace_lab.reft.model import ReftModel

Request = tuple[Any, Sequence[int], Sequence[int]]
"""A request of the harness: (texts, the prompt's tokens, the answer's tokens)."""


def with_prompts(lm: Any) -> Any:
    """The same model of the harness (`HFLM`), which now says where prompts end when it scores answers.

    Raises:
        TypeError: a model of the harness that does not contain a `ReftModel`.
    """
    model: Any = getattr(lm, "model", None)
    instance(model, ReftModel, "lm.model", "HFLM(pretrained=a ReftModel, tokenizer=…)")
    score = getattr(lm, "_loglikelihood_tokens", None)
    if score is None:
        raise TypeError(f"{type(lm).__name__} has no _loglikelihood_tokens, with which HFLM scores answers.")
    if getattr(lm, "backend", "causal") == "causal":  # an encoder has a separate argument for the prompt
        lm._loglikelihood_tokens = _Scores(score, model, lambda: int(lm.max_length))
    return lm


class _Scores:
    """HFLM's `_loglikelihood_tokens`, called with prompt lengths."""

    def __init__(self, score: Callable[..., list[Any]], model: ReftModel, longest: Callable[[], int]) -> None:
        self._score, self._model, self._longest = score, model, longest

    def __call__(self, requests: Iterable[Request], *further: Any, **options: Any) -> list[Any]:
        requests = list(requests)
        found: list[Any] = [None] * len(requests)
        left = list(range(len(requests)))
        while left:  # one pass, unless two requests have the same tokens but different prompt ends
            ends: dict[tuple[int, ...], int] = {}
            now = []
            for i in left:
                key, end = self._tokens_and_end(requests[i])
                if ends.setdefault(key, end) == end:
                    now.append(i)
            with self._model.prompt_lengths(_Ends(ends)):
                scores = self._score([requests[i] for i in now], *further, **options)
            for i, score in zip(now, scores, strict=True):
                found[i] = score
            done = set(now)
            left = [i for i in left if i not in done]
        return found

    def _tokens_and_end(self, request: Request) -> tuple[tuple[int, ...], int]:
        """(the tokens that the harness gives the model, how many of them are the prompt)."""
        _, prompt, answer = request
        whole = [*prompt, *answer][-(self._longest() + 1) :]
        return _without_padding(whole[:-1]), len(whole) - len(answer)


class _Ends:
    """The prompt lengths of a call's examples, looked up by their tokens."""

    def __init__(self, ends: dict[tuple[int, ...], int]) -> None:
        self._ends = ends

    def __call__(self, ids: Tensor) -> Tensor:
        keys = [_without_padding(row) for row in ids.tolist()]
        unknown = [i for i, key in enumerate(keys) if key not in self._ends]
        if len(unknown) == len(keys):  # the harness is testing how large a batch may be
            return torch.full((len(keys),), ids.shape[1])
        if unknown:
            raise ValueError(f"Row {unknown[0]} of a call by the harness is none of the examples that it scores.")
        return torch.tensor([self._ends[key] for key in keys])


def _without_padding(tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens without trailing zeros, which the harness uses as padding."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
