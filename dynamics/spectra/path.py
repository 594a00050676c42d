r"""The path of a training through weight space: inner products of its updates, and what follows from them.

With D_t the update at step t, all matrices together, everything is a function of the Gram matrix of the path,

.. math:: K_{tu} = \langle D_t, D_u \rangle = \sum_{\text{matrices}} \operatorname{tr}(\Delta W_t^\top \Delta W_u)

which is a sum over matrices, so they are read one at a time. For products of factors it takes r×r blocks alone:
⟨B₁A₁, B₂A₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)).

Of dense matrices a few rows of several checkpoints are read at once. Where there are more checkpoints than files may be
open, or than fit in memory, K is formed block by block: only K itself grows with their number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import Checkpoint, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra.dense import row_products
from dynamics.spectra.workers import single_threaded_workers
from probes.low_rank import LowRankMatrix

try:
    import resource
except ImportError:  # Windows
    resource = None

#: Bytes of all open checkpoints' matrices, or of their rows in float64, that are in memory at once.
BUDGET = 2**26
#: The most checkpoints that are open at once: each takes memory beside its map.
_MOST_OPEN = 128
#: Files that the process has open anyway and may open meanwhile, and may open in all, where the system does not say.
_OTHER_FILES, _FILES = 40, 512
_SPARE_FILES = 16


@dataclass(frozen=True)
class PathShape:
    """The shape of a path, from its Gram matrix.

    Args:
        distance: ``(step,)``, ‖D_t‖: how far from the start.
        length: ``(step,)``, Σ‖D_s − D_{s−1}‖ up to t, from the start.
        straightness: ``(step,)``, distance over length: 1 on a straight line. NaN where nothing has moved.
        component_share: ``(component,)``, share of Σ‖D_t‖² along each principal direction of the path, descending; the
            start, where D = 0, is the origin: nothing is centred.
        participation_ratio: How many directions the path moved in, 1/Σ share².
        straightness_null, component_share_null, participation_ratio_null: The same of a random walk (``walk_gram``).
    """

    distance: Float[np.ndarray, " step"]
    length: Float[np.ndarray, " step"]
    straightness: Float[np.ndarray, " step"]
    component_share: Float[np.ndarray, " component"]
    participation_ratio: float
    straightness_null: Float[np.ndarray, " step"]
    component_share_null: Float[np.ndarray, " component"]
    participation_ratio_null: float


#: What a path has for each step, for each principal direction, and as a whole.
_OF_STEPS = ("distance", "length", "straightness", "straightness_null")
_OF_COMPONENTS = ("component_share", "component_share_null")
_OF_PATHS = ("participation_ratio", "participation_ratio_null")


def path_gram(
    updates: Sequence[Tensor | LowRankMatrix], others: Sequence[Tensor | LowRankMatrix] | None = None
) -> Float[np.ndarray, "step other"]:
    """Return inner products of one matrix's updates at several steps, in float64; add those of all matrices.

    Args:
        updates: One for each step, all ``(out, in)`` and all dense or all factored; ranks may differ.
        others: Updates at other steps, for a block of the Gram matrix; by default the same.

    Raises:
        ValueError: If their shapes differ, or some are factored and others not.

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> path_gram([a, b]).tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    >>> path_gram([a], [b]).tolist()
    [[1.0]]
    """
    every = [*updates, *(others or ())]
    factored = [update for update in every if isinstance(update, LowRankMatrix)]
    shapes = {tuple(update.shape) for update in every}
    if len(shapes) > 1 or 0 < len(factored) < len(every):
        kinds = "some factored and some not" if 0 < len(factored) < len(every) else f"of shapes {sorted(shapes)}"
        raise ValueError(f"Expected updates of one matrix, all factored or all dense, got updates {kinds}.")
    if not factored:
        rows = _flat(updates)
        return (row_products(rows) if others is None else rows @ _flat(others).mT).cpu().numpy()
    left, right, scales, starts = _stacked(factored[: len(updates)])
    if others is None:
        products = row_products(left) * row_products(right) * torch.outer(scales, scales)
        ends = starts
    else:
        left_, right_, scales_, ends = _stacked(factored[len(updates) :])
        products = (left @ left_.mT) * (right @ right_.mT) * torch.outer(scales, scales_)
    return np.add.reduceat(np.add.reduceat(products.cpu().numpy(), starts, axis=0), ends, axis=1)


def _flat(updates: Sequence[Tensor | LowRankMatrix]) -> Float[Tensor, "step numbers"]:
    return torch.stack([one.detach().to(torch.float64).flatten() for one in updates if isinstance(one, Tensor)])


def _stacked(
    updates: Sequence[LowRankMatrix],
) -> tuple[Float[Tensor, "columns out"], Float[Tensor, "columns in"], Float[Tensor, " columns"], np.ndarray]:
    """Return all columns of B, all rows of A and their scales, and where each update begins."""
    starts = np.cumsum([0, *(update.rank for update in updates)])
    device, (out, in_) = updates[0].left_factor.device, updates[0].shape
    left, right = (torch.empty(int(starts[-1]), n, dtype=torch.float64, device=device) for n in (out, in_))
    for first, update in zip(starts.tolist(), updates, strict=False):
        # Converted and laid out in one pass; the scales go to the small products.
        left[first : first + update.rank] = update.left_factor.detach().mT
        right[first : first + update.rank] = update.right_factor.detach()
    scales = torch.cat([update.scales() for update in updates]).to(device)
    return left, right, scales, starts[:-1]


def path_shape(gram: Float[np.ndarray, "step step"]) -> PathShape:
    r"""Return distance, length, straightness and directions of a path from the origin, beside those of a random walk.

    ‖D_t − D_{t−1}‖² = K_tt − 2K_{t,t−1} + K_{t−1,t−1}. It cancels where steps are small: below about 1e-8 of the
    distance a step is not resolved; lengths from increments themselves (``path_length``) do not have this limit.

    Args:
        gram: K over all matrices, steps ascending; NaN in it makes everything NaN.

    >>> shape = path_shape(np.array([[1.0, 1.0], [1.0, 2.0]]))  # (1, 0), then (1, 1)
    >>> shape.length.tolist(), round(float(shape.straightness[-1]), 4)
    ([1.0, 2.0], 0.7071)
    """
    steps = len(gram)
    if not np.isfinite(gram).all():
        missing = np.full(steps, np.nan)
        return PathShape(missing, missing, missing, missing, float("nan"), missing, missing, float("nan"))
    squared = np.diag(gram).clip(0)
    beside = np.diag(gram, -1)
    moved = np.concatenate([squared[:1], (squared[1:] - 2 * beside + squared[:-1]).clip(0)])
    walk = walk_gram(moved)
    distance, length = np.sqrt(squared), np.cumsum(np.sqrt(moved))
    straightness, straightness_null = (
        np.divide(reached, length, out=np.full(steps, np.nan), where=length > 0)
        for reached in (distance, np.sqrt(np.diag(walk)))
    )
    directions, of_walk = _principal_directions(gram), _principal_directions(walk)
    return PathShape(distance, length, straightness, *directions, straightness_null, *of_walk)


def walk_gram(squared_increments: Float[np.ndarray, " step"]) -> Float[np.ndarray, "step step"]:
    r"""Return inner products of the points of a random walk whose steps have given lengths.

    In a space of high dimension independent steps are orthogonal, so that

    .. math:: K_{tu} = \sum_{s \le \min(t, u)} \|\text{inc}_s\|^2

    is certain. Of many equal steps the leading direction holds 8/π² = 81 % of Σ‖D_t‖² (Antognini & Sohl-Dickstein
    2018), and the walk is √T times as long as the way from its start to its end.

    Args:
        squared_increments: ‖inc_s‖².

    >>> walk_gram(np.array([1.0, 4.0])).tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    """
    reached = np.cumsum(squared_increments)
    return np.minimum(reached[:, None], reached)


def _principal_directions(gram: Float[np.ndarray, "step step"]) -> tuple[Float[np.ndarray, " step"], float]:
    """Return the share of each principal direction, descending, and 1/Σ share²; NaN where nothing has moved."""
    energies = np.linalg.eigvalsh(gram)[::-1].clip(0) if len(gram) else np.empty(0)
    total = energies.sum()
    if not total > 0:
        return np.full(len(gram), np.nan), float("nan")
    share = energies / total
    return share, float(1 / (share**2).sum())


def training_path(
    trajectory: Trajectory, grams: Mapping[tuple[int, str], Float[np.ndarray, "step step"]] | None = None
) -> xr.Dataset | None:
    """Return the path of each training (segment) that has at least two checkpoints; ``None`` if none has.

    Args:
        trajectory: The run.
        grams: Inner products of a matrix's updates at all steps, by segment and name, where they are known already
            (``trajectory_spectra`` gives them).

    Returns:
        The group ``/path``, see ``schema.PATH``; ``step_segment(step)`` is the segment of each step.
    """
    segments: dict[int, list[Checkpoint]] = {}
    for checkpoint in trajectory.checkpoints:
        segments.setdefault(checkpoint.segment, []).append(checkpoint)
    segments = {number: segments[number] for number in sorted(segments) if len(segments[number]) > 1}
    if not segments:
        return None
    blocks = [
        _segment_gram(
            checkpoints,
            [trajectory.start_of(checkpoint) for checkpoint in checkpoints],
            {name: gram for (number, name), gram in (grams or {}).items() if number == segment},
        )
        for segment, checkpoints in segments.items()
    ]
    steps = [checkpoint.step for checkpoints in segments.values() for checkpoint in checkpoints]
    numbers = [number for number, checkpoints in segments.items() for _ in checkpoints]
    order = np.argsort(steps)
    gram = np.full((len(steps), len(steps)), np.nan)
    first = 0
    for block, _ in blocks:
        gram[first : first + len(block), first : first + len(block)] = block
        first += len(block)
    shapes = [path_shape(block if matrices else np.full_like(block, np.nan)) for block, matrices in blocks]
    longest = max(len(block) for block, _ in blocks)
    arrays = {
        "gram": gram[np.ix_(order, order)],
        **{name: np.concatenate([getattr(shape, name) for shape in shapes])[order] for name in _OF_STEPS},
        **{name: np.stack([_padded(getattr(shape, name), longest) for shape in shapes]) for name in _OF_COMPONENTS},
        **{name: np.array([getattr(shape, name) for shape in shapes]) for name in _OF_PATHS},
        "matrices": np.array([float(matrices) for _, matrices in blocks]),
    }
    ordered = np.array(steps, dtype=np.int64)[order]
    return xr.Dataset(
        schema.label_arrays(schema.PATH, arrays),
        coords={
            "step": ordered,
            "step_": ordered,
            "step_segment": ("step", np.array(numbers, dtype=np.int64)[order]),
            "segment": np.array(list(segments), dtype=np.int64),
            "component": np.arange(longest),
        },
    )


def renamed_path(path: xr.Dataset) -> xr.Dataset:
    """Return ``/path`` with the names of today: earlier versions called the dimension ``segment`` ``training``."""
    return path.rename(segment="step_segment").rename(training="segment") if "training" in path.dims else path


def _segment_gram(
    checkpoints: Sequence[Checkpoint],
    starts: Sequence[Checkpoint | None],
    solved: Mapping[str, Float[np.ndarray, "step step"]],
) -> tuple[Float[np.ndarray, "step step"], int]:
    """Return the Gram matrix of one training, and the number of matrices in it."""
    shared = [name for name in checkpoints[0].shapes if _is_shared(name, checkpoints)]
    names = [name for name in shared if name not in solved]
    weights = any(checkpoints[0].shapes[name].holds == "weight" for name in names)
    start = next((checkpoint for checkpoint in starts if checkpoint is not None), None) if weights else None
    blocks = _blocks(names, checkpoints, start)
    finite = [solved[name] for name in shared if name in solved and np.isfinite(solved[name]).all()]
    gram, count = sum(finite, np.zeros((len(checkpoints), len(checkpoints)))), len(finite)
    factored = [name for name in names if checkpoints[0].shapes[name].rank]
    dense = [name for name in names if not checkpoints[0].shapes[name].rank]
    for group in (factored, dense):
        for batch in _batches(group, checkpoints, min(len(checkpoints), 2 * blocks[0].stop)):
            # Products of factors are small: one thread each. Dense matrices are large, and few: all threads for one.
            with single_threaded_workers() if group is factored else nullcontext() as executor:
                grams = _batch_grams(batch, checkpoints, start, blocks, executor.map if executor else map)
            finite = [array for array in grams if np.isfinite(array).all()]
            gram, count = sum(finite, gram), count + len(finite)
    return gram, count


def _batch_grams(
    names: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    start: Checkpoint | None,
    blocks: Sequence[slice],
    map_: Callable[..., Iterable[Float[np.ndarray, "rows columns"] | None]],
) -> list[Float[np.ndarray, "step step"]]:
    """Return the Gram matrix of each matrix, block by block; NaN where it is not known."""
    grams = [np.zeros((len(checkpoints), len(checkpoints))) for _ in names]
    for position, rows in enumerate(blocks):
        # Closed after each batch: mapped files that were read count as memory until then.
        with ExitStack() as stack:
            beginning = None if start is None else stack.enter_context(start.open())
            first = [stack.enter_context(checkpoint.open()) for checkpoint in checkpoints[rows]]
            for columns in blocks[position:]:
                with ExitStack() as second_stack:
                    beside = [] if rows == columns else checkpoints[columns]
                    second = [second_stack.enter_context(checkpoint.open()) for checkpoint in beside] or None
                    parts = map_(partial(_matrix_gram, opened=first, others=second, beginning=beginning), names)
                    for gram, block in zip(grams, parts, strict=True):
                        gram[rows, columns] = np.nan if block is None else block
                        gram[columns, rows] = np.nan if block is None else block.T
    return grams


def _blocks(names: Sequence[str], checkpoints: Sequence[Checkpoint], start: Checkpoint | None) -> list[slice]:
    """Return groups of checkpoints of which two may be open, with one matrix's factors in memory, at the same time."""
    room = checkpoints_open_at_once(checkpoints, [start])
    largest = max((_numbers(name, checkpoints) for name in names if checkpoints[0].shapes[name].rank), default=0)
    if largest:
        room = max(2, min(room, BUDGET // (4 * largest)))
    length = len(checkpoints) if len(checkpoints) <= room else room // 2
    return [slice(first, min(first + length, len(checkpoints))) for first in range(0, len(checkpoints), length)]


def checkpoints_open_at_once(checkpoints: Sequence[Checkpoint], starts: Sequence[Checkpoint | None]) -> int:
    """Return how many checkpoints may be open at the same time, beside what they are counted from; at least two."""
    files = max(len(checkpoint.inputs) for checkpoint in checkpoints) or 1
    beside = {id(start): len(start.inputs) for start in starts if start is not None}
    return max(2, min(_MOST_OPEN, (_allowed_files() - sum(beside.values())) // files))


def _allowed_files() -> int:
    """Return how many files may be opened beside those that are open."""
    limit = _FILES if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource is not None and limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        others = len(os.listdir("/dev/fd")) + _SPARE_FILES
    except OSError:
        others = _OTHER_FILES
    return limit - others


def _numbers(name: str, checkpoints: Sequence[Checkpoint]) -> int:
    """Return the most numbers that a checkpoint holds of a matrix."""
    shapes = [checkpoint.shapes[name] for checkpoint in checkpoints]
    return max(shape.rank * (shape.out + shape.in_) if shape.rank else shape.out * shape.in_ for shape in shapes)


def _batches(names: Sequence[str], checkpoints: Sequence[Checkpoint], opened: int) -> Iterator[list[str]]:
    """Yield as many matrices as all open checkpoints together may hold in memory; at least one at a time."""
    batch: list[str] = []
    held = 0
    for name in names:
        size = 4 * opened * _numbers(name, checkpoints) + 8 * len(checkpoints) ** 2
        if batch and held + size > BUDGET:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield batch


def _is_shared(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    shapes = [checkpoint.shapes.get(name) for checkpoint in checkpoints]
    kinds = {None if shape is None else (shape.out, shape.in_, bool(shape.rank), shape.holds) for shape in shapes}
    return len(kinds) == 1 and None not in kinds


def _matrix_gram(
    name: str,
    opened: Sequence[OpenCheckpoint],
    others: Sequence[OpenCheckpoint] | None,
    beginning: OpenCheckpoint | None,
) -> Float[np.ndarray, "rows columns"] | None:
    """Return inner products between two groups of checkpoints, or within the first; ``None`` if they are not known."""
    shape = opened[0].shapes[name]
    try:
        if shape.holds == "state":
            return None  # its totals are not known
        if shape.rank:
            return path_gram(_factored(name, opened), None if others is None else _factored(name, others))
        start: Tensor | None = None
        if shape.holds == "weight":
            if beginning is None or name not in beginning.shapes:
                return None  # what it is counted from is not known
            before = beginning[name]
            start = before if isinstance(before, Tensor) else None
        return _dense_gram(_dense(name, opened), None if others is None else _dense(name, others), start)
    except UnreadableMatrix:
        return None  # the finding of trajectory_spectra names it


def _factored(name: str, opened: Sequence[OpenCheckpoint]) -> list[LowRankMatrix]:
    return [matrix for checkpoint in opened if isinstance(matrix := checkpoint[name], LowRankMatrix)]


def _dense(name: str, opened: Sequence[OpenCheckpoint]) -> list[Tensor]:
    return [matrix for checkpoint in opened if isinstance(matrix := checkpoint[name], Tensor)]


def _dense_gram(
    weights: Sequence[Float[Tensor, "out in"]],
    others: Sequence[Float[Tensor, "out in"]] | None,
    start: Float[Tensor, "out in"] | None,
) -> Float[np.ndarray, "rows columns"]:
    """Work row by row, so that no two whole matrices are in memory in float64."""
    out, in_ = weights[0].shape
    gram = np.zeros((len(weights), len(weights if others is None else others)))
    rows = max(1, BUDGET // (8 * in_ * (len(weights) + len(others or ()) + 1)))

    def updates(group: Sequence[Tensor], part: slice) -> Float[Tensor, "step numbers"]:
        numbers = torch.stack([weight[part].to(torch.float64).flatten() for weight in group])
        return numbers if start is None else numbers.sub_(start[part].to(torch.float64).flatten())

    for first in range(0, out, rows):
        part = slice(first, min(first + rows, out))
        rows_of_weights = updates(weights, part)
        gram += (
            row_products(rows_of_weights) if others is None else rows_of_weights @ updates(others, part).mT
        ).numpy()
    return gram


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=np.nan)
