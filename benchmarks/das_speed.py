"""One training step of DAS at one site: ours, pyvene's, the plain two-forward loop, and the bare suffix.

    python benchmarks/das_speed.py [--quick] [--json PATH] [--device cuda] [--seed N]

All four train the same rank-k basis on the same pairs with the same loss, cross-entropy between two answer
tokens at the last position:

    ours      subspace_lab's frozen past: keys, values and states before the edit are kept from one pass
    pyvene    0.1.8, LowRankRotatedSpaceIntervention (the full-width one is slower still)
    plain     two forward passes with raw hooks, our thin QR: what a careful user writes by hand
    floor     the blocks above the edit called by hand on the kept state, nothing around them

Random weights; what is measured does not depend on their values.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
from harness import figure, interleaved, options, peak_memory, print_peak, ratio, report
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from subspace_lab.core.interventions import interchange
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import LearnedSubspace
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.cache_argument import forward_name
from subspace_lab.model.intervene import collect

ANSWERS = [17, 23]

SHAPES = {
    "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=1024),
    "width256": dict(n_layer=12, n_embd=256, n_head=4, vocab_size=50257, n_positions=1024),
}


def model_of(shape: str | dict[str, int], device: str, seed: int = 0) -> nn.Module:
    """A random model: one of `SHAPES`, "llama7b", or GPT-2 of the given sizes."""
    torch.manual_seed(seed)
    if shape == "llama7b":
        config = LlamaConfig(attn_implementation="sdpa")  # the defaults of the class are LLaMA-7B's
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    else:
        sizes = SHAPES[shape] if isinstance(shape, str) else shape
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(device)
    return model.eval()


class Case:
    """A model, pairs, and the four contenders' steps at one layer."""

    def __init__(self, shape: str | dict[str, int], layer: int, args: argparse.Namespace) -> None:
        self.device, self.layer, self.rank, self.seed = args.device, layer, args.rank, args.seed
        self.model = model_of(shape, args.device, args.seed)
        g = torch.Generator().manual_seed(1 + args.seed)
        vocabulary = self.model.config.vocab_size
        self.base = torch.randint(100, vocabulary, (args.pairs, args.sequence), generator=g).to(args.device)
        self.source = torch.randint(100, vocabulary, (args.pairs, args.sequence), generator=g).to(args.device)
        self.answer = torch.randint(0, 2, (args.pairs,), generator=g).to(args.device)
        self.rows = torch.arange(args.batch)  # every contender's every step sees the same rows
        self.last = args.sequence - 1
        self.site = Site("block_output", layer, "last")
        self.width = self.model.config.hidden_size
        self.start = LearnedSubspace(self.width, args.rank, seed=args.seed).basis().detach()

    def basis(self) -> LearnedSubspace:
        return LearnedSubspace(self.width, self.rank, start=self.start).to(self.device)

    def blocks(self) -> nn.ModuleList:
        return self.model.transformer.h if hasattr(self.model, "transformer") else self.model.model.layers

    def step_of(self, loss_of, parameters):
        optimizer = torch.optim.Adam(parameters, lr=1e-3)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def ours(self):
        backbone = Backbone(self.model)
        batch = Batch({"input_ids": self.base, "attention_mask": torch.ones_like(self.base)})
        past = FrozenPast(backbone, batch, [self.site], Readout.at(batch, "last", ANSWERS))
        states = torch.cat(
            [
                collect(backbone, Batch({"input_ids": self.source[r]}), [self.site])[self.site]
                for r in torch.arange(len(self.source)).split(32)
            ]
        )
        subspace = self.basis()
        edits = {self.site: interchange(subspace)}

        def loss() -> torch.Tensor:
            rows = self.rows
            logits = past.logits(rows, edits, {self.site: states[rows]})[:, 0]
            return nn.functional.cross_entropy(logits.float(), self.answer[rows])

        return loss, [subspace.raw]

    def plain(self):
        subspace = self.basis()
        block = self.blocks()[self.layer]
        for p in self.model.parameters():
            p.requires_grad_(False)

        def loss() -> torch.Tensor:
            rows = self.rows
            kept = {}

            def keep(module, inputs, output):
                kept["source"] = (output[0] if isinstance(output, tuple) else output)[:, -1]

            handle = block.register_forward_hook(keep)
            with torch.no_grad():
                self.model(input_ids=self.source[rows], use_cache=False)
            handle.remove()

            def edit(module, inputs, output):
                h = output[0] if isinstance(output, tuple) else output
                new = torch.cat([h[:, :-1], subspace.swap(h[:, -1:], kept["source"][:, None])], 1)
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = block.register_forward_hook(edit)
            logits = self.model(input_ids=self.base[rows], use_cache=False).logits
            handle.remove()
            return nn.functional.cross_entropy(logits[:, -1, ANSWERS].float(), self.answer[rows])

        return loss, [subspace.raw]

    def floor(self, tail: int = 1):
        """GPT-2's and Llama's blocks above an edit at the first of the last `tail` positions, by hand."""
        subspace = self.basis()
        rows, model = self.rows, self.model
        above = self.blocks()[self.layer + 1 :]
        for p in model.parameters():
            p.requires_grad_(False)
        found = {}

        def keep(name):
            def hook(module, inputs, output):
                found[name] = (output[0] if isinstance(output, tuple) else output)[:, -tail:].clone()

            return hook

        with torch.no_grad():
            handle = self.blocks()[self.layer].register_forward_hook(keep("source"))
            model(input_ids=self.source[rows], use_cache=False)
            handle.remove()
            handle = self.blocks()[self.layer].register_forward_hook(keep("base"))
            full, name = DynamicCache(), forward_name(model)
            model(input_ids=self.base[rows], use_cache=True, **{name: full})
            handle.remove()
        kept = [(k.keys[:, :, :-tail], k.values[:, :, :-tail]) for k in full.layers]
        head = model.get_output_embeddings().weight[ANSWERS]
        positions = torch.arange(self.last + 1 - tail, self.last + 1, device=self.device).expand(len(rows), -1)
        extra = {}
        if hasattr(model, "transformer"):
            norm = model.transformer.ln_f
        else:
            norm = model.model.norm
            extra["position_embeddings"] = model.model.rotary_emb(found["base"], positions)
        if tail > 1:
            seen = torch.ones(tail, self.last + 1, dtype=torch.bool, device=self.device)
            extra["attention_mask"] = seen.tril(self.last + 1 - tail)[None, None]

        def loss() -> torch.Tensor:
            cache = DynamicCache(ddp_cache_data=kept)
            base, source = found["base"], found["source"]
            h = torch.cat([subspace.swap(base[:, :1], source[:, :1]), base[:, 1:]], 1)
            for block in above:
                h = block(h, use_cache=True, position_ids=positions, **{name: cache}, **extra)
                h = h[0] if isinstance(h, tuple) else h
            logits = nn.functional.linear(norm(h[:, -1]), head)
            return nn.functional.cross_entropy(logits.float(), self.answer[rows])

        return loss, [subspace.raw]

    def pyvene(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyvene
        wanted = {
            "layer": self.layer,
            "component": "block_output",
            "low_rank_dimension": self.rank,
            "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
        }
        wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([wanted]), self.model)
        wrapped.set_device(self.device)
        wrapped.disable_model_gradients()
        parameters = [p for p in wrapped.get_trainable_parameters() if p.requires_grad]

        def loss() -> torch.Tensor:
            rows = self.rows
            _, output = wrapped(
                {"input_ids": self.base[rows]},
                [{"input_ids": self.source[rows]}],
                {"sources->base": (self.last, self.last)},
            )
            return nn.functional.cross_entropy(output.logits[:, -1, ANSWERS].float(), self.answer[rows])

        return loss, parameters


def differences(case: Case) -> tuple[float, float]:
    """Relative difference of loss and gradient between ours and the plain run."""
    values = []
    for contender in (case.ours, case.plain):
        loss, (raw,) = contender()
        value = loss()
        values.append((value.item(), torch.autograd.grad(value, raw)[0]))
    (a, g), (b, f) = values
    return abs(a - b) / abs(b), float((g - f).norm() / f.norm())


def main() -> None:
    parser = options(__doc__, "The small model alone, few rounds.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # two threads contend on a shared machine
    big = "llama7b" if args.device.startswith("cuda") else "gpt2"
    if args.peak_of:
        case = Case("width256" if args.quick else big, 6, args)
        step = case.step_of(*getattr(case, args.peak_of)())
        print_peak(args.device, lambda: (step(), step()))
        return
    cases = [("_width256", "width256", 6)]
    if not args.quick:
        cases = [("", big, 6), ("_layer1", big, 1), *cases]
    results = {}
    for suffix, shape, layer in cases:
        print(f"{shape}, layer {layer}", file=sys.stderr)
        case = Case(shape, layer, args)
        steps = {n: case.step_of(*getattr(case, n)()) for n in ("ours", "floor", "plain", "pyvene")}
        times = interleaved(steps, 2 if args.quick else args.rounds, args.device)
        results[f"speedup_over_pyvene{suffix}"] = ratio(times, "pyvene", "ours")
        results[f"speedup_over_plain{suffix}"] = ratio(times, "plain", "ours")
        results[f"cost_over_floor{suffix}"] = ratio(times, "ours", "floor")
        results[f"seconds_ours{suffix}"] = figure(times["ours"])
        results[f"seconds_pyvene{suffix}"] = figure(times["pyvene"])
        loss, gradient = differences(case)
        results[f"loss_difference{suffix}"] = figure([loss])
        results[f"gradient_difference{suffix}"] = figure([gradient])
    forwarded = ["--device", args.device, "--seed", str(args.seed), *(["--quick"] if args.quick else [])]
    results["peak_memory_mb"] = figure([peak_memory(__file__, "ours", forwarded)])
    results["peak_memory_mb_plain"] = figure([peak_memory(__file__, "plain", forwarded)])
    results["peak_memory_mb_pyvene"] = figure([peak_memory(__file__, "pyvene", forwarded)])
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "peak_of")}
    report("das_speed", {**settings, "model": big, "answers": len(ANSWERS)}, results, args.device, args.json)


if __name__ == "__main__":
    main()
