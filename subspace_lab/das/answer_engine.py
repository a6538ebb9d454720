"""Answers of several tokens, with any engine.

The logit of an answer t₁ … tₙ after a prompt x is

    Σⱼ log p(tⱼ | x, t₁ … tⱼ₋₁)

A beginning is an answer without its last token. Each base becomes several rows of the batch, one for each different
beginning: the prompt followed by the beginning. Logits are read at several positions of such a row. The beginnings are
not part of the prompt: positions are counted without them, and an intervention acts on the prompt only.

If answers are scored whole, p is over the vocabulary. If only the tokens that distinguish the answers are read, p is
over the tokens with which some answer continues at this point. Then only few logits are computed, and answers of one
token each are compared by their logits alone, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from subspace_lab.core.sites import Site
from subspace_lab.das.answers import NONE, Spelled, as_spelled
from subspace_lab.das.pairs import Counterfactuals
from subspace_lab.engine.protocol import Engine, Part
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch
from subspace_lab.model.edits import Edits, Sources
from subspace_lab.model.sources import Unmatched

Build = Callable[[Batch, Readout], Engine]


def answer_engine(data: Counterfactuals, build: Build) -> Engine:
    """An engine over the bases that gives the logits of the answers, whether they have one token or several.

    Args:
        build: (batch, readout) → an engine over this batch.
    """
    scored = data.scored
    return build(data.base, data.readout) if scored is None or scored.ndim == 1 else SpelledAnswers(data, build)


def rows_a_pair(data: Counterfactuals) -> int:
    """How many rows of the model's input each base becomes."""
    scored = data.scored
    return 1 if scored is None or scored.ndim == 1 else len(_beginnings(as_spelled(scored)))


class SpelledAnswers:
    """An engine whose logits are sums of log probabilities of the answers' tokens.

    Args:
        data: bases, and answers of several tokens.
        build: (batch, readout) → the inner engine, which runs the rows.

    Raises:
        ValueError: bases that are not token ids, or that have separate tokens for a decoder.
    """

    def __init__(self, data: Counterfactuals, build: Build) -> None:
        assert data.scored is not None
        self.pairs = len(data)
        device = data.scored.device
        spelled = as_spelled(data.scored)
        beginnings = _beginnings(spelled)
        batch, index = _extended(data.base, beginnings)
        self.rows_a_pair = len(beginnings)
        vocabulary = sorted({token for one in spelled for token in one})
        tokens = None if data.whole else torch.tensor(vocabulary, device=device)
        self.inner = build(batch, Readout(index, None, tokens))
        places = {token: i for i, token in enumerate(vocabulary)}
        # For each token of each answer: the row of the pair in which it is read, at which read, and the logit's index.
        longest = max(map(len, spelled))
        row, column = (
            torch.zeros(len(spelled), dtype=torch.long),
            torch.zeros(len(spelled), longest, dtype=torch.long),
        )
        there = torch.zeros(len(spelled), longest, dtype=torch.bool)
        others = torch.zeros(len(spelled), longest, len(vocabulary), dtype=torch.bool)
        for i, one in enumerate(spelled):
            row[i] = next(r for r, start in enumerate(beginnings) if start[: len(one) - 1] == one[:-1])
            there[i, : len(one)] = True
            for j, token in enumerate(one):
                column[i, j] = token if data.whole else places[token]
                goes_on = {two[j] for two in spelled if len(two) > j and two[:j] == one[:j]}
                others[i, j, [places[other] for other in goes_on]] = True
        self._row, self._column, self._there = row.to(device), column.to(device), there.to(device)
        self._tokens = torch.tensor([[*one, *[NONE] * (longest - len(one))] for one in spelled], device=device)
        self._others = None if data.whole else others.to(device)

    def __len__(self) -> int:
        return self.pairs

    def describe(self) -> str:
        """One line about what the inner engine computes."""
        return f"{self.inner.describe()}; answers of several tokens: {self.rows_a_pair} rows a pair"

    def logits(
        self,
        rows: Tensor,
        edits: Edits,
        sources: Sources | None = None,
        unmatched: Unmatched = "refuse",
        *,
        vocabulary: bool = False,
    ) -> Float[Tensor, "pair answer"]:
        """(pairs, answers) sums of log probabilities; otherwise as `Engine.logits`.

        With `vocabulary` (pairs, answers + 1): 1 for the answer whose tokens all have the highest logit of the
        vocabulary, or for the last entry if there is no such answer; 0 elsewhere.
        """
        part = self._inside(Part(rows, edits, sources))
        logits = self.inner.logits(part.rows, part.edits, part.sources, unmatched, vocabulary=vocabulary)
        return self._of_answers(logits, vocabulary)

    def side_by_side(self, parts: Sequence[Part], unmatched: Unmatched = "refuse") -> Float[Tensor, "pair answer"]:
        """As `Engine.side_by_side`."""
        return self._of_answers(self.inner.side_by_side([self._inside(part) for part in parts], unmatched), False)

    def cohorts(self, sets: Sequence[tuple[Site, ...]], rows: int) -> list[list[int]]:
        """As `Engine.cohorts`."""
        return self.inner.cohorts(sets, rows * self.rows_a_pair)

    def _inside(self, part: Part) -> Part:
        """The rows of the inner engine that belong to some pairs."""
        n = self.rows_a_pair
        rows = (part.rows[:, None] * n + torch.arange(n, device=part.rows.device)).flatten()
        sources = None if part.sources is None else {site: _repeated(of, n) for site, of in part.sources.items()}
        return Part(rows, part.edits, sources)

    def _of_answers(self, logits: Tensor, vocabulary: bool) -> Float[Tensor, "pair answer"]:
        """The logits of the answers, from the logits of the inner engine's rows."""
        read = rearrange(logits, "(p r) j v -> p r j v", r=self.rows_a_pair).float()
        longest = self._column.shape[1]
        if vocabulary:
            highest = read.argmax(-1)[:, self._row, :longest]
            has_highest = ((highest == self._tokens) | ~self._there).all(-1)
            return torch.cat([has_highest, ~has_highest.any(-1, keepdim=True)], -1).float()
        if self._others is None:
            chosen = read.log_softmax(-1)[:, self._row, :longest]
        else:
            chosen = read[:, self._row, :longest].masked_fill(~self._others, -torch.inf)
            # After the end of an answer nothing is compared; a softmax over −∞ only would be NaN.
            chosen = torch.where(self._there[..., None], chosen, 0.0).log_softmax(-1)
        picked = chosen.gather(-1, self._column.expand(len(read), -1, -1)[..., None])[..., 0]
        return torch.where(self._there, picked, 0.0).sum(-1)


def _beginnings(spelled: list[Spelled]) -> list[Spelled]:
    """All answers without their last token, but not those that are the beginning of another one."""
    every = sorted({one[:-1] for one in spelled})
    return [one for i, one in enumerate(every) if not any(two[: len(one)] == one for two in every[i + 1 :])]


def _extended(base: Batch, beginnings: list[Spelled]) -> tuple[Batch, Tensor]:
    """Each prompt once with each beginning after it, padded on the right, and the columns that are read."""
    ids, real = base.inputs.get("input_ids"), base.real_tokens()
    if not isinstance(ids, Tensor) or ids.ndim != 2 or real is None:
        raise ValueError(
            "Answers of several tokens need bases of token ids, to which the tokens of the answers can be appended."
        )
    if more := sorted(set(base.inputs) - {"input_ids", "attention_mask"}):
        raise ValueError(
            f"Answers of several tokens are appended to bases of input_ids and attention_mask; these also have {more}."
        )
    starts = real.int().argmax(1)
    lengths = real.sum(1) if base.prompt_lengths is None else base.prompt_lengths
    most, n = max(map(len, beginnings)), len(beginnings)
    rows = len(ids) * n
    width = int(lengths.max()) + most
    longer = torch.zeros(rows, width, dtype=ids.dtype, device=ids.device)
    mask = torch.zeros(rows, width, dtype=torch.long, device=ids.device)
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        prompt = ids[i, start : start + length]
        for r, one in enumerate(beginnings):
            whole = torch.cat([prompt, torch.tensor(one, dtype=ids.dtype, device=ids.device)])
            longer[i * n + r, : len(whole)] = whole
            mask[i * n + r, : len(whole)] = 1
    again = lengths.repeat_interleave(n)
    # A shorter beginning is read at its own end again; these reads are not used.
    ends = torch.tensor([len(one) for one in beginnings], device=ids.device).repeat(len(ids))
    steps = torch.arange(most + 1, device=ids.device)
    index = again[:, None] - 1 + torch.minimum(steps, ends[:, None])
    columns = {name: column.repeat_interleave(n, 0) for name, column in base.columns.items()}
    return Batch({"input_ids": longer, "attention_mask": mask}, again, columns), index


def _repeated(of: Tensor | Mapping[str, Tensor] | None, n: int) -> Tensor | dict[str, Tensor] | None:
    """The states of sources, repeated for each row of a pair."""
    if isinstance(of, Mapping):
        return {name: repeat(one, "p ... -> (p n) ...", n=n) for name, one in of.items()}
    return None if of is None else repeat(of, "p ... -> (p n) ...", n=n)
