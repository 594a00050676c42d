"""What the plots read of a result."""

from __future__ import annotations

import xarray as xr

from dynamics import schema

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
