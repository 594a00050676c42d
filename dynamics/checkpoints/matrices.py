"""How one matrix is built from stored tensors: products B A as their factors, dense weights as views.

Opening weights: matrices are built when they are asked for, and nothing outlives the opening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, TensorInfo, Weights
from dynamics.checkpoints.trajectory import Matrix, MatrixShape, OpenCheckpoint, UnreadableMatrix
from probes.low_rank import LowRankMatrix

#: Dtypes in which factors are analysed, finest first; anything else is packed or quantised.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Product:
    """One matrix, not yet loaded: its shape, and how to build it from a file's tensors.

    Args:
        shape: Known from the header.
        build: Gives the matrix, reading tensors with the loader it is given.
        uses_base: Whether it reads the base's weights, under keys ``"\\0" + key``.
        key: Of the one stored tensor that it is a view of; ``""`` if it is made of several.
    """

    shape: MatrixShape
    build: Callable[[Loader], Matrix]
    uses_base: bool = False
    key: str = ""


def coarser(*dtypes: str) -> str:
    """The coarsest of some dtypes.

    >>> coarser("F32", "BF16")
    'BF16'
    """
    return max(dtypes, key=FLOATS.index)


def plain(a: str, b: str, tensors: Mapping[str, TensorInfo], scale: float) -> Product:
    """s B A from the keys of its factors.

    Kernels are flattened: A ``(rank, in, *kernel)`` to ``(rank, in·kernel)``, the matrix that acts
    on unfolded patches (im2col), whose spectrum is not that of the convolution operator.
    """
    shape_a, shape_b = tensors[a].shape, tensors[b].shape
    size = tensors[a].count // shape_a[0]
    shape = MatrixShape(shape_b[0], size, shape_a[0], coarser(tensors[a].dtype, tensors[b].dtype))
    return Product(shape, partial(_load_plain, a, b, scale))


def _load_plain(a: str, b: str, scale: float, load: Loader) -> LowRankMatrix:
    return LowRankMatrix(load(b).flatten(1), load(a).flatten(1), scale)


def diagonal(a: str, b: str, e: str, tensors: Mapping[str, TensorInfo], scale: float) -> Product:
    """AdaLoRA's s B diag(E) A: E scales the columns of B, beside the factors as they are stored."""
    product = plain(a, b, tensors, scale)
    return Product(product.shape, partial(_load_diagonal, a, b, e, scale))


def _load_diagonal(a: str, b: str, e: str, scale: float, load: Loader) -> LowRankMatrix:
    return LowRankMatrix(load(b), load(a), scale, column_scale=load(e).flatten())


def expert(a: str, b: str, index: int, count: int, tensors: Mapping[str, TensorInfo], scale: float) -> Product:
    """One expert of a fused parameter.

    PEFT keeps all experts in one pair of factors: A ``(experts·rank, in)`` expert by expert, B
    ``(out, rank·experts)`` with the expert as the fastest index (``ParamWrapper.get_delta_weight``).
    """
    (rows, size), out = tensors[a].shape, tensors[b].shape[0]
    dtype = coarser(tensors[a].dtype, tensors[b].dtype)
    return Product(MatrixShape(out, size, rows // count, dtype), partial(_load_expert, a, b, index, count, scale))


def _load_expert(a: str, b: str, index: int, count: int, scale: float, load: Loader) -> LowRankMatrix:
    right, left = load(a), load(b)
    return LowRankMatrix(left[:, index::count], right.unflatten(0, (count, -1))[index], scale)


def total(parts: Mapping[str, Product]) -> Product:
    """Sum of one matrix over adapters, by stacking stored factors: ``[B₁ B₂] diag(s₁, s₂) [A₁; A₂]``.

    Factors of several dtypes are stacked in one that holds them all; no value is rounded.

    Args:
        parts: Adapter to product; ``build`` of the sum is given keys ``adapter + "\\0" + key``.
    """
    shapes = [part.shape for part in parts.values()]
    shape = MatrixShape(shapes[0].out, shapes[0].in_, sum(s.rank for s in shapes), coarser(*(s.dtype for s in shapes)))
    return Product(shape, partial(_load_total, parts))


def _load_total(parts: Mapping[str, Product], load: Loader) -> LowRankMatrix:
    loaded = [matrix for part in parts.values() if isinstance(matrix := part.build(load), LowRankMatrix)]
    assert len(loaded) == len(parts), "only products have sums"
    left = torch.cat([matrix.left_factor for matrix in loaded], dim=1)
    right = torch.cat([matrix.right_factor for matrix in loaded])
    return LowRankMatrix(left, right, column_scale=torch.cat([matrix.scales() for matrix in loaded]))


def since(now: Product, start: Product) -> Product:
    """What training changed of a product that was not zero at its start: ``[B, B₀] diag(s, −s₀) [A; A₀]``.

    Args:
        now: The product.
        start: It at the start of training, of the same size.
    """
    rank = now.shape.rank + start.shape.rank
    shape = replace(now.shape, rank=rank, dtype=coarser(now.shape.dtype, start.shape.dtype), holds="update")
    return Product(shape, partial(_load_since, now, start))


def _load_since(now: Product, start: Product, load: Loader) -> LowRankMatrix:
    matrix, before = now.build(load), start.build(load)
    assert isinstance(matrix, LowRankMatrix)
    assert isinstance(before, LowRankMatrix)
    factors = (matrix.left_factor, matrix.right_factor), (before.left_factor, before.right_factor)
    left, right = torch.cat([factors[0][0], factors[1][0]], dim=1), torch.cat([factors[0][1], factors[1][1]])
    if all(map(torch.equal, *factors)) and torch.equal(matrix.scales(), before.scales()):
        left = torch.zeros_like(left)  # the start itself: zero, not the rounding of its product
    return LowRankMatrix(left, right, column_scale=torch.cat([matrix.scales(), -before.scales()]))


def under(adapter: str, product: Product) -> Product:
    """The same product, reading from the file of a named adapter among several.

    The loader it is given understands keys ``adapter + "\\0" + key``; keys that say already which file they are of
    (of the base ``"\\0" + key``) stay as they are.
    """
    return replace(product, build=partial(_load_under, adapter, product))


def _load_under(adapter: str, product: Product, load: Loader) -> Matrix:
    return product.build(lambda key: load(key if "\0" in key else f"{adapter}\0{key}"))


def weight(key: str, shape: tuple[int, int], dtype: str, view: Callable[[Tensor], Tensor]) -> Product:
    """A dense weight, as a view ``(out, in)`` of a stored tensor.

    Args:
        key: The tensor's key.
        shape: Of the view.
        dtype: As stored.
        view: From the stored tensor to the matrix.
    """
    return Product(MatrixShape(*shape, 0, dtype, "weight"), partial(_load_weight, key, view), key=key)


def _load_weight(key: str, view: Callable[[Tensor], Tensor], load: Loader) -> Tensor:
    return view(load(key))


def turned(product: Product) -> Product:
    """The transpose of a dense matrix, as a view."""
    shape = replace(product.shape, out=product.shape.in_, in_=product.shape.out)
    return Product(shape, partial(_load_turned, product.build), product.uses_base)


def _load_turned(build: Callable[[Loader], Matrix], load: Loader) -> Tensor:
    matrix = build(load)
    assert isinstance(matrix, Tensor), "only dense matrices are turned"
    return matrix.mT


def stacked(products: Sequence[Product]) -> Product:
    """Dense matrices of one width below each other: one matrix."""
    first = products[0].shape
    dtype = coarser(*(product.shape.dtype for product in products))
    shape = replace(first, out=sum(product.shape.out for product in products), dtype=dtype)
    return Product(shape, partial(_load_stacked, [product.build for product in products]))


def _load_stacked(builds: Sequence[Callable[[Loader], Matrix]], load: Loader) -> Tensor:
    blocks = [block for build in builds if isinstance(block := build(load), Tensor)]
    assert len(blocks) == len(builds), "only dense matrices are stacked"
    return torch.cat(blocks)


def rows(product: Product, start: int, stop: int) -> Product:
    """Consecutive rows of a dense matrix, as a view."""
    return Product(replace(product.shape, out=stop - start), partial(_load_rows, product.build, start, stop))


def _load_rows(build: Callable[[Loader], Matrix], start: int, stop: int, load: Loader) -> Tensor:
    matrix = build(load)
    assert isinstance(matrix, Tensor), "only dense matrices have rows to take"
    return matrix[start:stop]


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
