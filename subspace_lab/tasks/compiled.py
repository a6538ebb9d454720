"""Programs that were compiled into the weights of a stock language model: which residual columns hold which variable.

The package `torchwright` (extra `benchmarks`) writes a program as a Phi-3 checkpoint with its tokenizer and a
schematic, which says after each block which node of the program stands in which columns of the residual stream. So
the truth about every variable is known, though nothing was trained and nothing was planted by this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Axes

Homes = Mapping[str, Mapping[str, str]]
"""{variable: {name of a node of the program: the positions at which its value is the variable's}}"""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled program.

    Attributes:
        model, tokenizer: of the checkpoint, as transformers loads them.
        truth: {variable: {site: columns}}, every block's output at which the schematic has the variable, the
            earliest first. A variable that was read already may still stand there; an interchange of it then does
            nothing.
    """

    model: Any
    tokenizer: Any
    truth: Mapping[str, Mapping[Site, tuple[int, ...]]]

    def holds(self, variable: str, site: Site) -> bool:
        """Whether the schematic has the variable at a site (ValueError for a variable that it does not name)."""
        return site in self._of(variable)

    def alignment(self, variable: str) -> Alignment:
        """The variable's columns at the earliest site that holds it."""
        site, columns = next(iter(self._of(variable).items()))
        return Alignment({variable: (site, Axes(self.model.config.hidden_size, columns))})

    def _of(self, variable: str) -> Mapping[Site, tuple[int, ...]]:
        if variable not in self.truth:
            raise ValueError(f"Unknown variable {variable!r}; the program has {list(self.truth)}.")
        return self.truth[variable]


def load(folder: str | Path, homes: Homes | None = None) -> Compiled:
    """Load a checkpoint that torchwright wrote, with what its schematic says of some variables.

    Args:
        folder: as `compile_hf_bundle` wrote it.
        homes: {variable: {node name: positions}}. A program runs at every position, so the schematic cannot tell at
            which of them a node's value is the variable's. By default what was given to the compiler as
            `schematic_metadata={"variables": homes}`.

    Raises:
        ModuleNotFoundError: torchwright is not installed.
        ValueError: no variables, a node that the program does not have or that has no columns of its own.
        torchwright's SchematicValidationError: a folder without a schematic, or one that does not fit its files.
    """
    try:
        from torchwright.schematic.reader import load_schematic_bundle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Compiled programs are read by the package torchwright, which is not installed. It comes with the extra "
            "'benchmarks': pip install 'subspace-lab[benchmarks]'."
        ) from error
    schematic = load_schematic_bundle(folder).manifest
    if homes is None:
        homes = schematic.payload.get("metadata", {}).get("variables")
    if not homes:
        named = sorted({node.name for node in schematic.source_nodes() if node.name})
        raise ValueError(
            f"{folder} does not say which nodes hold variables: give homes={{variable: {{node: positions}}}}. Its "
            f"named nodes are {named}."
        )
    truth = {variable: columns_of(schematic, nodes) for variable, nodes in homes.items()}
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return Compiled(model.eval(), AutoTokenizer.from_pretrained(folder), truth)


def columns_of(schematic: Any, nodes: Mapping[str, str]) -> dict[Site, tuple[int, ...]]:
    """{block output: columns} where a schematic has one of some nodes, the earliest block first.

    Args:
        schematic: torchwright's `Schematic`.
        nodes: {node name: positions}.

    Raises:
        ValueError: a name that no node has, or several; a node that never stands in the stream.
    """
    found: dict[Site, tuple[int, ...]] = {}
    for name, positions in nodes.items():
        ids = [node.id for node in schematic.source_nodes() if node.name == name]
        if len(ids) != 1:
            named = sorted({node.name for node in schematic.source_nodes() if node.name})
            raise ValueError(f"{len(ids)} nodes are called {name!r}; needed is one. The named nodes are {named}.")
        place = schematic.realization(ids[0])
        here: dict[Site, tuple[int, ...]] = {}
        for state in schematic.residual_states():
            columns = () if place.lowered is None else state.columns.get(place.lowered, ())
            if place.slice is not None:  # a part of the columns of a larger node
                offset, width = place.slice
                columns = columns[offset : offset + width]
            layer = _layer(state.key)
            if columns and layer is not None:
                here[Site("block_output", layer, positions)] = tuple(columns)
        if not here:
            raise ValueError(
                f"The node {name!r} never stands in the residual stream: the compiler merged it away."
            )
        found |= here
    return dict(sorted(found.items(), key=lambda one: one[0].layer or 0))


def _layer(key: str) -> int | None:
    """The block after which a state of the stream is: 3 for "L3.post"; None for the input and the output."""
    return int(key[1:-5]) if key.startswith("L") and key.endswith(".post") else None
