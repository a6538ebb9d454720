"""The method itself: subspaces, interventions, sites, positions, and their files.

Knows no other room. The names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspace_lab.core._doors import door

if TYPE_CHECKING:
    from subspace_lab.core.alignments import Alignment
    from subspace_lab.core.checkpoints import load_edits, load_subspaces, save_edits, save_subspaces
    from subspace_lab.core.dictionaries import Dictionary
    from subspace_lab.core.estimates import Estimate, estimate
    from subspace_lab.core.interventions import (
        Intervention,
        consreft,
        direft,
        full_vector,
        interchange,
        lobireft,
        loreft,
        mean_ablation,
        noreft,
        red,
        set_to,
        steer,
        steering_vector,
        zero_ablation,
    )
    from subspace_lab.core.masks import Boundaries, Gates, Masked
    from subspace_lab.core.nonlinear import InvertibleMap
    from subspace_lab.core.parts import PartedSubspace
    from subspace_lab.core.sites import Site
    from subspace_lab.core.subspaces import (
        Axes,
        FixedSubspace,
        FreeDirections,
        LearnedSubspace,
        Subspace,
        difference_of_means,
        pca,
        random_subspace,
    )
    from subspace_lab.core.values import Affine, ByPart, Constant, Diagonal, FromSource, Value

_HOMES = {
    "alignments": ("Alignment",),
    "checkpoints": (
        "load_edits",
        "load_subspaces",
        "save_edits",
        "save_subspaces",
    ),
    "dictionaries": ("Dictionary",),
    "estimates": (
        "Estimate",
        "estimate",
    ),
    "interventions": (
        "Intervention",
        "consreft",
        "direft",
        "full_vector",
        "interchange",
        "lobireft",
        "loreft",
        "mean_ablation",
        "noreft",
        "red",
        "set_to",
        "steer",
        "steering_vector",
        "zero_ablation",
    ),
    "masks": (
        "Boundaries",
        "Gates",
        "Masked",
    ),
    "nonlinear": ("InvertibleMap",),
    "parts": ("PartedSubspace",),
    "sites": ("Site",),
    "subspaces": (
        "Axes",
        "FixedSubspace",
        "FreeDirections",
        "LearnedSubspace",
        "Subspace",
        "difference_of_means",
        "pca",
        "random_subspace",
    ),
    "values": (
        "Affine",
        "ByPart",
        "Constant",
        "Diagonal",
        "FromSource",
        "Value",
    ),
}

__all__ = [
    "Affine",
    "Alignment",
    "Axes",
    "Boundaries",
    "ByPart",
    "Constant",
    "Diagonal",
    "Dictionary",
    "Estimate",
    "FixedSubspace",
    "FreeDirections",
    "FromSource",
    "Gates",
    "Intervention",
    "InvertibleMap",
    "LearnedSubspace",
    "Masked",
    "PartedSubspace",
    "Site",
    "Subspace",
    "Value",
    "consreft",
    "difference_of_means",
    "direft",
    "estimate",
    "full_vector",
    "interchange",
    "load_edits",
    "load_subspaces",
    "lobireft",
    "loreft",
    "mean_ablation",
    "noreft",
    "pca",
    "random_subspace",
    "red",
    "save_edits",
    "save_subspaces",
    "set_to",
    "steer",
    "steering_vector",
    "zero_ablation",
]

__getattr__, __dir__ = door(__name__, _HOMES)
