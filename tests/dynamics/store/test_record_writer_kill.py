"""A process that is killed while it captures loses the step in flight, and no other."""

import os

import numpy as np
import pytest
import xarray as xr

from dynamics.store import RecordWriter
from tests.forks import ROUNDS, killed_twenty_times

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


def record(step):
    values = np.full((1, 3), float(step))
    dataset = xr.Dataset({"norm": (("step", "matrix"), values)}, coords={"step": [step], "matrix": list("abc")})
    return {"update": dataset, "gradient": dataset}


def test_every_reported_step_is_there_whole_and_the_next_writer_resumes_and_sweeps(tmp_path):
    folder = tmp_path / "dynamics"

    def train(after, report):
        writer = RecordWriter.resume(folder, after, {})
        for step in range(after + 1, after + 1000):
            writer.write(step, record(step))
            report(step)

    kills = 0
    for _, left in killed_twenty_times(tmp_path, train, longest=0.03):
        kills += 1
        records = left.records if left else {}
        for step, groups in records.items():
            assert groups["update"]["norm"].values.tolist() == [[float(step)] * 3]
        with RecordWriter.resume(folder, 10**9, {}) as writer:
            assert writer.steps == list(records)
            assert list(writer.path.glob(".partial-*")) == []
    assert kills == ROUNDS
