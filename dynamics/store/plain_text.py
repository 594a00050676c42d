"""Names from file systems and files as text that can be written: not everything that Python holds is Unicode."""

from __future__ import annotations

import numpy as np
import xarray as xr

from dynamics.text import encodable


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
