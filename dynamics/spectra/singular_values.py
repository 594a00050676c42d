"""Singular values of matrices and of products of thin factors, in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.low_rank import LowRankMatrix

Matrix: TypeAlias = Tensor | LowRankMatrix


@overload
def singular_values(matrix: Matrix) -> Tensor: ...
@overload
def singular_values(matrix: Sequence[Matrix]) -> list[Tensor]: ...
def singular_values(matrix: Matrix | Sequence[Matrix]) -> Tensor | list[Tensor]:
    r"""Return singular values, descending, in float64 on the device of the input.

    A :class:`~probes.LowRankMatrix` is never multiplied out: with B = Q_B R_B and Aᵀ = Q_A R_A, the singular values
    of s B A are those of the small core s R_B R_Aᵀ (Golub & Van Loan). Small singular values keep all their digits
    relative to σ_1·ε, where forming the Gram matrices would lose those below σ_1·10⁻⁸. Cost 2(out + in)·rank².

    Args:
        matrix: ``(out, in)`` tensor, or low-rank matrix, or a list of either; a list is batched by shape.

    Returns:
        ``(min(out, in),)``, for a low-rank matrix ``(min(out, in, rank),)``; for a list, one tensor each. All NaN if
        the matrix holds NaN or infinity.

    Raises:
        ValueError: If a tensor is not a real matrix.

    >>> import torch
    >>> from probes import LowRankMatrix
    >>> singular_values(LowRankMatrix(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]), scale=0.5))
    tensor([5.], dtype=torch.float64)
    >>> singular_values([torch.eye(2), torch.diag(torch.tensor([1.0, 2.0]))])[1]
    tensor([2., 1.], dtype=torch.float64)
    """
    if isinstance(matrix, Tensor | LowRankMatrix):
        return _batched_singular_values([matrix])[0]
    return _batched_singular_values(matrix)


def _batched_singular_values(matrices: Sequence[Matrix]) -> list[Tensor]:
    groups: dict[tuple, list[int]] = defaultdict(list)
    for position, matrix in enumerate(matrices):
        if isinstance(matrix, LowRankMatrix):
            groups[(*matrix.shape, matrix.rank, matrix.left_factor.device)].append(position)
        elif matrix.is_complex():
            raise ValueError(f"Expected a real matrix, got one of dtype {matrix.dtype}.")
        elif matrix.ndim == 2:
            groups[(*matrix.shape, None, matrix.device)].append(position)
        else:
            raise ValueError(f"Expected a matrix of shape (out, in), got a tensor of shape {tuple(matrix.shape)}.")
    result: list[Tensor] = [torch.empty(0)] * len(matrices)
    for (_, _, rank, device), members in groups.items():
        if rank is None:
            dense = torch.stack([matrices[i].detach().to(torch.float64) for i in members])  # type: ignore[union-attr]
            values = core_singular_values(dense)
        else:
            values = core_singular_values(_cores([matrices[i] for i in members]))  # type: ignore[arg-type]
        for position, row in zip(members, values, strict=True):
            result[position] = row.to(device)
    return result


def _cores(matrices: Sequence[LowRankMatrix]) -> Float[Tensor, "batch k l"]:
    """Return R_B S R_Aᵀ of matrices of one shape and rank, on the host."""
    left, right = (
        torch.stack([factor.detach() for factor in side]).to(torch.float64)
        for side in ([m.left_factor for m in matrices], [m.right_factor for m in matrices])
    )
    scales = torch.stack([matrix.scales() for matrix in matrices])
    (of_left, _), (of_right, _) = (tall_triangle(side) for side in (left, right.mT))
    return (of_left * scales.cpu()[:, None, :]) @ of_right.mT


def triangle(tall: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch k columns"]:
    """Return R of the QR decomposition; k = min(rows, columns)."""
    return torch.linalg.qr(tall, mode="r").R


#: A triangle of a Gram is taken where the square of the smallest pivot of its scaled Cholesky factor is at least this:
#: with it a direction is off by about ε/pivot² of itself.
TRUSTED = 1e-4
#: Squared norms below this are not told from zero, and may have lost digits.
FAINT = 1e-200


def gram_triangles(
    grams: Float[Tensor, "*batch columns columns"],
) -> tuple[Float[Tensor, "*batch columns columns"], Float[Tensor, "*batch"]]:
    r"""Return R with RᵀR = XᵀX, given XᵀX on the host, and how far the columns of X are from dependent.

    The columns are brought to norm 1 before the Cholesky factorization, so that columns of very different size (a
    weight and its change) cost no digits; zero columns stay zero.

    Returns:
        The triangles, and the smallest pivot of each: 1 where columns are orthogonal, near 0 where they are dependent,
        0 where there is no factor.

    >>> gram_triangles(torch.tensor([[25.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    (tensor([[5., 0.],
            [0., 0.]], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    size = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(size > 0, size, 1.0)
    scaled = grams / unit[..., :, None] / unit[..., None, :]
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    finite, clean = _finite(scaled)
    lower, failed = torch.linalg.cholesky_ex(clean)
    pivots = torch.where(finite & (failed == 0), lower.diagonal(dim1=-2, dim2=-1).amin(-1), 0.0)
    return lower.mT * size[..., None, :], pivots


def gram_triangle(
    tall: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch columns columns"], Bool[Tensor, "*batch"]]:
    r"""Return R with RᵀR = XᵀX, on the host, from Grams formed on the device, and which of them are.

    Where columns are nearly dependent, or so small that squares vanish, the Gram no longer holds their difference, and
    those matrices go through QR.

    >>> x = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    >>> gram_triangle(x)
    (tensor([[5., 0.],
            [0., 0.]], dtype=torch.float64), tensor(True))
    """
    grams = (tall.mT @ tall).cpu()
    triangles, pivots = gram_triangles(grams)
    held = pivots.square() >= TRUSTED
    faint = grams.diagonal(dim1=-2, dim2=-1) < FAINT
    if faint.any():
        held &= ~(faint & (tall != 0).any(-2).cpu()).any(-1)
    if not held.all():
        triangles[~held] = padded_triangle(tall[~held.to(tall.device)]).cpu()
    return triangles, held


def padded_triangle(tall: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch columns columns"]:
    """Return R of the QR decomposition, square: rows of zeros where there are fewer rows than columns."""
    upper = triangle(tall)
    return torch.nn.functional.pad(upper, (0, 0, 0, upper.shape[-1] - upper.shape[-2]))


def tall_triangle(
    tall: Float[Tensor, "*batch rows columns"], *, fast: bool = False
) -> tuple[Float[Tensor, "*batch k columns"], Bool[Tensor, "*batch"]]:
    """Return R on the host, and where it comes from a Gram.

    Args:
        tall: On the CPU it is decomposed by QR, which keeps all digits; on an accelerator by :func:`gram_triangle`.
            With fewer rows than columns it has no full triangle, and goes through QR anywhere.
        fast: By :func:`gram_triangle` on the CPU as well.
    """
    rows, columns = tall.shape[-2:]
    if rows >= columns and (fast or tall.device.type != "cpu"):
        return gram_triangle(tall)
    return triangle(tall).cpu(), torch.zeros(tall.shape[:-2], dtype=torch.bool)


def dense_singular_values(dense: Float[Tensor, "rows columns"]) -> Float[Tensor, " n"]:
    """Return singular values of one large matrix, computed on its device, on the host; NaN if it is not finite."""
    if dense.device.type == "cpu" or not bool(dense.isfinite().all()):
        return core_singular_values(dense)
    try:
        return torch.linalg.svdvals(dense).cpu()
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return core_singular_values(dense)


def core_singular_values(cores: Float[Tensor, "*batch k l"]) -> Float[Tensor, "*batch n"]:
    """Return singular values of a batch of small matrices, on the host; NaN where a core is not finite.

    On the host, since the batched solvers of CUDA fall off a cliff above 32×32 and synchronise anyway.

    Raises:
        Nothing for a core that does not converge: it becomes NaN, and its neighbours are computed alone.
    """
    finite, clean = _finite(cores.cpu())
    try:
        values = torch.linalg.svdvals(clean)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        values = _one_by_one(clean)
    return values.masked_fill(~finite[..., None], torch.nan)


def _finite(
    matrices: Float[Tensor, "*batch k l"],
) -> tuple[Bool[Tensor, "*batch"], Float[Tensor, "*batch k l"]]:
    """Return which matrices are finite, and all of them with zeros in place of those that are not."""
    if not matrices.numel():
        return torch.ones(matrices.shape[:-2], dtype=torch.bool), matrices
    finite = torch.linalg.vector_norm(matrices, torch.inf, (-2, -1)).isfinite()
    return finite, matrices if finite.all() else torch.where(finite[..., None, None], matrices, 0.0)


def _one_by_one(cores: Float[Tensor, "*batch k l"]) -> Float[Tensor, "*batch n"]:
    """Return what a batched svdvals does, where a core that does not converge costs only its own row."""
    flat = cores.reshape(-1, *cores.shape[-2:])
    values = torch.full((len(flat), min(flat.shape[-2:])), torch.nan, dtype=flat.dtype)
    for index, core in enumerate(flat):
        try:
            values[index] = torch.linalg.svdvals(core)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue  # stays NaN, which the caller reports by name
    return values.reshape(*cores.shape[:-2], -1)
