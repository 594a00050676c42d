"""The examples of recording run as they stand, and leave records that open."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

import dynamics

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Script → what it needs, arguments, and the steps that it must have recorded.
SCRIPTS = {
    "train_with_callback.py": (("transformers", "peft"), ("--steps", "4"), [1, 2, 4]),
    "plain_loop.py": ((), ("--steps", "40"), [20, 40]),
    "two_tasks.py": (("transformers", "peft"), ("--steps", "2", "--base-steps", "3"), [1, 2]),
    "sft_with_callback.py": (("trl", "datasets"), ("--steps", "3"), [1, 2, 3]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_ends_well_and_leaves_records(name, tmp_path, monkeypatch, capsys):
    needs, arguments, steps = SCRIPTS[name]
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs {package}, which is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "run"), *arguments])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # as a script has it
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.endswith(f"python -m dynamics.analyze {tmp_path / 'run'}\n")
    tree = dynamics.open_run(tmp_path / "run")
    assert tree["update"]["step"].values.tolist() == steps
    assert (tree["update"]["frobenius_norm"].sel(kind="increment").values > 0).any(-1).all()
    assert (tree["gradient"]["norm_before_clip"].values > 0).any(-1).all()
