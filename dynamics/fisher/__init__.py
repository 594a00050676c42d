"""4: K, b and labels → spectral entropy, dominant ratio, concentration, task structure, each with interval or null."""

from dynamics.fisher.dataset import concentration, fisher_measures, measured, task_structure

__all__ = ["concentration", "fisher_measures", "measured", "task_structure"]
