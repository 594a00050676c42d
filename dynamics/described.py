"""Variables with their formula and source, and arrays that get them by name: how rooms say what their numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics.schema import Variable, attributes


@dataclass(frozen=True)
class Described:
    """A variable of the schema with its formula and source."""

    variable: Variable
    definition: str
    reference: str = ""


def labelled(known: Mapping[str, Described], arrays: Mapping[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Arrays with dimensions and attributes by their name.

    >>> known = {"x": Described(Variable(("step",), "1", "a number"), "as it is")}
    >>> labelled(known, {"x": np.zeros(2)})["x"].attrs
    {'units': '1', 'long_name': 'a number', 'definition': 'as it is'}
    """
    return {
        name: xr.Variable(
            known[name].variable.dims,
            array,
            attributes(known[name].variable, known[name].definition, known[name].reference),
        )
        for name, array in arrays.items()
    }
