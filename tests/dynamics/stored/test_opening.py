import re

import numpy as np
import pytest
import xarray as xr

from dynamics import open_run
from dynamics.store import write_tree


@pytest.fixture
def tree():
    dataset = xr.Dataset(
        {"value": ("matrix", [1.0, np.nan]), "flag": ("matrix", [True, False])}, coords={"matrix": ["a.b", "ä.c"]}
    )
    tree = xr.DataTree.from_dict({"/update": dataset})
    tree.attrs = {"run": "r", "findings": "[]", "seed": 0}
    return tree


@pytest.mark.parametrize("place", ["dynamics/analysis.zarr", "analysis.zarr"])
def test_round_trip(tree, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    write_tree(tree, tmp_path / place)
    opened = open_run(tmp_path)
    xr.testing.assert_identical(opened.load(), tree)
    assert opened["update"]["flag"].dtype == bool


def test_the_store_itself(tree, tmp_path):
    write_tree(tree, tmp_path / "x.zarr")
    xr.testing.assert_identical(open_run(tmp_path / "x.zarr").load(), tree)


def test_nothing_is_stored(tmp_path):
    message = (
        f"No stored result for '{tmp_path}' (looked for analysis.zarr and capture.zarr, there and in dynamics/). "
        f"Make one with: python -m dynamics.analyze {tmp_path}"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_run(tmp_path)


def test_a_store_that_does_not_open(tmp_path):
    (tmp_path / "analysis.zarr").mkdir()
    with pytest.raises(ValueError, match=r"Analyse the run again: python -m dynamics\.analyze RUN"):
        open_run(tmp_path)


def test_an_existing_store_is_not_overwritten(tree, tmp_path):
    write_tree(tree, tmp_path / "x.zarr")
    with pytest.raises(Exception, match=r"exist|contains"):
        write_tree(tree, tmp_path / "x.zarr")
