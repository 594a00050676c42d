"""Copies of a model's parameters at one step, and the start of a training as it is kept beside its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from probes.watched import AdapterProduct, Dense, Matrix, Watched, shape_of


@dataclass
class Snapshot:
    """Values of parameters (by identity) and scales of adapters (by the identity of their factors) at one step."""

    values: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[tuple[int, int], float] = field(default_factory=dict)

    def holds(self, watched: Watched) -> bool:
        """Return whether the matrix can be read from it."""
        return all(id(parameter) in self.values for parameter in watched.sources)

    def part(self, watched: Watched) -> Watched | None:
        """Return the matrix with only those of its adapters that can be read from it, ``None`` if none can."""
        if isinstance(watched.terms, Dense):
            return watched if self.holds(watched) else None
        terms = tuple(term for term in watched.terms if all(id(p) in self.values for p in term.parameters))
        return replace(watched, terms=terms) if terms else None

    def read(self, watched: Watched) -> Matrix:
        """Return the matrix as it was."""
        scales = [self.scales.get(factors_of(term), scale) for term, scale in scaled_products(watched)]
        return watched.read(lambda parameter: self.values[id(parameter)], scales)


def terms_of(watched: Watched) -> tuple[AdapterProduct | Dense, ...]:
    """Return the adapters that add up to a matrix, or the weight itself."""
    return (watched.terms,) if isinstance(watched.terms, Dense) else watched.terms


def factors_of(product: AdapterProduct) -> tuple[int, int]:
    """Return the identities of an adapter's factors, which tell it from every other."""
    return id(product.left), id(product.right)


def scaled_products(watched: Watched) -> list[tuple[AdapterProduct, float]]:
    """Return each adapter of a matrix with its scale as it is now; none of a dense weight."""
    return [] if isinstance(watched.terms, Dense) else [(term, term.scale()) for term in watched.terms]


def keys_of(watched: Sequence[Watched]) -> dict[nn.Parameter, str]:
    """Return each parameter once, with a name for it: its first matrix and its position there."""
    keys: dict[nn.Parameter, str] = {}
    for matrix in watched:
        for index, parameter in enumerate(matrix.sources):
            keys.setdefault(parameter, f"{matrix.name}#{index}")
    return keys


def start_tensors(
    start: Snapshot, watched: Sequence[Watched], keys: Mapping[nn.Parameter, str], step: int | None = None
) -> dict[str, Tensor]:
    """Return the start of matrices as tensors by name, for :func:`start_snapshot`.

    Args:
        start: The values that are not those of a product of zero.
        watched: The matrices.
        keys: As :func:`keys_of` gives them.
        step: At which these matrices began to be watched, where that is not the beginning of the training. Then a
            product that was zero is kept as zeros, in place of what went by its name before.
    """
    suffix = "" if step is None else f"~{step}"
    tensors: dict[str, Tensor] = {}
    for matrix in watched:
        if start.part(matrix) is None and (matrix.is_dense or step is None):
            continue
        for parameter in matrix.sources:
            value = start.values.get(id(parameter))
            if value is not None or step is not None:
                zero = torch.zeros(shape_of(parameter), dtype=parameter.dtype)
                tensors[f"{keys[parameter]}{suffix}"] = zero if value is None else value
        scales = [start.scales.get(factors_of(term), scale) for term, scale in scaled_products(matrix)]
        if scales:
            tensors[f"{matrix.name}#scales{suffix}"] = torch.tensor(scales, dtype=torch.float64)
    return tensors


def start_snapshot(
    tensors: Mapping[str, Tensor],
    step: int,
    watched: Sequence[Watched],
    keys: Mapping[nn.Parameter, str],
    home: Callable[[nn.Parameter], torch.device],
) -> Snapshot:
    """Read the start of matrices from what :func:`start_tensors` gave, each part as last written up to a step.

    Args:
        tensors: By name.
        step: The step that is resumed from.
        watched: The matrices.
        keys: As :func:`keys_of` gives them.
        home: The device of a parameter's copy.
    """
    latest: dict[str, tuple[int, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, digits = key.rpartition("~")
        name, written = (name, int(digits)) if name and digits.isdecimal() else (key, 0)
        if written <= step and (name not in latest or written >= latest[name][0]):
            latest[name] = written, tensor
    start = Snapshot()
    for parameter, key in keys.items():
        if key in latest:
            start.values[id(parameter)] = latest[key][1].to(home(parameter))
    for matrix in watched:
        scales = latest[f"{matrix.name}#scales"][1].tolist() if f"{matrix.name}#scales" in latest else []
        for (term, _), scale in zip(scaled_products(matrix), scales, strict=False):
            start.scales[factors_of(term)] = scale
            if all(id(p) in start.values and not start.values[id(p)].any() for p in term.parameters):
                for parameter in term.parameters:
                    start.values.pop(id(parameter), None)
    return start
