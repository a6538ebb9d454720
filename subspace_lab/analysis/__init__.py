"""What results mean: geometry of subspaces, comparisons, randomly initialised twins, pictures.

Knows das, reft, engine, model and core.
"""

from subspace_lab.analysis.comparisons import Comparison, Level, Spectra, compare, spectra
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
from subspace_lab.analysis.plots import angle_spectrum, iia_heatmap, overlap_heatmap
from subspace_lab.analysis.purifying import purify
from subspace_lab.analysis.reft_subspaces import directions, reft_alignments
from subspace_lab.analysis.similarity import Agreement, ClassMeans, DataWeighted, Functional, Transfer
from subspace_lab.analysis.twins import reinitialised

__all__ = [
    "Agreement",
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
    "angle_spectrum",
    "carried",
    "chordal",
    "compare",
    "consensus",
    "containment",
    "directions",
    "geodesic",
    "haar_angles",
    "haar_largest_cosine",
    "haar_overlap",
    "iia_heatmap",
    "illusion",
    "mediation",
    "mediations",
    "overlap",
    "overlap_heatmap",
    "prepared",
    "principal_angles",
    "principal_null",
    "procrustes",
    "purify",
    "reft_alignments",
    "reinitialised",
    "ridge",
    "spectra",
]
