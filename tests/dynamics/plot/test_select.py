import re

import numpy as np
import pytest
import xarray as xr

from dynamics.plot.select import axis_label, chosen, long_name, tasks_of
from dynamics.schema import last_step_with


@pytest.fixture
def dataset():
    values = np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan]])
    array = (("step", "block"), values, {"units": "nat", "long_name": "spectral entropy SE"})
    return xr.Dataset({"x": array}, {"step": [5, 10, 15], "block": ["global", "a"]})


def test_the_last_step_with_a_number_is_taken(dataset):
    assert last_step_with(dataset["x"]) == 10
    assert int(chosen(dataset, "x", block="a")["step"]) == 5
    assert float(chosen(dataset, "x", block="global")["x"]) == 3.0


def test_without_any_number_it_is_the_last_step(dataset):
    assert last_step_with(dataset["x"] * np.nan) == 15


def test_a_step_that_is_asked_for_is_taken(dataset):
    assert np.isnan(chosen(dataset, "x", step=10, block="a")["x"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"block": "b"}, "Expected a block of the result, got 'b'. There are: global, a."),
        ({"block": "a", "step": 7}, "Expected a step of the result, got 7. There are: 5, 10, 15."),
    ],
)
def test_what_is_not_there_is_an_error(dataset, asked, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        chosen(dataset, "x", **asked)
    with pytest.raises(ValueError, match=r"^Expected the name of a variable of the result, got 'y'\. There are: x\.$"):
        chosen(dataset, "y")


def test_labels_have_the_quantity_and_its_units(dataset):
    assert long_name(dataset["x"]) == "spectral entropy SE"
    assert axis_label(dataset["x"]) == "Spectral entropy SE (nat)"
    assert axis_label(dataset["x"].assign_attrs(units="1")) == "Spectral entropy SE"


@pytest.mark.parametrize(("names", "several"), [(["all"], []), (["all", "a"], []), (["all", "a", "b"], ["a", "b"])])
def test_a_single_task_is_the_same_as_all(names, several):
    assert tasks_of(xr.Dataset(coords={"task": names})) == several
