r"""The rounding floor: how much of an update is the storage format's noise.

A factor stored in a format with p significand bits is off by up to half a unit in the last place, so its entries
carry independent noise of variance ulp²/12. To first order the product s(B + E_B)(A + E_A) then carries the energy

.. math:: \sum_k s_k^2 \Big(\|A_k\|^2 \sum_i \tfrac{\mathrm{ulp}(B_{ik})^2}{12}
          + \|B_k\|^2 \sum_j \tfrac{\mathrm{ulp}(A_{kj})^2}{12}\Big)

over rows k of A and columns k of B. An increment carries that of both its ends. The prediction is an upper estimate
where entries did not change at all between two checkpoints (their rounding error then cancels).

A dense weight carries the noise itself. Where its rows or columns differ in scale so does the noise, and the largest
singular value of noise with variances v_ij is at most about

.. math:: \sqrt{\max_i \sum_j v_{ij}} + \sqrt{\max_j \sum_i v_{ij}}

(Bandeira & van Handel 2016; for equal variances the edge of Marchenko & Pastur).

The difference of two stored weights carries the noise of both, so noise alone has singular values up to that edge. What
lies beyond it is counted. Noise of mean variance ν adds about ν·max(out, in) to each σ², so the entropy above rounding
is that of σ² − ν·max(out, in) over the σ beyond the edge. The edge is conservative: weak directions can lie below it.
Where most entries did not change at all the noise is over-predicted. A product of rounded factors has no edge: NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import xlogy
from torch import Tensor

from probes.low_rank import LowRankMatrix

#: Above this predicted share of noise energy an update is flagged ``quantisation_limited``.
NOISE_LIMIT = 0.1

#: Numbers of a weight that are looked at together.
_BLOCK = 2**22

#: dtype -> (integer view, mask of the exponent bits, significand bits behind the point, smallest normal number)
_FORMATS: dict[torch.dtype, tuple[torch.dtype, int, int, float]] = {
    torch.bfloat16: (torch.int16, 0x7F80, 7, 2.0**-126),
    torch.float16: (torch.int16, 0x7C00, 10, 2.0**-14),
    torch.float32: (torch.int32, 0x7F800000, 23, 2.0**-126),
}
#: Numbers of which a copy stays in a core's cache.
_CACHED = 2**18


def ulp_energy(factor: Tensor, dim: int) -> Float[Tensor, " k"]:
    """Return Σ ulp² over one dimension of a stored matrix; zeros for float64, which only computing rounds.

    The exponent bits alone, read as a number of the same format, are 2^⌊log₂|x|⌋ = ulp·2^p.

    >>> ulp_energy(torch.tensor([[1.5, 1.0]], dtype=torch.bfloat16), dim=1) * 2**14
    tensor([2.], dtype=torch.float64)
    """
    return _ulp_squared(factor).sum(dim).cpu()


def _ulp_squared(factor: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    if factor.dtype not in _FORMATS:
        return torch.zeros((), dtype=torch.float64).expand(factor.shape)
    integer, mask, bits, smallest = _FORMATS[factor.dtype]
    powers = torch.bitwise_and(factor.detach().view(integer), mask).view(factor.dtype).to(torch.float64)
    if factor.dtype == torch.float16:  # the only format whose subnormals, of fixed ulp, occur in trained factors
        powers = powers.clamp_min(smallest)
    return powers.square_().mul_(4.0**-bits)


def stacked_ulp_energy(rows: Float[Tensor, "*batch n"], dtype: torch.dtype) -> Float[Tensor, "*batch"]:
    """Return :func:`ulp_energy` of each row of numbers that were stored in another format, given in float64.

    >>> stacked_ulp_energy(torch.tensor([[1.5, 1.0, 1.2, 1.9]], dtype=torch.float64), torch.bfloat16) * 2**14
    tensor([4.], dtype=torch.float64)
    """
    if dtype not in _FORMATS:
        return torch.zeros(rows.shape[:-1], dtype=torch.float64)
    _, _, bits, smallest = _FORMATS[dtype]
    norms = []
    for part in rows.split(max(1, _CACHED // max(1, math.prod(rows.shape[1:])))):
        powers = torch.bitwise_and(part.view(torch.int64), 0x7FF0000000000000).view(torch.float64)
        if dtype == torch.float16:
            powers.clamp_min_(smallest)
        norms.append(torch.linalg.vector_norm(powers, dim=-1))
    return torch.cat(norms).square_().mul_(4.0**-bits).cpu()


def noise_energy(
    matrix: LowRankMatrix, left_energy: Float[Tensor, " rank"], right_energy: Float[Tensor, " rank"]
) -> float:
    """Return the predicted energy of the rounding noise in a product of stored factors.

    Args:
        matrix: The product; its factors in their storage dtype.
        left_energy: ‖B_k‖², squared norms of the columns of B.
        right_energy: ‖A_k‖², squared norms of the rows of A.
    """
    left_ulp, right_ulp = ulp_energy(matrix.left_factor, dim=0), ulp_energy(matrix.right_factor, dim=1)
    return float(noise_of_ulps(matrix.scales().cpu(), left_ulp, right_ulp, left_energy, right_energy))


def noise_of_ulps(
    scales: Float[Tensor, "*batch rank"],
    left_ulp: Float[Tensor, "*batch rank"],
    right_ulp: Float[Tensor, "*batch rank"],
    left_energy: Float[Tensor, "*batch rank"],
    right_energy: Float[Tensor, "*batch rank"],
) -> Float[Tensor, "*batch"]:
    """Return Σ_k s_k² (ulp²_B,k ‖A_k‖² + ‖B_k‖² ulp²_A,k)/12 with the ulps of the columns of B and the rows of A."""
    return (scales.square() * (left_ulp / 12 * right_energy + left_energy * (right_ulp / 12))).sum(-1)


def product_noise_energy(matrix: LowRankMatrix) -> float:
    """Return :func:`noise_energy` of a product, with the energies of its factors."""
    if matrix.left_factor.dtype != torch.float16 and not matrix.left_factor.any():  # as LoRA begins: zeros are exact
        return 0.0
    left = matrix.left_factor.detach().to(torch.float64).square().sum(0).cpu()
    right = matrix.right_factor.detach().to(torch.float64).square().sum(1).cpu()
    return noise_energy(matrix, left, right)


@dataclass(frozen=True)
class NoiseProfile:
    """Predicted rounding noise of dense weights, by row and by column; profiles add up as independent noise does.

    Args:
        rows: Variance summed over each row, Σ_j ulp²/12.
        columns: Variance summed over each column, Σ_i ulp²/12.
    """

    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]

    def __add__(self, other: NoiseProfile) -> NoiseProfile:
        return NoiseProfile(self.rows + other.rows, self.columns + other.columns)

    @property
    def energy(self) -> float:
        """Expected squared Frobenius norm of the noise."""
        return float(self.rows.sum())

    @property
    def edge(self) -> float:
        """Largest singular value that the noise alone would have."""
        if not self.rows.numel() or not self.columns.numel():
            return 0.0
        return math.sqrt(float(self.rows.max())) + math.sqrt(float(self.columns.max()))


def noise_profile(weight: Float[Tensor, "out in"]) -> NoiseProfile:
    """Return the predicted noise in a weight that is stored as it is, in one pass over it.

    >>> noise_profile(torch.ones(1, 3, dtype=torch.bfloat16)).energy == 3 / 12 * 2**-14
    True
    """
    rows, columns = [], torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(max(1, _BLOCK // max(1, weight.shape[1]))):
        squared = _ulp_squared(block)
        rows.append(squared.sum(1).cpu())
        columns += squared.sum(0).cpu()
    return NoiseProfile(torch.cat(rows) / 12, columns / 12)


def above_rounding(
    values: Float[np.ndarray, "step kind matrix index"],
    edge: Float[np.ndarray, "step kind matrix"],
    noise: Float[np.ndarray, "step kind matrix"],
    shortest: Float[np.ndarray, " matrix"],
) -> dict[str, Float[np.ndarray, "step kind matrix"]]:
    """Return rounding edge, rank, entropy and effective rank above it, by name.

    Args:
        values: Singular values, padded with NaN.
        edge: Largest singular value of the rounding noise alone; NaN where it is unknown, as is all else then.
        noise: Predicted energy of the rounding.
        shortest: min(out, in).

    >>> above = above_rounding(np.array([[[[5.0, 1.0]]]]), np.full((1, 1, 1), 3.0), np.ones((1, 1, 1)), np.array([2.0]))
    >>> above["rank_above_rounding"].item(), above["entropy_energy_above_rounding"].item()
    (1.0, -0.0)
    """
    comparable = np.isfinite(values).any(-1) & np.isfinite(edge)
    beyond = values > edge[..., None]
    # ν·max(out, in) = noise/min(out, in)
    energy = np.where(beyond, np.maximum(values**2 - (noise / shortest)[..., None], 0.0), 0.0)
    total = energy.sum(-1)
    share = np.divide(energy, total[..., None], out=np.zeros_like(energy), where=total[..., None] > 0)
    entropy = np.where(comparable & (total > 0), -xlogy(share, share).sum(-1), np.nan)
    return {
        "rounding_edge": np.where(comparable, edge, np.nan),
        "rank_above_rounding": np.where(comparable, beyond.sum(-1), np.nan),
        "entropy_energy_above_rounding": entropy,
        "effective_rank_energy_above_rounding": np.exp(entropy),
    }
