"""Pictures of results. They compute nothing: every number shown is read from the result."""

from subspace_lab.analysis.plots.graphs import plot_causal_model
from subspace_lab.analysis.plots.heatmaps import iia_heatmap
from subspace_lab.analysis.plots.matrices import angle_spectrum, overlap_heatmap

__all__ = ["angle_spectrum", "iia_heatmap", "overlap_heatmap", "plot_causal_model"]
