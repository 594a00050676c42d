"""A run's stored result, wherever it lies: an analysis, a capture, or both."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from dynamics import open_run, schema
from dynamics.pipeline import measure
from dynamics.store import write_tree
from dynamics.store.tree import open_source
from tests.captures import drifting, write_capture
from tests.runs import write_run


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


def test_a_store_that_is_a_link_is_not_followed(tree, tmp_path):
    write_tree(tree, tmp_path / "x.zarr")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "analysis.zarr").symlink_to(tmp_path / "x.zarr")
    message = (
        f"'{tmp_path / 'run' / 'analysis.zarr'}' is a link, which is not followed. Open what it points to instead."
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("place", ["analysis.zarr", ".staging/old-elsewhere-1-ab/was/analysis.zarr"])
def test_a_result_that_another_machine_did_not_finish_says_so(tree, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".staging" / "old-elsewhere-1-ab").mkdir(parents=True, exist_ok=True)
    write_tree(tree, tmp_path / place)
    (finding,) = json.loads(open_run(tmp_path).attrs["findings"])
    assert (finding["code"], finding["severity"]) == ("OD601", "error")
    assert finding["remedy"] == (
        "Make sure that nothing is analysing this run there, remove .staging, and analyse the run again."
    )


@pytest.mark.parametrize(
    "codecs", [{"compressor": {"id": "pickle"}}, {"filters": [{"id": "pickle"}]}, {"filters": [3]}]
)
def test_a_store_with_a_codec_of_somebody_else_is_not_decoded(tree, tmp_path, codecs):
    write_tree(tree, tmp_path / "analysis.zarr")
    path = tmp_path / "analysis.zarr" / ".zmetadata"
    metadata = json.loads(path.read_text())
    metadata["metadata"]["update/value/.zarray"] |= codecs
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"Expected a result store at .*, but it does not open \("):
        open_run(tmp_path)


def test_an_existing_store_is_not_overwritten(tree, tmp_path):
    write_tree(tree, tmp_path / "x.zarr")
    with pytest.raises(Exception, match=r"exist|contains"):
        write_tree(tree, tmp_path / "x.zarr")


# A capture.


@pytest.fixture
def captured(tmp_path):
    write_capture(tmp_path / "captured")
    return tmp_path / "captured"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run whose analysis has the records in it."""
    run = write_run(tmp_path_factory.mktemp("written") / "both", drifting([10, 20, 30]))
    write_capture(run)
    source = open_source(run)
    write_tree(measure(source.trajectory, captured=source.captured), run / "dynamics" / "analysis.zarr")
    return run


@pytest.fixture
def both(written, tmp_path):
    return shutil.copytree(written, tmp_path / "both")


@pytest.mark.parametrize("place", ["", "dynamics", "dynamics/capture.zarr"])
def test_a_capture_alone(captured, place):
    opened = open_run(captured / place)
    schema.check(opened)
    assert opened.attrs["run"] == "captured"
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20]
    assert {"gradient", "null_gradient", "summary_gradient"} <= set(opened.children)


def test_a_capture_beside_the_run_folders_own_files(captured):
    shutil.move(captured / "dynamics" / "capture.zarr", captured / "capture.zarr")
    assert open_run(captured)["update"]["step"].values.tolist() == [5, 10, 15, 20]


def test_an_analysis_that_has_the_records_is_opened_as_it_is(both):
    opened = open_run(both)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]
    assert opened.identical(xr.open_datatree(both / "dynamics" / "analysis.zarr", engine="zarr"))


def test_records_that_came_since_are_merged(both):
    write_capture(both, [5, 10, 15, 20, 25])
    opened = open_run(both)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 25, 30]
    # In memory: what is stored stays as it was.
    stored = xr.open_datatree(both / "dynamics" / "analysis.zarr", engine="zarr")
    assert stored["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]


def test_each_of_both_alone(both):
    write_capture(both, [5, 10, 15, 20, 25])
    assert open_run(both / "dynamics" / "analysis.zarr")["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]
    assert open_run(both / "dynamics" / "capture.zarr")["update"]["step"].values.tolist() == [5, 10, 15, 20, 25]


def test_a_record_that_no_recorder_writes_is_a_finding(captured):
    record = captured / "dynamics" / "capture.zarr" / "step-000000000010"
    (record / "update" / "from_step" / "0").write_bytes(np.int64(11).tobytes())
    opened = open_run(captured)
    schema.check(opened)
    assert opened["update"]["from_step"].values.tolist() == [0, -1, 15]
    (finding,) = [each for each in json.loads(opened.attrs["findings"]) if each["code"] == "OD309"]
    assert finding["file"] == "dynamics/capture.zarr/step-000000000010"


@pytest.mark.parametrize("place", ["", "dynamics/capture.zarr"])
def test_a_capture_whose_attributes_are_damaged(captured, place):
    (captured / "dynamics" / "capture.zarr" / ".zattrs").write_text("{")
    with pytest.raises(ValueError, match=r"^Expected a capture store at '.*', but it is none \('.*' does not parse"):
        open_run(captured / place)


def test_a_capture_of_no_step_yet(tmp_path):
    write_capture(tmp_path / "run", [])
    with pytest.raises(FileNotFoundError, match=r"holds no step that can be used\. Wait for the first one, or analyse"):
        open_run(tmp_path / "run")


def test_reading_an_analysis_does_not_wait_for_torch(tree, tmp_path):
    write_tree(tree, tmp_path / "analysis.zarr")
    code = f"import sys, dynamics; dynamics.open_run({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
