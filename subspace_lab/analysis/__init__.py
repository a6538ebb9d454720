"""What results mean: geometry of subspaces, comparisons, twins and controls, verdicts, pictures.

Knows das, reft, engine, model and core.
"""

from subspace_lab.analysis.checking import check
from subspace_lab.analysis.comparisons import Comparison, Level, Spectra, compare, spectra
from subspace_lab.analysis.controls import control_labels, shuffled_pairs
from subspace_lab.analysis.drift import DriftCorrected, procrustes, ridge
from subspace_lab.analysis.geometry import (
    chordal,
    consensus,
    containment,
    geodesic,
    haar_angles,
    haar_largest_cosine,
    haar_overlap,
    overlap,
    principal_angles,
)
from subspace_lab.analysis.illusions import IllusionReport, illusion
from subspace_lab.analysis.looks import prepared, principal_null
from subspace_lab.analysis.measures import Measure
from subspace_lab.analysis.mediation import Mediation, carried, mediation, mediations
from subspace_lab.analysis.planting import plant
from subspace_lab.analysis.plots import angle_spectrum, iia_heatmap, overlap_heatmap, verdict_plot
from subspace_lab.analysis.purifying import purify
from subspace_lab.analysis.reft_subspaces import directions, reft_alignments
from subspace_lab.analysis.similarity import Agreement, ClassMeans, DataWeighted, Functional, Transfer
from subspace_lab.analysis.twins import (
    cascading,
    embeddings_kept,
    moment_matched,
    only_above,
    only_below,
    reinitialised,
    shuffled,
    spectrum_kept,
)
from subspace_lab.analysis.verdicts import Check, Claim, Verdict

__all__ = [
    "Agreement",
    "Check",
    "Claim",
    "ClassMeans",
    "Comparison",
    "DataWeighted",
    "DriftCorrected",
    "Functional",
    "IllusionReport",
    "Level",
    "Measure",
    "Mediation",
    "Spectra",
    "Transfer",
    "Verdict",
    "angle_spectrum",
    "carried",
    "cascading",
    "check",
    "chordal",
    "compare",
    "consensus",
    "containment",
    "control_labels",
    "directions",
    "embeddings_kept",
    "geodesic",
    "haar_angles",
    "haar_largest_cosine",
    "haar_overlap",
    "iia_heatmap",
    "illusion",
    "mediation",
    "mediations",
    "moment_matched",
    "only_above",
    "only_below",
    "overlap",
    "overlap_heatmap",
    "plant",
    "prepared",
    "principal_angles",
    "principal_null",
    "procrustes",
    "purify",
    "reft_alignments",
    "reinitialised",
    "ridge",
    "shuffled",
    "shuffled_pairs",
    "spectra",
    "spectrum_kept",
    "verdict_plot",
]
