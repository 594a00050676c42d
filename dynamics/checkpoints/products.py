"""How one matrix is built from stored tensors: products B A as their factors, dense weights as views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dynamics.checkpoints.trajectory import Matrix, MatrixShape
from dynamics.checkpoints.weight_files import Loader, TensorInfo
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
    """

    shape: MatrixShape
    build: Callable[[Loader], Matrix]
    uses_base: bool = False


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


def under(adapter: str, product: Product) -> Product:
    """The same product, reading from the file of a named adapter among several.

    The loader it is given understands keys ``adapter + "\\0" + key``; what is to be read from the base,
    ``"\\0" + key``, stays as it is.
    """
    return Product(product.shape, partial(_load_under, adapter, product), product.uses_base)


def _load_under(adapter: str, product: Product, load: Loader) -> Matrix:
    return product.build(lambda key: load(key if key.startswith("\0") else f"{adapter}\0{key}"))


def weight(key: str, shape: tuple[int, int], dtype: str, view: Callable[[Tensor], Tensor]) -> Product:
    """A dense weight, as a view ``(out, in)`` of a stored tensor.

    Args:
        key: The tensor's key.
        shape: Of the view.
        dtype: As stored.
        view: From the stored tensor to the matrix.
    """
    return Product(MatrixShape(*shape, 0, dtype, "weight"), partial(_load_weight, key, view))


def _load_weight(key: str, view: Callable[[Tensor], Tensor], load: Loader) -> Tensor:
    return view(load(key))
