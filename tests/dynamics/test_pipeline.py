"""What ``analyze_run`` accepts, and what it calls runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import xarray as xr

import dynamics
from dynamics import pipeline
from dynamics.pipeline import Options, output_folder
from tests.dynamics.intervention.test_sensitivity import trained_llama, words
from tests.runs import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / name, seed=seed) for seed, name in enumerate(("a", "b", "c"))]


def test_a_list_of_runs_is_named_by_folders(runs: list[Path], tmp_path: Path) -> None:
    tree = dynamics.analyze_run(runs[:2], out=tmp_path, report=False)
    assert list(tree["runs"].children) == ["a", "b"]
    assert all("label" not in run.attrs for run in tree["runs"].children.values())


def test_labels_group_runs(runs: list[Path], tmp_path: Path) -> None:
    tree = dynamics.analyze_run({"imax": runs[:2], "dmax": runs[2:]}, out=tmp_path, report=False)
    labels = {name: run.attrs["label"] for name, run in tree["runs"].children.items()}
    assert labels == {"a": "imax", "b": "imax", "c": "dmax"}


def test_names_to_runs_are_deprecated(runs: list[Path], tmp_path: Path) -> None:
    message = "analyze_run({'name': 'run'}) is deprecated and will be removed in the next release; use "
    with pytest.warns(DeprecationWarning, match=re.escape(message)):
        tree = dynamics.analyze_run({"first": runs[0], "second": runs[1]}, out=tmp_path, report=False)
    assert list(tree["runs"].children) == ["first", "second"]


def test_options_are_deprecated(runs: list[Path], tmp_path: Path) -> None:
    message = "options=Options(matrices=…, …) is deprecated and will be removed in the next release; use analyze_run("
    with pytest.warns(DeprecationWarning, match=re.escape(message)):
        tree = dynamics.analyze_run(runs[0], out=tmp_path, options=Options(report=False, matrices="q_proj"))
    assert all("q_proj" in name for name in tree["update"]["matrix"].values)
    with pytest.warns(DeprecationWarning, match="pass keywords to analyze_run"):
        assert dynamics.Options is Options


def test_ranks_by_effect_are_written_beside_those_by_energy(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = dynamics.sensitivity(trained_llama(), [words("a", 1)], step=30)
    monkeypatch.setattr(pipeline, "log_groups", lambda trajectory: {"sensitivity": measured})
    dynamics.analyze_run(runs[0], out=tmp_path / "one", report=False)
    dynamics.analyze_run(runs[:2], out=tmp_path / "two", report=False)
    ranks = measured["rank_by_effect"].isel(step=0).to_series()
    pattern = json.loads((tmp_path / "one" / "analysis" / "rank_pattern_by_effect.json").read_text())
    assert pattern == ranks.clip(lower=1).astype(int).to_dict()
    names = sorted(path.name for path in (tmp_path / "two" / "analysis").glob("rank_pattern*"))
    assert names == [f"rank_pattern{how}.{run}.json" for how in ("", "_by_effect") for run in ("a", "b")]
    stored = dynamics.open_run(tmp_path / "one")["sensitivity"].to_dataset().load()
    xr.testing.assert_identical(stored, measured)


def test_no_run_at_all() -> None:
    with pytest.raises(ValueError, match=re.escape("Expected at least one run folder, got none.")):
        dynamics.analyze_run([])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"higher": ["vqa"], "lower": ["vqa"]}, "Expected each task in higher or in lower, got 'vqa' in both."),
        ({"device": "tpu"}, "Expected the device to be auto, cpu, cuda or cuda:i, got 'tpu'."),
    ],
)
def test_invalid_choices(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dynamics.analyze_run("runs/a", **choice)  # type: ignore[arg-type]


def test_where_results_go() -> None:
    assert output_folder([Path("runs/a")]) == Path("runs/a/dynamics")
    assert output_folder([Path("runs/a"), Path("runs/b")]) == Path("dynamics-comparison")
    assert output_folder([Path("runs/a")], "elsewhere") == Path("elsewhere")
