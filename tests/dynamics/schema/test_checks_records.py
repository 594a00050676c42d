"""A record of strangers: what is wrong with it is said, and nothing of it reaches a number."""

import numpy as np
import pytest
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.schema import check_record
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.store.records import OPTIONAL, TABLES
from tests.runs import NAMES, drifting, records


def problems(record):
    return check_record(record, TABLES, OPTIONAL)


def the_problem(record):
    """The only problem, with the name of its group."""
    ((name, problem),) = problems(record).items()
    return f"'{name}' {problem}"


@pytest.fixture(scope="module")
def good():
    return records(drifting([5, 10]))[10]


def changed(dataset, name, change):
    """The dataset with one variable's values changed in place or by what ``change`` returns."""
    values = dataset[name].values.copy()
    values = values if (made := change(values)) is None else made
    variable = xr.Variable(dataset[name].dims, values, dataset[name].attrs)
    return dataset.assign_coords({name: variable}) if name in dataset.coords else dataset.assign({name: variable})


def put(place, number):
    def change(values):
        values[place] = number

    return change


def as_type(dtype):
    return lambda values: values.astype(dtype)


FIRST = (0, 0, 0)
_COUNTS_OTHERS = "does not count the singular values that its matrices have"
CHANGES = {
    "a count that is no whole number": ("count", as_type(float), "holds no whole numbers of 64 bits in 'count'"),
    "a spectrum that is text": ("singular_value", as_type("U3"), "holds no numbers in 'singular_value'"),
    "a spectrum of booleans": ("singular_value", as_type(bool), "holds no numbers in 'singular_value'"),
    "a name that is a number": ("matrix", lambda values: np.arange(len(values)), "holds no text in 'matrix'"),
    "other kinds": ("kind", lambda values: values[::-1], "is not of the kinds ('total', 'increment')"),
    "a step below zero": ("step", put(0, -1), "has a number in 'step' that is not from 0 to 999999999999"),
    "a step beyond integers": (
        "from_step",
        lambda values: np.array([2**64 - 1], dtype=np.uint64),
        "holds no whole numbers of 64 bits in 'from_step'",
    ),
    "a later from_step": ("from_step", put(0, 10), "is an increment since a later step"),
    "an increment since nothing": ("from_step", put(0, -1), "has an increment since nothing"),
    "no rows": ("out", put(0, 0), "has a number in 'out' that is not from 1 to 999999999999"),
    "a negative rank": ("adapter_rank", put(0, -4), "has a number in 'adapter_rank' that is not from 0 to"),
    "two of one name": ("matrix", put(1, NAMES[0]), "has two matrices of one name"),
    "a wrapper's prefix": ("matrix", put(1, "module.x"), "has a matrix whose name begins with a wrapper's prefix"),
    "half a character": ("matrix", put(1, "a\ud800"), "has a matrix whose name is not text"),
    "an unknown format": ("storage", put(0, "I8"), "is stored in a format that is none of F64, F32, BF16, F16"),
    "a negative count": ("count", put(FIRST, -1), "has a number in 'count' that is not from 0 to 999999999999"),
    "more than it can have": ("count", put(FIRST, 9), _COUNTS_OTHERS),
    "more than its matrix has": ("out", put(0, 2), _COUNTS_OTHERS),
    "more than its factors have": ("factor_rank", put(FIRST, 3), _COUNTS_OTHERS),
    "fewer than its factors have": ("factor_rank", put(FIRST, 10**9), _COUNTS_OTHERS),
    "a dense matrix of few values": ("adapter_rank", put(0, 0), _COUNTS_OTHERS),
    "a number beyond the count": ("singular_value", put((*FIRST, 4), 0.0), "has more singular values than it counts"),
    "infinity beyond the count": ("singular_value", put((*FIRST, 4), np.inf), "has more singular values than it count"),
    "a gap in the spectrum": ("singular_value", put((*FIRST, 1), np.nan), "lacks some of its singular values"),
    "an ascending spectrum": (
        "singular_value",
        put((*FIRST, 3), 1e9),
        "has singular values that are not in descending",
    ),
    "a negative singular value": (
        "singular_value",
        put((*FIRST, 3), -1.0),
        "has a number in 'singular_value' that is not from 0 to 1e+100",
    ),
    "an infinite singular value": (
        "singular_value",
        put((*FIRST, 0), np.inf),
        "has a number in 'singular_value' that is not from 0 to 1e+100",
    ),
    "negative noise": ("noise_energy", put(FIRST, -1.0), "has a number in 'noise_energy' that is not from 0 to 1e+100"),
    "a gap in the factors": (
        "left_factor_value",
        put((0, 0, 0), np.nan),
        "has a gap in the singular values of its factors",
    ),
    "factors of more columns than they have": (
        "right_factor_value",
        put((0, 0), 1.0),
        "has more singular values of factors than its increments have columns",
    ),
    "a negative change": (
        "left_factor_change",
        put((0, 0), -1.0),
        "has a number in 'left_factor_change' that is not from 0 to 1e+100",
    ),
    "an infinite product": (
        "inner_product",
        put((0, 0), -np.inf),
        "has a number in 'inner_product' that is not from -1e+100 to 1e+100",
    ),
}


def test_what_a_recorder_writes_is_good(good):
    assert problems(good) == {}


def test_a_record_without_gradients_is_good(good):
    assert problems({"update": good["update"]}) == {}


def test_a_record_of_an_earlier_version_is_good(good):
    update = good["update"].drop_vars(raw.ADDED)
    assert problems({**good, "update": update}) == {}


def test_a_matrix_smaller_than_its_rank_is_good():
    assert problems({"update": records(drifting([5, 10], out=2))[10]["update"]}) == {}


def test_a_rank_that_would_fill_the_memory_is_refused():
    update = records(drifting([5], out=2))[5]["update"]
    problem = the_problem({"update": changed(update, "factor_rank", put(FIRST, 10**9))})
    assert problem == "'update' has factors of more than 4096 columns"


def test_a_dense_matrix_is_good():
    places = {"a": MatrixShape(3, 5, 0, "BF16")}
    values = np.array([3.0, 2.0, 0.0])
    update = raw.raw_update({1: (0, -1)}, places, {})
    gradient = raw.raw_gradient(1, places, {"a": GradientSpectrum(np.inf, np.nan)})
    gradient = gradient.pad(index=(0, 3)).assign_coords(index=np.arange(3))
    gradient["singular_value"].values[0, 0] = values
    for name in ("count", "factor_rank"):
        gradient[name].values[0, 0] = 3
    assert problems({"update": update, "gradient": gradient}) == {}


def test_a_spectrum_that_failed_is_good(good):
    broken = changed(good["update"], "singular_value", put((0, slice(None), 1), np.nan))
    assert problems({"update": broken}) == {}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_problem_is_told(good, change):
    name, how, words = CHANGES[change]
    problem = the_problem({**good, "update": changed(good["update"], name, how)})
    assert problem.startswith(f"'update' {words}")


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("norm_before_clip", put((0, 0), -1.0), "has a number in 'norm_before_clip' that is not from 0 to 1e+100"),
        ("count", put((0, 0), 9), _COUNTS_OTHERS),
        ("singular_value", put((0, 0, 0), -np.inf), "has a number in 'singular_value'"),
    ],
)
def test_gradients_are_checked_as_well(good, name, how, words):
    problem = the_problem({**good, "gradient": changed(good["gradient"], name, how)})
    assert problem.startswith(f"'gradient' {words}")


@pytest.mark.parametrize("name", ["count", "storage", "from_step", "inner_product", "step", "kind"])
def test_what_is_not_there_is_named(good, name):
    problem = the_problem({"update": good["update"].drop_vars(name)})
    assert problem.startswith(f"'update' lacks {name!r} with the dimensions (")


def test_other_dimensions_are_refused(good):
    turned = good["update"].transpose("index", "matrix", "kind", "step")
    problem = the_problem({"update": turned})
    assert problem == "'update' lacks 'singular_value' with the dimensions ('step', 'kind', 'matrix', 'index')"


@pytest.mark.parametrize("steps", [0, 2])
def test_a_record_is_of_one_step(good, steps):
    update = good["update"].isel(step=[0] * steps)
    assert the_problem({"update": update}) == "'update' is not of one step"
