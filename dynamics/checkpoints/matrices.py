"""How one matrix is built from stored tensors: low-rank updates as their factors, dense weights as views.

Nothing is loaded before a matrix is asked for, and nothing outlives the opening of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, Weights
from dynamics.checkpoints.trajectory import Matrix, MatrixShape, OpenCheckpoint, UnreadableMatrix
from probes.low_rank import LowRankMatrix

#: Dtypes in which matrices are analysed, finest first; any other is packed or quantised.
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorRef(NamedTuple):
    """One stored tensor.

    Args:
        file: Path of the weights that hold it (``Weights.path``).
        key: Its key there.
    """

    file: Path
    key: str


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix, not yet loaded: its shape, what it is made of, and how.

    Args:
        shape: Known from the headers of the files.
        sources: The stored tensors, or further matrices, that it is made of, by the name that ``build`` gives them.
        build: Makes the matrix of what the sources hold, given as keywords.
    """

    shape: MatrixShape
    sources: Mapping[str, TensorRef | StoredMatrix]
    build: Callable[..., Matrix]

    def load(self, read: Callable[[TensorRef], Tensor]) -> Matrix:
        """Return the matrix.

        Args:
            read: Loads a stored tensor.
        """
        loaded = {
            name: source.load(read) if isinstance(source, StoredMatrix) else read(source)
            for name, source in self.sources.items()
        }
        return self.build(**loaded)

    def reads(self, file: Path) -> bool:
        """Return whether the matrix is made of tensors of some weights, given their path."""
        return any(
            source.reads(file) if isinstance(source, StoredMatrix) else source.file == file
            for source in self.sources.values()
        )

    @property
    def key(self) -> str:
        """Key of the stored tensor that a dense weight is a view of; ``""`` for any other matrix."""
        sources = [*self.sources.values()]
        if self.shape.holds == "weight" and len(sources) == 1 and isinstance(sources[0], TensorRef):
            return sources[0].key
        return ""


@dataclass(frozen=True)
class Refusal:
    """Why an adapter, or one matrix, is not analysed."""

    code: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Remark:
    """How what is analysed must be read."""

    code: str
    message: str


@dataclass(frozen=True)
class FileContent:
    """What a format finds in the tensors of an adapter or a model.

    Args:
        matrices: Name of each matrix to how it is built, or why it is not analysed; in the model's order.
        beside: Kind of other tensors (biases, saved modules, …) to their keys.
        refusal: Why nothing of the file is analysed, if so.
        ranks: Rank of every matrix that has factors, refused or not.
        remarks: How its matrices must be read.
        sources: Name of a matrix to the base's name of it, where the two differ because layers are repeated.
        moved_start: Name of the initialisation that moved a part of the base weight into the adapter, or ``""``.
        settings: What distinguishes one training's configuration from another's.
    """

    matrices: Mapping[str, StoredMatrix | Refusal] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refusal: Refusal | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    moved_start: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def readable(self) -> dict[str, StoredMatrix]:
        """The matrices that are analysed."""
        return {name: matrix for name, matrix in self.matrices.items() if isinstance(matrix, StoredMatrix)}

    @cached_property
    def refused(self) -> dict[str, Refusal]:
        """Why the others are not."""
        return {name: matrix for name, matrix in self.matrices.items() if isinstance(matrix, Refusal)}


def coarser(*dtypes: str) -> str:
    """Return the coarsest of some dtypes.

    >>> coarser("F32", "BF16")
    'BF16'
    """
    return max(dtypes, key=FLOATS.index)


# --- factors ----------------------------------------------------------------------------------------------------------


def low_rank(file: Weights, a: str, b: str, scale: float) -> StoredMatrix:
    """Return s B A, given the keys of its factors.

    Kernels are flattened: A ``(rank, in, *kernel)`` to ``(rank, in·kernel)``, the matrix that acts
    on unfolded patches (im2col), whose spectrum is not that of the convolution operator.
    """
    info_a, info_b = file.tensors[a], file.tensors[b]
    rank = info_a.shape[0]
    shape = MatrixShape(info_b.shape[0], info_a.count // rank, rank, coarser(info_a.dtype, info_b.dtype))
    sources = {"left": TensorRef(file.path, b), "right": TensorRef(file.path, a)}
    return StoredMatrix(shape, sources, partial(_low_rank, scale=scale))


def _low_rank(left: Tensor, right: Tensor, scale: float) -> LowRankMatrix:
    return LowRankMatrix(left.flatten(1), right.flatten(1), scale)


def with_diagonal(file: Weights, a: str, b: str, e: str, scale: float) -> StoredMatrix:
    """Return AdaLoRA's s B diag(E) A: E scales the columns of B, beside the factors as they are stored."""
    product = low_rank(file, a, b, scale)
    sources = {**product.sources, "diagonal": TensorRef(file.path, e)}
    return StoredMatrix(product.shape, sources, partial(_with_diagonal, scale=scale))


def _with_diagonal(left: Tensor, right: Tensor, diagonal: Tensor, scale: float) -> LowRankMatrix:
    return LowRankMatrix(left, right, scale, column_scale=diagonal.flatten())


def expert(file: Weights, a: str, b: str, index: int, count: int, scale: float) -> StoredMatrix:
    """Return the update of one expert of a fused parameter.

    PEFT keeps all experts in one pair of factors: A ``(experts·rank, in)`` expert by expert, B
    ``(out, rank·experts)`` with the expert as the fastest index (``ParamWrapper.get_delta_weight``).
    """
    fused = low_rank(file, a, b, scale)
    shape = replace(fused.shape, rank=fused.shape.rank // count)
    return StoredMatrix(shape, fused.sources, partial(_expert, index=index, count=count, scale=scale))


def _expert(left: Tensor, right: Tensor, index: int, count: int, scale: float) -> LowRankMatrix:
    return LowRankMatrix(left[:, index::count], right.unflatten(0, (count, -1))[index], scale)


def total(parts: Mapping[str, StoredMatrix]) -> StoredMatrix:
    """Return the sum of one matrix over adapters, by stacking stored factors: ``[B₁ B₂] diag(s₁, s₂) [A₁; A₂]``.

    Factors of several dtypes are stacked in one that holds them all; no value is rounded.

    Args:
        parts: The matrix of each adapter.
    """
    shapes = [part.shape for part in parts.values()]
    dtype = coarser(*(shape.dtype for shape in shapes))
    shape = MatrixShape(shapes[0].out, shapes[0].in_, sum(shape.rank for shape in shapes), dtype)
    return StoredMatrix(shape, parts, _total)


def _total(**parts: Matrix) -> LowRankMatrix:
    matrices = [part for part in parts.values() if isinstance(part, LowRankMatrix)]
    assert len(matrices) == len(parts), "only products have sums"
    left = torch.cat([matrix.left_factor for matrix in matrices], dim=1)
    right = torch.cat([matrix.right_factor for matrix in matrices])
    return LowRankMatrix(left, right, column_scale=torch.cat([matrix.scales() for matrix in matrices]))


def since(now: StoredMatrix, start: StoredMatrix) -> StoredMatrix:
    """Return what training changed of a product that was not zero at its start: ``[B, B₀] diag(s, −s₀) [A; A₀]``.

    Args:
        now: The product.
        start: The same product at the start of training, of the same size.
    """
    rank = now.shape.rank + start.shape.rank
    shape = replace(now.shape, rank=rank, dtype=coarser(now.shape.dtype, start.shape.dtype), holds="update")
    return StoredMatrix(shape, {"now": now, "start": start}, _since)


def _since(now: LowRankMatrix, start: LowRankMatrix) -> LowRankMatrix:
    left = torch.cat([now.left_factor, start.left_factor], dim=1)
    right = torch.cat([now.right_factor, start.right_factor])
    if (
        torch.equal(now.left_factor, start.left_factor)
        and torch.equal(now.right_factor, start.right_factor)
        and torch.equal(now.scales(), start.scales())
    ):
        left = torch.zeros_like(left)  # the start itself: zero, not the rounding of its product
    return LowRankMatrix(left, right, column_scale=torch.cat([now.scales(), -start.scales()]))


# --- dense weights ----------------------------------------------------------------------------------------------------


def weight(file: Path, key: str, shape: tuple[int, int], dtype: str, view: Callable[..., Tensor]) -> StoredMatrix:
    """Return a dense weight, as a view ``(out, in)`` of a stored tensor.

    Args:
        file: Path of the weights that hold the tensor.
        key: The tensor's key.
        shape: Of the view.
        dtype: As stored.
        view: Takes the stored ``tensor`` and returns the matrix.
    """
    return StoredMatrix(MatrixShape(*shape, 0, dtype, "weight"), {"tensor": TensorRef(file, key)}, view)


def turned(matrix: StoredMatrix) -> StoredMatrix:
    """Return the transpose of a dense matrix, as a view."""
    return StoredMatrix(replace(matrix.shape, out=matrix.shape.in_, in_=matrix.shape.out), {"matrix": matrix}, _turned)


def _turned(matrix: Tensor) -> Tensor:
    return matrix.mT


def oriented(matrix: StoredMatrix, shape: MatrixShape, is_transposed: bool) -> StoredMatrix | None:
    """Return the base's matrix with the orientation of the run's; ``None`` if it has another shape.

    Args:
        matrix: The base's matrix.
        shape: Of the run's.
        is_transposed: Whether the base is known to store (in, out) where the run has (out, in).
    """
    size, size_in_run = (matrix.shape.out, matrix.shape.in_), (shape.out, shape.in_)
    if size == size_in_run and not (is_transposed and size[0] == size[1]):
        return matrix
    # A weight has the orientation of its file, whatever training made of it.
    return turned(matrix) if size[::-1] == size_in_run and shape.holds == "update" else None


def stack_blocks(blocks: Sequence[StoredMatrix]) -> StoredMatrix:
    """Return dense matrices of one width, one below the other, as one matrix."""
    dtype = coarser(*(block.shape.dtype for block in blocks))
    shape = replace(blocks[0].shape, out=sum(block.shape.out for block in blocks), dtype=dtype)
    return StoredMatrix(shape, {str(position): block for position, block in enumerate(blocks)}, _stacked)


def _stacked(**blocks: Tensor) -> Tensor:
    return torch.cat(list(blocks.values()))


def rows(matrix: StoredMatrix, start: int, stop: int) -> StoredMatrix:
    """Return consecutive rows of a dense matrix, as a view."""
    shape = replace(matrix.shape, out=stop - start)
    return StoredMatrix(shape, {"matrix": matrix}, partial(_rows, start=start, stop=stop))


def _rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    return matrix[start:stop]


# --- opening ----------------------------------------------------------------------------------------------------------

_CHANGED = "Its file no longer holds what its header said when the run was opened. Analyse the run again."


@contextmanager
def open_matrices(matrices: Mapping[str, StoredMatrix], files: Iterable[Weights]) -> Iterator[OpenCheckpoint]:
    """Open weights and give the matrices that are built of them.

    Args:
        matrices: Name to matrix.
        files: The weights that hold their tensors.
    """
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    with ExitStack() as stack:
        loaders = {file.path: _opened(stack, file) for file in files}

        def read(tensor: TensorRef) -> Tensor:
            return loaders[tensor.file](tensor.key)

        def load(name: str) -> Matrix:
            if not loaders:
                raise RuntimeError(f"The checkpoint is closed; read {name!r} inside its `with` block.")
            try:
                matrix = matrices[name].load(read)
            except UnreadableFile as error:
                raise UnreadableMatrix(str(error)) from error
            except (KeyError, ValueError, RuntimeError) as error:
                raise UnreadableMatrix(_CHANGED) from error
            rank = matrix.rank if isinstance(matrix, LowRankMatrix) else 0
            if tuple(matrix.shape) != (shapes[name].out, shapes[name].in_) or rank != shapes[name].rank:
                raise UnreadableMatrix(_CHANGED)
            return matrix

        try:
            yield OpenCheckpoint(shapes, load)
        finally:
            loaders.clear()  # nothing may keep the mapping: memory must not grow with the checkpoints


def _opened(stack: ExitStack, file: Weights) -> Loader:
    try:
        return stack.enter_context(file.open())
    except UnreadableFile as error:
        failure = error

        def load(key: str) -> Tensor:
            raise failure

        return load
