"""The ways in which libraries write an update, by the parts that a module has: shapes, and factors of the product."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from dynamics.checkpoints.formats.factorisations import Factors, as_product, hadamard, kronecker, tucker


@dataclass(frozen=True)
class Form:
    """One way of writing an update: its parts, and how the factors are built of them.

    Args:
        shape: From the stored shapes of the parts to out, in, rank of the factors, and the r that alpha is divided by
            (0: alpha does not count). Raises ``ValueError`` if they do not fit.
        factors: From the stored tensors of the parts to the factors.
        is_derived: Whether the factors are other numbers than those stored.
    """

    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, int, int, int]]
    factors: Callable[[Mapping[str, Tensor]], Factors]
    is_derived: bool = False


def form_of(parts: Collection[str]) -> Form | None:
    """The form whose parts these are; ``None`` if it is none that is known.

    >>> form_of({"down", "up"}) is None, form_of({"down"}) is None
    (False, True)
    """
    if _is_lokr(parts):
        return Form(_lokr_shape, _lokr_factors, is_derived=True)
    return _FORMS.get(frozenset(parts))


def _expect(condition: bool) -> None:
    if not condition:
        raise ValueError


def _size(shape: tuple[int, ...]) -> int:
    """Columns of a tensor flattened to a matrix."""
    return math.prod(shape[1:])


def _plain_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    down, up = parts["down"], parts["up"]
    _expect(up[1] == down[0] and all(size == 1 for size in up[2:]))
    return up[0], _size(down), down[0], down[0]


def _plain(parts: Mapping[str, Tensor]) -> Factors:
    return parts["up"].flatten(1), parts["down"].flatten(1)


def _tucker_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    down, up, mid = parts["down"], parts["up"], parts["mid"]
    _expect(up[1] == mid[0] and down[0] == mid[1] and all(size == 1 for size in (*up[2:], *down[2:])))
    return up[0], down[1] * math.prod(mid[2:]), mid[0], down[0]


def _tucker(parts: Mapping[str, Tensor]) -> Factors:
    return tucker(parts["up"].flatten(1), parts["mid"], parts["down"].flatten(1))


def _mlx_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    a, b = parts["mlx_a"], parts["mlx_b"]
    _expect(len(a) == len(b) == 2 and a[1] == b[0])  # three dimensions: a mixture's experts, whose layout changed
    return b[1], a[0], b[0], 0


def _mlx(parts: Mapping[str, Tensor]) -> Factors:
    return parts["mlx_b"].mT, parts["mlx_a"].mT


def _loha_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    b1, a1, b2, a2 = (parts[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    _expect(b1[1] == a1[0] and b2[1] == a2[0] and b1[0] == b2[0] and _size(a1) == _size(a2))
    _expect(len(b1) == len(b2) == 2)
    return b1[0], _size(a1), a1[0] * a2[0], a1[0]


def _loha(parts: Mapping[str, Tensor]) -> Factors:
    b1, a1, b2, a2 = (parts[f"hada_{part}"].flatten(1) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return hadamard((b1, a1), (b2, a2))


def _is_lokr(parts: Collection[str]) -> bool:
    """Whether the parts are LoKr's two sides, each whole, a product, or (the second) a Tucker decomposition."""
    first = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    second = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    return any(set(parts) == one | other for one in first for other in second)


def _lokr_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    (m, n, rank1, divisor1), (p, q, rank2, divisor2) = (_side_shape(parts, side) for side in ("w1", "w2"))
    return m * p, n * q, rank1 * rank2, divisor2 or divisor1


def _side_shape(parts: Mapping[str, tuple[int, ...]], side: str) -> tuple[int, int, int, int]:
    """Rows, columns and rank of one side, and the r that alpha is divided by."""
    if f"lokr_{side}" in parts:
        shape = parts[f"lokr_{side}"]
        _expect(side == "w2" or len(shape) == 2)
        return shape[0], _size(shape), min(shape[0], _size(shape)), 0
    a, b = parts[f"lokr_{side}_a"], parts[f"lokr_{side}_b"]
    if side == "w2" and "lokr_t2" in parts:
        middle = parts["lokr_t2"]
        _expect(len(a) == len(b) == 2 and a[0] == middle[0] and b[0] == middle[1])
        return a[1], b[1] * math.prod(middle[2:]), a[0], b[0]
    _expect(len(a) == 2 and a[1] == b[0] and (side == "w2" or len(b) == 2))
    return a[0], _size(b), b[0], b[0]


def _lokr_factors(parts: Mapping[str, Tensor]) -> Factors:
    return kronecker(_side(parts, "w1"), _side(parts, "w2"))


def _side(parts: Mapping[str, Tensor], side: str) -> Factors:
    if f"lokr_{side}" in parts:
        return as_product(parts[f"lokr_{side}"].flatten(1))
    a, b = parts[f"lokr_{side}_a"], parts[f"lokr_{side}_b"]
    if side == "w2" and "lokr_t2" in parts:
        return tucker(a.mT, parts["lokr_t2"], b)
    return a, b.flatten(1)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return the change of a weight as the matrix ``(out, in)`` that dense weights are read as."""
    return tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.flatten(1)


def _dense_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    shape = parts["diff"]
    if len(shape) == 3 and shape[0] == 1:
        return shape[1], shape[2], 0, 0
    return shape[0], _size(shape), 0, 0


def _no_factors(parts: Mapping[str, Tensor]) -> Factors:
    raise AssertionError("a dense change is read as it is")


#: The change of a weight, stored whole (ComfyUI's and LyCORIS' ``diff``): no factors, and alpha does not count.
DENSE = Form(_dense_shape, _no_factors)

#: Parts → form. LoKr's parts come in several combinations.
_FORMS: Mapping[frozenset[str], Form] = {
    frozenset({"diff"}): DENSE,
    frozenset({"down", "up"}): Form(_plain_shape, _plain),
    frozenset({"down", "mid", "up"}): Form(_tucker_shape, _tucker, is_derived=True),
    frozenset({"mlx_a", "mlx_b"}): Form(_mlx_shape, _mlx),
    frozenset(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")): Form(_loha_shape, _loha, is_derived=True),
}
