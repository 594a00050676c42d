"""A run's stored result, wherever it lies: an analysis, records, or both."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from dynamics import NotARun, open_run, schema
from dynamics.pipeline import measure
from dynamics.store import write_tree
from dynamics.store.tree import open_source
from tests.records import rewrite
from tests.runs import drifting, write_records, write_run


@pytest.fixture
def tree():
    dataset = xr.Dataset(
        {"value": ("matrix", [1.0, np.nan]), "flag": ("matrix", [True, False])}, coords={"matrix": ["a.b", "ä.c"]}
    )
    tree = xr.DataTree.from_dict({"/update": dataset})
    tree.attrs = {"run": "r", "findings": "[]", "seed": 0}
    return tree


PLACES = ["dynamics/analysis/analysis.zarr", "analysis/analysis.zarr", "dynamics/analysis.zarr", "analysis.zarr"]


@pytest.mark.parametrize("place", PLACES)
def test_round_trip(tree, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    write_tree(tree, tmp_path / place)
    opened = open_run(tmp_path)
    xr.testing.assert_identical(opened.load(), tree)
    assert opened["update"]["flag"].dtype == bool


def test_the_store_itself(tree, tmp_path):
    write_tree(tree, tmp_path / "x.zarr")
    xr.testing.assert_identical(open_run(tmp_path / "x.zarr").load(), tree)


def test_nothing_is_stored(tmp_path):
    message = (
        f"No stored result for '{tmp_path}' (looked for analysis/, records/, analysis.zarr and capture.zarr, there and "
        f"in dynamics/). Make one with: python -m dynamics.analyze {tmp_path}"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_run(tmp_path)


def test_the_records_of_several_trainings_are_not_those_of_their_folder(tmp_path):
    """As a search for hyperparameters leaves them: a folder for each trial."""
    for trial in (0, 2, 10):
        write_records(tmp_path / f"run-{trial}")
    (tmp_path / "run-3").symlink_to(tmp_path / "run-0", target_is_directory=True)
    message = "Records are in its subfolders: run-0, run-2, run-10. Pass one of them."
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        open_run(tmp_path)
    with pytest.raises(NotARun, match=r"No checkpoints in .*" + re.escape(message)):
        open_source(tmp_path)


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


def test_a_result_of_the_first_edition_is_read_where_there_is_no_other(tree, tmp_path):
    (tmp_path / "dynamics" / "analysis").mkdir(parents=True)
    write_tree(tree, tmp_path / "dynamics" / "analysis.zarr")
    assert open_run(tmp_path).attrs["run"] == "r"
    tree.attrs["run"] = "new"
    write_tree(tree, tmp_path / "dynamics" / "analysis" / "analysis.zarr")
    assert open_run(tmp_path).attrs["run"] == "new"


def test_a_run_of_the_first_edition_opens(first_edition):
    opened = open_run(first_edition)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [1, 2, 4]
    assert opened.attrs == open_run(first_edition / "dynamics" / "analysis.zarr").attrs


def test_a_result_whose_replacement_was_interrupted_says_so(tree, tmp_path):
    (tmp_path / "analysis.previous").mkdir()
    write_tree(tree, tmp_path / "analysis.previous" / "analysis.zarr")
    (finding,) = json.loads(open_run(tmp_path).attrs["findings"])
    assert (finding["code"], finding["severity"]) == ("OD601", "warning")
    assert finding["message"].endswith("This is the one before, in analysis.previous/.")
    (tmp_path / "analysis").mkdir()
    write_tree(tree, tmp_path / "analysis" / "analysis.zarr")
    assert open_run(tmp_path).attrs["findings"] == "[]"


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


# Records.


@pytest.fixture
def captured(tmp_path):
    write_records(tmp_path / "captured")
    return tmp_path / "captured"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run whose analysis has the records in it."""
    run = write_run(tmp_path_factory.mktemp("written") / "both", drifting([10, 20, 30]))
    write_records(run)
    source = open_source(run)
    (run / "dynamics" / "analysis").mkdir()
    write_tree(measure(source.trajectory, records=source.records), run / "dynamics" / "analysis" / "analysis.zarr")
    return run


@pytest.fixture
def both(written, tmp_path):
    return shutil.copytree(written, tmp_path / "both")


@pytest.mark.parametrize("place", ["", "dynamics", "dynamics/records"])
def test_a_capture_alone(captured, place):
    opened = open_run(captured / place)
    schema.check(opened)
    assert opened.attrs["run"] == "captured"
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20]
    assert {"gradient", "null_gradient", "summary_gradient"} <= set(opened.children)


def test_a_capture_beside_the_run_folders_own_files(captured):
    shutil.move(captured / "dynamics" / "records", captured / "records")
    assert open_run(captured)["update"]["step"].values.tolist() == [5, 10, 15, 20]


def test_an_analysis_that_has_the_records_is_opened_as_it_is(both):
    opened = open_run(both)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]
    assert opened.identical(xr.open_datatree(both / "dynamics" / "analysis" / "analysis.zarr", engine="zarr"))


def test_records_that_came_since_are_merged(both):
    write_records(both, [5, 10, 15, 20, 25])
    opened = open_run(both)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 25, 30]
    # In memory: what is stored stays as it was.
    stored = xr.open_datatree(both / "dynamics" / "analysis" / "analysis.zarr", engine="zarr")
    assert stored["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]


def test_each_of_both_alone(both):
    write_records(both, [5, 10, 15, 20, 25])
    assert open_run(both / "dynamics" / "analysis" / "analysis.zarr")["update"]["step"].values.tolist() == [
        5,
        10,
        15,
        20,
        30,
    ]
    assert open_run(both / "dynamics" / "records")["update"]["step"].values.tolist() == [5, 10, 15, 20, 25]


def test_a_record_that_no_recorder_writes_is_a_finding(captured):
    record = captured / "dynamics" / "records" / "step-000000000010.safetensors"
    rewrite(record, lambda groups: groups["update"]["from_step"].values.fill(11))
    opened = open_run(captured)
    schema.check(opened)
    assert opened["update"]["from_step"].values.tolist() == [0, -1, 15]
    (finding,) = [each for each in json.loads(opened.attrs["findings"]) if each["code"] == "OD309"]
    assert finding["file"] == "dynamics/records/step-000000000010.safetensors"


@pytest.mark.parametrize("place", ["", "dynamics/records"])
def test_a_capture_whose_attributes_are_damaged(captured, place):
    (captured / "dynamics" / "records" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"^Expected the records of .*, but cannot read them \('.*' is not valid"):
        open_run(captured / place)


def test_a_capture_of_no_step_yet(tmp_path):
    write_records(tmp_path / "run", [])
    with pytest.raises(FileNotFoundError, match=r"hold no step that can be used\. Wait for the first one, or analyse"):
        open_run(tmp_path / "run")


def test_reading_an_analysis_does_not_wait_for_torch(tree, tmp_path):
    (tmp_path / "analysis").mkdir()
    write_tree(tree, tmp_path / "analysis" / "analysis.zarr")
    code = f"import sys, dynamics; dynamics.open_run({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
