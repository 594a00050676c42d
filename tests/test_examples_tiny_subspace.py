"""The example shows what it says: steps concentrate on both tasks, and the part that learns is not the same."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "tiny_subspace.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("tiny_subspace", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["tiny_subspace"] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def improvements(example: ModuleType, task: str) -> dict[str, float]:
    """How much each training lowers the held-out loss; all begin at the same."""
    problem = next(problem for problem in example.PROBLEMS if problem.name == task)
    runs = {keep: example.train(problem, keep, steps=300, seed=0) for keep in ("full", "on", "off")}
    assert len({before for before, _, _ in runs.values()}) == 1
    assert runs["full"][2] > 0.3  # of 4 directions of 6,532
    return {keep: before - after for keep, (before, after, _) in runs.items()}


def test_where_steps_go_back_and_forth_the_rest_learns(example: ModuleType) -> None:
    lowered = improvements(example, "clusters")
    assert lowered["full"] > 0.05
    assert abs(lowered["on"]) < 0.05 * lowered["full"]
    assert lowered["off"] > 0.7 * lowered["full"]


def test_where_the_target_depends_on_few_inputs_the_leading_directions_learn(example: ModuleType) -> None:
    lowered = improvements(example, "teacher")
    assert lowered["full"] > 1.5
    assert lowered["on"] > 0.9 * lowered["full"]
    assert lowered["off"] < 0.3 * lowered["full"]


def test_it_prints_a_table_for_each_task(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--steps", "4", "--seeds", "2"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.endswith("(lowest to highest)")] == ["clusters", "teacher"]
    rows = [line.split()[0] for line in lines if re.match(r"(full|on|off) ", line)]
    assert rows == ["full", "on", "off"] * 2
