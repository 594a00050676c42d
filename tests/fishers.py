"""Results with the Fisher in them, measured from gradients whose truth is known: for what draws or tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics.fisher import measure_fisher

#: Mean gradient of each task in four common directions: two that share, one that contests, one without a mean.
MEANS: Mapping[str, Sequence[float]] = {
    "chart": (3.0, 0.0, 0.0, 0.0),
    "document": (2.4, 1.8, 0.0, 0.0),
    "grounding": (-1.8, 0.0, 2.4, 0.0),
    "noise": (0.0, 0.0, 0.0, 0.0),
}
BLOCKS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
_DIMENSION = 120


def fisher_record(
    steps: Sequence[int] = (100, 200, 300),
    means: Mapping[str, Sequence[float]] | None = None,
    *,
    groups: int = 10,
    batch_size: int = 2,
    update: str = "gradient",
    space: str = "tangent",
    seed: int = 0,
    optimizer: bool = False,
) -> xr.Dataset:
    """Raw records of K and b: per-sample gradients of two blocks and both together, and an update.

    Args:
        steps: Captured steps; the update is that of one step, and gradients are taken before it.
        means: Mean gradient of each task, in the four leading directions of each block.
        groups: Groups of each task, with one sample each.
        batch_size: The optimizer's, 0 if it is not known.
        update: ``"gradient"``: that of a batch, ``"step"``: the same through an optimizer that flattens,
            ``"leading"``: along the direction in which gradients vary most, ``"random"``, or ``"none"``: not known.
        space: That of the gradients.
        seed: Of everything.
        optimizer: Whether the optimizer that flattens is known.
    """
    means = MEANS if means is None else means
    generator = np.random.default_rng(seed)
    tasks = np.repeat(list(means), groups)
    found = [
        _of_step(generator, np.repeat(list(means.values()), groups, axis=0), progress, batch_size, update)
        for progress in range(len(steps))
    ]
    gram, product, norm, between, within = (np.stack(parts) for parts in zip(*found, strict=True))
    count = len(tasks)
    passed = {
        "plain_optimizer": ("step", np.zeros(len(steps))),
        "optimizer_gradients": ("step", np.full(len(steps), 500.0)),
        "preconditioned_product": (("step", "block", "sample", "sample_"), between),
        "preconditioned_gram": (("step", "block", "sample", "sample_"), within),
    }
    return xr.Dataset(
        {
            "gram": (("step", "block", "sample", "sample_"), gram),
            "update_product": (("step", "block", "sample"), product),
            "update_norm_squared": (("step", "block"), norm),
            "share_outside_space": (("step", "block"), np.where(np.isnan(norm), np.nan, 0.04)),
            "dimension": (("step", "block"), np.tile([_DIMENSION, _DIMENSION, 2.0 * _DIMENSION], (len(steps), 1))),
            "loss": (("step", "sample"), np.full((len(steps), count), 2.0)),
            **(passed if optimizer else {}),
        },
        coords={
            "step": np.asarray(steps, dtype=np.int64),
            "block": [*BLOCKS, "global"],
            "evaluated_at_step": ("step", np.asarray(steps, dtype=np.int64) - 1),
            "sample_task": ("sample", tasks),
            "sample_group": ("sample", [f"image-{number}" for number in range(count)]),
            "sample_id": ("sample", [f"sample-{number}" for number in range(count)]),
        },
        attrs={
            "space": space,
            "fisher": "empirical",
            "unit": "sequence",
            "reduction": "mean",
            "batch_size": batch_size,
        },
    )


def _of_step(
    generator: np.random.Generator, means: np.ndarray, progress: int, batch_size: int, update: str
) -> tuple[np.ndarray, ...]:
    """K, b and ‖δ‖² of both blocks and their sum, and K after an optimizer; the later, the fewer directions."""
    scale = np.exp(-np.arange(_DIMENSION) * (0.03 + 0.02 * progress))
    parts: list[list[np.ndarray]] = [[], [], [], [], []]
    for size in (1.0, 0.6):
        centre = np.zeros((len(means), _DIMENSION))
        centre[:, : means.shape[1]] = means
        gradients = size * (centre + scale * generator.normal(size=centre.shape))
        change = size * _change(generator, scale, centre, max(batch_size, 1), update)
        flat = gradients / np.sqrt(scale**2 + (means**2).mean(0).sum() / _DIMENSION)
        numbers = gradients @ gradients.T, gradients @ change, change @ change, gradients @ flat.T, flat @ flat.T
        for part, number in zip(parts, numbers, strict=True):
            part.append(number)
    return tuple(np.array([*part, sum(part)]) for part in parts)


def _change(
    generator: np.random.Generator, scale: np.ndarray, centre: np.ndarray, batch: int, update: str
) -> np.ndarray:
    if update == "none":
        return np.full(_DIMENSION, np.nan)
    if update == "random":
        return generator.normal(size=_DIMENSION)
    if update == "leading":
        return np.eye(_DIMENSION)[0] - 0.2 * np.eye(_DIMENSION)[2]
    chosen = centre[generator.integers(len(centre), size=batch)]
    gradient = -(chosen + scale * generator.normal(size=chosen.shape)).mean(0)
    return gradient / np.sqrt(scale**2 + (centre**2).mean(0).sum() / _DIMENSION) if update == "step" else gradient


_MEASURED: dict[str, dict[str, xr.Dataset]] = {}


def with_fisher(tree: xr.DataTree, **changes: Any) -> xr.DataTree:
    """The result with ``/fisher``, ``/concentration`` and ``/tasks`` of :func:`fisher_record` beside its groups.

    Measured once for each set of changes; what is returned is a copy.
    """
    key = repr(sorted(changes.items()))
    if key not in _MEASURED:
        _MEASURED[key] = measure_fisher(fisher_record(**changes))
    groups = {f"/{name}": group.copy(deep=True) for name, group in _MEASURED[key].items()}
    whole = xr.DataTree.from_dict({**tree.to_dict(), **groups})
    whole.attrs = dict(tree.attrs)
    return whole
