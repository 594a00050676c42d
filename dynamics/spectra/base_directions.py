r"""Singular directions of a weight: all of them, or the leading ones and, of the others, what a question needs.

Whether a direction d resembles any singular vector u of a weight W is asked with ε = 0.5: is |⟨d, u⟩| ≥ ε? The leading
vectors answer it for most. For what is left of d without them, of squared length m, L steps of Lanczos iteration with
WWᵀ give the orthonormal polynomials p_0 … p_{L−1} of the measure that puts ⟨d, u_i⟩²/m on the eigenvalue σ_i². By the
extremal property of Christoffel's function no point x has more than

.. math:: \lambda_L(x) = 1 \Big/ \sum_{l<L} p_l(x)^2

of it (Szegő 1939, §3.1). So where m·λ_L(x) < ε² everywhere, no singular vector is near, without one being computed.
Only what stays open is decided by the whole decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynamics.checkpoints.trajectory import Matrix
from dynamics.spectra.dense import gram_matrix
from dynamics.spectra.lanczos import leading_eigenpairs
from probes.low_rank import LowRankMatrix

#: Largest angle by which leading vectors may be off, residual over gap, and the residual that is asked for.
ANGLE, _RESIDUAL = 1e-6, 1e-10
#: Steps after which Christoffel's function is looked at, the most steps, and points for each step.
_STEPS, _MOST_STEPS, _POINTS = 8, 48, 32
#: The largest values are looked at again, this many, with so many points on either side, this often.
_CANDIDATES, _ZOOM, _ZOOMS = 48, 8, 3
#: Between those points the function may be larger: ε² is lowered by this factor.
_MARGIN = 0.8


@dataclass(frozen=True)
class BaseDecomposition:
    """All singular values and vectors of a weight, float64 on the host; vectors of σ < 1e-8 σ₁ are not resolved.

    Args:
        left: ``(out, k)``, orthonormal columns, k = min(out, in).
        values: ``(k,)``, descending.
        right: ``(in, j)``, the j ≤ k leading ones.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in j"]

    def strange(self, directions: Float[Tensor, "out n"], cosine: float) -> Bool[Tensor, " n"]:
        """Return which unit vectors have no larger cosine than this with any left singular vector."""
        return (directions.mT @ self.left).abs().amax(1) < cosine


@dataclass(frozen=True)
class LeadingDecomposition:
    """The leading singular values and vectors of a weight, and how the others are asked.

    Args:
        left: ``(out, k)``, orthonormal columns.
        values: ``(k,)``, descending.
        right: ``(in, k)``.
        weight: ``(out, in)``, as it is stored.
        product: The Gram of its shorter side.
        whole: Makes the whole decomposition.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]
    weight: Float[Tensor, "out in"] = field(repr=False)
    product: Float[Tensor, "m m"] = field(repr=False)
    whole: Callable[[], BaseDecomposition] = field(repr=False)

    def strange(self, directions: Float[Tensor, "out n"], cosine: float) -> Bool[Tensor, " n"]:
        """Return which unit vectors have no larger cosine than this with any left singular vector."""
        cosines = self.left.mT @ directions
        rest = directions - self.left @ cosines
        resembles = (cosines.abs() >= cosine).any(0)
        undecided = ~resembles & (rest.square().sum(0) >= cosine**2)
        if bool(undecided.any()):
            chosen = undecided.nonzero().flatten()
            enough = _MARGIN * cosine**2
            near = self._largest_share(rest[:, chosen], enough) >= enough
            if bool(near.any()):
                chosen = chosen[near]
                resembles[chosen] = ~self.whole().strange(directions[:, chosen], cosine)
        return ~resembles

    def _largest_share(self, rest: Float[Tensor, "out n"], enough: float) -> Float[Tensor, " n"]:
        """Return bounds of the largest squared cosine of each column with a singular vector."""
        out, in_ = self.weight.shape
        largest = float(self.values[-1]) ** 2
        if out > in_:  # what lies outside the range of W has no singular vector of the thin decomposition
            dense = self.weight.to(torch.float64)
            factor, problem = torch.linalg.cholesky_ex(self.product)
            if bool(problem):
                return torch.ones(rest.shape[1], dtype=torch.float64)
            inside = dense @ torch.cholesky_solve(dense.mT @ rest, factor)
            if float((dense.mT @ (rest - inside)).norm()) > 1e-8 * float((dense.mT @ rest).norm()):
                return torch.ones(rest.shape[1], dtype=torch.float64)
            return _largest_atoms(lambda x: dense @ (dense.mT @ x), self.left, inside, largest, enough)
        return _largest_atoms(lambda x: self.product @ x, self.left, rest, largest, enough)


def _largest_atoms(
    apply: Callable[[Tensor], Tensor],
    eigenvectors: Float[Tensor, "out k"],
    starts: Float[Tensor, "out n"],
    largest: float,
    enough: float,
) -> Float[Tensor, " n"]:
    """Return bounds of the largest part of each column's squared length that lies on one eigenvector of an operator.

    Args:
        apply: The operator, positive semi-definite.
        eigenvectors: Those that the columns are orthogonal to.
        starts: The columns.
        largest: Bound of the other eigenvalues.
        enough: Smaller bounds are not asked for.
    """
    mass = bound = starts.square().sum(0)
    basis = starts.new_empty(_MOST_STEPS, *starts.shape)
    basis[0] = starts / mass.sqrt().clamp_min(1e-300)
    middle, beside = (torch.empty(_MOST_STEPS - 1, len(mass), dtype=torch.float64) for _ in range(2))
    for step in range(_MOST_STEPS - 1):
        image = apply(basis[step])
        middle[step] = (basis[step] * image).sum(0)
        for _ in range(2):
            image = image - eigenvectors @ (eigenvectors.mT @ image)
            image = image - torch.einsum("snk,sk->nk", basis[: step + 1], (basis[: step + 1] * image).sum(1))
        beside[step] = image.square().sum(0).sqrt()
        if bool((beside[step] <= 1e-12 * largest).any()):  # the column lies in a few eigenvectors
            break
        basis[step + 1] = image / beside[step]
        if step % _STEPS == _STEPS - 1:
            bound = torch.minimum(bound, mass * _largest_christoffel(middle[: step + 1], beside[: step + 1], largest))
            if bool((bound < enough).all()):
                break
    return bound


def _largest_christoffel(
    middle: Float[Tensor, "step n"], beside: Float[Tensor, "step n"], largest: float
) -> Float[Tensor, " n"]:
    """Return the largest value of Christoffel's function from 0 to ``largest``, for each column of a recurrence."""
    # Denser at the ends, as zeros of polynomials are; and where eigenvalues have been found.
    angles = torch.linspace(0, torch.pi, _POINTS * _MOST_STEPS, dtype=torch.float64)
    grid = (largest * (1 - angles.cos()) / 2)[:, None].expand(-1, middle.shape[1])
    inner = torch.diag_embed(beside[:-1].mT, 1)
    ritz = torch.linalg.eigvalsh(torch.diag_embed(middle.mT) + inner + inner.mT).mT.clamp(0, largest)
    points, radius = torch.cat([grid, ritz]), largest * torch.pi / len(angles)
    for _ in range(_ZOOMS):
        best = _sum_of_squares(points, middle, beside).topk(_CANDIDATES, dim=0, largest=False).indices
        around = torch.linspace(-radius, radius, 2 * _ZOOM + 1, dtype=torch.float64)
        points = (points.gather(0, best)[:, None] + around[None, :, None]).flatten(0, 1).clamp(0, largest)
        radius /= _ZOOM
    return 1 / _sum_of_squares(points, middle, beside).amin(0)


def _sum_of_squares(
    points: Float[Tensor, "point n"], middle: Float[Tensor, "step n"], beside: Float[Tensor, "step n"]
) -> Float[Tensor, "point n"]:
    """Return Σ p_l(x)² of the polynomials of a three-term recurrence."""
    before, now = torch.zeros_like(points), torch.ones_like(points)
    total, last = now.square(), torch.zeros_like(middle[0])
    for centre, length in zip(middle, beside, strict=True):
        now, before, last = ((points - centre) * now - last * before) / length, now, length
        total = total + now.square()
    return total


def decompose_base(weight: Float[Tensor, "out in"]) -> BaseDecomposition:
    """Return the thin SVD of a weight, by the eigendecomposition of the Gram of its shorter side.

    Raises:
        ValueError: If it is not finite.

    >>> decompose_base(torch.diag(torch.tensor([1.0, 2.0]))).values
    tensor([2., 1.], dtype=torch.float64)
    """
    dense = _host(weight)
    if not bool(dense.isfinite().all()):
        raise ValueError("Expected a finite weight, got one with NaN or infinity.")
    tall = dense.shape[0] > dense.shape[1]
    wide = dense.mT if tall else dense
    squares, vectors = torch.linalg.eigh(gram_matrix(wide))
    values, short = squares.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
    long = torch.linalg.qr(wide.mT @ short).Q
    # QR leaves the sign of each column open.
    long = long * torch.sign((long * (wide.mT @ short)).sum(0)).where(values > 0, torch.ones(()))
    return BaseDecomposition(long, values, short) if tall else BaseDecomposition(short, values, long)


def decompose_leading(
    weight: Float[Tensor, "out in"], k: int, whole: Callable[[], BaseDecomposition] | None = None
) -> LeadingDecomposition | BaseDecomposition:
    """Return the k leading singular values and vectors; the whole decomposition where those do not converge alone.

    Args:
        weight: Finite.
        k: How many.
        whole: Makes the whole decomposition, by default :func:`decompose_base` of the weight.
    """
    whole = whole or (lambda: decompose_base(weight))
    product = gram_matrix(weight.detach().cpu())
    pairs = _leading_vectors(product, k)
    if pairs is None:
        return whole()
    values, short = pairs[0].sqrt(), pairs[1]
    tall = weight.shape[0] > weight.shape[1]
    dense = _host(weight)
    long = (dense if tall else dense.mT) @ short / values
    left, right = (long, short) if tall else (short, long)
    return LeadingDecomposition(left, values, right, weight.detach().cpu(), product, whole)


def leading_left(
    weight: Float[Tensor, "out in"], product: Float[Tensor, "m m"], update: Matrix, k: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "out k"]]:
    """Return the k largest σ² of a weight and an update together, and the left singular vectors; float64.

    Args:
        weight: ``(out, in)``, float64.
        product: The Gram of its shorter side; that of the sum differs by products of an update's factors.
        update: ``(out, in)``.
        k: How many.

    >>> weight = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> squares, left = leading_left(weight, weight @ weight.mT, torch.zeros(2, 2), 1)
    >>> squares.tolist(), left.abs().flatten().tolist()
    ([4.0], [0.0, 1.0])
    """
    tall = weight.shape[0] > weight.shape[1]
    if isinstance(update, LowRankMatrix):
        left, right = update.left.detach().cpu(), update.right.detach().cpu()
        wide, inner, outer = (weight.mT, right.mT, left.mT) if tall else (weight, left, right)
        half = (wide @ outer.mT + inner @ (outer @ outer.mT) / 2) @ inner.mT
        pairs = _leading_vectors((half + half.mT).add_(product), k)
    else:
        weight = weight + _host(update)
        pairs = _leading_vectors(gram_matrix(weight), k)
    if pairs is None:
        whole = decompose_base(weight + _host(update.to_dense()) if isinstance(update, LowRankMatrix) else weight)
        return whole.values[:k].square(), whole.left[:, :k]
    squares, short = pairs
    if not tall:
        return squares, short
    long = weight @ short
    if isinstance(update, LowRankMatrix):
        long = long + update.left.detach().cpu() @ (update.right.detach().cpu() @ short)
    return squares, long / squares.sqrt()


def _leading_vectors(product: Float[Tensor, "m m"], k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k"]] | None:
    """Return leading eigenvalues and vectors that are off by less than ``ANGLE``; ``None`` where they are not."""
    pairs = leading_eigenpairs(product, k + 1, tolerance=_RESIDUAL)
    if pairs is None or not float(pairs.values[-1]) > 1e-12 * float(pairs.values[0]):
        return None
    gap = float(-pairs.values.diff().amax())
    return (pairs.values[:k], pairs.vectors[:, :k]) if pairs.residual <= ANGLE * gap else None


def _host(weight: Tensor) -> Float[Tensor, "out in"]:
    return weight.detach().to(device="cpu", dtype=torch.float64)
