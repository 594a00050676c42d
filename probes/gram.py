r"""The empirical Fisher of a model on probe samples: the Gram matrix of per-sample gradients.

With G ``(N, d)`` the gradients of N samples' losses, F = GᵀG/N and K = GGᵀ share their spectrum (eigenvalues of K over
N), and for an update δ the vector b = Gδ is enough: δᵀFδ = ‖b‖²/N. Neither G nor F is formed.

Cost: one forward and one backward pass a batch. Rows have to be matched to samples by a second backward pass for each
batch of images and each batch with a user's loss, and for the first batch of text if it is small; for 16 texts or more
with the model's own loss, two of them, forward once more and backward twice, stand for all. Until K is complete, a
sample takes r(out + in) numbers for each LoRA matrix in tangent or factor space, in the model's precision, single at
least. For each dense weight, and in weight space, it takes the inputs and output gradients of the layer, T·(out + in)
numbers for T tokens, or out·in where that is less; their inner products, at N samples in a batch, ½ + N/(2T) of the
operations of a forward and backward pass. Inner products between batches need the gradients of all samples: to bound
memory, choose ``blocks`` and call again.

In tangent space ∇W is projected from gradients of the factors, by r×r solves. Where these would amplify rounding, it
comes from inputs of A and output gradients of B, if the factors belong to layers (not to experts or embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.block_gradients import along, factors, gradient_as_matrix, in_tangent_space, part_of, viewed
from probes.blocks import Block, Blocks, find_blocks, trained_parameters
from probes.losses import token_losses
from probes.per_sample import Chain, ForwardCalls, owners, recording, sample_gradients
from probes.preconditioned_gram import Draws, Preconditioning
from probes.preconditioner import Preconditioner, preconditioner_of
from probes.sample_gradients import (
    Materialised,
    SampleGradient,
    compact,
    gram,
    inner_products,
    projected,
    stacked,
    summed,
)
from probes.spaces import change_energy
from probes.tasks import (
    ProbeBatch,
    Task,
    is_text,
    on_device,
    one_each,
    probe_batches,
    probe_loss,
    some_samples,
    with_sampled_labels,
)
from probes.undisturbed import bare, undisturbed
from probes.watched import Matrix

#: Name of the block of all trainable parameters together.
GLOBAL = "global"
SPACES = ("tangent", "factor", "weight")
FISHERS = ("empirical", "sampled")
Loss = Callable[[nn.Module, Any], Tensor]
Array = Tensor | np.ndarray
Labels = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class ProbeGram:
    """K = GGᵀ of per-sample gradients G ``(N, d)``, with all that the statistics of a Fisher depend on.

    K is unnormalised: the Fisher's eigenvalues are eig(K)/N. :func:`gradient_gram` makes one; a K from elsewhere can be
    put into one by hand, with what is known beside it.

    Args:
        gram: Block → K ``(N, N)``, in (loss/weight)². Blocks are the watched matrices by name, every other trainable
            parameter by name, and ``global``, their sum.
        update_product: Block → b = Gδ ``(N,)``, in units of the loss; empty without an update.
        update_norm_squared: Block → ‖δ‖² of the part inside the space; empty without an update.
        share_outside_space: Block → share of ‖δ‖² outside the space; NaN where nothing was changed.
        dimension: Block → d, the dimension of the space; empty if unknown, which counts as larger than N.
        losses: ``(N,)``, of each sample, in nats; ``None`` if unknown.
        tasks: Task of each sample; empty if there is only one.
        groups: Group of each sample (its image, patient, document); empty if samples are independent.
        sample_ids: Name of each sample; empty if they have none.
        batch_size: Training samples behind the update: the optimizer's batch times the steps of the update. With
            momentum β a single step counts (1 + β)/(1 − β) times. 0 if unknown.
        covered_share: Share of the trainable numbers that belong to a block: 1, unless blocks were chosen.
        uncovered: Names of trainable parameters that belong to no block.
        space: ``"tangent"``, ``"factor"`` or ``"weight"``; empty if unknown.
        fisher: ``"empirical"`` or ``"sampled"``.
        one_by_one: Names of parameters whose gradients took one backward pass a sample.
        left_out: Positions of samples without a finite loss or gradient among those given. They have no row in K.
        projection: k, if gradients were randomly projected to k numbers: K is an estimate then. 0 if they were not.
        preconditioned_product: Block → G P Gᵀ ``(N, N)``, P the optimizer's preconditioner, whose rates count relative
            to the largest; empty if not measured, K itself where P is 1.
        preconditioned_gram: Block → G P² Gᵀ ``(N, N)``, likewise.
        drawn_product: Block → G P(Gᵀw) ``(N, draws)`` for combinations w of samples, where P is not linear.
        drawn_norm_squared: Block → ‖P(Gᵀw)‖² ``(draws,)``.
        optimizer_gradients: How many equally weighted gradients the optimizer's second moments rest on; NaN without.
        unpreconditioned: Why some or all of it is missing; empty if nothing is.

    >>> ProbeGram({"global": np.eye(2)}, tasks=("chart", "text")).blocks
    ('global',)
    """

    gram: Mapping[str, Array]
    update_product: Mapping[str, Array] = field(default_factory=dict)
    update_norm_squared: Mapping[str, float | int] = field(default_factory=dict)
    share_outside_space: Mapping[str, float | int] = field(default_factory=dict)
    dimension: Mapping[str, float | int] = field(default_factory=dict)
    losses: Array | None = None
    tasks: Labels = ()
    groups: Labels = ()
    sample_ids: Labels = ()
    batch_size: int = 0
    covered_share: float = 1.0
    uncovered: tuple[str, ...] = ()
    space: str = ""
    fisher: str = "empirical"
    one_by_one: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    projection: int = 0
    preconditioned_product: Mapping[str, Array] = field(default_factory=dict)
    preconditioned_gram: Mapping[str, Array] = field(default_factory=dict)
    drawn_product: Mapping[str, Array] = field(default_factory=dict)
    drawn_norm_squared: Mapping[str, Array] = field(default_factory=dict)
    optimizer_gradients: float = float("nan")
    unpreconditioned: str = ""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(self.gram)


def gradient_gram(
    model: nn.Module,
    tasks: Task | Sequence[Task] | Mapping[str, Any] | Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    update: Mapping[str, Matrix] | None = None,
    batch_size: int = 0,
    space: str = "tangent",
    fisher: str = "empirical",
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    projection: int = 0,
    skip_broken: bool = False,
    optimizer: Any = None,
    draws: Draws | None = None,
) -> ProbeGram:
    r"""Return the inner products of per-sample gradients of the trainable parameters, and those with an update.

    The model is in evaluation mode meanwhile, outside DDP and ``torch.compile``; modes, random states, gradients and
    hooks are as before afterwards. Every trainable number is covered: where no rule separates the samples, each takes a
    backward pass of its own (``one_by_one``). The gradient of a sample is that of its own loss within its batch: where
    samples interact (in-batch negatives, batch statistics), it depends on the batch. In 16 texts or more, two are
    checked; if only others interact, that goes unnoticed.

    Args:
        model: With adapters, dense trainable weights, or both.
        tasks: Held-out samples: one task or several, whose samples are batched and named here. Or one batch, a dict as
            the model takes it, or an iterable of batches, read one at a time; their samples have no names.
        loss: (model, batch) → losses ``[samples]``, for batches; by default the model's own cross-entropy summed over a
            sample's tokens. Tasks have their own.
        update: Matrix (or other trainable parameter) → its change; of factors, in factor space, parameter → its
            change. What is not named has not changed.
        batch_size: Training samples behind the update, for :func:`dynamics.concentration`; 0 if unknown.
        space: For low-rank matrices: ``"tangent"``, what a step of the factors can reach, the same for every gauge;
            ``"factor"``, the factors as they are; ``"weight"``, the adapted weight itself. Dense parameters are the
            same in all three.
        fisher: ``"empirical"``: gradients for the data's labels. ``"sampled"``: for labels drawn from the model's own
            prediction, whose mean is the true Fisher; only with the model's own loss.
        blocks: Names of the blocks to measure; by default all. ``["global"]``: of all blocks, keep only their sum.
        seed: Seed of the sampled labels and of the projection.
        projection: k: project each sample's gradient of a block randomly to k numbers, so that only N·k are held. K is
            then an estimate (:mod:`probes.sample_gradients`), b is exact. 0 for none.
        skip_broken: Leave out and list samples whose loss or gradient is not finite, instead of raising.
        optimizer: The optimizer that made the update, as it is after its step: gradients are passed through its
            preconditioner, too, see :func:`probes.preconditioner.preconditioner_of`.
        draws: For an optimizer that is not linear (Muon): combinations of samples whose gradients are passed through
            it, given K of a block; see :func:`dynamics.fisher.concentration.predictive_draws`.

    Raises:
        ValueError: If there is nothing to differentiate, an argument is invalid, a loss does not return one number a
            sample, a sample's loss or gradient is not finite, or the optimizer's preconditioner is unknown.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> def squares(model, batch):
    ...     return model(batch["x"])[:, 0] ** 2 / 2
    >>> tasks = [Task("first", [{"x": [1.0, 0.0]}], loss=squares), Task("second", [{"x": [0.0, 1.0]}], loss=squares)]
    >>> gram = gradient_gram(layer, tasks, update={"weight": torch.tensor([[2.0, 0.0]])})
    >>> gram.gram["global"].tolist()  # gradients (1, 0) and (0, 1)
    [[1.0, 0.0], [0.0, 1.0]]
    >>> gram.update_product["global"].tolist(), gram.tasks, gram.sample_ids
    ([2.0, 0.0], ('first', 'second'), ('first/0', 'second/0'))
    """
    if space not in SPACES:
        raise ValueError(f"Expected space to be one of {', '.join(SPACES)}, got {space!r}.")
    if fisher not in FISHERS:
        raise ValueError(f"Expected fisher to be one of {', '.join(FISHERS)}, got {fisher!r}.")
    if projection < 0:
        raise ValueError(f"Expected a projection to at least 1 number, or 0 for none, got {projection}.")
    batches, labels = _batches_and_labels(tasks, loss)
    together = blocks is not None and list(blocks) == [GLOBAL]
    found = find_blocks(model, space, None if together else blocks)
    passing = None
    if optimizer is not None:
        passing = Preconditioning(_preconditioner(optimizer), found.chosen, draws, together=together)
    measurement = Measurement(model, found, loss, space, fisher, seed, projection, update, passing)
    with undisturbed(model) as quiet, torch.enable_grad():
        for batch in batches:
            measurement.add(quiet, batch)
    if not measurement.losses:
        raise ValueError("Expected at least one batch of probe samples, got none.")
    return measurement.result(labels, batch_size, skip_broken, together=together)


def _preconditioner(optimizer: Any) -> Preconditioner:
    try:
        return optimizer if isinstance(optimizer, Preconditioner) else preconditioner_of(optimizer)
    except ValueError as error:
        raise ValueError(f"Expected an optimizer whose steps are known, but {error}. Leave optimizer out.") from error


def _batches_and_labels(tasks: Any, loss: Loss | None) -> tuple[Iterable[Any], Sequence[Sequence[str]]]:
    """Return batches, and task, group and name of each sample in them; no labels of batches."""
    if isinstance(tasks, Mapping):
        return [tasks], ((), (), ())
    tasks = [tasks] if isinstance(tasks, Task) else tasks
    if not isinstance(tasks, list | tuple) or not any(isinstance(task, Task) for task in tasks):
        return tasks, ((), (), ())
    if strange := [type(task).__name__ for task in tasks if not isinstance(task, Task)]:
        raise ValueError(f"Expected tasks or batches, got tasks and {', '.join(strange)} in one list.")
    if loss is not None:
        raise ValueError(
            "Expected tasks without a loss beside them. Give each its own: Task(name, samples, loss=loss)."
        )
    batches, *labels = probe_batches(tasks)
    return batches, labels


class Measurement:
    """Batches in, K out; or their gradients, which each block holds until they are taken."""

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
        preconditioning: Preconditioning | None = None,
    ) -> None:
        self._coverage, self._blocks = blocks, blocks.chosen
        self._loss, self._space, self._fisher = loss, space, fisher
        self._generator, self._seed, self._projection = torch.Generator().manual_seed(seed), seed, projection
        self._parameters = list({id(p): p for block in self._blocks for p, _ in block.parameters}.values())
        self._own = owners(bare(model), [*self._parameters, *(p for b in self._blocks for p in factors(b))])
        self._chains = {block.name: chain for block in self._blocks if (chain := self._chain(block)) is not None}
        modules = [module for owning in self._own.values() for module, _ in owning]
        self._modules = list(dict.fromkeys([*modules, *(m for chain in self._chains.values() for m in chain)]))
        self._names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
        self._slow: dict[int, str] = {}
        self._in_order: bool | None = None  # of batches of text, once one was looked at
        self._update, self._preconditioning = update, preconditioning
        self._products: dict[str, list[tuple[Tensor, float, float]]] = {}
        self.losses: list[Tensor] = []
        self._require_known(update)

    def _require_known(self, update: Mapping[str, Matrix] | None) -> None:
        """Refuse changes that would be ignored silently."""
        names: set[str] = set()
        for block in self._blocks:
            by_parameters = block.products and self._space == "factor"
            names |= {self._names[id(p)] for p, _ in block.parameters} if by_parameters else {block.name}
        if unknown := [name for name in update or () if name not in names]:
            kind = "parameters" if self._space == "factor" else "blocks"
            raise ValueError(
                f"Expected the update of {kind}, such as {sorted(names)[:3]}, got {unknown[:3]}. "
                "Leave out what is not measured."
            )

    def parameter_names(self, block: Block) -> list[str]:
        """Return the names of a block's trained parameters, in its order."""
        return [self._names[id(parameter)] for parameter, _ in block.parameters]

    def add(self, model: nn.Module, batch: Any) -> None:
        """Measure one batch."""
        batch = on_device(batch, next(iter(self._parameters)).device)
        loss = self._loss or probe_loss_of(batch)
        if self._fisher == "sampled":
            batch = with_sampled_labels(model, batch, self._generator)
        losses, recorded = self._forward(model, batch, loss)
        if not losses.requires_grad:
            raise ValueError("Expected losses with a graph, got some that do not depend on any trainable parameter.")
        self.losses.append(losses.detach().to(device="cpu", dtype=torch.float64))
        # A sample may have any number of images, and a user's loss may let samples interact: each batch is checked. For
        # text and the model's own loss, checking two samples of the first batch is enough.
        plain = is_text(batch, len(losses)) and not _is_users(loss, batch)
        unknown = plain and self._in_order is None and all(isinstance(value, Tensor) for value in batch.values())
        alone = lambda numbers: self._forward(model, some_samples(batch, numbers), loss)  # noqa: E731
        trusted = plain and self._in_order is True
        in_order = self._take(losses, recorded, trusted=trusted, alone=alone if unknown else None)
        if plain and len(losses) > 1 and self._in_order is not False:
            self._in_order = in_order

    def _forward(self, model: nn.Module, batch: Any, loss: Loss) -> tuple[Tensor, ForwardCalls]:
        """Return the losses of a batch, and the calls that gave them."""
        with recording(self._modules) as recorded:
            losses = one_each(loss(model, batch), getattr(batch, "samples", None), "loss(model, batch)")
        return losses, recorded

    def _take(
        self,
        losses: Tensor,
        recorded: ForwardCalls,
        *,
        trusted: bool,
        alone: Callable[[Sequence[int]], tuple[Tensor, ForwardCalls]] | None,
    ) -> bool:
        """Take the gradients of one batch; return whether rows were in the samples' order."""
        chains = [self._chains[block.name] for block in self._blocks if self._needs_matrix(block, recorded)]
        taken = sample_gradients(
            losses, self._parameters, self._own, recorded, chains=chains, trusted=trusted, alone=alone
        )
        slow = {chain for chain in taken.one_by_one if isinstance(chain, tuple)}
        for block in self._blocks:
            for parameter, _ in block.parameters:
                by_itself = any(parameter is slow_one for slow_one in taken.one_by_one)
                if by_itself or (block.layer is not None and self._chains[block.name] in slow):
                    self._slow[id(parameter)] = self._names[id(parameter)]
            chain = self._chains.get(block.name)
            matrix = taken.matrices.get(chain) if chain is not None else None
            if block.tangent is not None:
                precision = _precision(chain, recorded)
                part = [in_tangent_space(block, block.tangent, matrix, precision, taken.parameters)]
            elif block.layer is not None:
                part = [gradient_as_matrix(block, block.layer, matrix, taken.parameters, len(losses))]
            else:
                part = [viewed(taken.parameters[id(p)], view, p) for p, view in block.parameters]
            self._keep(block, part)
        return taken.in_order

    def _keep(self, block: Block, part: Sequence[SampleGradient]) -> None:
        """Keep what is needed of a block's gradients in one batch."""
        kept = self._projected(block, part) if self._projection else [compact(gradient) for gradient in part]
        block.parts.append(kept)

    def _needs_matrix(self, block: Block, recorded: ForwardCalls) -> bool:
        """Return whether ∇W comes from the layer itself: in weight space, or where solving would lose digits."""
        chain = self._chains.get(block.name)
        if chain is None or block.tangent is None:
            return chain is not None
        return not all(block.tangent.is_solvable(_precision(chain, recorded)))

    def _projected(self, block: Block, part: Sequence[SampleGradient]) -> list[SampleGradient]:
        """Return the block's gradients as k numbers a sample, after taking their products with the update."""
        if self._update is not None:
            products = self.product(block, part, self._update, part[0].samples)
            self._products.setdefault(block.name, []).append(products)
        position = next(position for position, candidate in enumerate(self._blocks) if candidate is block)
        like = self._parameters[0].detach()
        numbers = [
            projected(gradient, self._projection, self._seed + 1_000_003 * position + number, like)
            for number, gradient in enumerate(part)
        ]
        values = torch.stack(numbers).sum(0)
        return [SampleGradient(tuple(values.shape[1:]), len(values), [Materialised(values)])]

    def _chain(self, block: Block) -> Chain | None:
        """Return the modules whose inputs and output gradients give ∇W: the adapted layer, or A and B (s ∇W)."""
        if block.layer is not None:
            return block.layer, block.layer
        if block.tangent is None or block.products[0].scale() == 0:
            return None
        owning = [self._own.get(id(parameter), []) for parameter in factors(block)]
        if any(len(modules) != 1 for modules in owning):
            return None
        (first, _), (last, _) = owning[0][0], owning[1][0]
        return (first, last) if first is not last else None

    def _product_of(self, block: Block, columns: Sequence[SampleGradient], samples: int) -> tuple[Tensor, float, float]:
        """Return b, ‖δ‖² inside the space, and all of ‖δ‖², over all batches."""
        assert self._update is not None
        if not self._projection:
            return self.product(block, columns, self._update, samples)
        parts = self._products[block.name]
        return torch.cat([product for product, _, _ in parts]), *parts[0][1:]

    def result(
        self, labels: Sequence[Sequence[str]], batch_size: int, skip_broken: bool, *, together: bool = False
    ) -> ProbeGram:
        """Return K and b of all batches, or only their sum, with the labels of the samples that are kept."""
        update, losses = self._update, torch.cat(self.losses)
        projections: list[SampleGradient] = []
        whole = torch.zeros(len(losses), len(losses), dtype=torch.float64)
        grams: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        inside: dict[str, float] = {}
        norms: dict[str, float] = {}
        for block in self._blocks:
            columns = [stacked(part) for part in zip(*block.parts, strict=True)]
            block.parts.clear()
            k = sum((gram(column) for column in columns), torch.zeros(len(losses), len(losses)).double())
            whole += k
            if not together:
                grams[block.name] = k
            projections += columns if self._projection else ()
            if self._preconditioning is not None and not self._projection:
                self._preconditioning.add(block, columns, k)
            if update is not None:
                product, inside[block.name], norms[block.name] = self._product_of(block, columns, len(losses))
                products[block.name] = product
        # Projected gradients of all blocks are added, not their K, so that global is one projection to k numbers too.
        grams[GLOBAL] = gram(summed(projections)) if projections else whole
        if update is not None:
            products[GLOBAL] = sum(products.values(), torch.zeros(len(losses)).double())
            inside[GLOBAL], norms[GLOBAL] = sum(inside.values()), sum(norms.values())
        kept = _kept(losses, grams[GLOBAL], skip_broken)
        left_out = tuple(sorted(set(range(len(losses))) - set(kept)))
        dimension = {block.name: block.dimension for block in self._blocks}
        dimension[GLOBAL] = sum(dimension.values())
        tasks, groups, sample_ids = (tuple(names[sample] for sample in kept) if names else () for names in labels)
        chosen = {name: k[kept][:, kept] for name, k in grams.items()}
        passed = {} if self._preconditioning is None else self._preconditioning.result(chosen, kept, GLOBAL)
        return ProbeGram(
            gram=chosen,
            update_product={name: products[name][kept] for name in grams if name in products},
            update_norm_squared={name: inside[name] for name in grams if name in inside},
            share_outside_space={
                name: max(0.0, 1 - inside[name] / norms[name]) if norms[name] > 0 else float("nan")
                for name in grams
                if name in norms
            },
            dimension={name: dimension[name] for name in grams},
            losses=losses[kept],
            tasks=tasks,
            groups=groups,
            sample_ids=sample_ids,
            batch_size=batch_size,
            covered_share=self._coverage.covered_share,
            uncovered=self._coverage.uncovered,
            space=self._space,
            fisher=self._fisher,
            one_by_one=tuple(dict.fromkeys(self._slow.values())),
            left_out=left_out,
            projection=self._projection,
            **passed,
        )

    def product(
        self, block: Block, columns: Sequence[SampleGradient], update: Mapping[str, Matrix], samples: int
    ) -> tuple[Float[Tensor, " n"], float, float]:
        """Return b, ‖δ‖² inside the space, and all of ‖δ‖², of one block."""
        nothing = torch.zeros(samples, dtype=torch.float64), 0.0, 0.0
        if block.products and self._space == "factor":
            changes = [part_of(update.get(self._names[id(p)]), view) for p, view in block.parameters]
            pairs = [(column, change) for column, change in zip(columns, changes, strict=True) if change is not None]
            product = sum((inner_products(column, change) for column, change in pairs), nothing[0])
            size = sum(change_energy(change) for _, change in pairs)
            return product, size, size
        change = update.get(block.name)
        if change is None:
            return nothing
        size = change_energy(change)
        if block.tangent is None:
            return inner_products(columns[0], along(change, columns[0])), size, size
        coordinates = block.tangent.of_change(change)
        return inner_products(columns[0], coordinates), float(coordinates.square().sum()), size


def _precision(chain: Chain | None, recorded: ForwardCalls) -> torch.dtype:
    """Return the precision of the second module's output."""
    calls = recorded.calls.get(chain[1], []) if chain is not None else []
    return calls[0].output.dtype if calls else torch.float64


def probe_loss_of(batch: Any) -> Loss:
    """Return how a batch's losses are measured by default."""
    return probe_loss if isinstance(batch, ProbeBatch) else token_losses


def _is_users(loss: Loss, batch: Any) -> bool:
    """Return whether losses come from a user's function, not from the model's own loss."""
    loss = batch.loss if loss is probe_loss else loss
    task = getattr(loss, "__self__", None)
    return callable(task.loss) if isinstance(task, Task) else loss is not token_losses


def _kept(losses: Tensor, whole: Tensor, skip_broken: bool) -> list[int]:
    """Return the positions of the samples whose loss and gradient are finite."""
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
