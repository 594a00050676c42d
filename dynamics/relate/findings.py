"""What a reader of associations and comparisons must know: one finding for each thing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.relate.directions import direction_remedy
from dynamics.text import counted, p_value, some

_NAMED = 8


def findings_of(result: xr.Dataset) -> list[Finding]:
    """Return the findings that follow from what ``associate`` or ``compare`` returns.

    >>> from dynamics.relate import associate
    >>> coords = {"run": ["a", "b", "c"], "step": [10, 20, 30]}
    >>> gini = xr.DataArray(np.random.default_rng(0).random((3, 3)), coords, ("run", "step"))
    >>> scores = gini.expand_dims(task=["accuracy"])
    >>> [finding.code for finding in findings_of(associate(xr.Dataset({"gini": gini}), scores, headline="gini"))]
    ['OD507']
    """
    if "comparison" in result.dims:
        return [*_undecidable(result), *_described(result), *_left_out(result, "group"), *_unpaired(result)]
    return [*_undecidable(result), *_left_out(result, "score or measure"), *_repeats(result), *_directions(result)]


def _undecidable(result: xr.Dataset) -> Iterator[Finding]:
    smallest, counts = result["smallest_p_adjusted"].values, result["n_units"].values
    undecided = np.isfinite(smallest) & ~result["decidable"].values
    if undecided.any():
        least, count, units = float(smallest[undecided].min()), int(undecided.sum()), int(counts[undecided].max())
        yield Finding(
            "OD507",
            f"{count} of {counted(undecided.size, 'question')} cannot be decided with "
            f"{counted(units, 'independent unit')}: the smallest possible p is {p_value(least)}.",
            "Add independent runs (other seeds, other models); more checkpoints of the same runs do not help.",
            evidence={"questions": count, "n": units, "smallest_p": least},
        )


def _described(result: xr.Dataset) -> Iterator[Finding]:
    small = (result["n_pairs"].values == 0) & (np.minimum(result["n_first"].values, result["n_second"].values) < 3)
    if small.any():
        contrasts = [str(name) for name in result["comparison"].values[small]]
        yield Finding(
            "OD507",
            f"{some(contrasts, _NAMED)}: a group has fewer than 3 runs, so the difference is described, not tested.",
            "Add independent runs (other seeds, other models), up to 4 in each group.",
            evidence={"comparisons": contrasts},
        )


def _left_out(result: xr.Dataset, lacking: str) -> Iterator[Finding]:
    runs = list(result.attrs["runs_left_out"])
    if runs:
        yield Finding(
            "OD508",
            f"{counted(len(runs), 'run')} without a {lacking} {'is' if len(runs) == 1 else 'are'} left out: "
            f"{some(runs, _NAMED)}.",
            "Give scores, measures and groups under the same names of runs.",
            evidence={"runs": runs},
        )


def _repeats(result: xr.Dataset) -> Iterator[Finding]:
    if result.attrs["repeats"]:
        yield Finding(
            "OD509",
            f"Runs count as independent, but their names look like repeats of one another: "
            f"{'; '.join(result.attrs['repeats'])}.",
            "If they share a model or data that others do not, say so with clusters={run: what it shares}.",
            evidence={"sets": list(result.attrs["repeats"])},
        )


def _directions(result: xr.Dataset) -> Iterator[Finding]:
    unknown = [str(task) for task in result["task"].values[result["direction"].values == 0]]
    if unknown:
        yield Finding(
            "OD505",
            f"Whether higher is better is unknown for {some(unknown, _NAMED)}. Their associations keep the sign of the "
            "scores as given, and the mean over tasks leaves them out.",
            direction_remedy(unknown[0]),
            evidence={"tasks": unknown},
        )


def _unpaired(result: xr.Dataset) -> Iterator[Finding]:
    runs = list(result.attrs["unpaired"])
    if runs:
        yield Finding(
            "OD511",
            f"{counted(len(runs), 'run')} without a partner in another group {'is' if len(runs) == 1 else 'are'} left "
            f"out of paired comparisons: {some(runs, _NAMED)}.",
            "Name pairs with pairs={run: label}, or compare without pairs: pairs={}.",
            evidence={"runs": runs},
        )
