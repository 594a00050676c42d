"""Gram matrices of per-sample gradients → spectral entropy, dominant ratio, concentration and task structure."""

from dynamics.fisher.dataset import concentration, fisher_measures, measure_fisher, task_structure

__all__ = ["concentration", "fisher_measures", "measure_fisher", "task_structure"]
