"""What one forward pass through a mixture of experts chose: how to read it, learnt once, and its sums.

What is read is what passes through the modules, in this order: indices that the router returns, weights or masks that
are zero for experts that were not chosen, indices that the experts are called with, scores of which the largest k are
chosen, the rows that each expert gets; or, where every expert gets every token, the weights themselves (soft routing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: How a choice is read.
Way: TypeAlias = Literal["indices", "weights", "mask", "arguments", "top_k", "rows", "soft"]
#: What scores are: logits, or what softmax or sigmoid made of them.
Scale: TypeAlias = Literal["logits", "softmax", "sigmoid"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass
class MixturePass:
    """What passed through a mixture in one forward pass.

    Args:
        outputs: Number of the candidate for the router → the tensors that it returned.
        arguments: The tensors that the experts were called with.
        rows: Number of the expert → rows that it was called with.
        tokens: Rows that the block was called with, 0 if unknown.
        mask: True for tokens that count; ``None`` if all do.
    """

    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    arguments: list[Tensor] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    tokens: int = 0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How the choice of a router is read.

    Args:
        way: Where the choice is.
        experts: How many there are; experts without weights, such as those that return their input, are among them.
        router: Which of the candidates is the router, -1 for none.
        choice: Position of what holds the choice among the tensors that are returned, or called with.
        weights: Position of the weights of the indices, -1 for none.
        logits: Position of a score for each expert, -1 for none.
        scale: What the scores are.
        k: Experts of a token, where the choice is made from scores.
    """

    way: Way
    experts: int
    router: int = -1
    choice: int = -1
    weights: int = -1
    logits: int = -1
    scale: Scale = "logits"
    k: int = 0


@dataclass(frozen=True)
class Sums:
    """What was chosen, summed over tokens.

    Args:
        assigned: ``(expert,)`` tokens of each expert, whole numbers; sums of weights for soft routing.
        others: Tokens; sum of their margins; tokens that have a margin.
    """

    assigned: Float[Tensor, " expert"]
    others: Float[Tensor, " 3"]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.assigned + other.assigned.to(self.assigned.device), self.others + other.others.to(self.others.device)
        )


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in what a module returned, in order.

    >>> [tensor.item() for tensor in tensors_in((torch.tensor(1), [torch.tensor(2), None]))]
    [1, 2]
    """
    return list(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            if isinstance(part, Tensor | Mapping | list | tuple):
                yield from _tensors(part)


def token_count(tensor: Tensor) -> int:
    """Return the number of tokens in a tensor whose last dimension is that of features."""
    return tensor.numel() // tensor.shape[-1] if tensor.ndim and tensor.shape[-1] else 0


def learn(
    call: MixturePass, experts: int, ks: Mapping[int, int], order: Sequence[int], *, is_named: bool = True
) -> Layout | None:
    """Return how to read a mixture's choices, ``None`` if nothing in this call tells.

    Args:
        call: What passed through it.
        experts: Number of experts that it holds.
        ks: Number of the candidate → experts of a token, where it or the block says so.
        order: Numbers of the candidates, the likeliest router first.
        is_named: Whether a name speaks of experts or a router. Otherwise layers in a row, beside a head with as many
            outputs, look like experts that all get every token.
    """
    layout = _learn(call, experts, ks, order, is_named=is_named)
    if layout is None or layout.way in ("rows", "soft") or not call.rows:
        return layout
    rows = [float(call.rows.get(expert, 0)) for expert in range(experts)]
    sums = sums_of(layout, MixturePass(call.outputs, call.arguments))
    # Where all experts compute all tokens, weights of zero decide; else what experts are called with is the truth.
    if rows == sums.assigned.tolist()[:experts] or all(row == float(sums.others[0]) for row in rows):
        return layout
    return Layout("rows", experts, layout.router if layout.experts == experts else -1, logits=layout.logits)


def _learn(
    call: MixturePass, experts: int, ks: Mapping[int, int], order: Sequence[int], *, is_named: bool
) -> Layout | None:
    routers = [number for number in order if number in call.outputs]
    for number in routers:
        layout = _returned(call.outputs[number], experts, number, k=ks.get(number, 0))
        if layout is not None:
            return layout
    scored = [(number, position) for number in routers if (position := _scores(call.outputs[number], experts)) >= 0]
    number, position = scored[0] if scored else (-1, -1)
    scores = call.outputs[number][position] if scored else None
    if scores is not None and not scores.numel():  # without a token nothing shows
        return None
    scale = _scale(scores) if scores is not None else "logits"
    width = scores.shape[-1] if scores is not None else experts
    tokens = token_count(scores) if scores is not None else call.tokens
    for choice, weights in _index_pairs(call.arguments, width, tokens):
        return Layout("arguments", width, number, choice, weights, position, scale)
    k = ks.get(number, 0)
    if scores is not None and 0 < k <= width:
        return Layout("top_k", width, number, logits=position, scale=scale, k=k)
    everywhere = scores is not None and all(call.rows.get(expert, 0) == tokens for expert in range(experts))
    if call.rows and not everywhere and (is_named or len({*call.rows.values()}) > 1):
        return Layout("rows", experts, number if width == experts else -1, logits=position, scale=scale, k=k)
    if scores is not None and (call.rows or call.arguments) and scale != "sigmoid" and is_named:
        return Layout("soft", width, number, logits=position, scale=scale)
    return None


def _returned(tensors: Sequence[Tensor], experts: int, number: int, k: int) -> Layout | None:
    """Return the layout of a router that returns its choice, ``None`` if it does not."""
    position = _scores(tensors, experts)
    if position < 0:
        return None
    logits = tensors[position]
    width, tokens, scale = logits.shape[-1], token_count(logits), _scale(logits)
    for choice, weights in _index_pairs(tensors, width, tokens):
        is_mask = tensors[choice].shape[-1] == width and k != width
        if not is_mask:
            return Layout("indices", width, number, choice, weights, position, scale)
    square = [
        other for other, tensor in enumerate(tensors) if tensor.shape[-1:] == (width,) and token_count(tensor) == tokens
    ]
    for other in square:
        # Chosen by a weight: as many zeros as experts that were not, in rows that are not all zero.
        if tensors[other].is_floating_point() and other != position and _is_sparse(tensors[other]):
            return Layout("weights", width, number, other, logits=position, scale=scale)
    for other in square:
        if tensors[other].dtype == torch.bool or (tensors[other].dtype in _INTEGERS and tensors[other].max() <= 1):
            return Layout("mask", width, number, other, logits=position, scale=scale)
    return None


def _index_pairs(tensors: Sequence[Tensor], experts: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield positions of indices of experts, one row a token, and of the weights of the same shape."""
    for choice, tensor in enumerate(tensors):
        is_index = tensor.dtype in _INTEGERS and tensor.ndim > 1 and 0 < tensor.shape[-1] <= experts
        if is_index and token_count(tensor) == tokens:
            for weights, other in enumerate(tensors):
                if other.is_floating_point() and other.shape == tensor.shape:
                    yield choice, weights


def _scores(tensors: Sequence[Tensor], experts: int) -> int:
    """Return the position of a score for each expert, one row a token: the densest of its width; -1 if there is none.

    The width may exceed the number of experts that are held: some choices stand for no computation.
    """
    possible = [
        position
        for position, tensor in enumerate(tensors)
        if tensor.is_floating_point() and tensor.ndim > 1 and experts <= tensor.shape[-1] <= 2 * experts
        if tensor.shape[-1] > 1 or experts == 1
    ]
    dense = [position for position in possible if not _is_sparse(tensors[position])]
    logits = [position for position in dense if bool((tensors[position] < 0).any())]
    return next(iter((*logits, *dense, *possible)), -1)


def _is_sparse(weights: Tensor) -> bool:
    """Return whether some weights are exactly zero in every row."""
    zero = (weights == 0).reshape(-1, weights.shape[-1])
    return bool(zero.numel()) and bool(zero.any(-1).all()) and not bool(zero.all())


def _scale(scores: Tensor) -> Scale:
    """Return what scores are: rows of probabilities, numbers between 0 and 1, or anything."""
    scores = scores.double()
    # Zeros throughout are the logits of a router that begins at zero.
    if not bool(scores.any()) or not bool(((scores >= 0) & (scores <= 1)).all()):
        return "logits"
    return "softmax" if bool((scores.sum(-1) - 1).abs().max() < 0.02) else "sigmoid"


def sums_of(layout: Layout, call: MixturePass) -> Sums:
    """Return the sums of one forward pass.

    Args:
        layout: How to read it.
        call: What passed through.

    Raises:
        LookupError: If something that is to be read did not pass through.
    """
    outputs = call.outputs[layout.router] if layout.router >= 0 else []
    logits = outputs[layout.logits].reshape(-1, outputs[layout.logits].shape[-1]) if layout.logits >= 0 else None
    tokens = call.tokens if logits is None else len(logits)
    mask = None if call.mask is None or call.mask.numel() != tokens else call.mask.reshape(-1)
    if mask is not None and logits is not None:
        mask = mask.to(logits.device)
    if layout.way == "rows":
        assigned = torch.tensor([float(call.rows.get(expert, 0)) for expert in range(layout.experts)])
        return Sums(assigned.double(), torch.tensor([tokens, 0.0, 0.0], dtype=torch.float64))
    if layout.way == "soft":
        assert logits is not None
        weights = logits.double() if layout.scale == "softmax" else logits.double().softmax(-1)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        if mask is not None:
            weights, chosen = weights * mask[:, None], chosen & mask[:, None]
        assigned = weights.sum(0)
    else:
        chosen = _chosen(layout, call, logits)
        if mask is not None:
            chosen = chosen & mask.to(chosen.device)[:, None]
        assigned = chosen.sum(0, dtype=torch.int64).double()
    # Made on the device: nothing here waits for it.
    counted = assigned.new_full((), float(tokens)) if mask is None else mask.sum(dtype=torch.float64)
    return Sums(assigned, torch.stack([counted.to(assigned.device), *_margin(layout, logits, chosen)]))


def _chosen(layout: Layout, call: MixturePass, logits: Tensor | None) -> Bool[Tensor, "token expert"]:
    """Return which experts each token was sent to, with a weight other than 0."""
    if layout.way == "top_k":
        assert logits is not None
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        return chosen.scatter_(-1, logits.topk(layout.k, -1).indices, value=True)
    tensors = call.arguments if layout.way == "arguments" else call.outputs[layout.router]
    choice = tensors[layout.choice].reshape(-1, tensors[layout.choice].shape[-1])
    if layout.way in ("weights", "mask"):
        return choice != 0
    kept = tensors[layout.weights].reshape(choice.shape) != 0
    # An index beyond all experts stands for none, as under expert parallelism.
    kept &= (choice >= 0) & (choice < layout.experts)
    times = torch.zeros(len(choice), layout.experts, dtype=torch.int8, device=choice.device)
    return times.scatter_add_(-1, choice.long().clamp(0, layout.experts - 1), kept.to(torch.int8)) > 0


def _margin(layout: Layout, scores: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the margins, and how many tokens have one."""
    nothing = torch.zeros((), dtype=torch.float64, device=chosen.device)
    if scores is None or scores.shape[-1] != chosen.shape[-1] or not scores.numel():
        return nothing, nothing
    scores = scores.float()
    if layout.scale != "logits":
        others = torch.log1p(-scores).clamp_min(-88.0) if layout.scale == "sigmoid" else 0.0
        scores = scores.clamp_min(torch.finfo(torch.float32).tiny).log() - others
    has_both = chosen.any(-1) & ~chosen.all(-1)
    last = scores.masked_fill(~chosen, torch.inf).amin(-1).double()
    first = scores.masked_fill(chosen, -torch.inf).amax(-1).double()
    return torch.where(has_both, last - first, nothing).sum(), has_both.sum(dtype=torch.float64)
