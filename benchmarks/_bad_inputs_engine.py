"""Odd inputs for the Python interface of core, model, engine and das, each with what it must come to.

A case is a small function of a scratch folder. It ends in one of two ways: refused (an exception of the type that is
named, whose message holds the expected text), or right (it returns true, having compared with what is known: torch
hooks written here, or a run of single rows). All of it is done with random models of a few thousand parameters.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from _bad_inputs_case import Case
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subspace_lab.analysis import reinitialised
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.checkpoints import load_edits, load_subspaces, save_edits, save_subspaces
from subspace_lab.core.interventions import (
    Intervention,
    interchange,
    loreft,
    mean_ablation,
    noreft,
    set_to,
    steer,
    steering_vector,
)
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import (
    Axes,
    FixedSubspace,
    FreeDirections,
    LearnedSubspace,
    difference_of_means,
    pca,
    random_subspace,
)
from subspace_lab.das.encoding import encode
from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, RandomSubspace
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.search import search
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig, train
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.identity import model_facts
from subspace_lab.model.intervene import collect, forward, generate

WIDTH, NAN, INF, CPU = 16, float("nan"), float("inf"), torch.device("cpu")
SITE, LAST = Site("block_output", 0), Site("block_output", 0, "last")


# --- models and data ----------------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 60,
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


@cache
def lab() -> Backbone:
    """One model for the cases that leave it as it was."""
    return Backbone(llama())


def rows(
    *lengths: int, padding: str = "right", seed: int = 0, columns: Mapping[str, Tensor] | None = None
) -> Batch:
    g, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = (torch.zeros(len(lengths), longest, dtype=torch.long) for _ in range(2))
    for row, n in enumerate(lengths):
        at = slice(longest - n, None) if padding == "left" else slice(0, n)
        ids[row, at], mask[row, at] = torch.randint(3, 60, (n,), generator=g), 1
    return Batch({"input_ids": ids, "attention_mask": mask}, columns=columns or {})


def one_row(batch: Batch, row: int) -> Tensor:
    return batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()][None]


def last_logits(output: Any, batch: Batch) -> Tensor:
    real = batch.inputs["attention_mask"].bool()
    at = (real.long() * torch.arange(real.shape[1])).argmax(1)
    return output.logits[torch.arange(len(batch)), at]


def by_hand(base: Batch, source: Batch, matched: Callable[[int, int], Sequence[tuple[int, int]]]) -> Tensor:
    """Logits after each row's last token with states of block 0 copied from the source, row by row, by torch hooks."""
    model, found = lab().model, []
    block = model.model.layers[0]
    for row in range(len(base)):
        ids, other = one_row(base, row), one_row(source, row)
        pairs, states = matched(ids.shape[1], other.shape[1]), []
        handle = block.register_forward_hook(lambda m, a, out, states=states: states.append(out.clone()))
        with torch.no_grad():
            model(other)
        handle.remove()

        def put(module: Any, args: Any, out: Tensor, pairs: Any = pairs, states: Any = states) -> Tensor:
            out = out.clone()
            for p, q in pairs:
                out[:, p] = states[0][:, q]
            return out

        handle = block.register_forward_hook(put)
        with torch.no_grad():
            found.append(model(ids).logits[0, -1])
        handle.remove()
    return torch.stack(found)


def swapped(positions: str, base: Batch, source: Batch, how: str = "refuse", engine: Any = None) -> Tensor:
    """The full swap at positions of block 0: logits after each row's last token."""
    site = Site("block_output", 0, positions)
    states, edits = collect(lab(), source, [site]), {site: interchange(Axes(WIDTH))}
    if engine is None:
        return last_logits(forward(lab(), base, edits, sources=states, unmatched=how), base)  # type: ignore[arg-type]
    made = (
        engine(lab(), base, [site], Readout.at(base))
        if engine is FrozenPast
        else engine(lab(), base, Readout.at(base))
    )
    return made.logits(torch.arange(len(base)), edits, states, how)[:, 0]


def near(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-4))


def from_start(b: int, s: int) -> list[tuple[int, int]]:
    return [(i, i) for i in range(min(b, s))]


def from_end(b: int, s: int) -> list[tuple[int, int]]:
    return [(b - i, s - i) for i in range(1, min(b, s, 3) + 1)]


def both_ends(b: int, s: int) -> list[tuple[int, int]]:
    def counts(n: int) -> tuple[int, int]:
        return (2, 2) if n >= 4 else (min(2, n // 2), min(2, (n + 1) // 2))

    (fb, lb), (fs, ls) = counts(b), counts(s)
    return [*((i, i) for i in range(min(fb, fs))), *((b - i, s - i) for i in range(1, min(lb, ls) + 1))]


def kept_base(positions: str, matched: Any, padding: str, engine: Any = None) -> Callable[[Path], bool]:
    def run(_: Path) -> bool:
        base, source = rows(6, 3, 5, padding=padding), rows(4, 5, 2, padding=padding, seed=1)
        return near(swapped(positions, base, source, "keep_base", engine), by_hand(base, source, matched))

    return run


def refused_counts(positions: str, engine: Any = None) -> Callable[[Path], Any]:
    return lambda _: swapped(positions, rows(6, 5), rows(6, 2, seed=1), engine=engine)


def drawn(seed: int, n: int = 24, lengths: Sequence[int] | None = None) -> Counterfactuals:
    g = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(0, 4, (n,), generator=g) for _ in range(2))
    sizes = lengths or [5] * n
    base, source = rows(*sizes, seed=seed), rows(*sizes, seed=seed + 50)
    return Counterfactuals(
        base, {"v": source}, before, after, tuple("abcd"), torch.arange(7, 11), {"v": torch.arange(n) % 2}
    )


def pairs(**given: Any) -> Pairs:
    return Pairs(**{"train": drawn(0), "dev": drawn(1), "test": drawn(2), **given})


def swept(methods: Any, sites: Any = (LAST,), model: Backbone | None = None, **options: Any) -> Any:
    options = {"config": TrainingConfig(steps=2, batch_size=8), "min_accuracy": None, "quiet": True, **options}
    return sweep(model or lab(), options.pop("pairs", None) or pairs(), list(sites), methods, **options)


# --- 0a: numbers of positions -------------------------------------------------------------------------------


def variables_apart(_: Path) -> bool:
    """One variable's source has the position and the other's has not: the second's coordinates stay the base's."""
    base, long, short = rows(5), rows(5, seed=1), rows(2, seed=2)
    site, alone = Site("block_output", 0, "2:3"), Site("block_output", 0, 2)
    parts = random_subspace(WIDTH, 6, 0).partition({"a": 2, "b": 4})
    sources = {site: {"a": collect(lab(), long, [site])[site], "b": missing_states(short)}}
    found = forward(lab(), base, {site: interchange(parts)}, sources=sources, unmatched="keep_base").logits
    only = {alone: {"a": collect(lab(), long, [alone])[alone]}}
    return near(found, forward(lab(), base, {alone: interchange(parts)}, sources=only).logits)


def missing_states(batch: Batch) -> Tensor:
    return torch.full((len(batch), 1, WIDTH), NAN)


def finite_gradient(_: Path) -> bool:
    base, source = rows(6, 3, padding="left"), rows(4, 5, padding="left", seed=1)
    subspace = LearnedSubspace(WIDTH, 3, seed=0)
    out = forward(
        lab(),
        base,
        {SITE: interchange(subspace)},
        sources=collect(lab(), source, [SITE]),
        unmatched="keep_base",
    )
    (gradient,) = torch.autograd.grad(last_logits(out, base).sum(), list(subspace.parameters()))
    return bool(gradient.isfinite().all() and gradient.abs().sum() > 0)


def padding_is_nan(_: Path) -> bool:
    found = collect(lab(), rows(5, 2), [SITE])[SITE]
    return bool(found[1, 2:].isnan().all() and found[1, :2].isfinite().all() and found[0].isfinite().all())


def components_of_real_states(_: Path) -> bool:
    sizes = [3 + i % 4 for i in range(24)]
    fits = swept([PCA(2)], [SITE], pairs=pairs(train=drawn(0, lengths=sizes)))
    source = drawn(0, lengths=sizes).sources["v"]
    states = torch.cat(
        [collect(lab(), Batch({"input_ids": one_row(source, i)}), [SITE])[SITE][0] for i in range(len(source))]
    )
    expected = torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh[:2]
    found = fits[0].alignment.variables["v"][1].basis()
    return near(found.T @ found, expected.T @ expected)


def name_of_two_tokens(how: str) -> Callable[[Path], Any]:
    def run(_: Path) -> Any:
        base = rows(5, columns={"name": torch.tensor([[1, 2]])})
        source = rows(5, seed=1, columns={"name": torch.tensor([[3, -1]])})
        found = swapped("name", base, source, how)
        return near(found, by_hand(base, source, lambda *_: [(1, 3)]))

    return run


def search_names_the_pair(_: Path) -> Any:
    source = rows(*[5] * 20, 4, 5, 5, 5, seed=9)
    return PreparedPairs.of(lab(), replace(drawn(0), sources={"v": source}), [{"v": SITE}])


COUNTS = [
    Case(
        "a source with fewer positions",
        "0a",
        refused_counts("all"),
        (ValueError, "row 1 of the base has 5 positions and its source has 2"),
    ),
    Case(
        "fewer, by slice",
        "0a",
        refused_counts("2:"),
        (ValueError, "row 1 of the base has 3 positions and its source has 0"),
    ),
    Case(
        "fewer, by f and l",
        "0a",
        refused_counts("f3+l3"),
        (ValueError, "row 1 of the base has 5 positions and its source has 2"),
    ),
    Case("fewer, plain engine", "0a", refused_counts("all", PlainEngine), (ValueError, "and its source has 2")),
    Case("fewer, frozen past", "0a", refused_counts("all", FrozenPast), (ValueError, "and its source has 2")),
    Case(
        "more than the base",
        "0a",
        lambda _: swapped("all", rows(6, 2), rows(6, 5, seed=1)),
        (ValueError, "row 1 of the base has 2 positions and its source has 5"),
    ),
    Case(
        "other numbers in all rows",
        "0a",
        lambda _: swapped("all", rows(4, 4), rows(6, 6, seed=1)),
        (ValueError, "row 0 of the base has 4 positions and its source has 6"),
    ),
    Case(
        "a name of two tokens against one",
        "0a",
        name_of_two_tokens("refuse"),
        (ValueError, "has 2 positions and its source has 1"),
    ),
    Case("a name of two tokens against one, kept", "0a", name_of_two_tokens("keep_base")),
    Case(
        "a pair of a search",
        "0a",
        search_names_the_pair,
        (ValueError, "row 20 of the base has 5 positions and its source for 'v' has 4"),
    ),
    Case(
        "a word that unmatched does not know",
        "0a",
        lambda _: swapped("all", rows(4), rows(4, seed=1), "ignore"),
        (ValueError, "possible are 'refuse' and 'keep_base'"),
    ),
    Case(
        "terms that cannot be told apart",
        "0a",
        lambda _: swapped("1:-1+-2:", rows(6), rows(3, seed=1), "keep_base"),
        (ValueError, "Use a site for each term"),
    ),
    Case(
        "a source with a hole",
        "0a",
        lambda _: forward(
            lab(),
            rows(4),
            {SITE: interchange(Axes(WIDTH))},
            sources={SITE: torch.randn(1, 4, WIDTH).index_fill(1, torch.tensor([1]), NAN)},
        ),
        (ValueError, "NaN before others"),
    ),
    *(
        Case(
            f"{positions} kept, {padding}, {getattr(engine, '__name__', 'forward')}",
            "0a",
            kept_base(positions, matched, padding, engine),
        )
        for positions, matched in (("all", from_start), ("-3:", from_end), ("f2+l2", both_ends))
        for padding, engine in (("right", None), ("left", None), ("left", FrozenPast), ("right", PlainEngine))
    ),
    Case("variables of which one has the position", "0a", variables_apart),
    Case("gradients beside missing positions", "0a", finite_gradient),
    Case("what a row lacks is NaN", "0a", padding_is_nan),
    Case("principal components without padding", "0a", components_of_real_states),
]


# --- 0b: offloaded and wrapped ------------------------------------------------------------------------------


def offloaded(way: Any, what: Callable[[Backbone, Path], Any]) -> Callable[[Path], bool]:
    """What the offloaded model gives against what the plain one gives."""

    def run(folder: Path) -> bool:
        model = llama()
        given = (
            cpu_offload(model, execution_device=CPU)
            if way is cpu_offload
            else disk_offload(model, str(folder / "off"), execution_device=CPU)
        )
        return near(what(Backbone(given), folder), what(lab(), folder))

    return run


def two_answers(one: Backbone, _: Path) -> Tensor:
    batch = rows(5, 3)
    return PlainEngine(one, batch, Readout.at(batch, "last", [5, 9])).logits(torch.tensor([1, 0]), {})


def two_answers_resumed(one: Backbone, _: Path) -> Tensor:
    batch = rows(5, 3)
    past = FrozenPast(one, batch, [LAST], Readout.at(batch, "last", [5, 9]))
    assert past.mode == "keys and values", past.describe()
    edit = {LAST: loreft(WIDTH, 2, seed=0, start="paper")}
    return torch.cat([past.logits(torch.tensor([1, 0]), edit) for _ in range(2)])


def collected(one: Backbone, _: Path) -> Tensor:
    return collect(one, rows(5, 3), [SITE])[SITE].nan_to_num()


def generated(one: Backbone, _: Path) -> Tensor:
    edit = {LAST: loreft(WIDTH, 2, seed=0, start="paper")}
    return generate(one, rows(5, 3, padding="left"), edit, max_new_tokens=3, do_sample=False).float()


def searched(one: Backbone, _: Path) -> Tensor:
    return torch.tensor(swept([DAS(2)], model=one)[0].losses)


def digest(one: Backbone, _: Path) -> Tensor:
    return torch.tensor([float(int(model_facts(one.model)["weights"][:8], 16))])


def twin(one: Backbone, _: Path) -> Tensor:
    return reinitialised(one.model, 3)(input_ids=torch.tensor([[5, 6, 7]])).logits.detach()


def flags(_: Path) -> bool:
    model = cpu_offload(llama(), execution_device=CPU)
    one = Backbone(model)
    before = [p.requires_grad for p in model.parameters()]
    forward(one, rows(4), {})
    two_answers(one, Path())
    return [p.requires_grad for p in model.parameters()] == before and one.device == CPU


def on_meta(_: Path) -> Any:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60)
        )
    return collect(Backbone(model), {"input_ids": torch.tensor([[1]])}, [SITE])


def wrapped(how: Callable[[nn.Module], Any], after: bool = False) -> Callable[[Path], bool]:
    """A head that doubles its logits, in one way or another, before or after the backbone is made."""

    def run(folder: Path) -> bool:
        model = llama()
        if not after:
            how(model.lm_head)
        one = Backbone(model)
        if after:
            how(model.lm_head)
        return near(two_answers(one, folder), 2 * two_answers(lab(), folder))

    return run


def replaced(head: nn.Module) -> None:
    own = type(head).forward
    head.forward = lambda x: 2 * own(head, x)  # type: ignore[method-assign]


def kept_aside(head: nn.Module) -> None:
    own = head._old_forward = head.forward  # type: ignore[assignment]
    head.forward = lambda x: 2 * own(x)  # type: ignore[method-assign, operator]


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def of_another_class(head: nn.Module) -> None:
    head.__class__ = Doubled


def hooked(head: nn.Module) -> None:
    head.register_forward_hook(lambda module, args, out: 2 * out)


def parametrised(head: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(head, "weight", Twice())


OFFLOADED = [
    *(
        Case(f"{what.__name__}, by {way.__name__}", "0b", offloaded(way, what))
        for way in (cpu_offload, disk_offload)
        for what in (two_answers, two_answers_resumed, collected, generated, searched, digest, twin)
    ),
    Case("flags of an offloaded model stay", "0b", flags),
    Case("a model without weights", "0b", on_meta, (ValueError, "load them first")),
    Case("a head whose forward is replaced", "0b", wrapped(replaced)),
    Case("a head that is wrapped", "0b", wrapped(kept_aside)),
    Case("a head that is wrapped later", "0b", wrapped(kept_aside, after=True)),
    Case("a head of another class", "0b", wrapped(of_another_class)),
    Case("a head with a hook", "0b", wrapped(hooked)),
    Case("a head that gets a hook later", "0b", wrapped(hooked, after=True)),
    Case("a head with a parametrisation", "0b", wrapped(parametrised)),
]


# --- 4: changes after the pass ------------------------------------------------------------------------------


def changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def run(_: Path) -> Any:
        model, batch = llama(), rows(5, 3)
        past = FrozenPast(Backbone(model), batch, [LAST], Readout.at(batch))
        past.logits(torch.arange(2), {})
        change(model)
        return past.logits(torch.arange(2), {})

    return run


def set_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def set_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 3


def set_rotation(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def replace_mlp(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def replace_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def write_weight(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)


def write_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def harmless(_: Path) -> bool:
    """Hooks that transformers leaves to read, a generation, a note: no state depends on them."""
    model, batch = llama(), rows(5, 3)
    past = FrozenPast(Backbone(model), batch, [LAST], Readout.at(batch))
    before = past.logits(torch.arange(2), {})
    model(**batch.inputs, output_hidden_states=True)
    model.generate(**batch.inputs, max_new_tokens=1)
    model.model.note = "mine"
    model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq.clone())
    return torch.equal(before, past.logits(torch.arange(2), {}))


CHANGED = [
    *(
        Case(name, "4", changed(change), (RuntimeError, said))
        for name, change, said in (
            ("a hook added", lambda m: hooked(m.model.layers[0].mlp), "forward hooks were added"),
            (
                "a hook before added",
                lambda m: m.model.layers[0].register_forward_pre_hook(lambda *_: None),
                "forward hooks",
            ),
            ("a forward replaced", replace_mlp, "was changed after its past was computed"),
            (
                "a class replaced",
                lambda m: of_another_class(m.model.layers[0].mlp.up_proj),
                "a forward was replaced",
            ),
            ("an epsilon set", set_epsilon, "attributes of modules were set: variance_epsilon"),
            ("the scale of attention set", set_scale, "attributes of modules were set: scaling"),
            ("the scale of rotations set", set_rotation, "attributes of modules were set: attention_scaling"),
            ("an activation replaced", replace_activation, "weights, modules or inputs were replaced"),
            ("a weight written beside torch", write_weight, "weights or inputs were written"),
            ("a buffer written", write_buffer, "weights or inputs were written"),
            ("train mode", lambda m: m.train(), "was changed"),
        )
    ),
    Case("what changes no state", "4", harmless),
]


# --- 5: nothing selected, numbers that are none -------------------------------------------------------------


def broken_file(change: Callable[[Tensor], Tensor], name: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        path = folder / "edits.safetensors"
        save_edits(path, {SITE: noreft(WIDTH, 2, seed=0)})
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        tensors = load_file(path)
        key = next(k for k in tensors if k.endswith(name))
        save_file({**tensors, key: change(tensors[key])}, path, facts)
        return load_edits(path)

    return run


def broken_subspaces(folder: Path) -> Any:
    save_subspaces(folder / "s.safetensors", {"v": random_subspace(WIDTH, 2, 0)})
    tensors = load_file(folder / "s.safetensors")
    save_file({k: t * NAN for k, t in tensors.items()}, folder / "s.safetensors")
    return load_subspaces(folder / "s.safetensors")


def broken_alignment(folder: Path) -> Any:
    path = folder / "a.safetensors"
    Alignment({"v": (SITE, random_subspace(WIDTH, 2, 0))}).save(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({k: t * 0 for k, t in load_file(path).items()}, path, facts)
    return Alignment.load(path)


def one_wrong(value: float) -> Tensor:
    basis = torch.eye(WIDTH)[:2].clone()
    basis[0] = value
    return basis


class Breaks(Intervention):
    def forward(self, h: Tensor, source: Any = None) -> Tensor:
        return super().forward(h, source) * NAN


class Breaking(Method):
    def learner(self, problem: Problem) -> Learner:
        made = Learner({"v": (problem.sites["v"], Axes(problem.width("v")))})
        made.edits = {s: Breaks(Axes(WIDTH), e.value) for s, e in made.edits.items()}  # type: ignore[arg-type]
        return made


def nan_is_no_answer(_: Path) -> bool:
    fits = swept([Breaking(), FullVector()])
    reasons = [failure.reason for failure in fits.failures]
    return [fit.method.label for fit in fits] == ["FullVector"] and "The logits are NaN for 24 of 24" in reasons[0]


def of_nan(layer: int | None) -> Callable[[Path], Any]:
    def run(_: Path) -> Any:
        model = llama()
        norm = model.model.norm if layer is None else model.model.layers[layer].input_layernorm
        with torch.no_grad():
            norm.weight[0] = NAN
        return swept([DAS(1)], model=Backbone(model))

    return run


def place(positions: str) -> Callable[[Path], Any]:
    return lambda _: forward(lab(), rows(5, 3), {Site("block_output", 0, positions): lambda h: h})


NOTHING = [
    *(
        Case(f"positions {text}", "5", place(text), (ValueError, "select nothing in any prompt"))
        for text in ("f0", "l0", "5:2", "-2:-4", "f0+3:3")
    ),
    Case("positions beyond every row", "5", place("99:"), (IndexError, "select nothing in any of the 2 rows")),
    Case("a readout beyond every row", "5", lambda _: Readout.at(rows(5), "99:"), (IndexError, "select nothing")),
    Case("a position beyond one row", "5", place("4"), (IndexError, "outside row 1, whose prompt has 3 tokens")),
    Case("NaN in an edit's file", "5", broken_file(lambda t: t * NAN, "weight"), (ValueError, "NaN or infinite")),
    Case("Inf in an edit's file", "5", broken_file(lambda t: t + INF, "bias"), (ValueError, "NaN or infinite")),
    Case(
        "whole numbers in an edit's file",
        "5",
        broken_file(lambda t: t.long(), "weight"),
        (ValueError, "needed are floating ones"),
    ),
    Case(
        "directions of 0 in an edit's file",
        "5",
        broken_file(lambda t: t * 0, "directions"),
        (ValueError, "all zero"),
    ),
    Case("NaN in a file of subspaces", "5", broken_subspaces, (ValueError, "NaN or infinite")),
    Case("a basis of 0 in an alignment", "5", broken_alignment, (ValueError, "not orthonormal")),
    Case("a basis of NaN", "5", lambda _: FixedSubspace(one_wrong(NAN)), (ValueError, "NaN or infinite")),
    Case(
        "a basis of whole numbers",
        "5",
        lambda _: FixedSubspace(torch.eye(WIDTH)[:2].long()),
        (ValueError, "needed are floating ones"),
    ),
    Case(
        "directions of 0", "5", lambda _: FreeDirections(WIDTH, 2, start=one_wrong(0.0)), (ValueError, "all zero")
    ),
    Case(
        "a learned basis set to 0",
        "5",
        lambda _: LearnedSubspace(WIDTH, 2, seed=0).set_basis(one_wrong(0.0)),
        (ValueError, "all zero"),
    ),
    Case(
        "a state dictionary of Inf",
        "5",
        lambda _: loreft(WIDTH, 2, seed=0).load_state_dict(
            {k: t + INF for k, t in loreft(WIDTH, 2, seed=0).state_dict().items()}
        ),
        (ValueError, "NaN or infinite"),
    ),
    Case(
        "steering by NaN", "5", lambda _: steer(random_subspace(WIDTH, 1, 0), NAN), (ValueError, "NaN or infinite")
    ),
    Case(
        "a steering vector of 0", "5", lambda _: steering_vector(torch.zeros(4)), (ValueError, "has no direction")
    ),
    Case(
        "setting to Inf", "5", lambda _: set_to(random_subspace(WIDTH, 1, 0), INF), (ValueError, "NaN or infinite")
    ),
    Case(
        "the mean of no state",
        "5",
        lambda _: mean_ablation(random_subspace(4, 1, 0), torch.full((2, 4), NAN)),
        (ValueError, "NaN or infinite"),
    ),
    Case(
        "components of NaN", "5", lambda _: pca(torch.full((5, 4), NAN), 1), (ValueError, "5 of 5 states hold NaN")
    ),
    Case(
        "means of Inf",
        "5",
        lambda _: difference_of_means(torch.full((4, 4), INF), torch.arange(4) % 2),
        (ValueError, "4 of 4 states"),
    ),
    Case("NaN logits are no answers", "5", nan_is_no_answer),
    Case("a model of NaN logits", "5", of_nan(None), (ValueError, "gives NaN instead of logits for 24 of 24")),
    Case("a model of NaN states", "5", of_nan(0), (ValueError, "states are NaN in 24 of 24 rows")),
]


# --- 15, 16, 17, 18: families -------------------------------------------------------------------------------


def rotated(kind: str, lengths: Sequence[int], words: str) -> Callable[[Path], bool]:
    """Whether rows of these lengths are resumed, or refused in these words; and right either way."""

    def run(_: Path) -> bool:
        extra = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 8}
        parameters = {
            "rope_type": kind,
            "factor": 4.0,
            "rope_theta": 100.0,
            **(extra if kind == "longrope" else {}),
        }
        one = Backbone(llama(max_position_embeddings=8 if kind == "dynamic" else 32, rope_parameters=parameters))
        batch = rows(*lengths, padding="left")
        past = FrozenPast(one, batch, [Site("block_output", 0, "-2")], Readout.at(batch))
        if words not in past.describe():
            return False
        plain = PlainEngine(one, batch, Readout.at(batch))
        edit = {Site("block_output", 0, "-2"): loreft(WIDTH, 2, seed=0, start="paper")}
        groups = [[0], [1], list(range(len(lengths)))] if kind == "longrope" or max(lengths) <= 8 else [[0, 1]]
        return all(near(past.logits(torch.tensor(g), edit), plain.logits(torch.tensor(g), edit)) for g in groups)

    return run


def images(n: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


@cache
def eyes(name: str) -> Backbone:
    sizes = dict(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    made: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**sizes)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**sizes)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)),
    }
    torch.manual_seed(0)
    return Backbone(made[name]().eval())


def patches(name: str) -> Callable[[Path], bool]:
    """A head at a patch is the columns of the whole; positions are those of the stream."""

    def run(_: Path) -> bool:
        one = eyes(name)
        whole, patch = Site("head_output", 1), Site("head_output", 1, "2", heads=1)
        states = collect(one, images(), [whole, patch])
        query = collect(one, images(), [Site("query_output", 1, "-1")])
        shape = next(iter(query.values())).shape
        return torch.equal(states[patch], states[whole][:, [2], 8:]) and shape == (2, 1, WIDTH)

    return run


def heads_of_layers(_: Path) -> bool:
    """Attention that says of itself that it has other heads than the configuration."""
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.head_dim = 4
    one = Backbone(model)
    sizes = [one.width(Site("head_output", layer, heads=0)) for layer in (0, 1)]
    return sizes == [8, 4] and one.width(Site("key_output", 1, heads=(0, 3))) == 8


def last_of_own_heads(_: Path) -> bool:
    model = llama()
    model.model.layers[1].self_attn.head_dim = 4
    return Backbone(model).width(Site("head_output", 1, heads=3)) == 4


def head_is_columns(_: Path) -> bool:
    found, given = [], rows(5)
    hook = (
        lab()
        .model.model.layers[1]
        .self_attn.q_proj.register_forward_hook(lambda _, inputs, output: found.append(output.detach().clone()))
    )
    lab().model(**given.inputs)
    hook.remove()
    state = collect(lab(), given, [Site("query_output", 1, heads=1)])
    return near(next(iter(state.values())), found[0][..., 8:])


FAMILIES = [
    Case(
        "dynamic rotations on both sides",
        "15",
        rotated("dynamic", (3, 12), "(dynamic) that depend on the longest row"),
    ),
    Case("dynamic rotations, short rows", "15", rotated("dynamic", (3, 7), "by keys and values")),
    Case("dynamic rotations, long rows of one length", "15", rotated("dynamic", (12, 12), "by keys and values")),
    Case(
        "dynamic rotations, long rows of two lengths",
        "15",
        rotated("dynamic", (12, 10), "depend on the longest row"),
    ),
    Case(
        "longrope on both sides", "15", rotated("longrope", (3, 12), "(longrope) that depend on the longest row")
    ),
    Case("longrope, short rows", "17", rotated("longrope", (3, 7), "by keys and values")),
    Case("longrope, long rows", "17", rotated("longrope", (12, 10), "by keys and values")),
    Case("longrope, rows of one length", "17", rotated("longrope", (5, 5), "by keys and values")),
    Case("longrope, three long rows", "17", rotated("longrope", (12, 10, 9), "by keys and values")),
    Case("longrope, three short rows", "17", rotated("longrope", (3, 4, 7), "by keys and values")),
    Case("heads of a layer's own size", "16", heads_of_layers),
    Case("the last of a layer's own heads", "16", last_of_own_heads),
    Case("a head and the columns that it is", "16", head_is_columns),
    Case(
        "heads of which one is not there",
        "16",
        lambda _: lab().hook_point(Site("query_output", 1, heads=(0, 9))),
        (ValueError, "possible are 0 to 1"),
    ),
    Case(
        "a head that a layer has not",
        "16",
        lambda _: lab().hook_point(Site("head_output", 0, heads=2)),
        (ValueError, "possible are 0 to 1"),
    ),
    *(Case(f"heads and patches of {name}", "18", patches(name)) for name in ("vit", "dinov2", "clip", "siglip")),
    Case(
        "a patch that an image has not",
        "18",
        lambda _: collect(eyes("vit"), images(), [Site("block_output", 0, 5)]),
        (IndexError, "has 5 tokens"),
    ),
    Case(
        "the class token by name",
        "18",
        lambda _: torch.equal(
            *collect(
                eyes("vit"), images(), [Site("block_output", 0, "cls"), Site("block_output", 0, "0")]
            ).values()
        ),
    ),
    Case(
        "a class token that there is not",
        "18",
        lambda _: collect(eyes("siglip"), images(), [Site("block_output", 0, "cls")]),
        (KeyError, "'cls'"),
    ),
]


# --- 20, 21 and the rest ------------------------------------------------------------------------------------


def no_cycles(_: Path) -> bool:
    collect(lab(), rows(5), [SITE])
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        collect(lab(), rows(5), [SITE])
        gc.collect()
        return not any(isinstance(found, Tensor) for found in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def compiled(_: Path) -> bool:
    model = llama()
    model.compile()
    return torch.equal(collect(Backbone(model), rows(5), [SITE])[SITE], collect(lab(), rows(5), [SITE])[SITE])


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


def chain() -> Backbone:
    torch.manual_seed(0)
    return Backbone(nn.Sequential(nn.Linear(4, 4), Widens(), nn.Linear(7, 3)))


def of_numbers(seed: int) -> Counterfactuals:
    base, source = (torch.randn(20, 4, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 9))
    with torch.no_grad():
        answers = [chain().model(x).argmax(-1) for x in (base, source)]
    return Counterfactuals(Batch.of(base), {"v": Batch.of(source)}, *answers, tuple("abc"))


def unknown_width(_: Path) -> bool:
    fits = search(
        chain(),
        Pairs(of_numbers(0), of_numbers(1), of_numbers(2)),
        [Site("1.output")],
        methods=[DAS(2), FullVector()],
        config=TrainingConfig(steps=2, batch_size=8),
        quiet=True,
    )
    return len(fits) == 2 and fits[1].scores["test"]["iia"].value == 1.0


def unknown_width_resumed(_: Path) -> bool:
    one, x, site = chain(), torch.randn(5, 4), Site("1.output")
    past = FrozenPast(one, Batch.of(x), [site], Readout())
    edit = {site: loreft(7, 2, seed=0, start="paper")}
    expected = one.model[2](edit[site](one.model[1](one.model[0](x))))
    return past.mode == "layers" and near(past.logits(torch.arange(5), edit), expected)


def failing_edit(_: Path) -> bool:
    before = collect(lab(), rows(4), [SITE])[SITE]
    try:
        forward(lab(), rows(4), {SITE: lambda h: h[:, :1]})
    except ValueError as error:
        return "shape and dtype must stay" in str(error) and torch.equal(
            before, collect(lab(), rows(4), [SITE])[SITE]
        )
    return False


def copied_model(_: Path) -> bool:
    """A copy of a model that was wrapped computes with its own weights."""
    twin = copy.deepcopy(lab().model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    given = rows(4)
    return near(forward(Backbone(twin), given, {}).logits, 2 * forward(lab(), given, {}).logits)


OTHERS = [
    Case("no tensors in cycles", "20", no_cycles),
    Case("a compiled model", "20", compiled),
    Case(
        "a data set of another format",
        "20",
        lambda _: encode(Dataset.from_list([{"base": "a"}]), None, ["b"]),
        (ValueError, "lacks base_spans, sources"),
    ),
    Case(
        "a data set without rows",
        "20",
        lambda _: encode(Dataset.from_list([]), None, ["b"]),
        (ValueError, "lacks base"),
    ),
    Case("a search where only a run tells the width", "21", unknown_width),
    Case("the frozen past of a site of unknown width", "21", unknown_width_resumed),
    Case(
        "asking for a width that is not known",
        "21",
        lambda _: chain().width(Site("1.output")),
        (ValueError, "not known before a run"),
    ),
    Case(
        "a rank above a width that a run tells",
        "21",
        lambda _: search(
            chain(),
            Pairs(of_numbers(0), of_numbers(1), of_numbers(2)),
            [Site("1.output")],
            methods=[PCA(8)],
            quiet=True,
        ),
        (ValueError, "width 7"),
    ),
    Case(
        "a layer that there is not",
        "19",
        lambda _: collect(lab(), rows(4), [Site("block_output", 7)]),
        (IndexError, "layers 0 to 1"),
    ),
    Case("a component that there is not", "19", lambda _: Site("residual", 0), (ValueError, "Unknown component")),
    Case(
        "a model in the place of a backbone",
        "19",
        lambda _: forward(lab().model, rows(4), {}),
        (TypeError, "write Backbone(model)"),
    ),
    Case(
        "a text in the place of a batch",
        "19",
        lambda _: forward(lab(), "The", {}),
        (TypeError, "Tokenise texts first"),
    ),
    Case(
        "one site in the place of several", "19", lambda _: collect(lab(), rows(4), SITE), (TypeError, "write [")
    ),
    Case(
        "an edit that cannot be called",
        "19",
        lambda _: forward(lab(), rows(4), {SITE: 3}),
        (TypeError, "an edit must be an intervention or a function"),
    ),
    Case(
        "two edits of one place",
        "19",
        lambda _: forward(lab(), rows(4), {SITE: lambda h: h, LAST: lambda h: h}),
        (ValueError, "edit the same positions"),
    ),
    Case(
        "an edit of another width",
        "19",
        lambda _: forward(lab(), rows(4), {SITE: loreft(8, 2, seed=0)}),
        (ValueError, "made for 8"),
    ),
    Case("an edit that changes the shape", "19", failing_edit),
    Case(
        "an interchange without its source",
        "19",
        lambda _: forward(lab(), rows(4), {SITE: interchange(Axes(WIDTH))}),
        (ValueError, "needs the source's states"),
    ),
    Case(
        "rows as numbers",
        "19",
        lambda _: PlainEngine(lab(), rows(4), Readout.at(rows(4))).logits([0], {}),
        (TypeError, "Rows are a tensor"),
    ),
    Case(
        "a memory of nothing",
        "19",
        lambda _: FrozenPast(lab(), rows(4), [LAST], Readout.at(rows(4)), memory="3 bananas"),
        (ValueError, "write a number of bytes"),
    ),
    Case(
        "no site to prepare",
        "19",
        lambda _: FrozenPast(lab(), rows(4), [], Readout.at(rows(4))),
        (ValueError, "none were given"),
    ),
    Case("a rank of 0", "19", lambda _: swept([DAS(0)]), (ValueError, "needed is a value above 0")),
    Case(
        "a rank above the width", "19", lambda _: swept([RandomSubspace(99)]), (ValueError, "possible are 1 to 16")
    ),
    Case("the same method twice", "19", lambda _: swept([PCA(1), PCA(1)]), (ValueError, "Given twice")),
    Case(
        "means of one value",
        "19",
        lambda _: bool(
            swept(
                [DifferenceOfMeans()],
                pairs=pairs(train=replace(drawn(0), values={"v": torch.zeros(24, dtype=torch.long)})),
            ).failures
        ),
    ),
    Case(
        "nothing to train",
        "19",
        lambda _: train([nn.Identity()], lambda _: torch.zeros(()), TrainingConfig()),
        (ValueError, "Nothing to train"),
    ),
    Case(
        "a learning rate of NaN", "19", lambda _: TrainingConfig(learning_rate=NAN), (ValueError, "needed are > 0")
    ),
    Case(
        "a file that is cut off",
        "19",
        lambda folder: ((folder / "e").write_bytes(b"\x00" * 9), load_edits(folder / "e")),
        (ValueError, "not a whole safetensors file"),
    ),
    Case("a copy of a wrapped model", "19", copied_model),
]

CASES: list[Case] = [*COUNTS, *OFFLOADED, *CHANGED, *NOTHING, *FAMILIES, *OTHERS]
