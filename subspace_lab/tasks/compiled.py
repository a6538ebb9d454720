"""Programs compiled into the weights of a stock language model, so that each variable's residual columns are known.

The package `torchwright` (extra `benchmarks`) writes a program as a Phi-3 checkpoint with its tokenizer and a
schematic. The schematic says, for each block, which columns of the residual stream hold which node of the program
after it. So the truth about every variable is known, although nothing was trained, and nothing was planted by this
package.
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
"""{variable: {name of a node of the program: the positions at which its value is that of the variable}}"""


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled program.

    Attributes:
        model, tokenizer: the checkpoint, as transformers loads it.
        truth: {variable: {site: columns}}, every block output at which the schematic has the variable, the earliest
            first. A variable may still be there after it was read for the last time; exchanging it then has no effect.
    """

    model: Any
    tokenizer: Any
    truth: Mapping[str, Mapping[Site, tuple[int, ...]]]

    def holds(self, variable: str, site: Site) -> bool:
        """Whether the schematic has the variable at a site. ValueError for a variable without an entry."""
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
    """Load a checkpoint written by torchwright, and what its schematic says about some variables.

    Args:
        folder: a folder written by `compile_hf_bundle`.
        homes: {variable: {node name: positions}}. A program runs at every position, so the schematic does not say at
            which of them a node's value is that of the variable. By default it is read from the argument
            `schematic_metadata={"variables": homes}` of the compiler.

    Raises:
        ModuleNotFoundError: torchwright is not installed.
        ValueError: no variables, or a node that the program does not have or that has no columns of its own.
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
        ValueError: a name that no node or several nodes have; a node that is never in the residual stream.
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
                f"The node {name!r} is never in the residual stream: the compiler merged it into others."
            )
        found |= here
    return dict(sorted(found.items(), key=lambda one: one[0].layer or 0))


def _layer(key: str) -> int | None:
    """The block after which the stream has this state: 3 for "L3.post"; None for the input and the output."""
    return int(key[1:-5]) if key.startswith("L") and key.endswith(".post") else None
