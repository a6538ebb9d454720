"""How well the searches find what is there: planted variables, compiled programs, equality, and against pyvene.

    python benchmarks/das_quality.py [--quick] [--json PATH] [--device D] [--seed N] [--part planted,…] [--take-over]

    planted     a variable written into a rotated subspace: the angle to it, and whether a map's highest is its site
    compiled    twelve programs compiled by torchwright into Phi-3 models: does the search name a site that holds
                the variable by the schematic, and is it at its floor where the schematic does not hold it?
    equality    hierarchical equality over 20 networks: both equalities by layer, two searches of one network, and
                the first argument, a variable that the networks do not have
    pyvene      the same task, data, site, rank, steps and batches, each with the better of its learning rates
    isolation   `isolation.py`: is an entity's country exchanged without its food, on entities never seen?
    screen      `screening.py`: what a screen saves, and how often it loses the best site
    smollm2     `das_smollm2.py`, agreement: DAS of rank 1 at the site below the last layer that dev chooses

Sites and learning rates are chosen on dev pairs; what is reported is of test pairs. With --json, the figures of the
parts that ran replace those in the file, and the others stay. One thread.
The last three parts are scripts of their own, and have quick runs of their own: --quick alone leaves them out. With
--take-over their figures are those of benchmarks/results, measured by these scripts, and the file says so; without,
they are measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import das_smollm2
import isolation
import screening
import torch
from compiled_programs import PROGRAMS
from harness import figure, machine, options, report
from smollm2_model import smollm2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from subspace_lab.analysis.geometry import principal_angles
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.methods import DAS
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig, shuffled_rows, train
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.tasks import load_task
from subspace_lab.tasks import planted as plants
from subspace_lab.tasks.hierarchical_equality import (
    ANSWERS,
    EQUALITY_MODEL,
    LAYERS,
    SEARCH_TRAINING,
    SIZE,
    EqualityMLP,
    counterfactuals,
    fresh,
    hidden,
    sample,
    setting,
    train_network,
)

Figures = dict[str, dict[str, float]]
# The 97.5 % quantile of Student's t, by how many values the mean is of.
STUDENT = {2: 12.706, 3: 4.303, 5: 2.776, 8: 2.365, 10: 2.262, 20: 2.093}


def mean_figure(values: Sequence[float]) -> dict[str, float]:
    """`figure`, and the mean with its 95 % interval (Student's t over the values)."""
    mean = statistics.fmean(values)
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return figure(list(values)) | {"mean": mean, "mean_low": mean - half, "mean_high": mean + half}


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# --- planted variables --------------------------------------------------------------------------------------


def planted(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """The angle between what is found and what was planted, and the argmax of whole maps."""
    searched = TrainingConfig(steps=50 if args.quick else 300, learning_rate=0.05, batch_size=256)
    mapped = TrainingConfig(steps=20 if args.quick else 60, learning_rate=0.05, batch_size=32)
    angles, seconds, found, highest, elsewhere = [], [], [], [], []
    for seed in args.seed + torch.arange(2 if args.quick else 10):
        made, start = plants.planted_regression(int(seed)), time.process_time()
        fits = sweep(
            Backbone(made.model.to(args.device)),
            made.pairs,
            [made.site],
            [DAS(len(made.basis))],
            seeds=[int(seed)],
            config=searched,
            loss=plants.squared_error,
            quiet=True,
        )
        seconds.append(time.process_time() - start)
        angles.append(principal_angles(fits[0].subspace(), made.basis).max().rad2deg().item())
        say(f"regression {int(seed)}: {angles[-1]:.2g} degrees in {seconds[-1]:.1f} s")
    for seed in args.seed + torch.arange(1 if args.quick else 5):
        made = plants.planted_decoder(int(seed))
        layers, length = made.model.config.num_hidden_layers, plants.LENGTH
        sites = [Site("block_output", layer, p) for layer in range(layers) for p in range(length)]
        fits = sweep(
            Backbone(made.model.to(args.device)),
            made.pairs,
            [made.site] if args.quick else sites,
            [DAS(len(made.basis))],
            seeds=[int(seed)],
            config=mapped,
            quiet=True,
        )
        found.append(float(fits.best().site == made.site))
        highest.append(fits.best().iia.value)
        elsewhere += [fit.iia.value for fit in fits if fit.site != made.site]
        say(f"decoder {int(seed)}: planted at {made.site}, found at {fits.best().site}, IIA {fits.best().iia}")
    return {
        "planted_angle_degrees": figure([max(angles)]),
        "planted_angle_degrees_by_seed": figure(angles),
        "planted_seconds": figure(seconds),
        "planted_sites_found": figure([statistics.fmean(found)]),
        "planted_iia": figure(highest),
        "planted_iia_elsewhere": figure(elsewhere or [0.0]),
    }, {"regression": asdict(searched), "decoder": asdict(mapped), "seeds": [len(angles), len(found)]}


# --- compiled programs --------------------------------------------------------------------------------------


def compiled(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """Whether dev's choice holds the variable by the schematic, and what is reached where nothing holds it."""
    config = TrainingConfig(steps=20 if args.quick else 100, learning_rate=0.05, batch_size=32)
    methods = [DAS([1, 4])]
    right, at_site, above, seconds = [], [], [], []
    for program in PROGRAMS[:2] if args.quick else PROGRAMS:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            made = program.compiled(Path(folder) / "model")
        fits = sweep(
            Backbone(made.model.to(args.device)),
            program.pairs(made.tokenizer, seed=args.seed),
            program.sites(made.model.config.num_hidden_layers),
            methods,
            config=config,
            quiet=True,
        )
        best, floor = fits.best(), fits.floors["test"].highest
        empty = [fit for fit in fits if not made.holds(program.name, fit.site)]
        # At the floor: the interval of the score begins no higher.
        right.append(made.holds(program.name, best.site) and all(fit.iia.low <= floor for fit in empty))
        at_site.append(best.iia.value)
        above.append(max(fit.iia.value for fit in empty) - floor)
        seconds.append(time.process_time() - start)
        where = ", ".join(map(str, made.truth[program.name]))
        say(
            f"{program.name}: held at {where}; found at {best.site} by {best.method.label}, IIA {best.iia}; "
            f"elsewhere at most {above[-1]:+.2f} from the floor of {floor:.2f}"
        )
    return {
        "compiled_sites_found": figure([statistics.fmean(map(float, right))]),
        "compiled_iia": figure(at_site),
        "compiled_highest_above_floor_elsewhere": figure(above),
        "compiled_seconds": figure(seconds),
    }, {"programs": [p.name for p in PROGRAMS][: len(right)], "search": asdict(config), "ranks": [1, 4]}


# --- hierarchical equality ----------------------------------------------------------------------------------

RANK, HELD_OUT, HELD_OUT_SEED, DEV, DEV_SEED = 8, 4096, 1_000_000, 512, 2_000_000


def first_argument(n: int, seed: int) -> Counterfactuals:
    """Pairs that exchange a itself; in every second one the source's a is the base's b, so that the answer can be both.

    A source stays what sources are: where its own a and b are equal, both become the base's b.
    """
    generator = torch.Generator().manual_seed(seed)
    base, before = sample(n, generator)
    source = sample(n, generator)[0]
    same = torch.rand(n, generator=generator) < 0.5
    equal = setting(source)["a"].eq(setting(source)["b"]).all(1)
    b = setting(base)["b"]
    source[:, :SIZE] = torch.where(same[:, None], b, source[:, :SIZE])
    source[:, SIZE : 2 * SIZE] = torch.where((same & equal)[:, None], b, source[:, SIZE : 2 * SIZE])
    after = EQUALITY_MODEL.interchange(setting(base), {"a": setting(source)})["label"].long()
    return Counterfactuals(Batch.of(base), {"a": Batch.of(source)}, before, after, ANSWERS)


def equality(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """IIA of both equalities by layer, of a second search of layer 1, and of the first argument."""
    # Half of the documented steps, which gain .01.
    config = replace(SEARCH_TRAINING, steps=20 if args.quick else 200)
    networks = [args.seed + i for i in range(2 if args.quick else 20)]
    by_layer: dict[int, list[float]] = {layer: [] for layer in range(1, LAYERS + 1)}
    of_a: dict[int, list[float]] = {layer: [] for layer in range(1, LAYERS + 1)}
    differences, accuracies = [], []

    def iia_of(network: EqualityMLP, pairs: Pairs, layers: Sequence[int], seed: int) -> list[float]:
        sites = [hidden(layer) for layer in layers]
        fits = sweep(
            Backbone(network.to(args.device)),
            pairs,
            sites,
            [DAS(RANK)],
            seeds=[seed],
            config=config,
            min_accuracy=None,
            quiet=True,
        )
        return [fit.iia.value for fit in fits]

    dev, test = (counterfactuals(n, s) for n, s in ((DEV, DEV_SEED), (HELD_OUT, HELD_OUT_SEED)))
    dev_a, test_a = (first_argument(n, s) for n, s in ((DEV, DEV_SEED), (HELD_OUT, HELD_OUT_SEED)))
    for seed in networks:
        network, accuracy = train_network(seed)
        accuracies.append(accuracy.value)
        found = iia_of(network, Pairs(fresh(config.batch_size, seed), dev, test), list(by_layer), seed)
        (again,) = iia_of(network, Pairs(fresh(config.batch_size, seed + 1000), dev, test), [1], seed + 1000)
        # Seeds far from those of the held-out pairs.
        pairs_a = Pairs(
            lambda step, seed=seed: first_argument(config.batch_size, 10_000_000 + 10_000 * seed + step),
            dev_a,
            test_a,
        )
        found_a = iia_of(network, pairs_a, list(of_a), seed)
        for layer in by_layer:
            by_layer[layer].append(found[layer - 1])
            of_a[layer].append(found_a[layer - 1])
        differences.append(abs(found[0] - again))
        say(f"network {seed}: {found} again {again:.3f}; first argument {found_a}")
    figures = {f"equality_iia_layer{layer}": mean_figure(values) for layer, values in by_layer.items()}
    figures |= {f"equality_first_argument_layer{layer}": mean_figure(values) for layer, values in of_a.items()}
    return {
        **figures,
        "equality_difference_of_two_searches": figure(differences),
        "equality_accuracy": figure(accuracies),
    }, {"networks": networks, "rank": RANK, "held_out": HELD_OUT, "search": asdict(config)}


# --- pyvene -------------------------------------------------------------------------------------------------

RATES = (1e-2, 3e-2, 1e-1)
SITE = Site("block_output", 1, "last")


class Contest:
    """The shipped decoder's first comparison of prices, and both libraries' searches of it from the same batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = str(files("subspace_lab") / "assets" / "tiny_decoder")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval().to(args.device)
        self.device, self.variable = args.device, "above_lower"
        sizes = {"train": 512, "dev": 200, "test": 1000}
        self.pairs = load_task("price_tagging").pairs(
            AutoTokenizer.from_pretrained(folder), seed=args.seed, **sizes
        )
        self.config = TrainingConfig(steps=10 if args.quick else 200, batch_size=32)
        self.rank = 4
        self.backbone = Backbone(self.model)
        self.assignment = {self.variable: SITE}
        self.prepared = {
            name: PreparedPairs.of(self.backbone, split, [self.assignment])
            for name, split in (("train", self.pairs.train), ("dev", self.pairs.dev), ("test", self.pairs.test))
        }

    def iia(self, basis: Tensor, split: str) -> float:
        """Of any basis, by one and the same code."""
        edits = Alignment({self.variable: (SITE, FixedSubspace(basis))}).edits()
        (outcome,) = self.prepared[split].outcomes(self.assignment, [edits])
        return float((outcome.logits.argmax(-1) == outcome.answer).float().mean())

    def ours(self, seed: int, rate: float) -> Tensor:
        config = replace(self.config, learning_rate=rate)
        fits = sweep(self.backbone, self.pairs, [SITE], [DAS(self.rank)], seeds=[seed], config=config, quiet=True)
        return fits[0].subspace().basis()

    def pyvene(self, seed: int, rate: float) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyvene
        torch.manual_seed(seed)
        wanted = {
            "layer": SITE.layer,
            "component": "block_output",
            "low_rank_dimension": self.rank,
            "intervention_type": pyvene.LowRankRotatedSpaceIntervention,
        }
        wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([wanted]), self.model)
        wrapped.set_device(self.device)
        wrapped.disable_model_gradients()
        (intervention,) = wrapped.interventions.values()
        config = replace(self.config, learning_rate=rate, seed=seed)
        order = shuffled_rows(len(self.pairs.train), config)  # the batches that ours sees

        def logits(rows: Tensor) -> Tensor:
            data = self.pairs.train.rows(rows).to(self.device)
            batches = (data.sources[self.variable], data.base)
            at = [[[int(mask.sum()) - 1] for mask in batch.inputs["attention_mask"]] for batch in batches]
            _, output = wrapped(
                dict(batches[1].inputs),
                [dict(batches[0].inputs)],
                {"sources->base": ([at[0]], [at[1]])},
            )
            last = torch.tensor(at[1], device=self.device)[:, 0]
            return output.logits[torch.arange(len(rows)), last][:, data.tokens.to(self.device)]

        def loss(_: int) -> Tensor:
            rows = next(order)
            return nn.functional.cross_entropy(logits(rows), self.pairs.train.answer[rows].to(self.device))

        # What is compared is what is found, not a mistake in the call: at the start both say the same of a batch.
        rows = torch.arange(8)
        start = intervention.rotate_layer.weight.detach().T
        edits = Alignment({self.variable: (SITE, FixedSubspace(start))}).edits()
        (outcome,) = self.prepared["train"].outcomes(self.assignment, [edits], rows)
        torch.testing.assert_close(logits(rows).detach().cpu(), outcome.logits, atol=1e-3, rtol=1e-3)
        train([intervention], loss, config)
        return intervention.rotate_layer.weight.detach().T.contiguous().cpu()


def against_pyvene(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """Held-out IIA of ours less pyvene's, seed by seed."""
    contest = Contest(args)
    searches: Mapping[str, Callable[[int, float], Tensor]] = {"ours": contest.ours, "pyvene": contest.pyvene}
    chosen = {}
    for name, search in searches.items():  # on a seed of its own
        dev = {
            rate: contest.iia(search(args.seed + 100, rate), "dev")
            for rate in (RATES[:2] if args.quick else RATES)
        }
        chosen[name] = max(dev, key=lambda rate: dev[rate])
        say(f"{name}: IIA on dev by learning rate {dev}")
    seeds = [args.seed + i for i in range(2 if args.quick else 5)]
    scores: dict[str, list[float]] = {name: [] for name in searches}
    for seed in seeds:
        for name, search in searches.items():
            scores[name].append(contest.iia(search(seed, chosen[name]), "test"))
        say(f"seed {seed}: ours {scores['ours'][-1]:.3f}, pyvene {scores['pyvene'][-1]:.3f}")
    differences = [a - b for a, b in zip(scores["ours"], scores["pyvene"], strict=True)]
    return {
        "iia_minus_pyvene": mean_figure(differences),
        "iia_ours": mean_figure(scores["ours"]),
        "iia_pyvene": mean_figure(scores["pyvene"]),
    }, {
        "task": contest.pairs.task,
        "site": str(SITE),
        "rank": contest.rank,
        "steps": contest.config.steps,
        "batch_size": contest.config.batch_size,
        "learning_rates": chosen,
        "seeds": seeds,
    }


# --- scripts of their own -----------------------------------------------------------------------------------

RESULTS = Path(__file__).parent / "results"


def isolated(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """Cause and isolation of MDAS, and the isolation of DAS that was trained without it."""
    names = {"mdas_cause": "mdas_cause", "mdas_isolation": "mdas_isolation", "das_isolation": "DAS 16, iso"}
    if args.take_over:
        results, of_part = taken_over("isolation")
    else:
        of_part, results = isolation.measured(args.quick, args.device, args.seed)
    return {name: results[own] for name, own in names.items()}, of_part


def screened(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """What a screen saves and loses."""
    if args.take_over:
        return taken_over("screening")
    cases = screening.all_measured(args.quick, args.device, args.seed)
    return screening.figures(cases), screening.settings(cases)


def in_a_language_model(args: argparse.Namespace) -> tuple[Figures, dict[str, Any]]:
    """Number agreement in SmolLM2-135M."""
    if args.take_over:
        results, of_part = taken_over("das_smollm2")
        of_part = {**of_part["parts"]["agreement"], **{k: v for k, v in of_part.items() if k != "parts"}}
    else:
        asked = argparse.Namespace(quick=args.quick, seed=args.seed, layers="all", workers=0, json=None)
        model, tokenizer = smollm2()
        results, of_part = das_smollm2.agreement(asked, model.to(args.device), tokenizer)
    names = {"smollm2_agreement_iia": "smollm2_agreement_iia", "smollm2_twin_iia": "twin: DAS 1, iia"}
    return {name: results[own] for name, own in names.items()}, of_part


def taken_over(name: str) -> tuple[Figures, dict[str, Any]]:
    """(figures, settings) that a script wrote among the results, with where they are from.

    Raises:
        FileNotFoundError: the script has not written any.
        ValueError: the figures are of a quick run.
    """
    path = RESULTS / f"{name}.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if written["settings"].get("quick"):
        raise ValueError(f"{path} is of a quick run, whose figures say nothing.")
    taken = {"taken_over_from": f"benchmarks/results/{path.name}", "measured_on": written["machine"]}
    return written["results"], {**written["settings"], **taken}


# --- the file -----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], tuple[Figures, dict[str, Any]]]] = {
    "planted": planted,
    "compiled": compiled,
    "equality": equality,
    "pyvene": against_pyvene,
    "isolation": isolated,
    "screen": screened,
    "smollm2": in_a_language_model,
}


def merged(
    path: str | Path | None, measured: Mapping[str, tuple[Figures, dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, results): what stands in the file, with the parts that were measured now in the place of the old."""
    settings, results = {}, {}
    if path is not None and Path(path).exists():
        old = json.loads(Path(path).read_text(encoding="utf-8"))
        settings, results = old["settings"], old["results"]
    for name, (figures, of_part) in measured.items():
        for gone in settings.get(name, {}).get("figures", []):
            results.pop(gone, None)
        results |= figures
        settings[name] = {**of_part, "figures": list(figures)}
    return settings, results


def main() -> None:
    parser = options(__doc__, "Four parts, with few seeds and steps.", "the first of the seeds")
    parser.add_argument(
        "--take-over", action="store_true", help="of isolation and screen: the figures in benchmarks/results"
    )
    parser.add_argument("--part", help=f"some of {','.join(PARTS)}; all by default, with --quick the first four")
    args = parser.parse_args()
    parts = args.part.split(",") if args.part else list(PARTS)[: 4 if args.quick else None]
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--part: unknown {unknown}; possible are {list(PARTS)}, with commas between them")
    if args.device == "cpu":
        torch.set_num_threads(1)  # two threads contend on a shared machine
    measured = {}
    for name in parts:
        print(name, file=sys.stderr)
        start = time.perf_counter()
        figures, of_part = PARTS[name](args)
        shared = {"quick": args.quick, "seed": args.seed, "seconds": round(time.perf_counter() - start)}
        measured[name] = figures, {**of_part, **shared, "machine": machine(args.device)}
    settings, results = merged(args.json, measured)
    report("das_quality", settings, results, args.device, args.json)


if __name__ == "__main__":
    main()
