"""Where the components of a model are: blocks by structure, the parts of a block by the names families use.

Knows modules and names only; reading and writing the values is `core/backbone.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from subspace_lab.core.sites import COMPONENTS, Site

# Paths inside a block, in the order in which they are tried. One line a part; a new family that names its
# parts otherwise adds its name here.
OUTPUT_PROJECTION = (
    "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3
    "self_attn.dense",  # Phi
    "self_attn.out_proj",
    "attn.c_proj",  # GPT-2
    "attn.Wo",  # ModernBERT
    "attention.dense",  # GPT-NeoX
    "attention.output.dense",  # BERT, RoBERTa
    "layer.0.SelfAttention.o",  # T5
)
QUERY = ("self_attn.q_proj", "attention.self.query", "layer.0.SelfAttention.q")
KEY = ("self_attn.k_proj", "attention.self.key", "layer.0.SelfAttention.k")
VALUE = ("self_attn.v_proj", "attention.self.value", "layer.0.SelfAttention.v")
CONTIGUOUS_QKV = ("attn.c_attn", "self_attn.qkv_proj", "attn.Wqkv")  # [queries | keys | values]
INTERLEAVED_QKV = ("attention.query_key_value",)  # GPT-NeoX: for each head [query | key | value]
MLP_PROJECTION = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc2",
    "mlp.Wo",
    "output.dense",
    "layer.2.DenseReluDense.wo",
    "layer.1.DenseReluDense.wo",
)
SEPARATE = {"query_output": QUERY, "key_output": KEY, "value_output": VALUE}


@dataclass(frozen=True)
class Tap:
    """One stream of values: the input or output of a module, or some columns of it.

    `order` sorts taps as a forward pass reaches them.
    """

    path: str
    side: str
    columns: tuple[int, ...] | None
    width: int | None
    order: tuple[int, ...]
    stack: str


class Anatomy:
    """The blocks of a model and how to find a site in it."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.position = {path: i for i, path in enumerate(self.modules)}
        self.config = getattr(model, "config", None)
        self.stacks = _stacks(self.modules)

    def depth(self, stack: str = "") -> int:
        return len(self._blocks(stack, "the depth"))

    def tap(self, site: Site) -> Tap:
        """Where a site is read and written.

        Raises:
            ValueError: a component, submodule or head that the model has not.
            IndexError: a layer it has not.
        """
        if site.layer is None:
            return self._by_path(site)
        stack, _, component = site.component.rpartition(".")
        blocks = self._blocks(stack, str(site))
        if not -len(blocks) <= site.layer < len(blocks):
            raise IndexError(f"{site}: layer {site.layer} of a model with layers 0 to {len(blocks) - 1}.")
        block = blocks[site.layer % len(blocks)]
        path, side, columns, width = self._part(block, component, site)
        if site.heads is not None:
            columns, width = self._heads(site, component, block, columns, width)
        order = (self.position[block], COMPONENTS.index(component))
        if component == "block_output":  # after every site by path inside the block
            order = (self._end(block), len(COMPONENTS) + 1)
        return Tap(path, side, None if columns is None else tuple(columns), width, order, stack)

    def _blocks(self, stack: str, what: str) -> list[str]:
        if not self.stacks:
            raise ValueError(
                f"{what}: no stack of transformer blocks found in this model; name a submodule instead, as in "
                f"'{next((p for p in self.modules if p), 'layer')}.output'."
            )
        if stack not in self.stacks:
            possible = [f"{name}." for name in self.stacks if name]
            if not stack:
                raise ValueError(f"{what}: the model has several stacks; put one of {possible} before it.")
            raise ValueError(f"{what}: no stack {stack!r}; the model has {possible or 'one without a name'}.")
        return self.stacks[stack]

    def _by_path(self, site: Site) -> Tap:
        path, _, side = site.component.rpartition(".")
        if path not in self.modules:
            near = sorted(p for p in self.modules if p and p.count(".") <= path.count("."))[:12]
            raise ValueError(f"{site}: the model has no submodule {path!r}; it has {near} and more.")
        # A module's output comes after everything registered inside it.
        order = (self.position[path], -1) if side == "input" else (self._end(path), len(COMPONENTS))
        sizes = _sizes(self.modules[path])
        width = None if sizes is None else sizes[side == "output"]
        stack = next((s for s in self.stacks if s and f".{s}." in f".{path}."), "")
        return Tap(path, side, None, width, order, stack)

    def _end(self, path: str) -> int:
        """The place of the last module registered inside a module."""
        return max(i for p, i in self.position.items() if not path or p == path or p.startswith(f"{path}."))

    def _part(
        self, block: str, component: str, site: Site
    ) -> tuple[str, str, range | list[int] | None, int | None]:
        projection = self._first(block, OUTPUT_PROJECTION)
        inner, hidden = self._sizes_or_none(projection)
        if component in ("block_input", "block_output"):
            return block, component.removeprefix("block_"), None, hidden or self._hidden_size()
        if component == "attention_output" and projection:
            return projection, "output", None, hidden
        if component == "head_output" and projection:
            return projection, "input", None, inner
        if component in ("mlp_activation", "mlp_output"):
            down = self._first(block, MLP_PROJECTION)
            if down:
                units, width = self._sizes_or_none(down)
                reads = component == "mlp_activation"
                return down, "input" if reads else "output", None, units if reads else width
            whole = self._first(block, ("mlp",))
            if whole and component == "mlp_output":  # mixtures of experts have no single projection
                return whole, "output", None, hidden
        if component in SEPARATE:
            separate = self._first(block, SEPARATE[component])
            if separate:
                return separate, "output", None, self._sizes_or_none(separate)[1]
            fused = self._fused(block, component, inner)
            if fused:
                return fused
        parts = sorted(p.removeprefix(f"{block}.") for p in self.modules if p.startswith(f"{block}."))
        raise ValueError(
            f"{site}: this model's blocks have no {component} that is known. Submodules of the block: {parts}; "
            f"name one by its path, as in '{block}.{parts[0] if parts else ''}.output'."
        )

    def _fused(
        self, block: str, component: str, inner: int | None
    ) -> tuple[str, str, range | list[int], int] | None:
        which = list(SEPARATE).index(component)
        path = self._first(block, CONTIGUOUS_QKV)
        if path and inner:
            keys = (self._sizes_or_none(path)[1] - inner) // 2
            start, width = (0, inner) if which == 0 else (inner + (which - 1) * keys, keys)
            return path, "output", range(start, start + width), width
        path = self._first(block, INTERLEAVED_QKV)
        if path and inner and getattr(self.config, "model_type", "") == "gpt_neox":
            head = inner // self._head_count("head_output")
            columns = [3 * head * h + which * head + i for h in range(inner // head) for i in range(head)]
            return path, "output", columns, inner
        return None

    def _heads(
        self, site: Site, component: str, block: str, columns: Any, width: int | None
    ) -> tuple[list[int], int]:
        count = self._head_count(component)
        assert site.heads is not None and width is not None
        if max(site.heads) >= count:
            raise ValueError(f"{site}: heads {site.heads} of {count}; possible are 0 to {count - 1}.")
        size = width // count
        chosen = [size * head + i for head in site.heads for i in range(size)]
        return (chosen if columns is None else [columns[i] for i in chosen]), len(chosen)

    def _head_count(self, component: str) -> int:
        config = self._text_config()
        heads = getattr(config, "num_attention_heads", None)
        if heads is None:
            raise ValueError("The model's configuration does not tell its number of attention heads.")
        if component in ("key_output", "value_output"):
            return getattr(config, "num_key_value_heads", None) or heads
        return heads

    def _hidden_size(self) -> int | None:
        return getattr(self._text_config(), "hidden_size", None)

    def _text_config(self) -> Any:
        config: Any = self.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _first(self, block: str, candidates: tuple[str, ...]) -> str | None:
        return next((f"{block}.{c}" for c in candidates if f"{block}.{c}" in self.modules), None)

    def _sizes_or_none(self, path: str | None) -> tuple[Any, Any]:
        return (None, None) if path is None else _sizes(self.modules[path]) or (None, None)


def _stacks(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """The outermost lists of modules of which every one contains attention, by name."""
    lists: list[str] = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        if all(any("attention" in type(m).__name__.lower() for m in child.modules()) for child in module):
            lists.append(path)
    blocks = {path: [f"{path}.{i}" for i in range(len(modules[path]))] for path in lists}  # type: ignore[arg-type]
    if len(lists) == 1:
        return {"": blocks[lists[0]]}
    named = {}
    for path in lists:
        parts = path.split(".")
        side = next((s for s in ("decoder", "encoder") if s in parts), path)
        named[path if side in named else side] = blocks[path]
    return named


def _sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, also of GPT-2's transposed one and of wrapped ones."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)
    return None
