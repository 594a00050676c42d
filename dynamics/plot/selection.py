"""One block, one step, one task of the Fisher's groups, by name; and how their variables are called."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.axes import Axes

from dynamics.plot.select import variable_of
from dynamics.plot.style import shorten, without_mathematics
from dynamics.schema import ALL, GLOBAL, last_step_with


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
