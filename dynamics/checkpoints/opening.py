"""Opening weights: matrices are built when they are asked for, and nothing outlives the opening."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, Weights
from dynamics.checkpoints.matrices import Product
from dynamics.checkpoints.trajectory import Matrix, OpenCheckpoint, UnreadableMatrix
from probes.low_rank import LowRankMatrix

_CHANGED = "Its file no longer holds what its header said when the run was opened. Analyse the run again."


@contextmanager
def open_matrices(products: Mapping[str, Product], files: Mapping[str, Weights]) -> Iterator[OpenCheckpoint]:
    """Opens weights and gives the matrices that are built of them.

    Args:
        products: Name to how the matrix is built, of keys ``file + "\\0" + key``.
        files: Name of the file to the file.
    """
    shapes = {name: product.shape for name, product in products.items()}
    with ExitStack() as stack:
        loaders = {name: _opened(stack, file) for name, file in files.items()}

        def load_tensor(key: str) -> Tensor:
            file, _, inner = key.partition("\0")
            return loaders[file](inner)

        def load(name: str) -> Matrix:
            if not loaders:
                raise RuntimeError(f"The checkpoint is closed; read {name!r} inside its `with` block.")
            try:
                matrix = products[name].build(load_tensor)
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
