"""Finished numbers, drawn. Each function takes a result and returns a matplotlib ``Figure``; nothing is computed."""

from dynamics.plot.figures import figures
from dynamics.plot.gradient import gradient
from dynamics.plot.heatmap import heatmap
from dynamics.plot.hover_heatmap import hover_heatmap
from dynamics.plot.spectrum import spectrum
from dynamics.plot.svg import to_svg
from dynamics.plot.training_log import training_log
from dynamics.plot.trajectory import trajectory

__all__ = ["figures", "gradient", "heatmap", "hover_heatmap", "spectrum", "to_svg", "training_log", "trajectory"]
