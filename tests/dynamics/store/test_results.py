"""What is written array by array is what xarray writes."""

import json

import numpy as np
import pytest
import xarray as xr

from dynamics.store import results
from dynamics.store.results import read_tree, write_tree
from tests.trees import example_runs, example_tree


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_xarray(tmp_path):
    tree = example_runs(a=example_tree(steps=2, matrices=2), b=example_tree(steps=3, matrices=2, gradients=[100]))
    write_tree(tree, tmp_path / "ours")
    tree.to_zarr(tmp_path / "theirs", zarr_format=2, consolidated=True)
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs")
    metadata = json.loads(ours.pop(".zmetadata"))["metadata"]
    assert metadata.keys() == json.loads(theirs.pop(".zmetadata"))["metadata"].keys()
    assert ours == theirs
    xr.testing.assert_identical(read_tree(tmp_path / "ours"), read_tree(tmp_path / "theirs"))


@pytest.mark.parametrize("limit", [2**26, 100, 1])
def test_arrays_of_every_kind_and_length_come_back(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(results, "_CHUNK_BYTES", limit)
    numbers = np.random.default_rng(0).normal(size=(7, 5))
    numbers[:3] = np.nan
    dataset = xr.Dataset(
        {
            "number": (("row", "column"), numbers),
            "single": (("column", "row"), np.float32(numbers.T)),
            "count": (("row",), np.arange(7)),
            "zero": (("row",), np.zeros(7, dtype=np.uint8)),
            "flag": (("row",), np.arange(7) % 2 == 0),
            "text": (("row",), np.array(["", "Größe", "\ud800", "b", "c", "d", "é"])),
            "missing": (("row",), np.full(7, np.nan)),
            "scalar": ((), 1.5),
            "nothing": (("none", "row"), np.zeros((0, 7))),
            "no_text": (("row", "none"), np.zeros((7, 0), dtype=str)),
            "turned": (("column", "row"), np.asfortranarray(numbers.T)),
            "foreign": (("row",), np.arange(7.0).astype(">f8")),
        },
        coords={"row": np.arange(7) / 2, "layer": ("row", np.zeros(7, dtype=int)), "run": "a"},
        attrs={"mean": np.float64(0.5), "count": np.int64(3), "list": np.arange(2), "name": "Größe"},
    )
    tree = xr.DataTree.from_dict({"/": dataset[["row"]], "/inner": dataset, "/inner/deeper": dataset[["count"]]})
    write_tree(tree, tmp_path / "ours")
    tree.to_zarr(tmp_path / "theirs", zarr_format=2, consolidated=True)
    xr.testing.assert_identical(read_tree(tmp_path / "ours").load(), read_tree(tmp_path / "theirs").load())
    chunks = len(list((tmp_path / "ours" / "inner" / "count").glob("[0-9]*")))
    assert chunks == {2**26: 1, 100: 1, 1: 6}[limit]  # a chunk of zeros is left out


def test_what_is_neither_number_nor_text_is_refused(tmp_path):
    tree = xr.DataTree(xr.Dataset({"x": ("row", np.array([1, "a"], dtype=object))}))
    with pytest.raises(ValueError, match="Expected numbers, booleans or text in 'x', got object"):
        write_tree(tree, tmp_path / "out")


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        write_tree(example_tree(steps=2, matrices=2), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
