"""Access to the inside of a model, through nnsight.

Nothing else in the package imports nnsight, so that a change of nnsight only affects this file.

What this does to the user's model: nnsight puts a controller on every module (an instance attribute `forward`), which
does nothing outside of a trace. No torch hook, parameter, buffer or flag is added or changed. Importing nnsight patches
`torch.Tensor.backward` and gives every object a `.save`. Therefore it is imported when the first backbone is created,
not together with the package.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspace_lab.core.sites import Site
from subspace_lab.model.arguments import expect_site
from subspace_lab.model.families import Anatomy, HookPoint
from subspace_lab.model.offloading import running_device


@dataclass(frozen=True)
class Hook:
    """A function of the values at one place of a model. Its result replaces the value; None leaves it unchanged.

    Attributes:
        path: the path of the module.
        side: "input" or "output": `act` gets this tensor of the module. "replace": the module is not run; `act` gets
            its input and returns its output. "skip": the module is not run; `act` gets None and returns its output.
        order: sorts hooks in the order in which a forward pass reaches them.
        act: the function.
        steps: the forward passes of a generation in which it acts.
    """

    path: str
    side: str
    order: tuple[int, ...]
    act: Callable[[Any], Tensor | None]
    steps: Literal["first", "later", "every"] = "every"


class Backbone:
    """A torch model whose hidden states can be read and written.

    Args:
        model: any `nn.Module`. Transformer blocks are found by structure (`model/families.py`). In other modules sites
            are named by the paths of submodules.
    """

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, Backbone):
            raise TypeError("This is a backbone already; a model was expected.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"A backbone is made from a torch module, not from {type(model).__name__}.")
        from nnsight import NNsight

        self.model = model
        self.anatomy = Anatomy(model)
        self._hook_points: dict[Site, HookPoint] = {}
        self._lengths: dict[tuple[Any, ...], int] = {}
        # {class of module: how many values follow the states in its output; None if the output is not a tuple}
        self._further: dict[type, int | None] = {}
        with warnings.catch_warnings():
            # nnsight renames submodules called "output"; here its envoys are looked up by module, not by name.
            warnings.simplefilter("ignore")
            self._net = NNsight(model)
        self._envoys = {id(envoy._module): envoy for envoy in self._net.modules()}
        # Two runs with hooks must not overlap on one model, neither nested nor in two threads.
        self._lock = threading.RLock()

    @property
    def depth(self) -> int:
        """The number of blocks of the model."""
        return self.anatomy.depth()

    def head(self) -> str | None:
        """The path of the output embeddings (the language-model head); None if there are none."""
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        return next((path for path, m in self.anatomy.modules.items() if m is head), None)

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs. ValueError for a model without weights, on "meta"."""
        return running_device(self.model)

    def is_plain(self, path: str) -> bool:
        """Whether a module computes what its class defines, with weights that it holds itself.

        This is not so if something replaced its `forward`, wraps it, has hooks on it, or keeps its weights elsewhere.
        """
        module: Any = self.anatomy.modules[path]
        own = vars(module)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(hooks) or module._backward_pre_hooks or "_hf_hook" in own or "_old_forward" in own:
            return False
        forward, state = own.get("forward"), own.get("__nnsight__")
        if forward is not None and not (
            type(forward).__module__.startswith("nnsight.")
            and getattr(state, "body", None) is type(module).forward
        ):
            return False
        weights = (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
        return all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in weights)

    def hook_point(self, site: Site) -> HookPoint:
        """The place where a site is read and written.

        Raises:
            TypeError: anything but a Site with a whole number as its layer.
            ValueError, IndexError: as in `Anatomy.hook_point`, if the model has no such place.
        """
        if site not in self._hook_points:
            expect_site(site)
            self._hook_points[site] = self.anatomy.hook_point(site)
        return self._hook_points[site]

    def stream_length(self, hook_point: HookPoint, inputs: Mapping[str, Any] | Sequence[Any]) -> int:
        """The number of positions of a stream without tokens (of image patches, for example), found by a run.

        Raises:
            ValueError: a stream without positions.
        """
        given = inputs.values() if isinstance(inputs, Mapping) else inputs
        key = (hook_point.path, hook_point.side, *(tuple(t.shape[1:]) for t in given if isinstance(t, Tensor)))
        if key not in self._lengths:
            shapes: list[tuple[int, ...]] = []
            look = Hook(
                hook_point.path, hook_point.side, hook_point.order, lambda t: shapes.append(tuple(t.shape))
            )
            with torch.no_grad():
                self.run(inputs, [look], stop=True)
            if len(shapes[0]) != 3:
                raise ValueError(f"{hook_point.path}: the stream there, {shapes[0]}, has no position axis.")
            self._lengths[key] = shapes[0][1]
        return self._lengths[key]

    def has_class_token(self) -> bool:
        """Whether the first position of the model's images represents the whole image."""
        names = ("cls_token", "class_token", "class_embedding")
        return any(name in names for m in self.model.modules() for name in m._parameters)

    def width(self, site: Site) -> int:
        """The width of the stream at a site. ValueError if only a run could find it."""
        width = self.hook_point(site).width
        if width is None:
            raise ValueError(f"{site}: its width is not known before a run; `collect` its states to find it.")
        return width

    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        hooks: Sequence[Hook],
        *,
        call: Callable[..., Any] | None = None,
        stop: bool = False,
        every_step: bool = False,
    ) -> Any:
        """Run the model with hooks.

        Args:
            inputs: keyword arguments of the model, or positional ones.
            hooks: in any order.
            call: what is run instead of the model, for example `model.generate`.
            stop: end the run after the last hook; the result is then None.
            every_step: the run makes several forward passes; each hook acts in those that it names.

        Raises:
            ValueError: modules that the model does not run, or not in the order in which they are registered.
        """
        order = sorted(hooks, key=lambda v: v.order)
        first = next(self.model.parameters(), None)
        # A model without weights is refused, because its numbers have no meaning.
        device = running_device(self.model) if first is not None and first.is_meta else None
        # If `torch.compile` wraps the model, the wrapped model is run, see `_uncompiled`.
        run = getattr(self.model, "_orig_mod", self.model) if call is None and order else call or self.model
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        if not order:
            return run(*args, **kwargs)
        self._check_checkpointing(order)
        result: list[Any] = []
        if device is not None:
            # nnsight would move the inputs to the first parameter's device, which is "meta" between runs: hide them.
            hidden = ([_on(device, a) for a in args], {name: _on(device, a) for name, a in kwargs.items()})
            args, kwargs = (_Hidden(hidden),), {}

        def run_and_keep_result(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], _Hidden):
                args, kwargs = args[0].arguments
            try:
                result.append(run(*args, **kwargs))
                return result[0]
            except EarlyStopException as stopped:
                # This error refers to every frame of the model, and so to states, keys and values, in a cycle. Clear
                # it, and raise a new one from here.
                stopped.__traceback__ = stopped.__context__ = None
                vars(stopped).clear()
            del args, kwargs
            raise EarlyStopException()

        from nnsight.intervention.interleaver import EarlyStopException, OutOfOrderError

        try:
            with (
                self._lock,
                self._uncompiled(),
                self._net.trace(*args, fn=run_and_keep_result, **kwargs) as tracer,
            ):
                self._call_hooks(order, tracer, stop, every_step)
        except OutOfOrderError as error:
            places = [f"{hook.path}.{hook.side}" for hook in order]
            raise ValueError(
                f"The model does not run {places} in this order, in which they are registered, or not all of "
                f"them: {error}. Use them in separate runs, or name others."
            ) from error
        return result[0] if result else None

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Run a compiled model without compilation: compiling with hooks takes a minute and makes nothing faster."""
        compiled = any(m._compiled_call_impl is not None for m in self.anatomy.modules.values())
        stance = getattr(torch.compiler, "set_stance", None)
        return stance("force_eager") if compiled and stance is not None else nullcontext()

    def _check_checkpointing(self, hooks: Sequence[Hook]) -> None:
        """Refuse hooks that would silently get no gradient: when a block is run again, hooks do not act again."""
        model = self.model
        if not (torch.is_grad_enabled() and model.training):
            return
        if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            return
        blocks = [f"{block}." for stack in self.anatomy.stacks.values() for block in stack]
        inside = [hook.path for hook in hooks if hook.path.startswith(tuple(blocks))]
        if inside:
            raise ValueError(
                f"Gradient checkpointing is on, and {inside[0]!r} is inside a block, which would be run again "
                "without its edit: edit block_input or block_output, or switch it off with "
                "`model.gradient_checkpointing_disable()`."
            )

    def _call_hooks(self, order: list[Hook], tracer: Any, stop: bool, every_step: bool) -> None:
        """The body of the trace. It runs alongside the model and waits whenever it needs a value."""
        from nnsight.intervention.interleaver import OutOfOrderError

        if not every_step or all(hook.steps == "first" for hook in order):
            for hook in order:
                self._serve(hook)
            if stop:
                tracer.stop()
            return
        between = False
        try:
            for step in tracer.iter[:]:
                between = step > 0
                for hook in order:
                    if hook.steps == "every" or (hook.steps == "first") == (step == 0):
                        self._serve(hook)
                        between = False
        except OutOfOrderError:
            if not between:
                raise
            # Raised at the end of a generation, in a step that was not made any more.

    def _serve(self, hook: Hook) -> None:
        module = self.anatomy.modules[hook.path]
        envoy = self._envoys[id(module)]
        if hook.side in ("skip", "replace"):
            new = hook.act(None if hook.side == "skip" else _first(envoy.input))
            # Like the module's own output: GPT-J's blocks return (states, attention weights or None).
            further = self._further.get(type(module))
            envoy.skip(new if further is None else (new, *[None] * further))
            return
        value = envoy.input if hook.side == "input" else envoy.output
        if hook.side == "output":
            self._further[type(module)] = len(value) - 1 if isinstance(value, tuple) else None
        new = hook.act(_first(value))
        if new is None:
            return
        # Clone and replace, never in place: whether autograd notices an in-place write depends on the layout.
        whole = (new, *value[1:]) if isinstance(value, tuple) else new
        if hook.side == "input":
            envoy.input = whole
        else:
            envoy.output = whole


@dataclass(frozen=True)
class _Hidden:
    """Arguments that nnsight must not inspect."""

    arguments: tuple[Any, Any]


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def expect_backbone(value: Any) -> None:
    """TypeError for anything but a backbone, for example a model."""
    if not isinstance(value, Backbone):
        raise TypeError(f"A Backbone is needed, found {type(value).__name__}: write Backbone(model).")


def _first(value: Any) -> Tensor:
    """The states in a module's output: a tensor, or a tuple that begins with it."""
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor):
        raise TypeError(f"A tensor was expected at this site, found {type(value).__name__}.")
    return value


@contextmanager
def frozen(model: nn.Module | Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block the model's parameters are constants; after it their flags are as before.

    A graph that is built inside has no path to the parameters: only the edits get gradients, and no memory is used for
    what only the gradients of weights would need.

    Args:
        model: the model, or a list of its parameters, which is faster to iterate (if the model is not offloaded).
    """
    trainable = [p for p in (model.parameters() if isinstance(model, nn.Module) else model) if p.requires_grad]
    # Offloaded parameters are new objects after each run.
    places = [
        (m, name)
        for m in (model.modules() if isinstance(model, nn.Module) and any(p.is_meta for p in trainable) else ())
        for name, p in m._parameters.items()
        if p is not None and p.is_meta and p.requires_grad
    ]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, name in places:
            getattr(module, name).requires_grad_(True)
