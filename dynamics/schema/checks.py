"""Whether a result, or a record of one step, keeps the rules that its readers rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache

import numpy as np
import xarray as xr

from dynamics.schema.fisher_groups import ALL, FISHER_GROUPS, OPTIMIZER_NULL, SAMPLE_LABELS
from dynamics.schema.intervention_groups import INTERVENTION_AXES, INTERVENTION_FLAGS, INTERVENTION_GROUPS
from dynamics.schema.relation_groups import ASSOCIATION, COMPARISON, SCORE, SCORE_COMPARISON
from dynamics.schema.routing_groups import ROUTING, ROUTING_COORDINATES
from dynamics.schema.update_groups import (
    BOUNDS,
    GRADIENT,
    GRADIENT_NOISE,
    MEASURES,
    NULL,
    OF_CHECKPOINTS,
    UPDATE,
    UPDATE_COORDINATES,
)
from dynamics.schema.variable import DECOMPOSITIONS, KINDS, Variable
from dynamics.text import encodable

ROOT_ATTRIBUTES = (
    "toolkit_version",
    "library_versions",
    "git_commit",
    "configuration",
    "inputs",
    "seed",
    "created",
    "run",
    "findings",
)
#: Prefixes that wrappers put before the live model's names.
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
_JSON_ATTRIBUTES = ("library_versions", "configuration", "inputs", "findings")


@lru_cache(maxsize=10_000)
def layer_and_role(name: str) -> tuple[int, str, str]:
    """Layer number (−1 if none), role within the layer, and the stack of layers it belongs to.

    >>> layer_and_role("model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj', 'model.layers')
    >>> layer_and_role("vision_tower.encoder.layers.0.mlp.experts.5.fc1")
    (0, 'mlp.experts.*.fc1', 'vision_tower.encoder.layers')
    >>> layer_and_role("model.layers.2.experts.gate_up_proj[7]")
    (2, 'experts.gate_up_proj[*]', 'model.layers')
    >>> layer_and_role("lm_head")
    (-1, 'lm_head', '')
    """
    parts = name.split(".")
    # Nine digits: what is longer is no layer number, and would not fit an integer.
    index = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) <= 9), None)
    if index is None or index == len(parts) - 1:
        return -1 if index is None else int(parts[index]), re.sub(r"\[\d+\]", "[*]", name), ""
    role = ".".join("*" if part.isdecimal() else part for part in parts[index + 1 :])
    return int(parts[index]), re.sub(r"\[\d+\]", "[*]", role), ".".join(parts[:index])


def check(tree: xr.DataTree) -> None:
    """Checks a result against every rule of the schema.

    Args:
        tree: One run's result, or a tree with one such result under each ``/runs/<name>``.

    Raises:
        ValueError: Names every rule that is broken.
    """
    runs = tree.children.get("runs")
    trees = {"": tree} if runs is None else {f"/runs/{name}": child for name, child in runs.children.items()}
    broken = [f"{path}{problem}" for path, run in trees.items() for problem in _problems(run)]
    relations = {"association": ASSOCIATION, "comparison": COMPARISON, "score_comparison": SCORE_COMPARISON}
    for name, variables in relations.items():
        if name in tree.children:
            broken += _variable_problems(f"/{name}", tree[name].to_dataset(), variables, complete=True)
    if runs is not None and not trees:
        broken.append("/runs is empty")
    if broken:
        raise ValueError("The result breaks its schema: " + "; ".join(broken) + ".")


def _problems(tree: xr.DataTree) -> Iterator[str]:
    yield from (f"/ lacks the attribute {name!r}" for name in ROOT_ATTRIBUTES if name not in tree.attrs)
    if not isinstance(tree.attrs.get("seed", 0), int | np.integer):
        yield f"/ attribute 'seed' is {tree.attrs['seed']!r}, expected an integer"
    for name in _JSON_ATTRIBUTES:
        if name in tree.attrs and not _is_json(tree.attrs[name]):
            yield f"/ attribute {name!r} is not strict JSON"
    if "update" not in tree.children:
        yield "/update is missing"
        return
    update = tree["update"].to_dataset()
    yield from _variable_problems("/update", update, UPDATE, complete=True)
    yield from _coordinate_problems(update)
    yield from _step_problems(update)
    yield from _spectrum_problems(update)
    if "gradient" in tree.children:
        gradient = tree["gradient"].to_dataset()
        variables = {name: GRADIENT[name] for name in GRADIENT if name in gradient or name not in GRADIENT_NOISE}
        yield from _variable_problems("/gradient", gradient, variables, complete=True)
    if "score" in tree.children:
        yield from _variable_problems("/score", tree["score"].to_dataset(), SCORE, complete=True)
    for name, variables in FISHER_GROUPS.items():
        if name in tree.children:
            dataset = tree[name].to_dataset()
            expected = {
                key: variable for key, variable in variables.items() if key in dataset or key not in OPTIMIZER_NULL
            }
            yield from _variable_problems(f"/{name}", dataset, expected, complete=True)
            yield from _fisher_problems(f"/{name}", dataset)
    for name, variables in INTERVENTION_GROUPS.items():
        if name in tree.children:  # an intervention lacks what an arm that was not run would give
            complete = name not in ("intervention", "loss")
            yield from _variable_problems(f"/{name}", tree[name].to_dataset(), variables, complete=complete)
    if "routing" in tree.children:
        yield from _variable_problems("/routing", tree["routing"].to_dataset(), ROUTING, complete=True)
        yield from _routing_problems("/routing", tree["routing"].to_dataset())
    if "intervention" in tree.children:
        yield from _intervention_problems(tree["intervention"].to_dataset())
    for name, dims in OF_CHECKPOINTS.items():
        if name in tree.children:
            yield from _dimension_problems(f"/{name}", tree[name].to_dataset(), dims)
    if "null" in tree.children:
        yield from _variable_problems("/null", tree["null"].to_dataset(), NULL, complete=False)


def _dimension_problems(group: str, dataset: xr.Dataset, expected: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield from (f"{group} lacks {name!r}" for name in expected if name not in dataset)
    yield from (
        f"{group}/{name} has dimensions {dataset[name].dims}, expected {dims}"
        for name, dims in expected.items()
        if name in dataset and dataset[name].dims != dims
    )


def _fisher_problems(group: str, dataset: xr.Dataset) -> Iterator[str]:
    if "evaluated_at_step" not in dataset.coords:
        yield f"{group} lacks the coordinate 'evaluated_at_step'"
    if "task" in dataset.dims and ALL not in dataset["task"].values:
        yield f"{group} lacks the task {ALL!r}"


def _routing_problems(group: str, dataset: xr.Dataset) -> Iterator[str]:
    for name, dim in ROUTING_COORDINATES.items():
        if name not in dataset.coords or dataset[name].dims != (dim,):
            yield f"{group} lacks the coordinate {name!r} on {dim!r}"
    if not dataset.indexes["layer"].is_unique:
        yield f"{group} names a layer twice"


def _intervention_problems(dataset: xr.Dataset) -> Iterator[str]:
    axes = ("step", *INTERVENTION_AXES)
    yield from (f"/intervention lacks the coordinate {name!r}" for name in axes if name not in dataset.indexes)
    yield from (
        f"/intervention has the coordinate {name!r} on {dataset[name].dims}, expected step"
        for name in ("from_step", "recorded")
        if name in dataset.coords and dataset[name].dims != ("step",)
    )
    for name in ("effect", "norm", "headline"):
        if name not in dataset:
            yield f"/intervention lacks {name!r}"
    for name in INTERVENTION_FLAGS:
        if name in dataset and dataset[name].dtype != bool:
            yield f"/intervention/{name} is {dataset[name].dtype}, expected bool"
    if any(not index.is_unique for index in dataset.indexes.values()):
        yield "/intervention names a step, an arm, a k, a scale or a task twice"
    elif "task" in dataset.indexes and ALL not in dataset["task"].values:
        yield f"/intervention lacks the task {ALL!r}"


def last_step_with(array: xr.DataArray) -> int:
    """The last step with a number; the last one at all if there is none.

    >>> last_step_with(xr.DataArray([1.0, np.nan], {"step": [5, 10]}, "step"))
    5
    """
    others = [dim for dim in array.dims if dim != "step"]
    present = array.notnull().any(others).values
    steps = array["step"].values
    return int(steps[present][-1] if present.any() else steps[-1])


def _is_json(text: object) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(str(text), parse_constant=refuse)
    except ValueError:
        return False
    return True


def _variable_problems(
    group: str, dataset: xr.Dataset, variables: Mapping[str, Variable], *, complete: bool
) -> Iterator[str]:
    if complete:
        yield from (f"{group} lacks {name!r}" for name in variables if name not in dataset)
    for name, variable in dataset.data_vars.items():
        expected = variables.get(str(name), BOUNDS.get(str(name)) if group == "/update" else None)
        if expected is not None and variable.dims != expected.dims:
            yield f"{group}/{name} has dimensions {variable.dims}, expected {expected.dims}"
        yield from (
            f"{group}/{name} lacks the attribute {key!r}" for key in ("units", "long_name") if key not in variable.attrs
        )
        if str(name) in MEASURES and group in ("/update", "/gradient"):
            lacking = [key for key in ("definition", "reference") if key not in variable.attrs]
            yield from (f"{group}/{name} lacks the attribute {key!r}" for key in lacking)
            if variable.dtype != np.float64:
                yield f"{group}/{name} is {variable.dtype}, expected float64"


def _coordinate_problems(update: xr.Dataset) -> Iterator[str]:
    for name, dim in UPDATE_COORDINATES.items():
        if name not in update.coords or update[name].dims != (dim,):
            yield f"/update lacks the coordinate {name!r} on {dim!r}"
    if "kind" in update.coords and tuple(update["kind"].values) != KINDS:
        yield f"/update kind is {tuple(update['kind'].values)}, expected {KINDS}"
    if "matrix" in update.coords and not update.indexes["matrix"].is_unique:
        yield "/update has two matrices of one name"
    if "matrix" in update.coords:
        wrapped = [name for name in update["matrix"].values.tolist() if name.startswith(WRAPPERS)]
        yield from (f"/update matrix {name!r} has a wrapper's prefix" for name in wrapped)
    if "adapter_rank" in update.coords and (update["adapter_rank"] < 0).any():
        yield "/update adapter_rank is negative"


def _step_problems(update: xr.Dataset) -> Iterator[str]:
    if not {"step", "from_step", "segment"} <= set(update.coords):
        return
    steps = update["step"].values
    if steps.dtype != np.int64:
        yield f"/update step is {steps.dtype}, expected int64"
    if len(np.unique(steps)) != len(steps) or (np.diff(steps) < 0).any():
        yield "/update steps are not unique and ascending"
    if (steps < 0).any():
        yield "/update steps are negative"
    if update["from_step"].dtype != np.int64:
        yield f"/update from_step is {update['from_step'].dtype}, expected int64"
    segment = dict(zip(steps.tolist(), update["segment"].values.tolist(), strict=True))
    for step, origin in zip(steps.tolist(), update["from_step"].values.tolist(), strict=True):
        if origin > 0 and (origin >= step or segment.get(origin) != segment[step]):
            yield f"/update from_step {origin} of step {step} is not an earlier step of its segment"


def _spectrum_problems(update: xr.Dataset) -> Iterator[str]:
    if not {"singular_value", "count"} <= set(update.data_vars):
        return
    values, count = update["singular_value"], update["count"]
    if values.dims != UPDATE["singular_value"].dims or count.dims != UPDATE["count"].dims:
        return
    if values.dtype != np.float64:
        yield f"/update/singular_value is {values.dtype}, expected float64"
    array = values.values
    beyond = np.arange(array.shape[-1]) >= count.values[..., None]
    if np.isfinite(array[beyond]).any():
        yield "/update/singular_value holds numbers beyond count"
    if (np.diff(np.nan_to_num(array, nan=-1.0), axis=-1) > 0).any():
        yield "/update/singular_value is not descending"
    if (array < 0).any():
        yield "/update/singular_value holds negative numbers"
    if np.isinf(array).any():
        yield "/update/singular_value holds infinity"
    if "from_step" in update.coords and (count.sel(kind="increment").values[update["from_step"].values < 0] > 0).any():
        yield "/update has an increment where from_step is -1"
    for name in ("is_zero", "quantisation_limited"):
        if name in update and update[name].dtype != bool:
            yield f"/update/{name} is {update[name].dtype}, expected bool"
    if {"is_zero", "dominant_ratio"} <= set(update.data_vars):
        ratio, zero = update["dominant_ratio"].values, update["is_zero"].values.astype(bool)
        if np.isfinite(ratio[zero]).any():
            yield "/update has measures of an update that is zero"
        if (ratio > 1 + 1e-9).any():
            yield "/update/dominant_ratio is above 1"


# Records: the same rules over one step, before anything is computed from what a stranger may have written.

_FORMATS = ("F64", "F32", "BF16", "F16")
_SPACES = ("tangent", "factor", "weight")
_COUNTS = ("count", "factor_rank", "decomposition")
_TEXTS = (
    "kind",
    "matrix",
    "role",
    "stack",
    "storage",
    "block",
    "task",
    "task_",
    "arm",
    "reason",
    "relative_reason",
    "routing",
    "held_in",
    *SAMPLE_LABELS,
)
#: Coordinates that are not whole numbers.
_REAL = ("scale",)
#: No training has as many steps, no matrix as many rows.
_LARGEST_INTEGER = 10**12
#: Chance is drawn from factors of that many columns, at the cost of its square; no adapter comes near.
_LARGEST_RANK = 4096
#: Beyond, sums of squares are not numbers any more.
_LARGEST_NUMBER = 1e100
_SMALLEST = {"from_step": -1, "layer": -1, "out": 1, "in": 1, "k": 1}


def check_record(
    record: Mapping[str, xr.Dataset], tables: Mapping[str, Mapping[str, Variable]], optional: Collection[str] = ()
) -> dict[str, str]:
    """Check one record against the schema.

    Args:
        record: Name of the group → its numbers.
        tables: Name of the group → its variables; other groups are not looked at.
        optional: Variables that a record may lack.

    Returns:
        Name of the group → the first rule that it breaks, in words that follow its name; empty if all can be used.
    """
    problems = {}
    for name, table in tables.items():
        if name in record:
            dataset = record[name]
            variables = {key: variable for key, variable in table.items() if key in dataset or key not in optional}
            if problem := next(_record_problems(dataset, variables), None):
                problems[name] = problem
    return problems


def _record_problems(dataset: xr.Dataset, variables: Mapping[str, Variable]) -> Iterator[str]:
    """Yield what is wrong with one group of a record. Each rule relies on those before it: only the first counts."""
    dims = _record_dimensions(variables)
    for name, expected in dims.items():
        if name not in dataset.variables or dataset.variables[name].dims != expected:
            yield f"lacks {name!r} with the dimensions {expected}"
    for name in dims:
        is_text = name == "layer" and "assigned" in variables
        wanted, fits = _expected_format(name, is_coordinate=name not in variables, is_text=is_text)
        if not fits(dataset.variables[name].dtype):
            yield f"holds no {wanted} in {name!r}"
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    if "kind" in dataset.dims and tuple(dataset.variables["kind"].values.tolist()) != KINDS:
        yield f"is not of the kinds {KINDS}"
    for name in dims:
        values = dataset.variables[name].values
        if values.dtype == np.int64 and values.size:
            least = _SMALLEST.get(name, 0)
            if not (least <= int(values.min()) and int(values.max()) < _LARGEST_INTEGER):
                yield f"has a number in {name!r} that is not from {least} to {_LARGEST_INTEGER - 1}"
    for axis in ("matrix", "block", "task", "task_", "arm", "layer"):
        names = dataset.variables[axis].values.tolist() if axis in dims and dims[axis] == (axis,) else []
        if len(set(names)) < len(names):
            yield f"has two {'matrices' if axis == 'matrix' else axis + 's'} of one name"
        if names != encodable(names):
            yield f"has a {axis} whose name is not text"
        if axis == "matrix" and any(name.startswith(WRAPPERS) for name in names):
            yield f"has a {axis} whose name begins with a wrapper's prefix"
    later = {"from_step": "is an increment since", "evaluated_at_step": "was evaluated at", "start_step": "starts at"}
    for name, words in later.items():
        if name in dims and bool(dataset.variables[name] >= dataset.variables["step"] + (name != "from_step")):
            yield f"{words} a later step"
    if "storage" in dims and not set(dataset.variables["storage"].values.tolist()) <= set(_FORMATS):
        yield f"is stored in a format that is none of {', '.join(_FORMATS)}"
    yield from _recorded_spectrum_problems(dataset, variables) if "singular_value" in variables else ()
    for name in (name for name in variables if name not in (*_COUNTS, *_TEXTS, *INTERVENTION_FLAGS)):
        numbers = dataset.variables[name].values.astype(np.float64)
        least = 0.0 if "singular_value" in variables and name != "inner_product" else -_LARGEST_NUMBER
        # A gradient that is not finite has a norm that says so, and an interval may have no upper end.
        allowed = np.isnan(numbers) | (numbers >= least) & (numbers <= _LARGEST_NUMBER)
        if not (allowed | (np.isposinf(numbers) & name.startswith(("norm", "critical_step")))).all():
            yield f"has a number in {name!r} that is not from {least:g} to {_LARGEST_NUMBER:g}"
    yield from _recorded_gram_problems(dataset) if "gram" in variables else ()
    yield from _recorded_routing_problems(dataset) if "assigned" in variables else ()
    yield from _recorded_intervention_problems(dataset) if "effect" in variables else ()


def _expected_format(
    name: str, *, is_coordinate: bool, is_text: bool = False
) -> tuple[str, Callable[[np.dtype], bool]]:
    """Return what a coordinate or variable of a record holds, in words, and whether a format is one for it."""
    if is_text or name in _TEXTS:
        return "text", lambda dtype: dtype.kind == "U"
    if name in (*INTERVENTION_FLAGS, "retained"):
        return "truth values", lambda dtype: dtype.kind == "b"
    if name in _COUNTS or (is_coordinate and name not in _REAL):
        return "whole numbers of 64 bits", lambda dtype: dtype == np.int64
    return "numbers", lambda dtype: dtype.kind == "f"


def _record_dimensions(variables: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    """Return the coordinates and variables that a group of a record has."""
    coordinates: dict[str, tuple[str, ...]] = {"step": ("step",)}
    if "gram" in variables:
        coordinates |= {"block": ("block",), "evaluated_at_step": ("step",)}
        coordinates |= dict.fromkeys(SAMPLE_LABELS, ("sample",))
    elif "singular_value" in variables:
        per_kind = "kind" in variables["count"].dims
        coordinates |= {name: (name,) for name in ("matrix", "index", *(["kind"] if per_kind else []))}
        coordinates |= {name: (dim,) for name, dim in UPDATE_COORDINATES.items() if per_kind or dim != "step"}
    elif "start_loss" in variables:
        coordinates |= {"matrix": ("matrix",), "task": ("task",), "start_step": ("step",), "retained": ("task",)}
        coordinates |= dict.fromkeys(SAMPLE_LABELS, ("sample",))
    elif "assigned" in variables:
        coordinates |= {name: (name,) for name in ("layer", "expert")} | {
            name: (dim,) for name, dim in ROUTING_COORDINATES.items()
        }
    elif "effect" in variables:
        coordinates |= {"from_step": ("step",), **{name: (name,) for name in INTERVENTION_AXES}}
    else:
        pairs = ("task_",) if "relative_sharpness" in variables else ()
        coordinates |= {name: (name,) for name in ("task", *pairs)}
        coordinates |= dict.fromkeys(("from_step",) if pairs else (), ("step",))
    return coordinates | {name: variable.dims for name, variable in variables.items()}


def _recorded_spectrum_problems(dataset: xr.Dataset, variables: Mapping[str, Variable]) -> Iterator[str]:
    values, count, rank = (dataset.variables[name].values for name in ("singular_value", "count", "factor_rank"))
    shortest = np.minimum(dataset.variables["out"].values, dataset.variables["in"].values)
    factored = dataset.variables["adapter_rank"].values > 0
    # A dense matrix has as many as it is wide, factors as many as they have columns.
    possible = np.where(rank > 0, np.where(factored, np.minimum(rank, shortest), shortest), 0)
    if (count != possible).any() or count.max(initial=0) > values.shape[-1]:
        yield "does not count the singular values that its matrices have"
    if (rank[..., factored] > _LARGEST_RANK).any():
        yield f"has factors of more than {_LARGEST_RANK} columns"
    if "from_step" in dataset.coords and dataset.variables["from_step"].values[0] < 0 and count[:, 1].any():
        yield "has an increment since nothing"
    if "decomposition" in variables and (dataset.variables["decomposition"].values >= len(DECOMPOSITIONS)).any():
        yield "has singular values that were found in an unknown way"
    inside = np.arange(values.shape[-1]) < count[..., None]
    if not np.isnan(values[~inside]).all():
        yield "has more singular values than it counts"
    missing = np.isnan(values) & inside
    if (missing.any(-1) & (missing.sum(-1) < count)).any():
        yield "lacks some of its singular values"
    sides = [np.isfinite(dataset.variables[name].values) for name in variables if name.endswith("factor_value")]
    if any((~side[..., :-1] & side[..., 1:]).any() for side in sides):
        yield "has a gap in the singular values of its factors"
    if sides and (sum(side.sum(-1) for side in sides) > np.where(factored, rank[:, 1], 0)).any():
        yield "has more singular values of factors than its increments have columns"
    if (values < 0).any() or (values > _LARGEST_NUMBER).any():
        yield f"has a number in 'singular_value' that is not from 0 to {_LARGEST_NUMBER:g}"
    if (np.diff(np.where(inside, values, 0.0), axis=-1) > 0).any():
        yield "has singular values that are not in descending order"


def _recorded_gram_problems(dataset: xr.Dataset) -> Iterator[str]:
    if dataset.sizes["sample"] != dataset.sizes["sample_"] or not dataset.sizes["sample"]:
        yield "has no square K"
    if dataset.attrs.get("space") not in _SPACES or not isinstance(dataset.attrs.get("batch_size"), int):
        yield "does not say its space and its batch size"
    if not isinstance(dataset.attrs.get("fisher"), str) or not isinstance(dataset.attrs.get("reduction"), str):
        yield "does not say its kind and its reduction"
    k = np.nan_to_num(dataset["gram"].values)
    size = np.abs(k).max((2, 3), initial=0.0)
    apart = np.abs(k - k.swapaxes(2, 3)).max((2, 3), initial=0.0)
    if (apart > 1e-4 * size).any() or (np.diagonal(k, axis1=2, axis2=3) < 0).any():
        yield "has a K that is no Gram matrix"
    elif (np.linalg.eigvalsh(k) < -1e-4 * size[..., None] * k.shape[-1]).any():
        yield "has a K with a negative eigenvalue"


def _recorded_routing_problems(dataset: xr.Dataset) -> Iterator[str]:
    assigned, experts = dataset["assigned"].values, dataset["experts"].values
    if dataset["expert"].values.tolist() != list(range(dataset.sizes["expert"])):
        yield "does not number its experts from 0"
    if (experts > dataset.sizes["expert"]).any():
        yield "counts more experts than it has"
    inside = np.arange(dataset.sizes["expert"]) < experts[:, None]
    counted = np.isfinite(assigned)
    if (counted & ~inside).any() or (counted.any(-1) & ~(counted | ~inside).all(-1)).any() or (assigned < 0).any():
        yield "does not count the tokens of each expert from 0"
    if not (dataset["tokens"].values >= 0).all():
        yield "does not count its tokens"


def _recorded_intervention_problems(dataset: xr.Dataset) -> Iterator[str]:
    scales = dataset["scale"].values
    if not (np.isfinite(scales) & (scales > 0)).all() or any(
        len(np.unique(dataset[name].values)) < dataset.sizes[name] for name in ("k", "scale")
    ):
        yield "has a k or a scale twice, or a scale that is not above 0"
    if ALL not in dataset["task"].values or "full" not in dataset["arm"].values:
        yield f"lacks the task {ALL!r} or the arm 'full'"
    if 1.0 not in scales:
        yield "lacks the scale 1"
    if dataset.attrs.get("space") not in _SPACES:
        yield "does not say its space"
    if not all(type(dataset.attrs.get(name)) is int for name in ("splits", "groups", "samples")):
        yield "does not say its splits, groups and samples"
    for name in ("share_outside_space", "norm_deviation", "repeat_deviation"):
        if type(dataset.attrs.get(name)) not in (int, float, type(None)):
            yield f"has a {name!r} that is no number"
