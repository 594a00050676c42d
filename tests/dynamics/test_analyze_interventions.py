"""What `--intervene` refuses, before anything is computed; what it does is tested beside the probe of checkpoints."""

from __future__ import annotations

import pytest

from dynamics import analyze_run
from dynamics.pipeline import Options
from tests.command import analyze, assert_refused
from tests.runs import write_run

PROBED = ("--probe", "os.path:basename", "--intervene")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("refused") / "run", [10])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "on"], "arms: expected together with intervene, got it alone. Add --intervene."),
        (["--k", "4"], "k: expected together with intervene, got it alone."),
        (["--export", "arms"], "export: expected together with intervene, got it alone."),
        (["--intervene"], "got none. Add --probe MODULE:FUNCTION."),
        ([*PROBED, "--arms", "on,of"], "Expected arms among full, on, off, random, matched, bottom"),
        ([*PROBED, "--arms", ""], "got ''."),
        ([*PROBED, "--k", "0"], "Expected k, numbers of directions, from 1 to the number of probe samples, got 0."),
        ([*PROBED, "--k", "9" * 30], "from 1 to the number of probe samples, got 9999"),
    ],
)
def test_what_does_not_belong_together_is_refused(run, arguments, words):
    assert_refused(analyze(run, *arguments), 2, words)
    assert not (run / "dynamics").exists()


def test_numbers_of_directions_are_numbers(run):
    refused = analyze(run, *PROBED, "--k", "many")
    assert refused.returncode == 2
    assert "expected whole numbers, such as 16 or 16,4, got 'many'" in " ".join(refused.stderr.replace("│", "").split())


def test_a_folder_for_export_is_new_or_empty(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for export, words in (
        (tmp_path, "export: expected a new or empty folder, got '"),
        (tmp_path / "notes.txt", "notes.txt' cannot be made (File exists). Choose another one."),
        (tmp_path / "notes.txt" / "arms", "cannot be made (Not a directory)"),
        (run / "dynamics" / "analysis" / "arms", "export: expected another folder than that of the result, got '"),
    ):
        assert_refused(analyze(run, *PROBED, "--export", export), 2, words)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (run / "dynamics").exists()


def test_in_python_too(run):
    with pytest.raises(ValueError, match="arms: expected together with intervene"):
        analyze_run(run, arms=["on"])
    with pytest.raises(ValueError, match="intervene: expected probe samples"):
        analyze_run(run, intervene=True)
    assert Options().interventions is None
    assert Options(intervene=True, k=(4,)).interventions.k == (4,)
