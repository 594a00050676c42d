"""The contract of the result: groups, variables, dimensions, units. Everything that reads a result relies on it.

Variables with their formula and source, and arrays that get them by name: how rooms say what their numbers are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

KINDS = ("total", "increment")
QUANTILES = (0.25, 0.5, 0.75)
#: How singular values were found, by number: not at all, from triangular factors, the Gram of the shorter side, an SVD.
DECOMPOSITIONS = ("none", "qr_core", "gram", "svd", "failed")

_PER_MATRIX = ("step", "kind", "matrix")


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

        >>> SCORE["items"].attributes
        {'units': '1', 'long_name': 'number of items scored'}
        """
        stated = {"definition": self.definition, "reference": self.reference}
        return {"units": self.units, "long_name": self.long_name, **{key: text for key, text in stated.items() if text}}


#: The measures of an update's spectrum: dimensions (step, kind, matrix), each with ``definition`` and ``reference``.
MEASURES: Mapping[str, Variable] = {
    name: Variable(_PER_MATRIX, units, long_name)
    for name, units, long_name in (
        ("entropy_energy", "nat", "spectral entropy (energy)"),
        ("entropy_amplitude", "nat", "spectral entropy (amplitude)"),
        ("effective_rank_energy", "1", "effective rank (energy)"),
        ("effective_rank_amplitude", "1", "effective rank (amplitude)"),
        ("participation_ratio", "1", "participation ratio"),
        ("stable_rank", "1", "stable rank"),
        ("nuclear_rank", "1", "nuclear rank"),
        ("dominant_ratio", "1", "dominant ratio ρ"),
        ("energy_top_k", "1", "energy in the leading directions"),
        ("rank_at_energy", "1", "rank at a share of energy"),
        ("numerical_rank", "1", "numerical rank"),
        ("condition_number", "1", "condition number"),
        ("gini", "1", "Gini coefficient of the energies"),
        ("hoyer", "1", "Hoyer sparseness"),
        ("marchenko_pastur_outliers", "1", "singular values beyond the null's edge"),
        ("entropy_deficit", "nat", "entropy below the null model's mean"),
        ("null_percentile", "%", "percentile among draws of the null model"),
    )
}

UPDATE: Mapping[str, Variable] = {
    "singular_value": Variable((*_PER_MATRIX, "index"), "weight", "singular value"),
    "count": Variable(_PER_MATRIX, "1", "number of singular values"),
    "factor_rank": Variable(_PER_MATRIX, "1", "number of columns of the factors"),
    "decomposition": Variable(_PER_MATRIX, "1", "how the singular values were found"),
    "frobenius_norm": Variable(_PER_MATRIX, "weight", "Frobenius norm of the update"),
    "spectral_norm": Variable(_PER_MATRIX, "weight", "largest singular value"),
    "nuclear_norm": Variable(_PER_MATRIX, "weight", "sum of singular values"),
    **MEASURES,
    "is_zero": Variable(_PER_MATRIX, "1", "the update is exactly zero"),
    "quantisation_limited": Variable(_PER_MATRIX, "1", "rounding of the storage format spoils the spectrum"),
    "quantisation_noise_share": Variable(_PER_MATRIX, "1", "predicted share of rounding noise in the energy"),
    "rounding_edge": Variable(_PER_MATRIX, "weight", "largest singular value of rounding noise alone"),
    "rank_above_rounding": Variable(_PER_MATRIX, "1", "singular values beyond the rounding noise's edge"),
    "entropy_energy_above_rounding": Variable(_PER_MATRIX, "nat", "spectral entropy (energy) less the rounding floor"),
    "effective_rank_energy_above_rounding": Variable(
        _PER_MATRIX, "1", "effective rank (energy) less the rounding floor"
    ),
    **{
        f"{side}_factor_{part}": Variable(("step", "matrix", *dims), "1", f"{words} of {factor}")
        for side, factor in (("left", "B, scales included"), ("right", "A"))
        for part, dims, words in (
            ("value", ("index",), "singular value at the previous step"),
            ("change", (), "Frobenius norm of the change since the previous step"),
        )
    },
    "path_length": Variable(("step", "matrix"), "weight", "sum of the increments' Frobenius norms"),
    "increment_cosine": Variable(("step", "matrix"), "1", "cosine with the previous increment"),
    "suggested_rank": Variable(("matrix",), "1", "rank that holds the stated share of energy of the newest total"),
    "frobenius_norm_all": Variable(("step", "kind"), "weight", "Frobenius norm over all matrices"),
    "entropy_energy_block_diagonal": Variable(("step", "kind"), "nat", "spectral entropy of the direct sum"),
    "effective_rank_block_diagonal": Variable(("step", "kind"), "1", "effective rank of the direct sum"),
    "participation_ratio_block_diagonal": Variable(("step", "kind"), "1", "participation ratio of the direct sum"),
    "frobenius_norm_by_role": Variable(("step", "kind", "role_name"), "weight", "Frobenius norm over a role"),
    "energy_share_by_role": Variable(("step", "kind", "role_name"), "1", "share of the energy in a role"),
    "entropy_energy_by_role": Variable(("step", "kind", "role_name"), "nat", "spectral entropy of a role's direct sum"),
}

#: Gradients as the optimizer saw them; of a low-rank matrix those of its factors, and what they do to the matrix.
GRADIENT: Mapping[str, Variable] = {
    "norm_before_clip": Variable(("step", "matrix"), "loss/weight", "gradient norm before clipping"),
    "norm_after_clip": Variable(("step", "matrix"), "loss/weight", "gradient norm after clipping"),
    "singular_value": Variable(("step", "matrix", "index"), "loss/weight", "singular value of the gradient"),
    "count": Variable(("step", "matrix"), "1", "number of singular values"),
    "factor_rank": Variable(("step", "matrix"), "1", "number of columns of the factors"),
    "frobenius_norm": Variable(("step", "matrix"), "loss/weight", "Frobenius norm of the gradient"),
    **{name: Variable(("step", "matrix"), known.units, known.long_name) for name, known in MEASURES.items()},
}

#: Coordinates that belong to a dimension of /update.
UPDATE_COORDINATES: Mapping[str, str] = {
    "segment": "step",
    "from_step": "step",
    "layer": "matrix",
    "role": "matrix",
    "stack": "matrix",
    "out": "matrix",
    "in": "matrix",
    "adapter_rank": "matrix",
    "storage": "matrix",
}

SCORE: Mapping[str, Variable] = {
    "score": Variable(("step", "task"), "task units", "score"),
    "items": Variable(("step", "task"), "1", "number of items scored"),
    "standard_error": Variable(("step", "task"), "task units", "standard error of the score"),
}
#: Beside a score where its task says so.
SCORE_DIRECTION = Variable(("step", "task"), "1", "+1: higher is better, -1: lower is better, 0: not known")

#: What is kept of the Fisher at each step; everything else follows from it. K = GGᵀ is unnormalised.
FISHER_RECORD: Mapping[str, Variable] = {
    "gram": Variable(("step", "block", "sample", "sample_"), "(loss/weight)²", "inner products K of gradients"),
    "update_product": Variable(("step", "block", "sample"), "loss", "inner products b of gradients with the update"),
    "update_norm_squared": Variable(("step", "block"), "weight²", "squared norm of the update inside the space"),
    "share_outside_space": Variable(("step", "block"), "1", "share of the update outside the space"),
    "dimension": Variable(("step", "block"), "1", "dimension of the space"),
    "loss": Variable(("step", "sample"), "nat", "loss of each probe sample"),
}
#: Beside the record, where the optimizer is known: β₁ of Adam, the momentum of SGD; NaN where it is not.
FISHER_MOMENTUM = Variable(("step",), "1", "momentum of the optimizer")
#: Dimensions of the main variables of what is told of a training's path, and of updates beside the base's weights.
OF_CHECKPOINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "path": {
        "gram": ("step", "step_"),
        **dict.fromkeys(("distance", "length", "straightness"), ("step",)),
        "component_share": ("training", "component"),
        "participation_ratio": ("training",),
    },
    "base": {"relative_size": ("step", "matrix"), "base_norm": ("matrix",)},
}
#: Dimensions of the main variables of what relates runs to scores and to each other; at the root.
RELATED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "association": dict.fromkeys(
        ("coefficient", "low", "high", "p_value", "q_value", "n_runs", "method"), ("measure", "task")
    ),
    "comparison": {
        **dict.fromkeys(("difference", "low", "high", "p_value"), ("comparison", "measure", "step")),
        "mean_difference": ("comparison", "measure"),
        "value": ("run", "step", "measure"),
    },
}
SAMPLE_LABELS = ("sample_task", "sample_group", "sample_id")
#: The block of all trainable parameters together, and the task that stands for all samples.
GLOBAL, ALL = "global", "all"
_BOUNDS = ("", "_low", "_high")
_PER_TASK, _PER_K, _PER_PAIR = ("step", "block", "task"), ("step", "block", "k"), ("step", "block", "task", "task_")
#: Dimensions of the main variables of each group that follows from the Fisher's record.
FISHER_GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fisher": {
        **{name: FISHER_RECORD[name].dims for name in ("gram", "update_product", "update_norm_squared", "dimension")},
        "eigenvalue": (*_PER_TASK, "index"),
        **{
            f"{name}{bound}": _PER_TASK
            for name in ("spectral_entropy", "dominant_ratio", "participation_ratio", "ln_participation_ratio")
            for bound in _BOUNDS
        },
    },
    "concentration": {
        **{f"{name}{bound}": _PER_K for name in ("null_isotropic", "null_gradient", "gain") for bound in _BOUNDS},
        **dict.fromkeys(("captured", "captured_split", "concentrated"), _PER_K),
        **{f"rayleigh_ratio{bound}": ("step", "block") for bound in _BOUNDS},
        "share_outside_space": ("step", "block"),
    },
    "tasks": {
        **{f"{name}{bound}": _PER_PAIR for name in ("cosine", "overlap", "transfer") for bound in _BOUNDS},
        "magnitude_similarity": _PER_PAIR,
        "conflict_rate": ("step", "block"),
        "noise_scale": _PER_TASK,
    },
}

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


def labelled(variables: Mapping[str, Variable], arrays: Mapping[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Return arrays as labelled variables, with the dimensions and attributes that the schema gives their names.

    Args:
        variables: One group of the schema, e.g. ``SCORE``.
        arrays: Name → values.

    Raises:
        KeyError: If a name is not in the group.

    >>> labelled(SCORE, {"items": np.ones((2, 1))})["items"].dims
    ('step', 'task')
    """
    return {
        name: xr.Variable(variables[name].dims, array, variables[name].attributes) for name, array in arrays.items()
    }


def attributes(variable: Variable, definition: str = "", reference: str = "") -> dict[str, str]:
    """Attributes of a variable; definition and reference only where they are given.

    >>> attributes(SCORE["items"])
    {'units': '1', 'long_name': 'number of items scored'}
    """
    stated = {"definition": definition, "reference": reference}
    return {"units": variable.units, "long_name": variable.long_name, **{k: v for k, v in stated.items() if v}}


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
    for name, dims in RELATED.items():
        if name in tree.children:
            broken += _dimension_problems(f"/{name}", tree[name].to_dataset(), dims)
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
        yield from _variable_problems("/gradient", tree["gradient"].to_dataset(), GRADIENT, complete=True)
    if "score" in tree.children:
        yield from _variable_problems("/score", tree["score"].to_dataset(), SCORE, complete=True)
    for name, dims in FISHER_GROUPS.items():
        if name in tree.children:
            dataset = tree[name].to_dataset()
            yield from _dimension_problems(f"/{name}", dataset, dims)
            yield from _fisher_problems(f"/{name}", dataset)
    for name, dims in OF_CHECKPOINTS.items():
        if name in tree.children:
            yield from _dimension_problems(f"/{name}", tree[name].to_dataset(), dims)
    if "null" in tree.children:
        names = [f"{measure}{bound}" for measure in MEASURES for bound in ("", "_low", "_high")]
        known = {name: Variable(_PER_MATRIX, "", "") for name in names}
        yield from _variable_problems("/null", tree["null"].to_dataset(), known, complete=False)


def _dimension_problems(group: str, dataset: xr.Dataset, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    yield from (f"{group} lacks {name!r}" for name in known if name not in dataset)
    yield from (
        f"{group}/{name} has dimensions {dataset[name].dims}, expected {dims}"
        for name, dims in known.items()
        if name in dataset and dataset[name].dims != dims
    )


def _fisher_problems(group: str, dataset: xr.Dataset) -> Iterator[str]:
    if "evaluated_at_step" not in dataset.coords:
        yield f"{group} lacks the coordinate 'evaluated_at_step'"
    if "task" in dataset.dims and ALL not in dataset["task"].values:
        yield f"{group} lacks the task {ALL!r}"


def last_step_with(array: xr.DataArray) -> int:
    """The last step with a number; the last one at all if there is none.

    >>> last_step_with(xr.DataArray([1.0, np.nan], {"step": [5, 10]}, "step"))
    5
    """
    others = [dim for dim in array.dims if dim != "step"]
    known = array.notnull().any(others).values
    steps = array["step"].values
    return int(steps[known][-1] if known.any() else steps[-1])


def _is_json(text: object) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(str(text), parse_constant=refuse)
    except ValueError:
        return False
    return True


def _variable_problems(
    group: str, dataset: xr.Dataset, known: Mapping[str, Variable], *, complete: bool
) -> Iterator[str]:
    if complete:
        yield from (f"{group} lacks {name!r}" for name in known if name not in dataset)
    for name, variable in dataset.data_vars.items():
        expected = known.get(str(name))
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
