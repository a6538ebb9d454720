"""Where the components of a model are. Blocks are found by structure, parts of a block by the names that families use.

This file only knows modules and names; `model/backbone.py` reads and writes the values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from subspace_lab.core.sites import COMPONENTS, Site

# Paths inside of a block, in the order in which they are tried, one line for each part. If a new family uses another
# name for a part, add its name here.
OUTPUT_PROJECTION = (
    "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3
    "self_attn.dense",  # Phi
    "self_attn.out_proj",  # OPT, BART, LFM2
    "self_attention.dense",  # BLOOM, Falcon
    "attn.c_proj",  # GPT-2
    "attn.out_proj",  # GPT-J, CodeGen, MPT
    "attn.attention.out_proj",  # GPT-Neo
    "temporal_block.o_proj",  # RecurrentGemma
    "attn.Wo",  # ModernBERT
    "attention.dense",  # GPT-NeoX
    "attention.output.dense",  # BERT, RoBERTa, DeBERTa
    "attention.o_proj",  # ViT, DeiT, BEiT, DINOv2, DINOv3
    "attention.out_lin",  # DistilBERT
    "attention.attn.o",  # MPNet
    "layer.0.SelfAttention.o",  # T5
)
PROJECTION = (  # of queries, keys or values, where each has its own
    "self_attn.{}_proj",
    "attn.{}_proj",  # GPT-J
    "attn.attention.{}_proj",  # GPT-Neo
    "temporal_block.{}_proj",  # RecurrentGemma
    "attention.{}_proj",  # ViT, DeiT, BEiT, DINOv2, DINOv3
    "attention.attention.{}",  # the same in older releases
    "attention.self.{}",  # BERT, RoBERTa
    "attention.self.{}_proj",  # DeBERTa-v2 and v3
    "attention.{}_lin",  # DistilBERT
    "attention.attn.{}",  # MPNet
    "layer.0.SelfAttention.{}",  # T5
)
# One projection for all three. How its columns are arranged depends on the model type alone: [queries | keys | values],
# or [query | key | value] for each head.
FUSED = {
    "gpt2": ("attn.c_attn", "contiguous"),
    "gpt_bigcode": ("attn.c_attn", "contiguous"),
    "phi3": ("self_attn.qkv_proj", "contiguous"),
    "phi4_multimodal": ("self_attn.qkv_proj", "contiguous"),
    "modernbert": ("attn.Wqkv", "contiguous"),
    "mpt": ("attn.Wqkv", "contiguous"),
    "gpt_neox": ("attention.query_key_value", "by head"),
    "gpt_neox_japanese": ("attention.query_key_value", "by head"),
    "bloom": ("self_attention.query_key_value", "by head"),
}
MLP_PROJECTION = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc2",
    "mlp.fc_out",  # GPT-J, CodeGen
    "mlp.Wo",
    "fc2",  # BART, BioGPT
    "ffn.down_proj",  # MPT
    "feed_forward.down_proj",  # Jamba, Bamba
    "feed_forward.w2",  # LFM2
    "mlp_block.down_proj",  # RecurrentGemma
    "ffn.lin2",  # DistilBERT
    "output.dense",
    "layer.2.DenseReluDense.wo",
    "layer.1.DenseReluDense.wo",
)
MIXTURE = ("mlp", "block_sparse_moe", "feed_forward")  # mixtures of experts have no single projection
ADDED_TO_MIXTURE = ("shared_mlp",)  # its output is added to that of the mixture
WORDS = {"query_output": ("q", "query"), "key_output": ("k", "key"), "value_output": ("v", "value")}
SEPARATE = {name: tuple(p.format(w) for p in PROJECTION for w in words) for name, words in WORDS.items()}
TEXT = ("", "encoder", "decoder")  # the stacks whose sizes are in the configuration
REPEATED = ("albert",)  # one block is run for several layers, so that a layer is not a place of its own
# Attributes of a layer's attention that give the size of its heads, for each component.
HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
HEAD_SIZES = {
    "query_output": ("qk_head_dim", *HEAD_SIZE),
    "key_output": ("qk_head_dim", *HEAD_SIZE),
    "value_output": ("v_head_dim", *HEAD_SIZE),
    "head_output": ("v_head_dim", *HEAD_SIZE),
}
HEAD_COUNT = ("num_heads", "num_attention_heads", "n_heads", "num_head", "n_head")
KEY_COUNT = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
TRANSPOSED = ("longformer",)  # its projections get (positions, rows, width)


@dataclass(frozen=True)
class HookPoint:
    """One stream of values: the input or output of a module, or some of its columns.

    `order` sorts hook points in the order in which a forward pass reaches them.
    """

    path: str
    side: str
    columns: tuple[int, ...] | None
    width: int | None
    order: tuple[int, ...]
    stack: str


class Anatomy:
    """The blocks of a model, and the place of each site in it."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.position = {path: i for i, path in enumerate(self.modules)}
        self.config = getattr(model, "config", None)
        self._named: dict[str, str] = {}
        self.stacks = {} if self._kind() in REPEATED else self._stacks(_lists(self.modules), model)

    def depth(self, stack: str = "") -> int:
        return len(self._blocks(stack, "the depth"))

    def hook_point(self, site: Site) -> HookPoint:
        """The place where a site is read and written.

        Raises:
            ValueError: a component, submodule or head that the model does not have.
            IndexError: a layer that the model does not have.
        """
        if site.layer is None:
            return self._by_path(site)
        stack, _, component = site.component.rpartition(".")
        stack = self._named.get(stack, stack)  # the path of a stack that has a name
        blocks = self._blocks(stack, str(site))
        if not -len(blocks) <= site.layer < len(blocks):
            raise IndexError(f"{site}: layer {site.layer} of a model with layers 0 to {len(blocks) - 1}.")
        block = blocks[site.layer % len(blocks)]
        path, side, columns, width = self._part(block, component, site)
        if stack not in TEXT and columns is not None:
            raise ValueError(f"{site}: the configuration of this stack is not known here; name whole projections.")
        if site.heads is not None:
            columns, width = self._heads(site, component, stack, path, columns, width)
        order: tuple[int, ...] = (self.position[block], COMPONENTS.index(component))
        if component == "block_output":
            order = self._after(block)
        return HookPoint(path, side, None if columns is None else tuple(columns), width, order, stack)

    def head_count(self, site: Site) -> int:
        """The number of heads of a site's component in its layer.

        Raises:
            ValueError, IndexError: as in `hook_point`; a component without heads.
        """
        whole, one = (self.hook_point(Site(site.component, site.layer, "all", heads)) for heads in (None, 0))
        assert whole.width is not None and one.width is not None  # otherwise there would be no single head
        return whole.width // one.width

    def _stacks(self, lists: list[str], model: nn.Module) -> dict[str, list[str]]:
        """{name: its blocks}.

        The name is "" for a model's only stack, and for the language model if there is also an image encoder. It is
        "encoder" and "decoder" if the model consists of both. Otherwise it is the path.
        """
        if len(lists) == 1:
            names = [""]
        elif self.config is None or getattr(self.config, "is_encoder_decoder", False):
            sides = [next((s for s in ("decoder", "encoder") if s in path.split(".")), path) for path in lists]
            names = [side if sides.count(side) == 1 else path for path, side in zip(lists, sides, strict=True)]
        else:
            text = self._language(lists, model)
            names = ["" if path == text else path for path in lists]
        self._named = dict(zip(lists, names, strict=True))
        blocks = ([f"{path}.{i}" for i in range(len(self.modules[path]))] for path in lists)
        return dict(zip(names, blocks, strict=True))

    def _language(self, lists: list[str], model: nn.Module) -> str:
        """The list with the same parent module as the token embeddings, or with the nearest parent above it."""
        try:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            parents = [p.rpartition(".")[0] for p, m in self.modules.items() if m is embeddings]
        except (AttributeError, NotImplementedError):  # CLIP does not say which of its embeddings are of text
            parents = [
                path.rpartition(".")[0]
                for path, module in self.modules.items()
                if isinstance(module, nn.Embedding) and re.search("token|word", path.rpartition(".")[2])
            ]
        parent = parents[0] if len(parents) == 1 else ""
        while parent:  # in CLIP the embeddings are a module next to the encoder
            found = [path for path in lists if path.startswith(f"{parent}.")]
            if found:
                return found[0] if len(found) == 1 else ""
            parent = parent.rpartition(".")[0]
        return ""

    def _blocks(self, stack: str, what: str) -> list[str]:
        if not self.stacks:
            raise ValueError(
                f"{what}: no stack of transformer blocks found in this model; name a submodule instead, such as "
                f"'{next((p for p in self.modules if p), 'layer')}.output'."
            )
        if stack not in self.stacks:
            possible = [f"{name}." for name in self.stacks if name]
            if not stack:
                raise ValueError(f"{what}: the model has several stacks; put one of {possible} before it.")
            raise ValueError(f"{what}: no stack {stack!r}; the model has {possible or 'one without a name'}.")
        return self.stacks[stack]

    def _by_path(self, site: Site) -> HookPoint:
        path, _, side = site.component.rpartition(".")
        if path not in self.modules:
            near = sorted(p for p in self.modules if p and p.count(".") <= path.count("."))[:12]
            raise ValueError(f"{site}: the model has no submodule {path!r}; it has {near} and more.")
        order = (self.position[path], -1) if side == "input" else self._after(path)
        sizes = _sizes(self.modules[path])
        width = None if sizes is None else sizes[side == "output"]
        stack = next((s for s in self.stacks if s and f".{s}." in f".{path}."), "")
        return HookPoint(path, side, None, width, order, stack)

    def _after(self, path: str) -> tuple[int, ...]:
        """The order of a module's output: after everything registered inside of it, and of two that end together, the
        inner one is first."""
        inside = [i for p, i in self.position.items() if not path or p == path or p.startswith(f"{path}.")]
        return (max(inside), len(COMPONENTS), -self.position[path])

    def _part(
        self, block: str, component: str, site: Site
    ) -> tuple[str, str, range | list[int] | None, int | None]:
        projection = self._first(block, OUTPUT_PROJECTION)
        inner, hidden = self._sizes_or_none(projection)
        stack = site.component.rpartition(".")[0]
        whole = hidden or (self._hidden_size() if self._named.get(stack, stack) in TEXT else None)
        if component in ("block_input", "block_output"):
            return block, component.removeprefix("block_"), None, whole
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
            mixture = self._first(block, MIXTURE)
            if mixture and component == "mlp_output" and not self._first(block, ADDED_TO_MIXTURE):
                return mixture, "output", None, whole
        if component in SEPARATE and self._kind() not in TRANSPOSED:
            separate = self._first(block, SEPARATE[component])
            width = self._sizes_or_none(separate)[1]
            if separate and component == "query_output" and inner and width == 2 * inner:
                return (
                    separate,
                    "output",
                    self._part_of_heads(projection, inner, 0, 2),
                    inner,
                )  # Qwen3-Next: [query | gate]
            if separate:
                return separate, "output", None, width
            fused = self._fused(block, component, projection, inner)
            if fused:
                return fused
        parts = sorted(p.removeprefix(f"{block}.") for p in self.modules if p.startswith(f"{block}."))
        raise ValueError(
            f"{site}: this model's blocks have no {component} that is known. Submodules of the block: {parts}; "
            f"name one by its path, such as '{block}.{parts[0] if parts else ''}.output'."
        )

    def _fused(
        self, block: str, component: str, projection: str | None, inner: int | None
    ) -> tuple[str, str, range | list[int], int] | None:
        which = list(SEPARATE).index(component)
        name, order = FUSED.get(self._kind(), ("", ""))
        path = self._first(block, (name,))
        if not path or not inner or not projection:
            return None
        # GPT-BigCode's projection is by head too, unless it is multi-query.
        if order == "by head" or not getattr(self.config, "multi_query", True):
            return path, "output", self._part_of_heads(projection, inner, which, 3), inner
        keys = (self._sizes_or_none(path)[1] - inner) // 2
        start, width = (0, inner) if which == 0 else (inner + (which - 1) * keys, keys)
        return path, "output", range(start, start + width), width

    def _part_of_heads(self, projection: str | None, inner: int, which: int, parts: int) -> list[int]:
        """The columns of one of several equal parts of each head."""
        assert projection is not None
        head = self._head_size("head_output", "", projection, inner)
        return [parts * start + which * head + i for start in range(0, inner, head) for i in range(head)]

    def _heads(
        self, site: Site, component: str, stack: str, path: str, columns: Any, width: int | None
    ) -> tuple[list[int], int]:
        assert site.heads is not None
        if width is None:
            raise ValueError(
                f"{site}: the width of this projection is not known; use the whole of it, without heads."
            )
        size = self._head_size(component, stack, path, width)
        count = width // size
        if max(site.heads) >= count:
            raise ValueError(f"{site}: heads {site.heads} of {count}; possible are 0 to {count - 1}.")
        chosen = [size * head + i for head in site.heads for i in range(size)]
        return (chosen if columns is None else [columns[i] for i in chosen]), len(chosen)

    def _head_size(self, component: str, stack: str, path: str, width: int) -> int:
        """The width of a head: from the layer itself, because layers may differ; otherwise from the configuration."""
        own = self._attention(path)
        keys = component in ("key_output", "value_output")
        size = _first_whole(own, HEAD_SIZES[component])
        if size is None:
            count = _first_whole(own, KEY_COUNT if keys else HEAD_COUNT)
            count = count or (self._head_count(component) if stack in TEXT else None)
            if count is None:
                raise ValueError(f"{path}: neither the layer nor its configuration says how many heads it has.")
            size = width // count if width % count == 0 else 0
        if not size or width % size:
            raise ValueError(f"{path}: heads of width {size} do not fill a projection of width {width}.")
        return size

    def _attention(self, path: str) -> dict[str, Any]:
        """Attributes about heads of the attention that contains a projection."""
        known = {*HEAD_COUNT, *KEY_COUNT, *(name for names in HEAD_SIZES.values() for name in names)}
        above = path.rpartition(".")[0]
        while above and not isinstance(self.modules[above], nn.ModuleList):
            near = [above, *(p for p in self.modules if p.startswith(f"{above}."))]
            for found in (vars(self.modules[p]) for p in near):
                if known & found.keys():
                    return dict(found)
            above = above.rpartition(".")[0]
        return {}

    def _head_count(self, component: str) -> int:
        config = self._text_config()
        heads = getattr(config, "num_attention_heads", None)
        if heads is None:
            raise ValueError("The model's configuration does not say how many attention heads it has.")
        if not isinstance(heads, int):
            raise ValueError(
                f"The layers have different numbers of heads, {heads}, and do not say which layer has which."
            )
        if component in ("key_output", "value_output"):
            return getattr(config, "num_key_value_heads", None) or heads
        return heads

    def _hidden_size(self) -> int | None:
        return getattr(self._text_config(), "hidden_size", None)

    def _kind(self) -> str:
        return getattr(self._text_config(), "model_type", "")

    def _text_config(self) -> Any:
        config: Any = self.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _first(self, block: str, candidates: tuple[str, ...]) -> str | None:
        return next((f"{block}.{c}" for c in candidates if f"{block}.{c}" in self.modules), None)

    def _sizes_or_none(self, path: str | None) -> tuple[Any, Any]:
        return (None, None) if path is None else _sizes(self.modules[path]) or (None, None)


def _lists(modules: dict[str, nn.Module]) -> list[str]:
    """The outermost lists of blocks: of modules that contain attention, or that transformers marks as layers."""
    lists: list[str] = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(f"{outer}.") for outer in lists):
            continue
        if all(_is_block(child) for child in module):
            lists.append(path)
    return lists


def attends(module: nn.Module) -> bool:
    """Whether a block contains attention. (A block of Mamba does not; XLM's attention itself does not either.)"""
    return any("attention" in type(part).__name__.lower() for part in module.modules() if part is not module)


def _is_block(module: nn.Module) -> bool:
    return attends(module) or any(k.__name__ == "GradientCheckpointingLayer" for k in type(module).__mro__)


def _first_whole(attributes: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a whole number above 0."""
    found = (attributes.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, also of GPT-2's transposed ones and of wrapped ones."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)
    return None
