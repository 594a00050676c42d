"""How often the interval of a critical step holds the step of the population, and what a curve over a training shows.

python -m tests.benchmarks.sharpness [--sets 400] [--table coverage]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.benchmarks.calibration import Row, main
from tests.dynamics.intervention.quadratics import CASES, Tally, edge_of_stability, tally

#: Groups of four samples.
_GROUPS = (8, 24, 64)


def coverage(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """Whether intervals hold the population's critical step, for groups of four samples."""
    yield (
        "interval holds t_c, of those resolved (share resolved; median estimate over truth)",
        *(f"{groups} groups" for groups in _GROUPS),
    )
    for name, case in CASES.items():
        yield name, *(_words(tally(case, sets, groups, rng)) for groups in _GROUPS)


def _words(result: Tally) -> str:
    holds = "no interval" if not result.resolved.any() else f"{result.holds[result.resolved].mean():.3f}"
    return f"{holds} ({result.resolved.mean():.2f}; {np.nanmedian(result.estimate):.2f})"


def stability(_: np.random.Generator, sets: int) -> Iterator[Row]:
    """λ_c η along the gradient while a small network is trained by full-batch gradient descent, and the sharpest."""
    del sets
    starts = range(0, 1000, 200)
    yield "learning rate", "", *(f"steps {start} to {start + 200}" for start in starts), "loss at the end"
    for lr in (0.1, 0.2, 0.3, 0.4):
        group = edge_of_stability(lr, 1000).sel(task="all")
        for name, label in (("critical_sharpness", "λ_c η"), ("eigenvalue", "largest eigenvalue · η")):
            parts = (group[name].sel(step=slice(start, start + 199)) for start in starts)
            ends = f"{float(group['loss'][-1]):.4f}" if name == "eigenvalue" else ""
            yield f"{lr:g}", label, *(f"{float(lr * part.median()):.3f}" for part in parts), ends


#: Each gives a table: headings first, then its rows.
TABLES = {"coverage": coverage, "stability": stability}

if __name__ == "__main__":
    main(TABLES, __doc__, sets=400)
