"""Twins: models like the one that is searched, whose weights cannot have learned what is claimed.

A twin is a control, and a search of it is the same call with another model. A search that succeeds on a twin too
has found what the architecture and the data give away, not what the model learned (Sutter et al. 2025, arXiv
2507.08802, section 4). The kinds differ in what a twin keeps of the model:

    reinitialised    the configuration alone: weights as if training had never begun; the twins of `check`
    moment_matched   mean and standard deviation of each weight tensor
    shuffled         all numbers of each weight tensor, in another order
    spectrum_kept    the singular values of each matrix, with random singular vectors
    embeddings_kept  the embeddings; all else is initialised anew
    only_above       everything up to a layer; what is behind it is initialised anew
    only_below       everything behind a layer; what comes before is initialised anew
    cascading        `only_above` one layer after the other, from the last block down (Adebayo et al. 2018,
                     arXiv 1810.03292)

The first four know nothing of the task beyond what such weights are like. The others keep a part of what was
learned, so that a search may well succeed on them: they tell where the variable comes from, and whether a claim of
a layer rests on what is below or above it. They are reported, and decide nothing.

All have this in common. Tied weights stay tied; dtypes, devices, train mode and gradient flags are those of the
model, which is not touched. One seed gives one twin on every device, and the caller's random state stays where it
was. The twin of a model whose weights accelerate offloads is in host memory, and offloaded from there if the model
runs elsewhere. Weights that were unpacked to floats are served, whatever the configuration says; those that are
still packed are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from subspace_lab.analysis._twin_making import (
    built,
    check_same_outline,
    copied,
    drawing,
    fill,
    finished,
    is_built,
    names_of,
    packed_weights,
    tensors_of,
)
from subspace_lab.core.arguments import instance, whole_number
from subspace_lab.core.orthonormal import thin_qr
from subspace_lab.model.families import Anatomy

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""(a weight of the model, generator) → a weight of the twin, of the same shape."""


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A randomly initialised twin: the same class and configuration, weights as if training had never begun.

    A transformers model is built anew from a copy of its configuration, so that the architecture's own
    initialisation draws the weights. Of any other module a copy is made and `reset_parameters` is called on its
    submodules, children first, as their construction does.

    Args:
        model: any module; weights are drawn for all of it.
        seed: of the draw.

    Raises:
        TypeError: something else than a module.
        ValueError: quantised weights, a configuration that does not describe the model (its shapes or its ties
            were changed by hand), or plain submodules with parameters and no `reset_parameters`.
    """
    _expect_module(model)
    return finished(model, _anew(model, seed))


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    """A twin that has the numbers of each weight tensor in random order.

    Args and errors as of `reinitialised`; plain submodules need no `reset_parameters`.
    """
    return _redrawn(model, seed, _shuffle)


def moment_matched(model: nn.Module, seed: int) -> nn.Module:
    """A twin whose weight tensors are normal, each with the mean and the standard deviation of the model's.

    Args and errors as of `shuffled`.
    """
    return _redrawn(model, seed, _same_moments)


def spectrum_kept(model: nn.Module, seed: int) -> nn.Module:
    """A twin whose matrices are U S Vᵀ with the singular values S of the model's, U and V drawn from the Haar
    measure.

    A tensor of more than two axes is taken as (first axis, all others); a vector has no spectrum and is shuffled.
    Args and errors as of `shuffled`.
    """
    return _redrawn(model, seed, _same_spectrum)


def embeddings_kept(model: nn.Module, seed: int) -> nn.Module:
    """A twin that keeps all embeddings outside of the blocks, and a head that is tied to them.

    The strongest of the nulls: the model's own words, mixed by layers that learned nothing.

    Raises:
        ValueError: as `reinitialised`; a model without embeddings.
    """
    _expect_module(model)
    anatomy = Anatomy(model)
    inside = tuple(f"{block}." for blocks in anatomy.stacks.values() for block in blocks)
    try:
        own = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        own = None
    kept = [
        path
        for path, module in anatomy.modules.items()
        if (isinstance(module, nn.Embedding) or module is own) and not path.startswith(inside)
    ]
    if not kept:
        raise ValueError(f"{type(model).__name__} has no embeddings that a twin could keep.")
    return _partly(model, seed, lambda name: name.startswith(tuple(f"{path}." for path in kept)))


def only_above(model: nn.Module, layer: int, seed: int) -> nn.Module:
    """A twin that is the model up to a layer's output, and initialised anew behind it.

    What is registered before the blocks (embeddings) is kept, with a head that is tied to it; what is registered
    behind them (the last norm, a head of its own) is initialised anew.

    Args:
        layer: the last that is kept; −1 keeps no block.

    Raises:
        ValueError: as `reinitialised`; a model in which no stack of blocks is found, or a layer that it has not.
    """
    return _partly(model, seed, _before(model, layer))


def only_below(model: nn.Module, layer: int, seed: int) -> nn.Module:
    """A twin that is initialised anew up to a layer's output, and the model behind it: the other half of
    `only_above`.

    Embeddings are initialised anew, and with them a head that is tied to them.

    Args:
        layer: the last that is initialised anew.

    Raises:
        ValueError: as `only_above`.
    """
    before = _before(model, layer)
    names = names_of(model)
    below = {name for of in names.values() if any(map(before, of)) for name in of}
    return _partly(model, seed, lambda name: name not in below)


def cascading(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Twins of which each has one block more initialised anew than the one before it, from the last block down.

    As many as the model has blocks, made one after the other so that no two need to be in memory: of the first
    only what is behind the last block but one is new, of the last all but the embeddings. All are drawn from one
    seed, so that what two of them have new is the same.

    Raises:
        ValueError: as `only_above`.
    """
    _expect_module(model)
    depth = Anatomy(model).depth()
    return (only_above(model, layer, seed) for layer in range(depth - 2, -2, -1))


# --- making them --------------------------------------------------------------------------------------------


def _anew(model: nn.Module, seed: int) -> nn.Module:
    """On the CPU, as initialisation leaves it."""
    with drawing(whole_number(seed, "seed")):
        return built(model) if is_built(model) else _reset(copied(model))


def _reset(twin: nn.Module) -> nn.Module:
    """A plain module with every parameter drawn again."""
    stuck = []
    # Children come after their parents in `named_modules`. Reversed, a parent has the last word, as in its
    # constructor.
    for name, module in reversed(list(twin.named_modules())):
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.MultiheadAttention):  # torch's own, but for the underscore
            reset = module._reset_parameters
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            stuck.append(f"{name or 'the module itself'} ({type(module).__name__})")
    if stuck:
        raise ValueError(
            f"{type(twin).__name__} cannot be initialised anew: these submodules have parameters and no "
            f"reset_parameters(): {', '.join(reversed(stuck))}. Give them one that draws their parameters."
        )
    return twin


def _expect_module(model: nn.Module) -> None:
    instance(
        model, nn.Module, "The model of a twin", "of a Backbone its model, as in reinitialised(backbone.model, 0)"
    )


def _redrawn(model: nn.Module, seed: int, draw: Draw) -> nn.Module:
    """A twin whose weights are drawn one by one from what the model has; its buffers are the model's."""
    _expect_module(model)
    if packed := packed_weights(model):
        raise ValueError(
            f"{type(model).__name__} is quantised: {packed} holds no floats that could be drawn anew."
        )
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    with drawing(seed):
        twin = built(model) if is_built(model) else copied(model)
    check_same_outline(model, twin)
    fill(model, twin, lambda _, weight: draw(weight, generator))
    _take_buffers(model, twin, lambda _: True)
    return finished(model, twin)


def _partly(model: nn.Module, seed: int, keeps: Callable[[str], bool]) -> nn.Module:
    """A twin that is the model where `keeps` says so of a weight's name, and initialised anew elsewhere.

    A tensor of several names is kept if any of them is.
    """
    twin = _anew(model, seed)
    check_same_outline(model, twin)
    kept = {name for of in names_of(twin).values() if any(map(keeps, of)) for name in of}
    fill(model, twin, lambda name, weight: weight.clone() if name in kept else None)
    _take_buffers(model, twin, keeps)
    return finished(model, twin)


def _take_buffers(model: nn.Module, twin: nn.Module, which: Callable[[str], bool]) -> None:
    """Statistics that were learned (of a batch norm), where they are in memory."""
    theirs, buffers = tensors_of(model), dict(twin.named_buffers())
    for name, buffer in buffers.items():
        if which(name) and not theirs[name].is_meta:
            buffer.data = theirs[name].detach().to("cpu", copy=True)


def _before(model: nn.Module, layer: int) -> Callable[[str], bool]:
    """Whether a weight of this name comes before the end of a layer, in the order in which modules are registered."""
    _expect_module(model)
    anatomy = Anatomy(model)
    depth = anatomy.depth()
    if not -1 <= whole_number(layer, "layer") < depth:
        raise ValueError(f"layer={layer!r} of a model with layers 0 to {depth - 1}; −1 stands for none of them.")
    blocks = anatomy.stacks[""]
    first, kept = anatomy.position[blocks[0]], tuple(f"{block}." for block in blocks[: layer + 1])
    behind = tuple(f"{block}." for block in blocks[layer + 1 :])

    def before(name: str) -> bool:
        if name.startswith(kept):
            return True
        return not name.startswith(behind) and anatomy.position[name.rpartition(".")[0]] < first

    return before


# --- what a weight becomes ----------------------------------------------------------------------------------


def _shuffle(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape)


def _same_moments(weight: Tensor, generator: torch.Generator) -> Tensor:
    wide = weight.double()
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return wide.mean() + wide.std(correction=0) * drawn


def _same_spectrum(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.ndim < 2:
        return _shuffle(weight, generator)
    matrix = weight.flatten(1).float() if weight.dtype != torch.float64 else weight.flatten(1)
    sizes = torch.linalg.svdvals(matrix)
    left, right = (
        thin_qr(torch.randn(width, len(sizes), generator=generator, dtype=matrix.dtype))[0]
        for width in matrix.shape
    )
    return ((left * sizes) @ right.T).view(weight.shape)
