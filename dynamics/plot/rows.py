"""In which order matrices are shown: by role, and within a role by layer, as the model has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import xarray as xr

#: A number that stands for itself in a name: a layer, an expert; not the 1 of fc1.
_NUMBER = re.compile(r"(?:^|[.\[])(\d+)(?=[.\]]|$)")


@dataclass(frozen=True)
class RowGroup:
    """Matrices of one role in one stack of layers.

    Args:
        label: The role; with its stack where the model has several.
        positions: Of the matrices along ``matrix``, in the order to show them.
        labels: A short one for each: the layer, or what else tells it apart.
        numbered: Whether the labels are numbers of one role's matrices, rather than names.
    """

    label: str
    positions: tuple[int, ...]
    labels: tuple[str, ...]
    numbered: bool = True


def row_groups(update: xr.Dataset) -> list[RowGroup]:
    """Groups in the order in which the model has them; roles that occur once share the last group.

    Args:
        update: The ``/update`` group of a result.
    """
    names = [str(name) for name in update["matrix"].values]
    roles = [str(role) for role in update["role"].values]
    stacks = [str(stack) for stack in update["stack"].values]
    layers = [int(layer) for layer in update["layer"].values]
    members: dict[tuple[str, str], list[int]] = {}
    for position, key in enumerate(zip(stacks, roles, strict=True)):
        members.setdefault(key, []).append(position)
    several = len({stack for stack in stacks if stack}) > 1
    groups, single = [], []
    for (stack, role), positions in members.items():
        if len(positions) == 1:
            single += positions
            continue
        ordered = sorted(positions, key=lambda position: _numbers(names[position]))
        label = f"{role} in {stack}" if several and stack else role
        groups.append(RowGroup(label, tuple(ordered), tuple(_labels(names, layers, ordered))))
    if single:
        label = "single matrices" if groups else "matrices"
        groups.append(RowGroup(label, tuple(single), tuple(names[position] for position in single), False))
    return groups


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(name))


def _labels(names: list[str], layers: list[int], positions: list[int]) -> list[str]:
    """Layer numbers; where experts share a layer, all numbers of the name."""
    own = [layers[position] for position in positions]
    if len(np.unique(own)) == len(own):
        return [str(layer) for layer in own]
    return [".".join(str(number) for number in _numbers(names[position])) for position in positions]
