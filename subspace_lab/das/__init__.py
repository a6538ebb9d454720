"""Distributed alignment search: causal models, counterfactual pairs, methods, sweeps and their fits.

Knows engine, model and core.
"""

from subspace_lab.core.estimates import Estimate
from subspace_lab.das.answered import only_answered
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.counterfactuals import Prompt, Task, counterfactual_dataset
from subspace_lab.das.damage import damage
from subspace_lab.das.datafiles import load_pairs
from subspace_lab.das.encoding import encode, from_texts
from subspace_lab.das.fits import Fit, Fits, Floors, Mean
from subspace_lab.das.hypotheses import Hypothesis, rival_pairs
from subspace_lab.das.methods import (
    DAS,
    LDA,
    MDAS,
    PCA,
    BoundlessDAS,
    DifferenceOfMeans,
    FullVector,
    KMeans,
    Learner,
    Mask,
    Method,
    PathPatching,
    Probe,
    Problem,
    RandomSubspace,
    RevNet,
)
from subspace_lab.das.objectives import (
    Divergence,
    JensenShannon,
    Outcome,
    SquaredError,
    Towards,
    cause,
    complement_stays,
    cross_entropy,
    disentangle,
    iia,
    iia_vocabulary,
    iso,
    log_odds,
    logit_difference,
    logit_margin,
)
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.das.ranking import Ranking, Standing, rank_hypotheses
from subspace_lab.das.screens import Screen, Screened
from subspace_lab.das.search import default_methods, search
from subspace_lab.das.several_sites import at_several_sites
from subspace_lab.das.sweeps import SweepInterrupted, SweepUnsaved, sweep
from subspace_lab.das.workers import local_workers

__all__ = [
    "DAS",
    "LDA",
    "MDAS",
    "PCA",
    "BoundlessDAS",
    "CausalModel",
    "Counterfactuals",
    "DifferenceOfMeans",
    "Divergence",
    "Estimate",
    "Fit",
    "Fits",
    "Floors",
    "FullVector",
    "Hypothesis",
    "JensenShannon",
    "KMeans",
    "Learner",
    "Mask",
    "Mean",
    "Method",
    "Outcome",
    "Pairs",
    "PathPatching",
    "Probe",
    "Problem",
    "Prompt",
    "RandomSubspace",
    "Ranking",
    "RevNet",
    "Screen",
    "Screened",
    "SquaredError",
    "Standing",
    "SweepInterrupted",
    "SweepUnsaved",
    "Task",
    "Towards",
    "at_several_sites",
    "cause",
    "complement_stays",
    "counterfactual_dataset",
    "cross_entropy",
    "damage",
    "default_methods",
    "disentangle",
    "encode",
    "from_texts",
    "iia",
    "iia_vocabulary",
    "iso",
    "load_pairs",
    "local_workers",
    "log_odds",
    "logit_difference",
    "logit_margin",
    "only_answered",
    "rank_hypotheses",
    "rival_pairs",
    "search",
    "sweep",
]
