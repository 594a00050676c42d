"""What the plots read of a result: groups, variables, one step of one block, the order of matrices, and standouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.schema import ALL, last_step_with
from dynamics.text import sentence_case

#: How the units of the result are written on an axis.
_UNITS = {
    "1": "",
    "weight": "weight units",
    "loss/weight": "loss per weight unit",
    "(loss/weight)²": "loss²/weight²",
}
#: What figures call a variable whose long name is a phrase.
_SHORT = {"entropy_deficit": "entropy deficit", "path_length": "path length"}
#: Characters of an axis label to a line.
_LABEL_WIDTH = 36
_KINDS = {"total": "of the total update", "increment": "of the increments"}
#: A number that is a whole part of a name, such as a layer or an expert; not the 1 of fc1.
_NUMBER = re.compile(r"(?:^|[.\[])(\d+)(?=[.\]]|$)")
#: How many matrices each rule names.
NAMED_BY_RULE = 3
RULE = (
    f"At the last step: the {NAMED_BY_RULE} matrices with the largest Frobenius norm of the update, and the "
    f"{NAMED_BY_RULE} with the largest entropy deficit, in nat, against the random-LoRA null of their shape."
)


def group(data: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    """Return one group of a run's result.

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
    """Return ``/association``, ``/comparison`` or ``/score_comparison``, at the root of several runs as well.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(data, xr.Dataset):
        return data
    if name not in data.children:
        needs = {
            "association": "scores of its runs (--scores FILE)",
            "comparison": "groups of runs (LABEL=RUN)",
            "score_comparison": "groups of runs (LABEL=RUN) and their scores (--scores FILE)",
        }[name]
        raise ValueError(f"Expected a result with the group /{name}, which needs {needs}; got {list(data.children)}.")
    return data[name].to_dataset().load()


def refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse tasks that have no scores.

    Raises:
        ValueError: Names the first one, and those that there are.
    """
    for task in tasks:
        if task not in known:
            raise ValueError(f"Expected a task with scores, got {task!r}. There are: {', '.join(known)}.")


def has_group(data: xr.DataTree | xr.Dataset, name: str) -> bool:
    """Return whether the data is a tree with that group."""
    return isinstance(data, xr.DataTree) and name in data.children


def variable_of(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Return a variable of the dataset.

    Raises:
        ValueError: If there is no such variable.
    """
    if name not in dataset:
        names = ", ".join(sorted(str(key) for key in dataset.data_vars))
        raise ValueError(f"Expected the name of a variable of the result, got {name!r}. There are: {names}.")
    return dataset[name]


def long_name(variable: str | xr.DataArray) -> str:
    """Return what figures call a variable: one of ``/update`` by its name, any other by its own attributes.

    >>> long_name("effective_rank_energy")
    'effective rank (energy)'
    """
    return _stated(variable)[0]


def title_of(name: str, kind: str = "") -> str:
    """Return the title of a variable of ``/update``.

    >>> title_of("frobenius_norm", "total"), title_of("increment_cosine")
    ('Frobenius norm of the total update', 'cosine with the previous increment')
    """
    return f"{long_name(name)} {_KINDS[kind]}" if kind else long_name(name)


def axis_label(variable: str | xr.DataArray) -> str:
    """Return the label of an axis: the quantity and its units.

    >>> axis_label("frobenius_norm"), axis_label("entropy_energy"), axis_label("stable_rank")
    ('Frobenius norm (weight units)', 'Spectral entropy (energy), nat', 'Stable rank')
    """
    name, units = _stated(variable)
    units = _UNITS.get(units, units)
    if units:
        name += f", {units}" if name.endswith(")") else f" ({units})"
    return fill(sentence_case(name), _LABEL_WIDTH)


def _stated(variable: str | xr.DataArray) -> tuple[str, str]:
    """Return long name and units."""
    if isinstance(variable, str):
        stated = schema.UPDATE.get(variable)
        if stated is None:
            return variable.replace("_", " "), "1"
        return _SHORT.get(variable, stated.long_name.removesuffix(" of the update")), stated.units
    return str(variable.attrs.get("long_name", variable.name)), str(variable.attrs.get("units", "1"))


def chosen(dataset: xr.Dataset, variable: str, *, step: int | None = None, **names: str | int) -> xr.Dataset:
    """Return the dataset at one step and, by name, in one block and of one task.

    Args:
        dataset: With the dimension ``step``.
        variable: The one to draw; without ``step`` the last step at which it has a number is taken.
        step: A step of the result.
        names: ``block="global"`` and the like.

    Raises:
        ValueError: If there is no such variable, step or name.
    """
    variable_of(dataset, variable)
    for dim, name in names.items():
        _check(dim, name, dataset[dim].values.tolist())
    over_steps = dataset.sel(names)
    if step is None:
        step = last_step_with(over_steps[variable])
    _check("step", step, dataset["step"].values.tolist())
    return over_steps.sel(step=step)


def _check(what: str, value: str | int, choices: Sequence[str | int]) -> None:
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"Expected a {what} of the result, got {value!r}. There are: {listed}.")


def tasks_of(dataset: xr.Dataset) -> list[str]:
    """Return the names of the tasks; none for a single task, which is the same as all samples."""
    names = [str(name) for name in dataset["task"].values if name != ALL]
    return names if len(names) > 1 else []


@dataclass(frozen=True)
class RowGroup:
    """Matrices of one role in one stack of layers.

    Args:
        label: The role, with its stack where the model has several.
        positions: Of the matrices along ``matrix``, in the order to show them.
        labels: A short label for each matrix: its layer, or another part of its name.
        numbered: Whether the labels are numbers within one role, rather than names.
    """

    label: str
    positions: tuple[int, ...]
    labels: tuple[str, ...]
    numbered: bool = True


def row_groups(update: xr.Dataset) -> list[RowGroup]:
    """Return matrices by role, and within a role by layer; roles that occur once share the last group.

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
    """Return layer numbers; where experts share a layer, all numbers of the name."""
    numbers = [layers[position] for position in positions]
    if len(np.unique(numbers)) == len(numbers):
        return [str(layer) for layer in numbers]
    return [".".join(str(number) for number in _numbers(names[position])) for position in positions]


def standouts(update: xr.Dataset) -> dict[str, str]:
    """Return the matrices that stand out at the last step, with the reason.

    The rule is ``RULE``. It ranks and does not test: in any run some matrix is largest.

    Args:
        update: The ``/update`` group of a result.

    Returns:
        Matrix name to reason, e.g. ``"update size: 1 of 20"``; empty where nothing moved.
    """
    last = update.isel(step=-1).sel(kind="total")
    reasons: dict[str, list[str]] = {}
    for variable, words in (("frobenius_norm", "update size"), ("entropy_deficit", "entropy deficit")):
        values = last[variable].values
        moved = np.flatnonzero(np.isfinite(values) & (last["frobenius_norm"].values > 0))
        for rank, position in enumerate(moved[np.argsort(-values[moved], kind="stable")][:NAMED_BY_RULE], start=1):
            reasons.setdefault(str(last["matrix"].values[position]), []).append(f"{words}: {rank} of {len(moved)}")
    return {name: "; ".join(parts) for name, parts in reasons.items()}
