"""What results mean: geometry of subspaces, comparisons, randomly initialised twins, pictures.

Knows das, reft, engine, model and core.
"""

from subspace_lab.analysis.comparisons import Comparison, compare
from subspace_lab.analysis.geometry import haar_overlap, overlap, principal_angles
from subspace_lab.analysis.plots import iia_heatmap, overlap_heatmap
from subspace_lab.analysis.twins import reinitialised

__all__ = [
    "Comparison",
    "compare",
    "haar_overlap",
    "iia_heatmap",
    "overlap",
    "overlap_heatmap",
    "principal_angles",
    "reinitialised",
]
