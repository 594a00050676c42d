r"""The path of a training through weight space: inner products of its updates, and what follows from them.

With D_t the update at step t, all matrices together, everything is a function of the Gram matrix of the path,

.. math:: K_{tu} = \langle D_t, D_u \rangle = \sum_{\text{matrices}} \operatorname{tr}(\Delta W_t^\top \Delta W_u)

which is a sum over matrices, so they are read one at a time. For products of factors it takes r×r blocks alone:
⟨B₁A₁, B₂A₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.spectra.dense import inner_products
from probes.low_rank import LowRankMatrix


@dataclass(frozen=True)
class PathShape:
    """What the Gram matrix of a path says about its shape.

    Args:
        distance: ``(step,)``, ‖D_t‖: how far from the start.
        length: ``(step,)``, Σ‖D_s − D_{s−1}‖ up to t, from the start.
        straightness: ``(step,)``, distance over length: 1 on a straight line. NaN where nothing has moved.
        component_share: ``(component,)``, share of Σ‖D_t‖² along each principal direction of the path, descending; the
            start, where D = 0, is the origin: nothing is centred.
        participation_ratio: How many directions the path moved in, 1/Σ share².
    """

    distance: Float[np.ndarray, " step"]
    length: Float[np.ndarray, " step"]
    straightness: Float[np.ndarray, " step"]
    component_share: Float[np.ndarray, " component"]
    participation_ratio: float


def path_gram(
    updates: Sequence[Tensor | LowRankMatrix], others: Sequence[Tensor | LowRankMatrix] | None = None
) -> Float[np.ndarray, "step other"]:
    """Inner products of one matrix's updates at several steps, in float64; add those of all matrices.

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
        return (inner_products(rows) if others is None else rows @ _flat(others).mT).cpu().numpy()
    left, right, scales, starts = _stacked(factored[: len(updates)])
    if others is None:
        products = inner_products(left) * inner_products(right) * torch.outer(scales, scales)
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
    """All columns of B, all rows of A and their scales, and where each update begins."""
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
    r"""Distance, length, straightness and principal directions of a path that begins at the origin.

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
        return PathShape(missing, missing, missing, missing, float("nan"))
    squared = np.diag(gram).clip(0)
    beside = np.diag(gram, -1)
    moved = np.concatenate([squared[:1], (squared[1:] - 2 * beside + squared[:-1]).clip(0)])
    distance, length = np.sqrt(squared), np.cumsum(np.sqrt(moved))
    straightness = np.divide(distance, length, out=np.full(steps, np.nan), where=length > 0)
    energies = np.linalg.eigvalsh(gram)[::-1].clip(0) if steps else np.empty(0)
    total = energies.sum()
    share = energies / total if total > 0 else np.full(steps, np.nan)
    ratio = float(1 / (share**2).sum()) if total > 0 else float("nan")
    return PathShape(distance, length, straightness, share, ratio)
