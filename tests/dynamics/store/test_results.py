"""What is written through memory is what xarray writes to a folder."""

import pytest
import xarray as xr

from dynamics.store.results import read_tree, write_tree
from tests.trees import example_runs, example_tree


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_xarray(tmp_path):
    tree = example_runs(a=example_tree(steps=2, matrices=2), b=example_tree(steps=3, matrices=2, gradients=[100]))
    write_tree(tree, tmp_path / "ours")
    tree.to_zarr(tmp_path / "theirs", zarr_format=2, consolidated=True)
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    xr.testing.assert_identical(read_tree(tmp_path / "ours"), read_tree(tmp_path / "theirs"))


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        write_tree(example_tree(steps=2, matrices=2), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
