"""What a reader of associations and comparisons must know: one finding for each thing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from dynamics.findings import Finding

_NAMED = 8


def association_notes(association: xr.Dataset) -> list[Finding]:
    """Findings that follow from what ``associate`` returns.

    >>> from dynamics.relate import associate
    >>> coords = {"run": ["a", "b", "c"], "step": [10, 20, 30]}
    >>> gini = xr.DataArray(np.random.default_rng(0).random((3, 3)), coords, ("run", "step"))
    >>> scores = gini.expand_dims(task=["accuracy"])
    >>> [finding.code for finding in association_notes(associate(xr.Dataset({"gini": gini}), scores, headline="gini"))]
    ['OD507']
    """
    return [
        *_undecidable(association, "n_units"),
        *_left_out(association),
        *_repeats(association),
        *_not_converged(association),
        *_directions(association),
    ]


def comparison_notes(comparison: xr.Dataset) -> list[Finding]:
    """Findings that follow from what ``compare`` returns."""
    return [
        *_undecidable(comparison, "n_units"),
        *_described(comparison),
        *_left_out(comparison),
        *_unpaired(comparison),
    ]


def _undecidable(result: xr.Dataset, units: str) -> Iterator[Finding]:
    smallest, counts = result["smallest_p_adjusted"].values, result[units].values
    weak = np.isfinite(smallest) & ~result["decidable"].values
    if weak.any():
        least, count = float(smallest[weak].min()), int(counts[weak].max())
        yield Finding(
            "OD507",
            f"{int(weak.sum())} of {weak.size} questions cannot be decided with n = {count}; the smallest possible p "
            f"that decides is {least:.2g}.",
            "More independent runs (other seeds, other models); more checkpoints of the same runs do not help.",
            evidence={"questions": int(weak.sum()), "n": count, "smallest_p": least},
        )


def _described(result: xr.Dataset) -> Iterator[Finding]:
    small = (result["n_pairs"].values == 0) & (np.minimum(result["n_first"].values, result["n_second"].values) < 3)
    if small.any():
        contrasts = [str(name) for name in result["comparison"].values[small]]
        yield Finding(
            "OD507",
            f"{', '.join(contrasts[:_NAMED])}: a group has fewer than 3 runs, and is described, not tested.",
            "More independent runs (other seeds, other models), 4 in each of two groups.",
            evidence={"comparisons": contrasts},
        )


def _left_out(result: xr.Dataset) -> Iterator[Finding]:
    runs = list(result.attrs["runs_left_out"])
    if runs:
        more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        yield Finding(
            "OD508",
            f"{len(runs)} runs are left out, which do not have both sides: {', '.join(runs[:_NAMED])}{more}.",
            "Give them scores and measures, or a group, under the same names.",
            evidence={"runs": runs},
        )


def _repeats(result: xr.Dataset) -> Iterator[Finding]:
    if result.attrs["repeats"]:
        yield Finding(
            "OD509",
            f"Runs were taken to be independent, but by their names these are repeats of one another: "
            f"{'; '.join(result.attrs['repeats'])}.",
            "If they share a model or data that others do not, say so with clusters={run: what it shares}.",
            evidence={"sets": list(result.attrs["repeats"])},
        )


def _not_converged(result: xr.Dataset) -> Iterator[Finding]:
    failed = np.isfinite(result["mixed_slope"].values) & ~result["mixed_converged"].values
    if failed.any():
        tasks = [str(task) for task in result["task"].values[failed.any(0)]]
        yield Finding(
            "OD510",
            f"The mixed model of {result.attrs['headline']} did not converge for {', '.join(tasks[:_NAMED])}.",
            "Read the permutation result instead; it does not depend on the model.",
            evidence={"tasks": tasks},
        )


def _directions(result: xr.Dataset) -> Iterator[Finding]:
    unknown = [str(task) for task in result["task"].values[result["direction"].values == 0]]
    if unknown:
        yield Finding(
            "OD505",
            f"It is not known whether higher is better for {', '.join(unknown[:_NAMED])}; signs of their associations "
            "are those of the numbers as they are, and the mean over tasks leaves them out.",
            'Say it, e.g. directions={"' + unknown[0] + '": "higher"}.',
            evidence={"tasks": unknown},
        )


def _unpaired(result: xr.Dataset) -> Iterator[Finding]:
    runs = list(result.attrs["unpaired"])
    if runs:
        more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
        yield Finding(
            "OD511",
            f"{len(runs)} runs have no partner in another group and are left out of paired comparisons: "
            f"{', '.join(runs[:_NAMED])}{more}.",
            "Name pairs with pairs={run: label}, or compare unpaired with pairs={}.",
            evidence={"runs": runs},
        )
