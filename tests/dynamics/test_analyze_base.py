"""Full fine-tuning by the command line: with the base, without it, and with a base that does not fit."""

import json

import numpy as np
import pytest
import torch

from dynamics import open_run, schema
from tests.command import analyze
from tests.runs import write_run
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def codes(tree):
    return {finding["code"] for finding in json.loads(tree.attrs["findings"])}


def test_totals_are_since_the_base(tmp_path):
    run, base = write_dense_run(tmp_path / "run", (10, 20, 30)), write_model(tmp_path / "base")
    result = analyze("--no-report", run, "--base", base, "--intruders")
    assert result.returncode == 0, result.stderr
    tree = open_run(run)
    schema.check(tree)
    update = tree["update"].to_dataset()
    start = model_tensors()
    for step, before in ((10, 0), (20, 10), (30, 20)):
        for name in MATRICES:
            now, earlier, first = (
                tensors[f"{name}.weight"].double()
                for tensors in (model_tensors(step), model_tensors(before) if before else start, start)
            )
            for kind, change in (("total", now - first), ("increment", now - earlier)):
                here = update.sel(step=step, kind=kind, matrix=name)
                expected = torch.linalg.svdvals(change)
                found = here["singular_value"].values[: len(expected)]
                np.testing.assert_allclose(found, expected, atol=1e-7 * float(expected[0]))
                assert here["decomposition"] == schema.DECOMPOSITIONS.index("gram")
    assert update["from_step"].values.tolist() == [0, 10, 20]
    roles = [each.get("role", "") for each in json.loads(tree.attrs["inputs"])]
    assert roles == ["", "", "", "base"]
    assert "of the norm of the base weights" in " ".join(result.stdout.split())
    assert "as long as the straight line from start to end" in " ".join(result.stdout.split())
    assert np.isfinite(tree["base"]["intruder_energy"]).all()
    assert "weights" not in tree.children


def test_the_weights_themselves(tmp_path):
    run = write_dense_run(tmp_path / "run")
    assert analyze("--no-report", run, "--weights").returncode == 0
    assert np.isfinite(open_run(run)["weights"]["stable_rank"]).all()


def test_without_a_base_the_first_checkpoint_is_the_start(tmp_path):
    run = write_dense_run(tmp_path / "run")
    result = analyze("--no-report", run)
    assert result.returncode == 0
    tree = open_run(run)
    assert "base" not in tree.children
    assert np.isnan(tree["update"]["frobenius_norm"].sel(step=10)).all()
    assert tree["update"]["from_step"].values.tolist() == [-1, 10]
    assert "a random matrix of the same shape has" in " ".join(result.stdout.split())
    assert "OD123" in codes(tree)


def test_saved_modules_and_adapters_in_one_run(tmp_path):
    run = write_run(tmp_path / "run")
    found = analyze("--no-report", run, "--base", write_model(tmp_path / "base"))
    assert found.returncode in (0, 1)  # none of the adapter's matrices is in this base
    assert open_run(run)["update"].sizes["matrix"] > 0


@pytest.mark.parametrize("base", ["nothing", "empty", "file", "adapter"])
def test_a_base_that_is_none_is_refused(tmp_path, base):
    run = write_dense_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "adapter", steps=(5,))
    result = analyze("--no-report", run, "--base", tmp_path / base)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert base in result.stderr
    assert not (run / "dynamics" / "analysis").exists()


def test_a_base_of_another_model_is_named(tmp_path):
    run = write_dense_run(tmp_path / "run")
    other = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8), "lm_head.weight": torch.randn(30, 8)}
    result = analyze("--no-report", run, "--base", write_model(tmp_path / "base", other))
    assert result.returncode == 0, result.stderr
    tree = open_run(run)
    assert "OD124" in codes(tree)
    total = tree["update"]["frobenius_norm"].sel(kind="total", step=20)
    assert np.isfinite(total.sel(matrix="model.layers.0.self_attn.q_proj"))
    assert np.isnan(total.sel(matrix="lm_head"))
    assert np.isfinite(tree["update"]["frobenius_norm"].sel(kind="increment", step=20)).all()


def test_every_format_gives_the_same(tmp_path):
    values = []
    for style in ("", "bin", "sharded", "distributed"):
        how = {"style": style} if style else {}
        run, base = write_dense_run(tmp_path / f"{style} run", **how), write_model(tmp_path / f"{style} base", **how)
        assert analyze("--no-report", run, "--base", base).returncode == 0
        values.append(open_run(run)["update"]["singular_value"].sel(matrix=list(MATRICES)).values)
    for others in values[1:]:
        np.testing.assert_array_equal(values[0], others)


def test_a_bfloat16_run_says_what_rounding_spoils(tmp_path):
    start = model_tensors(dtype=torch.bfloat16)
    moved = {key: (value.float() * (1 + 3e-3)).bfloat16() for key, value in start.items()}
    write_model(tmp_path / "run" / "checkpoint-5", moved)
    result = analyze("--no-report", tmp_path / "run", "--base", write_model(tmp_path / "base", start))
    update = open_run(tmp_path / "run")["update"]
    assert update["quantisation_limited"].sel(kind="total").any()
    assert (update["rank_above_rounding"].sel(kind="total") < 8).all()
    assert "OD203" in codes(open_run(tmp_path / "run"))
    assert result.returncode == 0
