r"""The empirical Fisher of a model on probe samples, as the Gram matrix of per-sample gradients.

With G ``(N, d)`` the gradients of N samples' losses, F = GᵀG/N and K = GGᵀ share their spectrum (eigenvalues of K over
N), and for an update δ the vector b = Gδ holds all that is wanted of it: δᵀFδ = ‖b‖²/N. Neither G nor F is formed.

One forward and one backward pass a batch. Until K is complete, N·(numbers of the space) are held for each LoRA matrix
(tangent or factor: r(out + in) a sample, in the model's precision), and for each dense weight the inputs and output
gradients of its layer, N·T·(out + in) for T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.batches import ProbeBatch, one_each
from probes.gram import GLOBAL, Gram
from probes.label_sampling import with_sampled_labels
from probes.per_sample import Recording, owners, recording, sample_gradients
from probes.sample_gradients import Materialised, Outer, SampleGradient, Scatter, gram, inner_products, stacked
from probes.spaces import TangentSpace, change_energy, tangent_space
from probes.tasks import probe_loss
from probes.undisturbed import bare, undisturbed
from probes.unwrapping import base_model, class_names, plain_path
from probes.watched import Dense, Matrix, Product, Watched, find, is_sharded

SPACES = ("tangent", "factor", "weight")
FISHERS = ("empirical", "sampled")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class _Block:
    """What one block takes of each batch, until K is formed.

    Args:
        name: Of the block.
        products: Adapters of a low-rank matrix; empty otherwise.
        parameters: Trainable parameters, each with the view of its gradient that is the block's.
        dimension: d.
        tangent: The space, of a low-rank matrix in tangent space.
        module: The adapted layer, of a low-rank matrix in weight space.
        parts: By batch and parameter (or one for all), gradients.
    """

    name: str
    products: tuple[Product, ...] = ()
    parameters: tuple[tuple[nn.Parameter, Callable[[Tensor], Tensor] | None], ...] = ()
    dimension: int = 0
    tangent: TangentSpace | None = None
    module: nn.Module | None = None
    parts: list[list[SampleGradient]] = field(default_factory=list)


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
    skip_broken: bool = False,
) -> Gram:
    r"""Inner products of per-sample gradients of the trainable parameters, and with an update.

    The model is in evaluation mode meanwhile, outside DDP and ``torch.compile``; modes, random states, gradients and
    hooks are as before afterwards. Every trainable number is covered: what no rule can take apart by sample takes a
    backward pass for each sample (``one_by_one``).

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
        update: Matrix (or other trainable parameter) → its change. In factor space parameter name → its change.
        seed: Of the sampled labels.
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
    chosen, uncovered, share = _blocks(model, space, blocks)
    _require_known(update, chosen, space)
    measure = _Measurement(bare(model), chosen, loss, space, fisher, torch.Generator().manual_seed(seed))
    batches: Iterable[Any] = [batch] if isinstance(batch, Mapping) else batch
    with undisturbed(model) as quiet, torch.enable_grad():
        for each in batches:
            measure.add(quiet, each)
    if not measure.losses:
        raise ValueError("Expected at least one batch of probe samples, got none.")
    return measure.result(update, uncovered, share, skip_broken)


class _Measurement:
    """Batches in, K out."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[_Block],
        loss: Loss | None,
        space: str,
        fisher: str,
        generator: torch.Generator,
    ) -> None:
        self._blocks, self._loss, self._space, self._fisher = blocks, loss, space, fisher
        self._generator = generator
        self._parameters = list({id(p): p for block in blocks for p, _ in block.parameters}.values())
        self._adapted = [block.module for block in blocks if block.module is not None]
        self._own = owners(model, self._parameters)
        modules = [module for each in self._own.values() for module, _ in each]
        self._modules = list(dict.fromkeys([*modules, *self._adapted]))
        self._names = {id(p): plain_path(base_model(model), n) for n, p in base_model(model).named_parameters()}
        self._slow: dict[int, str] = {}
        self.losses: list[Tensor] = []

    def add(self, model: nn.Module, batch: Any) -> None:
        """Takes in one batch."""
        batch = _on(batch, next(iter(self._parameters)).device)
        loss = self._loss or probe_loss_of(batch)
        if self._fisher == "sampled":
            batch = with_sampled_labels(model, batch, self._generator)
        with recording(self._modules) as recorded:
            losses = one_each(loss(model, batch), getattr(batch, "samples", None), "loss(model, batch)")
        if not losses.requires_grad:
            raise ValueError("Expected losses with a graph, got some that do not depend on any trainable parameter.")
        self.losses.append(losses.detach().to(device="cpu", dtype=torch.float64))
        self._take(losses, recorded, trusted=_is_text(batch, len(losses)))

    def _take(self, losses: Tensor, recorded: Recording, *, trusted: bool) -> None:
        gradients, slow, matrices = sample_gradients(
            losses, self._parameters, self._own, recorded, outputs_of=self._adapted, trusted=trusted
        )
        self._slow |= {id(parameter): self._names[id(parameter)] for parameter in slow}
        for block in self._blocks:
            if block.module is not None:
                block.parts.append([_as_matrix(block, matrices, len(losses))])
            elif block.tangent is not None:
                block.parts.append([_in_tangent_space(block, block.tangent, gradients)])
            else:
                block.parts.append([_viewed(gradients[id(p)], view, p) for p, view in block.parameters])

    def result(
        self, update: Mapping[str, Matrix] | None, uncovered: tuple[str, ...], share: float, skip_broken: bool
    ) -> Gram:
        """K and b of all batches."""
        losses = torch.cat(self.losses)
        grams: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        inside: dict[str, float] = {}
        whole: dict[str, float] = {}
        for block in self._blocks:
            columns = [stacked(part) for part in zip(*block.parts, strict=True)]
            block.parts.clear()
            grams[block.name] = sum((gram(each) for each in columns), torch.zeros(len(losses), len(losses)).double())
            if update is not None:
                found = self._product(block, columns, update, len(losses))
                products[block.name], inside[block.name], whole[block.name] = found
        grams[GLOBAL] = sum(grams.values(), torch.zeros(len(losses), len(losses)).double())
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
            covered_share=share,
            uncovered=uncovered,
            space=self._space,
            fisher=self._fisher,
            one_by_one=tuple(dict.fromkeys(self._slow.values())),
            left_out=left_out,
        )

    def _product(
        self, block: _Block, columns: Sequence[SampleGradient], update: Mapping[str, Matrix], samples: int
    ) -> tuple[Float[Tensor, " n"], float, float]:
        """b, ‖δ‖² inside the space and in all, of one block."""
        nothing = torch.zeros(samples, dtype=torch.float64), 0.0, 0.0
        if block.products and self._space == "factor":
            changes = [update.get(self._names[id(p)]) for p, _ in block.parameters]
            known = [(column, change) for column, change in zip(columns, changes, strict=True) if change is not None]
            product = sum((inner_products(column, change) for column, change in known), nothing[0])
            size = sum(change_energy(change) for _, change in known)
            return product, size, size
        change = update.get(block.name)
        if change is None:
            return nothing
        size = change_energy(change)
        if block.tangent is None:
            return inner_products(columns[0], change), size, size
        coordinates = block.tangent.of_change(change)
        return inner_products(columns[0], coordinates), float(coordinates.square().sum()), size


def probe_loss_of(batch: Any) -> Loss:
    """How a batch's losses are measured, if nothing else is said."""
    if isinstance(batch, ProbeBatch):
        return probe_loss
    from probes.losses import token_losses

    return token_losses


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, ProbeBatch):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        raise ValueError(f"Expected a batch to be a dict as the model takes it, got {type(batch).__name__}.")
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _is_text(batch: Mapping[str, Any], samples: int) -> bool:
    """Whether all that the model is given is one row of tokens, or one number, a sample."""
    given = [value for value in batch.values() if isinstance(value, Tensor)]
    return all(value.ndim in (1, 2) and value.shape[0] == samples for value in given)


def _blocks(model: nn.Module, space: str, names: Sequence[str] | None) -> tuple[list[_Block], tuple[str, ...], float]:
    """The chosen blocks, trainable parameters that belong to none, and the share that belongs to one."""
    found = find(model)
    base = base_model(model)
    trained = {plain_path(base, path): p for path, p in base.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("Expected a model with trainable parameters, got one in which none requires a gradient.")
    if any(is_sharded(parameter) for parameter in trained.values()):
        raise ValueError(
            "Expected parameters that are whole on each rank, got FSDP 2's shards. Gather the model first."
        )
    adapted = _adapted_layers(base) if space == "weight" else {}
    blocks = [_block(each, space, adapted) for each in found.watched if not each.part_of]
    taken = {id(parameter) for block in blocks for parameter, _ in block.parameters}
    taken |= {id(parameter) for each in found.watched for parameter in each.parameters}
    blocks += [
        _Block(name, parameters=((parameter, None),), dimension=parameter.numel())
        for name, parameter in trained.items()
        if id(parameter) not in taken
    ]
    if names is not None:
        known = {block.name for block in blocks}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"Expected names of blocks, such as {sorted(known)[:3]}, got {unknown[:3]}.")
        blocks = [block for block in blocks if block.name in set(names)]
    covered = {id(parameter) for block in blocks for parameter, _ in block.parameters}
    uncovered = tuple(name for name, parameter in trained.items() if id(parameter) not in covered)
    total = sum(parameter.numel() for parameter in trained.values())
    share = sum(parameter.numel() for parameter in trained.values() if id(parameter) in covered) / total
    return blocks, uncovered, share


def _block(watched: Watched, space: str, adapted: Mapping[int, nn.Module]) -> _Block:
    if isinstance(watched.terms, Dense):
        parameter, view = watched.terms.parameter, watched.terms.view
        matrix = view(parameter.detach())
        return _Block(watched.name, parameters=((parameter, view),), dimension=matrix.numel())
    products = watched.terms
    parameters = tuple({id(p): (p, None) for each in products for p in each.parameters if p.requires_grad}.values())
    if space == "factor":
        views = tuple(
            (p, view)
            for each in products
            for p, view in ((each.left, each.left_view), (each.right, each.right_view), (each.diagonal, None))
            if p is not None and p.requires_grad
        )
        size = sum((view(p.detach()) if view else p).numel() for p, view in views)
        return _Block(watched.name, products, views, size)
    if space == "weight":
        module = adapted.get(id(products[0].left))
        if module is None or "[" in watched.name:
            raise ValueError(
                f"Expected matrices of layers in weight space, got {watched.name!r}, whose gradient no layer's inputs "
                "and outputs say. Choose space='tangent', or other blocks."
            )
        out, in_ = products[0].matrix(lambda p: p.detach()).shape
        return _Block(watched.name, products, parameters, out * in_, module=module)
    tangent = tangent_space(products)
    return _Block(watched.name, products, parameters, tangent.dimension, tangent)


def _adapted_layers(base: nn.Module) -> dict[int, nn.Module]:
    """Parameter of an adapter (by identity) → the layer that it adapts."""
    return {
        id(parameter): module
        for module in base.modules()
        if "BaseTunerLayer" in class_names(module)
        for parameter in module.parameters()
    }


def _require_known(update: Mapping[str, Matrix] | None, blocks: Sequence[_Block], space: str) -> None:
    if update is None or space == "factor":
        return
    known = {block.name for block in blocks}
    if unknown := [name for name in update if name not in known]:
        raise ValueError(
            f"Expected the update of blocks, such as {sorted(known)[:3]}, got {unknown[:3]}. "
            "Leave out what is not measured."
        )


def _viewed(gradient: SampleGradient, view: Callable[[Tensor], Tensor] | None, parameter: Tensor) -> SampleGradient:
    """The block's part of a parameter's gradients."""
    if view is None:
        return gradient
    part = view(parameter.detach())
    if part.numel() == parameter.numel():  # all of it, flattened perhaps: rows stay rows
        return SampleGradient(tuple(part.shape), gradient.samples, gradient.terms)
    values = torch.stack([view(each) for each in gradient.dense(parameter)])
    return SampleGradient(tuple(part.shape), gradient.samples, [Materialised(values)])


def _as_matrix(block: _Block, matrices: Mapping[nn.Module, Outer | Scatter], samples: int) -> SampleGradient:
    assert block.module is not None
    term = matrices.get(block.module)
    if term is None:
        raise ValueError(
            f"Expected the inputs and outputs of {block.name!r} to belong to one sample each, got a layer that is not "
            "called so. Choose space='tangent'."
        )
    out, in_ = block.products[0].matrix(lambda p: p.detach()).shape
    if isinstance(term, Scatter):  # an embedding's own rows are words; the adapter's matrix is (dimension, words)
        ids = torch.nn.functional.one_hot(term.places, term.count).to(term.right.dtype)
        term = Outer(term.right, ids)
    return SampleGradient((out, in_), samples, [term])


def _in_tangent_space(block: _Block, tangent: TangentSpace, gradients: Mapping[int, SampleGradient]) -> SampleGradient:
    lefts, rights = [], []
    for product in block.products:
        left, right = (_factor_gradient(gradients, each) for each in (product.left, product.right))
        lefts.append(_each(product.left_view, left))
        rights.append(_each(product.right_view, right))
    coordinates = tangent.of_gradients(torch.cat(lefts, 2), torch.cat(rights, 1))
    return SampleGradient(tuple(coordinates.shape[1:]), len(coordinates), [Materialised(coordinates)])


def _factor_gradient(gradients: Mapping[int, SampleGradient], parameter: nn.Parameter) -> Tensor:
    if id(parameter) not in gradients:
        samples = next(iter(gradients.values())).samples
        return parameter.new_zeros(samples, *parameter.shape)
    return gradients[id(parameter)].dense(parameter)


def _each(view: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return torch.vmap(view)(values)


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
