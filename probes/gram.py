r"""The empirical Fisher of a model on probe samples, as the Gram matrix of per-sample gradients.

With G ``(N, d)`` the gradients of N samples' losses, F = GᵀG/N and K = GGᵀ share their spectrum (eigenvalues of K over
N), and for an update δ the vector b = Gδ holds all that is wanted of it: δᵀFδ = ‖b‖²/N. Neither G nor F is formed.

One forward and one backward pass a batch, and a second backward pass where it must be found out which sample a row
belongs to: for the first batch of text, for each batch of images, and for each batch with a loss of the user's. Until K
is complete, r(out + in) numbers a sample are held for each LoRA matrix in tangent or factor space, in the model's
precision, single at least; for each dense weight, and in weight space, the inputs and output gradients of its layer,
T·(out + in) a sample for T tokens, or out·in where that is less. Without the gradients of all samples no inner product
between batches is known: to bound memory, choose ``blocks`` and call again. In tangent space ∇W is projected from
gradients of the factors, by r×r solves; where these would amplify rounding, from inputs of A and output gradients of B,
if the factors belong to layers (not to experts, embeddings).

Inner products of per-sample gradients: what every statistic of a Fisher matrix is a function of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks import Block, Blocks, find_blocks, trained_parameters
from probes.layer_rules import adapted_layer
from probes.losses import token_losses
from probes.low_rank import LowRankMatrix
from probes.per_sample import Chain, Recording, owners, recording, sample_gradients
from probes.sample_gradients import (
    Materialised,
    Outer,
    SampleGradient,
    Scatter,
    Term,
    added,
    at_least_single,
    compact,
    gram,
    inner_products,
    projected,
    stacked,
)
from probes.spaces import TangentSpace, change_energy
from probes.tasks import ProbeBatch, Task, is_text, on_device, one_each, probe_loss, with_sampled_labels
from probes.undisturbed import bare, undisturbed
from probes.watched import Matrix

SPACES = ("tangent", "factor", "weight")
FISHERS = ("empirical", "sampled")
Loss = Callable[[nn.Module, Any], Tensor]


def gradient_gram(
    model: nn.Module,
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    space: str = "tangent",
    fisher: str = "empirical",
    blocks: Sequence[str] | None = None,
    update: Mapping[str, Matrix] | None = None,
    seed: int = 0,
    projection: int = 0,
    skip_broken: bool = False,
) -> Gram:
    r"""Inner products of per-sample gradients of the trainable parameters, and with an update.

    The model is in evaluation mode meanwhile, outside DDP and ``torch.compile``; modes, random states, gradients and
    hooks are as before afterwards. Every trainable number is covered: what no rule can take apart by sample takes a
    backward pass for each sample (``one_by_one``). The gradient of a sample is that of its own loss within its batch:
    where samples meet (in-batch negatives, batch statistics), it depends on the batch.

    Args:
        model: With adapters, dense trainable weights, or both.
        batch: One batch, a dict as the model takes it, or an iterable of such, read one at a time.
        loss: (model, batch) → losses ``[samples]``; by default that of each batch's task
            (:func:`probes.tasks.probe_batches`), else the model's own cross-entropy summed over a sample's tokens.
        space: For low-rank matrices: ``"tangent"``, what a step of the factors can reach, the same for every gauge;
            ``"factor"``, the factors as they are; ``"weight"``, the adapted weight itself. Dense parameters are the
            same in all three.
        fisher: ``"empirical"``: gradients for the data's labels. ``"sampled"``: for labels drawn from the model's own
            prediction, whose mean is the true Fisher; only with the model's own loss.
        blocks: Names of blocks; by default all.
        update: Matrix (or other trainable parameter) → its change; of factors, in factor space, parameter → its
            change. What is not named has not changed.
        seed: Of the sampled labels and of the projection.
        projection: k, numbers that each sample's gradient of a block is randomly projected to, so that only N·k are
            held; K is then an estimate (:mod:`probes.sample_gradients`), b is exact. 0 for none.
        skip_broken: Whether samples whose loss or gradient is not finite are left out and listed, instead of an error.

    Raises:
        ValueError: If there is nothing to differentiate, an argument is not one of those named, a loss does not return
            one number a sample, or a sample's loss or gradient is not finite.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> found = gradient_gram(layer, {"input": torch.eye(2)}, lambda model, batch: model(**batch)[:, 0] ** 2 / 2)
    >>> found.gram["global"].tolist()  # gradients (1, 0) and (0, 1)
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if space not in SPACES:
        raise ValueError(f"Expected space to be one of {', '.join(SPACES)}, got {space!r}.")
    if fisher not in FISHERS:
        raise ValueError(f"Expected fisher to be one of {', '.join(FISHERS)}, got {fisher!r}.")
    if projection < 0:
        raise ValueError(f"Expected a projection to at least 1 number, or 0 for none, got {projection}.")
    found = find_blocks(model, space, blocks)
    measure = _Measurement(model, found, loss, space, fisher, seed, projection, update)
    batches: Iterable[Any] = [batch] if isinstance(batch, Mapping) else batch
    with undisturbed(model) as quiet, torch.enable_grad():
        for each in batches:
            measure.add(quiet, each)
    if not measure.losses:
        raise ValueError("Expected at least one batch of probe samples, got none.")
    return measure.result(skip_broken)


class _Measurement:
    """Batches in, K out."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        loss: Loss | None,
        space: str,
        fisher: str,
        seed: int,
        projection: int,
        update: Mapping[str, Matrix] | None,
    ) -> None:
        self._found, self._blocks, self._loss, self._space, self._fisher = blocks, blocks.chosen, loss, space, fisher
        self._generator, self._seed, self._projection = torch.Generator().manual_seed(seed), seed, projection
        self._parameters = list({id(p): p for block in self._blocks for p, _ in block.parameters}.values())
        self._own = owners(bare(model), [*self._parameters, *(p for b in self._blocks for p in _factors(b))])
        self._chains = {block.name: chain for block in self._blocks if (chain := self._chain(block)) is not None}
        modules = [module for each in self._own.values() for module, _ in each]
        self._modules = list(dict.fromkeys([*modules, *(m for chain in self._chains.values() for m in chain)]))
        self._names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
        self._slow: dict[int, str] = {}
        self._in_order: bool | None = None  # of batches of text, once one was looked at
        self._update = update
        self._products: dict[str, list[tuple[Tensor, float, float]]] = {}
        self.losses: list[Tensor] = []
        self._require_known(update)

    def _require_known(self, update: Mapping[str, Matrix] | None) -> None:
        """Refuses changes that would be left out without a word."""
        known: set[str] = set()
        for block in self._blocks:
            by_parameters = block.products and self._space == "factor"
            known |= {self._names[id(p)] for p, _ in block.parameters} if by_parameters else {block.name}
        if unknown := [name for name in update or () if name not in known]:
            kind = "parameters" if self._space == "factor" else "blocks"
            raise ValueError(
                f"Expected the update of {kind}, such as {sorted(known)[:3]}, got {unknown[:3]}. "
                "Leave out what is not measured."
            )

    def add(self, model: nn.Module, batch: Any) -> None:
        """Takes in one batch."""
        batch = on_device(batch, next(iter(self._parameters)).device)
        loss = self._loss or probe_loss_of(batch)
        if self._fisher == "sampled":
            batch = with_sampled_labels(model, batch, self._generator)
        with recording(self._modules) as recorded:
            losses = one_each(loss(model, batch), getattr(batch, "samples", None), "loss(model, batch)")
        if not losses.requires_grad:
            raise ValueError("Expected losses with a graph, got some that do not depend on any trainable parameter.")
        self.losses.append(losses.detach().to(device="cpu", dtype=torch.float64))
        # Images may be any number a sample, and a user's loss may let samples meet: found out for each batch. Of text
        # and the model's own loss the first batch speaks for all.
        plain = is_text(batch, len(losses)) and not _is_users(loss, batch)
        in_order = self._take(losses, recorded, trusted=plain and self._in_order is True)
        if plain and len(losses) > 1 and self._in_order is not False:
            self._in_order = in_order

    def _take(self, losses: Tensor, recorded: Recording, *, trusted: bool) -> bool:
        """Takes in the gradients of one batch; returns whether rows were in the samples' order."""
        chains = [self._chains[block.name] for block in self._blocks if self._needs_matrix(block, recorded)]
        taken = sample_gradients(losses, self._parameters, self._own, recorded, chains=chains, trusted=trusted)
        slow = {each for each in taken.one_by_one if isinstance(each, tuple)}
        for block in self._blocks:
            for parameter, _ in block.parameters:
                by_itself = any(parameter is each for each in taken.one_by_one)
                if by_itself or (block.layer is not None and self._chains[block.name] in slow):
                    self._slow[id(parameter)] = self._names[id(parameter)]
            chain = self._chains.get(block.name)
            matrix = taken.matrices.get(chain) if chain is not None else None
            if block.tangent is not None:
                precision = _precision(chain, recorded)
                part = [_in_tangent_space(block, block.tangent, matrix, precision, taken.parameters)]
            elif block.layer is not None:
                part = [_as_matrix(block, block.layer, matrix, taken.parameters, len(losses))]
            else:
                part = [_viewed(taken.parameters[id(p)], view, p) for p, view in block.parameters]
            block.parts.append(self._projected(block, part) if self._projection else [compact(each) for each in part])
        return taken.in_order

    def _needs_matrix(self, block: Block, recorded: Recording) -> bool:
        """Whether ∇W is wanted of the layer itself: in weight space, or where solving for it would lose too much."""
        chain = self._chains.get(block.name)
        if chain is None or block.tangent is None:
            return chain is not None
        return not all(block.tangent.is_solvable(_precision(chain, recorded)))

    def _projected(self, block: Block, part: Sequence[SampleGradient]) -> list[SampleGradient]:
        """The block's gradients as k numbers a sample, its products with the update taken before."""
        if self._update is not None:
            found = self._product(block, part, self._update, part[0].samples)
            self._products.setdefault(block.name, []).append(found)
        place = next(place for place, each in enumerate(self._blocks) if each is block)
        like = self._parameters[0].detach()
        numbers = [
            projected(each, self._projection, self._seed + 1_000_003 * place + number, like)
            for number, each in enumerate(part)
        ]
        values = torch.stack(numbers).sum(0)
        return [SampleGradient(tuple(values.shape[1:]), len(values), [Materialised(values)])]

    def _chain(self, block: Block) -> Chain | None:
        """Modules whose inputs and output gradients say ∇W: the adapted layer, or one adapter's A and B (s ∇W)."""
        if block.layer is not None:
            return block.layer, block.layer
        if block.tangent is None or block.products[0].scale() == 0:
            return None
        owned = [self._own.get(id(parameter), []) for parameter in _factors(block)]
        if any(len(each) != 1 for each in owned):
            return None
        (first, _), (last, _) = owned[0][0], owned[1][0]
        return (first, last) if first is not last else None

    def _product_of(self, block: Block, columns: Sequence[SampleGradient], samples: int) -> tuple[Tensor, float, float]:
        """b, ‖δ‖² inside the space and in all, over all batches."""
        assert self._update is not None
        if not self._projection:
            return self._product(block, columns, self._update, samples)
        parts = self._products[block.name]
        return torch.cat([product for product, _, _ in parts]), *parts[0][1:]

    def result(self, skip_broken: bool) -> Gram:
        """K and b of all batches."""
        update, losses = self._update, torch.cat(self.losses)
        together: list[SampleGradient] = []
        grams: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        inside: dict[str, float] = {}
        whole: dict[str, float] = {}
        for block in self._blocks:
            columns = [stacked(part) for part in zip(*block.parts, strict=True)]
            block.parts.clear()
            grams[block.name] = sum((gram(each) for each in columns), torch.zeros(len(losses), len(losses)).double())
            together += columns if self._projection else ()
            if update is not None:
                found = self._product_of(block, columns, len(losses))
                products[block.name], inside[block.name], whole[block.name] = found
        # Projected gradients of all blocks are added, not their K: so the whole is one projection to k numbers too.
        grams[GLOBAL] = (
            gram(added(together)) if together else sum(grams.values(), torch.zeros(len(losses), len(losses)).double())
        )
        if update is not None:
            products[GLOBAL] = sum(products.values(), torch.zeros(len(losses)).double())
            inside[GLOBAL], whole[GLOBAL] = sum(inside.values()), sum(whole.values())
        kept = _kept(losses, grams[GLOBAL], skip_broken)
        left_out = tuple(sorted(set(range(len(losses))) - set(kept)))
        dimension = {block.name: block.dimension for block in self._blocks}
        return Gram(
            gram={name: each[kept][:, kept] for name, each in grams.items()},
            update_product={name: each[kept] for name, each in products.items()},
            update_norm_squared=inside,
            share_outside_space={
                name: max(0.0, 1 - inside[name] / each) if each > 0 else float("nan") for name, each in whole.items()
            },
            dimension={**dimension, GLOBAL: sum(dimension.values())},
            losses=losses[kept],
            covered_share=self._found.covered_share,
            uncovered=self._found.uncovered,
            space=self._space,
            fisher=self._fisher,
            one_by_one=tuple(dict.fromkeys(self._slow.values())),
            left_out=left_out,
            projection=self._projection,
        )

    def _product(
        self, block: Block, columns: Sequence[SampleGradient], update: Mapping[str, Matrix], samples: int
    ) -> tuple[Float[Tensor, " n"], float, float]:
        """b, ‖δ‖² inside the space and in all, of one block."""
        nothing = torch.zeros(samples, dtype=torch.float64), 0.0, 0.0
        if block.products and self._space == "factor":
            changes = [_part_of(update.get(self._names[id(p)]), view) for p, view in block.parameters]
            known = [(column, change) for column, change in zip(columns, changes, strict=True) if change is not None]
            product = sum((inner_products(column, change) for column, change in known), nothing[0])
            size = sum(change_energy(change) for _, change in known)
            return product, size, size
        change = update.get(block.name)
        if change is None:
            return nothing
        size = change_energy(change)
        if block.tangent is None:
            return inner_products(columns[0], _along(change, columns[0])), size, size
        coordinates = block.tangent.of_change(change)
        return inner_products(columns[0], coordinates), float(coordinates.square().sum()), size


def _precision(chain: Chain | None, recorded: Recording) -> torch.dtype:
    """That of what the second module gave."""
    calls = recorded.calls.get(chain[1], []) if chain is not None else []
    return calls[0].output.dtype if calls else torch.float64


def _factors(block: Block) -> list[nn.Parameter]:
    """A and B of a low-rank matrix's first adapter, trained or not."""
    return [block.products[0].right, block.products[0].left] if block.tangent is not None else []


def probe_loss_of(batch: Any) -> Loss:
    """How a batch's losses are measured, if nothing else is said."""
    return probe_loss if isinstance(batch, ProbeBatch) else token_losses


def _is_users(loss: Loss, batch: Any) -> bool:
    """Whether losses are measured by a function of the user's, not by the model's own loss."""
    loss = batch.loss if loss is probe_loss else loss
    task = getattr(loss, "__self__", None)
    return callable(task.loss) if isinstance(task, Task) else loss is not token_losses


def _part_of(change: Matrix | None, view: Callable[[Tensor], Tensor] | None) -> Matrix | None:
    """A block's part of a parameter's change."""
    return view(change) if view is not None and isinstance(change, Tensor) else change


def _viewed(gradient: SampleGradient, view: Callable[[Tensor], Tensor] | None, parameter: Tensor) -> SampleGradient:
    """The block's part of a parameter's gradients."""
    if view is None:
        return gradient
    part = view(parameter.detach())
    if part.numel() == parameter.numel():  # all of it, flattened perhaps: rows stay rows
        return SampleGradient(tuple(part.shape), gradient.samples, gradient.terms)
    values = torch.stack([view(each) for each in gradient.dense(parameter)])
    return SampleGradient(tuple(part.shape), gradient.samples, [Materialised(values)])


def _as_matrix(
    block: Block, layer: nn.Module, term: Term | None, gradients: Mapping[int, SampleGradient], samples: int
) -> SampleGradient:
    out, in_ = block.products[0].matrix(lambda p: p.detach()).shape
    # An embedding's rows are words; the adapter's matrix is (dimension, words).
    shape = (in_, out) if isinstance(adapted_layer(layer), nn.Embedding) else (out, in_)
    if term is None and any(gradients[id(parameter)].terms for parameter, _ in block.parameters):
        raise ValueError(
            f"Expected a layer whose inputs and outputs give the gradient of {block.name!r}, got a "
            f"{type(adapted_layer(layer)).__name__} that is called, or computes, in another way. "
            "Choose space='tangent'."
        )
    return SampleGradient(shape, samples, [] if term is None else [term])


def _along(change: Matrix, gradient: SampleGradient) -> Matrix:
    """The change of a matrix the way its gradient lies."""
    if tuple(change.shape) == gradient.shape or len(gradient.shape) != 2:
        return change
    return LowRankMatrix(change.right.mT, change.left.mT) if isinstance(change, LowRankMatrix) else change.mT


def _in_tangent_space(
    block: Block,
    tangent: TangentSpace,
    matrix: Term | None,
    precision: torch.dtype,
    gradients: Mapping[int, SampleGradient],
) -> SampleGradient:
    """From gradients of the factors; or from s ∇W itself, for a side that those say too badly."""
    solve_left, solve_right = (True, True) if matrix is None else tangent.is_solvable(precision)
    scale = block.products[0].scale()
    if matrix is None or solve_left:
        along = tangent.solved_left(_beside([(p.right, p.right_view) for p in block.products], gradients, tangent, 1))
    else:
        along = tangent.projected_left(*_factored(matrix)) / scale
    if matrix is None or solve_right:
        beside = tangent.solved_right(_beside([(p.left, p.left_view) for p in block.products], gradients, tangent, 2))
    else:
        beside = tangent.projected_right(*_factored(matrix)) / scale
    coordinates = tangent.coordinates(along, beside)
    return SampleGradient(tuple(coordinates.shape[1:]), len(coordinates), [Materialised(coordinates)])


def _factored(matrix: Term) -> tuple[Float[Tensor, "sample token out"], Float[Tensor, "sample token in"]]:
    """Left and right of Σ_t left_t right_tᵀ; of a matrix that is multiplied out, its rows are the right."""
    assert not isinstance(matrix, Scatter)
    if isinstance(matrix, Outer):
        return matrix.left, matrix.right
    ones = torch.eye(matrix.shape[0], dtype=matrix.values.dtype, device=matrix.values.device)
    return ones.expand(len(matrix.values), *ones.shape), matrix.values


def _beside(
    factors: Sequence[tuple[nn.Parameter, Callable[[Tensor], Tensor]]],
    gradients: Mapping[int, SampleGradient],
    tangent: TangentSpace,
    dimension: int,
) -> Tensor:
    """Gradients of all trained A below, or all trained B beside, each other."""
    found = [torch.vmap(view)(gradients[id(p)].dense(p)) for p, view in factors if p.requires_grad]
    if found:
        return torch.cat(found, dimension)
    samples, like = next(iter(gradients.values())).samples, factors[0][0]
    shape = (samples, 0, len(tangent.right)) if dimension == 1 else (samples, len(tangent.left), 0)
    return at_least_single(like.new_zeros(shape))


def _kept(losses: Tensor, whole: Tensor, skip_broken: bool) -> list[int]:
    """Numbers of the samples whose loss and gradient are finite."""
    broken = (~losses.isfinite() | ~whole.diagonal().isfinite()).nonzero().flatten().tolist()
    if broken and not skip_broken:
        shown = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        raise ValueError(
            f"Expected finite losses and gradients, got {len(broken)} of {len(losses)} samples without (samples "
            f"{shown}). A sample without any label has none. Remove them, or pass skip_broken=True."
        )
    kept = [number for number in range(len(losses)) if number not in set(broken)]
    if not kept:
        raise ValueError(f"Expected a sample with a finite loss and gradient, got none among {len(losses)}.")
    return kept


__all__ = ["FISHERS", "SPACES", "Gram", "gradient_gram"]


#: Name of the block of all trainable parameters together.
GLOBAL = "global"


@dataclass(frozen=True)
class Gram:
    """K = GGᵀ of per-sample gradients G ``(N, d)``, unnormalised: the Fisher's eigenvalues are eig(K)/N.

    Args:
        gram: Block → K ``(N, N)``, float64, on the host. Blocks are the watched matrices by name, every other trainable
            parameter by name, and ``global``, their sum.
        update_product: Block → b = Gδ ``(N,)``; empty without an update.
        update_norm_squared: Block → ‖δ‖² of the part inside the space; empty without an update.
        share_outside_space: Block → share of ‖δ‖² that the space does not hold; NaN where nothing was changed.
        dimension: Block → d, the dimension of the space.
        losses: ``(N,)``, of each sample, in nats.
        covered_share: Share of the trainable numbers that belong to a block: 1, unless blocks were chosen.
        uncovered: Names of trainable parameters that belong to none.
        space: ``"tangent"``, ``"factor"`` or ``"weight"``.
        fisher: ``"empirical"`` or ``"sampled"``.
        one_by_one: Names of parameters whose gradients took a backward pass for each sample.
        projection: k, if gradients were randomly projected to so many numbers: K is an estimate then. 0 if not.
        left_out: Numbers of samples that were left out, because their loss or gradient was not finite.
    """

    gram: Mapping[str, Float[Tensor, "n n"]]
    update_product: Mapping[str, Float[Tensor, " n"]]
    update_norm_squared: Mapping[str, float]
    share_outside_space: Mapping[str, float]
    dimension: Mapping[str, int]
    losses: Float[Tensor, " n"]
    covered_share: float
    uncovered: tuple[str, ...]
    space: str
    fisher: str
    one_by_one: tuple[str, ...] = ()
    left_out: tuple[int, ...] = field(default=())
    projection: int = 0
