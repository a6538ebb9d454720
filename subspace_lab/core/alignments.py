"""Alignments: where in a model the variables of a causal model are, with the evidence for it.

An alignment is {variable: (site, subspace)} and facts about where it comes from. It is the result of a search and the
input of an analysis. A ReFT adapter can start from it (`reft.get_reft_model`) and give one back
(`ReftModel.alignment`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace_lab.core import hub
from subspace_lab.core._alignment_card import card, score_text
from subspace_lab.core.arguments import instance
from subspace_lab.core.checkpoints import (
    ALIGNMENT,
    EDITS,
    FORMAT,
    Parts,
    Plan,
    check_format,
    read_tensors,
    write_described,
)
from subspace_lab.core.files import package_version, write_text
from subspace_lab.core.interventions import Intervention, interchange
from subspace_lab.core.parts import joined
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import Subspace

FILE = "alignment.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """{variable: (site, subspace)} with facts about where it comes from. It is a value: its subspaces do not train.

    Attributes:
        variables: for each variable of a causal model its site and its subspace there. Of learned subspaces the present
            state is taken. Several variables may share a site.
        facts: JSON. Any keys are possible; these are shown in the model card and in `repr`:
            "model" (its identity), "task", "data" (a fingerprint), "method", "seed", "start", "versions";
            "scores": {metric: score} on held-out pairs, where a score is a number or
            {"value", "low", "high", "n"}; "controls" and "baselines": {name: {metric: score}} on the same pairs.

    Two alignments are equal if their content is (see `__eq__`), wherever their tensors are.

    Raises:
        TypeError: variables that are not {name: (Site, Subspace)}; facts that are not JSON.
        ValueError: no variable; facts with NaN or infinity.

    >>> alignment = Alignment({"gender": (Site("block_output", 3, "last"), pca(states, 1))}, {"method": "PCA"})
    >>> forward(backbone, base, alignment.edits(), sources=collect(backbone, source, alignment.sites))
    """

    variables: Mapping[str, tuple[Site, Subspace]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        instance(self.variables, Mapping, "variables", "{variable: (site, subspace)}")
        if not self.variables:
            raise ValueError("An alignment needs at least one variable: {variable: (site, subspace)}.")
        found = {}
        for name, pair in self.variables.items():
            instance(name, str, f"The variable {name!r}")
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"Variable {name!r} is {type(pair).__name__}; needed is a pair (site, subspace).")
            instance(pair[0], Site, f"The site of {name!r}", "Site.parse('block_output[3]@last') makes one")
            instance(pair[1], Subspace, f"The subspace of {name!r}", "FixedSubspace(basis) makes one of a matrix")
            found[name] = (pair[0], pair[1].frozen())
        object.__setattr__(self, "variables", found)
        instance(self.facts, Mapping, "facts")
        try:
            facts = json.loads(json.dumps(dict(self.facts), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"The facts of an alignment must be JSON: {error}") from error
        object.__setattr__(self, "facts", facts)

    # --- variables and sites --------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the variables, each once, in their order."""
        return tuple(dict.fromkeys(site for site, _ in self.variables.values()))

    def site(self, variable: str | None = None) -> Site:
        """The site of a variable. With several variables the name is required (otherwise ValueError)."""
        return self._of(variable)[0]

    def subspace(self, variable: str | None = None) -> Subspace:
        """The subspace of a variable. With several variables the name is required (otherwise ValueError)."""
        return self._of(variable)[1]

    def at(self, site: Site) -> dict[str, Subspace]:
        """{variable: subspace} of the variables at a site. ValueError if there are none."""
        instance(site, Site, "site", "Site.parse('block_output[3]@last') makes one")
        found = {name: subspace for name, (where, subspace) in self.variables.items() if where == site}
        if not found:
            raise ValueError(f"No variable at {site}; the sites are {list(self.sites)}.")
        return found

    def only(self, *variables: str) -> Alignment:
        """The alignment of some of the variables, with the same facts. ValueError for an unknown variable."""
        return Alignment({name: self._of(name) for name in variables}, self.facts)

    def _of(self, variable: str | None) -> tuple[Site, Subspace]:
        names = list(self.variables) if variable is None else [variable]
        if len(names) != 1 or names[0] not in self.variables:
            raise ValueError(f"variable={variable!r}; this alignment has the variables {list(self.variables)}.")
        return self.variables[names[0]]

    # --- use ------------------------------------------------------------------------------------------------

    def edits(self, make: Callable[[Any], Intervention] = interchange) -> dict[Site, Intervention]:
        """{site: intervention} in the subspaces. These are copies, so training them does not change the alignment.

        Args:
            make: from a subspace to an intervention: `interchange`, `loreft`, `zero_ablation`, … If several variables
                share a site, it gets {variable: subspace}, parts of one basis.

        Raises:
            ValueError: variables at one site whose subspaces are not orthogonal (see `core.parts.joined`).
        """
        made = {}
        for site in self.sites:
            here = self.at(site)
            one = next(iter(here.values())) if len(here) == 1 else joined(here)
            made[site] = make(copy.deepcopy(one))
        return made

    def read(self, states: Mapping[Site, Tensor]) -> dict[str, Tensor]:
        """The coordinates of each variable, {variable: (…, rank)}.

        Args:
            states: {site: states of shape (…, width)}, as `collect` returns them.

        Raises:
            ValueError: a site without states, or states of another width.
        """
        instance(states, Mapping, "states", "{site: states}, as `collect` returns them")
        found = {}
        for name, (site, subspace) in self.variables.items():
            if site not in states:
                raise ValueError(f"No states at {site}, where {name!r} is; there are states at {list(states)}.")
            h = states[site]
            if h.shape[-1] != subspace.width:
                raise ValueError(
                    f"The states at {site} have width {h.shape[-1]}; {name!r} was found in width {subspace.width}."
                )
            with torch.no_grad():
                found[name] = copy.deepcopy(subspace).to(h.device).read(h)
        return found

    # --- files and the Hub ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; everything but the tensors is in its metadata."""
        described, plan = self._described()
        write_described(path, ALIGNMENT, {"subspace_lab": package_version(), **described}, plan)

    def _described(self) -> tuple[dict[str, Any], Plan]:
        plan = Plan()
        variables = [
            {"variable": name, "site": str(site), "subspace": plan.name(subspace)}
            for name, (site, subspace) in self.variables.items()
        ]
        return {"format": FORMAT, "variables": variables, "parts": plan.parts, "facts": self.facts}, plan

    def __eq__(self, other: object) -> bool:
        """Whether both would be saved alike: equal variables, sites, facts, and tensors of equal type and entries.

        Raises:
            TypeError: a subspace of a kind that cannot be saved.
        """
        if not isinstance(other, Alignment):
            return NotImplemented
        (mine, my), (theirs, their) = self._described(), other._described()
        return (
            mine == theirs
            and my.tensors.keys() == their.tensors.keys()
            and all(t.dtype == (u := their.tensors[k]).dtype and torch.equal(t, u) for k, t in my.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """The alignment that `save` wrote, equal bit by bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is broken, is no alignment, or has a newer format.
        """
        tensors, metadata = read_tensors(path)
        if ALIGNMENT not in metadata:
            raise ValueError(f"{path} is no alignment{_what_else(tensors, metadata)}")
        try:
            found = json.loads(metadata[ALIGNMENT])
            check_format(found, "an alignment")
            parts = Parts(found["parts"], tensors)
            variables = {
                one["variable"]: (Site.parse(one["site"]), parts.build(one["subspace"], Subspace))
                for one in found["variables"]
            }
            parts.check_all_used()
            return cls(variables, found["facts"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def push_to_hub(self, name: str, private: bool = False, token: str | None = None) -> str:
        """Upload the alignment to the Hub, with a model card; returns the address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder, FILE))
            write_text(Path(folder, "README.md"), self.card())
            return hub.upload_folder(Path(folder), name, private=private, token=token)

    @classmethod
    def from_hub(cls, name: str | Path, revision: str | None = None) -> Alignment:
        """The alignment of a repository on the Hub, or of a local folder. FileNotFoundError, and errors of `load`."""
        return cls.load(hub.local_folder(name, "an alignment", revision) / FILE)

    def card(self) -> str:
        """A model card in Markdown: the variables, and the scores with their controls and baselines."""
        where = [
            (name, str(site), subspace.rank, subspace.width) for name, (site, subspace) in self.variables.items()
        ]
        return card(where, self.facts)

    def __repr__(self) -> str:
        shown = [
            f"{name}: {site}, rank {subspace.rank} of {subspace.width}"
            for name, (site, subspace) in list(self.variables.items())[:3]
        ]
        more = len(self.variables) - len(shown)
        first = f"Alignment({'; '.join(shown)}{f'; and {more} more' if more else ''})"
        details = [
            str(self.facts[key])
            for key in ("method", "model", "task")
            if isinstance(self.facts.get(key), str) and self.facts[key]
        ]
        details += [f"seed {self.facts['seed']}"] if "seed" in self.facts else []
        scores = self.facts.get("scores")
        details += (
            [f"{metric} {score_text(s)}" for metric, s in scores.items()] if isinstance(scores, dict) else []
        )
        return "\n  ".join([first, ", ".join(details)] if details else [first])


def _what_else(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What a file that is no alignment contains and how to read it, as the rest of a sentence."""
    if EDITS in metadata:
        return ": it holds edits, which load_edits reads."
    if tensors and all(t.ndim == 2 and t.shape[0] <= t.shape[1] for t in tensors.values()):
        return (
            f": it holds plain matrices {sorted(tensors)[:4]}, as save_subspaces writes them. Read them with "
            "load_subspaces, and make Alignment({variable: (site, subspace)}) of them."
        )
    return ": it was not written by Alignment.save."
