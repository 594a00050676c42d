"""Trainings on quadratic losses with a known population: a new task is learnt, then overfitted; a retained one suffers.

The weights descend ½(θ − θ_train)ᵀH(θ − θ_train). The optimum of the new task lies short of θ_train, and that of the
retained task near the start: the new task's loss falls and rises again, the retained task's rises. A held-out sample
has a loss of the same form around an optimum of its own, which samples of one group share in part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

STEPS = (0, 100, 200, 300, 400, 500, 600, 700, 800)
SCALES = (0.25, 0.5, 0.75)
_SIZE = 6


@dataclass(frozen=True)
class Training:
    """A training and how its samples are drawn.

    Args:
        groups: Number of groups; each has samples of both tasks.
        samples: Samples of a group and task: all alike, or lognormal with a spread of 1.2 (``unequal``).
        noise: Standard deviation of a sample's optimum, half of whose variance is its group's.
        forgetting: How far the retained task's optimum is hurt: its curvature.
    """

    groups: int = 24
    samples: int = 4
    unequal: bool = False
    noise: float = 0.6
    overfitting: float = 0.5
    forgetting: float = 0.25

    @property
    def path(self) -> np.ndarray:
        """Return the weights at each step, then the scaled updates, ``[candidate, weight]``."""
        rate = np.array([1.5, 1.0, 0.7, 0.5, 0.3, 0.2])
        towards = 1 - np.exp(-np.array(STEPS)[:, None] / 250 * rate)
        path = towards * self._trained
        return np.concatenate([path, [scale * path[-1] for scale in SCALES]])

    @property
    def _trained(self) -> np.ndarray:
        return np.ones(_SIZE)

    def _losses(self, optima: np.ndarray, curvature: float, floor: float) -> np.ndarray:
        """Return ``[candidate, sample]`` of optima ``[sample, weight]``."""
        apart = self.path[:, None, :] - optima
        return floor + 0.5 * curvature * (apart**2).sum(-1)

    @property
    def centres(self) -> np.ndarray:
        return np.array([(1 - self.overfitting) * self._trained, -0.1 * self._trained])

    @property
    def curvatures(self) -> tuple[float, float]:
        return 1.0, self.forgetting

    @property
    def improvement(self) -> np.ndarray:
        """Return the population's share of the loss at the start that is gone, ``[candidate, (new, retained)]``."""
        spread = 0.5 * _SIZE * self.noise**2
        columns = []
        for centre, curvature in zip(self.centres, self.curvatures, strict=True):
            mean = self._losses(centre[None], curvature, 1.0 + curvature * spread)[:, 0]
            columns.append(1 - mean / mean[0])
        return np.stack(columns, axis=1)

    @property
    def value(self) -> np.ndarray:
        return self.improvement.sum(1)

    def draw(self, random: np.random.Generator) -> xr.Dataset:
        """Return the group ``/loss`` of held-out samples."""
        counts = np.full(self.groups, self.samples)
        if self.unequal:
            counts = np.maximum(1, np.round(self.samples * np.exp(1.2 * random.standard_normal(self.groups)))).astype(
                int
            )
        group = np.repeat(np.arange(self.groups), counts)
        shared = random.standard_normal((self.groups, _SIZE))[group]
        parts = []
        for centre, curvature in zip(self.centres, self.curvatures, strict=True):
            own = random.standard_normal((len(group), _SIZE))
            optima = centre + self.noise * np.sqrt(0.5) * (shared + own)
            # A sample's difficulty: the same at every candidate, alike within its group.
            level = 0.3 * (random.standard_normal(self.groups)[group] + random.standard_normal(len(group)))
            parts.append(self._losses(optima, curvature, 1.0 + level))
        losses = np.concatenate(parts, axis=1)
        names = [str(number) for number in group]
        return losses_of(losses[: len(STEPS)], losses[len(STEPS) :], np.repeat(["vqa", "wiki"], len(group)), names * 2)


def losses_of(losses, scaled, of_sample, groups, *, steps=STEPS, retained=("wiki",)) -> xr.Dataset:
    """Return the group ``/loss`` from losses ``[step, sample]`` and of scaled updates ``[scale, sample]``."""
    tasks = list(dict.fromkeys(of_sample))
    coords = {
        "step": list(steps),
        "task": tasks,
        "retained": ("task", [task in retained for task in tasks]),
        "sample_task": ("sample", np.array(of_sample, dtype=str)),
        "sample_group": ("sample", np.array(groups, dtype=str)),
    }
    dataset = xr.Dataset({"sample_loss": (("step", "sample"), losses)}, coords)
    if scaled is not None:
        dataset = dataset.assign_coords(scale=list(SCALES)).assign(scaled_loss=(("scale", "sample"), scaled))
    return dataset.assign_attrs(start_step=steps[0], scaled_step=steps[-1])
