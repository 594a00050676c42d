"""One variable of a result, and arrays that get their dimensions and attributes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

KINDS = ("total", "increment")
QUANTILES = (0.25, 0.5, 0.75)
#: How singular values were found, by number: not at all; from triangular factors by QR decompositions; from the Gram of
#: a dense matrix's shorter side; by an SVD; in vain; from triangular factors of the Grams of both sides; the leading
#: ones alone, by Lanczos iteration.
DECOMPOSITIONS = ("none", "qr_core", "gram", "svd", "failed", "gram_core", "lanczos")

#: Dimensions of most variables of /update.
PER_MATRIX = ("step", "kind", "matrix")


@dataclass(frozen=True)
class Variable:
    """One variable of a result: all that is said of it, said once.

    Args:
        dims: Dimensions, in order.
        units: UDUNITS-like; ``"1"`` for pure numbers.
        long_name: For axis labels.
        definition: Formula, with what enters it.
        reference: Source of the formula, or ``""``.
    """

    dims: tuple[str, ...]
    units: str
    long_name: str
    definition: str = ""
    reference: str = ""

    @property
    def attributes(self) -> dict[str, str]:
        """Units and long name; definition and reference where there are any.

        >>> Variable(("step",), "1", "number of items scored").attributes
        {'units': '1', 'long_name': 'number of items scored'}
        """
        stated = {"definition": self.definition, "reference": self.reference}
        return {"units": self.units, "long_name": self.long_name, **{key: text for key, text in stated.items() if text}}


def label_arrays(variables: Mapping[str, Variable], arrays: Mapping[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Return arrays as labelled variables, with the dimensions and attributes that the schema gives their names.

    Args:
        variables: One group of the schema, e.g. ``schema.SCORE``.
        arrays: Name → values.

    Raises:
        KeyError: If a name is not in the group.

    >>> label_arrays({"items": Variable(("step",), "1", "number of items")}, {"items": np.ones(2)})["items"].dims
    ('step',)
    """
    return {
        name: xr.Variable(variables[name].dims, array, variables[name].attributes) for name, array in arrays.items()
    }
