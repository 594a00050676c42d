"""Leading singular values alone, beside the whole analysis: what is exact stays, what is bounded lies inside."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import dynamics
from dynamics import open_run, schema
from dynamics.spectra.dataset import measure_update
from dynamics.store import merge
from tests.command import analyze
from tests.whole_models import write_model

SIDES = {"model.layers.0.self_attn.q_proj": (96, 96), "model.layers.0.mlp.up_proj": (160, 96)}
SMALL = "model.layers.0.self_attn.k_proj"
EXACT = ("frobenius_norm", "spectral_norm", "participation_ratio", "stable_rank", "dominant_ratio", "energy_top_k")
UNKNOWN = ("entropy_energy", "effective_rank_energy", "entropy_amplitude", "nuclear_norm", "nuclear_rank", "gini")
UNKNOWN = (*UNKNOWN, "hoyer", "condition_number", "marchenko_pastur_outliers", "entropy_deficit", "null_percentile")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A base, and steps whose changes have a few strong directions before a slow decay."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in (*SIDES.items(), (SMALL, (16, 96)))}
    for step in range(1, seed + 1):
        generator = torch.Generator().manual_seed(step)
        for name, weight in weights.items():
            size = min(weight.shape)
            values = 0.5 ** torch.arange(size) + 0.01
            left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in weight.shape)
            weights[name] = weight + (left * values) @ right.mT
    return {f"{name}.weight": weight for name, weight in weights.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("top")
    for step in (1, 2):
        write_model(folder / "run" / f"checkpoint-{step}", tensors(step))
    return folder / "run", write_model(folder / "base", tensors(0))


@pytest.fixture(scope="module")
def trees(folders, tmp_path_factory):
    run, base = folders
    places = [tmp_path_factory.mktemp(name) for name in ("all", "top")]
    return [
        dynamics.analyze_run(run, base=base, out=place, weights=True, report=False, top=top)
        for place, top in zip(places, (None, 8), strict=True)
    ]


def test_what_is_exact_stays_and_what_is_bounded_lies_inside(trees):
    whole, top = (tree["update"].to_dataset().sel(matrix=list(SIDES)) for tree in trees)
    schema.check(trees[1])
    assert (top["decomposition"] == schema.DECOMPOSITIONS.index("lanczos")).all()
    assert (top["count"] == 8).all()
    np.testing.assert_allclose(top["singular_value"][..., :8], whole["singular_value"][..., :8], rtol=1e-6)
    for name in EXACT:
        np.testing.assert_allclose(top[name], whole[name], rtol=1e-7, err_msg=name)
    for name in UNKNOWN:
        assert top[name].isnull().all(), name
        assert whole[name].notnull().any(), name
    low, high = top["entropy_energy_low"], top["entropy_energy_high"]
    assert ((low - 1e-9 <= whole["entropy_energy"]) & (whole["entropy_energy"] <= high + 1e-9)).all()
    assert (high - low < 0.1).all()
    for name in ("rank_at_energy", "suggested_rank", "rank_above_rounding"):
        known = top[name].notnull()
        assert (top[name] == whole[name]).where(known, True).all(), name
    xr.testing.assert_allclose(trees[1]["path"].to_dataset(), trees[0]["path"].to_dataset())
    np.testing.assert_allclose(trees[1]["base"]["relative_size"], trees[0]["base"]["relative_size"], rtol=1e-9)


def test_ranks_that_leading_values_do_not_reach_are_nan(trees):
    whole, top = (tree["update"].to_dataset().sel(matrix=list(SIDES)) for tree in trees)
    assert (whole["numerical_rank"] > 8).all()
    assert top["numerical_rank"].isnull().all()


def test_small_matrices_are_decomposed_whole(trees):
    whole, top = (tree["update"].to_dataset().sel(matrix=SMALL) for tree in trees)
    assert (top["decomposition"] == schema.DECOMPOSITIONS.index("gram")).all()
    xr.testing.assert_allclose(top["entropy_energy"], whole["entropy_energy"])
    assert top["entropy_energy_low"].isnull().all()


def test_weights_too(trees):
    whole, top = (tree["weights"].to_dataset().sel(matrix=list(SIDES)) for tree in trees)
    np.testing.assert_allclose(top["stable_rank"], whole["stable_rank"], rtol=1e-7)
    assert ((top["entropy_energy_low"] <= whole["entropy_energy"]) & (top["entropy_energy"].isnull())).all()
    assert (whole["entropy_energy"] <= top["entropy_energy_high"] + 1e-9).all()


def test_a_finding_says_which_measures_are_missing_and_why(trees):
    whole, top = (json.loads(tree.attrs["findings"]) for tree in trees)
    (finding,) = [finding for finding in top if finding["code"] == "OD210"]
    assert finding["evidence"]["top"] == [8]
    assert finding["evidence"]["cells"] == 2 * 2 * len(SIDES)
    assert "OD210" not in {finding["code"] for finding in whole}
    assert json.loads(trees[1].attrs["configuration"])["top"] == 8
    assert not set(trees[0]["update"].data_vars) & set(schema.BOUNDS)


def test_the_command_reports_it(folders, tmp_path):
    run, base = folders
    result = analyze(run, "--base", base, "--top", "8", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "entropy_energy_low" in open_run(tmp_path)["update"]
    assert "of a matrix's update, known of 1 of 3 matrices, is" in " ".join(result.stdout.split())
    assert "OD210" in (tmp_path / "analysis" / "report.html").read_text()


def test_a_reopened_result_gives_the_same(folders, tmp_path):
    run, base = folders
    tree = dynamics.analyze_run(run, base=base, out=tmp_path, report=False, top=8)
    raw = merge.unmeasured(tree["update"].to_dataset())
    again = measure_update(merge.merge(raw, None)[0])["update"]
    for name in (*EXACT, *schema.BOUNDS, "entropy_energy", "rank_at_energy", "suggested_rank"):
        xr.testing.assert_allclose(again[name], tree["update"][name])


@pytest.mark.parametrize("top", [0, -1])
def test_none_is_refused(folders, top):
    with pytest.raises(ValueError, match=f"top: expected at least 1 singular value, got {top}"):
        dynamics.analyze_run(folders[0], top=top)
