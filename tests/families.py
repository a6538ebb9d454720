"""Tiny random models of the real architectures, and hand-written torch hooks as the oracle.

Nothing here uses the package: where a component is was read in each architecture's own code and is written
down once more, so that the package's idea of a model is compared with another one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WIDTH, UNITS, LAYERS, HEADS, VOCABULARY = 32, 48, 3, 4, 60
WINDOW = 8  # of the sliding attentions; `inputs` are longer
PAD = {"roberta": 1}  # 0 elsewhere

DECODERS = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "neox",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
)
ENCODERS = ("bert", "roberta", "modernbert")
TRANSFORMERS = (*DECODERS, *ENCODERS, "t5")
NAMES = (*TRANSFORMERS, "mlp")

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=UNITS,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED: dict[str, Any] = dict(_COMMON, num_key_value_heads=2)
_WIDE_HEADS: dict[str, Any] = dict(_GROUPED, head_dim=16)  # 4 heads of 16 in a stream of 32
_LOCAL: dict[str, Any] = dict(sliding_window=WINDOW)
_LAYER_TYPES: dict[str, Any] = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def _config(name: str) -> transformers.PretrainedConfig:
    match name:
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_inner=UNITS,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        case "llama":
            return transformers.LlamaConfig(**_GROUPED)
        case "mistral":
            return transformers.MistralConfig(**_GROUPED, **_LOCAL)
        case "qwen2":
            return transformers.Qwen2Config(**_GROUPED)
        case "qwen3":
            return transformers.Qwen3Config(**_WIDE_HEADS)
        case "gemma2":
            return transformers.Gemma2Config(**_WIDE_HEADS, **_LOCAL)
        case "gemma3":
            return transformers.Gemma3TextConfig(**_WIDE_HEADS, **_LOCAL, **_LAYER_TYPES)
        case "neox":
            return transformers.GPTNeoXConfig(**_COMMON)
        case "olmo":
            return transformers.OlmoConfig(**_COMMON)
        case "olmo2":
            return transformers.Olmo2Config(**_COMMON)
        case "phi":
            return transformers.PhiConfig(**_COMMON)
        case "phi3":
            return transformers.Phi3Config(**_GROUPED)
        case "bert":
            return transformers.BertConfig(**_COMMON)
        case "roberta":
            return transformers.RobertaConfig(**(_COMMON | dict(pad_token_id=1, bos_token_id=0)))
        case "modernbert":
            return transformers.ModernBertConfig(**_COMMON, cls_token_id=1, sep_token_id=2, local_attention=WINDOW)
        case "t5":
            sizes: dict[str, Any] = dict(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=WIDTH // HEADS,
                d_ff=UNITS,
                num_layers=LAYERS,
                num_heads=HEADS,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=2,
            )
            return transformers.T5Config(**sizes)
    raise ValueError(f"No family {name!r}; possible are {NAMES}.")


def fresh(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A new model in eval mode, always the same weights, of which no bias is 0 and no gain is 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        if name == "mlp":
            model: Any = nn.Sequential(
                OrderedDict(
                    first=nn.Linear(12, WIDTH),
                    bend=nn.Tanh(),
                    second=nn.Linear(WIDTH, WIDTH),
                    bend_again=nn.GELU(),
                    head=nn.Linear(WIDTH, 5),
                )
            )
        else:
            kind = (
                transformers.AutoModelForSeq2SeqLM
                if name == "t5"
                else transformers.AutoModelForMaskedLM
                if name in ENCODERS
                else transformers.AutoModelForCausalLM
            )
            model = kind.from_config(_config(name))
            if name not in ENCODERS:
                model.generation_config.eos_token_id = None  # generations have the length that was asked for
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval().to(dtype)


@cache
def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model for every test of the session: leave it as you found it, or take a `fresh` one."""
    return fresh(name, dtype)


def inputs(
    name: str,
    rows: int = 3,
    length: int = 11,
    seed: int = 0,
    *,
    lengths: tuple[int, ...] | None = None,
    padding: str = "right",
    decoder_lengths: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Random tokens with their attention mask; for "mlp" one random tensor.

    Args:
        lengths: real tokens of each row (`length` without it); the rest is padding on the given side.
        decoder_lengths: the same for a decoder of an encoder-decoder, always padded on the right.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "mlp":
        return torch.randn(rows, 12, generator=generator).to(dtype)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    ids, mask = _padded(ids, lengths, padding, PAD.get(name, 0))
    if name != "t5":
        return {"input_ids": ids, "attention_mask": mask}
    decoder = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    decoder, decoder_mask = _padded(decoder, decoder_lengths, "right", 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder,
        "decoder_attention_mask": decoder_mask,
    }


def _padded(ids: Tensor, lengths: tuple[int, ...] | None, padding: str, pad: int) -> tuple[Tensor, Tensor]:
    """The first tokens of each row, so that left- and right-padded batches hold the same ones."""
    rows, length = ids.shape
    padded, mask = torch.full_like(ids, pad), torch.zeros_like(ids)
    for row, n in enumerate(lengths or (length,) * rows):
        where = slice(0, n) if padding == "right" else slice(length - n, length)
        padded[row, where] = ids[row, :n]
        mask[row, where] = 1
    return padded, mask


def call(model: nn.Module, given: Mapping[str, Tensor] | Tensor) -> Tensor:
    """The plain output: logits, or what a plain module gives."""
    out = model(given) if isinstance(given, Tensor) else model(**given)
    return out if isinstance(out, Tensor) else out.logits


# --- where things are, written by hand ----------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """A module's path, which side of it, and which of its columns."""

    path: str
    side: str
    columns: tuple[int, ...] | None = None

    @property
    def width(self) -> int | None:
        return None if self.columns is None else len(self.columns)


def _columns(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _interleaved(which: int) -> tuple[int, ...]:
    """GPT-NeoX views its 96 columns as (4 heads, 3, 8)."""
    return tuple(torch.arange(3 * WIDTH).view(HEADS, 3, WIDTH // HEADS)[:, which].flatten().tolist())


def _parts(block: str, qkv: Sequence[str | Spot], attention: str, mlp: str) -> dict[str, Spot]:
    q, k, v = qkv

    def output(where: str | Spot) -> Spot:
        if isinstance(where, str):
            return Spot(f"{block}.{where}", "output")
        return Spot(f"{block}.{where.path}", where.side, where.columns)

    return {
        "block_input": Spot(block, "input"),
        "query_output": output(q),
        "key_output": output(k),
        "value_output": output(v),
        "head_output": Spot(f"{block}.{attention}", "input"),
        "attention_output": Spot(f"{block}.{attention}", "output"),
        "mlp_activation": Spot(f"{block}.{mlp}", "input"),
        "mlp_output": Spot(f"{block}.{mlp}", "output"),
        "block_output": Spot(block, "output"),
    }


def _fused(path: str, *columns: tuple[int, ...]) -> list[Spot]:
    return [Spot(path, "output", c) for c in columns]


def spots(name: str, layer: int) -> dict[str, Spot]:
    """Every component of a block: {component: spot}, with the stack before the name in T5."""
    apart = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    thirds = [_columns(0, WIDTH), _columns(WIDTH, 2 * WIDTH), _columns(2 * WIDTH, 3 * WIDTH)]
    match name:
        case "mlp":
            return {
                path: Spot(path.split(".")[0], path.split(".")[1])
                for path in ("first.output", "bend.output", "second.input", "second.output", "head.input")
            }
        case "gpt2":
            fused = _fused("attn.c_attn", *thirds)
            return _parts(f"transformer.h.{layer}", fused, "attn.c_proj", "mlp.c_proj")
        case "neox":
            fused = _fused("attention.query_key_value", *map(_interleaved, range(3)))
            block = f"gpt_neox.layers.{layer}"
            return _parts(block, fused, "attention.dense", "mlp.dense_4h_to_h")
        case "phi":
            return _parts(f"model.layers.{layer}", apart, "self_attn.dense", "mlp.fc2")
        case "phi3":  # 4 query heads, 2 heads of keys and of values
            fused = _fused("self_attn.qkv_proj", _columns(0, 32), _columns(32, 48), _columns(48, 64))
            return _parts(f"model.layers.{layer}", fused, "self_attn.o_proj", "mlp.down_proj")
        case "bert" | "roberta":
            separate = [f"attention.self.{part}" for part in ("query", "key", "value")]
            block = f"{name}.encoder.layer.{layer}"
            return _parts(block, separate, "attention.output.dense", "output.dense")
        case "modernbert":
            return _parts(f"model.layers.{layer}", _fused("attn.Wqkv", *thirds), "attn.Wo", "mlp.Wo")
        case "t5":
            separate = [f"layer.0.SelfAttention.{part}" for part in "qkv"]
            found: dict[str, Spot] = {}
            for stack, feed in (("encoder", 1), ("decoder", 2)):
                mlp = f"layer.{feed}.DenseReluDense.wo"
                parts = _parts(f"{stack}.block.{layer}", separate, "layer.0.SelfAttention.o", mlp)
                found |= {f"{stack}.{component}": spot for component, spot in parts.items()}
            return found
    return _parts(f"model.layers.{layer}", apart, "self_attn.o_proj", "mlp.down_proj")


def heads(name: str, component: str) -> tuple[int, int]:
    """(how many, of which size) heads a component has."""
    part = component.rpartition(".")[2]
    few = name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
    count = 2 if few and part in ("key_output", "value_output") else HEADS
    return count, 16 if name in ("qwen3", "gemma2", "gemma3") else WIDTH // HEADS


# --- hooks --------------------------------------------------------------------------------------------------

Act = Callable[[Tensor], Tensor | None]


@contextmanager
def hooked(model: nn.Module, acts: Mapping[Spot, Act]) -> Iterator[None]:
    """The model with functions of its insides: what one returns replaces the value, None leaves it."""
    handles = []
    for spot, act in acts.items():
        module = model.get_submodule(spot.path)
        if spot.side == "input":
            handles.append(module.register_forward_pre_hook(_before(act), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_after(act)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(act: Act) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            new = act(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        new = act(args[0])
        return None if new is None else ((new, *args[1:]), kwargs)

    return hook


def _after(act: Act) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = act(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return hook


def capture(model: nn.Module, given: Mapping[str, Tensor] | Tensor, spot: Spot) -> Tensor:
    """The whole value at a spot in a plain run."""
    kept: list[Tensor] = []
    with torch.no_grad(), hooked(model, {spot: lambda value: kept.append(value.clone())}):
        call(model, given)
    value = kept[0]
    return value if spot.columns is None else value[..., list(spot.columns)]


def editing(formula: Callable[[Tensor], Tensor], rows: list[list[int]] | None, spot: Spot) -> Act:
    """A hook that replaces the states at these columns of each row (everywhere without them)."""

    def act(value: Tensor) -> Tensor:
        columns = list(range(value.shape[-1])) if spot.columns is None else list(spot.columns)
        new = value.clone()
        if rows is None:
            new[..., columns] = formula(value[..., columns])
            return new
        for row, at in enumerate(rows):
            for position in at:
                new[row, position, columns] = formula(value[row, position, columns])
        return new

    return act


def standing(spec: str, lengths: tuple[int, ...], length: int, padding: str = "right") -> list[list[int]]:
    """For the few specs that the tests of running use: where the positions stand in each row of the batch."""
    chosen = []
    for n in lengths:
        real = list(range(n) if padding == "right" else range(length - n, length))
        match spec:
            case "all":
                chosen.append(real)
            case "last":
                chosen.append(real[-1:])
            case "1:3":
                chosen.append(real[1:3])
            case "f1+l1":  # a row of one token has no prefix
                chosen.append([real[0], real[-1]] if n > 1 else real)
            case _:
                raise ValueError(spec)
    return chosen


def by_hand(edit: Any) -> Callable[[Tensor], Tensor]:
    """LoReFT's formula, h + Rᵀ((W − R) h + b) in the precision that the package promises."""
    rows, p = edit.subspace.basis(), edit.value

    def formula(h: Tensor) -> Tensor:
        exact = h.to(torch.promote_types(h.dtype, torch.float32))
        change = exact @ (p.weight - rows).to(exact.dtype).T + p.bias.to(exact.dtype)
        return h + (change @ rows.to(exact.dtype)).to(h.dtype)

    return formula


# --- comparing ------------------------------------------------------------------------------------------------


def exact(name: str) -> torch.dtype:
    """The dtype in which laws are compared: float64 wherever the model allows it.

    In float64 Gemma 2's mask is lower than the lowest number of float32, in which it takes the softmax: NaN at
    padding.
    """
    return torch.float32 if name == "gemma2" else torch.float64


def rounding(dtype: torch.dtype) -> float:
    """The largest relative difference of equal numbers that were computed in different ways.

    In float64 rounding changes the sixteenth digit, but parts of some models (RMSNorm, softmax, rotary angles)
    round to float32, by 6e-8: to the same number in both runs, except rarely. In float32 a thousand roundings of
    6e-8 are allowed. A wrong run is wrong in the first digits.
    """
    return {torch.float64: 1e-6, torch.float32: 1e-4}[dtype]


def differ(one: Tensor, other: Tensor) -> float:
    """The relative distance of one from the other."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a guest could disturb."""
    hooks = [
        {kind: list(getattr(m, kind).items()) for kind in vars(m) if kind.endswith("_hooks")}
        for m in model.modules()
    ]
    config = getattr(model, "config", None)
    generation = getattr(model, "generation_config", None)
    return {
        "hooks": hooks,
        "training": [m.training for m in model.modules()],
        "flags": [(p.requires_grad, p.grad, p.data_ptr(), p._version) for p in model.parameters()],
        "config": None if config is None else config.to_dict(),
        "generation": None if generation is None else generation.to_dict(),
        "names": [list(m._parameters) + list(m._buffers) + list(m._modules) for m in model.modules()],
    }
