"""Names from file systems and files as text that can be written: not everything that Python holds is Unicode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr


def encodable(value: Any) -> Any:
    """JSON-compatible content with every half of a surrogate pair escaped.

    Folder names that are no UTF-8 and ``"\\ud800"`` in JSON give such halves, which no file can hold.

    >>> encodable({"run": "caf\\udce9"})
    {'run': 'caf\\\\udce9'}
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {encodable(key): encodable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [encodable(each) for each in value]
    return value


def encodable_dataset(dataset: xr.Dataset) -> xr.Dataset:
    """The same with every text in it encodable."""
    texts = {
        name: (variable.dims, np.asarray(encodable(variable.values.tolist()), dtype=str), encodable(variable.attrs))
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "UO"
    }
    return dataset.assign_coords({k: v for k, v in texts.items() if k in dataset.coords}).assign(
        {k: v for k, v in texts.items() if k not in dataset.coords}
    )
