"""Pictures of results. They compute nothing: every number shown is read from the result."""

from subspace_lab.analysis.plots.curves import (
    edits_by_layer,
    iia_by_pairs,
    iia_by_rank,
    methods_beside,
    training_curves,
)
from subspace_lab.analysis.plots.graphs import plot_causal_model
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.plots.matrices import angle_spectrum, overlap_heatmap
from subspace_lab.analysis.plots.verdicts import verdict_plot

__all__ = [
    "angle_spectrum",
    "edits_by_layer",
    "iia_by_pairs",
    "iia_by_rank",
    "iia_heatmap",
    "methods_beside",
    "overlap_heatmap",
    "plot_causal_model",
    "training_curves",
    "verdict_plot",
]
