r"""DoRA with its base: the whole change of the weight, which is no product of thin factors.

PEFT's merged weight is \(D\,(W_0 + s B A)\) with \(D = \mathrm{diag}(m / \lVert (W_0 + s B A)_{i\cdot} \rVert)\)
(``DoraLinearVariant.merge_safe``; Liu et al. 2024), so that

\[W' - W_0 = (D - I)\,W_0 + s\,D B A.\]
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.files import Loader
from dynamics.checkpoints.matrices import Product
from dynamics.checkpoints.trajectory import MatrixShape
from probes.low_rank import LowRankMatrix

#: Rows that are worked on at once; what is needed beside the result stays small.
_ROWS = 512


def dora_update(
    weight: Float[Tensor, "out in"], matrix: LowRankMatrix, magnitude: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """W' − W₀ in float64, without the cancellation of two almost equal weights.

    Args:
        weight: The base weight.
        matrix: s B A.
        magnitude: DoRA's m, one length a row.

    >>> update = dora_update(torch.eye(2), LowRankMatrix(torch.zeros(2, 1), torch.ones(1, 2)), torch.tensor([1.0, 3.0]))
    >>> update.tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    update = torch.empty(weight.shape, dtype=torch.float64)
    left, right = matrix.left, matrix.right
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        before, change = weight[rows].to(torch.float64), left[rows] @ right
        norm = torch.linalg.vector_norm(before + change, dim=1, keepdim=True)
        wanted = magnitude[rows, None].to(torch.float64)
        update[rows] = (wanted - norm) / norm * before + wanted / norm * change
    return update


def dora(product: Product, magnitude: str, base: Product) -> Product:
    """The update of one matrix from its factors, its magnitude and its base weight.

    Args:
        product: s B A.
        magnitude: Key of DoRA's magnitude.
        base: The base weight, of the same shape.
    """
    shape = product.shape
    full = MatrixShape(shape.out, shape.in_, 0, shape.dtype)
    return Product(full, partial(_load_dora, product, magnitude, base), uses_base=True)


def _load_dora(product: Product, magnitude: str, base: Product, load: Loader) -> Tensor:
    matrix = product.build(load)
    weight = base.build(lambda key: load(f"\0{key}"))
    assert isinstance(matrix, LowRankMatrix)
    assert isinstance(weight, Tensor)
    return dora_update(weight, matrix, load(magnitude).flatten())
