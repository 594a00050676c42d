"""4: K, b and labels → spectral entropy, dominant ratio, concentration, task structure, each with interval or null."""

from dynamics.fisher.dataset import fisher_measures
from dynamics.fisher.labelled_concentration import concentration
from dynamics.fisher.labelled_tasks import task_structure
from dynamics.fisher.over_steps import measured

__all__ = ["concentration", "fisher_measures", "measured", "task_structure"]
