"""Twins: models like the one that is searched, but whose weights cannot have learned what is claimed.

A twin is a control. It is searched by the same call, with the twin in the place of the model. If the search succeeds
on a twin too, it found something that the architecture and the data allow, not something that the model learned
(Sutter et al. 2025, arXiv 2507.08802, section 4). The kinds differ in what the twin keeps of the model:

    reinitialised    the configuration alone: weights as if training had never begun; the twins of `check`
    moment_matched   mean and standard deviation of each weight tensor
    shuffled         all numbers of each weight tensor, in random order
    spectrum_kept    the singular values of each matrix, with random singular vectors
    embeddings_kept  the embeddings; everything else is initialised again
    only_above       everything up to a layer; everything after it is initialised again
    only_below       everything after a layer; everything up to it is initialised again
    cascading        `only_above` for one layer after the other, from the last block down (Adebayo et al. 2018,
                     arXiv 1810.03292)

The first four know nothing about the task, except for the statistics of the weights. The others keep a part of what
was learned, so a search may succeed on them. They show where the variable comes from, and whether a claim about a
layer depends on what is below it or above it. They are reported for information and decide nothing.

For all kinds: Tied weights stay tied. Dtypes, devices, train mode and gradient flags are those of the model; the model
itself is not changed. A seed gives the same twin on every device, and the caller's random state does not change. If
accelerate offloads the model's weights, the twin is in host memory, and it is offloaded from there if the model runs
on another device. Quantised weights that were unpacked to floats are accepted, whatever the configuration says;
weights that are still packed are refused.
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

    A transformers model is built again from a copy of its configuration, so that the architecture's own
    initialisation draws the weights. Any other module is copied, and `reset_parameters` is called on the copy's
    submodules, children first, as when they are constructed.

    Args:
        model: any module; all its weights are drawn again.
        seed: the seed of the draw.

    Raises:
        TypeError: anything but a module.
        ValueError: quantised weights, a configuration that does not describe the model (its shapes or its ties
            were changed by hand), or plain submodules with parameters and no `reset_parameters`.
    """
    _expect_module(model)
    return finished(model, _anew(model, seed))


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    """A twin that has the numbers of each weight tensor in random order.

    Args and errors as for `reinitialised`; plain submodules need no `reset_parameters`.
    """
    return _redrawn(model, seed, _shuffle)


def moment_matched(model: nn.Module, seed: int) -> nn.Module:
    """A twin whose weights are drawn from normal distributions with the mean and standard deviation of each tensor.

    Args and errors as for `shuffled`.
    """
    return _redrawn(model, seed, _same_moments)


def spectrum_kept(model: nn.Module, seed: int) -> nn.Module:
    """A twin whose matrices are U S Vᵀ: S are the singular values of the model's matrix, U and V random (Haar).

    A tensor of more than two axes is treated as a matrix (first axis, all others). A vector has no spectrum; its
    numbers are shuffled. Args and errors as for `shuffled`.
    """
    return _redrawn(model, seed, _same_spectrum)


def embeddings_kept(model: nn.Module, seed: int) -> nn.Module:
    """A twin that keeps all embeddings outside of the blocks, and the head if it is tied to them.

    This is the strongest null: the model's own embeddings, mixed by layers that learned nothing.

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
    return _partly_kept(model, seed, lambda name: name.startswith(tuple(f"{path}." for path in kept)))


def only_above(model: nn.Module, layer: int, seed: int) -> nn.Module:
    """A twin that keeps the model up to a layer's output; everything after it is initialised again.

    Modules that are registered before the blocks (embeddings) are kept, and so is a head that is tied to them.
    Modules that are registered after the blocks (the last norm, an untied head) are initialised again.

    Args:
        layer: the last layer that is kept; −1 keeps no block.

    Raises:
        ValueError: as `reinitialised`; a model without a single stack of blocks, or a layer that it does not have.
    """
    return _partly_kept(model, seed, _before(model, layer))


def only_below(model: nn.Module, layer: int, seed: int) -> nn.Module:
    """A twin that is initialised again up to a layer's output, and keeps the model after it (see `only_above`).

    Embeddings are initialised again, and so is a head that is tied to them.

    Args:
        layer: the last layer that is initialised again.

    Raises:
        ValueError: as `only_above`.
    """
    before = _before(model, layer)
    names = names_of(model)
    below = {name for of in names.values() if any(map(before, of)) for name in of}
    return _partly_kept(model, seed, lambda name: name not in below)


def cascading(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """Twins in which one more block each time is initialised again, from the last block down.

    There are as many twins as the model has blocks. They are made one after the other, so that only one has to be in
    memory. In the first, the last block and everything after it is new; in the last, everything but the embeddings is
    new. All have one seed, so weights that are new in two of them are equal.

    Raises:
        ValueError: as `only_above`.
    """
    _expect_module(model)
    depth = Anatomy(model).depth()
    return (only_above(model, layer, seed) for layer in range(depth - 2, -2, -1))


# --- making them --------------------------------------------------------------------------------------------


def _anew(model: nn.Module, seed: int) -> nn.Module:
    """The initialised twin, on the CPU; `finished` has to follow."""
    with drawing(whole_number(seed, "seed")):
        return built(model) if is_built(model) else _reset(copied(model))


def _reset(twin: nn.Module) -> nn.Module:
    """A plain module with every parameter drawn again."""
    stuck = []
    # `named_modules` lists parents before their children. In reverse order, a parent can still change what its
    # children drew, as in its constructor.
    for name, module in reversed(list(twin.named_modules())):
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.MultiheadAttention):  # in torch its name begins with an underscore
            reset = module._reset_parameters
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            stuck.append(f"{name or 'the module itself'} ({type(module).__name__})")
    if stuck:
        raise ValueError(
            f"{type(twin).__name__} cannot be initialised again: these submodules have parameters but no "
            f"reset_parameters(): {', '.join(reversed(stuck))}. Give them one that draws their parameters."
        )
    return twin


def _expect_module(model: nn.Module) -> None:
    instance(
        model, nn.Module, "The model of a twin", "give the model of a Backbone: reinitialised(backbone.model, 0)"
    )


def _redrawn(model: nn.Module, seed: int, draw: Draw) -> nn.Module:
    """A twin with each weight tensor drawn from the model's tensor of the same name; its buffers are the model's."""
    _expect_module(model)
    if packed := packed_weights(model):
        raise ValueError(
            f"{type(model).__name__} is quantised: {packed} holds no floats that could be drawn again."
        )
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    with drawing(seed):
        twin = built(model) if is_built(model) else copied(model)
    check_same_outline(model, twin)
    fill(model, twin, lambda _, weight: draw(weight, generator))
    _take_buffers(model, twin, lambda _: True)
    return finished(model, twin)


def _partly_kept(model: nn.Module, seed: int, keeps: Callable[[str], bool]) -> nn.Module:
    """A twin that keeps the model's weights if `keeps(name)`; all others are initialised again.

    A tensor with several names is kept if `keeps` is true for one of them.
    """
    twin = _anew(model, seed)
    check_same_outline(model, twin)
    kept = {name for of in names_of(twin).values() if any(map(keeps, of)) for name in of}
    fill(model, twin, lambda name, weight: weight.clone() if name in kept else None)
    _take_buffers(model, twin, keeps)
    return finished(model, twin)


def _take_buffers(model: nn.Module, twin: nn.Module, which: Callable[[str], bool]) -> None:
    """Copy learned statistics, such as those of a batch norm, if they are in memory."""
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
        raise ValueError(f"layer={layer!r} of a model with layers 0 to {depth - 1}; −1 means none of them.")
    blocks = anatomy.stacks[""]
    first, kept = anatomy.position[blocks[0]], tuple(f"{block}." for block in blocks[: layer + 1])
    behind = tuple(f"{block}." for block in blocks[layer + 1 :])

    def before(name: str) -> bool:
        if name.startswith(kept):
            return True
        return not name.startswith(behind) and anatomy.position[name.rpartition(".")[0]] < first

    return before


# --- how a weight is drawn ----------------------------------------------------------------------------------


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
