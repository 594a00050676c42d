"""Which runs and steps a pair of variables has in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool


@dataclass(frozen=True)
class Grid:
    """Places of runs and steps at which every one of these runs has a number at every one of these steps."""

    runs: tuple[int, ...]
    steps: tuple[int, ...]


def common_grid(present: Bool[np.ndarray, "run step"], least_steps: int) -> Grid:
    """The largest set of runs, by leaving out the sparsest first, that has ``least_steps`` steps in common.

    The run is what was repeated: a run is left out only where keeping it would leave too few steps; steps are left out
    where a kept run lacks them. Of two runs as sparse, the later one goes.

    Args:
        present: Where both variables are finite.
        least_steps: Steps that the question needs.

    Returns:
        An empty grid where not even one run has so many steps.

    >>> common_grid(np.array([[True, True, False], [True, True, True], [False, False, True]]), 2)
    Grid(runs=(0, 1), steps=(0, 1))
    """
    runs = [run for run in range(len(present)) if present[run].any()]
    while runs:
        steps = np.flatnonzero(present[runs].all(0))
        if len(steps) >= least_steps:
            return Grid(tuple(runs), tuple(steps.tolist()))
        runs.remove(min(reversed(runs), key=lambda run: int(present[run].sum())))
    return Grid((), ())
