"""One variable, and arrays that are labelled by it."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics.schema import Variable, label_arrays

ITEMS = Variable(("step", "task"), "1", "number of items", "as counted")


def test_attributes_leave_out_what_is_not_stated() -> None:
    assert ITEMS.attributes == {"units": "1", "long_name": "number of items", "definition": "as counted"}


def test_arrays_get_dimensions_and_attributes() -> None:
    (variable,) = label_arrays({"items": ITEMS}, {"items": np.ones((3, 2))}).values()
    assert variable.dims == ("step", "task")
    assert variable.attrs == ITEMS.attributes


def test_a_name_that_is_not_in_the_group() -> None:
    with pytest.raises(KeyError, match="other"):
        label_arrays({"items": ITEMS}, {"other": np.ones(1)})
