"""What the plots read of a result.

One block, one step, one task of the Fisher's groups, by name; and how their variables are called.

In which order matrices are shown: by role, and within a role by layer, as the model has them.

Which matrices stand out, by a rule that is said beside them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics import schema
from dynamics.plot.style import shorten, without_mathematics
from dynamics.schema import ALL, GLOBAL, last_step_with

_UNITS = {"1": "", "weight": "weight units"}


def group(data: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    """One group of a run's result.

    Args:
        data: The result of one run, or the group itself.
        name: ``"update"``, ``"null"``, ``"summary"``, ``"summary_gradient"`` or ``"training"``.

    Raises:
        ValueError: If the tree holds several runs, or lacks the group.
    """
    if isinstance(data, xr.Dataset):
        return data
    if "runs" in data.children:
        names = list(data["runs"].children)
        raise ValueError(f"Expected the result of one run, got {len(names)} runs. Pass one: tree['runs/{names[0]}'].")
    if name not in data.children:
        raise ValueError(f"Expected a result with the group /{name}, got one with {list(data.children)}.")
    return data[name].to_dataset()


def related(data: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    """``/association`` or ``/comparison``, which stand at the root also of several runs.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(data, xr.Dataset):
        return data
    if name not in data.children:
        needs = "scores of its runs (--scores FILE)" if name == "association" else "groups of runs (LABEL=RUN)"
        raise ValueError(f"Expected a result with the group /{name}, which needs {needs}; got {list(data.children)}.")
    return data[name].to_dataset().load()


def has_group(data: xr.DataTree | xr.Dataset, name: str) -> bool:
    """Whether the data is a tree with that group."""
    return isinstance(data, xr.DataTree) and name in data.children


def variable_of(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """A variable, or an error that says which there are.

    Raises:
        ValueError: If there is no such variable.
    """
    if name not in dataset:
        known = ", ".join(sorted(str(key) for key in dataset.data_vars))
        raise ValueError(f"Expected the name of a variable of the result, got {name!r}. There are: {known}.")
    return dataset[name]


def long_name(name: str) -> str:
    """How a variable is called in titles.

    >>> long_name("effective_rank_energy")
    'effective rank (energy)'
    """
    known = schema.UPDATE.get(name)
    return name.replace("_", " ") if known is None else known.long_name


def axis_label(name: str) -> str:
    """Label of an axis whose title has the name: the units, for a pure number its name.

    >>> axis_label("entropy_deficit"), axis_label("stable_rank")
    ('nat', 'stable rank')
    """
    known = schema.UPDATE.get(name)
    return long_name(name) if known is None else _UNITS.get(known.units, known.units) or known.long_name


def chosen(dataset: xr.Dataset, variable: str, *, step: int | None = None, **names: str | int) -> xr.Dataset:
    """The dataset at one step and, by name, in one block and of one task.

    Args:
        dataset: With the dimension ``step``.
        variable: What will be drawn: without a step the last one is taken that has a number of it.
        step: Of the result.
        names: ``block="global"`` and the like.

    Raises:
        ValueError: If there is no such variable, step or name.
    """
    variable_of(dataset, variable)
    for dim, name in names.items():
        _check(dim, name, dataset[dim].values.tolist())
    here = dataset.sel(names)
    if step is None:
        step = last_step_with(here[variable])
    _check("step", step, dataset["step"].values.tolist())
    return here.sel(step=step)


def tasks_of(dataset: xr.Dataset) -> list[str]:
    """Names of the tasks but the one that stands for all; none if there is a single one, which is the same."""
    names = [str(name) for name in dataset["task"].values if name != ALL]
    return names if len(names) > 1 else []


def label_of(array: xr.DataArray) -> str:
    """Label of an axis: the units, for a pure number its name."""
    units = str(array.attrs.get("units", "1"))
    return name_of(array) if units == "1" else units


def name_of(array: xr.DataArray) -> str:
    """How a variable is called."""
    return str(array.attrs.get("long_name", array.name))


def of_block(block: str) -> str:
    """For the end of a description; nothing for all trainable parameters together.

    >>> of_block("global"), of_block("lm_head")
    ('', ', lm_head')
    """
    return "" if block == GLOBAL else f", {block}"


def write_title(axes: Axes, words: str, block: str) -> None:
    """The title, and in a second line the block, whose name may be long."""
    title = words if block == GLOBAL else f"{words}\n{shorten(block, 60)}"
    without_mathematics([axes.set_title(title)])


def _check(what: str, value: str | int, known: Sequence[str | int]) -> None:
    if value not in known:
        listed = ", ".join(map(str, known))
        raise ValueError(f"Expected a {what} of the result, got {value!r}. There are: {listed}.")


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


#: How many matrices each rule names.
NAMED_BY_RULE = 3

RULE = (
    f"At the last step: the {NAMED_BY_RULE} matrices whose update has the largest Frobenius norm, and the "
    f"{NAMED_BY_RULE} whose spectral entropy lies furthest below the random-LoRA null of their shape (in nat)."
)


def standouts(update: xr.Dataset) -> dict[str, str]:
    """Matrices that stand out at the last step, with the reason.

    The rule is ``RULE``: it ranks, it does not test. In any run some matrix is largest.

    Args:
        update: The ``/update`` group of a result.

    Returns:
        Matrix name to reason, e.g. ``"largest update (1 of 20)"``; empty where nothing moved.
    """
    last = update.isel(step=-1).sel(kind="total")
    reasons: dict[str, list[str]] = {}
    for variable, words in (("frobenius_norm", "update size"), ("entropy_deficit", "entropy deficit")):
        values = last[variable].values
        known = np.flatnonzero(np.isfinite(values) & (last["frobenius_norm"].values > 0))
        for place, position in enumerate(known[np.argsort(-values[known], kind="stable")][:NAMED_BY_RULE], start=1):
            reasons.setdefault(str(last["matrix"].values[position]), []).append(f"{words}: {place} of {len(known)}")
    return {name: "; ".join(each) for name, each in reasons.items()}
