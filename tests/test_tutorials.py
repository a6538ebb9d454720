"""The tutorials run from top to bottom, offline, and what is stored in them is what they give."""

from __future__ import annotations

import ast
import getpass
import importlib.util
import itertools
import json
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # beside JupyterLab, importing it takes seconds
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
# These take minutes and a model that is fetched. `tutorials/run.py` executes them; here what they store is read.
STORED_ONLY = [path for path in NOTEBOOKS if path.stem.startswith("11_smollm2")]
SECONDS = 300
KILOBYTES = 700
# Beginnings of paths of somebody's machine, where no longer path or address goes before them.
MACHINE = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|var|opt|usr|work|mnt|private)/|[A-Z]:\\)|site-packages"
)
# The numbers that a tutorial's last cell prints, with the range in which its text stays true.
RANGES = {
    "01_find_a_variable": {
        "found_iia": (0.9, 1.0),
        "confirmed_iia": (0.88, 1.0),
        "twin_iia": (0.35, 0.65),
        "set_found": (0.9, 1.0),
        "set_controls": (0.5, 0.88),
    },
    "02_hierarchical_equality": {
        "layer_1": (0.75, 1.0),
        "layer_3": (0.45, 0.56),
        "not_trained": (0.45, 0.56),
        "pool_train": (0.57, 0.9),
        "pool_test": (0.45, 0.56),
    },
    "03_where_a_language_model_keeps_a_variable": {
        "patch_names_off_floor": (0.0, 0.04),
        "patch_last_0": (0.1, 0.42),
        "patch_last_1": (0.97, 1.0),
        "patch_last_2": (0.97, 1.0),
        "patch_last_3": (0.97, 1.0),
        "rival_highest": (0.45, 0.56),
        "rival_lowest": (0.0, 0.12),
        "map_DAS": (0.85, 0.99),
        "map_DifferenceOfMeans": (0.97, 1.0),
        "map_PCA": (0.95, 1.0),
        "map_RandomSubspace": (0.45, 0.56),
        "map_FullVector": (0.97, 1.0),
        "das_2_new": (0.42, 0.58),
        "das_4_new": (0.45, 0.62),
        "das_8_new": (0.6, 0.85),
        "das_16_new": (0.85, 1.0),
        "das_32_new": (0.96, 1.0),
        "das_2_same": (0.42, 0.6),
        "das_4_same": (0.5, 0.7),
        "das_8_same": (0.87, 1.0),
        "das_16_same": (0.95, 1.0),
        "das_32_same": (0.97, 1.0),
        "train_8_new": (0.92, 1.0),
        "train_8_same": (0.92, 1.0),
        "random_32": (0.62, 0.85),
        "kept_0.1": (0.55, 0.8),
        "kept_1.0": (0.25, 0.45),
        "kept_4.0": (0.1, 0.25),
        "boundless_0.1": (0.96, 1.0),
        "boundless_1.0": (0.9, 1.0),
        "boundless_4.0": (0.62, 0.9),
        "supported": (1.0, 1.0),
    },
    "04_loreft_in_five_minutes": {
        "before": (0.0, 0.0),
        "after": (0.8, 0.98),
        "all_layers": (0.8, 1.0),
        **{f"layer_{layer}": (0.0, 0.4) for layer in range(4)},
        **{f"formed_layer_{layer}": (0.0, 0.5) for layer in range(4)},
        "frequent": (0.45, 0.55),
        "shuffled_answers": (0.2, 0.55),
        "formed_shuffled_answers": (0.6, 1.0),
        "same": (1.0, 1.0),
        "sentence_last": (0.0, 0.0),
        "sentence_every": (0.7, 0.97),
        "merged": (0.98, 1.0),
        "remembered_the": (0.98, 1.0),
        "remembered_last": (0.4, 0.93),
        "remembered_every": (0.5, 0.95),
    },
    "05_a_text_classifier": {
        "head_alone": (0.8, 0.96),
        "LoRA": (0.95, 1.0),
        "LoReFT": (0.94, 1.0),
        "LoReFT_shuffled_labels": (0.38, 0.62),
        "LoReFT_random_model": (0.4, 0.65),
        "LoReFT_over_LoRA": (-0.04, 0.02),
        "LoReFT_over_head": (0.03, 0.18),
        "LoRA_over_head": (0.03, 0.18),
        "size_head": (128, 128),
        "size_LoRA": (2176, 2176),
        "size_LoReFT": (2192, 2192),
        "same": (1.0, 1.0),
    },
    "06_rotations_across_layers": {
        "overlap_layers": (0.11, 0.2),
        "overlap_0_3": (0.02, 0.11),
        "overlap_seeds": (0.25, 0.4),
        "overlap_top_16": (0.1, 0.2),
        "effects_seeds": (0.9, 1.0),
        "effects_layers": (0.55, 0.85),
        "least_held": (0.5, 1.0),
        "most_held_random": (0.0, 0.16),
        "over_other_0_1": (0.1, 1.0),
        "over_other_1_2": (0.02, 1.0),
        "over_other_2_3": (-0.3, 0.3),
        "over_other_1_3": (-0.2, 0.1),
        "directions_1": (0.8, 0.95),
        "directions_2": (0.88, 1.0),
        "seeds_rank_1": (0.75, 1.0),
        "seeds_rank_8": (0.17, 0.35),
        "same_start": (0.38, 0.6),
        "other_start": (0.11, 0.28),
    },
    "07_when_not_to_believe_an_iia": {
        "real_test": (0.85, 1.0),
        "nothing_train": (0.6, 1.0),
        "nothing_test": (0.4, 0.58),
        "many_train": (0.42, 0.58),
        "layer_0": (0.55, 0.75),
        "layer_1": (0.88, 1.0),
        "layer_2": (0.79, 0.92),
        "layer_3": (0.64, 0.8),
        "kind_0_1": (0.5, 1.0),
        "kind_0_2": (0.0, 0.15),
        "kind_0_3": (0.0, 0.15),
        "kind_1_1": (0.6, 1.0),
        "kind_1_2": (0.55, 1.0),
        "kind_1_3": (0.0, 0.4),
        "full_2": (0.65, 0.77),
        "full_3": (0.64, 0.78),
        "iia_cross_entropy": (0.95, 1.0),
        "iia_squared_error": (0.95, 1.0),
        "agree_cross_entropy": (0.9, 1.0),
        "agree_squared_error": (0.7, 1.0),
        "right_cross_entropy": (0.65, 0.9),
        "right_squared_error": (0.0, 0.2),
        "sensed_cross_entropy": (0.2, 0.5),
        "sensed_squared_error": (0.0, 0.25),
        "mended_cross_entropy": (0.95, 1.0),
        "mended_squared_error": (0.95, 1.0),
    },
    "08_from_das_to_reft_and_back": {
        "yes_over_no": (0.7, 0.92),
        "constant": (0.6, 1.1),
        "unharmed": (0.95, 1.0),
        "iia_two": (0.87, 0.95),
        "iia_vocabulary_two": (0.68, 0.82),
        "iia_all": (0.8, 0.9),
        "iia_vocabulary_all": (0.8, 0.9),
        "write_two": (0.0, 0.35),
        "write_all": (0.55, 0.75),
        "write_means": (0.5, 0.72),
        "push_40_found_too": (0.5, 0.78),
        "push_40_found_elsewhere": (0.1, 0.5),
        "push_40_difference_too": (0.1, 0.35),
        "push_40_difference_elsewhere": (0.05, 0.45),
        "push_80_difference_too": (0.5, 0.75),
        "push_80_random_too": (0.0, 0.08),
        "fixed_found": (0.55, 0.75),
        "fixed_principal": (0.88, 1.0),
        "fixed_random": (0.0, 0.1),
        "learned_found": (0.9, 1.0),
        "learned_principal": (0.9, 1.0),
        "learned_random": (0.85, 1.0),
        "fixed_found_moved_100": (0.5, 0.75),
        "fixed_principal_moved_100": (0.76, 1.0),
        "fixed_random_moved_100": (0.6, 1.1),
        "learned_found_moved_100": (0.35, 0.6),
        "learned_principal_moved_100": (0.35, 0.6),
        "ten_steps_found": (0.25, 0.55),
        "ten_steps_principal": (0.0, 0.24),
        "near_DAS": (0.95, 1.0),
        "near_writes_found": (0.4, 0.62),
        "DAS_above_lower": (0.8, 0.9),
        "writes_found_above_lower": (0.7, 0.8),
        "writes_principal_component_above_lower": (0.68, 0.8),
        "writes_random_above_lower": (0.53, 0.68),
        "reads_found_above_lower": (0.55, 0.76),
        "reads_principal_component_above_lower": (0.6, 0.78),
        "reads_random_above_lower": (0.65, 0.79),
        "difference_of_means_above_lower": (0.79, 0.83),
        "principal_component_above_lower": (0.74, 0.8),
        "random_above_lower": (0.48, 0.52),
        "DAS_below_upper": (0.3, 0.5),
    },
    "09_your_own": {
        "own_data": (0.8, 0.92),
        "own_data_random": (0.48, 0.58),
        "comparisons_DAS_1": (0.86, 0.96),
        "comparisons_DAS_4": (0.88, 0.98),
        "comparisons_FullVector": (0.65, 0.8),
        "distance_DAS_1": (0.6, 0.77),
        "distance_DAS_4": (0.68, 0.82),
        "distance_FullVector": (0.7, 0.82),
        "flip_no_edit": (0.28, 0.41),
        "flip_mirror_midpoint": (0.86, 0.96),
        "flip_mirror_trained": (0.86, 0.97),
        "flip_LoReFT": (0.85, 0.96),
        "truth_DAS_4": (0.98, 1.0),
        "truth_SparseDAS_4_weight=0.0": (0.98, 1.0),
        "truth_SparseDAS_4_weight=0.1": (0.5, 0.9),
        "truth_RandomSubspace_4": (0.0, 0.3),
        "sparse_DAS_1": (0.8, 0.92),
        "sparse_SparseDAS_1_weight=0.03": (0.8, 0.92),
        "sparse_SparseDAS_1_weight=0.1": (0.79, 0.92),
        "sparse_SparseDAS_1_weight=0.3": (0.78, 0.9),
        "sparse_SparseDAS_1_weight=1.0": (0.62, 0.79),
        "sparse_RandomSubspace_1": (0.48, 0.58),
        "neurons_DAS_1_100": (0.28, 0.42),
        "neurons_SparseDAS_1_weight=1.0_100": (0.04, 0.16),
        "neurons_RandomSubspace_1_100": (0.22, 0.38),
        "network_right": (0.98, 1.0),
        "stage_DAS": (0.96, 1.0),
        "stage_RandomSubspace": (0.45, 0.53),
        "stage_FullVector": (0.45, 0.54),
        "attention_DAS": (0.75, 0.96),
        "by_path_DAS": (0.96, 1.0),
    },
    "10_coming_from_other_tools": {
        "patched": (1.0, 1.0),
        "DAS_0": (0.5, 0.8),
        "DAS_1": (0.85, 1.0),
        "DAS_2": (0.75, 0.97),
        "full_1": (0.6, 0.82),
        "random_1": (0.45, 0.56),
        "boundless_kept": (0.1, 0.5),
        "boundless": (0.85, 1.0),
        "own_DAS": (0.9, 1.0),
        "own_RandomSubspace": (0.45, 0.65),
        "own_FullVector": (0.93, 1.0),
        "loss_first": (5.0, 30.0),
        "loss_last": (0.0, 1.0),
        "padding": (0.0, 1e-4),
        "pyreft": (0.0, 1e-3),
        "adapters": (0.0, 1e-5),
        "switched_off": (0.0, 0.0),
        "merged": (0.0, 1e-3),
    },
    "11_smollm2_cities_and_agreement": {
        "known_country": (0.9, 1.0),
        "known_language": (0.8, 0.93),
        "known_continent": (0.85, 0.96),
        "known_all": (0.75, 0.87),
        "country_city_0": (0.4, 0.75),
        "country_city_4": (0.95, 1.0),
        "country_city_22": (0.95, 1.0),
        "country_city_23": (0.0, 0.05),
        "country_-2_12": (0.0, 0.05),
        "country_last_22": (0.0, 0.05),
        "country_last_23": (0.95, 1.0),
        "train_DAS": (0.95, 1.0),
        "train_DifferenceOfMeans": (0.9, 1.0),
        "DAS_country": (0.6, 0.85),
        "DAS_language": (0.45, 0.75),
        "DAS_continent": (0.6, 0.85),
        "DifferenceOfMeans_country": (0.4, 0.65),
        "PCA_country": (0.3, 0.55),
        **{f"RandomSubspace_{question}": (0.0, 0.05) for question in ("country", "language", "continent")},
        **{f"FullVector_{question}": (0.93, 1.0) for question in ("country", "language", "continent")},
        "MDAS_country": (0.05, 0.35),
        "MDAS_language_stays": (0.4, 0.7),
        "MDAS_continent_stays": (0.6, 0.85),
        "DAS_language_stays": (0.0, 0.3),
        "DAS_continent_stays": (0.0, 0.3),
        "number_subject_8": (0.97, 1.0),
        "number_subject_24": (0.97, 1.0),
        "number_subject_28": (0.4, 0.56),
        "number_last_24": (0.4, 0.56),
        "number_last_28": (0.93, 1.0),
        "DAS 1_24": (0.93, 1.0),
        "DifferenceOfMeans_24": (0.93, 1.0),
        "DAS 1_26": (0.88, 0.98),
        "DifferenceOfMeans_26": (0.62, 0.8),
        "FullVector_26": (0.83, 0.94),
        "PCA 1_26": (0.45, 0.55),
        "RandomSubspace 1_26": (0.45, 0.55),
        "supported": (1.0, 1.0),
    },
}


def load(path: Path) -> NotebookNode:
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell: NotebookNode) -> list[str]:
    """What a cell printed or showed, pictures left out."""
    texts = []
    for output in cell.outputs:
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [str(v) for kind, v in output.get("data", {}).items() if not kind.startswith("image/")]
    return texts


def numbers_of(notebook: NotebookNode) -> dict:
    """The JSON that the last cell prints."""
    return json.loads(code_cells(notebook)[-1].outputs[0]["text"])


@pytest.fixture(
    scope="module", params=[path for path in NOTEBOOKS if path not in STORED_ONLY], ids=lambda path: path.stem
)
def executed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, NotebookNode]:
    """A tutorial, and the same executed anew; a cell that raises fails here."""
    return request.param, execute(request.param, tmp_path_factory.mktemp("tutorial"))


def execute(path: Path, folder: Path) -> NotebookNode:
    """A tutorial executed offline by this interpreter, in an empty folder that it leaves empty."""
    from nbclient import NotebookClient

    notebook = load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        # The kernel of this interpreter, whichever ones the user has installed; pictures go into the notebook.
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
        patch.delenv("MPLBACKEND", raising=False)
        here = folder / "here"
        here.mkdir()
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(here)}}
        )
        client.execute()
    assert not list(here.iterdir())
    return notebook


def test_there_are_tutorials() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(RANGES)


def expect_in_range(path: Path, notebook: NotebookNode) -> None:
    numbers = numbers_of(notebook)
    for name, (low, high) in RANGES[path.stem].items():
        assert low <= numbers[name] <= high, name


def test_what_the_tutorial_says_is_so(executed: tuple[Path, NotebookNode]) -> None:
    expect_in_range(*executed)


@pytest.mark.parametrize("path", STORED_ONLY, ids=lambda path: path.stem)
def test_what_is_only_stored_says_what_it_found_and_would_start(path: Path) -> None:
    notebook = load(path)
    expect_in_range(path, notebook)
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                room = importlib.import_module(node.module)
                assert all(hasattr(room, alias.name) for alias in node.names), cell.id
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)


def test_what_is_stored_is_what_the_tutorial_gives(executed: tuple[Path, NotebookNode]) -> None:
    path, anew = executed
    stored = load(path)
    for name, value in numbers_of(anew).items():
        assert numbers_of(stored)[name] == (value if isinstance(value, str) else pytest.approx(value, abs=0.05))
    for cell, again in zip(code_cells(stored), code_cells(anew), strict=True):
        # A library's first word on a new machine (matplotlib builds a cache of fonts) is no output of a cell.
        kinds = [
            [(o.output_type, sorted(o.get("data", {}))) for o in c.outputs if o.output_type != "stream"]
            for c in (cell, again)
        ]
        assert kinds[0] == kinds[1], cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStored:
    def test_every_cell_was_executed_in_order_and_without_complaint(self, path: Path) -> None:
        cells = code_cells(load(path))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            for output in cell.outputs:
                assert output.output_type != "error" and output.get("name") != "stderr", cell.id

    def test_its_outputs_are_there(self, path: Path) -> None:
        shown = {kind for c in code_cells(load(path)) for o in c.outputs for kind in o.get("data", {})}
        assert {"image/png", "text/markdown"} <= shown
        assert numbers_of(load(path))

    def test_it_tells_nothing_of_the_machine(self, path: Path) -> None:
        notebook = load(path)
        for cell in notebook.cells:
            outputs = texts_of(cell) if cell.cell_type == "code" else []
            for text in (cell.source, *outputs):
                assert not MACHINE.search(text), cell.id
            for name in (getpass.getuser(), platform.node()):
                assert not any(re.search(rf"\b{re.escape(name)}\b", text) for text in outputs), cell.id

    def test_its_metadata_is_minimal(self, path: Path) -> None:
        notebook = load(path)
        assert dict(notebook.metadata) == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        assert not any(cell.metadata for cell in notebook.cells)
        assert path.stat().st_size < KILOBYTES * 1000

    def test_the_extra_installs_what_it_imports(self, path: Path) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extra = project["optional-dependencies"]["tutorials"]
        there = {re.split(r"[^\w-]", line)[0] for line in [*project["dependencies"], *extra]}
        assert "ipykernel" in there  # which brings IPython
        trees = [ast.parse(cell.source) for cell in code_cells(load(path))]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert roots - {"subspace_lab", "IPython"} <= there

    def test_its_cells_are_short_named_and_explained(self, path: Path) -> None:
        cells = load(path).cells
        assert len({cell.id for cell in cells}) == len(cells)
        assert all(re.fullmatch(r"[a-z][a-z0-9-]*", cell.id) for cell in cells)
        for before, cell in itertools.pairwise(cells):
            if cell.cell_type == "code":
                assert before.cell_type == "markdown", cell.id
                assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 15, cell.id


class TestOtherTools:
    """The code of other tools in notebook 10 runs where they are installed, and gives what the text says."""

    @pytest.fixture
    def cells(self) -> dict[Any, Any]:
        notebook = load(ROOT / "tutorials" / "10_coming_from_other_tools.ipynb")
        return {cell.id: cell.source for cell in notebook.cells}

    @pytest.fixture
    def space(self, cells: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        import torch

        threads = torch.get_num_threads()
        found: dict[str, Any] = {}
        for name in ("setup", "prompts"):
            exec(cells[name], found)
        yield found
        torch.set_num_threads(threads)

    def block(self, text: str) -> Any:
        """The only Python block of a text."""
        (found,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        return found

    def test_pyvene_gives_the_same_states_and_logits(self, cells: dict[Any, Any], space: dict[str, Any]) -> None:
        import torch

        pytest.importorskip("pyvene", reason="pyvene is not installed: pip install 'subspace-lab[benchmarks]'")
        with torch.no_grad():
            before = space["model"](**space["base"]).logits
            for text, code in (("one", "interchange"), ("one-what", "positions")):
                exec(self.block(cells[text]), space)
                theirs = space["output"].logits
                exec(cells[code], space)
                assert torch.equal(theirs, space["output"].logits) and (theirs - before).abs().max() > 1
            exec(self.block(cells["two-what"]), space)
            site = space["Site"]("block_output", 1, "last")
            ours = space["collect"](space["backbone"], space["base"], [site])[site]
            assert torch.equal(torch.cat(list(space["collected"])).reshape(ours.shape), ours)

    def test_pyvenes_trainings_run(self, cells: dict[Any, Any], space: dict[Any, Any]) -> None:
        import torch

        pytest.importorskip("pyvene", reason="pyvene is not installed: pip install 'subspace-lab[benchmarks]'")
        exec("import pyvene as pv", space)
        space |= {"batches": [(space["base"], space["source"], torch.tensor([3] * 4))], "steps": 2}
        for text in ("three-what", "four-what"):
            exec(self.block(cells[text]), space)
            assert torch.isfinite(space["loss"])

    def test_pefts_names_are_those(
        self,
        cells: dict[Any, Any],
        space: dict[Any, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        exec(self.block(cells["nine-what"]), space)
        assert "trainable params: 4,096" in capsys.readouterr().out and (tmp_path / "folder").is_dir()


class TestRun:
    """`tutorials/run.py`, which executes notebooks and stores what they give."""

    @pytest.fixture
    def run(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        for name in ("JUPYTER_PREFER_ENV_PATH", "JUPYTER_DATA_DIR", "IPYTHONDIR", "PYTHONPATH", "MPLBACKEND"):
            monkeypatch.setenv(name, "")  # so that what the script sets is undone
            monkeypatch.delenv(name)
        spec = importlib.util.spec_from_file_location("run", ROOT / "tutorials" / "run.py")
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return module

    def written(self, folder: Path, source: Any) -> Path:
        import nbformat

        cells = [nbformat.v4.new_markdown_cell("What is this?"), nbformat.v4.new_code_cell(source)]
        path = folder / "01_a.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    def test_what_a_notebook_gives_is_stored(
        self, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(run, "HERE", tmp_path)
        path = self.written(tmp_path, "import pathlib\nprint(list(pathlib.Path().iterdir()))")
        monkeypatch.setattr("sys.argv", ["run.py", "01", "--out", str(tmp_path / "new")])
        run.main()
        notebook = load(tmp_path / "new" / path.name)
        assert code_cells(notebook)[0].outputs[0]["text"] == "[]\n" and not code_cells(load(path))[0].outputs
        assert dict(notebook.metadata) == run.METADATA and not any(cell.metadata for cell in notebook.cells)
        assert f"  {code_cells(notebook)[0].id}: " in capsys.readouterr().out

    def test_a_notebook_that_fails_is_left_as_it_was(
        self, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run, "HERE", tmp_path)
        path = self.written(tmp_path, "1 / 0")
        before = path.read_bytes()
        monkeypatch.setattr("sys.argv", ["run.py", "01"])
        with pytest.raises(Exception, match="ZeroDivisionError"):
            run.main()
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    def test_an_unknown_name_is_answered_with_the_known_ones(
        self, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run, "HERE", tmp_path)
        self.written(tmp_path, "")
        with pytest.raises(SystemExit, match="'02' names 0 notebooks; there are 01_a"):
            run.found("02")


def test_paths_are_recognised_and_addresses_are_not() -> None:
    assert MACHINE.search("saved to /home/ada/x.png") and MACHINE.search(r"C:\Users\ada")
    assert not MACHINE.search("https://example.org/home/x and layers/mean and a/tmp/b")
