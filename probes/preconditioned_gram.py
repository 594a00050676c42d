r"""Inner products of gradients that went through an optimizer's preconditioner P: where it would step for each of them.

Of a low-rank matrix W = s B A the optimizer sees the factors. A step P∇L of these moves W, to first order, by
s(dB A + B dA), so that P acts on ∇W in tangent space as

.. math:: ∇W \mapsto s\,[P_B ∘ (s∇W A^\top)]\,A + s\,B\,[P_A ∘ (s B^\top ∇W)],

which differs from ∇W even under SGD. P itself is never formed as a matrix; of per-sample gradients G only G P Gᵀ and
G P² Gᵀ are kept, or, where P is not linear, products with P of drawn gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.block_gradients import along
from probes.blocks import Block
from probes.preconditioner import Orthogonalisation, Preconditioner
from probes.sample_gradients import Materialised, SampleGradient, gram, inner_products, scaled_grams, weighted_sums
from probes.watched import without_values

#: Combinations of samples' gradients, from their K: ``(N, N)`` → ``(draw, N)``.
Draws = Callable[[Tensor], Tensor]


class Preconditioning:
    """What is measured of gradients passed through an optimizer, block by block.

    Args:
        preconditioner: The optimizer's.
        blocks: All that will be added.
        draws: For a P that is not linear: which combinations of gradients are passed through it.
        together: Whether only the sum of all blocks is kept.
    """

    def __init__(
        self, preconditioner: Preconditioner, blocks: Sequence[Block], draws: Draws | None, *, together: bool
    ) -> None:
        self._preconditioner, self._draws, self._together = preconditioner, draws, together
        parameters = [parameter for block in blocks for parameter, _ in block.parameters]
        self._is_linear = preconditioner.is_linear(parameters)
        self._is_plain = all(_is_plain(preconditioner, block) for block in blocks)
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._sum: tuple[Tensor, Tensor] | None = None
        self._reason = ""

    def add(self, block: Block, columns: Sequence[SampleGradient], k: Float[Tensor, "n n"]) -> None:
        """Measure one block; where P does not exist, note why.

        Args:
            block: The block.
            columns: Its gradients, as K was formed of them.
            k: G Gᵀ.
        """
        if self._is_plain:
            return
        try:
            part = self._of(block, columns, k)
        except ValueError as error:
            self._reason = self._reason or str(error)
            return
        if not self._together:
            self._parts[block.name] = part
        first, second = part if self._sum is None else (a + b for a, b in zip(self._sum, part, strict=True))
        self._sum = first, second

    def _of(self, block: Block, columns: Sequence[SampleGradient], k: Tensor) -> tuple[Tensor, Tensor]:
        if not all(self._preconditioner.steps(parameter) for parameter, _ in block.parameters):
            raise ValueError(f"{self._preconditioner.optimizer} does not step all that is trained; another may")
        grams = None
        if _is_plain(self._preconditioner, block):
            grams = k, k
        elif self._preconditioner.is_linear(parameter for parameter, _ in block.parameters):
            grams = preconditioned_grams(self._preconditioner, block, columns, k)
        if grams is not None and self._is_linear:
            return grams
        if self._draws is None:
            raise ValueError(f"{self._preconditioner.optimizer} is not linear, and no gradients are drawn for it")
        return preconditioned_draws(self._preconditioner, block, columns, self._draws(k), grams)

    def result(self, grams: Mapping[str, Tensor], kept: Sequence[int], name_of_all: str) -> dict[str, Any]:
        """Return the fields of a ``ProbeGram``; those of all blocks together only if no block lacks its part.

        Args:
            grams: K by block, as it is returned: where P is 1 it stands for both products.
            kept: Samples that have a gradient.
            name_of_all: Name of all blocks together.
        """
        if self._is_plain:
            return {"preconditioned_product": grams, "preconditioned_gram": grams}
        parts = dict(self._parts)
        if self._sum is not None and not self._reason:
            parts[name_of_all] = self._sum
        if not self._is_linear and any(len(kept) < len(first) for first, _ in parts.values()):
            return {"unpreconditioned": "gradients are drawn only where every probe sample has one"}
        names = ("preconditioned_product", "preconditioned_gram")
        if self._is_linear:
            parts = {name: (one[kept][:, kept], other[kept][:, kept]) for name, (one, other) in parts.items()}
        else:
            names = ("drawn_product", "drawn_norm_squared")
        fields = [{name: pair[number] for name, pair in parts.items()} for number in (0, 1)]
        return {
            **dict(zip(names, fields, strict=True)),
            "optimizer_gradients": self._preconditioner.gradients,
            "unpreconditioned": self._reason,
        }


def preconditioned_grams(
    preconditioner: Preconditioner, block: Block, columns: Sequence[SampleGradient], k: Float[Tensor, "n n"]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Return G P Gᵀ and G P² Gᵀ of a block, float64 on the host, for a P that is linear.

    Args:
        preconditioner: The optimizer's.
        block: One block.
        columns: Its gradients: in tangent space their coordinates, else of each of its parameters.
        k: G Gᵀ, used where P is a number.

    Raises:
        ValueError: If P of the block does not exist in its space.
    """
    if block.tangent is not None:
        _require_factors(block)
        gradients = _values(columns[0])
        stepped = _stepped(preconditioner, block, gradients)
        between, within = gradients @ stepped.mT, stepped @ stepped.mT
        return _symmetric(between), within.to(device="cpu", dtype=torch.float64)
    _require_parameters(block)
    between, within = torch.zeros_like(k), torch.zeros_like(k)
    for column, (parameter, view) in zip(columns, block.parameters, strict=True):
        scale = preconditioner.of(parameter)
        assert not isinstance(scale, Orthogonalisation)
        if isinstance(scale, Tensor):
            parts = scaled_grams(column, _viewed(scale, view).reshape(column.shape).to(_device_of(column)))
        elif scale == 0:
            continue
        else:
            factor_gram = k if len(block.parameters) == 1 else gram(column)
            parts = scale * factor_gram, scale**2 * factor_gram
        between, within = between + parts[0], within + parts[1]
    return between, within


def preconditioned_draws(
    preconditioner: Preconditioner,
    block: Block,
    columns: Sequence[SampleGradient],
    weights: Float[Tensor, "draw n"],
    grams: tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]] | None,
) -> tuple[Float[Tensor, "n draw"], Float[Tensor, " draw"]]:
    """Return the products of gradients with P(Gᵀw) and its squared norm, for each row of weights.

    Args:
        preconditioner, block, columns: As for :func:`preconditioned_grams`.
        weights: Of the samples, float64.
        grams: G P Gᵀ and G P² Gᵀ where P is linear; else one draw after the other is passed through P.

    Raises:
        ValueError: If P of the block does not exist in its space.
    """
    if grams is not None:
        between, within = grams
        return between @ weights.mT, ((weights @ within) * weights).sum(1)
    if block.tangent is not None:
        _require_factors(block)
        gradients = _values(columns[0])
        parts = []
        for part in weights.split(max(1, len(gradients))):  # no more at once than there are gradients
            stepped = _stepped(preconditioner, block, part.to(gradients) @ gradients)
            parts.append((gradients @ stepped.mT, stepped.square().sum(1, dtype=torch.float64)))
        product, norm = (
            torch.cat(column, -1).to(device="cpu", dtype=torch.float64) for column in zip(*parts, strict=True)
        )
        return product, norm
    _require_parameters(block)
    products, norms = [], []
    for row in weights:
        product, norm = _drawn(preconditioner, block, columns, row[None])
        products.append(product)
        norms.append(norm)
    return torch.stack(products, 1), torch.tensor(norms, dtype=torch.float64)


def _is_plain(preconditioner: Preconditioner, block: Block) -> bool:
    """Return whether P leaves a block's gradients as they are: factors step as they are only in factor space."""
    if block.tangent is not None or block.layer is not None:
        return False
    return preconditioner.is_plain(parameter for parameter, _ in block.parameters)


def _drawn(
    preconditioner: Preconditioner, block: Block, columns: Sequence[SampleGradient], weights: Tensor
) -> tuple[Tensor, float]:
    product, norm = torch.zeros(columns[0].samples, dtype=torch.float64), 0.0
    for column, (parameter, view) in zip(columns, block.parameters, strict=True):
        scale = preconditioner.of(parameter)
        drawn = weighted_sums(column, weights.to(_device_of(column)))[0]
        if isinstance(scale, Orthogonalisation):
            if drawn.numel() != parameter.numel():
                raise ValueError("Muon steps a whole parameter, of which a matrix is only a part")
            turned = drawn.shape != parameter.shape
            moved = scale((drawn.mT if turned else drawn).float())
            moved = moved.mT if turned else moved
        else:
            moved = drawn * (_viewed(scale, view).reshape(drawn.shape) if isinstance(scale, Tensor) else scale)
        product += inner_products(column, along(moved.reshape(column.shape), column))
        norm += float(moved.double().square().sum())
    return product, norm


def _stepped(
    preconditioner: Preconditioner, block: Block, coordinates: Float[Tensor, "sample number"]
) -> Float[Tensor, "sample number"]:
    """Return the tangent coordinates of P applied to the factors' gradients, of gradients given by theirs."""
    assert block.tangent is not None
    left, right = block.tangent.factor_gradients(coordinates)
    of_left, of_right = [], []
    taken_left = taken_right = 0
    for product in block.products:
        if product.left.requires_grad:
            rank = product.left_view(without_values(product.left)).shape[1]
            part = left[:, taken_left : taken_left + rank]
            of_left.append(_passed(preconditioner.of(product.left), part.mT, product.left, product.left_view).mT)
            taken_left += rank
        if product.right.requires_grad:
            rank = product.right_view(without_values(product.right)).shape[0]
            part = right[:, taken_right : taken_right + rank]
            of_right.append(_passed(preconditioner.of(product.right), part, product.right, product.right_view))
            taken_right += rank
    moved_left = torch.cat(of_left, 1) if of_left else left
    moved_right = torch.cat(of_right, 1) if of_right else right
    return block.tangent.of_factor_changes(moved_left, moved_right)


def _passed(
    scale: Tensor | float | Orthogonalisation,
    gradients: Float[Tensor, "sample row column"],
    parameter: nn.Parameter,
    view: Callable[[Tensor], Tensor],
) -> Float[Tensor, "sample row column"]:
    if isinstance(scale, Orthogonalisation):
        if gradients[0].numel() != parameter.numel():
            raise ValueError("Muon steps a whole parameter, of which a factor is only a part")
        return torch.stack([scale(gradient) for gradient in gradients])
    return gradients * (view(scale).to(gradients) if isinstance(scale, Tensor) else scale)


def _require_factors(block: Block) -> None:
    if any(product.diagonal is not None and product.diagonal.requires_grad for product in block.products):
        raise ValueError("AdaLoRA's diagonal moves beside the factors, which is not measured")


def _require_parameters(block: Block) -> None:
    if block.layer is not None:
        raise ValueError("the optimizer steps factors, which in weight space is not measured")


def _viewed(scale: Tensor, view: Callable[[Tensor], Tensor] | None) -> Tensor:
    return scale if view is None else view(scale)


def _values(gradient: SampleGradient) -> Float[Tensor, "sample number"]:
    (term,) = gradient.terms
    assert isinstance(term, Materialised)
    return term.values


def _device_of(gradient: SampleGradient) -> torch.device:
    term = gradient.terms[0] if gradient.terms else None
    if term is None:
        return torch.device("cpu")
    return term.values.device if isinstance(term, Materialised) else term.right.device


def _symmetric(gram: Tensor) -> Tensor:
    double = gram.to(device="cpu", dtype=torch.float64)
    return (double + double.mT) / 2
