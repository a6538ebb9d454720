"""Wrong types at the public door of model and engine: one sentence that says what was found and what is needed.

The checks of types that other tests run under would speak first, so everything here happens in another process,
as users have it, without them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

PROGRAM = """
import json, sys
import torch
from families import build, inputs
from subspace_lab.core.interventions import loreft
from subspace_lab.core.sites import Site
from subspace_lab.engine.budget import budgets
from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.stacking import Stack
from subspace_lab.engine.training import TrainingConfig, train
from subspace_lab.model.backbone import Backbone
from subspace_lab.model.batches import Batch
from subspace_lab.model.intervene import collect, forward, generate
from subspace_lab.model.site_lists import list_sites
from subspace_lab.das.methods import PathPatching

model = build("llama")
backbone, batch = Backbone(model), Batch(inputs("llama", 3, 7))
site, readout = Site("block_output", 1, "last"), Readout.at(batch, "last")
edit = loreft(32, 2, seed=0)
past, plain = FrozenPast(backbone, batch, [site], readout), PlainEngine(backbone, batch, readout)
rows = torch.arange(2)
found = {}
for name, call in {
    "model, forward": lambda: forward(model, batch, {site: edit}),
    "model, collect": lambda: collect(model, batch, [site]),
    "model, generate": lambda: generate(model, batch, {site: edit}, max_new_tokens=1),
    "model, past": lambda: FrozenPast(model, batch, [site], readout),
    "model, plain": lambda: PlainEngine(model, batch, readout),
    "no model": lambda: Backbone("gpt2"),
    "backbone, backbone": lambda: Backbone(backbone),
    "one site, collect": lambda: collect(backbone, batch, site),
    "one site, past": lambda: FrozenPast(backbone, batch, site, readout),
    "text, collect": lambda: collect(backbone, batch, "block_output[1]@last"),
    "text as site, collect": lambda: collect(backbone, batch, ["block_output[1]@last"]),
    "text as site, past": lambda: FrozenPast(backbone, batch, ["block_output[1]@last"], readout),
    "text as site, pair": lambda: FrozenPast(backbone, batch, [(site, "block_output[2]@last")], readout),
    "number, past": lambda: FrozenPast(backbone, batch, 3, readout),
    "text as site, forward": lambda: forward(backbone, batch, {"block_output[1]@last": edit}),
    "text as site, hook_point": lambda: backbone.hook_point("block_output[1]"),
    "layer as text": lambda: collect(backbone, batch, [Site("block_output", "1", "last")]),
    "layer as fraction": lambda: forward(backbone, batch, {Site("block_output", 1.0, "last"): edit}),
    "list of edits": lambda: forward(backbone, batch, [edit]),
    "list of edits, past": lambda: past.logits(rows, [edit]),
    "edit as text": lambda: forward(backbone, batch, {site: "zero"}),
    "edit as text, past": lambda: past.logits(rows, {site: "zero"}),
    "texts as batch": lambda: forward(backbone, ["Hello"], {site: edit}),
    "text as batch, collect": lambda: collect(backbone, "Hello", [site]),
    "chunk": lambda: FrozenPast(backbone, batch, [site], readout, chunk=2.0),
    "no chunk": lambda: FrozenPast(backbone, batch, [site], readout, chunk=0),
    "memory": lambda: FrozenPast(backbone, batch, [site], readout, memory=1.5),
    "memory, true": lambda: budgets(True, torch.device("cpu")),
    "rows as fractions": lambda: past.logits(torch.tensor([0.0, 1.0]), {site: edit}),
    "rows as list": lambda: plain.logits([0, 1], {site: edit}),
    "row alone": lambda: plain.logits(torch.tensor(1), {site: edit}),
    "tokens": lambda: Readout.at(batch, "last", [1.5]),
    "tokens as text": lambda: Readout.at(batch, "last", ["yes", "no"]),
    "positions": lambda: Readout.at(batch, 3),
    "steps": lambda: TrainingConfig(steps=2.5),
    "batch size": lambda: TrainingConfig(batch_size="8"),
    "rate": lambda: TrainingConfig(learning_rate="1e-3"),
    "seed": lambda: TrainingConfig(seed=0.5),
    "one edit, train": lambda: train(edit, lambda step: 0, TrainingConfig()),
    "one edit, stack": lambda: Stack(edit),
    "model, sites": lambda: list_sites(model),
    "layer as text, sites": lambda: list_sites(backbone, layers=["1"]),
    "layers in words": lambda: list_sites(backbone, layers="last"),
    "positions, sites": lambda: list_sites(backbone, positions=1.5),
    "component, sites": lambda: list_sites(backbone, 3),
    "receiver": lambda: PathPatching(3),
    "hold": lambda: PathPatching("block_output[1]@last", hold=[1]),
    "a batch without tensors": lambda: collect(backbone, {"use_cache": False}, [site.at("all")]),
}.items():
    try:
        call()
        found[name] = ["nothing", ""]
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
found["site in words"] = ["", str(site)]
print(json.dumps(found))
"""

EXPECTED = {
    **{
        f"model, {where}": ("TypeError", "A Backbone is needed, found LlamaForCausalLM: write Backbone(model)")
        for where in ("forward", "collect", "generate", "past", "plain", "sites")
    },
    "no model": ("TypeError", "made from a torch module, not from str"),
    "backbone, backbone": ("TypeError", "a backbone already"),
    "one site, collect": ("TypeError", "Several sites are expected, found one: write [block_output[1]@last]"),
    "one site, past": ("TypeError", "Several sites are expected, found one: write [block_output[1]@last]"),
    "text, collect": ("TypeError", "Several sites are expected, found 'block_output[1]@last'"),
    "text as site, collect": ("TypeError", "A Site is needed, found 'block_output[1]@last'"),
    "text as site, past": ("TypeError", "A Site is needed, found 'block_output[1]@last'"),
    "text as site, pair": ("TypeError", "A Site is needed, found 'block_output[2]@last'"),
    "number, past": ("TypeError", "Several sites are expected, found 3"),
    "text as site, forward": ("TypeError", "A Site is needed, found 'block_output[1]@last'"),
    "text as site, hook_point": ("TypeError", "Site.parse('block_output[3]@last')"),
    "layer as text": ("TypeError", "layer='1'"),
    "layer as fraction": ("TypeError", "layer=1.0"),
    "list of edits": ("TypeError", "{site: intervention}, found list"),
    "list of edits, past": ("TypeError", "{site: intervention}, found list"),
    "edit as text": ("TypeError", "an intervention or a function of states, not 'zero'"),
    "edit as text, past": ("TypeError", "an intervention or a function of states, not 'zero'"),
    "texts as batch": ("TypeError", "found list. Tokenise texts first"),
    "text as batch, collect": ("TypeError", "found str. Tokenise texts first"),
    "chunk": ("TypeError", "chunk=2.0: a whole number is needed, found float"),
    "no chunk": ("ValueError", "chunk=0: at least 1"),
    "memory": ("TypeError", "memory=1.5: a whole number is needed, found float"),
    "memory, true": ("TypeError", "memory=True: a whole number is needed, found bool"),
    "rows as fractions": (
        "TypeError",
        "tensor of indices with one axis, such as torch.tensor([0, 3]); found (2,) ",
    ),
    "rows as list": ("TypeError", "tensor of indices with one axis, such as torch.tensor([0, 3]); found list"),
    "row alone": ("TypeError", "found () torch.int64"),
    "tokens": ("TypeError", "tokens=[1.5]: a list of token ids"),
    "tokens as text": ("TypeError", "tokens=['yes', 'no']: a list of token ids"),
    "positions": ("TypeError", "positions=3: text is needed"),
    "steps": ("TypeError", "steps=2.5: a whole number is needed, found float"),
    "batch size": ("TypeError", "batch_size='8': a whole number is needed, found str"),
    "rate": ("TypeError", "learning_rate='1e-3': a number is needed, found str"),
    "seed": ("TypeError", "seed=0.5: a whole number is needed, found float"),
    "one edit, train": ("TypeError", "several modules are expected, found one"),
    "one edit, stack": ("TypeError", "several interventions are expected, found one"),
    "layer as text, sites": ("TypeError", "one of layers='1': a whole number is needed, found str"),
    "layers in words": ("ValueError", "layers='last': possible are 'all'"),
    "positions, sites": ("TypeError", "positions=1.5 is of type float"),
    "component, sites": ("TypeError", "component=3 is of type int"),
    "receiver": ("TypeError", "PathPatching(receiver=3): needed are sites"),
    "hold": ("TypeError", "PathPatching(hold=[1]): needed are sites"),
    "a batch without tensors": ("ValueError", "without any tensor has no rows: its inputs are ['use_cache']"),
    "site in words": ("", "block_output[1]@last"),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    path = f"{HERE}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", EXPECTED)
def test_a_wrong_type_gets_a_sentence(case: str, found: dict[str, list[str]]) -> None:
    kind, sentence = EXPECTED[case]
    assert found[case][0] == kind and sentence in found[case][1], found[case]
    assert "\n" not in found[case][1]


def test_every_case_was_tried(found: dict[str, list[str]]) -> None:
    assert found.keys() == EXPECTED.keys()
