"""``/path``: in how few directions each training of a run moved, all matrices together.

The Gram matrix of the updates is a sum over matrices, which are read one at a time; of dense ones a few rows of all
checkpoints at once, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.trajectory import Checkpoint, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra.dense import inner_products
from dynamics.spectra.path import PathShape, path_gram, path_shape
from probes.low_rank import LowRankMatrix

#: Bytes of all checkpoints' matrices, or of their rows in float64, that are in memory at once.
BUDGET = 2**26

_WORDS = {
    "gram": ("weight²", "inner products of the updates", "⟨ΔW_t, ΔW_u⟩ summed over matrices; NaN between trainings"),
    "distance": ("weight", "distance from the start", "‖ΔW_t‖_F over all matrices"),
    "length": ("weight", "length of the path", "Σ‖ΔW_s − ΔW_{s−1}‖_F up to t, through checkpoints, from the start"),
    "straightness": ("1", "straightness", "distance/length: 1 on a straight line"),
    "component_share": ("1", "share of a principal direction", "eigenvalue of gram over its trace, uncentred"),
    "participation_ratio": ("1", "directions the path moved in", "1/Σ share²"),
    "matrices": ("1", "number of matrices", "those that every checkpoint of the training has in one shape"),
}


def path_of(trajectory: Trajectory, progress: Callable[[int], None] = lambda done: None) -> xr.Dataset | None:
    """The path of each training that has at least two checkpoints; ``None`` if none has.

    Args:
        trajectory: The run.
        progress: Called with the number of matrices just finished.

    Returns:
        ``gram(step, step_)``, ``distance``, ``length``, ``straightness`` ``(step)``, ``component_share(training,
        component)``, ``participation_ratio`` and ``matrices`` ``(training)``, with ``segment(step)``.
    """
    segments = sorted({checkpoint.segment for checkpoint in trajectory.checkpoints})
    trainings = [[each for each in trajectory.checkpoints if each.segment == segment] for segment in segments]
    trainings = [training for training in trainings if len(training) > 1]
    if not trainings:
        return None
    found = [_path(training, [trajectory.start_of(each) for each in training], progress) for training in trainings]
    steps = [checkpoint.step for training in trainings for checkpoint in training]
    order = np.argsort(steps)
    gram = np.full((len(steps), len(steps)), np.nan)
    first = 0
    for own, _ in found:
        gram[first : first + len(own), first : first + len(own)] = own
        first += len(own)
    shapes = [path_shape(own) if matrices else _nothing(len(own)) for own, matrices in found]
    longest = max(len(own) for own, _ in found)
    arrays = {
        "gram": (("step", "step_"), gram[np.ix_(order, order)]),
        **{
            name: ("step", np.concatenate([getattr(shape, name) for shape in shapes])[order])
            for name in ("distance", "length", "straightness")
        },
        "component_share": (
            ("training", "component"),
            np.stack([_padded(shape.component_share, longest) for shape in shapes]),
        ),
        "participation_ratio": ("training", np.array([shape.participation_ratio for shape in shapes])),
        "matrices": ("training", np.array([float(matrices) for _, matrices in found])),
    }
    numbers = [checkpoint.segment for training in trainings for checkpoint in training]
    return xr.Dataset(
        {name: (dims, array, _attributes(name)) for name, (dims, array) in arrays.items()},
        coords={
            "step": np.array(steps, dtype=np.int64)[order],
            "step_": np.array(steps, dtype=np.int64)[order],
            "segment": ("step", np.array(numbers, dtype=np.int64)[order]),
            "training": np.array([training[0].segment for training in trainings], dtype=np.int64),
            "component": np.arange(longest),
        },
    )


def _path(
    training: Sequence[Checkpoint], starts: Sequence[Checkpoint | None], progress: Callable[[int], None]
) -> tuple[Float[np.ndarray, "step step"], int]:
    """The Gram matrix, and the number of matrices in it."""
    names = [name for name, shape in training[0].shapes.items() if _is_shared(name, training)]
    gram, count = np.zeros((len(training), len(training))), 0
    start = next((each for each in starts if each is not None), None)
    for some in _batches(names, training):
        # Closed after each batch: mapped files that were read count as memory until then.
        with ExitStack() as stack:
            opened = [stack.enter_context(checkpoint.open()) for checkpoint in training]
            beginning = None if start is None else stack.enter_context(start.open())
            for name in some:
                own = _of_matrix(name, opened, beginning)
                if own is not None and np.isfinite(own).all():
                    gram, count = gram + own, count + 1
                progress(1)
    return gram, count


def _batches(names: Sequence[str], training: Sequence[Checkpoint]) -> Iterator[list[str]]:
    """Matrices of which all checkpoints together hold about as much as may be in memory; each at least one."""
    some: list[str] = []
    held = 0
    for name in names:
        shapes = [checkpoint.shapes[name] for checkpoint in training]
        numbers = sum(each.rank * (each.out + each.in_) if each.rank else each.out * each.in_ for each in shapes)
        if some and held + 4 * numbers > BUDGET:
            yield some
            some, held = [], 0
        some.append(name)
        held += 4 * numbers
    if some:
        yield some


def _is_shared(name: str, training: Sequence[Checkpoint]) -> bool:
    shapes = [checkpoint.shapes.get(name) for checkpoint in training]
    kinds = {None if shape is None else (shape.out, shape.in_, bool(shape.rank), shape.holds) for shape in shapes}
    return len(kinds) == 1 and None not in kinds


def _of_matrix(
    name: str, opened: Sequence[OpenCheckpoint], beginning: OpenCheckpoint | None
) -> Float[np.ndarray, "step step"] | None:
    shape = opened[0].shapes[name]
    try:
        if shape.holds == "state":
            return None  # its totals are not known
        if shape.rank:
            return path_gram([matrix for each in opened if isinstance(matrix := each[name], LowRankMatrix)])
        start: Tensor | None = None
        if shape.holds == "weight":
            if beginning is None or name not in beginning.shapes:
                return None  # what it is counted from is not known
            before = beginning[name]
            start = before if isinstance(before, Tensor) else None
        return _of_dense([matrix for each in opened if isinstance(matrix := each[name], Tensor)], start)
    except UnreadableMatrix:
        return None  # the engine's finding names it


def _of_dense(
    weights: Sequence[Float[Tensor, "out in"]], start: Float[Tensor, "out in"] | None
) -> Float[np.ndarray, "step step"]:
    """Row by row, so that no two whole matrices are in memory in float64."""
    out, in_ = weights[0].shape
    gram = np.zeros((len(weights), len(weights)))
    rows = max(1, BUDGET // (8 * in_ * (len(weights) + 1)))
    for first in range(0, out, rows):
        last = min(first + rows, out)
        here = torch.stack([weight[first:last].to(torch.float64).flatten() for weight in weights])
        if start is not None:
            here -= start[first:last].to(torch.float64).flatten()
        gram += inner_products(here).numpy()
    return gram


def _nothing(steps: int) -> PathShape:
    return path_shape(np.full((steps, steps), np.nan))


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=np.nan)


def _attributes(name: str) -> dict[str, str]:
    units, long_name, definition = _WORDS[name]
    return {"units": units, "long_name": long_name, "definition": definition}
