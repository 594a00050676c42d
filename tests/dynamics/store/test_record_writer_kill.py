"""A process that is killed while it captures loses the step in flight, and no other."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")

# Each round resumes two steps back, as a training does from its checkpoint, writes until it is killed, and is read.
SCRIPT = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import numpy as np, xarray as xr
    from dynamics.store import RecordWriter
    from dynamics.store.record_folders import record_folders, stored_records

    folder, moments = Path(sys.argv[1]), random.Random(0)

    def record(step):
        values = np.full((1, 3), float(step))
        dataset = xr.Dataset({"norm": (("step", "matrix"), values)}, coords={"step": [step], "matrix": list("abc")})
        return {"update": dataset, "gradient": dataset}

    def train(after, pipe):
        writer = RecordWriter.resume(folder, after, {})
        for step in range(after + 1, after + 1000):
            writer.write(step, record(step))
            os.write(pipe, f"{step}\\n".encode())

    def values(found):
        return {step: groups["update"]["norm"].values.tolist() for step, groups in found.records.items()}

    last = 0
    for _ in range(20):
        after = max(0, last - 2)
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train(after, sender)
            finally:
                os._exit(1)
        os.close(sender)
        reports = os.fdopen(receiver)
        reported = [reports.readline() for _ in range(moments.randint(0, 4))]
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported = [int(line) for line in reported + reports.readlines()]
        folders = record_folders(folder.parent)
        left = stored_records(folders) if folders else None
        with RecordWriter.resume(folder, 10**9, {}) as writer:
            steps, partial = writer.steps, [path.name for path in writer.path.glob(".partial-*")]
        last = max(steps, default=0)
        seen = values(left) if left else {}
        print(json.dumps({"before": after, "reported": reported, "values": list(seen.items()),
                          "broken": left.broken if left else {}, "steps": steps, "partial": partial}), flush=True)
"""


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "dynamics"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_reported_step_is_there_whole_and_at_most_one_more(rounds):
    assert len(rounds) == 20
    for one in rounds:
        steps, done = [step for step, _ in one["values"]], [one["before"], *one["reported"]]
        assert steps == list(range(1, len(steps) + 1))
        assert all(values == [[float(step)] * 3] for step, values in one["values"])
        assert done == list(range(one["before"], done[-1] + 1))
        assert done[-1] <= len(steps) <= done[-1] + (1 if one["reported"] else 2)  # dropped ones, the last one first
        assert one["broken"] == {}


def test_it_resumes_and_sweeps(rounds):
    assert all(one["steps"] == [step for step, _ in one["values"]] for one in rounds)
    assert all(one["partial"] == [] for one in rounds)
    assert sum(len(one["reported"]) for one in rounds) >= 20
