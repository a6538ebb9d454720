"""Training steps and generation with LoReFT: ours, pyreft's, and the frozen model with nothing in it.

    python benchmarks/reft_speed.py [--quick] [--json PATH] [--device cuda] [--seed N] [--part merged]

    width4096        two Llama-7B layers, edits on all layers at f3+l3, rank 8: one training step
    width1024        eight layers of width 1024, likewise
    last_position    the same model, one middle layer, the last prompt position: a step from the second epoch on
    generate         64 tokens greedily, edits of the prompt on all layers; and of every token as well
    merged           the same with edits of every token that were put into the weights, alone by --part merged

"bare" is the frozen model's own forward and backward pass to an input that asks for a gradient: what any method
that edits the first layer must pay. Ours trains through the frozen past; "ours_trainer" is the same model called
as Trainer calls it. At small widths pyreft is at the speed of bare hooks, and little is to be won there.
Random weights; what is measured does not depend on their values.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
from harness import figure, interleaved, options, peak_memory, print_peak, ratio, report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.readouts import Readout
from subspace_lab.model.batches import Batch
from subspace_lab.reft import ReftConfig, get_reft_model
from subspace_lab.reft.data import prompt_lengths_of

RANK, VOCABULARY = 8, 4000
# name: width, MLP units, heads, layers
SHAPES = {
    "width4096": (4096, 11008, 32, 2),
    "width1024": (1024, 2816, 16, 8),
    "small": (128, 352, 4, 4),
    "llama7b": (4096, 11008, 32, 32),
}


def model_of(shape: str, device: str, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    width, units, heads, layers = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=units,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=512,
    )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


class Case:
    """A model, prompts with answers, and the contenders' training steps."""

    def __init__(
        self,
        shape: str,
        device: str,
        batch: int,
        prompt: int,
        answer: int,
        positions: str,
        layers: str | list[int],
        seed: int = 0,
    ) -> None:
        self.device, self.prompt, self.positions, self.seed = device, prompt, positions, seed
        self.model = model_of(shape, device, seed)
        depth = self.model.config.num_hidden_layers
        self.layers = list(range(depth)) if layers == "all" else layers
        g = torch.Generator().manual_seed(1 + seed)
        self.ids = torch.randint(10, VOCABULARY, (batch, prompt + answer), generator=g).to(device)
        self.labels = self.ids.clone()
        self.labels[:, :prompt] = -100

    def stepping(self, loss_of, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        return step

    def reft(self):
        config = ReftConfig(rank=RANK, layers=tuple(self.layers), positions=self.positions, seed=self.seed)
        return get_reft_model(self.model, config)

    def ours(self):
        """The core's own loop: `reft.finetune` does just this."""
        model = self.reft()
        edits = model.edits()
        readout, targets = Readout.before_labels(self.labels)
        mask = torch.ones_like(self.ids)
        batch = Batch({"input_ids": self.ids, "attention_mask": mask}, prompt_lengths_of(self.labels, mask))
        past = FrozenPast(model.backbone, batch, edits, readout)
        rows = torch.arange(len(self.ids))

        def loss() -> torch.Tensor:
            logits = past.logits(rows, edits)
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        return self.stepping(loss, [p for e in edits.values() for p in e.parameters()])

    def ours_trainer(self):
        model = self.reft()
        mask = torch.ones_like(self.ids)

        def loss() -> torch.Tensor:
            return model(input_ids=self.ids, attention_mask=mask, labels=self.labels, use_cache=False).loss

        return self.stepping(loss, [p for p in model.parameters() if p.requires_grad])

    def pyreft(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyreft
        width = self.model.config.hidden_size
        wanted = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=width, low_rank_dimension=RANK, dtype=self.model.dtype
                ),
            }
            for layer in self.layers
        ]
        model = pyreft.get_reft_model(self.model, pyreft.ReftConfig(representations=wanted))
        model.set_device(self.device)
        n = self.prompt
        spots = [n - 1] if self.positions == "last" else [0, 1, 2, n - 3, n - 2, n - 1]
        places = [[spots] * len(self.ids)] * len(self.layers)

        def loss() -> torch.Tensor:
            _, output = model(
                {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)},
                unit_locations={"sources->base": (None, places)},
                labels=self.labels,
                use_cache=False,
            )
            return output.loss

        return self.stepping(loss, [p for p in model.get_trainable_parameters() if p.requires_grad])

    def bare(self):
        embeddings = self.model.get_input_embeddings()(self.ids).detach()
        for p in self.model.parameters():
            p.requires_grad_(False)

        def step() -> None:
            inputs = embeddings.clone().requires_grad_(True)
            self.model(inputs_embeds=inputs, labels=self.labels, use_cache=False).loss.backward()

        return step


def generation(shape: str, device: str, seed: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    case = Case(shape, device, 2, 32, 1, "f3+l3", "all", seed)
    model = case.reft()
    for edit in model.edits().values():
        with torch.no_grad():
            edit.value.weight.add_(torch.randn_like(edit.value.weight) * 1e-3)
    prompt = case.ids[:, :32]
    common = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    base = case.model
    contenders = {
        "native": lambda: base.generate(input_ids=prompt, **common),
        "prompt": lambda: model.generate(prompt, **common),
        "every": lambda: model.generate(prompt, every_token=True, **common),
    }
    model.eval()
    times = interleaved(contenders, rounds, device)
    return {
        "generate_cost": ratio(times, "prompt", "native"),
        "generate_every_token_cost": ratio(times, "every", "native"),
    }


def merged_generation(shape: str, device: str, seed: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """A model with an adapter in its weights against the same model that nothing has ever wrapped."""
    case = Case(shape, device, 2, 32, 1, "all", "all", seed)
    config = ReftConfig(
        rank=RANK, positions="all", every_token=True, bias=False, component="mlp_output", start="paper", seed=seed
    )
    merged = get_reft_model(model_of(shape, device, seed), config).merge_and_unload()
    prompt = case.ids[:, :32]
    common = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    common |= {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    contenders = {
        "native": lambda: case.model.generate(**common),
        "merged": lambda: merged.generate(**common),
    }
    return {"generate_merged_cost": ratio(interleaved(contenders, rounds, device), "merged", "native")}


def main() -> None:
    parser = options(__doc__, "A tiny model in place of every one.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("all", "merged"), default="all")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    card = args.device.startswith("cuda")

    def shape(name: str) -> str:
        return "small" if args.quick else "llama7b" if card else name

    # name: shape, device, rows, prompt, answer, positions, layers, seed
    middle = [SHAPES[shape("width1024")][3] // 2]
    cases = {
        "width4096": (shape("width4096"), args.device, 2, 16, 8, "f3+l3", "all", args.seed),
        "width1024": (shape("width1024"), args.device, 4, 64, 16, "f3+l3", "all", args.seed),
        "last_position": (shape("width1024"), args.device, 4, 64, 16, "last", middle, args.seed),
    }
    if args.peak_of:
        step = getattr(Case(*cases["width1024"]), args.peak_of)()
        print_peak(args.device, lambda: (step(), step()))
        return
    long = (8 if args.quick else 64, 2 if args.quick else args.rounds)
    results = merged_generation(shape("width1024"), args.device, args.seed, *long)
    for name, given in (cases if args.part == "all" else {}).items():
        print(name, file=sys.stderr)
        case = Case(*given)
        steps = {n: getattr(case, n)() for n in ("ours", "ours_trainer", "pyreft", "bare")}
        times = interleaved(steps, 2 if args.quick else args.rounds, args.device)
        results[f"speedup_over_pyreft_{name}"] = ratio(times, "pyreft", "ours")
        results[f"speedup_over_pyreft_{name}_trainer"] = ratio(times, "pyreft", "ours_trainer")
        results[f"cost_over_bare_{name}"] = ratio(times, "ours", "bare")
        results[f"seconds_ours_{name}"] = figure(times["ours"])
        del case, steps
    if args.part == "all":
        results |= generation(shape("width1024"), args.device, args.seed, *long)
    forwarded = ["--device", args.device, "--seed", str(args.seed), *(["--quick"] if args.quick else [])]
    for contender in ("ours", "pyreft") if args.part == "all" else ():
        suffix = "" if contender == "ours" else f"_{contender}"
        results[f"peak_memory_mb{suffix}"] = figure([peak_memory(__file__, contender, forwarded)])
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "peak_of")}
    report("reft_speed", {**settings, "rank": RANK, "cases": cases}, results, args.device, args.json)


if __name__ == "__main__":
    main()
