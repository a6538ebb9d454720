"""subspace_lab: where does a model represent a variable, does it use it there, and can it be edited?

The names below are enough for most experiments. They are imported when they are first used, so that `import
subspace_lab` is fast and does not import nnsight (which patches torch). There are more in `subspace_lab.das`, `.reft`,
`.analysis`, `.engine` and `.core`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspace_lab.core._doors import door

if TYPE_CHECKING:
    from subspace_lab.analysis.checking import check
    from subspace_lab.analysis.comparisons import compare
    from subspace_lab.analysis.plots import iia_heatmap, overlap_heatmap
    from subspace_lab.analysis.twins import reinitialised
    from subspace_lab.core.alignments import Alignment
    from subspace_lab.core.interventions import full_vector, interchange, loreft, set_to
    from subspace_lab.core.sites import Site
    from subspace_lab.core.subspaces import LearnedSubspace, pca, random_subspace
    from subspace_lab.das.causal_models import CausalModel
    from subspace_lab.das.encoding import from_texts
    from subspace_lab.das.fits import Fits
    from subspace_lab.das.methods import DAS, PCA, DifferenceOfMeans, FullVector, RandomSubspace
    from subspace_lab.das.pairs import Counterfactuals, Pairs
    from subspace_lab.das.search import search
    from subspace_lab.das.sweeps import sweep
    from subspace_lab.engine.training import TrainingConfig
    from subspace_lab.model.backbone import Backbone
    from subspace_lab.model.batches import Batch
    from subspace_lab.model.intervene import collect, forward, generate
    from subspace_lab.model.site_lists import list_sites
    from subspace_lab.reft.config import ReftConfig
    from subspace_lab.reft.data import tokenise
    from subspace_lab.reft.finetune import finetune
    from subspace_lab.reft.model import ReftModel, get_reft_model
    from subspace_lab.tasks import load_task

_ROOMS = {
    "core.alignments": ("Alignment",),
    "core.interventions": (
        "full_vector",
        "interchange",
        "loreft",
        "set_to",
    ),
    "core.sites": ("Site",),
    "core.subspaces": (
        "LearnedSubspace",
        "pca",
        "random_subspace",
    ),
    "model.backbone": ("Backbone",),
    "model.batches": ("Batch",),
    "model.intervene": (
        "collect",
        "forward",
        "generate",
    ),
    "model.site_lists": ("list_sites",),
    "engine.training": ("TrainingConfig",),
    "das.causal_models": ("CausalModel",),
    "das.encoding": ("from_texts",),
    "das.fits": ("Fits",),
    "das.methods": (
        "DAS",
        "PCA",
        "DifferenceOfMeans",
        "FullVector",
        "RandomSubspace",
    ),
    "das.pairs": (
        "Counterfactuals",
        "Pairs",
    ),
    "das.search": ("search",),
    "das.sweeps": ("sweep",),
    "reft.config": ("ReftConfig",),
    "reft.finetune": ("finetune",),
    "reft.data": ("tokenise",),
    "reft.model": (
        "ReftModel",
        "get_reft_model",
    ),
    "tasks": ("load_task",),
    "analysis.checking": ("check",),
    "analysis.comparisons": ("compare",),
    "analysis.plots": (
        "iia_heatmap",
        "overlap_heatmap",
    ),
    "analysis.twins": ("reinitialised",),
}
__all__ = [
    "DAS",
    "PCA",
    "Alignment",
    "Backbone",
    "Batch",
    "CausalModel",
    "Counterfactuals",
    "DifferenceOfMeans",
    "Fits",
    "FullVector",
    "LearnedSubspace",
    "Pairs",
    "RandomSubspace",
    "ReftConfig",
    "ReftModel",
    "Site",
    "TrainingConfig",
    "check",
    "collect",
    "compare",
    "finetune",
    "forward",
    "from_texts",
    "full_vector",
    "generate",
    "get_reft_model",
    "iia_heatmap",
    "interchange",
    "list_sites",
    "load_task",
    "loreft",
    "overlap_heatmap",
    "pca",
    "random_subspace",
    "reinitialised",
    "search",
    "set_to",
    "sweep",
    "tokenise",
]

__getattr__, __dir__ = door(__name__, _ROOMS)
