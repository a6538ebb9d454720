"""Ways of tuning that PEFT does not have, in a few lines each: bottleneck adapters, LoRA on a base of four bits, and
edits of a few attention heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_methods import Tuned, peft, reft
from safetensors.torch import save_file
from torch import Tensor, nn

from subspace_lab.core.sites import Site


class Bottleneck(nn.Module):
    """U gelu(D h), which starts at 0."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(nn.functional.gelu(self.down(h)))


class Serial(nn.Module):
    """Behind a projection, before the sum with the stream (Houlsby et al. 2019, arXiv 1902.00751)."""

    def __init__(self, inner: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.inner, self.added = inner, Bottleneck(width, size)

    def forward(self, h: Tensor) -> Tensor:
        out = self.inner(h)
        return out + self.added(out)


class Parallel(nn.Module):
    """Beside an MLP, from the same input (He et al. 2022, arXiv 2110.04366)."""

    def __init__(self, inner: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.inner, self.added = inner, Bottleneck(width, size)

    def forward(self, *given: Tensor) -> Tensor:
        *inside, stream = given
        if not inside:
            return self.inner(stream) + self.added(stream)
        # BERT's last part of an MLP adds its input to the stream, of which it then takes the norm.
        return self.inner(*inside, stream + self.added(stream))


def bottlenecks(
    kind: Callable[..., nn.Module], ends: Sequence[str], size: int
) -> Callable[[nn.Module, int], Tuned]:
    """Adapters around all modules whose path ends in one of `ends`; nothing else is trained."""

    def attach(model: nn.Module, seed: int) -> Tuned:
        torch.manual_seed(seed)
        base: Any = model.requires_grad_(False)
        for path in [name for name, _ in base.named_modules() if name.endswith(tuple(ends))]:
            parent, _, name = path.rpartition(".")
            made = kind(base.get_submodule(path), base.config.hidden_size, size).to(base.device)
            setattr(base.get_submodule(parent), name, made)
        chosen = {name: p for name, p in base.named_parameters() if p.requires_grad}
        return Tuned(base, list(chosen.values()), lambda folder: _save(chosen, folder))

    return attach


def quantised_lora(**options: Any) -> Callable[[nn.Module, int], Tuned]:
    """LoRA on a base whose linear layers have four bits, nf4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

    def attach(model: nn.Module, seed: int) -> Tuned:
        import bitsandbytes as bnb

        base: Any = model
        for path in [name for name, module in base.named_modules() if type(module) is nn.Linear]:
            parent, _, name = path.rpartition(".")
            if name == "lm_head":
                continue
            old = base.get_submodule(path)
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4",
                compute_dtype=old.weight.dtype,
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
            if old.bias is not None:
                new.bias = old.bias
            setattr(base.get_submodule(parent), name, new.to(base.device))  # the move quantises
        base.is_loaded_in_4bit = True
        return peft("LoraConfig", **options)(base, seed)

    return attach


def head_edits() -> Callable[[nn.Module, int], Tuned]:
    """A scale and a bias in a few heads' outputs, at all tokens (LoFiT, Yin et al. 2024, arXiv 2406.01563; JoLA).

    All heads get theirs; `keep_heads` then freezes all but the chosen ones, which are the identity.
    """
    return reft(method="RED", component="head_output", positions="all", every_token=True)


def keep_heads(tuned: Tuned, loss_of: Callable[[int], Tensor], heads: int, batches: int = 4) -> int:
    """Train only the heads whose scales have the largest gradient before training; returns how many numbers.

    LoFiT trains all scales first and takes the largest; the gradient at the identity is the first step of that.
    """
    sum((loss_of(i) for i in range(batches)), torch.zeros(())).backward()
    model: Any = tuned.model
    edits: dict[Site, Any] = model.edits()
    config = model.base_model.config
    several = config.num_attention_heads
    # Not the biases' gradients: they are largest where states are smallest, in the first layers.
    norms = torch.stack([e.value.scale.grad.view(several, -1).square().sum(1) for e in edits.values()])
    chosen = torch.zeros_like(norms.flatten()).index_fill(0, norms.flatten().topk(heads).indices, 1.0)
    for mask, edit in zip(chosen.unflatten(0, norms.shape), edits.values(), strict=True):
        for p in edit.value.parameters():
            p.grad = None
            p.register_hook(partial(torch.mul, mask.repeat_interleave(len(p) // several)))
    return heads * 2 * (next(iter(edits.values())).value.scale.numel() // several)


def _save(tensors: dict[str, nn.Parameter], folder: Path) -> None:
    save_file({name: p.detach() for name, p in tensors.items()}, folder / "adapter.safetensors")
