"""Figures of a result: each function takes finished numbers and returns a matplotlib ``Figure``."""

from dynamics.plot.association import association
from dynamics.plot.association_grid import association_grid
from dynamics.plot.comparison import comparison
from dynamics.plot.concentration import concentration
from dynamics.plot.expert_load import expert_load
from dynamics.plot.expert_updates import expert_updates
from dynamics.plot.figures import drawings, figures
from dynamics.plot.fisher_spectrum import fisher_spectrum
from dynamics.plot.fisher_trajectory import fisher_trajectory
from dynamics.plot.gain_trajectory import gain_trajectory
from dynamics.plot.gradient import gradient
from dynamics.plot.heatmap import heatmap
from dynamics.plot.hover_heatmap import hover_heatmap
from dynamics.plot.intervention import intervention
from dynamics.plot.losses import losses
from dynamics.plot.noise_scale import noise_scale
from dynamics.plot.rarefaction import rarefaction
from dynamics.plot.routing import routing
from dynamics.plot.score_comparison import score_comparison
from dynamics.plot.score_scatter import score_scatter
from dynamics.plot.score_trajectory import scores
from dynamics.plot.sharpness import sharpness
from dynamics.plot.spectrum import spectrum
from dynamics.plot.style import to_svg
from dynamics.plot.task_matrix import task_matrix
from dynamics.plot.training_log import training_log
from dynamics.plot.trajectory import trajectory

__all__ = [
    "association",
    "association_grid",
    "comparison",
    "concentration",
    "drawings",
    "expert_load",
    "expert_updates",
    "figures",
    "fisher_spectrum",
    "fisher_trajectory",
    "gain_trajectory",
    "gradient",
    "heatmap",
    "hover_heatmap",
    "intervention",
    "losses",
    "noise_scale",
    "rarefaction",
    "routing",
    "score_comparison",
    "score_scatter",
    "scores",
    "sharpness",
    "spectrum",
    "task_matrix",
    "to_svg",
    "training_log",
    "trajectory",
]
