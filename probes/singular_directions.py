r"""Singular directions of a model's low-rank matrices, and the slope of the loss along each.

Of ΔW = UΣVᵀ the loss changes with σ_i at the rate

.. math:: g_i = \frac{\partial L}{\partial σ_i} = u_i^\top (\nabla_W L)\, v_i

With B = Q_B R_B and Aᵀ = Q_A R_A, every scale folded into B, U and V are those of the small core R_B R_Aᵀ, turned by
Q_B and Q_A. Of ∇W only Q_Bᵀ∇W or ∇W Q_A is needed, which follow from the factors' gradients ∇_A = Bᵀ∇W and ∇_B = ∇W Aᵀ
by small matrices (:mod:`probes.spaces`): one backward pass gives all slopes of all matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probes.low_rank import LowRankMatrix
from probes.spaces import tangent_space
from probes.tasks import Task
from probes.transfer import mean_loss_and_gradient
from probes.watched import AdapterProduct, Watched, find, is_sharded

_EPSILON = torch.finfo(torch.float64).eps
#: A direction lies in a factor's span if its squared length there is 1 up to this.
_OUTSIDE = 1e-6


@dataclass(frozen=True)
class Directions:
    """The singular directions of one matrix, ΔW = Σ σ_i u_i v_iᵀ, in float64; none for ΔW = 0.

    Args:
        left: U ``(out, k)``.
        values: σ ``(k,)``, descending, all above rounding.
        right: V ``(in, k)``.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]

    def part(self, chosen: Bool[Tensor, " k"], scale: float = 1.0) -> LowRankMatrix:
        """Return Σ σ_i u_i v_iᵀ over the chosen directions, times a scale.

        >>> whole = singular_directions(LowRankMatrix(torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))))
        >>> whole.part(torch.tensor([False, True])).to_dense().abs()
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
        """
        chosen = chosen.to(self.values.device)
        return LowRankMatrix(self.left[:, chosen] * self.values[chosen], self.right[:, chosen].mT, scale)


def low_rank_matrices(model: nn.Module, matrices: str | None = None) -> dict[str, Watched]:
    """Return the watched low-rank matrices of a model by name, the sum of several adapters as one.

    Args:
        model: With trainable adapters.
        matrices: Regular expression; only matrices whose name matches.

    Raises:
        ValueError: If there are none, or their parameters are sharded.

    >>> low_rank_matrices(nn.Linear(2, 2))
    Traceback (most recent call last):
    ValueError: Expected a model with trainable low-rank adapters, got one without. With PEFT, load it with \
is_trainable=True.
    """
    watched = find(model, matrices).watched
    chosen = {matrix.name: matrix for matrix in watched if not matrix.is_dense and not matrix.part_of}
    if not chosen:
        pattern = "" if matrices is None else f" whose name matches {matrices!r}"
        raise ValueError(
            f"Expected a model with trainable low-rank adapters{pattern}, got one without. With PEFT, load it with "
            "is_trainable=True."
        )
    if any(is_sharded(parameter) for matrix in chosen.values() for parameter in matrix.sources):
        raise ValueError(
            "Expected parameters that are whole on each rank, got shards of FSDP 2 or ZeRO-3. Gather the model first."
        )
    return chosen


def singular_directions(matrix: LowRankMatrix) -> Directions:
    """Return the singular directions of a low-rank matrix, which is never multiplied out.

    Raises:
        ValueError: If the matrix is not finite.

    >>> singular_directions(LowRankMatrix(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]), 0.5)).values
    tensor([5.], dtype=torch.float64)
    """
    left, right = matrix.left.detach(), matrix.right.detach()
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError(f"Expected finite factors, got {matrix} with NaN or infinity.")
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    # On the host: the solvers of accelerators are slow for small matrices.
    u, values, v = (part.to(left.device) for part in torch.linalg.svd((r_left @ r_right.mT).cpu(), full_matrices=False))
    kept = values > max(matrix.shape) * _EPSILON * values[:1]
    return Directions(q_left @ u[:, kept], values[kept], q_right @ v[kept].mT)


def loss_slopes(
    model: nn.Module, task: Task, watched: Mapping[str, Watched], directions: Mapping[str, Directions]
) -> tuple[float, dict[str, Float[Tensor, " k"]]]:
    """Return a task's mean loss L, and ∂L/∂σ of all singular directions of each matrix, on the host.

    One forward and backward pass over the task's samples; gradients are accumulated over batches in float64.

    Args:
        model: In evaluation mode (:func:`probes.undisturbed.undisturbed`).
        task: What the loss is measured on.
        watched: From :func:`low_rank_matrices`.
        directions: :func:`singular_directions` of each.

    Returns:
        NaN for directions that no trained factor reaches: a frozen adapter's part of a sum.

    Raises:
        ValueError: If the loss or a gradient is not finite.
    """
    parameters = list({id(p): p for matrix in watched.values() for p in matrix.parameters}.values())
    loss, gradients = mean_loss_and_gradient(model, task, parameters)
    if not (math.isfinite(loss) and all(bool(gradient.isfinite().all()) for gradient in gradients)):
        raise ValueError(
            f"{task}: expected finite losses and gradients, got a mean loss of {loss:.6g}. Leave out samples without "
            "labels, and such as overflow."
        )
    by_parameter = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
    slopes = {}
    for name, matrix in watched.items():
        assert isinstance(matrix.terms, tuple)
        slopes[name] = _slopes(matrix.terms, directions[name], by_parameter).cpu()
    return loss, slopes


def _slopes(
    products: Sequence[AdapterProduct], directions: Directions, gradients: Mapping[int, Tensor]
) -> Float[Tensor, " k"]:
    """Return u_iᵀ∇W v_i from ∇_B or ∇_A: for each direction from the one whose rounding reaches it least."""
    space = tangent_space(products)
    (out, _), (in_, _) = directions.left.shape, directions.right.shape
    nothing = directions.left.new_zeros
    lefts = [p.left_view(gradients[id(p.left)]) for p in products if p.left.requires_grad]
    rights = [p.right_view(gradients[id(p.right)]) for p in products if p.right.requires_grad]
    of_left, of_right = torch.cat([nothing(out, 0), *lefts], 1), torch.cat([nothing(0, in_), *rights])
    to_right, to_left = space.right.mT @ directions.right, space.left.mT @ directions.left  # V in Q_A, U in Q_B
    from_left, from_right = space.from_left @ to_right, to_left.mT @ space.from_right
    slopes = torch.stack(
        [(directions.left * (of_left @ from_left)).sum(0), ((from_right @ of_right) * directions.right.mT).sum(1)]
    )
    rounding = [
        max((torch.finfo(parameter.dtype).eps for parameter in side if parameter.requires_grad), default=0.0)
        for side in ([p.left for p in products], [p.right for p in products])
    ]
    errors = torch.stack(
        [
            rounding[0] * of_left.norm() * from_left.norm(dim=0),
            rounding[1] * of_right.norm() * from_right.norm(dim=1),
        ]
    )
    inside = torch.stack([to_right.square().sum(0), to_left.square().sum(0)]) > 1 - _OUTSIDE
    errors = errors.masked_fill(~inside, torch.inf)
    best = slopes.gather(0, errors.argmin(0, keepdim=True))[0]
    return best.masked_fill(~inside.any(0), torch.nan)
