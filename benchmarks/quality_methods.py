"""Ways of tuning a model, each a function from the model to what is called, trained and saved.

All come out as modules that are called as the model itself is, so that the loops know no method by its name. The
model given is changed: each run takes a fresh one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from subspace_lab.reft import ReftConfig, get_reft_model
from subspace_lab.reft.data import prompt_lengths_of


class Tuned(NamedTuple):
    """A model with a method on it; `parameters` are the method's own, without any head."""

    model: nn.Module
    parameters: list[nn.Parameter]
    save: Callable[[Path], Any]


class Method(NamedTuple):
    """How a method is put on a model, its setting in words, and the learning rates to choose from."""

    attach: Callable[[nn.Module, int], Tuned]
    setting: str
    rates: tuple[float, ...]


def nothing(model: nn.Module, seed: int) -> Tuned:
    """The frozen model: only a head above it can be trained."""
    return _chosen(model, ())


def full(model: nn.Module, seed: int) -> Tuned:
    """Every parameter."""
    return _chosen(model, [name for name, _ in model.named_parameters()])


def bitfit(model: nn.Module, seed: int) -> Tuned:
    """Every bias (Ben Zaken et al. 2022, arXiv 2106.10199)."""
    return _chosen(model, [name for name, _ in model.named_parameters() if name.endswith("bias")])


def reft(**options: Any) -> Callable[[nn.Module, int], Tuned]:
    """A ReFT of ours; the options are `ReftConfig`'s."""

    def attach(model: nn.Module, seed: int) -> Tuned:
        wrapped = get_reft_model(model, ReftConfig(**options, seed=seed))
        return Tuned(wrapped, [p for p in wrapped.parameters() if p.requires_grad], wrapped.save_pretrained)

    return attach


def peft(kind: str, **options: Any) -> Callable[[nn.Module, int], Tuned]:
    """A method of PEFT: the name of its configuration's class, and that configuration's options."""

    def attach(model: nn.Module, seed: int) -> Tuned:
        import peft

        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(**options))
        return Tuned(wrapped, [p for p in wrapped.parameters() if p.requires_grad], wrapped.save_pretrained)

    return attach


def pyreft_loreft(
    rank: int, first: int, last: int, component: str, layers: Sequence[int]
) -> Callable[[nn.Module, int], Tuned]:
    """pyreft's LoReFT at the first and the last positions of the prompt; `component` has %d for the layer."""

    def attach(model: nn.Module, seed: int) -> Tuned:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyreft

        torch.manual_seed(seed)
        base: Any = model
        edit = {"embed_dim": base.config.hidden_size, "low_rank_dimension": rank}
        wanted = [
            {
                "layer": layer,
                "component": component % layer,
                "low_rank_dimension": rank,
                # Its default, bfloat16, is not read back.
                "intervention": pyreft.LoreftIntervention(**edit, dtype=torch.float32),
            }
            for layer in layers
        ]
        inner = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=wanted))
        inner.set_device(base.device)
        parameters = [p for p in inner.get_trainable_parameters() if p.requires_grad]
        return Tuned(Pyreft(inner, len(layers), first, last), parameters, lambda folder: inner.save(str(folder)))

    return attach


class Pyreft(nn.Module):
    """pyreft's model, called as the base model is.

    Rows that are shorter than the asked positions point what they lack at a masked pad token behind them, as
    pyreft's own data sets do.
    """

    def __init__(self, inner: Any, layers: int, first: int, last: int) -> None:
        super().__init__()
        # Not a submodule: pyreft's models mix modules and lists, and move themselves.
        self.inner, self.layers, self.first, self.last = [inner], layers, first, last

    def positions(self, lengths: Sequence[int], sink: int) -> dict[str, Any]:
        rows = []
        for n in lengths:
            first, last = min(self.first, n // 2), min(self.last, (n + 1) // 2)
            row = [*range(first), *range(n - last, n)]
            rows.append(row + [sink] * (self.first + self.last - len(row)))
        return {"sources->base": (None, [rows] * self.layers)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        lengths = attention_mask.sum(1) if labels is None else prompt_lengths_of(labels, attention_mask)
        n = input_ids.shape[1]
        given = {
            "input_ids": nn.functional.pad(input_ids, (0, 1)),
            "attention_mask": nn.functional.pad(attention_mask, (0, 1)),
        }
        more = {} if labels is None else {"labels": nn.functional.pad(labels, (0, 1), value=-100)}
        _, output = self.inner[0](given, unit_locations=self.positions(lengths.tolist(), n), **more)
        for name in ("last_hidden_state", "logits"):
            if hasattr(output, name):
                output[name] = output[name][:, :n]
        return output

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **generation: Any) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        lengths = attention_mask.sum(1).tolist()
        assert set(lengths) == {input_ids.shape[1]}, "prompts of one length, without padding"
        places = self.positions(lengths, -1)
        _, ids = self.inner[0].generate(given, unit_locations=places, intervene_on_prompt=True, **generation)
        return ids


def _chosen(model: nn.Module, names: Sequence[str]) -> Tuned:
    """The model with these parameters trained and no other."""
    wanted = set(names)
    for name, p in model.named_parameters():
        p.requires_grad_(name in wanted)
    chosen = {name: p for name, p in model.named_parameters() if name in wanted}
    return Tuned(
        model,
        list(chosen.values()),
        lambda folder: save_file({k: v.detach() for k, v in chosen.items()}, folder / "tuned.safetensors"),
    )
