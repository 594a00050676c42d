"""Call forms before :class:`probes.ProbeGram`: K, b and labels one by one. They go with the next release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ParamSpec

import xarray as xr

from dynamics.fisher.samples import as_array
from dynamics.schema import GLOBAL
from probes.gram import ProbeGram

_Options = ParamSpec("_Options")


def accepting(*names: str) -> Callable[[Callable[_Options, xr.Dataset]], Callable[_Options, xr.Dataset]]:
    """Let a function of a ``ProbeGram`` be called by K and the named arguments too, with a DeprecationWarning."""

    def decorate(measure: Callable[_Options, xr.Dataset]) -> Callable[_Options, xr.Dataset]:
        of_gram: Callable[..., xr.Dataset] = measure

        @functools.wraps(measure)
        def wrapper(*arguments: Any, **options: Any) -> xr.Dataset:
            gram, *values = arguments or (options.pop("gram"),)
            stated = dict(zip(names, values, strict=False)) | {n: options.pop(n) for n in names if n in options}
            stated = {name: value for name, value in stated.items() if value is not None}
            if not isinstance(gram, ProbeGram) or stated:
                listed = "".join(f", {'update_norm_squared' if name == 'update_norm' else name}=…" for name in stated)
                warnings.warn(
                    f"{measure.__name__} takes one ProbeGram; K and its labels one by one are deprecated. Call "
                    f"dynamics.{measure.__name__}(gram) with gram = probes.gradient_gram(model, tasks, …), or with "
                    f"gram = probes.ProbeGram({{'global': K}}{listed}).",
                    DeprecationWarning,
                    stacklevel=2,
                )
                gram = _probe_gram(gram, stated)
            return of_gram(gram, **options)

        return wrapper

    return decorate


def _probe_gram(gram: Any, stated: Mapping[str, Any]) -> ProbeGram:
    """Return K, from an array, a mapping of blocks, or an object with ``.gram``, with the stated values beside it."""
    values = {field.name: getattr(gram, field.name) for field in fields(ProbeGram) if hasattr(gram, field.name)}
    k = values.pop("gram", gram)
    k = {str(name): as_array(each) for name, each in (k if isinstance(k, Mapping) else {GLOBAL: k}).items()}
    for name, value in stated.items():
        if name in ("update_product", "update_norm", "dimension"):
            if not isinstance(value, Mapping) and len(k) > 1:
                raise ValueError(f"Expected a mapping of {len(k)} blocks to their {name}, got {type(value).__name__}.")
            by_block = value if isinstance(value, Mapping) else {next(iter(k), GLOBAL): value}
            arrays = {str(block): as_array(number) for block, number in by_block.items()}
            if name == "update_product":
                values[name] = arrays
            elif name == "dimension":
                values[name] = {block: float(array) for block, array in arrays.items()}
            else:
                values["update_norm_squared"] = {block: float(array * array) for block, array in arrays.items()}
        else:
            values[name] = as_array(value) if name == "losses" else value
    return ProbeGram(k, **values)
