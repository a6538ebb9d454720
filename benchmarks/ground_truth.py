"""Which method to believe when: searches of programs whose truth is known, by method, against that truth.

    python benchmarks/ground_truth.py [--quick] [--json PATH] [--device D] [--seed N] [--picture PATH]

Fifty-two programs compiled by torchwright into Phi-3 models (`compiled_programs.variants`), four Llamas into which a
variable was written in a rotated plane (`tasks/planted.py`). Of each program one variable is searched at the output
of every block, at every position where it stands at some time (of the Llamas also at the last), by every method, with
one seed. Asked is then, of each method:

    site found        whether the site that dev chooses holds the variable by the schematic
    supported         whether there its test interval lies above both floors and above its score on a randomly
                      initialised twin
    false supported   the same of the best of the sites that do not hold the variable: the verdict of a search that
                      has no such variable to find
    share             tr(P_found P_true) / min(k_found, k_true): the mean squared cosine to the true span. The true
                      span are the schematic's columns, and others that hold nothing but the variable's value (in the
                      programs "copy" the token that is copied), as far as they differ between its values: of a
                      one-hot code of n values n − 1 dimensions.
    inside            tr(P_found P_true) / k_found: how much of what was found is the variable
    angle             the largest principal angle between the two, in degrees

Sites and ranks are chosen on dev pairs, scores are of test pairs. `share_before` and `share_after` are means over the
programs where DAS at the rank chosen on dev held less than .9 of the truth, before and after `purify`. Where x and y
both stand at a site at which their variable does not stand yet, an exchange of both is one of the variable too; these
sites count as sites without it.

What is finished is kept beside the JSON (`*.partial.jsonl`), and the same call goes on from there. One thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compiled_programs import Program, variants
from ground_truth_picture import draw
from harness import clock, figure, machine, options, report, today
from torch import Tensor

from subspace_lab.analysis.geometry import principal_angles
from subspace_lab.analysis.illusions import illusion
from subspace_lab.analysis.purifying import purify
from subspace_lab.analysis.twins import reinitialised
from subspace_lab.core.alignments import Alignment
from subspace_lab.core.estimates import Estimate, estimate
from subspace_lab.core.sites import Site
from subspace_lab.das.fits import Fit, Fits
from subspace_lab.das.methods import DAS, PCA, BoundlessDAS, DifferenceOfMeans, FullVector, Mask, Method, Probe
from subspace_lab.das.objectives import iia
from subspace_lab.das.pairs import Pairs
from subspace_lab.das.prepared_pairs import PreparedPairs
from subspace_lab.das.sweeps import sweep
from subspace_lab.engine.training import TrainingConfig
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.intervene import collect
from subspace_lab.tasks import planted as plants

RANKS = [1, 2, 4]
METHODS: list[Method] = [
    *(DAS(rank) for rank in RANKS),
    BoundlessDAS(),
    Mask("pca"),
    DifferenceOfMeans(),
    *(PCA(rank) for rank in RANKS),
    Probe(),
    FullVector(),
]
FAMILIES = {
    **{method.label: [method.label] for method in METHODS[: len(RANKS)]},
    "DAS": [f"DAS {rank}" for rank in RANKS],
    "Boundless": [METHODS[3].label],
    "Mask": [METHODS[4].label],
    "Means": ["DifferenceOfMeans"],
    "PCA": [f"PCA {rank}" for rank in RANKS],
    "Probe": ["Probe"],
    "Full vector": ["FullVector"],
}
"""{what the table calls it: the methods, by their labels, of which dev chooses one}"""
PURIFIED = "DAS + purify"
CONFIG = TrainingConfig(steps=100, learning_rate=0.05, batch_size=32)
HELD = 0.9  # of the truth: what `purify` is judged on held less


@dataclass(frozen=True, eq=False)
class Truth:
    """A model, pairs, where a search looks, and at which of these sites the variable stands in which span."""

    backbone: Backbone
    pairs: Pairs
    variable: str
    sites: list[Site]
    spans: Mapping[Site, Tensor]


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def name_of(program: Program) -> str:
    layout = "on the way" if program.on_the_way else "at the end"
    return f"{program.name}, {layout}, {program.fillers} fillers, width {program.width}"


def compiled(program: Program, seed: int, device: str = "cpu") -> Truth:
    """A program, its sites, and the columns of its variable as far as they differ between its values."""
    with tempfile.TemporaryDirectory() as folder:
        made = program.compiled(Path(folder) / "model")
    pairs = program.pairs(made.tokenizer, seed=seed)
    backbone = Backbone(made.model.to(device))
    sites = program.sites(made.model.config.num_hidden_layers)
    held = {site: made.truth[program.name][site] for site in sites if made.holds(program.name, site)}
    assert not callable(pairs.train)
    source, values = pairs.train.sources[program.name], pairs.train.values[program.name]
    states = collect(backbone, source, list(held))
    spans = {}
    for site, columns in held.items():
        at = states[site].flatten(0, -2).cpu()
        there = holding(at, values)
        there[list(columns)] = True
        means = torch.stack([at[values == value].mean(0) for value in values.unique()])
        coded = torch.where(there, means - means.mean(0), 0.0).double()
        _, sizes, right = torch.linalg.svd(coded, full_matrices=False)
        spans[site] = right[sizes > 1e-3 * sizes[0]]
    return Truth(backbone, pairs, program.name, sites, spans)


def holding(states: Tensor, values: Tensor) -> Tensor:
    """(width,) which columns hold a variable's value and nothing else: they differ between values and in none."""
    classes = [states[values == value] for value in values.unique()]
    means = torch.stack([one.mean(0) for one in classes])
    between = (means - means.mean(0)).abs().amax(0)
    within = torch.stack([(one - one.mean(0)).abs().amax(0) for one in classes]).amax(0)
    return (between > 0.01) & (within < 0.01 * between)


def decoder(seed: int, device: str = "cpu") -> Truth:
    made = plants.planted_decoder(seed)
    layers = made.model.config.num_hidden_layers
    places = (made.site.positions, plants.LENGTH - 1)
    sites = [Site("block_output", layer, p) for layer in range(layers) for p in places]
    return Truth(
        Backbone(made.model.to(device)), made.pairs, plants.VARIABLE, sites, {made.site: made.basis.double()}
    )


# --- one program --------------------------------------------------------------------------------------------


def judged(truth: Truth, seed: int) -> dict[str, Any]:
    """What every method makes of one program."""
    fits = sweep(truth.backbone, truth.pairs, truth.sites, METHODS, seeds=[seed], config=CONFIG, quiet=True)
    floor = fits.floors["test"].highest
    without = [site for site in truth.sites if site not in truth.spans]
    chosen: dict[str, dict[str, Fit]] = {}
    for family, labels in FAMILIES.items():
        chosen[family] = {"best": best(fits, labels, truth.sites)}
        if without:
            chosen[family]["elsewhere"] = best(fits, labels, without)
    # Of what is at its floor the twin would change no verdict.
    above = [fit for of in chosen.values() for fit in of.values() if fit.iia.low > floor]
    twin = scores_of_twin(truth, above, seed)
    methods: dict[str, Any] = {}
    for family, of in chosen.items():
        methods[family] = {
            which: told(
                truth, fit.alignment, fit.method.label, fit.score("iia", "dev"), fit.iia, floor, twin.get(key(fit))
            )
            for which, fit in of.items()
        }
    methods[PURIFIED] = {}
    for which, fit in chosen["DAS"].items():
        try:
            pure = purify(truth.backbone, truth.pairs, fit.alignment)
        except ValueError:  # nothing varies there, or nothing is read: there is nothing to purify
            methods[PURIFIED][which] = methods["DAS"][which] | {"took": "nothing"}
            continue
        score, dev = (scored(truth, pure, split) for split in ("test", "dev"))
        methods[PURIFIED][which] = told(truth, pure, "DAS + purify", dev, score, floor, twin.get(key(fit))) | {
            "took": pure.facts["purified"]["took"]
        }
    looked_at = illusion(truth.backbone, truth.pairs, chosen["DAS"]["best"])
    return {
        "floor": floor,
        "sites": len(truth.sites),
        "holding": [str(site) for site in truth.spans],
        "dimensions": {str(site): len(span) for site, span in truth.spans.items()},
        "methods": methods,
        "illusion": {
            "flagged": looked_at.flagged,
            "sensed": looked_at.sensed[truth.variable],
            "written": looked_at.written[truth.variable],
            "distance": looked_at.distance[truth.variable].value,
            "distance p": looked_at.distance[truth.variable].p,
        },
        "failures": [asdict(one) for one in fits.failures],
    }


def best(fits: Fits, labels: Sequence[str], sites: Sequence[Site]) -> Fit:
    """The highest on dev; of equals the earliest site, and of its methods the first of the list."""
    possible = [fit for fit in fits if fit.method.label in labels and fit.site in sites]
    return max(possible, key=lambda fit: fit.score("iia", "dev").value)


def key(fit: Fit) -> tuple[str, str]:
    return str(fit.site), fit.method.label


def scores_of_twin(truth: Truth, fits: Sequence[Fit], seed: int) -> dict[tuple[str, str], float]:
    """{(site, method): test IIA on a randomly initialised twin} of the fits whose verdict is asked."""
    backbone = Backbone(reinitialised(truth.backbone.model, seed + 1))
    found = {}
    for site in dict.fromkeys(fit.site for fit in fits):
        methods = list(dict.fromkeys(fit.method for fit in fits if fit.site == site))
        of = sweep(
            backbone, truth.pairs, [site], methods, seeds=[seed], config=CONFIG, min_accuracy=None, quiet=True
        )
        found |= {key(fit): fit.iia.value for fit in of}
        found |= {(one.place, one.method): 0.0 for one in of.failures}
    return found


def scored(truth: Truth, alignment: Alignment, split: str) -> Estimate:
    assignment = {truth.variable: alignment.site()}
    prepared = PreparedPairs.of(truth.backbone, getattr(truth.pairs, split), [assignment])
    return estimate(iia(prepared.outcomes(assignment, [alignment.edits()])[0]))


def told(
    truth: Truth, found: Alignment, label: str, dev: Estimate, test: Estimate, floor: float, twin: float | None
) -> dict[str, Any]:
    site, basis = found.site(), found.subspace().basis().double().cpu()
    one: dict[str, Any] = {
        "method": label,
        "site": str(site),
        "rank": len(basis),
        "dev": round(dev.value, 4),
        "test": [round(x, 4) for x in (test.value, test.low, test.high)],
        "twin": None if twin is None else round(twin, 4),
        "supported": test.low > max(floor, twin or 0.0),
        "holds": site in truth.spans,
    }
    if site in truth.spans:
        span = truth.spans[site]
        common = float((basis @ span.T).square().sum())
        one |= {
            "share": round(common / min(len(basis), len(span)), 4),
            "inside": round(common / len(basis), 4),
            "angle": round(float(principal_angles(basis, span).max().rad2deg()), 2),
        }
    return one


# --- all programs -------------------------------------------------------------------------------------------


def table(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{method: what it is worth}, each a mean over programs; shares and angles where its site holds the variable."""
    found = {}
    for family in [*FAMILIES, PURIFIED]:
        bests = [one["methods"][family]["best"] for one in records.values()]
        others = [one["methods"][family].get("elsewhere") for one in records.values()]
        others = [one for one in others if one is not None]
        right = [one for one in bests if one["holds"]]
        found[family] = {
            "site found": mean([one["holds"] for one in bests]),
            "supported": mean([one["holds"] and one["supported"] for one in bests]),
            "false supported": mean([one["supported"] for one in others]),
            "test iia": mean([one["test"][0] for one in bests]),
            "rank": mean([one["rank"] for one in bests]),
            "share": mean([one["share"] for one in right]),
            "inside": mean([one["inside"] for one in right]),
            "angle": statistics.median([one["angle"] for one in right]) if right else float("nan"),
            "programs": len(bests),
            "programs with sites without": len(others),
        }
    return found


def mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(map(float, values)), 4) if values else float("nan")


def figures(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The headline figures: DAS at the rank that dev chooses, before and after `purify`."""
    of = table(records)
    before = {name: one["methods"]["DAS"]["best"] for name, one in records.items()}
    after = {name: one["methods"][PURIFIED]["best"] for name, one in records.items()}
    low = [name for name, one in before.items() if one["holds"] and one["share"] < HELD]
    falls = [before[name]["test"][0] - after[name]["test"][0] for name in low]
    everywhere = [before[name]["test"][0] - after[name]["test"][0] for name in before]
    flagged = [one["illusion"]["flagged"] for one in records.values()]
    return {
        "sites_found": figure([of["DAS"]["site found"]]),
        "supported_where_true": figure([of["DAS"]["supported"]]),
        "false_supported": figure([of["DAS"]["false supported"]]),
        "share_before": figure([mean([before[name]["share"] for name in low])]),
        "share_after": figure([mean([after[name]["share"] for name in low])]),
        "programs_that_held_less": figure([float(len(low))]),
        "iia_fall_of_purify": figure(falls or [0.0]),
        "iia_fall_of_purify_everywhere": figure(everywhere),
        "share_everywhere_before": figure([of["DAS"]["share"]]),
        "share_everywhere_after": figure([of[PURIFIED]["share"]]),
        "flagged_where_true": figure([mean(flagged)]),
    }


def main() -> None:
    parser = options(__doc__, "Three programs.")
    parser.add_argument("--picture", help="where the picture goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    programs: dict[str, Any] = {name_of(program): program for program in variants()}
    programs |= {f"planted decoder {seed}": seed for seed in range(args.seed, args.seed + 4)}
    if args.quick:
        names = list(programs)
        programs = {name: programs[name] for name in (names[0], names[1], names[-1])}
    kept = None if args.json is None else args.json.with_suffix(".partial.jsonl")
    settings = {"seed": args.seed, "config": asdict(CONFIG), "methods": [method.label for method in METHODS]}
    records = {} if kept is None else read(kept, settings)
    for name, program in programs.items():
        if name in records:
            continue
        start = clock(args.device)
        given = (args.seed, args.device)
        truth = decoder(program, args.device) if isinstance(program, int) else compiled(program, *given)
        records[name] = judged(truth, args.seed) | {"seconds": round(clock(args.device) - start, 1)}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with kept.open("a") as file:
                file.write(json.dumps({"settings": settings, "name": name, "record": records[name]}) + "\n")
        das, pure = (records[name]["methods"][family]["best"] for family in ("DAS", PURIFIED))
        elsewhere = records[name]["methods"]["DAS"].get("elsewhere", {})
        say(
            f"{name}: {das['method']} at {das['site']}{'' if das['holds'] else ' (WRONG)'}, IIA {das['test'][0]:.2f}, "
            f"share {das.get('share', 0):.2f} → {pure.get('share', 0):.2f} ({pure['took']}), "
            f"IIA {pure['test'][0]:.2f}; elsewhere {elsewhere.get('test', [0])[0]:.2f}"
            f", floor {records[name]['floor']:.2f}"
            f"{' SUPPORTED' if elsewhere.get('supported') else ''}; {records[name]['seconds']} s"
        )
    records = {name: records[name] for name in programs}
    of = table(records)
    names = list(next(iter(of.values())))[:8]
    print(f"\n{'method':14s}" + "".join(f"{name:>17s}" for name in names))
    for family, values in of.items():
        print(f"{family:14s}" + "".join(f"{values[name]:17.2f}" for name in names))
    results = figures(records)
    about = {**settings, "quick": args.quick, "seconds": round(sum(one["seconds"] for one in records.values()))}
    report("ground_truth", about, results, args.device, None)
    if args.json:
        write(args.json, about, results, of, records, args.device)
    if args.picture:
        draw({"table": of, "programs": records, "figures": results}, args.picture)


def write(
    path: Path,
    settings: Mapping[str, Any],
    results: Any,
    of: Any,
    records: Mapping[str, Mapping[str, Any]],
    device: str,
) -> None:
    """The file of `harness.report`, with the table, and each program on a line of its own."""
    whole = {
        "name": "ground_truth",
        "date": today(),
        "settings": settings,
        "machine": machine(device),
        "results": results,
        "table": of,
    }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(short(one))}" for name, one in records.items())
    path.write_text(json.dumps(whole, indent=2)[:-2] + f',\n  "programs": {{\n{lines}\n  }}\n}}\n')


def short(record: Mapping[str, Any]) -> dict[str, Any]:
    """A program without what the figures do not need."""
    kept = ("method", "site", "rank", "test", "supported", "holds", "share", "angle", "took")
    methods = {
        family: {which: {k: one[k] for k in kept if k in one} for which, one in of.items()}
        for family, of in record["methods"].items()
        if family in ("DAS", PURIFIED)
    }
    return {**record, "methods": methods}


def read(kept: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call with the same settings has finished."""
    lines = kept.read_text().splitlines() if kept.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {one["name"]: one["record"] for one in found if one["settings"] == json.loads(json.dumps(settings))}


if __name__ == "__main__":
    main()
